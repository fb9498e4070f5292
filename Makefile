# From a fresh clone, with Python 3.10 or newer, pip and make:
#
#   make demo     create .venv, install flowpath, run its demonstration into runs/demo
#   make test     lint, types, experiment smokes, then tests and doctests with coverage
#   make lint | types | smoke | unit      one stage of `make test`
#   make clean | distclean                remove caches and builds | the environment too
#
# The build of torch is yours to choose; a CPU build is a far smaller download:
#
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#
# The environment is reused until pyproject.toml, constraints.txt or the choice of torch changes.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CORE := $(VENV)/.flowpath-core
TEST := $(VENV)/.flowpath-test
CHOICE := $(VENV)/.flowpath-torch

ALIVE := $(shell $(PY) -m pip --version >/dev/null 2>&1 && echo yes)

# A choice of torch made on the command line or in the environment is remembered, and holds until another is made.
ifneq ($(filter command environment,$(origin TORCH)),)
ASKED := $(strip $(TORCH))
endif
CHOSEN := $(strip $(shell cat $(CHOICE) 2>/dev/null))
WANTED := $(or $(ASKED),$(CHOSEN),$(TORCH))
CHANGED := $(if $(ASKED),$(filter-out -$(CHOSEN)-,-$(ASKED)-))

.PHONY: help demo test lint types smoke unit clean distclean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^The environment/q'

demo: $(CORE)
	$(PY) -m flowpath demo --force

# The tests come last, so that the closing line says how many ran.
test: lint types smoke unit

lint: $(TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(TEST)
	$(PY) -m mypy

smoke: $(TEST)
	@failed=0; for run in experiments/*/run.py; do \
	    [ -e "$$run" ] || continue; \
	    echo "$(PY) $$run --smoke"; \
	    $(PY) "$$run" --smoke || { echo "$$run --smoke failed" >&2; failed=1; }; \
	done; exit $$failed

unit: $(TEST)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --doctest-modules \
	    --cov --cov-report=term --cov-fail-under=90 tests flowpath

# torch comes first and alone; the pin that follows keeps whatever build of it was chosen.
$(CORE): pyproject.toml constraints.txt $(if $(ALIVE),,FORCE) $(if $(CHANGED),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "flowpath needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if [ -z "$(ALIVE)" ] && [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	@[ -n "$(ALIVE)" ] || $(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(PY) install --quiet pip; }
	$(PIP) install $(if $(CHANGED),--force-reinstall) $(WANTED)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e .
	@$(if $(ASKED),echo '$(ASKED)' > $(CHOICE))
	@touch $@

$(TEST): $(CORE)
	$(PIP) install --quiet -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -not -path './.*' -prune -exec rm -rf {} +

distclean: clean
	@if [ -f $(VENV)/pyvenv.cfg ]; then echo rm -rf $(VENV); rm -rf $(VENV); fi
