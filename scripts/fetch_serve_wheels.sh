#!/usr/bin/env bash
# Fetch what the server needs as wheels for another machine (x86-64 Linux, CPython 3.12), for one that has no network:
#   bash scripts/fetch_serve_wheels.sh [FOLDER]        here; versions are those of .venv
#   python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site FOLDER/*.whl && export PYTHONPATH=/tmp/site   there
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-.whl/serve}"
mkdir -p "$folder"
versions=$(.venv/bin/python - <<'PY'
from importlib.metadata import version

names = ("fastapi", "starlette", "uvicorn", "h11", "pydantic", "pydantic-core", "typing-inspection", "typing-extensions",
         "annotated-types", "annotated-doc", "opentelemetry-api", "anyio", "idna", "prometheus-client")
print(*(f"{name}=={version(name)}" for name in names))
PY
)
# shellcheck disable=SC2086
.venv/bin/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$folder" $versions
du -sh "$folder"
