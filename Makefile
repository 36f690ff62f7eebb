# decodebench: `make run` for the comparison, `make test` for the proof.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint types contract check bench-cpu clean

run: .venv/installed
	$(BIN)/decodebench run --suite tiny --out runs/tiny

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu"

check: lint types contract

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-test
	$(BIN)/mypy

contract: .venv/installed-test
	$(BIN)/lint-imports

bench-cpu: .venv/installed-test
	$(BIN)/python -m eval.bench_cpu

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

clean:
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache
