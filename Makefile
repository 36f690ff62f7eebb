# decodebench: `make run` for the comparison, `make test` for the proof.
PYTHON ?= python3
BIN := .venv/bin

# How long `make gpu` may take before it stops at a cell's end; the same command goes on.
BUDGET ?= 2h
GPU_OUT ?=

.PHONY: run test peers lint types contract check bench bench-cpu gpu clean

run: .venv/installed
	$(BIN)/decodebench run --suite tiny --out runs/tiny

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not peers"

peers: .venv/installed-peers
	$(BIN)/python -m pytest -n 2 -m peers tests/peers

check: lint types contract

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-test
	$(BIN)/mypy

contract: .venv/installed-test
	$(BIN)/lint-imports

bench: .venv/installed-test
	$(BIN)/python -m pytest tests/bench --benchmark-group-by=param:arch

bench-cpu: .venv/installed-test
	$(BIN)/python -m eval.proof.bench_cpu

# Runs with the Python that has torch for the GPU; nothing is installed.
gpu:
	$(PYTHON) -m eval.cli kernels --check --bench --time-budget $(BUDGET) $(if $(GPU_OUT),--out $(GPU_OUT))

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; run make PYTHON=/path/to/a/newer/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

# Reference code alone is wanted of them: nothing they depend on is installed, no CUDA is built, and
# the build uses the torch that is here (it would fetch another one for itself otherwise). They lie
# apart, for these tests alone: transformers would take their GPU kernels wherever it finds them.
.venv/installed-peers: .venv/installed-test constraints-peers.txt
	$(BIN)/pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-peers.txt setuptools wheel
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/pip install --quiet \
		--disable-pip-version-check --no-deps --no-build-isolation --upgrade --target .venv/peers \
		-c constraints-peers.txt mamba-ssm fla-core
	touch $@

clean:
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache
