#!/usr/bin/env bash
# Sets up, then takes a real 135M model through calibrate -> search -> pack -> verify -> evaluate on the CPU.
# usage: bash scripts/demo.sh [-o FOLDER]     (results: FOLDER, default demo-out; figures: benchmarks/demo.json)
. "$(dirname "$0")/setup.sh"
setup "report,serve"
exec python scripts/demo.py "$@"
