#!/usr/bin/env bash
# Sets up .venv and runs the main job; arguments go to `worldvla demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/worldvla" demo "$@"
