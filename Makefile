# Everything here works from a clean clone: each target sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

# Byte code is kept even where the environment says otherwise: without it each of the tests' many processes would compile
# PyTorch and Transformers again, ten seconds of a processor a time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test lint format docs clean browser bench speed

setup: .venv/done

# --no-compile: byte code is made when a module is first used, which spares most of the time of a first installation.
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/deltatune compare experiments/demo.yaml

test: setup browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The report's tests open it in a real Chromium. Where none is found they are skipped and say so; on Debian it is installed.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || test -n "$$CHROMIUM" || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    echo "installing chromium for the report's tests" >&2 && \
	    { apt-get install --yes --quiet --no-install-recommends chromium || \
	      { apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium; }; } >/dev/null 2>&1; } || \
	  echo "no chromium here: the tests that open the report will be skipped" >&2

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Races the peers, which are installed for it, on this machine: about 25 minutes on two quiet cores.
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/bench.py; raced=$$?; $(BIN)/python benchmarks/speed_page.py && exit $$raced

# docs/speed.md and the README's table from what was measured.
speed: setup
	$(BIN)/python benchmarks/speed_page.py

docs: setup
	$(BIN)/python -c "from deltatune.methods.describe import page; print(page(), end='')" > docs/methods.md
	$(BIN)/python -c "from deltatune.planning.claims import page; print(page(), end='')" > docs/claims.md
	$(BIN)/python benchmarks/claims.py --page >> docs/claims.md

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
