# Everything happens in .venv, which is made from scratch when it is missing or was left half-installed.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= logical

VENV := .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())')

# An installation is marked by an empty file that names Python's version and the versions of the packages, so that
# another PYTHON or CONSTRAINTS makes another .venv.
INSTALLED := $(VENV)/installed-$(VERSION)-$(notdir $(CONSTRAINTS))
INSTALLED_FOR_TEST := $(VENV)/installed-for-test-$(VERSION)-$(notdir $(CONSTRAINTS))
REQUIREMENTS := setup.cfg pyproject.toml $(CONSTRAINTS)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: help quickstart test clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=python3.12 picks another Python (3.11 or newer), CONSTRAINTS=constraints-newest.txt the newest versions"
	@echo "of all packages (Python 3.12 or newer), WORKERS=2 the number of parallel tests."

quickstart: $(INSTALLED)  ## install into .venv, then train a small model on handwritten digits
	$(BIN)/python train.py --config=configs/digits.py --workdir=runs/digits

test: $(INSTALLED_FOR_TEST)  ## install into .venv, then check style and types and run every test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20

clean:  ## remove .venv, caches and build leftovers; trained models in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sret_jax needs Python 3.11 or newer, but $(PYTHON) is $(or $(VERSION),missing)." >&2; \
	  echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing sret_jax into $(VENV) (the first time downloads about 300 MB)"
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	rm -f $(VENV)/installed-*
	$(PIP_INSTALL) --editable .
	touch $@

$(INSTALLED_FOR_TEST): $(INSTALLED)
	rm -f $(VENV)/installed-*
	$(PIP_INSTALL) --editable '.[test]'
	touch $(INSTALLED) $@
