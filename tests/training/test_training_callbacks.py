"""Pictures and rollouts where the Trainer reports to: real logs of TensorBoard, wandb and trackio, read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_samples import SIDE, random_samples

from transformers_worldvla import WorldVLATrainer
from transformers_worldvla.training import RolloutCallback, SamplePicturesCallback

PIXELS = 16 * SIDE


def test_logs_scalars_pictures_and_rollouts_to_tensorboard(
    processor: Any, make_trainer: Callable[..., WorldVLATrainer], tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    samples = random_samples(processor)
    worlds = [samples[item] for item in samples.items_of("world")[:2]]
    seen: list[Any] = []

    def rollout(model: Any, processor: Any) -> dict[str, float]:
        seen.append(model.training)
        return {"success": 0.25}

    trainer = make_trainer(
        processor,
        samples,
        eval_dataset={"val_ind": worlds, "val_ood": worlds[:1]},
        callbacks=[
            SamplePicturesCallback(processor, worlds, tmp_path / "pictures"),
            RolloutCallback(processor, rollout),
        ],
        max_steps=1,
        report_to=["tensorboard"],
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert seen == [False], "once an evaluation, whatever the number of sets, and in evaluation mode"

    log = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    events = accumulator.EventAccumulator(str(log.parent))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/world_loss", "train/image_accuracy"} <= scalars
    assert {"eval/val_ind_loss", "eval/val_ood_image_accuracy"} <= scalars
    assert events.Scalars("train/rollout/success")[0].value == 0.25
    image = events.Images("samples/current_imagined_true")[0]
    assert (image.height, image.width, image.step) == (2 * PIXELS, 3 * PIXELS, 1)

    file = np.asarray(Image.open(tmp_path / "pictures" / "step-1.png"))
    model = trainer.base_model
    for row, sample in enumerate(worlds):
        for column, codes in ((0, sample["image_tokens"][-1]), (2, sample["target_image_tokens"][0])):
            block = processor.tokens.image_block(codes)
            wanted = processor.decode_frames([[block]], model)[0][0]
            found = file[row * PIXELS : (row + 1) * PIXELS, column * PIXELS : (column + 1) * PIXELS]
            # a convolution rounds otherwise in another batch
            np.testing.assert_allclose(found.astype(int), np.asarray(wanted).astype(int), atol=1)


@pytest.fixture
def train_a_step(
    processor: Any, make_trainer: Callable[..., WorldVLATrainer], tmp_path: Path
) -> Callable[[str], np.ndarray]:
    """Trains a step that reports to one place, and gives the picture that it drew, (H, W, 3) uint8."""

    def run(report_to: str) -> np.ndarray:
        samples = random_samples(processor)
        worlds = [samples[item] for item in samples.items_of("world")[:2]]
        pictures = SamplePicturesCallback(processor, worlds, tmp_path / "pictures")
        options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "report_to": [report_to]}
        make_trainer(processor, samples, eval_dataset=worlds, callbacks=[pictures], **options).train()
        return np.asarray(Image.open(tmp_path / "pictures" / "step-1.png"))

    return run


def test_logs_pictures_to_wandb(
    train_a_step: Callable[[str], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    picture = train_a_step("wandb")
    wandb.finish()
    file = next((tmp_path / "wandb").rglob("files/media/images/samples/*.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(file)), picture)


def test_logs_pictures_to_trackio(
    train_a_step: Callable[[str], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    picture = train_a_step("trackio")
    file = next((tmp_path / "trackio").rglob("*.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), picture)
