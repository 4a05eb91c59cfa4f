"""The policy under LeRobot's own factory, datasets and pipelines: loss, actions, files and refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot_environment import require_lerobot
from plugin_robot import DATASET, ROBOT
from small_checkpoint import write_checkpoint

require_lerobot()

from lerobot.datasets.factory import resolve_delta_timestamps  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata  # noqa: E402
from lerobot.policies.factory import make_policy, make_pre_post_processors  # noqa: E402
from transformers import AutoModelForCausalLM, AutoProcessor  # noqa: E402

from transformers_worldvla import WorldVLATrainer, WorldVLATrainingArguments  # noqa: E402
from transformers_worldvla.data import PixelSampleDataset, WorldVLADataCollator, load_episodes  # noqa: E402
from transformers_worldvla.lerobot import LeRobotWorldVLAConfig, LeRobotWorldVLAPolicy  # noqa: E402
from transformers_worldvla.serving.policy import WorldVLAPolicy  # noqa: E402
from transformers_worldvla.training.recipes import FULL  # noqa: E402


@pytest.fixture(scope="module")
def meta() -> Any:
    return LeRobotDatasetMetadata("lab/toy", root=DATASET)


@pytest.fixture(scope="module")
def policy(checkpoint: Path, meta: Any) -> LeRobotWorldVLAPolicy:
    """As `lerobot-train` makes it; a test that changes it makes its own."""
    return make_policy(LeRobotWorldVLAConfig(checkpoint=str(checkpoint), device="cpu", dropout=0.0), ds_meta=meta)


def load_batch(policy: LeRobotWorldVLAPolicy, meta: Any, indices: Sequence[int]) -> dict[str, Any]:
    """Rows of the dataset through LeRobot's reader, collation and pre-processor."""
    dataset = LeRobotDataset("lab/toy", root=DATASET, delta_timestamps=resolve_delta_timestamps(policy.config, meta))
    before, _ = make_pre_post_processors(policy.config, dataset_stats=meta.stats)
    return before(torch.utils.data.default_collate([dataset[index] for index in indices]))


