# `make lab` opens the notebooks, `make test` proves them. Both set up .venv first, if that is not done.
SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
PORT  ?= 8888
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with=tests/nbval_sanitize.cfg --nbval-cell-timeout=120

.PHONY: lab test lint unit notebooks outputs measured clean

lab: $(VENV)/ready
	@exec .ci/lab $(BIN) $(PORT)

test: lint unit notebooks

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

unit: $(VENV)/ready
	$(BIN)/pytest --durations=5 tests

notebooks: $(VENV)/ready
	$(BIN)/pytest $(NBVAL) --durations=0 notebooks

outputs: $(VENV)/ready  ## on a GPU: run every notebook and store what it shows
	$(BIN)/python tests/store_outputs.py notebooks/*.ipynb

measured: $(VENV)/ready  ## on a CPU: run every notebook and store only its time and memory
	$(BIN)/python tests/store_outputs.py --only-figures notebooks/*.ipynb

clean:
	rm -rf $(VENV)

$(VENV)/ready: pyproject.toml constraints.txt .ci/setup
	@.ci/setup $(VENV)
	@touch $@
