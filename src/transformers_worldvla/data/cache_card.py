"""The dataset card of a frame-token cache, for people and for `datasets.load_dataset`."""

import json
from typing import Any

_CARD = """\
---
{yaml}---

# Frame tokens of {source}

Every frame of {link} ({format}) as codes of an image tokenizer, with actions and state: made by
`worldvla tokenize` to train [WorldVLA](https://arxiv.org/abs/2506.21539), so that no frame is decoded or encoded again.

```python
from transformers_worldvla.data import FrameTokenCache

cache = FrameTokenCache("path or repository").verify(model, processor)
episodes = cache.episodes("train")
```

| | |
|---|---|
{facts}

Columns: `episode_index` and `step` number episode and time step as the source does (a gap is a dropped no-op);
`instruction`; `action` in the robot's units; `state` where the source has it; `codes.CAMERA`, the {height} x {width}
codebook indices of a picture, row by row. An index is no token id: the vocabulary of a model gives it one.
The header `worldvla_cache.json` says how the cache was made.
"""


def write_card(header: dict[str, Any], size: int) -> str:
    """The card of a cache whose Parquet files have `size` bytes."""
    dataset, robot = header["dataset"], header["embodiment"]
    height, width = header["image_transform"]["codes"]
    splits = {entry["split"]: 0 for entry in header["files"]}
    for entry in header["files"]:
        splits[entry["split"]] += entry["rows"]
    frames = sum(splits.values()) * len(header["cameras"])
    preparation = header["preparation"]
    facts = {
        "steps": ", ".join(f"{name} {rows}" for name, rows in splits.items()),
        "cameras": ", ".join(header["cameras"]),
        "size": f"{frames} frames, {size / frames:.0f} bytes a frame with actions and state",
        "robot": f"{robot['name']}, {len(robot['low'])} action dimensions",
        "no-ops": f"{preparation['no_ops']}, {preparation['dropped_no_op_steps']} steps dropped",
        "unsuccessful episodes": f"{len(preparation['failed_episodes'])}, {preparation['unsuccessful']}",
        "split": header["split"]["rule"],
        "pictures": _describe_pictures(header),
        "image tokenizer": f"sha256 {header['image_tokenizer']['sha256']}",
        "fingerprint": header["fingerprint"],
    }
    url = f"https://huggingface.co/datasets/{dataset['source']}"
    return _CARD.format(
        yaml=_yaml(list(splits)),
        source=dataset["source"],
        link=f"[{dataset['source']}]({url})" if dataset["revision"] else dataset["source"],
        format=dataset["format"],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        height=height,
        width=width,
    )


def _describe_pictures(header: dict[str, Any]) -> str:
    changed = header.get("augmentation")
    if changed is None:
        return "as recorded"
    return f"augmented, an episode's alike: {', '.join(f'{name} {value:g}' for name, value in changed.items())}"


def _yaml(splits: list[str]) -> str:
    """The front matter; splits without rows have no files and must not be named."""
    lines = [
        "pretty_name: WorldVLA frame tokens",
        "task_categories:",
        "- robotics",
        "tags:",
        "- worldvla",
        "- robotics",
    ]
    lines += ["configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {json.dumps(f'data/{split}-*.parquet')}"]
    return "\n".join(lines) + "\n"
