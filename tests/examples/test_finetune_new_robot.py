"""The example of a new robot: its README's commands, in its order, on fewer episodes and steps."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder
from transformers_worldvla.data import FrameTokenCache, load_episodes, scan_episodes

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from simulator_extras import need_meta_world  # noqa: E402

need_meta_world()
pytest.importorskip("peft", reason='peft is not installed (extra "train")')

FOLDER = Path(__file__).parents[2] / "examples" / "finetune_new_robot"
SHORTER = {
    "record.py": "--episodes 2 --tasks drawer-close-v3 --processes 1",
    "worldvla tokenize": "--val-share 0.5",
    "worldvla train": "--steps 3 --batch-size 2 --eval-samples 2",
    "worldvla evaluate": "--tasks drawer-close-v3 --trials 1 --max-steps 12 --workers 1 --videos 0",
    "check.py": "--stride 20",
}
_LOGITS = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoProcessor
folder, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(images=[np.full((128, 128, 3), 90, np.uint8)], instruction="drawer close")
with torch.no_grad():
    np.save(output, model(**inputs).logits.numpy())
print(list(processor.decode_actions(model.generate_actions(**inputs, num_actions=2)).shape))
"""


def readme_commands() -> list[list[str]]:
    """The words of every command in the README's first block of shell, `pip` left out."""
    block = re.search(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    lines = [line.partition(" #")[0] for line in block[1].replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := line.split()) and words[0] not in ("#", "pip", "cd")]


def run(words: list[str], folder: Path) -> str:
    """Run a command of the README with the options of `SHORTER` after its own; returns what it printed."""
    (shorter,) = [options for name, options in SHORTER.items() if name in " ".join(words)]
    program = {"python": [sys.executable], "worldvla": [sys.executable, "-m", "transformers_worldvla.cli"]}[words[0]]
    scripts = [str(FOLDER / word) if word.endswith(".py") else word for word in words[1:]]
    command = [*program, *scripts, *shorter.split()]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_from_recording_to_closed_loop(fresh_process: Callable[..., Any], tmp_path: Path) -> None:
    printed = {" ".join(words): run(words, tmp_path) for words in readme_commands()}

    dataset = load_episodes(tmp_path / "data" / "meta_world")
    assert not scan_episodes(tmp_path / "data" / "meta_world").problems
    assert [episode.instruction for episode in dataset] == ["drawer close"] * 2
    assert dataset[0].actions.shape[1] == 4 and dataset.action_names == ("x", "y", "z", "gripper")
    cache = FrameTokenCache(tmp_path / "data" / "tokens")
    assert cache.splits["val_ind"] == len(dataset[cache.header["split"]["episodes"]["val_ind"][0]])

    adapter, merged = tmp_path / "runs" / "sawyer", tmp_path / "runs" / "sawyer" / "merged"
    robot = WorldVLAProcessor.from_pretrained(merged).get_embodiment()
    assert (robot.name, robot.action_dim, robot.rotation) == ("sawyer", 4, 180)
    reports = [json.loads(out) for words, out in printed.items() if "check.py" in words]
    assert len(reports) == 2, "of the adapter and of the merged checkpoint"
    assert reports[0]["action_l1"]["base"] != reports[0]["action_l1"]["model"]
    assert reports[1]["action_l1"] == {name: reports[0]["action_l1"][name] for name in reports[1]["action_l1"]}
    assert (merged / "training_statistics.json").read_bytes() == (adapter / "training_statistics.json").read_bytes()
    results = [
        line for file in (tmp_path / "results").rglob("episodes.jsonl") for line in file.read_text().splitlines()
    ]
    assert len(results) == 3 and all(json.loads(line)["success"] is not None for line in results)

    logits = {}
    for name, folder in (("adapter", adapter), ("merged", merged)):
        shape = fresh_process(_LOGITS, folder, tmp_path / f"{name}.npy", package=False)
        assert shape == [1, 2, 4]
        logits[name] = np.load(tmp_path / f"{name}.npy")
    np.testing.assert_allclose(logits["merged"], logits["adapter"], atol=1e-3)

    switched_off = WorldVLAForCausalLM.from_pretrained(adapter).eval()
    switched_off.disable_adapters()
    base = WorldVLAForCausalLM.from_pretrained(bundled_folder(DEFAULT_CHECKPOINT)).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(switched_off(input_ids=ids).logits, base(input_ids=ids).logits), "what check.py calls base"
