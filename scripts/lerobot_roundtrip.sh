#!/usr/bin/env bash
# Do we read what LeRobot reads? Writes datasets with LeRobot's own writers (0.3.3: v2.0, v2.1; 0.4.4: v3.0), reads them with
# LeRobot's readers and with ours, and compares every frame and number. Needs some GB for two environments, no GPU.
#   bash scripts/lerobot_roundtrip.sh [FOLDER]        keeps environments and datasets there, /tmp/lerobot-roundtrip by default
# OURS is a Python with transformers_worldvla (.venv's by default). LeRobot's torchcodec wants FFmpeg's shared libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-/tmp/lerobot-roundtrip}"
ours="${OURS:-.venv/bin/python}"
mkdir -p "$folder"

# LeRobot without its dependencies, which are robots and simulators for the most part; those of the datasets, in its ranges
roundtrip() {
    local version="$1" python="$folder/lerobot-$1/bin/python"
    shift
    if ! "$python" -c 'import lerobot' 2>/dev/null; then
        "${PYTHON:-python3.11}" -m venv --clear "$folder/lerobot-$version"
        "$python" -m pip install -q "$@" "draccus==0.10.0" "huggingface-hub<0.36" "numpy<2.3" "deepdiff<9" einops gymnasium \
            imageio jsonlines opencv-python-headless packaging pandas termcolor
        "$python" -m pip install -q --no-deps "lerobot==$version"
    fi
    rm -rf "$folder/data-$version"
    echo "LeRobot $version writes and reads (its output: $folder/write-$version.log)"
    "$python" scripts/lerobot_roundtrip.py write "$folder/data-$version" >"$folder/write-$version.log" 2>&1
    grep "cannot read with" "$folder/write-$version.log" || true
    "$ours" scripts/lerobot_roundtrip.py compare "$folder/data-$version"
}

roundtrip 0.3.3 "torch<2.8" "torchvision<0.23" "torchcodec<0.6" "datasets<=3.6.0" "av>=14.2,<16"
roundtrip 0.4.4 "torch<2.11" "torchvision<0.26" "torchcodec<0.11" "datasets>=4,<5" "av>=15,<16" accelerate
