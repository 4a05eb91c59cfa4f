"""Does the model use what it is given: pictures, the instruction, pictures the right way up; does it survive saving.

A probe reads the model's distributions over the action bins of a chunk, teacher-forced with recorded actions: no
sampling, one forward for a variant of the input.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..action_tokenization_worldvla import Embodiment
from ..evaluation.metrics import psnr
from .recording import Moment
from .report import FAILED, OK, SKIPPED, WARNING, Finding

# total variation of the bins' distributions, mean over a chunk: 0 the same, 1 nothing in common
NOTHING, LITTLE = 1e-4, 0.02
SIGMAS = 3.0  # by which another orientation must be better, paired over the moments
LEAST_MOMENTS = 4  # to call a difference one
TOKENIZER_PSNR = (22.0, 12.0)  # dB of a frame encoded and decoded: warning, failed
PATCH = 32  # pixels
SETTINGS = ("embodiments", "default_embodiment", "prompts", "instruction_style", "num_actions", "history")
INSTRUCTIONS = ("pick up the red cup", "open the top drawer", "do nothing", "wave at the camera")
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as recorded": lambda picture: picture,
    "turned by 90 degrees": lambda picture: np.rot90(picture, 1),
    "turned by 180 degrees": lambda picture: np.rot90(picture, 2),
    "turned by 270 degrees": lambda picture: np.rot90(picture, 3),
    "mirrored left to right": lambda picture: picture[:, ::-1],
    "upside down (mirrored)": lambda picture: picture[::-1],
}


def bin_logprobs(
    model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities over the legal bins, and those of the recorded ones, at every action value of some chunks.

    Returns:
        (B, K * D, 256) and (B, K * D), float64.
    """
    batch = processor(
        images=[list(moment.images) for moment in moments],
        instruction=[moment.instruction for moment in moments],
        target_actions=[moment.actions for moment in moments],
        embodiment=robot.name,
    ).to(model.device)
    batch = model.discretize(**batch)
    labels = batch.pop("labels")
    batch.pop("loss_weights", None)
    bins = torch.tensor(processor.tokens.action_bins, device=labels.device)
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]  # (B, length - 1, vocabulary)
    answers = labels[:, 1:]
    rows = torch.isin(answers, bins)  # the same number in every row: all chunks have K * D values
    scores = logits[rows.to(logits.device)][:, bins].double().log_softmax(-1)
    chosen = (answers[rows][:, None] == bins).long().argmax(-1, keepdim=True)
    recorded = scores.gather(-1, chosen.to(scores.device))
    count = len(moments)
    return scores.view(count, -1, len(bins)).cpu().numpy(), recorded.view(count, -1).cpu().numpy()


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance (0 to 1) of distributions given as log-probabilities (..., bins)."""
    return float(0.5 * np.abs(np.exp(a) - np.exp(b)).sum(-1).mean())


# -------------------------------------------------------------------- pictures and words


def check_picture_sensitivity(model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment]) -> Finding:
    """A black, a white and a shuffled picture must change what the model answers (openvla#346: it silently did not)."""
    rng = np.random.default_rng(0)
    variants: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "black": np.zeros_like,
        "white": lambda picture: np.full_like(picture, 255),
        "shuffled": lambda picture: shuffle_patches(picture, rng),
    }
    usual, _ = bin_logprobs(model, processor, robot, moments)
    changes = {}
    for name, change in variants.items():
        changed = [moment.with_images([change(image) for image in moment.images]) for moment in moments]
        changes[name] = total_variation(usual, bin_logprobs(model, processor, robot, changed)[0])
    found = "answers change by " + ", ".join(f"{value:.3g} for a {name} picture" for name, value in changes.items())
    numbers = {"total_variation": changes}
    if min(changes.values()) < NOTHING:
        advice = "the model does not see its pictures: check versions and the image tokenizer's weights, do not deploy"
        return Finding("picture sensitivity", FAILED, found, advice, numbers)
    if max(changes.values()) < LITTLE:
        advice = "the model hardly looks at its pictures: train longer, or check that frames belong to their actions"
        return Finding("picture sensitivity", WARNING, found, advice, numbers)
    return Finding("picture sensitivity", OK, found, numbers=numbers)


