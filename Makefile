# What one does with this project, each in a word; `make` alone lists them.
#
# A fresh machine needs Debian (or Ubuntu), Python 3.11 or later and make: the rest is
# installed when it is missing, Python packages into .venv and servers through apt-get.

PYTHON ?= python3
ARGS ?=
MINUTES ?= 10
SEED ?=

# Most of the time of the tests with servers is waiting. Each process has servers of its own.
AT_ONCE ?= -n 4 --dist loadfile --no-loadscope-reorder

VENV := .venv
IN_VENV := $(VENV)/bin/python -m
PIP_INSTALL := $(IN_VENV) pip install --quiet --disable-pip-version-check

# The wrapper asks PyPI at each run whether there is a later pyright.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo site test unit chaos mutations lint types clean servers \
	lint-rules lint-format lint-cancellation types-mypy types-pyright

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/package-stamp ## run some dozens of tasks in memory; ARGS='--backend trio'
	@$(VENV)/bin/python examples/demo.py $(ARGS)

site: $(VENV)/site-stamp ## a guillotina site with two tasks, on http://127.0.0.1:8080
	@exec env PYTHONPATH=examples $(VENV)/bin/guillotina serve -c examples/guillotina_site/config.yaml $(ARGS)

# All of it runs whatever fails, so that one look shows everything there is to mend; lint and
# types first, because the last line is to be the tests' summary.
test: $(VENV)/tools-stamp servers ## lint, types and all tests; ARGS='-x -k retry' for pytest
	@$(MAKE) --no-print-directory --keep-going lint types || checks=failed; \
	$(IN_VENV) pytest $(AT_ONCE) $(ARGS) || tests=failed; \
	if [ -n "$$checks" ]; then echo 'lint or types have failed: see above the tests' >&2; fi; \
	[ -z "$$checks$$tests" ]

unit: $(VENV)/tools-stamp ## the tests that need no servers; ARGS as for test
	@PYTHONPATH=scripts $(IN_VENV) pytest -p no_servers -rfE $(AT_ONCE) $(ARGS)

chaos: $(VENV)/tools-stamp servers ## faults at random under load; MINUTES=10 SEED=n
	@AMQP_TASKS_CHAOS_MINUTES=$(MINUTES) AMQP_TASKS_CHAOS_SEED=$(SEED) \
	$(IN_VENV) pytest tests/chaos/test_chaos.py tests/chaos/test_rolling.py $(ARGS)

mutations: $(VENV)/tools-stamp ## deliberate bugs, each of which must be found; ARGS='fence'
	@$(IN_VENV) tests.mutations $(ARGS)

lint: lint-rules lint-format lint-cancellation ## ruff, and flake8-async for what ruff lacks

types: types-mypy types-pyright ## mypy and pyright, both strict

clean: ## remove what was made here, .venv included
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lint-rules: $(VENV)/tools-stamp
	$(IN_VENV) ruff check .

lint-format: $(VENV)/tools-stamp
	$(IN_VENV) ruff format --check .

lint-cancellation: $(VENV)/tools-stamp  # slow, so only where there is something to find
	@$(IN_VENV) flake8 --isolated --select=ASYNC101,ASYNC102,ASYNC103 \
		$$(grep -rlw --include='*.py' async amqp_tasks guillotina_bridge examples)

types-mypy: $(VENV)/tools-stamp
	$(IN_VENV) mypy

types-pyright: $(VENV)/tools-stamp
	$(IN_VENV) pyright --pythonpath $(VENV)/bin/python

servers:
	@scripts/install-servers

# Each stamp says that .venv is as pyproject.toml wants it.

$(VENV)/venv-stamp:
	@scripts/create-venv '$(PYTHON)' $(VENV)
	@$(PIP_INSTALL) --upgrade 'pip>=25.1'  # the first that knows dependency groups
	@touch $@

$(VENV)/package-stamp: $(VENV)/venv-stamp pyproject.toml
	@echo 'Installing the package into $(VENV) ...'
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/site-stamp: $(VENV)/venv-stamp pyproject.toml
	@echo 'Installing the package and guillotina into $(VENV) ...'
	@$(PIP_INSTALL) --editable '.[guillotina]'
	@touch $(VENV)/package-stamp $@

$(VENV)/tools-stamp: $(VENV)/venv-stamp pyproject.toml
	@echo 'Installing the package, test and lint tools into $(VENV) ...'
	@# Python compiles what is imported; pip would compile all of it.
	@$(PIP_INSTALL) --no-compile --editable '.[guillotina]' --group test --group lint
	@touch $(VENV)/package-stamp $(VENV)/site-stamp $@
