"""Last stage: the checkpoint as it ships: one robot, the decoder in bfloat16, the image tokenizer whole, small shards.

    python pack.py --checkpoint runs/tiny/better --output runs/tiny/packed

Opened again the decoder computes in float32, from weights rounded to bfloat16: evaluate what this writes.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import CONFIG_NAME

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.durable import write_json
from transformers_worldvla.evaluation.metrics import STATISTICS_FILE

ROBOT, SHARD = "libero", "15MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists: choose another --output")
    model = WorldVLAForCausalLM.from_pretrained(args.checkpoint)
    processor = WorldVLAProcessor.from_pretrained(args.checkpoint)
    processor.embodiments = {ROBOT: processor.embodiments[ROBOT]}
    model.config.action_dim = processor.get_embodiment().action_dim
    partial = args.output.with_name(f".{args.output.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial, max_shard_size=SHARD)
    processor.save_pretrained(partial)
    config = json.loads((partial / CONFIG_NAME).read_text())
    write_json(partial / CONFIG_NAME, {**config, "dtype": "float32"})  # what it is opened in
    shutil.copy(args.checkpoint / STATISTICS_FILE, partial)
    partial.replace(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
