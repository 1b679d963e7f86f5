#!/usr/bin/env bash
# Writes the lock files anew from pyproject.toml: every package with its version and the hashes of its files.
#   bash scripts/lock.sh [--upgrade]      needs uv (pip install uv) and a package index
# One file for each set of extras that setup.sh installs. torch, triton and the CUDA packages are left out, because which of them and
# which files depends on the build of torch, for the CPU or for a GPU: setup.sh installs torch first, by exact version.
set -euo pipefail
cd "$(dirname "$0")/.."
for extras in report,serve dev,report,serve,web; do
    flags=()
    for extra in ${extras//,/ }; do flags+=(--extra "$extra"); done
    out="requirements-${extras//,/-}.lock"
    echo "setuptools>=78.1.1" | uv pip compile -q "$@" --universal --python-version 3.10 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-annotate --no-header --emit-build-options \
        --no-emit-package torch --no-emit-package triton "${flags[@]}" -o "$out" pyproject.toml -
    # What only builds of torch for GPUs bring: each block is a line with a name and the indented lines after it.
    awk '/^[a-z0-9]/ { gpu = /^(nvidia|cuda)-/ } !gpu' "$out" > "$out.part" && mv "$out.part" "$out"
    echo "$out: $(grep -c '==' "$out") packages"
done
