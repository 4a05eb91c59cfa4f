#!/usr/bin/env bash
# Sets up .venv (EXTRAS, by default "dev") and checks everything: format, lint, types, tests. Arguments go to pytest;
# -m "" adds the slow tests. Tests of a simulator skip unless EXTRAS names it: EXTRAS=dev,libero,metaworld.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh "${EXTRAS:-dev}"
venv="${VENV:-.venv}"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
"$venv/bin/mypy"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one test process a core
exec "$venv/bin/python" -m pytest -n auto --dist worksteal "$@"
