#!/usr/bin/env bash
# Sets up, then checks style and types, runs the tests, the demo once, the regression table and the tests on what
# the demo made.
. "$(dirname "$0")/setup.sh"
setup "dev,report,serve,web"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TMQ_DEMO_OUT TMQ_DEMO_MODEL
ruff format --check .
ruff check .
mypy
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile -m "not e2e" "$@"
export TMQ_DEMO_MODEL="$(python scripts/demo_model.py)"
export TMQ_DEMO_OUT="$ROOT/build/demo"
rm -rf "$TMQ_DEMO_OUT"
python scripts/demo.py -o "$TMQ_DEMO_OUT" --record "$TMQ_DEMO_OUT/demo.json"
python scripts/regression_table.py "$TMQ_DEMO_MODEL" --demo "$TMQ_DEMO_OUT/demo.json"
pytest -m e2e "$@"
