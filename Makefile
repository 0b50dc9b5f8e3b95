# Every target sets up .venv by itself on a machine with Python 3.11+.
# torch comes first and pinned, so that no dependency pulls another one. Where the index offers a build with CUDA and a
# CPU is enough: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH  ?= torch==2.13.0
EXTRAS ?= dev,train,widgets
RUN    ?= runs/demo
BIN    := .venv/bin
PYTEST ?= -n 2

.PHONY: demo test slow check format bench bench-gpu calibrate clean

.venv/ready: pyproject.toml Makefile
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

demo: .venv/ready   ## score the bundled trajectory, draw the figures, write the report
	$(BIN)/lccp demo --out $(RUN)

test: .venv/ready   ## the whole test suite but the slow, GPU, network and browser tests
	$(BIN)/python -m pytest $(PYTEST) -m "not slow and not gpu and not network and not browser"

slow: .venv/ready   ## the slow tests
	$(BIN)/python -m pytest -m slow

check: .venv/ready   ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready   ## measure time and memory on the CPU (about 20 minutes), rewrite benchmarks/README.md
	$(BIN)/python -m benchmarks.run

bench-gpu: .venv/ready   ## the same on a CUDA device, under 8 minutes; without one it says so and changes nothing
	$(BIN)/python -m benchmarks.gpu

calibrate: .venv/ready   ## how often the statistics are wrong, on made-up data; rewrite docs/calibration.md
	$(BIN)/python -m calibration

clean:
	rm -rf .venv runs
