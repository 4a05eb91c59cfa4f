"""What a caller hands to the processor, sorted: one `Request` a sample, in which every argument has one form.

Here is decided what is one sample and what is a batch, what kind of sample each is, and whether its pictures and
actions fit together. No picture is opened, no action encoded and no text tokenized here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .prompts_worldvla import INSTRUCTION, KINDS
from .tokens_worldvla import WorldVLATokens


@dataclass(frozen=True)
class ImageTokens:
    """A picture that is tokenized already: ids of its codes, (h, w)."""

    codes: np.ndarray


@dataclass(frozen=True)
class Request:
    """One sample as it was asked for. Pictures, oldest first, are what `to_pil` accepts or `ImageTokens`."""

    images: list[Any]
    instruction: str | None
    actions: Any
    target_actions: Any
    target_images: list[Any] | None
    embodiment: str | None
    prompt: str | None
    weight: float


@contextmanager
def naming_sample(index: int, is_batch: bool) -> Iterator[None]:
    """Say in which sample of a batch an error lies."""
    try:
        yield
    except ValueError as error:
        if not is_batch:
            raise
        raise ValueError(f"sample {index}: {error}") from None


# -------------------------------------------------------------------- one sample or a batch


def split_requests(
    tokens: WorldVLATokens,
    images: Any,
    image_tokens: Any,
    instruction: Any,
    actions: Any,
    target_actions: Any,
    target_images: Any,
    target_image_tokens: Any,
    embodiment: Any,
    prompt: Any,
    sample_weights: Any,
) -> tuple[list[Request], bool]:
    """Split the arguments of a call by sample; the second value says whether the call was a batch.

    A picture or a flat list of pictures is one sample, a list that holds a list (or None) is a batch; `image_tokens`
    decides where there are no pictures. In a batch every other argument is a list of the same length with None where a
    sample has none; one `prompt`, `embodiment` or weight may serve all samples.
    """
    image_tree, token_tree = _picture_tree(images), _token_tree(image_tokens, tokens.image_start)
    batches = [tree for tree in (image_tree, token_tree) if _is_batch(tree)]
    size = len(batches[0]) if batches else 1
    is_batch = bool(batches)
    columns = {
        "images": image_tree,
        "image_tokens": token_tree,
        "instruction": instruction,
        "actions": actions,
        "target_actions": target_actions,
        "target_images": _picture_tree(target_images),
        "target_image_tokens": _token_tree(target_image_tokens, tokens.image_start),
    }
    shared = {"embodiment": embodiment, "prompt": prompt, "sample_weights": sample_weights}
    if is_batch:
        rows = {name: _entries(name, value, size) for name, value in columns.items()}
    else:
        rows = {name: [value] for name, value in columns.items()}
    for name, value in shared.items():
        rows[name] = [value] * size if _length(value) is None else _entries(name, value, size)
    requests = []
    for index in range(size):
        with naming_sample(index, is_batch):
            requests.append(_request(tokens, **{name: values[index] for name, values in rows.items()}))
    return requests, is_batch


def _request(tokens: WorldVLATokens, **row: Any) -> Request:
    images = _either("images", row["images"], row["image_tokens"], tokens)
    if images is None:
        raise ValueError("no picture: give images (or image_tokens), at least one")
    for name in ("instruction", "embodiment", "prompt"):
        if row[name] is not None and not isinstance(row[name], str):
            raise ValueError(
                f"{name} of one sample is a string, not {type(row[name]).__name__} (a batch has images [[...], [...]])"
            )
    return Request(
        images=images,
        instruction=row["instruction"],
        actions=row["actions"],
        target_actions=row["target_actions"],
        target_images=_either("target_images", row["target_images"], row["target_image_tokens"], tokens),
        embodiment=row["embodiment"],
        prompt=row["prompt"],
        weight=_weight(row["sample_weights"]),
    )


def _weight(value: Any) -> float:
    weight = 1.0 if value is None else float(value)
    if not (np.isfinite(weight) and weight >= 0):
        raise ValueError(f"a sample weight is a number >= 0, not {weight}")
    return weight


def _entries(name: str, value: Any, size: int) -> list[Any]:
    """The entry of each sample; a missing argument has None everywhere."""
    if value is None:
        return [None] * size
    length = _length(value)
    if length != size:
        found = f"a {type(value).__name__}" if length is None else f"{length} entries"
        raise ValueError(
            f"{name} is a list with one entry for each of the {size} samples (None where it has none), not {found}"
        )
    return list(value)


def _length(value: Any) -> int | None:
    """Entries of a list or array, None for anything that is one value."""
    is_array = isinstance(value, np.ndarray | torch.Tensor) and value.ndim > 0
    return len(value) if is_array or isinstance(value, list | tuple) else None


# -------------------------------------------------------------------- nested pictures


def _picture_tree(value: Any) -> Any:
    """Nested lists of pictures; arrays of more than one picture become lists."""
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim in (4, 5)):
        return [_picture_tree(entry) for entry in value]
    return value


def _token_tree(value: Any, image_start: int) -> Any:
    """Nested lists of image tokens; a leaf is an array, (h, w) codes or a flat block that begins with `image_start`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, list | tuple):
        array = None if _is_nested(value) else _int_array(value)
        if array is None:
            return [_token_tree(entry, image_start) for entry in value]
        value = array
    if not isinstance(value, np.ndarray):
        return value
    is_block = value.ndim > 0 and value.size > 0 and bool((value[..., 0] == image_start).all())
    return [_token_tree(entry, image_start) for entry in value] if value.ndim > (1 if is_block else 2) else value


