# Every target makes .venv first when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# .venv/bin first: the launcher finds the same python and deepspeed as make does.
export PATH := $(abspath $(BIN)):$(PATH)
# One thread per rank: several ranks share the cores. DeepSpeed compiles nothing at installation.
export OMP_NUM_THREADS ?= 1
export DS_BUILD_OPS := 0
# Processes that the tests are spread over; auto: what cores and memory allow (tests/conftest.py).
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest
SPREAD := -n $(WORKERS) --dist worksteal

.PHONY: setup demo chat test check unit test-faults test-browser bench clean
setup: $(VENV)/.made

$(VENV)/.made: pyproject.toml constraints.txt
	@test ! -L $(VENV) || { echo "$(VENV) is a link, and would be emptied: run make where it leads" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "Python >= 3.11 is needed ($(PYTHON) is not): install it, or make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "Python's venv module is missing: apt-get install python3-venv (or your system's package)" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes; log: $(VENV).log)"
	@$(PYTHON) -m venv --clear $(VENV) && \
	 $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[serve,demo,test,trackers,lm-eval]' > $(VENV).log 2>&1 || \
	    { tail -n 5 $(VENV).log >&2; echo "installation failed; the whole log is $(VENV).log" >&2; exit 1; }
	@touch $@

demo: setup
	@$(BIN)/python -m qwen_ds.demo

# The demo's base and its fine-tuned self, side by side. The adapter answers as the merged model does
# (tests/serve/engine/test_merged_and_served.py), and so one server holds both.
RUN ?= runs/demo
PORT ?= 8044
chat: setup
	@test -d $(RUN)/adapter || \
	    { echo "$(RUN)/adapter is not there: make demo trains it in a few minutes" >&2; exit 2; }
	@echo "side by side, once it is ready: http://127.0.0.1:$(PORT)/?left=base&right=fine-tuned"
	@exec $(BIN)/python -m serve.api --port $(PORT) --served_model_name base \
	    --adapter fine-tuned=$(RUN)/adapter --model \
	    "$$($(BIN)/python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["model"]["path"])' $(RUN)/recipe.yaml)"

check: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

unit: setup
	@$(PYTEST) $(SPREAD) -m "not job"

# Runs that are killed, stopped and starved in random ways, and files damaged in random ways, for a
# long time.
test-faults: setup
	@$(PYTEST) tests/faults tests/adversarial -m "job or soak"

test: setup
	@$(PYTEST) $(SPREAD)

# The chat page in headless Chromium.
test-browser: setup
	@$(BIN)/python -m pytest tests/browser

bench: setup
	@$(BIN)/python tests/benchmarks/train.py

clean:
	rm -rf $(VENV) $(VENV).log
