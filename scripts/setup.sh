#!/usr/bin/env bash
# Makes .venv (or $VENV) with an editable install: bash scripts/setup.sh [EXTRAS], for example "train,libero".
# Versions are those of constraints.txt (or $CONSTRAINTS). PYTHON names the interpreter, pip's own variables the index.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
constraints="${CONSTRAINTS:-constraints.txt}"
extras="${1:-}"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer found: install it, or name it with PYTHON=" >&2
    exit 2
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian keeps these in a package of their own
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            echo "setup: $python cannot make environments: run apt-get install python3-venv as root, then try again" >&2
            exit 2
        fi
        apt-get update -q && apt-get install -y -q --no-install-recommends python3-venv
    fi
    "$python" -m venv --clear "$venv"
fi

# torch first and by its exact version: a wider requirement may choose another build with gigabytes of CUDA libraries
"$venv/bin/python" -m pip install -q "$(grep '^torch==' "$constraints")"
"$venv/bin/python" -m pip install -q -c "$constraints" -e ".${extras:+[$extras]}"
