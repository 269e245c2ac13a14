# Every target does its own set-up. Python 3.11, 3.12 or 3.13 is all that a machine needs: `python3`
# if it is one of them, else the newest.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := .venv/.ready

.PHONY: setup demo demo-gsm8k test test-newest lint protos bench resolve soak soak-weights clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# Plain pip with pinned versions. torch first: nothing after it may pull another build. sglang and
# torchvision go in without their dependencies, which ask for gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(if $(PYTHON),,$(error needed: Python 3.11, 3.12 or 3.13 with venv; or make PYTHON=PATH))
	$(PYTHON) -m venv --clear .venv
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-deps sglang==0.5.21 torchvision==0.26.0
	$(PY) -m ibtpo_torchvision
	touch $@

# COMPARE=1 also trains GRPO at the same token budget.
demo: setup
	$(PY) examples/arith/demo.py $(if $(COMPARE),--compare)

# A real instruct model: MODEL=DIR, a Hugging Face folder. More options in ARGUMENTS.
demo-gsm8k: setup
	@$(if $(MODEL),,$(error needed: MODEL=DIR, the Hugging Face folder of an instruct model))
	$(PY) examples/gsm8k/demo.py --model $(MODEL) $(ARGUMENTS)

# Two workers: one has the tests with engines (tests/conftest.py), which take turns.
test: setup lint
	$(PY) -m pytest -n 2 --dist loadgroup

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The suite against the newest SGLang, in an environment of its own. Only its version is not asked
# for; docs/design.md, "SGLang's names", says what stands against it today.
NEWEST := .venv-newest/bin/python

test-newest:
	@$(if $(PYTHON),,$(error needed: Python 3.11, 3.12 or 3.13 with venv; or make PYTHON=PATH))
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST) -m pip install -q -c constraints.txt torch==2.13.0
	$(NEWEST) -m pip install -q -c constraints.txt -e '.[dev]'
	$(NEWEST) -m pip install -q --no-deps --upgrade sglang torchvision==0.26.0
	$(NEWEST) -m ibtpo_torchvision
	-$(NEWEST) -m server_ext.engine.names
	IBTPO_ANY_SGLANG=1 $(NEWEST) -m pytest -n 2 --dist loadgroup

protos: setup
	$(PY) protos/generate.py

# `make bench-NAME` prints a table and writes benchmarks/out/NAME.json; `make bench` runs them all.
bench: $(patsubst benchmarks/bench_%.py,bench-%,$(wildcard benchmarks/bench_*.py))

bench-%: setup
	$(PY) benchmarks/bench_$*.py

# Whether pip can resolve what a machine with a GPU installs; downloads, and installs nothing.
resolve: setup
	IBTPO_RESOLVE=1 $(PY) -m pytest tests/contract/test_install.py

# The tests' kill loops at full length.
soak: setup
	IBTPO_SOAK=1 $(PY) -m pytest tests/fault tests/learner/test_resume.py

soak-weights: setup
	IBTPO_SOAK=1 $(PY) -m pytest --timeout 3000 tests/server_ext/weights/test_killed.py \
	  tests/loop/test_weights_in_flight.py

# Faults of every kind against a real server, and whether it kept its promises; at most 45 minutes.
# Writes benchmarks/out/soak-server.json. More options in ARGUMENTS, such as --seed=2.
.PHONY: soak-server
soak-server: setup
	OMP_NUM_THREADS=1 PYTHONPATH=.:examples/arith $(PY) -m tests.fault.soak $(ARGUMENTS)

clean:
	rm -rf .venv .venv-newest runs benchmarks/out
