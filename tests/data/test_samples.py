"""Which frames and actions make a sample: the authors' index rules, and independence of everything but the numbers."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robots import samples_of, tokenized_episodes, two_robots
from torch.utils.data import DataLoader

from transformers_worldvla import WorldVLAProcessor
from transformers_worldvla.data import SampleDataset, TokenizedEpisode


@pytest.fixture(scope="module")
def processor() -> WorldVLAProcessor:
    return two_robots()


def numbered(steps: int, cameras: int = 1, index: int = 0) -> TokenizedEpisode:
    """An episode whose frame and action of step t are t; the camera is a decimal digit more."""
    frames = np.arange(steps)[:, None] * 10 + np.arange(cameras)
    return TokenizedEpisode(index, "go", frames[:, :, None, None], np.arange(steps, dtype=np.float32)[:, None])


def steps_of(sample: dict[str, Any]) -> dict[str, list[int]]:
    """What a sample of `numbered` shows and asks for: time steps, pictures as step * 10 + camera."""
    names = {"image_tokens": "images", "target_image_tokens": "next images"}
    found = {names[key]: [int(code[0, 0]) for code in sample[key]] for key in names if sample[key] is not None}
    return found | {
        key: [int(action[0]) for action in sample[key]]
        for key in ("actions", "target_actions")
        if sample[key] is not None
    }


def test_the_authors_example():
    """Their README: images 0 and 1, actions 1 to 5."""
    data = SampleDataset([numbered(20)], kinds=("action",), num_actions=5, history=2)
    assert steps_of(data[1]) == {"images": [0, 10], "target_actions": [1, 2, 3, 4, 5]}
    assert steps_of(data[0]) == {"images": [0], "target_actions": [0, 1, 2, 3, 4]}  # no frame is repeated
    assert len(data) == 20 - 5 + 1
    assert steps_of(data[15]) == {"images": [140, 150], "target_actions": [15, 16, 17, 18, 19]}


def expected_samples(steps: int, kind: str, num_actions: int, history: int, rounds: int, cameras: int):
    """The authors' loops (`action_model_conv_generation.py`, `world_model_conv_generation.py`), step by step."""

    def pictures(times: range) -> list[int]:
        return [time * 10 + camera for time in times for camera in range(cameras)]

    for j in range(steps):
        if kind == "action" and j + num_actions <= steps:
            images = pictures(range(max(0, j - history + 1), j + 1))
            yield {"images": images, "target_actions": [*range(j, j + num_actions)]}
        elif kind == "world" and steps >= rounds + 1 and j + 1 < steps:
            times = range(max(j - rounds + 1, 0), j + 1)
            yield {"images": pictures(times), "actions": [*times], "next images": pictures(range(j + 1, j + 2))}
        elif kind == "video" and j + 1 < steps:
            images = pictures(range(max(0, j - history + 1), j + 1))
            yield {"images": images, "next images": pictures(range(j + 1, j + 2))}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    kinds=st.lists(st.sampled_from(("action", "world", "video")), min_size=1, max_size=4),
    num_actions=st.integers(1, 6),
    history=st.integers(1, 4),
    rounds=st.integers(1, 4),
    cameras=st.integers(1, 2),
)
def test_every_sample_once_in_order(lengths, kinds, num_actions, history, rounds, cameras):
    """Episode by episode, in it kind by kind; a kind named twice comes twice."""
    episodes = [numbered(steps, cameras) for steps in lengths]
    data = SampleDataset(episodes, kinds, num_actions, history, rounds)
    expected = [
        sample
        for steps, kind in itertools.product(lengths, kinds)
        for sample in expected_samples(steps, kind, num_actions, history, rounds, cameras)
    ]
    assert [steps_of(data[item]) for item in range(len(data))] == expected
    for kind in set(kinds):
        assert [data.locate(item)[1] for item in data.items_of(kind).tolist()].count(kind) == len(data.items_of(kind))
    assert sum(len(data.items_of(kind)) for kind in set(kinds)) == len(data)


