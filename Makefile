# Every target sets up .venv by itself on a machine with Python 3.11+.
# torch comes first and pinned, so that no dependency pulls another one. Where the index offers a build with CUDA and a
# CPU is enough: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH  ?= torch==2.13.0
EXTRAS ?= dev,train,widgets,export,ray,slurm
RUN    ?= runs/demo
BIN    := .venv/bin
PYTEST ?= -n 2
MINUTES ?= 10

.PHONY: wheel lock demo test slow check format bench bench-gpu soak calibrate clean

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

bench: .venv/ready   ## measure time and memory on the CPU (about 30 minutes), rewrite benchmarks/README.md
	$(BIN)/python -m benchmarks.run

bench-gpu: .venv/ready   ## the same on a CUDA device, under 8 minutes; without one it says so and changes nothing
	$(BIN)/python -m benchmarks.gpu

soak: .venv/ready   ## kill a sweep over and over and compare its tables (about 12 minutes), rewrite benchmarks/soak.md
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

calibrate: .venv/ready   ## how often the statistics are wrong, on made-up data; rewrite docs/calibration.md
	$(BIN)/python -m calibration

wheel: .venv/ready   ## build the wheel, install it alone into a clean environment, run the demo from there
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m hatchling build -t wheel -d build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check build/wheel/*.whl
	cd build/wheel && venv/bin/lccp demo --quick --out demo

lock: .venv/ready   ## write requirements.lock: every package of this environment, with its version
	( echo "# Every package that make test ran with (Python 3.11, $(EXTRAS)); lm-eval is not among them."; \
	  echo "# Written by make lock. Use it with: pip install -r requirements.lock"; \
	  $(BIN)/pip freeze --exclude-editable | sed -e 's/+cpu//' -e 's/ @ .*//' ) > requirements.lock

clean:
	rm -rf .venv runs