def our_batch(policy: LeRobotWorldVLAPolicy, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """The samples of the same rows by our own reader, sample rules and collator."""
    episodes = load_episodes(DATASET)
    samples = PixelSampleDataset(
        list(episodes), policy.robot.cameras, policy.robot.name, kinds=("action", "world"), num_actions=4, history=2
    )
    places = [(number, step) for number, length in enumerate(episodes.lengths) for step in range(length)]
    wanted = [(*places[index], kind) for index in indices for kind in ("action", "world")]
    items = {
        (number, step, kind): item for item in range(len(samples)) for number, kind, step in [samples.locate(item)]
    }
    return WorldVLADataCollator(policy.processor)([samples[items[place]] for place in wanted])


def test_the_loss_is_that_of_our_own_samples_collator_and_trainer(
    policy: LeRobotWorldVLAPolicy, meta: Any, tmp_path: Path
) -> None:
    indices = [0, 4, 9, 20]  # the first step of an episode among them
    policy.train()
    loss, parts = policy.forward(load_batch(policy, meta, indices))
    ours = our_batch(policy, indices)
    outputs = policy.model(**ours)
    assert loss.item() == outputs.loss.item() and loss.requires_grad
    assert parts["action_loss"] == outputs.action_loss.item() > 0
    assert parts["world_loss"] == outputs.world_loss.item() > 0
    arguments = WorldVLATrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = WorldVLATrainer(policy.model, arguments, processing_class=policy.processor)
    assert trainer.compute_loss(policy.model, ours).item() == pytest.approx(loss.item(), rel=1e-6)
    policy.eval()


def test_actions_beyond_the_episode_carry_no_loss(policy: LeRobotWorldVLAPolicy, meta: Any) -> None:
    """What LeRobot fills a chunk with does not matter; the actions before it do."""
    last = load_episodes(DATASET).lengths[0] - 1
    batch = load_batch(policy, meta, [last - 1])
    assert batch["action_is_pad"].tolist() == [[False, False, True, True]]
    loss = policy.forward(batch)[0].item()
    other = {**batch, "action": batch["action"].clone()}
    other["action"][:, 2:] = 1.5
    assert policy.forward(other)[0].item() == loss
    other["action"][:, 1] = 1.5
    assert policy.forward(other)[0].item() != loss


def test_only_the_decoder_is_trained(policy: LeRobotWorldVLAPolicy) -> None:
    trained = {id(parameter) for parameter in policy.get_optim_params()}
    decoder = [each for name, each in policy.model.named_parameters() if "vqmodel" not in name]
    assert trained == {id(parameter) for parameter in decoder}


def test_weights_of_16_bits_are_not_trained(checkpoint: Path) -> None:
    config = LeRobotWorldVLAConfig(checkpoint=str(checkpoint), device="cpu", weights_dtype="bfloat16")
    with pytest.raises(ValueError, match="use --policy.weights_dtype=float32, or an adapter"):
        LeRobotWorldVLAPolicy(config).get_optim_params()


def test_optimizer_and_schedule_are_those_of_the_full_recipe() -> None:
    optimizer, arguments = LeRobotWorldVLAConfig(device="cpu").get_optimizer_preset(), FULL.arguments
    assert (optimizer.lr, optimizer.weight_decay) == (arguments["learning_rate"], arguments["weight_decay"])
    assert optimizer.betas[1] == arguments["adam_beta2"] and optimizer.grad_clip_norm == arguments["max_grad_norm"]


# -------------------------------------------------------------------- acting


def test_actions_are_those_of_our_policy_for_every_robot_of_a_batch(
    policy: LeRobotWorldVLAPolicy, checkpoint: Path
) -> None:
    """Seven control steps of two robots: two plans each, with one frame and then two in the prompt."""
    before, after = make_pre_post_processors(policy.config)
    episodes = load_episodes(DATASET)
    robots = [WorldVLAPolicy.from_pretrained(checkpoint, device="cpu") for _ in range(2)]
    policy.reset()
    for step in range(6):
        frames = [{camera: episodes[row].frame(camera, step) for camera in ROBOT.cameras} for row in range(2)]
        batch = {
            f"observation.images.{camera}": torch.stack(
                [torch.from_numpy(frame[camera].copy()).permute(2, 0, 1).float() / 255 for frame in frames]
            )
            for camera in ROBOT.cameras
        }
        tasks = [episodes[row].instruction for row in range(2)]
        found = after(policy.select_action(before({**batch, "task": tasks})))
        for row, robot in enumerate(robots):
            expected = robot.select_action({**frames[row], "prompt": tasks[row]}).astype(np.float32)
            assert np.array_equal(found[row].numpy(), expected), f"step {step}, robot {row}"


def test_a_chunk_of_a_dataset_row_shows_the_frame_before_it(
    policy: LeRobotWorldVLAPolicy, meta: Any, checkpoint: Path
) -> None:
    chunks = policy.predict_action_chunk(load_batch(policy, meta, [0, 3]))
    assert chunks.shape == (2, 4, 4) and chunks.dtype == torch.float32
    episode = load_episodes(DATASET)[0]
    for row, steps in enumerate(([0], [2, 3])):
        frames = {camera: np.stack([episode.frame(camera, step) for step in steps]) for camera in ROBOT.cameras}
        ours = WorldVLAPolicy.from_pretrained(checkpoint, device="cpu")
        expected = ours.predict_action_chunk({**frames, "prompt": episode.instruction})
        assert np.array_equal(chunks[row].numpy(), expected.astype(np.float32))


def test_a_task_is_needed_and_may_come_from_the_configuration(checkpoint: Path) -> None:
    policy = LeRobotWorldVLAPolicy.from_pretrained(checkpoint)
    batch = {f"observation.images.{camera}": torch.zeros(1, 3, 64, 64) for camera in ROBOT.cameras}
    with pytest.raises(ValueError, match='a row has no "task": say what to do there'):
        policy.select_action({**batch, "task": [""]})
    policy.config.prompt = "stack the cups"
    assert policy.select_action({**batch, "task": [""]}).shape == (1, 4)


# -------------------------------------------------------------------- files


def test_a_saved_folder_opens_with_lerobot_and_as_our_checkpoint(policy: LeRobotWorldVLAPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = LeRobotWorldVLAPolicy.from_pretrained(tmp_path)
    assert again.config.chunk_size == 4 and again.config.n_obs_steps == 2 and again.config.embodiment == "toy"
    ours = WorldVLAPolicy.from_pretrained(tmp_path, device="cpu")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).get_embodiment() == ROBOT
    weights = policy.model.state_dict()
    for model in (again.model, ours.model, auto):
        assert model.config.to_dict().keys() == policy.model.config.to_dict().keys(), "nothing of LeRobot's leaks in"
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_saved_folder_can_be_published(policy: LeRobotWorldVLAPolicy, tmp_path: Path) -> None:
    from transformers_worldvla.publishing.folder import inspect_folder

    policy.save_pretrained(tmp_path)
    publication = inspect_folder(tmp_path)
    assert publication.kind == "model" and {"config.json", "config.5.0.0.json"} <= set(publication.files)


# -------------------------------------------------------------------- robots and refusals


def test_a_new_robot_gets_the_ranges_and_cameras_of_the_dataset(checkpoint: Path, meta: Any, tmp_path: Path) -> None:
    config = LeRobotWorldVLAConfig(checkpoint=str(checkpoint), device="cpu", embodiment="mine")
    policy = make_policy(config, ds_meta=meta)
    actions = np.concatenate([episode.actions for episode in load_episodes(DATASET)])
    assert policy.robot.low == tuple(actions.min(0).astype(np.float64).tolist())
    assert policy.robot.cameras == ("front", "wrist") and policy.robot.action_names == ("x", "y", "z", "gripper")
    policy.save_pretrained(tmp_path)
    assert list(AutoProcessor.from_pretrained(tmp_path).embodiments) == ["mine"]


def test_actions_that_would_be_clipped_are_announced(
    tmp_path: Path, meta: Any, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = write_checkpoint(tmp_path / "narrow", replace(ROBOT, high=(3.0, 0.01, 3.0, 3.0)))
    make_policy(LeRobotWorldVLAConfig(checkpoint=str(narrow), device="cpu"), ds_meta=meta)
    assert "reach beyond the ranges of embodiment 'toy' in y (" in caplog.text


@pytest.mark.parametrize(
    ("robot", "line"),
    [
        (replace(ROBOT, cameras=("front", "top")), "no picture for the checkpoint's camera 'top' among observation"),
        (
            replace(ROBOT, low=(-1.0,) * 3, high=(1.0,) * 3, action_names=()),
            "actions have 4 dimensions here, embodiment 'toy' has 3: --policy.embodiment=NEW_NAME trains a new robot",
        ),
    ],
)
def test_features_that_do_not_fit_are_found_before_weights_are_read(
    robot: Any, line: str, tmp_path: Path, meta: Any
) -> None:
    folder = write_checkpoint(tmp_path, robot)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=line):
        make_policy(LeRobotWorldVLAConfig(checkpoint=str(folder), device="cpu"), ds_meta=meta)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"checkpoint": None}, "no checkpoint: --policy.type=worldvla needs --policy.checkpoint=FOLDER_OR_REPO"),
        ({"kinds": ["act"]}, "kinds are action, world, video, not act"),
        ({"chunk_size": 0}, "chunk_size is a number >= 1, not 0"),
        ({"n_action_steps": 5}, "replan_interval is 1 to 4"),
        ({"embodiment": "arm"}, "unknown embodiment 'arm'; known: toy"),
        ({"normalization_mapping": {"ACTION": "MEAN_STD"}}, "normalization_mapping stays IDENTITY"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], line: str, checkpoint: Path) -> None:
    config = LeRobotWorldVLAConfig(**{"checkpoint": str(checkpoint), "device": "cpu", **options})
    with pytest.raises(ValueError, match=line):
        LeRobotWorldVLAPolicy(config)
