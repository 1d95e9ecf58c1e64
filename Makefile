# Two commands for a newcomer: `make demo` and `make test`. Both need Python >= 3.11 and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MADE   := $(VENV)/made
DEMO   := runs/demo
SOURCES := manta.py $(shell find ps workers serving -name '*.py')
TESTS   := $(shell find tests -name '*.py') $(wildcard configs/*.yaml) pyproject.toml

.PHONY: demo test retest parity fast faults check lint types imports format bench bench-kernels bench-ps bench-recovery install clean

## demo: make data, train on 2 shards and 2 workers, export, serve, ask one lookup over HTTP
demo: $(DEMO)/export/LATEST
	@$(BIN)/manta serve $(DEMO)/export --port 0 --check
	@echo
	@echo "Done: $(DEMO)/data (Parquet), $(DEMO)/metrics.jsonl, $(DEMO)/export (versioned tables)."
	@echo "Next:"
	@echo "  $(BIN)/manta serve $(DEMO)/export                  # keep it running, then elsewhere:"
	@echo "  $(BIN)/manta lookup user=1,2 item=7,8              # ask it"
	@echo "  $(BIN)/manta train configs/demo.yaml --set train.epochs=10 --set cluster.shards=3"
	@echo "  curl http://127.0.0.1:8000/v1/model                    # what it serves"

$(DEMO)/data/dataset.json: $(MADE)/installed $(wildcard workers/prepare/*.py)
	@$(BIN)/manta prepare synthetic movielens $(DEMO)/data --rows 100000 --users 1000 --items 500 --seed 1

$(DEMO)/export/LATEST: $(DEMO)/data/dataset.json configs/demo.yaml $(SOURCES)
	@$(BIN)/manta train configs/demo.yaml
	@touch $@

## test: install what is missing and run the test suite (nothing to do if nothing changed)
test: $(MADE)/tested
	@echo "tests passed for exactly these sources; 'make retest' runs them again"

retest:
	@rm -f $(MADE)/tested
	@$(MAKE) --no-print-directory test

# In two processes each; those with Ray have a Ray of their own in each, and the longest files first.
$(MADE)/tested: $(MADE)/installed-dev $(SOURCES) $(TESTS)
	$(BIN)/pytest -n 2 --dist loadfile tests/unit tests/wire tests/parity ps workers serving
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/e2e tests/faults tests/actors
	@touch $@

## parity: all random comparisons with stock TensorFlow, 20 times as many as in `make test`
parity: $(MADE)/installed-dev
	MANTA_PARITY=full $(BIN)/pytest -q -o timeout=1800 tests/parity

## fast: unit tests only, seconds
fast: $(MADE)/installed-dev
	$(BIN)/pytest -q tests/unit ps workers serving

## check: what CI runs
check: lint types imports test

lint: $(MADE)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(MADE)/installed-dev
	$(BIN)/mypy

imports: $(MADE)/installed-dev
	$(BIN)/lint-imports

format: $(MADE)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## bench: against peers, in the same run
bench: $(MADE)/installed-dev
	PYTHONPATH=. $(BIN)/python benchmarks/lookup.py

## bench-kernels: kernels against TensorFlow, torch, FBGEMM and pandas; writes docs/benchmarks.md
bench-kernels: $(MADE)/installed-bench
	$(BIN)/python -m benchmarks.kernels

## bench-ps: the data plane against Ray, TensorFlow, torch and sockets, a DLRM, and what clusters would
## take; writes docs/benchmarks-data-plane.md, docs/benchmarks-dlrm.md and docs/scaling.md
bench-ps: $(MADE)/installed-bench
	$(BIN)/python -m benchmarks.ps --write
	$(BIN)/python -m benchmarks.dlrm --write
	$(BIN)/python -m benchmarks.scaling --write

## bench-recovery: what snapshots and logs cost, and how long a killed shard takes to come back;
## writes docs/benchmarks-recovery.md
bench-recovery: $(MADE)/installed
	$(BIN)/python -m benchmarks.recovery --write

## install: the virtual environment with everything needed to train and serve
install: $(MADE)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python >= 3.11 is needed"'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half a venv would look like one

$(MADE)/installed: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[train]'
	@mkdir -p $(MADE) && touch $@

$(MADE)/installed-dev: $(MADE)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@mkdir -p $(MADE) && touch $@

# PyTorch's default build may bring gigabytes of CUDA along: install a CPU build of this version
# into the environment first, and it is kept.
$(MADE)/installed-bench: $(MADE)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[bench]'
	@mkdir -p $(MADE) && touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
