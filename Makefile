# Everything runs in a virtual environment, which is created on first use, and again when the Python
# version or the requirements change: make test PYTHON=python3.13
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 10
ORDERS ?= 1000000
USERS ?= 100000

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
STAMP := $(VENV)/installed-for-$(VERSION)
RUN := $(VENV)/bin/python
# The tests whose result depends on the version of the server.
SERVER_TESTS := $(addprefix tests/test_,$(addsuffix .py,\
  change_log counter driver_errors exact history index live live_faults recount shape_commands undo))

# The tests that start and kill the most servers and processes.
LONG_TESTS := $(addprefix tests/test_,$(addsuffix .py,\
  exact faults flaky_endpoint live_faults uri_options))

# Each worker starts a server and loads all tests, which takes several seconds of CPU time; tests
# that wait need more workers than cores.
WORKERS := -n 4 --dist loadgroup
# Without compiled modules, each start of the service in a test compiles all of them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo pictures dashboard lock test test-long test-deep test-servers soak bench lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## run the service on a temporary MongoDB for about 30 seconds
	@$(RUN) -m sandbox.demo

pictures: $(STAMP) ## run the demo and write its output to sandbox/demo.svg, for the README
	@$(RUN) -m sandbox.picture

dashboard: $(STAMP) ## write deploy/grafana-dashboard.json
	$(RUN) -m deploy.grafana_dashboard

# Write no addresses of package indexes to the file: they depend on the machine.
lock: $(STAMP) ## write requirements.lock; ARGS=--upgrade for new versions of transitive packages
	CUSTOM_COMPILE_COMMAND='make lock' $(RUN) -m piptools compile --quiet --generate-hashes \
	  --strip-extras --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	  --output-file=requirements.lock $(ARGS) requirements.txt

test: $(STAMP) ## run the tests; ARGS="-k word" for some, ARGS=--cov with coverage
	$(RUN) -m pytest $(WORKERS) $(addprefix --ignore=,$(LONG_TESTS)) $(ARGS)

test-long: $(STAMP) ## run the tests of faults, busy writers and connection options
	$(RUN) -m pytest $(WORKERS) $(LONG_TESTS) $(ARGS)

test-deep: $(STAMP) ## run the randomized and repeated tests with larger numbers
	$(RUN) -m pytest $(WORKERS) --deep $(ARGS)

test-servers: $(STAMP) ## run the tests that depend on the server's version, with MongoDB 5.0.32 and 6.0.27
	$(RUN) -m sandbox.servers $(RUN) -m pytest $(WORKERS) $(SERVER_TESTS) $(ARGS)

soak: $(STAMP) ## run the daemon with random faults while orders change: MINUTES=10
	$(RUN) -m sandbox.soak $(MINUTES)

bench: $(STAMP) ## measure recounts and their alternatives: ORDERS=1000000 USERS=100000
	$(RUN) -m bench --orders $(ORDERS) --users $(USERS) $(ARGS)

lint: $(STAMP) ## run ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP) ## format the code and apply ruff's fixes
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

clean: ## remove every generated file
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include deploy/install.mk

# Without the stamp, the environment is incomplete, or belongs to another version of Python: create
# it again. Ctrl-C removes the incomplete environment, with pip's temporary files and traceback.
$(STAMP): requirements.txt requirements-dev.txt
	@case "$(VERSION)" in 3.1[1-9] | 3.[2-9][0-9]) ;; *) \
	echo "Python 3.11 or newer is needed; $(PYTHON) is $(or $(VERSION),not found)." >&2; \
	echo "Choose another one, for example: make demo PYTHON=python3.12" >&2; exit 1 ;; esac
	@echo "Creating $(VENV) with Python $(VERSION) (once, about a minute)"
	@exec 3>&2; \
	trap 'rm -rf $(VENV); echo "Stopped; $(VENV) is removed." >&3; exit 130' INT TERM; \
	rm -rf $(VENV) && mkdir -p $(VENV)/tmp && export TMPDIR="$$(cd $(VENV)/tmp && pwd)" && \
	{ $(PYTHON) -m venv $(VENV) && \
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt; \
	} >$(VENV)/tmp/log 2>&1 || { cat $(VENV)/tmp/log >&2; exit 1; }; \
	rm -rf $(VENV)/tmp && touch $@