def _is_nested(values: Any) -> bool:
    """Whether a list holds whole arrays, or None where a sample has none: then it is no array of numbers."""
    first = values[0] if values else 0
    if isinstance(first, list | tuple):
        return _is_nested(first)
    return first is None or (isinstance(first, np.ndarray) and first.ndim > 1)


def _int_array(values: Any) -> np.ndarray | None:
    """A nested list of integers as an array, or None when it is ragged or holds anything else."""
    if any(isinstance(value, torch.Tensor) for value in values):
        return None
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # ragged, or tensors further down
        return None
    return array if array.dtype.kind in "iu" else None


def _is_batch(tree: Any) -> bool:
    return isinstance(tree, list) and any(entry is None or isinstance(entry, list) for entry in tree)


def _either(name: str, pictures: Any, image_tokens: Any, tokens: WorldVLATokens) -> list[Any] | None:
    """The pictures of one sample, from whichever of the two arguments has them."""
    if pictures is not None and image_tokens is not None:
        raise ValueError(f"{name} are given as pictures and as tokens: give one of the two")
    if image_tokens is not None:
        argument = {"images": "image_tokens", "target_images": "target_image_tokens"}[name]
        return [image_codes(entry, tokens) for entry in _flat(argument, image_tokens)]
    return None if pictures is None else _flat(name, pictures)


def _flat(name: str, tree: Any) -> list[Any]:
    entries = tree if isinstance(tree, list) else [tree]
    if not entries:
        raise ValueError(f"{name} is empty: give at least one picture, or None")
    if any(entry is None or isinstance(entry, list) for entry in entries):
        raise ValueError(f"{name} of one sample is a flat list of pictures, without lists or None in it")
    return entries


def image_codes(entry: Any, tokens: WorldVLATokens) -> ImageTokens:
    """(h, w) token ids of codes, or a flat image block, as `ImageTokens`. Raises ValueError on anything else."""
    if not isinstance(entry, np.ndarray) or entry.dtype.kind not in "iu" or entry.ndim not in (1, 2) or entry.size == 0:
        found = (
            f"shape {entry.shape} of {entry.dtype}" if isinstance(entry, np.ndarray) else f"a {type(entry).__name__}"
        )
        raise ValueError(f"image tokens are integers, (h, w) ids of codes or a flat image block, not {found}")
    codes = tokens.parse_image_block(entry.tolist()) if entry.ndim == 1 else entry
    wrong = ~tokens.are_image_codes(codes)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {codes.size} image tokens are no ids of image codes (a codebook index is no id)"
        )
    return ImageTokens(codes)


# -------------------------------------------------------------------- what kind of sample, and is it whole


def resolve_kind(request: Request) -> str:
    """The kind of a sample, `action`, `world` or `video`: named by the prompt, or told by what is given.

    Actions make a world-model sample, target images without actions a video-prediction sample, anything else an action
    sample. Raises ValueError when what is given contradicts itself or the prompt.
    """
    has_actions, has_targets = request.actions is not None, request.target_images is not None
    if has_targets and request.target_actions is not None:
        raise ValueError("a sample answers with target_actions or with target images, not both: make two samples of it")
    kind = "world" if has_actions else "video" if has_targets else "action"
    if request.prompt in KINDS:
        kind = str(request.prompt)
    elif request.prompt is not None and INSTRUCTION not in request.prompt:
        is_sentence = len(request.prompt.split()) > 1  # anything shorter is a misspelled name
        if kind != "world" or not is_sentence:
            raise ValueError(
                f"prompt is one of {', '.join(KINDS)}, or a template with {INSTRUCTION} in it, not {request.prompt!r}"
            )
    if kind == "world" and not has_actions:
        raise ValueError("a world prompt needs actions (N, D): the images alone do not say what happens next")
    if kind != "world" and has_actions:
        raise ValueError(f"a prompt of kind {kind} takes no actions: leave them out (target_actions are the answer)")
    if kind == "action" and has_targets:
        raise ValueError("a prompt of kind action is answered by target_actions, not by target images")
    if kind != "action" and request.target_actions is not None:
        raise ValueError(f"a prompt of kind {kind} is answered by target images, not by target_actions")
    if kind == "video" and request.instruction is None:
        raise ValueError("video prediction needs an instruction (a world-model sample needs actions)")
    return kind


def check_counts(request: Request, kind: str, num_actions: int, num_cameras: int) -> None:
    """Do the pictures fit C cameras and N actions? Raises ValueError that says how many are wanted."""
    found, cameras = len(request.images), f"{num_cameras} camera{'s' if num_cameras > 1 else ''} (C)"
    if kind == "world" and found != num_cameras * num_actions:
        raise ValueError(
            f"a world prompt with {cameras} and {num_actions} actions (N) takes "
            f"C x N = {num_cameras * num_actions} images, not {found}"
        )
    if found % num_cameras:
        raise ValueError(f"with {cameras} the number of images is a multiple of {num_cameras}, not {found}")
    if request.target_images is None:
        return
    found = len(request.target_images)
    if kind == "world" and found != num_cameras:
        raise ValueError(
            f"a world sample with {cameras} is answered by {num_cameras} target images, one step, not {found}"
        )
    if found % num_cameras:
        raise ValueError(f"with {cameras} the number of target images is a multiple of {num_cameras}, not {found}")