def check_language_sensitivity(
    model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment], instructions: Sequence[str] = ()
) -> Finding:
    """Another instruction must change the distribution of the answers.

    `instructions` are others of the dataset; without any, some that suit most tables.
    """
    known = {moment.instruction for moment in moments}
    others = [text for text in dict.fromkeys(instructions) if text not in known or len(known) > 1]
    others = (others or [text for text in INSTRUCTIONS if text not in known])[: len(INSTRUCTIONS)]
    usual, _ = bin_logprobs(model, processor, robot, moments)
    changes = {}
    for text in others:
        rows = [row for row, moment in enumerate(moments) if moment.instruction != text]
        told = [replace(moments[row], instruction=text) for row in rows]
        changes[text] = total_variation(usual[rows], bin_logprobs(model, processor, robot, told)[0])
    strongest = max(changes, key=lambda text: changes[text])
    found = f'answers change by {changes[strongest]:.3g} for "{strongest}" (the most of {len(changes)} instructions)'
    numbers = {"total_variation": changes}
    if changes[strongest] < NOTHING:
        advice = "the model does not read its instruction: check the tokenizer and the prompts, do not deploy"
        return Finding("language sensitivity", FAILED, found, advice, numbers)
    if changes[strongest] < LITTLE:
        advice = "the model hardly reads its instruction: train on several tasks in the same scene"
        return Finding("language sensitivity", WARNING, found, advice, numbers)
    return Finding("language sensitivity", OK, found, numbers=numbers)


def shuffle_patches(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture's patches of up to 32 x 32 pixels in random order, what is left over at the edges where it was."""
    side = max(1, min(PATCH, *(length // 2 for length in picture.shape[:2])))
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    inner = picture[: rows * side, : columns * side]
    patches = inner.reshape(rows, side, columns, side, -1).swapaxes(1, 2).reshape(rows * columns, side, side, -1)
    mixed = patches[rng.permutation(len(patches))].reshape(rows, columns, side, side, -1).swapaxes(1, 2)
    result = picture.copy()
    result[: rows * side, : columns * side] = mixed.reshape(inner.shape)
    return result


# -------------------------------------------------------------------- orientation


def check_orientation(model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment]) -> Finding:
    """The recorded actions must be likeliest under the pictures as they are, not under turned or mirrored ones.

    A turned camera is the commonest reason for a success rate of 0. The difference is paired over the moments; another
    orientation must be better by three standard errors of its mean.
    """
    if len(moments) < LEAST_MOMENTS:
        return Finding("orientation", SKIPPED, f"{len(moments)} moments are too few to compare orientations")
    losses = {}
    for name, turn in TURNS.items():
        turned = [
            moment.with_images([np.ascontiguousarray(turn(image)) for image in moment.images]) for moment in moments
        ]
        losses[name] = -bin_logprobs(model, processor, robot, turned)[1].mean(1)  # (moments,)
    usual, *others = losses
    gains = {name: losses[usual] - losses[name] for name in others}
    scores = {name: float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain)) + 1e-9)) for name, gain in gains.items()}
    best = max(others, key=lambda name: float(gains[name].mean()))
    numbers = {"loss": {name: float(values.mean()) for name, values in losses.items()}, "sigmas": scores}
    found = (
        f"recorded actions cost {losses[usual].mean():.2f} nats a value as recorded, {losses[best].mean():.2f} {best} "
        f"(best of the others), over {len(moments)} moments"
    )
    if gains[best].mean() > 0 and scores[best] > SIGMAS:
        advice = f"the pictures are not as the model was trained: they must be {best} first, once, by their owner"
        return Finding("orientation", FAILED, found, advice, numbers)
    if gains[best].mean() > 0:
        advice = "look at the picture that doctor writes; more --moments tell more"
        return Finding("orientation", WARNING, found, advice, numbers)
    return Finding("orientation", OK, found, numbers=numbers)


