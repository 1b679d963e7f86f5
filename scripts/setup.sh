#!/usr/bin/env bash
# Makes or re-uses the virtual environment .venv with the extras named as arguments. Sourced by the other scripts.
# Needs Python 3.10 or later and a package index. PYTHON names another interpreter; TMQ_TORCH another torch requirement.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

setup() {
    local extras="$1" python stamp want lock torch
    python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "setup: $python is $("$python" --version 2>&1), expected Python 3.10 or later. Set PYTHON to another one." >&2
        exit 3
    }
    stamp=".venv/installed-$extras"
    lock="requirements-${extras//,/-}.lock"
    want="$(cat pyproject.toml "$lock" <(echo "${TMQ_TORCH:-torch==2.13.0}") | sha256sum | cut -d' ' -f1)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
        echo "setup: installing turbomind-quant[$extras] into .venv (once)" >&2
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # torch first and by exact version: a looser requirement may bring in gigabytes of another build. triton with it, since
        # builds for GPUs want one of their own. The rest comes from the lock: each file is the one whose hash stands there.
        torch=("${TMQ_TORCH:-torch==2.13.0}")
        [ "$(uname -s)" != Linux ] || torch+=("triton>=3.6")
        .venv/bin/python -m pip install -q --disable-pip-version-check "${torch[@]}"
        .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r "$lock"
        .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
        .venv/bin/python -m pip check --disable-pip-version-check >&2
        echo "$want" > "$stamp"
    fi
    export PATH="$ROOT/.venv/bin:$PATH"
}
