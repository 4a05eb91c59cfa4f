"""`lerobot-train` and `lerobot-eval` themselves, on a dataset by LeRobot's own writer and a small environment."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from lerobot_environment import require_lerobot
from plugin_robot import DATASET, PLUGIN, ROBOT

require_lerobot()

from lerobot.configs.types import FeatureType, PolicyFeature  # noqa: E402
from lerobot.envs.configs import EnvConfig  # noqa: E402

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor  # noqa: E402
from transformers_worldvla.data import PixelSampleDataset, WorldVLADataCollator, load_episodes  # noqa: E402
from transformers_worldvla.lerobot import LeRobotWorldVLAConfig, LeRobotWorldVLAPolicy  # noqa: E402
from transformers_worldvla.serving.policy import WorldVLAPolicy  # noqa: E402

STEPS = 6  # of an episode of the environment
TRAIN = [PLUGIN, "--policy.type=worldvla", "--policy.device=cpu", "--policy.push_to_hub=false", "--policy.dropout=0"]
TRAIN += ["--dataset.repo_id=lab/toy", f"--dataset.root={DATASET}", "--batch_size=2", "--num_workers=0"]


class PlaybackEnv(gymnasium.Env):
    """Plays the first pictures of an episode back, whatever is done, and keeps what was done."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    taken: list[np.ndarray] = []

    def __init__(self, **_: Any):
        self._episode, self._max_episode_steps = load_episodes(DATASET)[0], STEPS
        boxes = {camera: gymnasium.spaces.Box(0, 255, (64, 96, 3), np.uint8) for camera in ROBOT.cameras}
        self.observation_space = gymnasium.spaces.Dict({"pixels": gymnasium.spaces.Dict(boxes)})
        self.action_space = gymnasium.spaces.Box(-3, 3, (4,), np.float32)
        self.task = self.task_description = self._episode.instruction

    def _observe(self) -> dict[str, Any]:
        return {"pixels": {camera: self._episode.frame(camera, self._step) for camera in ROBOT.cameras}}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.taken.append(action.copy())
        self._step += 1
        done = self._step == STEPS
        return self._observe(), float(done), done, False, {"is_success": done}

    def render(self) -> np.ndarray:
        return self._episode.frame("front", self._step)


@EnvConfig.register_subclass("worldvla_playback")
@dataclass
class PlaybackConfig(EnvConfig):
    """What `--env.type=worldvla_playback` makes."""

    task: str | None = "Playback-v0"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            **{f"pixels/{camera}": PolicyFeature(FeatureType.VISUAL, (64, 96, 3)) for camera in ROBOT.cameras},
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            **{f"pixels/{camera}": f"observation.images.{camera}" for camera in ROBOT.cameras},
        }
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}


# LeRobot asks the environment itself for its task: no wrapper around it
gymnasium.register("gym_worldvla_playback/Playback-v0", PlaybackEnv, order_enforce=False, disable_env_checker=True)


def record_losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], float]]:
    """The dataset rows and the loss of every forward from now on."""
    seen: list[tuple[list[int], float]] = []
    forward = LeRobotWorldVLAPolicy.forward

    def spy(self: Any, batch: dict[str, Any], **options: Any) -> Any:
        loss, parts = forward(self, batch, **options)
        seen.append((batch["index"].tolist(), loss.item()))
        return loss, parts

    monkeypatch.setattr(LeRobotWorldVLAPolicy, "forward", spy)
    return seen


