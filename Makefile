# Parts of scripts/test.sh, one at a time. `make` alone lists them. All use .venv, which scripts/setup.sh makes.
SHELL := bash
BIN := .venv/bin

.PHONY: help setup lint unit e2e gpu docs bench test
help:  ## List the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## Make .venv with all extras
	. scripts/setup.sh && setup "dev,report,serve,web"

lint:  ## Style and types: seconds
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

unit:  ## Tests without the demo model: minutes. PYTEST="tests/quant -x" runs a part
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not e2e" $(PYTEST)

e2e:  ## The demo, and the tests on what it made
	bash scripts/demo.sh
	TMQ_DEMO_OUT=demo-out TMQ_DEMO_MODEL="$$($(BIN)/python scripts/demo_model.py)" $(BIN)/pytest -m e2e $(PYTEST)

gpu:  ## All GPU tests, and their record in benchmarks/gpu_tests.json
	$(BIN)/python scripts/gpu_tests.py

docs:  ## The documentation site, in build/site
	$(BIN)/mkdocs build --strict

bench:  ## Products, attention and speed of quantization on this GPU
	$(BIN)/python scripts/bench_kernels.py
	$(BIN)/python scripts/bench_attention.py
	$(BIN)/python scripts/bench_quantize_speed.py

test:  ## Everything that continuous integration runs
	bash scripts/test.sh
