"""Mixtures: exact shares, no sample before its turn, and places that depend on (seed, epoch, item) alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robots import ROBOTS, samples_of, two_robots
from small_checkpoint import small_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from transformers_worldvla import WorldVLAProcessor
from transformers_worldvla.data import MixtureDataset, SampleDataset, WorldVLADataCollator
from transformers_worldvla.data.epochs import EpochCallback
from transformers_worldvla.data.mixture import apportion


@pytest.fixture(scope="module")
def processor() -> WorldVLAProcessor:
    return two_robots()


@pytest.fixture(scope="module")
def datasets(processor) -> list[SampleDataset]:
    """An arm with 14 + 16 + 16 samples (action, world, video; T = 12 and 6 ...) and a gantry with fewer."""
    return [samples_of(processor, "libero", lengths=(12, 6)), samples_of(processor, "gantry", lengths=(5,))]


def places(mixture: MixtureDataset, epoch: int) -> list[tuple[int, int, int]]:
    return [mixture.locate(item, epoch) for item in range(len(mixture))]


def kinds_of(mixture: MixtureDataset, epoch: int = 0) -> Counter[tuple[int, str]]:
    return Counter((d, mixture.datasets[d].locate(item)[1]) for d, item, _ in places(mixture, epoch))


# -------------------------------------------------------------------- shares


def test_without_weights_an_epoch_is_every_sample_once(datasets):
    """The authors' ratio: T - K + 1 action and T - 1 world samples of each episode."""
    mixture = MixtureDataset(datasets)
    assert len(mixture) == len(datasets[0]) + len(datasets[1])
    for epoch in range(3):
        found = places(mixture, epoch)
        assert sorted(place[:2] for place in found) == [(d, i) for d in (0, 1) for i in range(len(datasets[d]))]
        assert {turn for _, _, turn in found} == {epoch}
    assert kinds_of(mixture) == {
        **{(0, "action"): 10 + 4, (0, "world"): 11 + 5, (0, "video"): 11 + 5},
        **{(1, "action"): 3, (1, "world"): 4, (1, "video"): 4},
    }


def test_weights_are_shares_of_the_epoch(datasets):
    mixture = MixtureDataset(datasets, weights=[1, 3], kind_weights={"action": 2, "world": 1}, samples_per_epoch=120)
    assert kinds_of(mixture) == {(0, "action"): 20, (0, "world"): 10, (1, "action"): 60, (1, "world"): 30}
    assert mixture.shares == {(0, "action"): 1 / 6, (0, "world"): 1 / 12, (1, "action"): 1 / 2, (1, "world"): 1 / 4}


def test_a_kind_that_a_data_set_lacks_is_shared_out(processor, datasets):
    only_action = samples_of(processor, "gantry", kinds=("action",))
    mixture = MixtureDataset(
        [datasets[0], only_action], [1, 1], kind_weights={"action": 1, "world": 1}, samples_per_epoch=40
    )
    assert kinds_of(mixture) == {(0, "action"): 10, (0, "world"): 10, (1, "action"): 20}


def test_a_weight_of_zero_leaves_a_data_set_out(datasets):
    assert {d for d, _, _ in places(MixtureDataset(datasets, weights=[0, 1]), 0)} == {1}


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.floats(0, 1e3), min_size=1, max_size=8).filter(sum), total=st.integers(0, 10_000))
def test_whole_numbers_in_a_ratio(shares, total):
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert (np.abs(counts - np.array(shares) / sum(shares) * total) < 1 + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.integers(0, 5), min_size=2, max_size=2).filter(any),
    length=st.integers(1, 150),
    seed=st.integers(0, 5),
)
def test_all_samples_of_a_kind_have_their_turn(datasets, weights, length, seed):
    """Over the epochs too: at any epoch's end no sample of a stratum was drawn two times more than another."""
    mixture = MixtureDataset(datasets, weights, seed, samples_per_epoch=length)
    drawn: Counter[tuple[int, int]] = Counter()
    for epoch in range(4):
        for dataset, item, turn in places(mixture, epoch):
            assert turn == drawn[dataset, item]  # so a sample that comes again is another turn of it
            drawn[dataset, item] += 1
        for stratum in mixture.strata:
            counts = [drawn[stratum.dataset, item] for item in stratum.items.tolist()]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == (epoch + 1) * stratum.per_epoch


def test_every_stretch_has_the_shares(datasets):
    """Read in order, each tenth of an epoch holds its tenth of every stratum, one more or less at its ends."""
    mixture = MixtureDataset(
        datasets, [1, 2], kind_weights={"action": 3, "world": 1, "video": 1}, samples_per_epoch=500
    )
    found = [(d, mixture.datasets[d].locate(item)[1]) for d, item, _ in places(mixture, 0)]
    for start in range(0, 500, 50):
        counts = Counter(found[start : start + 50])
        for stratum, share in mixture.shares.items():
            assert abs(counts[stratum] - 50 * share) <= 2


