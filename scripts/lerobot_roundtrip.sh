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

# LeRobot without its dependencies, which are robots and simulators for the most part; those of its datasets, in its ranges
roundtrip() {
    local version="$1" python="$folder/lerobot-$1/bin/python"
    shift
    if ! "$python" -c 'import lerobot' 2>/dev/null; then
        "${PYTHON:-python3.11}" -m venv --clear "$folder/lerobot-$version"
        "$python" -m pip install -q --no-compile "$@" "av==15.1.0" "draccus==0.10.0" "huggingface-hub==0.35.3" "numpy==2.2.6" \
            "deepdiff<9" einops gymnasium imageio jsonlines opencv-python-headless packaging pandas termcolor
        "$python" -m pip install -q --no-compile --no-deps "lerobot==$version"
    fi
    rm -rf "$folder/data-$version"
    echo "LeRobot $version writes and reads (its output: $folder/write-$version.log)"
    "$python" scripts/lerobot_roundtrip.py write "$folder/data-$version" >"$folder/write-$version.log" 2>&1
    grep "cannot read with" "$folder/write-$version.log" || true
    "$ours" scripts/lerobot_roundtrip.py compare "$folder/data-$version"
}

roundtrip 0.3.3 "torch==2.7.1" "torchvision==0.22.1" "torchcodec==0.5" "datasets==3.6.0"
roundtrip 0.4.4 "torch==2.10.0" "torchvision==0.25.0" "torchcodec==0.10.0" "datasets==4.1.1" accelerate
