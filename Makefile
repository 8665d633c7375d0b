# Each target works from nothing: it creates the virtual environment, installs, and runs. Repeated calls reuse both.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

INSTALLED := $(VENV)/.installed
OFFLINE   := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: demo test lint matrix kills clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)          ## prune the embedded model, offline, in less than a minute
	$(VENV)/bin/hf-prune demo --output-dir out/demo-1of4 --overwrite

test: lint                  ## lint, then every test
	$(OFFLINE) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

matrix: $(INSTALLED)        ## every architecture, half an hour: writes docs/architectures.md
	$(OFFLINE) OMP_NUM_THREADS=1 JOBS=$(JOBS) $(VENV)/bin/python scripts/architecture_matrix.py

kills: $(INSTALLED)         ## kill a run at 20 random moments and compare hashes: writes docs/scale.md
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/scale.py --only kills

lint: $(INSTALLED)          ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The stamp is written last, so that an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hf_prune needs Python 3.10 or newer, found " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	touch $(INSTALLED)

clean:                      ## remove the environment, the caches and the demo's output
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info out
	find hf_prune tests -name __pycache__ -type d -prune -exec rm -rf {} +