# -------------------------------------------------------------------- a pure function of (seed, epoch, item)


def test_the_order_is_drawn_by_seed_and_epoch(datasets):
    mixture = MixtureDataset(datasets, seed=1)
    epochs = [places(mixture, epoch) for epoch in range(3)]
    assert [places(mixture, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    again = MixtureDataset(datasets, seed=1)
    assert [again.locate(item, 1) for item in reversed(range(len(again)))] == epochs[1][::-1]
    orders = {tuple(place[:2] for place in epoch) for epoch in [*epochs, places(MixtureDataset(datasets, seed=2), 0)]}
    assert len(orders) == 4


def sources(loader: Any) -> list[list[str]]:
    return [[sample["source"] for sample in batch] for batch in loader]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(datasets, persistent):
    mixture = MixtureDataset(datasets, weights=[1, 1])
    helped = DataLoader(mixture, batch_size=4, collate_fn=list, num_workers=2, persistent_workers=persistent)
    for epoch in (0, 1, 0):
        mixture.set_epoch(epoch)
        expected = [mixture.sample(item, epoch)["source"] for item in range(len(mixture))]
        assert [source for batch in sources(helped) for source in batch] == expected
        assert sources(DataLoader(mixture, batch_size=4, collate_fn=list)) == sources(helped)


class Recorder(WorldVLADataCollator):
    """Remembers which samples it was given. Workers have copies, so it is for none."""

    def __init__(self, processor: Any):
        super().__init__(processor)
        self.batches: list[tuple[str, ...]] = []

    def __call__(self, samples):
        self.batches.append(tuple(f"{s['source']}, {len(s['image_tokens'])} pictures" for s in samples))
        return super().__call__(samples)


def train(
    folder: Path, processor: Any, resume: bool, steps: int, sampling: str
) -> tuple[list[tuple[str, ...]], torch.Tensor]:
    """The batches of a run of transformers' Trainer over epochs of five steps, and a weight afterwards."""
    datasets = [samples_of(processor, robot, history_dropout=0.5) for robot in ROBOTS]
    mixture, collate = MixtureDataset(datasets, [1, 2], samples_per_epoch=10), Recorder(processor)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        save_steps=7,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        train_sampling_strategy=sampling,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = small_model(processor, dropout=0.0)
    trainer = Trainer(model, arguments, collate, mixture, callbacks=[EpochCallback(mixture)])
    trainer.train(resume_from_checkpoint=resume)
    return collate.batches, model.lm_head.weight.detach()


@pytest.mark.parametrize("sampling", ["random", "sequential"])
def test_a_resumed_run_goes_on_with_the_same_samples(processor, tmp_path, sampling):
    """Stopped after seven steps, in the middle of the second of three epochs, with transformers' own Trainer."""
    whole, expected = train(tmp_path / "whole", processor, False, 14, sampling)
    before, _ = train(tmp_path / "cut", processor, False, 7, sampling)
    after, weight = train(tmp_path / "cut", processor, True, 14, sampling)
    assert before[:7] == whole[:7]
    assert after[:7] == whole[7:14]  # a loader reads one batch ahead; batches that are skipped are not read at all
    assert whole[:5] != whole[5:10]
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)


# -------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": [1]}, "weights are one number for each of the 2 data sets, not 1"),
        ({"weights": [0, 0]}, "weights are numbers >= 0, not all of them 0, not .0.0, 0.0."),
        ({"weights": [1, float("nan")]}, "weights are numbers >= 0"),
        ({"kind_weights": {"action": -1}}, "kind_weights are numbers >= 0"),
        ({"kind_weights": {"dream": 1}}, "sample kinds are action, world, video, not dream"),
        ({"samples_per_epoch": 0}, "hold no sample"),
    ],
)
def test_mixtures_that_cannot_be(datasets, fields, message):
    with pytest.raises(ValueError, match=message):
        MixtureDataset(datasets, **fields)


def test_a_weight_on_nothing(processor):
    data = samples_of(processor, kinds=("action",))
    with pytest.raises(ValueError, match="data set 0 has a weight but no sample to draw: it holds action"):
        MixtureDataset([data], kind_weights={"world": 1})
    with pytest.raises(ValueError, match="at least one data set"):
        MixtureDataset([])
    with pytest.raises(ValueError, match="hold no sample: the episodes are shorter"):
        MixtureDataset([samples_of(processor, lengths=(1,))])
    with pytest.raises(IndexError, match="sample 12 of 12"):
        MixtureDataset([data])[12]
