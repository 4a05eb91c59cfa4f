"""Planning: plans that start from one picture run its prompt once, and each is what it would be alone."""

import numpy as np
import pytest
from PIL import Image
from small_checkpoint import small_model, small_processor, with_cameras


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def plans(count: int, steps: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.3, 0.3, (count, steps, 7))


def same(one: Image.Image, other: Image.Image) -> bool:
    """Up to the last bit of a pixel: a batch of pictures is decoded with sums in another order."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()) <= 1


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("draft", [None, "previous"])
def test_plans_from_one_picture(history, draft):
    processor = small_processor()
    model = small_model(processor)
    seen: list[tuple[int, int]] = []
    hook = model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(tuple(out[0].shape[:2])))
    together = model.imagine(processor, picture(0), plans(3), num_history=history, draft=draft)
    hook.remove()
    # the text, the frame and <boa> for one row; then each plan's bins and <eoa>, the separator and the grid
    assert seen[0][0] == 1 and seen[1] == (3, 8 + 1 + 3)
    for plan, frames in zip(plans(3), together, strict=True):
        alone = model.imagine(processor, picture(0), plan, num_history=history, draft=draft)
        assert all(same(a, b) for a, b in zip(alone, frames, strict=True))
    assert not same(together[0][0], together[1][0])


def test_one_picture_is_that_picture_for_every_plan():
    processor = small_processor()
    model = small_model(processor)
    shared = model.imagine(processor, np.asarray(picture(0)), plans(2))
    each = model.imagine(processor, [picture(0), picture(0)], plans(2))
    for left, right in zip(shared, each, strict=True):
        assert all(same(a, b) for a, b in zip(left, right, strict=True))


def test_a_picture_is_tokenized_once():
    processor = small_processor(with_cameras("image", "wrist"))
    model = small_model(processor)
    batches: list[int] = []
    encode = model.model.vqmodel.encoder.register_forward_hook(lambda m, a, out: batches.append(len(out)))
    first, wrist = picture(0), picture(1)
    model.imagine(processor, [[first, wrist], [first, picture(2)]], plans(2, steps=1))
    encode.remove()
    assert batches == [3]  # cameras and plans in one batch, the shared picture once
