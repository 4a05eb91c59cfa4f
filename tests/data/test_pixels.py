"""Samples with pictures: the same as those with tokens once the pictures are tokenized, and augmented as a whole."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoint import small_model, small_processor, with_cameras, write_episode
from torch.utils.data import DataLoader

from transformers_worldvla.data import (
    EpisodeDataset,
    ImageAugmentation,
    MixtureDataset,
    PixelSampleDataset,
    SampleDataset,
    WorldVLADataCollator,
    load_episodes,
    tokenize_episode,
)

KINDS = ("action", "world", "video")
RULES = {"kinds": KINDS, "num_actions": 4, "history": 2, "world_history": 2}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Two cameras of 96 and 128 pixels, nine steps."""
    return write_episode(tmp_path_factory.mktemp("recording"), steps=9, cameras=("image", "wrist"))


@pytest.fixture(scope="module")
def episodes(recording) -> EpisodeDataset:
    return load_episodes(recording)


@pytest.fixture(scope="module")
def processor():
    return small_processor(with_cameras("image", "wrist"))


def test_the_same_batches_as_from_tokens(episodes, processor):
    """Two ways to one batch: pictures, collated and then tokenized; and tokenized once, then collated."""
    model = small_model(processor)
    pixels = PixelSampleDataset(episodes, **RULES)
    tokens = SampleDataset([tokenize_episode(e, model, processor, e.cameras) for e in episodes], **RULES)
    assert len(pixels) == len(tokens) == 6 + 8 + 8
    for packing in (False, True):
        collate = WorldVLADataCollator(processor, packing=packing)
        items = [0, 1, 5, 6, 7, 13, 14, 20, 21]  # first and last ones of each kind
        batch, expected = (collate([data[item] for item in items]) for data in (pixels, tokens))
        assert batch["pixel_values"].shape == (42, 3, 64, 64)
        discrete = model.discretize(**batch)
        assert discrete.keys() == expected.keys()
        assert all(torch.equal(discrete[name], expected[name]) for name in expected)


def test_cameras_in_the_order_asked_for(episodes):
    sample = PixelSampleDataset(episodes, cameras=["wrist", "image"], kinds=("world",))[3]
    assert [picture.shape[0] for picture in sample["images"] + sample["target_images"]] == [128, 96, 128, 96]
    assert (sample["images"][0] == episodes[0].frame("wrist", 3)).all()
    assert (sample["target_images"][1] == episodes[0].frame("image", 4)).all()
    assert (sample["actions"] == episodes[0].actions[3:4]).all()
    assert PixelSampleDataset(episodes, embodiment="libero")[0]["embodiment"] == "libero"


def test_off_by_default(episodes):
    sample = PixelSampleDataset(episodes, **RULES)[1]
    assert (sample["images"][0] == episodes[0].frame("image", 0)).all()


def test_all_pictures_of_a_sample_change_alike(episodes):
    """What does not move in the recording does not move in the sample: the gradient behind the square."""
    plain = PixelSampleDataset(episodes, cameras=["image"], kinds=("world",), world_history=3)
    augmented = PixelSampleDataset(
        episodes, cameras=["image"], kinds=("world",), world_history=3, augmentation=ImageAugmentation(crop=0.8)
    )
    before, after = plain[5], augmented[5]
    pictures = after["images"] + after["target_images"]
    assert len(pictures) == 4
    assert any(
        (new != old).any() for new, old in zip(pictures, before["images"] + before["target_images"], strict=True)
    )
    for picture in pictures[1:]:
        assert (picture[60:] == pictures[0][60:]).all()  # below the square, also in the target
    assert (pictures[0] != pictures[-1]).any()  # the square moved


def test_augmentation_is_drawn_by_seed_epoch_and_item(episodes):
    def pictures(epoch: int, seed: int = 0, item: int = 2) -> np.ndarray:
        data = PixelSampleDataset(episodes, augmentation=ImageAugmentation(), seed=seed, **RULES)
        return np.stack(data.sample(item, epoch)["images"][::2])

    assert (pictures(0) == pictures(0)).all()
    for other in (pictures(1), pictures(0, seed=1)):
        assert (other != pictures(0)).any()


def test_workers_change_nothing(episodes):
    """Also inside a mixture, which draws the three samples of one kind again and again, each time in another way."""
    data = PixelSampleDataset(episodes[:1], augmentation=ImageAugmentation(), kinds=("action",), num_actions=7)
    mixture = MixtureDataset([data], samples_per_epoch=12)
    loaders = [DataLoader(mixture, batch_size=3, collate_fn=list, num_workers=n) for n in (0, 2)]
    seen = set()
    for epoch in range(2):
        mixture.set_epoch(epoch)
        for one, other in zip(*([s for batch in loader for s in batch] for loader in loaders), strict=True):
            assert one["source"] == other["source"]
            assert all((a == b).all() for a, b in zip(one["images"], other["images"], strict=True))
            seen.add(one["images"][-1].tobytes())
    assert len(data) == 3 and len(seen) == 24


def test_a_camera_that_is_not_there(episodes):
    with pytest.raises(ValueError, match='no camera "wrst" here.*did you mean "wrist"'):
        PixelSampleDataset(episodes, cameras=["wrst"])[0]