def train_by_hand(checkpoint: Path, batches: list[list[int]], config: LeRobotWorldVLAConfig) -> tuple[list[float], Any]:
    """The losses of the same steps with our own reader, samples and collator and PyTorch's AdamW, and the model."""
    model, processor = WorldVLAForCausalLM.from_pretrained(checkpoint), WorldVLAProcessor.from_pretrained(checkpoint)
    model.model.vqmodel.requires_grad_(False)
    for layer in model.model.layers:
        layer.dropout.p = 0.0
    model.train()
    episodes = load_episodes(DATASET)
    samples = PixelSampleDataset(list(episodes), num_actions=4, history=2)
    items = {samples.locate(item): item for item in range(len(samples))}
    places = [(number, step) for number, length in enumerate(episodes.lengths) for step in range(length)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.optimizer_lr, betas=config.optimizer_betas, weight_decay=config.optimizer_weight_decay
    )
    schedule = config.get_scheduler_preset().build(optimizer, len(batches))
    losses = []
    for rows in batches:
        wanted = [(places[row][0], kind, places[row][1]) for row in rows for kind in ("action", "world")]
        loss = model(**WorldVLADataCollator(processor)([samples[items[place]] for place in wanted])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, model


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of `lerobot-train` over three steps, and what it saw."""
    import sys

    from lerobot.scripts import lerobot_train

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = record_losses(patch)
        arguments = [*TRAIN, f"--policy.checkpoint={checkpoint}", "--policy.optimizer_lr=0.001", "--steps=3"]
        patch.setattr(sys, "argv", ["lerobot-train", *arguments, f"--output_dir={folder}", "--log_freq=1"])
        lerobot_train.main()
    return {"seen": seen, "saved": folder / "checkpoints" / "000003" / "pretrained_model"}


def test_training_takes_the_steps_that_our_own_code_would_take(trained: dict[str, Any], checkpoint: Path) -> None:
    seen = trained["seen"]
    assert len(seen) == 3
    config = LeRobotWorldVLAConfig(device="cpu", optimizer_lr=0.001)
    losses, model = train_by_hand(checkpoint, [rows for rows, _ in seen], config)
    assert [loss for _, loss in seen] == pytest.approx(losses, rel=1e-6)
    assert losses[0] != losses[2]
    saved = WorldVLAForCausalLM.from_pretrained(trained["saved"]).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)


def test_the_sampler_takes_only_steps_with_a_whole_chunk(trained: dict[str, Any]) -> None:
    """Under LeRobot's sampler no row is filled up."""
    lengths = load_episodes(DATASET).lengths
    ends = np.cumsum(lengths)
    for rows, _ in trained["seen"]:
        for row in rows:
            assert ends[np.searchsorted(ends, row, side="right")] - row >= 4


def test_training_goes_on_from_what_it_saved(
    trained: dict[str, Any], command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`--policy.path` together with the option that finds the plugin: LeRobot hands the option on to the policy."""
    seen = record_losses(monkeypatch)
    paths = [f"--policy.path={trained['saved']}", PLUGIN, "--policy.push_to_hub=false", "--policy.device=cpu"]
    data = ["--dataset.repo_id=lab/toy", f"--dataset.root={DATASET}", "--batch_size=2", "--num_workers=0"]
    command("lerobot-train", *paths, *data, "--steps=1", f"--output_dir={tmp_path / 'more'}")
    ((rows, loss),) = seen
    again = LeRobotWorldVLAConfig(device="cpu", optimizer_lr=0.001)
    assert loss == pytest.approx(train_by_hand(trained["saved"], [rows], again)[0][0], rel=1e-6)


@pytest.mark.parametrize("robots", [1, 2])
def test_evaluation_acts_as_our_policy_does(
    robots: int, trained: dict[str, Any], command: Callable[..., None], tmp_path: Path
) -> None:
    PlaybackEnv.taken.clear()
    command(
        "lerobot-eval",
        f"--policy.path={trained['saved']}",
        PLUGIN,
        "--policy.device=cpu",
        "--env.type=worldvla_playback",
        f"--eval.n_episodes={robots}",
        f"--eval.batch_size={robots}",
        f"--output_dir={tmp_path}",
    )
    info = json.loads((tmp_path / "eval_info.json").read_text(encoding="utf-8"))
    assert info["overall"]["pc_success"] == 100 and info["overall"]["n_episodes"] == robots
    ours, episode = WorldVLAPolicy.from_pretrained(trained["saved"], device="cpu"), load_episodes(DATASET)[0]
    expected = []
    for step in range(STEPS):
        frames = {camera: episode.frame(camera, step) for camera in ROBOT.cameras}
        expected.append(ours.select_action({**frames, "prompt": episode.instruction}).astype(np.float32))
    found = np.stack(PlaybackEnv.taken).reshape(STEPS, robots, 4)
    for robot in range(robots):
        assert np.array_equal(found[:, robot], np.stack(expected))
