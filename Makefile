# make train, make test: the virtual environment is made, and renewed when the requirements change, by itself.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help train test test-numa format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

train: $(INSTALLED)  ## train with the defaults, or with ARGS="train.steps=50 optim.lr=1e-3"
	@$(RUN) horizon train $(ARGS)

test: $(INSTALLED)  ## format, lint, types and tests; WORKERS=4 runs more of them at once
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) pytest -q -n $(WORKERS) $(ARGS)

test-numa: $(INSTALLED)  ## placement on NUMA nodes in a virtual machine: fetches QEMU and a kernel from Debian
	@sh tests/numa/prepare.sh build/numa
	$(RUN) pytest -q -n 0 -m qemu -rs -s tests/numa $(ARGS)

format: $(INSTALLED)  ## write the format and the lint fixes that are safe
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

clean:  ## remove the environment and the tools' caches; outputs/ and multirun/ stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# The stamp is written last, so an interrupted installation is taken up again.
# A Python without ensurepip (Debian without python3-venv) makes the environment with its own pip.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Horizon needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=python3.12, say" if v < (3, 11) else 0)'
	@echo "Installing Horizon into $(VENV) (some minutes the first time)"
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV) install --quiet pip; }
	@$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
