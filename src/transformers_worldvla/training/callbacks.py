"""Pictures and rollouts during training, sent where the Trainer reports to (`report_to`).

Each reporter is used through its own public interface, and imported by its integration only when it is asked for. The
pictures are also written as PNG files beside the checkpoints, which needs no reporter at all.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .adapters import base_model

Rollout = Callable[[Any, Any], Mapping[str, float]]  # model, processor -> numbers to log


class ReportingCallback(TrainerCallback):
    """Does something with the model at every evaluation, on the first rank, and reports it.

    `WorldVLATrainer` tells it who it is: `trainer`. Where ranks hold a part of the model each, it cannot be used.
    """

    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise ValueError where no rank has the whole model."""
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ValueError("sample pictures and rollouts need a whole model: leave them out under FSDP and DeepSpeed")

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Once a step, however many evaluation sets there are."""
        if not state.is_world_process_zero or state.global_step == getattr(self, "_last", None):
            return
        self._last = state.global_step
        was_training, mode_cache = model.training, model.config.use_cache
        model.eval()
        try:
            with torch.no_grad():
                self.report(args, state, model)
        finally:
            model.config.use_cache = mode_cache
            model.train(was_training)

    def report(self, args: Any, state: Any, model: Any) -> None:
        raise NotImplementedError


class SamplePicturesCallback(ReportingCallback):
    """Imagined frames beside the true ones: a row a sample with current, imagined and true next frame.

    Args:
        processor: decodes frames.
        samples: world-model samples of a `SampleDataset` (one camera is shown, the first).
        folder: where `step-N.png` is written.
    """

    def __init__(self, processor: Any, samples: Sequence[dict[str, Any]], folder: str | Path):
        self.processor, self.samples, self.folder = processor, list(samples), Path(folder)

    def report(self, args: Any, state: Any, model: Any) -> None:
        picture = self.draw(base_model(model))
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"step-{state.global_step}.png")
        log_picture(self.trainer, args, "samples/current_imagined_true", np.asarray(picture), state.global_step)

    def draw(self, model: Any) -> Image.Image:
        """The picture: (samples * height, 3 * width)."""
        rows = []
        for sample in self.samples:
            inputs = self.processor(
                image_tokens=sample["image_tokens"], actions=sample["actions"], embodiment=sample["embodiment"]
            )
            cameras = self.processor.get_embodiment(sample["embodiment"]).num_cameras
            ids = model.generate_frames(**inputs.to(model.device), num_frames=1)  # (1, cameras, block)
            current = torch.from_numpy(np.asarray(sample["image_tokens"][-cameras]))
            true = torch.from_numpy(np.asarray(sample["target_image_tokens"][0]))
            imagined = self.processor.decode_frames(ids[:, :1], model)[0][0]
            pixels = model.detokenize_images(torch.stack([current, true]).long().to(model.device))
            before, after = self.processor.image_processor.postprocess(pixels)
            rows.append(np.concatenate([np.asarray(each) for each in (before, imagined, after)], axis=1))
        return Image.fromarray(np.concatenate(rows))


class RolloutCallback(ReportingCallback):
    """Closed-loop rollouts at every evaluation.

    Args:
        rollout: called with the model and the processor; returns numbers such as `{"success": 0.4}`, which are logged
            as `rollout/success`. What it drives, a simulator or a dream, is its own business.
    """

    def __init__(self, processor: Any, rollout: Rollout):
        self.processor, self.rollout = processor, rollout

    def report(self, args: Any, state: Any, model: Any) -> None:
        numbers = self.rollout(base_model(model), self.processor)
        self.trainer.log({f"rollout/{name}": float(value) for name, value in numbers.items()})


def log_picture(trainer: Any, args: Any, name: str, picture: np.ndarray, step: int) -> None:
    """Send a picture (H, W, 3) uint8 to every reporter of the run that takes pictures."""
    if "tensorboard" in args.report_to:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(name, picture, step, dataformats="HWC")
                callback.tb_writer.flush()
    if "wandb" in args.report_to:
        import wandb

        wandb.log({name: wandb.Image(picture), "train/global_step": step})
    if "trackio" in args.report_to:
        import trackio

        trackio.log({name: trackio.Image(picture), "train/global_step": step})
