"""From a cache of LIBERO's frames, one that asks where the hand goes instead of what the robot should do.

    python hand_positions.py runs/tiny/plain --output runs/tiny/hands

The same frames with the same instruction and ", as hand positions": an action is the hand's place (x, y, z in metres)
and the gripper's opening one step later. Trained on beside the others, it teaches a decoder where in a picture the hand
is, to 4 mm; that alone did not make a policy solve more (docs/experiments.md). To the decoder this is another robot,
`libero-hand`; `pack.py` takes it out of the finished checkpoint. `--ranges` takes the ranges of an earlier result, for
one robot in all.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transformers_worldvla.data import FrameTokenCache
from transformers_worldvla.data.cache import HEADER
from transformers_worldvla.data.statistics import action_statistics
from transformers_worldvla.durable import write_json

ROBOT, SUFFIX = "libero-hand", ", as hand positions"
COLUMNS = [0, 1, 2, 6]  # of LIBERO's state: ee_pos (3), ee_ori (3), gripper_states (2)
NAMES = ["x", "y", "z", "opening"]


def next_hands(table: Any) -> np.ndarray:
    """(T, 4): position and opening after each step; an episode's last step keeps its own."""
    states = np.stack(table["state"].to_numpy())[:, COLUMNS]
    episodes = table["episode_index"].to_numpy()
    following = np.minimum(np.arange(len(states)) + 1, len(states) - 1)
    following = np.where(episodes[following] == episodes, following, np.arange(len(states)))
    return states[following].astype(np.float32)


def ask_for_hands(table: Any) -> Any:
    """The rows with hand positions for actions, and instructions that say so."""
    hands = pa.FixedSizeListArray.from_arrays(pa.array(next_hands(table).ravel()), len(COLUMNS))
    instructions = pa.array([instruction + SUFFIX for instruction in table["instruction"].to_pylist()])
    for name, column in (("action", hands), ("instruction", instructions)):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--ranges", type=Path, help="a cache of hand positions whose ranges are taken")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists: choose another --output")
    cache = FrameTokenCache(args.cache)
    entries = cache.header["files"]
    tables = {entry["path"]: ask_for_hands(pq.read_table(cache.path / entry["path"])) for entry in entries}
    if args.ranges is None:
        trained = [tables[entry["path"]] for entry in entries if entry["split"] == "train"]
        statistics = action_statistics([np.stack(table["action"].to_numpy()) for table in trained], names=NAMES)
        (low, high), described = statistics.ranges, statistics.to_dict()
    else:
        other = FrameTokenCache(args.ranges)
        low, high, described = other.embodiment.low, other.embodiment.high, other.header["statistics"]
    robot = {
        **cache.header["embodiment"],
        "name": ROBOT,
        "low": [float(value) for value in low],
        "high": [float(value) for value in high],
        "action_names": NAMES,
        "semantics": "absolute",
        "gripper": None,
    }
    fingerprint = hashlib.sha256(f"{cache.fingerprint} {robot}".encode()).hexdigest()
    partial = args.output.with_name(f".{args.output.name}.partial")
    for file, table in tables.items():
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial / file, compression="zstd")
    header = {**cache.header, "embodiment": robot, "statistics": described, "fingerprint": fingerprint}
    write_json(partial / HEADER, header)
    partial.replace(args.output)
    print(FrameTokenCache(args.output))


if __name__ == "__main__":
    main()
