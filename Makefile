# make full-train   from nothing to a promoted captioner: environment, data, training, evaluation, registry
# make check        the environment, then in two minutes: lint, types, and the tests that need no server and train nothing
# make test         the environment, then all tests
# make coverage     the coverage of the tests that need no server and train nothing, and its floor
# make kills        20 trainings killed at random (SEED=0); each must end in the bytes of an uninterrupted one
# make lint         ruff and mypy
# make docs         the documentation site, in work/site (an environment of its own for mkdocs; the build needs no network)
# make lock         write requirements.lock from the environment as it is (needs uv, for the hashes)
# make variant      a variant of the main run: the pipeline up to evaluate in a clone of its own (work/variants)
#                   with some values changed; its figures and curves go to metrics/variants and plots/variants
#                     make variant NAME=text-encoder SET="decoder.use_text_encoder=true"
#                   (+KEY=VALUE for a key that the profile leaves at its default)
# make clean        remove the environment and caches; data, results and the model store stay
#
# PYTHON=python3.12      another interpreter (3.11 or 3.12)
# PROFILE=smoke          another profile of configs/ than the one in params.yaml
# TORCH_OPTIONS=...      options for pip when it installs torch, such as an index that has CPU builds: pip's own
#                        choice on Linux may be a CUDA build of several GB, which works as well
# UV=                    install with pip although uv is there (uv has an index configuration of its own)

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PROFILE ?= $(or $(shell sed -n 's/^profile: //p' params.yaml 2>/dev/null),tiny)
SET ?=
TORCH_OPTIONS ?=
UV ?= $(shell command -v uv)
SEED ?= 0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: full-train check coverage test kills lint docs lock variant clean env

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python --compile-bytecode,$(PIP) install) --quiet
INSTALLED := .venv/.installed
DOCS := .cache/docs-env
# Two processes of one thread each: threads of several processes on the same cores wait for each other. Which process
# takes which tests: tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

full-train: env
	@grep -qx 'profile: $(PROFILE)' params.yaml 2>/dev/null || $(BIN)/vlv config use $(PROFILE)
	@$(BIN)/python -m flows.full_train

check: lint
	$(PYTEST) -m "not server and not training and not slow"

coverage: env
	$(PYTEST) -m "not server and not training" --cov --cov-report=

test: env
	$(PYTEST)

kills: env
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --seed $(SEED)

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Broken links and pages outside the navigation are errors.
docs: env $(DOCS)/bin/mkdocs
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "The site is in work/site. To read it with its search: python -m http.server --directory work/site"

$(DOCS)/bin/mkdocs: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/docs.txt
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $(DOCS)/docs.txt
	@touch $@

env: $(INSTALLED)

# The lock is complete, so nothing is resolved. Then torch; only a CUDA build of it brings more, its own libraries.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in {(3, 11), (3, 12)} else f"Python {v[0]}.{v[1]} is not supported: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@echo "Making the environment .venv from requirements.lock; a few minutes, and about 2 GB of disk."
	$(PYTHON) -m venv .venv
	$(INSTALL) --no-deps --require-hashes --requirement requirements.lock
	$(PIP) install --quiet $(TORCH_OPTIONS) "$$(grep -om1 'torch==[0-9.]*' pyproject.toml)"
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	@touch $@

lock: env
	@$(BIN)/python .ci/lock.py
	@git diff --stat -- requirements.lock

# DVC's cache is shared with the clone, so what does not depend on the changed values is not made again. The baseline
# with an untrained Stage 1 (evaluate.untrained_baseline) is left to the main run.
VARIANT := work/variants/$(NAME)
variant: env
	$(if $(NAME),,$(error make variant NAME=... SET="KEY=VALUE ..."))
	[ -d $(VARIANT) ] || git clone --quiet . $(VARIANT)
	mkdir -p .cache && ln -sfn "$(CURDIR)/.cache" $(VARIANT)/.cache
	cd $(VARIANT) && export PATH="$(CURDIR)/$(BIN):$$PATH" \
	  && dvc cache dir --local "$(CURDIR)/.dvc/cache" && vlv config use $(PROFILE) && vlv data download \
	  && dvc exp run $(foreach value,evaluate.untrained_baseline=false $(SET),--set-param $(value)) evaluate
	mkdir -p metrics/variants/$(NAME) plots/variants/$(NAME)
	cp $(foreach stage,stage1 stage2 evaluate,$(VARIANT)/metrics/$(stage).json) metrics/variants/$(NAME)
	cp $(foreach file,stage1.csv stage1.png stage2.csv stage2.png evaluate_grid.png,$(VARIANT)/plots/$(file)) plots/variants/$(NAME)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build vlv.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
