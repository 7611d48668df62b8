# Everything runs in a virtual environment of its own, made on first use and again when the Python
# version or the requirements change: make test PYTHON=python3.13
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 10
ORDERS ?= 1000000
USERS ?= 100000

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := $(VENV)/installed-for-$(VERSION)
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo pictures test test-deep soak bench lint format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## the real service on a private MongoDB, for about 30 seconds
	@$(RUN) -m sandbox.demo

pictures: $(STAMP) ## the demo once more, as the picture in the README: sandbox/demo.svg
	@$(RUN) -m sandbox.picture

test: $(STAMP) ## all tests; ARGS="-k word" for some, ARGS=--cov with coverage
	$(RUN) -m pytest -n 6 --dist loadgroup $(ARGS)

test-deep: $(STAMP) ## those of them that come in numbers, in larger ones
	$(RUN) -m pytest -n 6 --dist loadgroup --deep $(ARGS)

soak: $(STAMP) ## MINUTES=10 of random faults against the daemon while a shop changes
	$(RUN) -m sandbox.soak $(MINUTES)

bench: $(STAMP) ## what a recount costs, and what else a shop would do: ORDERS=1000000 USERS=100000
	$(RUN) -m bench --orders $(ORDERS) --users $(USERS) $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP) ## put the code into ruff's format
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

clean: ## remove all that the above has made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include deploy/install.mk

# A stamp that is missing means a half-made environment, or another Python's: start over. Ctrl-C
# takes away what is there so far, with the temporary files and the tracebacks of pip.
$(STAMP): requirements.txt requirements-dev.txt
	@case "$(VERSION)" in 3.1[1-9] | 3.[2-9][0-9]) ;; *) \
	echo "Python 3.11 or newer is needed, and $(PYTHON) is $(or $(VERSION),not there);" >&2; \
	echo "name another one, as in: make demo PYTHON=python3.12" >&2; exit 1 ;; esac
	@echo "Making $(VENV) with Python $(VERSION) (once, about a minute)"
	@exec 3>&2; \
	trap 'rm -rf $(VENV); echo "Stopped; nothing is left behind." >&3; exit 130' INT TERM; \
	rm -rf $(VENV) && mkdir -p $(VENV)/tmp && export TMPDIR="$$(cd $(VENV)/tmp && pwd)" && \
	{ $(PYTHON) -m venv $(VENV) && \
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt; \
	} >$(VENV)/tmp/log 2>&1 || { cat $(VENV)/tmp/log >&2; exit 1; }; \
	rm -rf $(VENV)/tmp && touch $@
