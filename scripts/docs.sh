#!/usr/bin/env bash
# Builds the documentation's site into build/site, strictly: a warning is an error. `bash scripts/docs.sh serve` shows it
# at http://127.0.0.1:8000 instead and follows changes. Sets up .venv first where mkdocs is not there yet.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
if ! "$venv/bin/python" -c 'import material, mkdocstrings_handlers.python' 2>/dev/null; then
    bash scripts/setup.sh docs
fi
export NO_MKDOCS_2_WARNING=1 # mkdocs is pinned below 2
if [ "${1:-}" = serve ]; then
    exec "$venv/bin/python" -m mkdocs serve
fi
"$venv/bin/python" -m mkdocs build --strict --quiet
echo "built build/site/index.html"
