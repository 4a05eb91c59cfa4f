"""The recipe from nothing: its README's commands, in its order, on a few episodes and steps."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from readme_runner import EXAMPLES, make_runner, readme_commands

from transformers_worldvla import WorldVLAProcessor
from transformers_worldvla.data import FrameTokenCache, load_episodes

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from simulator_extras import need_libero  # noqa: E402

need_libero()
pytest.importorskip("torchmetrics", reason='torchmetrics is not installed (extra "metrics")')

FOLDER = EXAMPLES / "libero_from_scratch"
SHORTER = {
    "train_image_tokenizer.py": "--steps 6 --continuous-steps 3 --batch-size 4",
    "make_checkpoint.py": "",
    "worldvla tokenize": "",
    "worldvla train": "--steps 3 --batch-size 2 --eval-samples 2 --eval-every 3",
    "evaluate.py": "--stride 30 --horizon 2",
    "evaluate libero": "--tasks 2 --trials 1 --max-steps 12 --workers 1 --videos 0",
    "evaluate world-model": "--horizons 2 --clips 1 --gifs 0",
}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    monkeypatch.chdir(tmp_path)
    return make_runner(FOLDER, SHORTER, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readme_from_pictures_to_closed_loop(run: Callable[[list[str]], str], tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "fixtures" / "libero" / "lerobot_v30_video"
    commands = [[str(data) if word == "DATA" else word for word in words] for words in readme_commands(FOLDER)]
    printed = {" ".join(words): run(words) for words in commands}

    files, runs = load_episodes(data), tmp_path / "runs" / "tiny"
    cache = FrameTokenCache(runs / "tokens")
    split = cache.header["split"]["episodes"]
    assert split["val_ood"] == [] and sorted(split["train"] + split["val_ind"]) == list(range(len(files)))
    (open_loop,) = [json.loads(out) for command, out in printed.items() if "evaluate.py" in command]
    assert open_loop["episodes"] == len(split["val_ind"]) >= 1
    robot = WorldVLAProcessor.from_pretrained(runs / "run").get_embodiment()
    assert (robot.name, robot.action_dim, robot.rotation, list(robot.cameras)) == ("libero", 7, 180, ["image"])
    (row,) = (runs / "success" / "episodes.jsonl").read_text().splitlines()
    assert json.loads(row)["success"] is False and json.loads(row)["steps"] == 12
    frames = json.loads((runs / "frames" / "summary.json").read_text())
    assert 5 < frames["horizons"]["2"]["psnr"]["model"]["mean"] < 60
