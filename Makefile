# Two commands: `make demo` and `make test`. Both set up everything they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check
SOAK_SECONDS ?= 300
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test check lint types unit peer clients s3 trackers quant llama packages bench soak wheel clean

help:
	@echo "make demo    set up, then align the embedded starter model and print the verdict (about 5 minutes)"
	@echo "make test    set up, then run the whole test suite"
	@echo "make setup   only prepare $(VENV)"
	@echo "make check   the quick loop: ruff, mypy, import contracts, unit tests"
	@echo "make bench   measure against the peer (about 35 minutes on a quiet machine)"
	@echo "make soak    the long forms: kills of checkpoints (SOAK_SECONDS=300) and jobs, load, planted faults"
	@echo "make wheel   build dist/*.whl"

setup: $(VENV)/.stamp

# torch first and pinned: an unpinned torch drags in gigabytes of CUDA libraries
$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "preftune needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet torch
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/preftune demo

# two processes of one thread: the suite waits more for process starts than for products of matrices. Files come in order of their
# paths, unit tests last: by number of tests, as is the default, the longest files (few tests, each a whole job) would come last.
# Compiled first: where PYTHONDONTWRITEBYTECODE is set, each of hundreds of processes would compile the package again
test: setup packages peer clients s3 trackers quant llama
	$(BIN)/python -m compileall -q src
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check src tests bench starter
	$(BIN)/ruff format --check src tests bench starter
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit tests/property src -m "not slow"

# the peer lives in an environment of its own: it pulls other libraries backwards
peer: setup
	bash bench/environments/make.sh trl

# an S3 server on loopback for the artifact store's contract
s3: setup
	bash bench/environments/make.sh s3

# what tests need of the system, where the user may install it: PostgreSQL's server
packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql >/dev/null; fi

# the clients that the server's tests drive
clients: setup
	bash bench/environments/make.sh clients

# the trackers that the sinks' tests write to and read back
trackers: setup
	bash bench/environments/make.sh tracking

# bitsandbytes, lent to the tests of 4 and 8 bits alone
quant: setup
	bash bench/environments/make.sh quant

# llama.cpp's server, which reads our GGUF files in tests; where there is no build of it, tests skip with the reason
llama: setup
	bash bench/environments/make.sh llama

bench: setup peer llama
	bash bench/environments/make.sh serve
	$(BIN)/python bench/run.py

soak: setup
	$(BIN)/python tests/soak/kill_checkpoints.py $(SOAK_SECONDS)
	$(BIN)/python tests/soak/kill_jobs.py 60
	$(BIN)/python tests/soak/load_server.py 300 200 10000
	$(BIN)/python -m pytest tests/soak --timeout 3600
	$(BIN)/python tests/mutation/run_faults.py --all

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
