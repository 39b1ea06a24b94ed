# All targets except setup and clean take ARGS="..."; PYTHON names the interpreter that creates the environment.
PYTHON ?= python3
BIN := .venv/bin
# glibc 2.35 and newer gives large tensors huge pages, which makes a training step faster (docs/speed.md). Others ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# tests/conftest.py starts the slowest files first; without this option, xdist would reorder them.
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# GPU=1: the CUDA packages of KERAS_BACKEND, which is tensorflow by default.
GPU_STAMP := .venv/installed-$(if $(filter jax,$(KERAS_BACKEND)),jax-gpu,gpu)

.PHONY: setup demo train tensorboard page notebooks test lint clean

setup: .venv/installed $(if $(filter-out 0,$(GPU)),$(GPU_STAMP))

demo: .venv/installed
	$(BIN)/python training_cifar10.py --dataset digits --recipe quick $(ARGS)

train: .venv/installed
	$(BIN)/python training_cifar10.py $(ARGS)

tensorboard: .venv/installed
	$(BIN)/tensorboard --logdir Logs --port 6006 $(ARGS)

page: .venv/installed-page
	$(BIN)/python page.py $(ARGS)

notebooks: .venv/installed-dev
	$(BIN)/jupyter execute --inplace --timeout=-1 training_56.ipynb training_92.ipynb $(ARGS)

# The second pass repeats, on JAX, the tests that must pass on every backend. Both passes always run; the last line has
# the counts of both, from the JUnit files. With ARGS, the second pass may select no test: pytest then exits with 5.
test: .venv/installed-dev
	@rm -f .venv/junit-*.xml; failed=0; \
	$(TESTS) --junitxml .venv/junit-tensorflow.xml $(ARGS) || failed=1; \
	KERAS_BACKEND=jax $(TESTS) --junitxml .venv/junit-jax.xml -m backends $(ARGS) || [ $$? = 5 ] || failed=1; \
	for pass in tensorflow jax; do \
		printf '%s: ' "$$pass"; \
		grep -o '<testsuite [^>]*>' .venv/junit-$$pass.xml 2>/dev/null | \
		grep -oE '(errors|failures|skipped|tests|time)="[0-9.]+"' | tr -d '"' | tr '\n' ' ' | grep . || printf 'no result '; \
	done | tr '\n' ' '; \
	if [ $$failed = 0 ]; then echo "-> ok"; else echo "-> NOT ok"; fi; \
	exit $$failed

lint: .venv/installed-dev
	$(BIN)/ruff check $(ARGS) .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	{ echo "Python 3.11 to 3.13 is required, found $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-jax.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv/installed-%: requirements-%.txt .venv/installed
	$(PIP) -r requirements-$*.txt
	@touch $@

clean:
	rm -rf .venv
