#!/usr/bin/env bash
# Sets up .venv and checks everything: format, lint, types, tests. Arguments go to pytest; -m "" adds the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
venv="${VENV:-.venv}"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
exec "$venv/bin/python" -m pytest "$@"