# -------------------------------------------------------------------- image tokenizer


def check_image_tokenizer(
    model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment]
) -> tuple[Finding, list[np.ndarray]]:
    """How well frames survive being encoded and decoded; also the decoded picture of each moment's first camera now."""
    pictures = [moment.images[-robot.num_cameras] for moment in moments]
    pixels = [processor.image_processor.pixels(picture) for picture in pictures]
    seen, decoded = [], []
    for values in pixels:  # sizes may differ
        codes = model.tokenize_images(torch.from_numpy(values[None]).to(model.device))
        decoded.append(np.asarray(processor.image_processor.postprocess(model.detokenize_images(codes))[0]))
        seen.append(np.rint((np.moveaxis(values, 0, -1) + 1.0) * 127.5).astype(np.uint8))
    quality = float(np.mean([psnr(a[None], b[None]).mean() for a, b in zip(decoded, seen, strict=True)]))
    found = f"frames survive encoding and decoding with {quality:.1f} dB PSNR"
    numbers = {"psnr": quality}
    if quality >= TOKENIZER_PSNR[0]:
        return Finding("image tokenizer", OK, found, numbers=numbers), decoded
    verdict = WARNING if quality >= TOKENIZER_PSNR[1] else FAILED
    advice = "the image tokenizer has not seen such pictures, or its weights are others: look at the picture written"
    return Finding("image tokenizer", verdict, found, advice, numbers), decoded


# -------------------------------------------------------------------- round trip


def check_round_trip(model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment]) -> Finding:
    """Saved and loaded again, the checkpoint must give the same inputs and bit for bit the same logits."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return Finding("round trip", SKIPPED, "an adapter over its base; `worldvla train --merge` checks its merge")
    if getattr(model, "hf_quantizer", None) is not None:
        return Finding("round trip", SKIPPED, "quantised weights are not saved again")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory(prefix="worldvla-doctor-") as folder:
        if shutil.disk_usage(folder).free < 1.2 * size:
            return Finding("round trip", SKIPPED, f"{folder} has no room for {size / 1e9:.1f} GB: set TMPDIR")
        return _compare_saved(model, processor, robot, moments[:1], Path(folder))


def _compare_saved(model: Any, processor: Any, robot: Embodiment, moments: Sequence[Moment], folder: Path) -> Finding:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again, processor_again = (
        type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True).to(model.device).eval(),
        type(processor).from_pretrained(folder, local_files_only=True),
    )
    advice = "the folder and what is loaded from it are two things: report it with the output of --json"
    request = {
        "images": [list(moment.images) for moment in moments],
        "instruction": [moment.instruction for moment in moments],
        "embodiment": robot.name,
    }
    before, after = processor(**request), processor_again(**request)
    differing = [
        name for name in before if not torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name]))
    ]
    differing += [name for name in SETTINGS if getattr(processor, name) != getattr(processor_again, name)]
    if differing:
        found = f"the processor gives other {', '.join(differing)} after saving and loading"
        return Finding("round trip", FAILED, found, advice)
    with torch.no_grad():
        logits = [each(**before.to(model.device)).logits for each in (model, again)]
    difference = float((logits[0] - logits[1]).abs().max())
    numbers = {"largest_difference": difference}
    if difference != 0.0:
        found = f"logits differ by up to {difference:.3g} after saving and loading"
        return Finding("round trip", FAILED, found, advice, numbers)
    return Finding(
        "round trip", OK, "saved and loaded again: the same inputs, bit for bit the same logits", "", numbers
    )
