"""The example of a new robot: its README's commands, in its order, on fewer episodes and steps."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from readme_runner import EXAMPLES, make_runner, readme_commands

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder
from transformers_worldvla.data import FrameTokenCache, load_episodes, scan_episodes

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from simulator_extras import need_meta_world  # noqa: E402

need_meta_world()
pytest.importorskip("peft", reason='peft is not installed (extra "train")')

FOLDER = EXAMPLES / "finetune_new_robot"
SHORTER = {
    "record.py": "--episodes 2 --tasks drawer-close-v3 --processes 1",
    "adapt_image_tokenizer.py": "--val-share 0.5 --steps 4 --batch-size 2",
    "worldvla tokenize": "--val-share 0.5",
    "worldvla train": "--steps 3 --batch-size 2 --eval-samples 2",
    "check.py": "--stride 20",
    "worldvla evaluate": "--tasks drawer-close-v3 --trials 1 --max-steps 12 --workers 1 --videos 0",
}
_LOGITS = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoProcessor
shapes = []
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = processor(images=[np.full((128, 128, 3), 90, np.uint8)], instruction="drawer close")
    with torch.no_grad():
        np.save(f"{folder}/logits.npy", model(**inputs).logits.numpy())
    shapes.append(list(processor.decode_actions(model.generate_actions(**inputs, num_actions=2)).shape))
print(shapes)
"""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    monkeypatch.chdir(tmp_path)
    return make_runner(FOLDER, SHORTER, monkeypatch, capsys, apart=["record.py"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readme_from_recording_to_closed_loop(
    run: Callable[..., str], fresh_process: Callable[..., Any], tmp_path: Path
) -> None:
    printed = {" ".join(words): run(words) for words in readme_commands(FOLDER)}

    dataset = load_episodes(tmp_path / "data" / "meta_world")
    assert not scan_episodes(tmp_path / "data" / "meta_world").problems
    assert [episode.instruction for episode in dataset] == ["drawer close"] * 2
    assert dataset[0].actions.shape[1] == 4 and dataset.action_names == ("x", "y", "z", "gripper")
    cache = FrameTokenCache(tmp_path / "data" / "tokens")
    assert cache.splits["val_ind"] == len(dataset[cache.header["split"]["episodes"]["val_ind"][0]])

    bundled, base = (
        WorldVLAForCausalLM.from_pretrained(folder).eval()
        for folder in (bundled_folder(DEFAULT_CHECKPOINT), tmp_path / "runs" / "base")
    )
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, bundled.state_dict()[name])}
    assert changed and all(name.startswith("model.vqmodel.") for name in changed), "the decoder is as it was"

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

    assert fresh_process(_LOGITS, adapter, merged, package=False) == [[1, 2, 4]] * 2
    logits = [np.load(folder / "logits.npy") for folder in (adapter, merged)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)

    switched_off = WorldVLAForCausalLM.from_pretrained(adapter).eval()
    switched_off.disable_adapters()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(switched_off(input_ids=ids).logits, base(input_ids=ids).logits), "what check.py calls base"
