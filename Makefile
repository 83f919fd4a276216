# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
# make demo CUDA=1         uses PyPI's newest CUDA build of torch and runs on the GPU
# make ... TORCH_INDEX=URL takes torch from another index, such as PyTorch's small CPU one

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= python3
VENV ?= $(ROOT)/.venv$(if $(CUDA),-cuda)
OLDEST ?= 5.16.0
BIN := $(VENV)/bin
CONSTRAINTS := $(ROOT)/constraints.txt
DEVICE := $(if $(CUDA),cuda,cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
export HF_HUB_OFFLINE ?= 1
# Threads that spin while they wait cost a busy machine up to a hundred times the work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all test-oldest test-gpu lint support docs figures wheel retrain clean

demo: $(VENV)/.installed
	$(BIN)/plphp demo --device $(DEVICE)

test: $(VENV)/.installed-dev lint
	cd $(ROOT) && $(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.installed-docs
	cd $(ROOT) && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

figures: $(VENV)/.installed-docs
	cd $(ROOT) && $(BIN)/python docs/make_figures.py

# Runs every cell of the matrix (about 7 minutes on 2 cores) and writes docs/support.md.
support: $(VENV)/.installed-dev
	cd $(ROOT) && PLPHP_WRITE_DOCS=1 $(BIN)/python -m pytest tests/conformance/test_matrix.py

# Everything but what needs a GPU: the full matrix, long random runs, compiled modes.
test-all: $(VENV)/.installed-dev lint
	cd $(ROOT) && $(BIN)/python -m pytest -m "not gpu"

# Two minutes on the oldest transformers that is supported; OLDEST=5.19.0 for another.
test-oldest: $(VENV)-$(OLDEST)/.installed
	cd $(ROOT) && $(VENV)-$(OLDEST)/bin/python -m pytest -m "not slow and not gpu" \
		tests/integration/test_attach.py tests/integration/test_conversation.py tests/unit \
		tests/conformance/test_layouts.py

test-gpu: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python -m pytest -m gpu

wheel: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python -m build -q --wheel --outdir $(ROOT)/dist

retrain: $(VENV)/.installed-dev
	$(PIP) -r $(ROOT)/training/requirements.txt -c $(CONSTRAINTS)
	cd $(ROOT) && $(BIN)/python -m training.retrain --out $(ROOT)/runs/retrained

# torch goes in first and pinned: a bare torch would bring gigabytes of CUDA libraries.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(CUDA),"torch>=2.11",$(shell grep '^torch==' $(CONSTRAINTS))) $(TORCH_FROM)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(ROOT)/pyproject.toml
	$(PIP) -e "$(ROOT)" $(if $(CUDA),,-c $(CONSTRAINTS))
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e "$(ROOT)[dev]" $(if $(CUDA),,-c $(CONSTRAINTS))
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) -e "$(ROOT)[docs]" $(if $(CUDA),,-c $(CONSTRAINTS))
	touch $@

$(VENV)-$(OLDEST)/.installed: $(CONSTRAINTS) $(ROOT)/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) $(shell grep '^torch==' $(CONSTRAINTS)) $(TORCH_FROM)
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet)==' $(CONSTRAINTS) > $(@D)/constraints.txt
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) -e "$(ROOT)[test]" transformers==$(OLDEST) \
		-c $(@D)/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-$(OLDEST) $(ROOT)/dist $(ROOT)/build $(ROOT)/site
