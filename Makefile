# Two commands on a fresh machine: make quickstart, make test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests; each uses one core.
WORKERS ?= 2
# Threads that spin while they wait slow down every other process of a busy machine several times.
export OMP_WAIT_POLICY ?= passive

.PHONY: quickstart test test-all lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The corpus, a small harmonic GPT, its validation loss beside a unigram model's, and a sample. A second call goes on
# where the first one stopped.
quickstart: $(VENV)/.installed
	test -f data/python_docs/meta.json || $(BIN)/python -m data_prep.python_docs --out data/python_docs
	$(BIN)/python train.py --config configs/quickstart.toml --resume auto
	$(BIN)/python sample.py --checkpoint runs/quickstart --prompt "Return a new" --num-samples 4 --max-new-tokens 80 --temperature 0.7 --top-k 40 --seed 3
	$(BIN)/python sample.py --checkpoint runs/quickstart --prompt "Return a new" --max-new-tokens 6 --seed 1 --show-distances

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS)

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) -m ""

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
