"""The README's Python runs as it stands, from top to bottom, with transformers alone: this library is not installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from doc_pages import ROOT, blocks
from PIL import Image

from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.data import load_episodes

GIVEN = """
import json, sys
import numpy as np
from PIL import Image

checkpoint, previous, current = sys.argv[1], Image.open(sys.argv[2]), Image.open(sys.argv[3])
plan = np.load(sys.argv[4])
action = x = plan[0]
a, b, text, chunk = previous, current, "turn on the stove", np.repeat(plan, 3, axis=0)
"""
SHOWN = """
print(json.dumps({
    "tokens": list(tokens.shape),
    "actions": np.asarray(actions).tolist(),
    "frames": [np.asarray(each).tolist() for each in frames],
    "frame": np.asarray(frame).tolist(),
    "loss": float(loss),
}))
"""


def test_the_readmes_python_runs_without_this_library(fresh_process: Callable[..., Any], tmp_path: Path) -> None:
    episode = load_episodes(bundled_folder(DEFAULT_EPISODE))[0]
    for step in (40, 41):
        Image.fromarray(episode.frame("image", step)).save(tmp_path / f"{step}.png")
    np.save(tmp_path / "plan.npy", episode.actions[41:43])
    code = "\n".join(block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    files = [tmp_path / name for name in ("40.png", "41.png", "plan.npy")]
    found = fresh_process(GIVEN + code + SHOWN, bundled_folder(DEFAULT_CHECKPOINT), *files, package=False)
    assert found["tokens"] == [1, 5, 7]
    actions = np.array(found["actions"])
    assert actions.shape == (1, 5, 7)
    assert np.abs(actions).max() <= 1, "deltas of LIBERO's arm"
    assert np.shape(found["frames"]) == (2, 128, 128, 3)
    assert np.array_equal(found["frame"], found["frames"][0]), "by hand and in one call"
    assert 0 < found["loss"] < 10