def test_the_arguments_of_each_kind(processor):
    data = samples_of(processor, "gantry", lengths=(5,))
    by_kind = {data.locate(item)[1]: data[item] for item in range(len(data))}
    present = {
        kind: {name for name, value in sample.items() if value is not None} - {"source", "embodiment", "image_tokens"}
        for kind, sample in by_kind.items()
    }
    assert present == {
        "action": {"instruction", "target_actions"},
        "world": {"actions", "target_image_tokens"},
        "video": {"instruction", "target_image_tokens"},
    }
    assert {sample["embodiment"] for sample in by_kind.values()} == {"gantry"}
    assert by_kind["action"]["target_actions"].dtype == np.float32
    assert data[0]["source"] == "episode 10, step 0, action"
    assert data[len(data) - 1]["source"] == "episode 10, step 3, video"


# -------------------------------------------------------------------- a pure function of (seed, epoch, item)


def test_history_dropout_is_drawn_by_seed_epoch_and_item(processor):
    lengths = (200,)
    data = samples_of(processor, lengths=lengths, history_dropout=0.3)
    actions = data.items_of("action").tolist()[1:]

    def shown(data: SampleDataset, epoch: int) -> list[int]:
        return [len(data.sample(item, epoch)["image_tokens"]) for item in actions]

    first = shown(data, 0)
    assert set(first) == {1, 2} and 0.2 < first.count(1) / len(first) < 0.4
    assert first == shown(samples_of(processor, lengths=lengths, history_dropout=0.3), 0)
    assert first != shown(data, 1)
    assert first != shown(samples_of(processor, lengths=lengths, history_dropout=0.3, seed=1), 0)
    assert [len(data.sample(item, 0)["image_tokens"]) for item in reversed(actions)] == first[::-1]
    video = data.items_of("video").tolist()[1:]
    assert all(len(data.sample(item, 0)["image_tokens"]) == 2 for item in video)


def sources(loader: DataLoader) -> list[tuple[str, int]]:
    return [(sample["source"], len(sample["image_tokens"])) for batch in loader for sample in batch]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(processor, persistent):
    """Also workers that live longer than an epoch see the next one."""
    data = samples_of(processor, lengths=(20,), history_dropout=0.5)
    alone = DataLoader(data, batch_size=4, collate_fn=list)
    helped = DataLoader(data, batch_size=4, collate_fn=list, num_workers=2, persistent_workers=persistent)
    epochs = []
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        epochs.append(sources(alone))
        assert sources(helped) == epochs[-1]
    assert epochs[0] != epochs[1] != epochs[2]
    data.set_epoch(0)
    assert sources(helped) == epochs[0]


# -------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kinds": ("action", "dream")}, "sample kinds are action, world, video, not dream"),
        ({"num_actions": 0}, "num_actions is a number >= 1, not 0"),
        ({"history": 0}, "history is a number >= 1, not 0"),
        ({"world_history": -1}, "world_history is a number >= 1, not -1"),
    ],
)
def test_rules_that_make_no_sample(fields, message):
    with pytest.raises(ValueError, match=message):
        SampleDataset([numbered(9)], **fields)


def test_there_is_an_end():
    data = SampleDataset([numbered(4)], kinds=("world",))
    assert len(list(data)) == 3  # iteration ends by IndexError
    with pytest.raises(IndexError, match="sample 3 of 3"):
        data[3]


def test_short_episodes_give_what_they_can(processor):
    episode = tokenized_episodes(processor, lengths=(9,))[0]
    short = replace(episode, frames=episode.frames[:2], actions=episode.actions[:2])
    data = SampleDataset([short], num_actions=5)
    assert [data.locate(item)[1] for item in range(len(data))] == ["world"]
    assert len(SampleDataset([], num_actions=5)) == 0
