# `make demo` and `make test` are all that a user needs; everything sets up what it needs first.
PYTHON ?= python3
VENV := .venv
OLD := .venv-oldest
OLDEST := 5.10.1
NEWEST := 5.24.0
BIN := $(VENV)/bin
# What the leaderboard is measured on: 5 contexts, 20 answers, long enough for the windows of every
# press; some two hours on two cores. The same command goes on where it was interrupted.
LEADERBOARD ?= builtin:multi_key-1500 --fraction 0.5
# What some presses have to learn of the built-in model first; a quarter of an hour.
HOME_OF_MODELS := $(or $(CACHEPRESS_HOME),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cachepress)
LEARNED := $(HOME_OF_MODELS)/learned/smollm2-135m
TESTED := allpairspy hypothesis pytest pytest-timeout pytest-xdist
KINDS := query_stats q_filters kvzap_linear kvzap_mlp fastkvzip lukv
# A worker for each core, with one thread (more of them change nothing: make test THREADS=8, where
# those that wait must not keep others from the cores); what takes longest is told at the end.
THREADS ?= 1
COUNTED := OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$(THREADS)
PYTEST := -m pytest --numprocesses auto --durations 15 --durations-min 1

.PHONY: demo test docs docs-test wheel-test slower fuzz laws laws-newest elsewhere bench benchmarks \
	gpu leaderboard models presses lint types clean

demo: $(VENV)/usable
	$(BIN)/cachepress demo

test: $(VENV)/ready $(OLD)/ready
	$(BIN)/cachepress models --fetch
	$(COUNTED) $(OLD)/bin/python $(PYTEST) tests/laws tests/test_hf.py tests/test_generate.py \
		tests/test_prefill.py tests/test_persist.py
	$(COUNTED) $(BIN)/python $(PYTEST)

# Some of the laws with instructions that are not this processor's own, and with the last bits of
# what a model computes moved: they hold on any machine. All tests: CACHEPRESS_SHAKEN=1 make test.
elsewhere: $(VENV)/ready
	ATEN_CPU_CAPABILITY=$$($(BIN)/python -m tests.elsewhere) CACHEPRESS_SHAKEN=1 \
		CACHEPRESS_LAWS=few $(COUNTED) $(BIN)/python $(PYTEST) tests/laws/test_laws.py \
		tests/laws/test_matrix.py tests/laws/test_goldens.py tests/ops tests/cache \
		tests/presses tests/test_exact.py

laws: $(VENV)/ready
	CACHEPRESS_LAWS=all $(COUNTED) $(BIN)/python $(PYTEST) tests/laws

# The same for the newest Python: make laws-newest PYTHON=python3.14. Its torch is what its pip finds.
NEW := .venv-newest
laws-newest:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: give PYTHON=, or set it up"; exit 1; }
	$(PYTHON) -m venv $(NEW)
	$(NEW)/bin/pip install --quiet --constraint constraints.txt --editable '.[eval]' \
		$(TESTED) transformers==$(NEWEST)
	CACHEPRESS_LAWS=few $(COUNTED) $(NEW)/bin/python $(PYTEST) tests/laws

# The site is in site/ then; the warning is about a future mkdocs, and would be the only one.
docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --strict --quiet

# What takes long, or needs what builds the documentation.
docs-test: docs
	$(BIN)/cachepress models --fetch
	$(COUNTED) $(BIN)/python $(PYTEST) -m docs tests/test_examples.py tests/test_notebooks.py

# The README's first lines, from the wheel, in an environment that has nothing else.
wheel-test:
	$(PYTHON) -m tests.wheel

bench: $(VENV)/ready
	$(BIN)/cachepress bench --lengths 8192 --steps 40 --repeats 1 --presses "KnormPress(0.0)" \
		"SnapKVPress(0.5)" "AdaKVPress(SnapKVPress(0.9))"

leaderboard: $(VENV)/ready $(KINDS:%=$(LEARNED)/%.safetensors)
	$(BIN)/cachepress sweep --presses all --ratios 0.5 0.9 --query-aware both --kl \
		--datasets $(LEADERBOARD) --output-dir results/leaderboard --markdown docs/leaderboard.md
	$(BIN)/cachepress report results/leaderboard

benchmarks: $(VENV)/ready
	$(BIN)/python evaluation/benchmarks.py

# What a GPU gains, within some minutes, with a Python that has torch and transformers: docs/gpu.md
MINUTES ?= 6
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --minutes $(MINUTES)

# Every causal model type of transformers, tried under a press; goes on where it was interrupted.
models: $(VENV)/ready
	$(BIN)/python -m benchmarks.models

presses: $(VENV)/ready $(KINDS:%=$(LEARNED)/%.safetensors)
	$(BIN)/cachepress presses --page docs/presses.md

$(LEARNED)/%.safetensors: | $(VENV)/ready
	$(BIN)/cachepress train $* $(if $(filter lukv,$*),--press "expected_attention(epsilon=0.02)")

# What is damaged or endless ends in one line; by hand, longer: make fuzz SECONDS=3600 SEED=1
SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/ready
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

# Whether the last commit made prefill or decoding slower, both measured in turns.
slower: $(VENV)/ready
	$(BIN)/python -m tests.slower

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/pyright --pythonpath $(BIN)/python

# What a user needs; tests, and the GPU's kernels, come on top.
$(VENV)/usable: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[models,eval]' transformers==$(NEWEST)
	touch $@

$(VENV)/ready: $(VENV)/usable
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,triton]' transformers==$(NEWEST)
	touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]' transformers==$(NEWEST)
	touch $@

$(OLD)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]' transformers==$(OLDEST)
	touch $@

clean:
	rm -rf $(VENV) $(OLD) $(NEW) build site *.egg-info .pytest_cache .ruff_cache .hypothesis
