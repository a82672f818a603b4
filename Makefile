# Everything runs in .venv, which the first target that needs it creates.
PYTHON   ?= python3
PROFILE  ?= quick
OUT      ?= runs
JOBS     ?= 2
MODEL     =
FACTS     =
LOOKUP    =
MODELS   ?= tiny-llama3 tiny-gemma2-open tiny-gemma2 tiny-gemma
PIP_ARGS ?=

VENV := .venv
PY   := $(VENV)/bin/python
# what is installed is decided by the text of requirements.txt: a fresh checkout's dates mean nothing
WANTED := $(VENV)/installed.txt

.DEFAULT_GOAL := help
.PHONY: help env run report lab notebooks figures check test test-slow test-gpu models clean

help: ## show this list
	@grep -hE '^[a-z-]+( [a-z]+)*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

env: ## create .venv and install requirements.txt (again only when that file changes)
	@cmp -s requirements.txt $(WANTED) || $(MAKE) --no-print-directory install

.PHONY: install
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -r requirements.txt -e .
	@cp requirements.txt $(WANTED)

OWN = $(if $(MODEL),-p model "$(MODEL)") $(if $(FACTS),-p facts "$(FACTS)") $(if $(LOOKUP),-p lookup "$(LOOKUP)")

run: env ## run all notebooks headless, JOBS=2 at a time, on MODEL and FACTS if given (LOOKUP=2,3: layers by hand); without these PROFILE=standard also puts the outputs into notebooks/
	$(PY) -m helpers.notebooks run --profile $(PROFILE) --out $(OUT) --jobs $(JOBS) $(or $(strip $(OWN)),$(if $(filter standard,$(PROFILE)),--write-back))

report: env ## make one page from stored rows (ROWS="data/results runs", default: both)
	$(PY) -m helpers.report $(if $(ROWS),--rows $(ROWS)) --out $(OUT)/report

lab: env ## open the notebooks in JupyterLab
	$(PY) -m jupyter lab notebooks

notebooks figures: env ## regenerate the committed outputs and figures/ (as make run PROFILE=standard)
	$(PY) -m helpers.notebooks regenerate --out $(OUT)

check: env ## check that the notebooks keep their conventions
	$(PY) -m helpers.notebooks check

# tests never reach for a model hub; one worker a core, each with one thread
test test-slow test-gpu: export HF_HUB_OFFLINE = 1
test test-slow test-gpu: export OMP_NUM_THREADS = 1
PYTEST = $(PY) -m pytest -q -n auto --dist loadfile

test: env ## run the tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: env ## run the slow tests too (installs Ray, for those of sweeps on a cluster)
	@$(PY) -c 'import ray' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[ray]'
	$(PYTEST) -rs -m "not gpu"

test-gpu: env ## run the tests that need an accelerator
	$(PYTEST) -m gpu

models: env ## train the tiny models again (MODELS="tiny-llama3")
	set -e; for model in $(MODELS); do $(PY) -m helpers.pretrain $$model; done

clean: ## remove caches and executed copies; results and .venv stay
	rm -rf .pytest_cache *.egg-info $(OUT)/*.html $(OUT)/*.ipynb
	find helpers tests -name __pycache__ -type d -prune -exec rm -rf {} +
