"""Every measure of generated texts on files in the format of the E2E challenge's scripts, to hold beside theirs.

python benchmarks/text_scores.py REFERENCES OUTPUTS

REFERENCES has one reference a line and an empty line between examples, OUTPUTS one text a line.
"""

import sys
from pathlib import Path

import deltatune

references, outputs = (Path(name).read_text(encoding="utf-8").strip() for name in sys.argv[1:])
scores = deltatune.score_texts(outputs.split("\n"), [example.split("\n") for example in references.split("\n\n")])
for name, figure in scores.figures.items():
    print(f"{name:13} {figure:8.4f}  {scores.variants[name]}")
