# `make help` lists the targets. Needs Python 3.11 or 3.12 with pip and headers, git, make and a C++ compiler.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The first interpreter that runs and has the right version; make PYTHON=/path/to/python3.11 overrules it.
RIGHT_VERSION := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(RIGHT_VERSION)' 2>/dev/null && echo $$p && break; done)

# An extra package index for torch. Its 2.x.y+cpu satisfies the lock's 2.x.y and counts as newer: pip takes it.
TORCH_INDEX ?=
CPU_ONLY := make install TORCH_INDEX=https://download.pytorch.org/whl/cpu

# What `make demo` audits, and where its table and report go.
PHOTOS ?=
SAMPLE := out/sample
demo: OUT ?= $(if $(PHOTOS),out/photos,out/demo)
demo demo-s3: export SOURCE := $(or $(PHOTOS),$(SAMPLE)/photos)
demo: export AUDIT = $(OUT)

# Where the photos for the data tests lie; those tests skip without it.
BDNET_DATA ?= $(abspath $(wildcard ../shared/data))
ifneq ($(BDNET_DATA),)
export BDNET_DATA
endif

# Modules of benchmarks/ that `make bench` runs, in this order.
BENCHMARKS := precision network throughput growth sizing training mutants decode_memory scale soak chaos

.DEFAULT_GOAL := help
.PHONY: help install demo demo-s3 test test-long test-fast lint format bench bench-peers paper lock clean

help:  ## Show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "Without a GPU, torch for the CPU alone is a far smaller download:"
	@echo "  $(CPU_ONLY)"

install: $(INSTALLED)  ## Create .venv with everything that the other commands need

# Compiled on all cores, because pip does it on one; not left to Python, which where it may not write compiles
# Ray and torch anew in each process. What is left out is never imported here, or is for later Pythons.
# Without build isolation: the setuptools that the lock file pins builds the project, no other is fetched.
$(INSTALLED): requirements.lock pyproject.toml
	@"$(PYTHON)" -c '$(RIGHT_VERSION)' 2>/dev/null || { \
		echo "bdnet needs Python 3.11 or 3.12, found '$(PYTHON)'. Say: make install PYTHON=/path/to/python3.11"; \
		exit 1; } >&2
	@echo "Installing the packages of requirements.lock into $(VENV). On Linux x86-64:"
	@echo "  torch with CUDA: 3.6 GB to download, 7.2 GB of disk (measured)."
	@echo "  torch for the CPU alone: about 0.8 GB and 2.7 GB (estimated): $(CPU_ONLY)"
	@echo "pip keeps the downloads in its cache besides (pip cache purge removes them)."
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.lock
	$(PY) -m compileall -q -j 0 -x '/(tests|testing/_internal|rllib)/' $(VENV)/lib
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	@touch $@

# The sample archive is made anew only when its maker has changed.
$(SAMPLE)/truth.json: infra/sample_archive.py | $(INSTALLED)
	rm -rf $(SAMPLE)
	$(PY) -m infra.sample_archive $(SAMPLE)

demo: install $(if $(PHOTOS),,$(SAMPLE)/truth.json)  ## Audit a sample archive, or yours: PHOTOS=<folder or URI> [OUT=out/photos]
	$(PY) -m jobs.audit "$$SOURCE" --out "$$AUDIT"
	@$(PY) -m infra.demo_summary "$$AUDIT"

demo-s3: install $(if $(PHOTOS),,$(SAMPLE)/truth.json)  ## The same through a local S3 server (PHOTOS: a local folder)
	rm -rf out/demo-s3
	$(PY) -m infra.s3_server out/demo-s3/server --buckets photos out --upload "$$SOURCE=s3://photos/archive" -- \
		sh -c '$(PY) -m jobs.audit s3://photos/archive --out s3://out/demo && \
		$(PY) -m infra.demo_summary s3://out/demo --save-report out/demo-s3/report.html'

# Two at once, with one thread each; tests/conftest.py says which tests share a process.
PYTEST_TWO_AT_ONCE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test: install  ## Run all tests but the long ones
	$(PYTEST_TWO_AT_ONCE) -m "not long"

test-long: install  ## Run the long tests (an hour or more, estimated): lost nodes and storage, faults that stay, every network
	$(PY) -m pytest -m long

test-fast: install  ## Run the tests that need neither a whole job nor BlurRaw
	$(PYTEST_TWO_AT_ONCE) -m "not e2e and not long and not data"

