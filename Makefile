# The same commands here and in CI; `make help` lists them.
#
# Everything is installed into .venv, and a stamp file there says so: a second `make test`
# starts at once. With another Python:         make demo PYTHON=python3.12
# With the newest versions of all libraries:   make test CONSTRAINTS=
# More arguments for pytest or the demo:       make test ARGS="-k store -x"

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ARGS ?=

# Tools run as modules: their scripts name the folder that the checkout was once in.
PY := .venv/bin/python
SHELL := bash

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check soak bench clean distclean FORCE

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

# What `dev` installs holds all that `demo` needs: where it is there, or is asked for as well,
# one installation does for both.
DEMO := $(if $(wildcard .venv/.installed-dev)$(filter test check soak bench,$(MAKECMDGOALS)),dev,demo)

demo: .venv/.installed-$(DEMO)  ## see it work on a small data set, without a download
	@.venv/bin/tlpipe demo $(ARGS)

test: .venv/.installed-dev  ## run the tests
	$(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal $(ARGS)

check: .venv/.installed-dev  ## lint, formatting, types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

soak: .venv/.installed-dev  ## run the slow tests, minutes each
	$(PY) -m pytest -m slow $(ARGS)

bench: .venv/.installed-dev  ## run every benchmark; each prints its table
	@found=; for script in benchmarks/[!_]*.py; do \
	  if [ -e "$$script" ]; then \
	    found=yes; echo "== $$script"; $(PY) "$$script" || exit; \
	  fi; \
	done; \
	[ "$$found" ] || echo "No benchmarks yet."

clean:  ## remove build and tool caches; never stores, runs or .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . \( -path './.venv*' -o -path ./cache \) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf .venv

# A copied or moved checkout would run the code in the folder it came from.
MOVED := $(shell [ ! -e .venv/.location ] || [ "$$(cat .venv/.location)" = "$$(pwd -P)" ] || echo FORCE)

# .making marks an environment whose creation was interrupted: it is made anew.
.venv/.installed-demo .venv/.installed-dev: .venv/.installed-%: pyproject.toml $(CONSTRAINTS) $(MOVED)
	@if [ -e .venv/.making ] \
	    || ! { $(PY) -m pip --version || $(PY) -m ensurepip; } >/dev/null 2>&1; then \
	  command -v "$(PYTHON)" >/dev/null || { \
	    echo "Error: there is no $(PYTHON) here, and tlpipe needs Python 3.11 or newer." >&2; \
	    echo "  Name yours:  make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Error: tlpipe needs Python 3.11 or newer, but $(PYTHON) is" \
	      "$$("$(PYTHON)" -c 'import sys; print(sys.version.split()[0])')." >&2; \
	    echo "  Name another:  make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "Error: $(PYTHON) cannot make a virtual environment with pip in it." >&2; \
	    echo "  On Debian or Ubuntu:  apt install python3-venv" >&2; exit 1; }; \
	  echo "Making .venv"; \
	  rm -rf .venv && mkdir .venv && touch .venv/.making \
	    && "$(PYTHON)" -m venv .venv && rm .venv/.making; \
	fi
	@rm -f .venv/.installed-*
	@echo "Installing tlpipe[$*] into .venv; the first time takes minutes and some GB."
	@set -o pipefail; PYTHONUNBUFFERED=1 $(PY) -m pip install --no-input --progress-bar off \
	    --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[$*]' \
	  | while read -r line; do case "$$line" in \
	      Downloading*"("[0-9][0-9]*MB")" | Downloading*GB")") echo "  $$line" ;; \
	      "Installing collected"*) echo "  Unpacking" ;; \
	    esac; done
	@pwd -P > .venv/.location
	@touch $@
