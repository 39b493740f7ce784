# `make lab` opens the notebooks, `make test` proves them. Both set up .venv first, if that is not done.
SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
PORT  ?= 8888
FOLDER := notebooks
NPM   := tools/site/node_modules/.package-lock.json
SHARE := -n auto --dist loadfile --no-loadscope-reorder
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with=tests/nbval_sanitize.cfg --nbval-cell-timeout=300

.PHONY: lab test lint unit notebooks slow mutations outputs measured speed speed-many weights captioner ablations links \
	class grade test-class site test-site clean

lab: $(VENV)/ready
	@exec .ci/lab $(BIN) $(PORT) "$(FOLDER)"

test: lint  ## unit tests and notebooks in one run, so that no core waits between them
	$(BIN)/pytest $(SHARE) $(NBVAL) --each-twice --durations=10 notebooks tests

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache --no-logo

unit: $(VENV)/ready
	$(BIN)/pytest $(SHARE) --durations=5 tests

notebooks: $(VENV)/ready  ## every cell twice in a row, as readers run them, and compared both times
	$(BIN)/pytest $(SHARE) $(NBVAL) --each-twice --durations=0 notebooks

slow: $(VENV)/ready  ## SO400M at full size against timm and transformers: a minute or two, 9 GB of memory, 8 GB of disk
	$(BIN)/pytest -m slow --durations=0 tests

mutations: $(VENV)/ready  ## more than a hundred mistakes in the library, one at a time: which cell catches each; an hour or two, and goes on if stopped
	$(BIN)/python tools/mutate.py --out build/mutations.json

outputs: $(VENV)/ready  ## on an H100 or H200: run every notebook and store what it shows
	$(BIN)/python tools/store_outputs.py notebooks/*.ipynb

measured: $(VENV)/ready  ## on a CPU, or with SIGLIP_SIZE=lab: run every notebook and store only its time and memory
	$(BIN)/python tools/store_outputs.py --only-figures notebooks/*.ipynb

speed: $(VENV)/ready  ## on a GPU: time SO400M beside timm and transformers, a quarter of an hour
	$(BIN)/python tools/speed_of_tower.py

speed-many: $(VENV)/ready  ## on all GPUs of a machine: time the ring loss, DDP and FSDP2, a few minutes
	$(BIN)/python -m siglip_lib.launch gpu tools/speed_many_gpus.py

weights: $(VENV)/ready  ## on a GPU: train the SigLIP that ships, three seeds, 4 minutes
	$(BIN)/python tools/train_emoji64.py weights

captioner: $(VENV)/ready  ## on a GPU: train the captioner that ships behind its tower, three seeds
	$(BIN)/python tools/train_captioner.py

ablations: $(VENV)/ready  ## on a GPU: a table of what helps, by EmojiOne's drawings alone; some minutes
	$(BIN)/python tools/train_emoji64.py ablations

links: $(VENV)/ready  ## where origin is on GitHub: Colab badges, and the install line of each notebook's first cell
	$(BIN)/python tools/write_links.py

class: $(VENV)/class-ready  ## assignments for nbgrader, from the notebooks: hand out build/class/release
	$(BIN)/python tools/make_class.py

grade: $(VENV)/class-ready  ## what lies in build/class/submitted/STUDENT/NOTEBOOK/: grades.csv, and feedback with reasons
	$(BIN)/python tools/grade_class.py

test-class: $(VENV)/class-ready  ## both with the real nbgrader, on three submissions: about four minutes
	$(BIN)/pytest --durations=5 tests/test_class.py

site: $(VENV)/site-ready $(NPM)  ## the website, from the stored outputs, into build/site: two minutes; needs npm on first use
	$(BIN)/python tools/site/build.py

test-site: site  ## every page in headless Chromium, and the page "Try it" against the library: some minutes
	$(BIN)/pytest -n auto --dist worksteal -m site --durations=5 tests/test_site.py

clean:
	rm -rf $(VENV) tools/site/node_modules

$(VENV)/ready: pyproject.toml constraints-cpu.txt constraints-gpu.txt .ci/setup
	@.ci/setup $(VENV)
	@touch $@

$(VENV)/%-ready: $(VENV)/ready  # an extra, by the constraints that .ci/setup takes
	@constraints=constraints-cpu.txt; if nvidia-smi >/dev/null 2>&1; then constraints=constraints-gpu.txt; fi; \
	  $(BIN)/pip install --disable-pip-version-check -c $$constraints -e ".[$*]"
	@touch $@

$(NPM): tools/site/package.json tools/site/package-lock.json
	@command -v npm >/dev/null || { echo "make site needs npm (Debian and Ubuntu: apt install npm)" >&2; exit 1; }
	@cd tools/site && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@