lint: install  ## Check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: install  ## Format the code and mend what ruff can mend
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: install  ## Run the benchmarks; each writes benchmarks/results/*.csv
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m benchmarks.$$name; done
	@$(MAKE) bench-peers

# Others' tools in an environment of their own, which sees that of the project too.
PEERS := .venv-peers
$(PEERS)/.installed: benchmarks/peers.txt | $(INSTALLED)
	$(PY) -m venv $(PEERS)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$($(PEERS)/bin/python -c \
		'import site; print(site.getsitepackages()[0])')/project.pth"
	$(PEERS)/bin/python -m pip install -r benchmarks/peers.txt
	@touch $@

bench-peers: $(PEERS)/.installed  ## Measure against other tools and decoders and draw the roofline
	@set -e; for name in decode peers roofline; do echo "== $$name"; $(PEERS)/bin/python -m benchmarks.$$name; done

# ImageNet weights of ResNet-18: torchvision's download, or the file beside the photos.
WEIGHTS ?= $(or $(abspath $(wildcard $(BDNET_DATA)/../weights/resnet18*.safetensors)),imagenet)
PAPER := out/paper

# Folds in out/ are gone on from, others trained anew: then the cards of the shipped models have other scores
# than the tables, until `benchmarks.ship` ships models that were made with these folds.
paper: install  ## Train folds, train and score what the tables lack (all: 17 hours on 2 cores, estimated; resumable)
	@for part in blurraw archive peer_maps; do test -d "$(BDNET_DATA)/$$part" || { \
		echo "$$part/ is needed. Say: make paper BDNET_DATA=<folder that holds it> (docs/training.md, The data)"; \
		exit 1; } >&2; done
	test -e $(PAPER)/photos/dataset.json || \
		$(PY) -m jobs.prepare "$(BDNET_DATA)/blurraw" --cut photos --out $(PAPER)/photos
	$(PY) -m jobs.train $(PAPER)/photos --out $(PAPER)/default --arch bdnet-topdown --folds 3 --init "$(WEIGHTS)"
	$(PY) -m benchmarks.out_of_fold $(PAPER)/default bdnet-topdown
	$(PY) -m jobs.train $(PAPER)/photos --out $(PAPER)/fast --arch bdnet-topdown-slim --recipe fast --folds 3 \
		--init "$(PAPER)/default/fold-{fold}/model"
	$(PY) -m benchmarks.out_of_fold $(PAPER)/fast bdnet-fast
	$(PY) -m jobs.train $(PAPER)/photos --out $(PAPER)/small --arch bdnet-resnet18 --recipe equal_budget --folds 3 \
		--init "$(WEIGHTS)"
	$(PY) -m benchmarks.out_of_fold $(PAPER)/small "bdnet-resnet18, equal budget"
	$(PY) -m benchmarks.comparison --out $(PAPER)/tables --weights "$(WEIGHTS)"
	$(PY) -m benchmarks.ablation --out $(PAPER)/tables --weights "$(WEIGHTS)"
	$(PY) -m benchmarks.scores
	$(PY) -m benchmarks.archive_auc
	$(PY) -m benchmarks.curves
	$(PY) -m benchmarks.failures
	$(PY) -m benchmarks.paper

# Not in the lock: pip and the project itself; what accelerates torch (torch asks for the exact versions
# that fit it, and a CPU-only torch for none); boto3, which nothing here needs.
NOT_LOCKED := ^(pip|wheel|boto3|s3transfer|triton|nvidia-.*|cuda-.*)==
lock: install  ## Write requirements.lock from what .venv holds
	$(PY) -m pip freeze --all --exclude-editable > requirements.lock.new
	{ echo '# What runs together, exactly. Made by `make lock` from .venv: install there what you want, run the tests,'; \
	  echo '# then `make lock`. Not listed: the packages that accelerate torch (nvidia-*, cuda-*, triton), which torch'; \
	  echo '# itself asks for, so that the CPU-only torch installs from this same file.'; \
	  grep -vE '$(NOT_LOCKED)' requirements.lock.new | sed -E '/^torch(vision)?==/s/\+.*//'; } > requirements.lock
	rm requirements.lock.new
	@touch $(INSTALLED)

clean:  ## Remove what the commands made; not .venv, not audits in other folders of out/
	rm -rf out/sample out/demo out/demo-s3 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
