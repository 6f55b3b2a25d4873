"""Loading a quantised base never holds the whole of it as it is in the file: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tiny import VOCABULARY, tokenizer

MEASURE = """
import ctypes, gc, json, sys, threading, time
from pathlib import Path
import deltatune

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)

def measured(storage):
    global most, done
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before is used again, and does not show
    most, done, before = 0, False, anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    model = deltatune.load(sys.argv[1], labels=("a", "b"), storage=storage).model
    done = True
    thread.join()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {"peak": most - before, "held": held}

deltatune.load(sys.argv[2], labels=("a", "b"))  # what is imported, and the heap's first growth, come before
print(json.dumps([measured("nf4"), measured("bf16")]))
"""


def save(folder: Path, hidden: int) -> Path:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model.save_pretrained(folder)
    tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_peak_memory_is_the_quantised_model_and_a_few_of_its_largest_tensors(tmp_path: Path) -> None:
    small, large = save(tmp_path / "small", 64), save(tmp_path / "large", 1024)

    run = subprocess.run([sys.executable, "-c", MEASURE, str(large), str(small)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    nf4, plain = json.loads(run.stdout)
    whole = (large / "model.safetensors").stat().st_size  # 16 bits a weight
    assert whole > 100e6
    largest = 3 * 1024 * 1024 * 4  # one of them in the type that it is encoded from
    assert nf4["held"] < 0.27 * whole
    assert nf4["peak"] < nf4["held"] + 3 * largest < whole
    assert plain["peak"] > whole, "what is measured is the memory of the weights"
