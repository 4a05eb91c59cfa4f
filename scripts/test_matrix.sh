#!/usr/bin/env bash
# Runs the tests under the oldest and the newest supported transformers, each in an environment of its own (.venv-matrix/).
# Arguments go to pytest; VERSIONS overrides the versions. Every version runs, and any failure fails the whole.
set -uo pipefail
cd "$(dirname "$0")/.."
versions="${VERSIONS:-5.5.4 5.23.0}"
# what each transformers release brings in versions of its own
family='^(transformers|huggingface[-_]hub|tokenizers|hf-xet|datasets|accelerate|peft)=='
failed=()

for version in $versions; do
    echo "== transformers $version"
    constraints=".venv-matrix/constraints-$version.txt"
    mkdir -p .venv-matrix
    { grep -vE "$family" constraints.txt; echo "transformers==$version"; } >"$constraints"
    if ! { VENV=".venv-matrix/$version" CONSTRAINTS="$constraints" bash scripts/setup.sh dev &&
        ".venv-matrix/$version/bin/python" -m pytest "$@"; }; then
        failed+=("$version")
    fi
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed under transformers ${failed[*]}" >&2
    exit 1
fi
