# Every target but setup and clean takes ARGS="..."; PYTHON names the interpreter that makes the environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo train tensorboard notebooks test lint clean

setup: .venv/installed

demo: .venv/installed
	$(BIN)/python training_cifar10.py --dataset digits --recipe quick $(ARGS)

train: .venv/installed
	$(BIN)/python training_cifar10.py $(ARGS)

tensorboard: .venv/installed
	$(BIN)/tensorboard --logdir Logs --port 6006 $(ARGS)

notebooks: .venv/installed-dev
	$(BIN)/jupyter execute --inplace --timeout=-1 training_56.ipynb training_92.ipynb $(ARGS)

# The second pass runs what must hold on every backend once more, on JAX. Its time is XLA's: compiled without optimization
# the tests take 60 % of the processor time.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)
	XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 --dist loadfile -m backends $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check $(ARGS) .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) is here: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-jax.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv
