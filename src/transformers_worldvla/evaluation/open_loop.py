"""Open loop: what a model predicts at the steps of a recorded episode, beside what was recorded there.

The model never acts here. At every start it sees recorded frames; predicted are the action chunk that follows, the next
frame after the recorded action, and whole rollouts along recorded actions. An episode first becomes a `Recording`, the
way the model sees it; `predict_*` and `roll_out` run the model, `compare_*` measure one episode and return plain dicts
with one number a sample, `summarize_*` pool these over episodes. `evaluate_open_loop` does all of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.episodes import Episode
from .metrics import action_l1, constant_dimensions, mean_action_chunks, psnr, repeat_last_action

BATCH_SIZE = 16


@dataclass(frozen=True)
class Recording:
    """An episode of T steps and C cameras as the model sees it; row t is what was seen when action t was chosen."""

    index: int
    instruction: str
    embodiment: str
    cameras: tuple[str, ...]
    actions: np.ndarray  # (T, D) float32, robot units
    codes: np.ndarray  # (T, C, h, w) token ids of the frames
    pictures: np.ndarray  # (T, C, H, W, 3) uint8, cropped and scaled for the model
    reconstructed: np.ndarray  # the same pictures after the image tokenizer: the best that any imagined frame can be

    def __len__(self) -> int:
        return len(self.actions)


def read_recording(
    model: Any,
    processor: Any,
    episode: Episode,
    embodiment: str | None = None,
    cameras: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Recording:
    """Read, crop and tokenize an episode once.

    Args:
        cameras: those of the embodiment by default, in its order.

    Raises:
        ValueError: the episode's actions have another dimension than the embodiment's, or a camera is missing.
    """
    robot = processor.get_embodiment(embodiment)
    names = tuple(cameras or robot.cameras)
    if len(names) != robot.num_cameras:
        raise ValueError(f"embodiment {robot.name!r} sees {robot.num_cameras} cameras, not {len(names)}")
    actions = episode.actions
    if actions.shape[1] != robot.action_dim:
        raise ValueError(f"the episode's actions have D={actions.shape[1]}, not those of {robot.describe()}")
    views = [_read_camera(model, processor, episode, name, batch_size) for name in names]
    codes, pictures, reconstructed = (np.stack(parts, axis=1) for parts in zip(*views, strict=True))
    return Recording(episode.index, episode.instruction, robot.name, names, actions, codes, pictures, reconstructed)


def _read_camera(
    model: Any, processor: Any, episode: Episode, camera: str, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (T, h, w), pictures and reconstructed pictures (T, H, W, 3) of one camera."""
    codes, pictures, reconstructed = [], [], []
    for start in range(0, len(episode), batch_size):
        frames = episode.frames(camera, start, min(start + batch_size, len(episode)))
        pixels = np.stack([processor.image_processor.pixels(frame) for frame in frames])  # (n, 3, H, W) in [-1, 1]
        ids = model.tokenize_images(torch.from_numpy(pixels))
        decoded = processor.image_processor.postprocess(model.detokenize_images(ids))
        codes.append(ids.cpu().numpy())
        pictures.append(_to_uint8(pixels))
        reconstructed.append(np.stack([np.asarray(picture) for picture in decoded]))
    return np.concatenate(codes), np.concatenate(pictures), np.concatenate(reconstructed)


def crop_for_model(processor: Any, picture: Any) -> np.ndarray:
    """A picture as the image processor crops and scales it: (H, W, 3) uint8."""
    return _to_uint8(processor.image_processor.pixels(picture))


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels (..., 3, H, W) of a picture in [-1, 1] -> the bytes (..., H, W, 3) they came from."""
    return np.rint((np.moveaxis(pixels, -3, -1) + 1.0) * 127.5).astype(np.uint8)


# -------------------------------------------------------------------- which steps


def chunk_starts(length: int, num_actions: int, stride: int = 1) -> list[int]:
    """Steps at which a whole chunk can be compared: from 1, so that a last action exists, to `length` - `num_actions`.

    Raises ValueError when there is none.
    """
    starts = list(range(1, length - num_actions + 1, stride))
    if not starts:
        raise ValueError(f"an episode of {length} steps is too short for chunks of {num_actions} actions")
    return starts


def rollout_starts(length: int, horizon: int, stride: int | None = None) -> list[int]:
    """Steps from which `horizon` recorded frames follow; end to end unless a stride is given.

    Raises ValueError when there is none.
    """
    starts = list(range(0, length - horizon, stride or horizon))
    if not starts:
        raise ValueError(f"an episode of {length} steps is too short for rollouts of {horizon} steps")
    return starts


# -------------------------------------------------------------------- running the model


def predict_chunks(
    model: Any,
    processor: Any,
    recording: Recording,
    starts: Sequence[int],
    num_actions: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> np.ndarray:
    """The action chunks (S, K, D) that the model predicts at some steps, in robot units, decoded greedily.

    It sees the frames of the `processor.history` control steps up to a start; fewer at the episode's start. K is the
    checkpoint's chunk length by default.
    """
    chunks = []
    for batch in _batches(starts, batch_size, "action chunks", progress):
        inputs = processor(
            image_tokens=[list(_history(recording, start, processor.history)) for start in batch],
            instruction=[recording.instruction] * len(batch),
            embodiment=recording.embodiment,
        )
        tokens = model.generate_actions(
            **inputs, num_actions=num_actions or processor.num_actions, action_dim=recording.actions.shape[1]
        )
        chunks.append(processor.decode_actions(tokens, recording.embodiment))
    return np.concatenate(chunks)


def predict_next_frames(
    model: Any,
    processor: Any,
    recording: Recording,
    steps: Sequence[int],
    num_history: int = 1,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    **generate_kwargs: Any,
) -> np.ndarray:
    """Frames of step t + 1 (S, C, H, W, 3) imagined from the recorded frame and action of each step t."""
    frames = []
    for batch in _batches(steps, batch_size, "next frames", progress):
        inputs = processor(
            image_tokens=[list(_history(recording, step, num_history)) for step in batch],
            actions=[recording.actions[max(0, step + 1 - num_history) : step + 1] for step in batch],
            embodiment=recording.embodiment,
        )
        ids = model.generate_frames(**inputs, **generate_kwargs)
        frames += [np.stack([np.asarray(picture) for picture in row]) for row in processor.decode_frames(ids, model)]
    return np.stack(frames)


def roll_out(
    model: Any,
    processor: Any,
    recording: Recording,
    starts: Sequence[int],
    horizon: int,
    num_history: int = 1,
    feedback: str = "tokens",
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    **generate_kwargs: Any,
) -> np.ndarray:
    """Rollouts (S, horizon, C, H, W, 3): from the recorded frame of each start, along the recorded actions.

    The frame after h steps stands beside the recorded frame of step start + h.
    """
    rollouts = []
    with tqdm(total=len(starts) * horizon, desc="rollout frames", disable=not progress) as bar:
        for position in range(0, len(starts), batch_size):
            batch = starts[position : position + batch_size]
            plans = model.imagine(
                StepCounter(processor, bar),
                image=[list(recording.pictures[start]) for start in batch],
                actions=np.stack([recording.actions[start : start + horizon] for start in batch]),
                feedback=feedback,
                num_history=num_history,
                embodiment=recording.embodiment,
                **generate_kwargs,
            )
            steps = [step if isinstance(step, list) else [step] for plan in plans for step in plan]
            pictures = np.stack([np.asarray(picture) for step in steps for picture in step])
            rollouts.append(pictures.reshape(len(batch), horizon, *recording.pictures.shape[1:]))
    return np.concatenate(rollouts)


class StepCounter:
    """A processor that also advances a progress bar, by one for every imagined time step of every plan."""

    def __init__(self, processor: Any, bar: Any):
        self._processor, self._bar = processor, bar

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._processor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def decode_frames(self, ids: Any, model: Any) -> list[list[Image.Image]]:
        frames = self._processor.decode_frames(ids, model)
        self._bar.update(len(frames))
        return frames


def _history(recording: Recording, step: int, length: int) -> np.ndarray:
    """Codes of the pictures of up to `length` steps that end at `step`, time-major: (n, h, w)."""
    codes = recording.codes[max(0, step + 1 - length) : step + 1]
    return codes.reshape(-1, *codes.shape[2:])


def _batches(items: Sequence[int], size: int, label: str, progress: bool) -> Iterator[Sequence[int]]:
    """Slices of `items` under a progress bar that counts items."""
    with tqdm(total=len(items), desc=label, disable=not progress) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            bar.update(len(batch))


# -------------------------------------------------------------------- measuring one episode


def compare_actions(recording: Recording, starts: Sequence[int], predicted: np.ndarray) -> dict[str, Any]:
    """Predicted chunks (S, K, D) beside the recorded ones: `starts`, `predicted`, `recorded` and `last`, the action
    (S, D) taken just before each chunk."""
    num_actions = predicted.shape[1]
    return {
        "starts": list(starts),
        "predicted": predicted,
        "recorded": np.stack([recording.actions[start : start + num_actions] for start in starts]).astype(np.float64),
        "last": recording.actions[np.asarray(starts) - 1].astype(np.float64),
    }


def compare_next_frames(recording: Recording, steps: Sequence[int], imagined: np.ndarray) -> dict[str, Any]:
    """PSNR in dB of each imagined frame (S, C, H, W, 3), mean of its cameras, and of the two baselines.

    `reconstruction_ceiling` is the recorded frame itself after the image tokenizer, `copy_last_frame` the recorded
    frame of step t in place of that of step t + 1.
    """
    now = np.asarray(steps)
    target = recording.pictures[now + 1]
    candidates = {
        "model": imagined,
        "reconstruction_ceiling": recording.reconstructed[now + 1],
        "copy_last_frame": recording.pictures[now],
    }
    return {"steps": list(steps), "psnr": {name: psnr(value, target).mean(-1) for name, value in candidates.items()}}


def compare_rollouts(recording: Recording, starts: Sequence[int], imagined: np.ndarray) -> dict[str, Any]:
    """PSNR in dB of rollouts (S, horizon, C, H, W, 3) and of the baselines of `compare_next_frames`: (S, horizon).

    Here `copy_last_frame` is the last frame that was really seen, the one the rollout starts from.
    """
    target, candidates = rollout_candidates(recording, starts, imagined)
    return {"starts": list(starts), "psnr": {name: psnr(value, target).mean(-1) for name, value in candidates.items()}}


def rollout_candidates(
    recording: Recording, starts: Sequence[int], imagined: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The recorded frames (S, horizon, C, H, W, 3) that rollouts stand beside, and the rollouts and their baselines."""
    horizon = imagined.shape[1]
    first = np.asarray(starts)[:, None]
    later = first + np.arange(1, horizon + 1)
    target = recording.pictures[later]
    return target, {
        "model": imagined,
        "reconstruction_ceiling": recording.reconstructed[later],
        "copy_last_frame": np.broadcast_to(recording.pictures[first], target.shape),
    }


# -------------------------------------------------------------------- pooling episodes


def summarize_actions(comparisons: Sequence[dict[str, Any]], action_mean: np.ndarray) -> dict[str, Any]:
    """Action L1 of the model and its baselines over the chunks of one or more episodes.

    `l1` has `model`, `mean_action` and `repeat_last_action`, each as `action_l1` returns it. The second predicts
    `action_mean` (D,) always, the third goes on with the action before the chunk, which the model is not shown.
    """
    predicted, recorded, last = (
        np.concatenate([comparison[key] for comparison in comparisons]) for key in ("predicted", "recorded", "last")
    )
    candidates = {
        "model": predicted,
        "mean_action": mean_action_chunks(action_mean, recorded),
        "repeat_last_action": repeat_last_action(last, recorded.shape[1]),
    }
    return {
        "chunks": len(recorded),
        "num_actions": recorded.shape[1],
        "constant_dimensions": constant_dimensions(recorded),
        "l1": {name: action_l1(chunks, recorded) for name, chunks in candidates.items()},
    }


def summarize_psnr(comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean PSNR in dB over the frames of one or more episodes; for rollouts one number a step."""
    names = comparisons[0]["psnr"]
    pooled = {name: np.concatenate([comparison["psnr"][name] for comparison in comparisons]) for name in names}
    return {
        "samples": len(pooled["model"]),
        "psnr": {name: values.mean(axis=0).tolist() for name, values in pooled.items()},
    }


def evaluate_open_loop(
    model: Any,
    processor: Any,
    episodes: Sequence[Episode],
    action_mean: np.ndarray,
    *,
    embodiment: str | None = None,
    cameras: Sequence[str] | None = None,
    num_actions: int | None = None,
    stride: int = 1,
    horizon: int = 10,
    num_history: int = 1,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare predictions with recorded episodes: `{"episodes": n, "actions": ..., "next_frame": ..., "rollout": ...}`.

    Args:
        action_mean: (D,), mean action of the training set.
        stride: compare every so many-th chunk and next frame. Rollouts lie end to end.
        horizon: steps of a rollout.
        num_history: (frame, action) pairs that the world model is shown.

    Raises:
        ValueError: an episode is too short, or does not fit the checkpoint.
    """
    chunk_length = num_actions or processor.num_actions
    actions, frames, rollouts = [], [], []
    for episode in episodes:
        recording = read_recording(model, processor, episode, embodiment, cameras, batch_size)
        starts = chunk_starts(len(recording), chunk_length, stride)
        chunks = predict_chunks(model, processor, recording, starts, chunk_length, batch_size, progress)
        actions.append(compare_actions(recording, starts, chunks))
        steps = list(range(0, len(recording) - 1, stride))
        imagined = predict_next_frames(model, processor, recording, steps, num_history, batch_size, progress)
        frames.append(compare_next_frames(recording, steps, imagined))
        starts = rollout_starts(len(recording), horizon)
        imagined = roll_out(
            model, processor, recording, starts, horizon, num_history, batch_size=batch_size, progress=progress
        )
        rollouts.append(compare_rollouts(recording, starts, imagined))
    return {
        "episodes": len(actions),
        "actions": summarize_actions(actions, action_mean),
        "next_frame": summarize_psnr(frames),
        "rollout": {"horizon": horizon, **summarize_psnr(rollouts)},
    }
