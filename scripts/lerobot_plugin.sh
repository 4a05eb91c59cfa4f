#!/usr/bin/env bash
# Does LeRobot run our policy? Builds an environment with the newest lerobot for Python 3.11 and runs the plugin's tests and
# the blocks of docs/guides/lerobot.md in it. Needs a GB or two, no GPU.
#   bash scripts/lerobot_plugin.sh [FOLDER [PYTEST OPTIONS]]        keeps the environment there, /tmp/lerobot-plugin by default
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-/tmp/lerobot-plugin}"
shift || true
python="$folder/bin/python"

# lerobot 0.4.4 asks for transformers 4, huggingface_hub 0.x and torch below 2.11: it is installed without its dependencies,
# and of these only what its training, evaluation and datasets import (torchvision and torchcodec of our torch)
if ! "$python" -c 'from importlib.metadata import version; version("lerobot")' 2>/dev/null; then
    "${PYTHON:-python3.11}" -m venv --clear "$folder"
    "$python" -m pip install -q "$(grep '^torch==' constraints.txt)"
    "$python" -m pip install -q -c constraints.txt -e ".[train]" pytest pytest-timeout gymnasium pandas termcolor
    "$python" -m pip install -q "draccus==0.10.0" "deepdiff<10" einops "imageio[ffmpeg]" jsonlines opencv-python-headless pyserial
    "$python" -m pip install -q --no-deps "lerobot==0.4.4" "torchvision==0.28.0" "torchcodec==0.13.0"
fi
# a torchvision built for CUDA cannot load its operators beside a torch for CPUs, nor be imported without; none is used here
if ! "$python" -c 'import torchvision' 2>/dev/null; then
    cat >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'EOF'
import torch

operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
EOF
fi
"$python" -m pip install -q --no-deps -e . packages/lerobot_policy_worldvla
exec "$python" -m pytest -m "" tests/lerobot_plugin "$@"
