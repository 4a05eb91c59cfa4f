"""Batches: padding, packing, pictures, weights, noise, and the errors that name a sample."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robots import ROBOTS, samples_of, two_robots
from small_checkpoint import small_model
from torch.utils.data import DataLoader

from transformers_worldvla import WorldVLAProcessor
from transformers_worldvla.data import MixtureDataset, WorldVLADataCollator
from transformers_worldvla.data.collator import IGNORED_LABEL, pack


@pytest.fixture(scope="module")
def processor() -> WorldVLAProcessor:
    return two_robots()


@pytest.fixture(scope="module")
def mixed(processor) -> MixtureDataset:
    """All samples of two robots (D = 7 and 3), of every kind."""
    return MixtureDataset([samples_of(processor, robot) for robot in ROBOTS])


def alone(processor: WorldVLAProcessor, sample: dict[str, Any]) -> dict[str, list[Any]]:
    """What the processor makes of one sample."""
    arguments = {name: value for name, value in sample.items() if name != "source" and value is not None}
    return {name: value.tolist()[0] for name, value in processor(**arguments).items()}


def segments(batch: dict[str, torch.Tensor]) -> list[dict[str, list[Any]]]:
    """Every sample of a batch, cut out of its row."""
    found = []
    for row in range(len(batch["input_ids"])):
        keys = batch["seq_idx"][row] if "seq_idx" in batch else batch["attention_mask"][row] - 1
        for segment in range(int(keys.max()) + 1):
            place = (keys == segment).nonzero().flatten()
            assert (place.diff() == 1).all()  # never split
            found.append({name: value[row, place].tolist() for name, value in batch.items()})
    return found


def as_set(samples: list[dict[str, list[Any]]]) -> list[tuple[Any, ...]]:
    names = ("input_ids", "attention_mask", "labels", "loss_weights")
    return sorted(tuple(tuple(sample[name]) for name in names) for sample in samples)


# -------------------------------------------------------------------- padding


def test_padding_is_the_processor_on_every_sample(processor, mixed):
    samples = [mixed[item] for item in range(12)]
    batch = WorldVLADataCollator(processor)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "loss_weights"}
    assert {value.dtype for value in batch.values()} == {torch.int64, torch.float32}
    for row, sample in enumerate(samples):
        for name, expected in alone(processor, sample).items():
            length = len(expected)
            assert batch[name][row, -length:].tolist() == expected
            assert set(batch[name][row, :-length].tolist()) <= {
                {"input_ids": processor.tokens.pad, "labels": -100}.get(name, 0)
            }
    assert batch["input_ids"].shape[1] == max(len(alone(processor, sample)["input_ids"]) for sample in samples)


def test_padding_to_a_multiple(processor, mixed):
    samples = [mixed[item] for item in range(6)]
    plain, rounded = (
        WorldVLADataCollator(processor)(samples),
        WorldVLADataCollator(processor, pad_to_multiple_of=64)(samples),
    )
    width = plain["input_ids"].shape[1]
    assert rounded["input_ids"].shape[1] == -(-width // 64) * 64 > width
    assert as_set(segments(rounded)) == as_set(segments(plain))


def test_samples_may_have_different_entries(processor, mixed):
    """Weights and names are optional; what is no argument of the processor is left out."""
    samples = [{**mixed[0], "sample_weights": 2.5}, {**mixed[1], "index": 7}]
    del samples[1]["source"]
    weights = WorldVLADataCollator(processor)(samples)["loss_weights"]
    assert [set(row.tolist()) for row in weights] == [{0.0, 2.5}, {0.0, 1.0}]


def test_prompts_alone_have_no_labels(processor, mixed):
    samples = [{**mixed[item], "target_actions": None, "target_image_tokens": None} for item in range(4)]
    assert set(WorldVLADataCollator(processor)(samples)) == {"input_ids", "attention_mask"}


# -------------------------------------------------------------------- packing


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), room=st.integers(0, 100))
def test_packing_holds_every_sample_once(lengths, room):
    capacity = max(lengths) + room
    rows = pack(lengths, capacity)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert max(filled) <= capacity
    assert all(row == sorted(row) for row in rows) and [row[0] for row in rows] == sorted(row[0] for row in rows)
    # best fit decreasing: no two rows could have been one, so all but one are more than half full
    assert sum(sorted(filled)[:2]) > capacity or len(rows) == 1
    assert rows == pack(lengths, capacity)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 12), room=st.one_of(st.none(), st.integers(0, 600)))
def test_packed_samples_are_whole(processor, mixed, seed, size, room):
    items = np.random.default_rng(seed).choice(len(mixed), size, replace=False)
    samples = [mixed[int(item)] for item in items]
    padded = WorldVLADataCollator(processor)(samples)
    longest = padded["input_ids"].shape[1]
    max_length = None if room is None else longest + room
    packed = WorldVLADataCollator(processor, packing=True, max_length=max_length)(samples)
    assert as_set(segments(packed)) == as_set(segments(padded))
    assert packed["input_ids"].shape[1] <= (max_length or longest)
    assert len(packed["input_ids"]) <= len(samples)
    outside = packed["seq_idx"] == -1
    assert (outside == (packed["attention_mask"] == 0)).all()
    assert (packed["labels"][outside] == -100).all() and (packed["input_ids"][outside] == processor.tokens.pad).all()
    if outside.shape[1] > 1:  # padding only on the left
        assert (outside.int().diff(dim=-1) <= 0).all()


def test_packing_saves_tokens_where_lengths_differ(processor):
    """One world sample with three rounds among short action samples."""
    data = samples_of(processor, kinds=("action", "world"), num_actions=1, history=1, world_history=3)
    samples = [data[item] for item in [*data.items_of("action")[:11].tolist(), data.items_of("world")[5]]]
    padded, packed = (WorldVLADataCollator(processor, packing=packing)(samples) for packing in (False, True))
    assert padded["input_ids"].shape == (12, packed["input_ids"].shape[1])
    assert len(packed["input_ids"]) == 1 + 6  # two short ones in a row


def test_packed_logits_are_the_padded_ones(processor, mixed):
    """What the model makes of a packed row is what it makes of each sample alone."""
    model = small_model(processor)
    samples = [mixed[item] for item in range(6)]
    collators = (WorldVLADataCollator(processor), WorldVLADataCollator(processor, packing=True, max_length=600))
    results = []
    for collate in collators:
        batch = collate(samples)
        with torch.no_grad():
            batch["logits"] = model(**batch).logits
        results.append({tuple(s["input_ids"]): torch.tensor(s["logits"]) for s in segments(batch)})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 6
    for ids, expected in results[0].items():
        torch.testing.assert_close(results[1][ids], expected, rtol=0, atol=1e-5)


def test_a_fixed_shape_for_compilers(processor, mixed):
    collate = WorldVLADataCollator(processor, packing=True, max_length=512, pad_to_multiple_of=512)
    widths = {collate([mixed[i] for i in range(start, start + 5)])["input_ids"].shape[1] for start in (0, 10, 20)}
    assert widths == {512}


# -------------------------------------------------------------------- pictures


@pytest.mark.parametrize("packing", [False, True])
def test_pictures_stay_with_their_samples(processor, mixed, packing):
    """Packing moves samples between rows; the flat list of pictures follows. Tokens and pictures mix."""
    model, rng = small_model(processor), np.random.default_rng(0)

    def noise(count: int) -> list[np.ndarray]:
        return [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count)]

    samples = [
        {"images": noise(2), "instruction": "a", "target_actions": np.zeros((2, 7)), "embodiment": "libero"},
        {"images": noise(1), "actions": np.zeros((1, 3)), "target_images": noise(1), "embodiment": "gantry"},
        {**mixed[0]},
        {"images": noise(1), "instruction": "go there", "target_actions": np.zeros((1, 3)), "embodiment": "gantry"},
        {"images": noise(2), "instruction": "b", "target_images": noise(1), "embodiment": "libero"},
    ]
    batch = WorldVLADataCollator(processor, packing=packing, max_length=260 if packing else None)(samples)
    assert len(batch["pixel_values"]) == 2 + 2 + 1 + 3
    discrete = model.discretize(**batch)
    assert len(batch["input_ids"]) == (3 if packing else 5)
    expected = []
    for sample in samples:
        arguments = {name: value for name, value in sample.items() if name != "source"}
        single = model.discretize(**processor(**arguments))
        expected.append({name: value[0].tolist() for name, value in single.items()})
    assert as_set(segments(discrete)) == as_set(expected)
    if packing:
        order = [len(s["input_ids"]) for s in segments(discrete)]
        assert order != [len(s["input_ids"]) for s in expected]  # or the test would show nothing


# -------------------------------------------------------------------- embodiments, workers


def test_embodiments_for_metrics(processor, mixed):
    samples = [mixed[item] for item in range(10)]
    collate = WorldVLADataCollator(processor, packing=True, max_length=600, embodiment_ids=True)
    found = segments(collate(samples))
    numbers = list(processor.embodiments)
    by_ids = {tuple(alone(processor, sample)["input_ids"]): numbers.index(sample["embodiment"]) for sample in samples}
    assert set(by_ids.values()) == {0, 1}
    for segment in found:
        assert set(segment["embodiment_ids"]) == {by_ids[tuple(segment["input_ids"])]}


@pytest.mark.parametrize("packing", [False, True])
def test_batches_do_not_depend_on_workers(processor, mixed, packing):
    collate = WorldVLADataCollator(processor, packing=packing, max_length=1024)
    loaders = [DataLoader(mixed, batch_size=8, collate_fn=collate, num_workers=n) for n in (0, 2)]
    for one, other in zip(*loaders, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize("packing", [False, True])
def test_a_sample_that_is_too_long_is_named(processor, mixed, packing):
    samples = [mixed[item] for item in range(8)]
    lengths = [len(alone(processor, sample)["input_ids"]) for sample in samples]
    worst = lengths.index(max(lengths))
    collate = WorldVLADataCollator(processor, packing=packing, max_length=max(lengths) - 1)
    with pytest.raises(ValueError, match=f"more than max_length {max(lengths) - 1}: raise it") as error:
        collate(samples)
    assert str(error.value).startswith(
        f"sample {worst} of the batch ({samples[worst]['source']}) has {max(lengths)} tokens"
    )
    assert "\n" not in str(error.value)


def test_a_sample_that_the_processor_refuses_is_named(processor, mixed):
    samples = [mixed[item] for item in range(4)]
    broken = next(number for number, sample in enumerate(samples) if sample["target_actions"] is not None)
    samples[broken]["target_actions"] = np.full_like(samples[broken]["target_actions"], np.nan)
    with pytest.raises(ValueError) as error:
        WorldVLADataCollator(processor)(samples)
    name = f"sample {broken} of the batch ({samples[broken]['source']}): action 0 is nan in dimension "
    assert str(error.value).startswith(name)
    del samples[broken]["source"]
    with pytest.raises(ValueError, match=f"^sample {broken} of the batch: action 0 is nan"):
        WorldVLADataCollator(processor)(samples)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 0}, "max_length is a number >= 1 or None, not 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is a number >= 1 or None, not 0"),
        ({"max_length": 100, "pad_to_multiple_of": 64}, "max_length 100 is no multiple of pad_to_multiple_of 64"),
    ],
)
def test_wrong_sizes(processor, fields, message):
    with pytest.raises(ValueError, match=message):
        WorldVLADataCollator(processor, **fields)


# -------------------------------------------------------------------- codes that move


def expected_weights(sample: dict[str, Any], weights: list[float], cameras: int, factor: float) -> list[float]:
    """By brute force: code by code, the answer beside the pictures of the time step before."""
    shown, targets = sample.get("image_tokens") or [], sample.get("target_image_tokens")
    if targets is None:
        return weights
    pictures = [np.asarray(picture).ravel().tolist() for picture in [*shown, *targets]]
    factors = []
    for number in range(len(shown), len(pictures)):
        before = pictures[number - cameras]
        factors += [factor if code != old else 1.0 for code, old in zip(pictures[number], before, strict=True)]
    return factors


@pytest.mark.parametrize("packing", [False, True])
def test_codes_that_move_weigh_more(processor, packing):
    """Every answer's picture codes, and nothing else; here half of the codes stand still."""
    samples, rng = [], np.random.default_rng(1)
    for robot in ROBOTS:
        episodes = samples_of(processor, robot)
        for episode in episodes.episodes:
            for step in range(1, len(episode)):
                still = rng.random(episode.frames[step].shape) < 0.5
                episode.frames[step][still] = episode.frames[step - 1][still]
        samples += [episodes[item] for item in range(len(episodes))]
    samples = samples[:: max(1, len(samples) // 24)]
    plain = segments(WorldVLADataCollator(processor)(samples))
    weighed = segments(WorldVLADataCollator(processor, moved_weight=3.0, packing=packing)(samples))
    by_ids = {tuple(each["input_ids"]): each["loss_weights"] for each in weighed}
    moved, answered = 0, 0
    for sample, each in zip(samples, plain, strict=True):
        ids, labels, weights = (np.array(each[name]) for name in ("input_ids", "labels", "loss_weights"))
        codes = np.isin(ids, processor.tokens.image_codes) & (labels != -100)
        cameras = processor.get_embodiment(sample.get("embodiment")).num_cameras
        wanted = weights.copy()
        if codes.any():
            wanted[codes] *= expected_weights(sample, [], cameras, 3.0)
            moved, answered = moved + int((wanted != weights).sum()), answered + int(codes.sum())
        assert by_ids[tuple(each["input_ids"])] == wanted.tolist()
    assert 0.4 < moved / answered < 0.6


def test_codes_that_move_need_tokens(processor):
    collate = WorldVLADataCollator(processor, moved_weight=2.0)
    with pytest.raises(ValueError, match=r"sample 0 of the batch \(here\) has pictures to predict"):
        collate(
            [
                {
                    "target_images": [np.zeros((32, 32, 3), np.uint8)],
                    "images": [np.zeros((32, 32, 3), np.uint8)],
                    "instruction": "x",
                    "source": "here",
                }
            ]
        )
    with pytest.raises(ValueError, match="moved_weight is a number >= 0, not -1"):
        WorldVLADataCollator(processor, moved_weight=-1)


# -------------------------------------------------------------------- labels of actions, jittered


def action_labels(processor: Any, samples: list[dict[str, Any]], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which labels are action bins, and the index of each bin."""
    labels = WorldVLADataCollator(processor, **options)(samples)["labels"].numpy()
    index = {token: number for number, token in enumerate(processor.tokens.action_bins)}
    places = np.isin(labels, list(index))
    return places, np.array([index[token] for token in labels[places].tolist()])


def test_jitter_moves_action_labels_by_a_normal_number_of_bins(processor):
    """Deviation and mean of the shift; the ids that the model reads, and every other label, stay."""
    samples = [
        each for robot in ROBOTS for each in map(samples_of(processor, robot, lengths=(60,)).__getitem__, range(50))
    ]
    plain, noisy = (WorldVLADataCollator(processor, action_jitter=jitter)(samples) for jitter in (0, 4))
    assert torch.equal(plain["input_ids"], noisy["input_ids"]) and torch.equal(
        plain["loss_weights"], noisy["loss_weights"]
    )
    places, before = action_labels(processor, samples)
    moved, after = action_labels(processor, samples, action_jitter=4)
    assert (places == moved).all() and (plain["labels"].numpy()[~places] == noisy["labels"].numpy()[~places]).all()
    inner = (before > 20) & (before < 235)
    shift = (after - before)[inner]
    assert len(shift) > 300
    assert abs(shift.mean()) < 5 * 4 / len(shift) ** 0.5 and 3.5 < shift.std() < 4.5
    assert (action_labels(processor, samples, action_jitter=4)[1] == after).all(), "the same batch, the same noise"
    assert (action_labels(processor, samples[::-1], action_jitter=4)[1] != after).any()


def test_jitter_stays_among_the_bins(processor):
    robot = processor.get_embodiment(next(iter(ROBOTS)))
    sample = samples_of(processor, robot.name)[0]
    for limit, end in ((robot.low, 0), (robot.high, len(processor.tokens.action_bins) - 1)):
        edge = sample | {"target_actions": np.tile(limit, (len(sample["target_actions"]), 1))}
        _, bins = action_labels(processor, [edge] * 8, action_jitter=3)
        assert (bins == end).mean() > 0.4 and np.abs(bins - end).max() > 1
    with pytest.raises(ValueError, match="action_jitter is a number of bins >= 0, not -1"):
        WorldVLADataCollator(processor, action_jitter=-1)


# -------------------------------------------------------------------- codes of prompts, disturbed


def test_noise_replaces_a_share_of_the_shown_codes(processor, mixed):
    """By other codes, any of them; actions, text, and what is asked for, stay, also in packed rows."""
    samples = [mixed[number] for number in range(len(mixed))]
    plain, noisy = (WorldVLADataCollator(processor, packing=True, code_noise=share)(samples) for share in (0, 0.3))
    assert all(torch.equal(plain[name], noisy[name]) for name in plain.keys() - {"input_ids"})
    ids, others = plain["input_ids"].numpy(), noisy["input_ids"].numpy()
    codes = set(processor.tokens.image_codes)
    shown = np.isin(ids, list(codes)) & (plain["labels"].numpy() == IGNORED_LABEL)
    assert shown.sum() > 500 and (ids == others)[~shown].all()
    changed = (ids != others)[shown]
    assert abs(changed.mean() - 0.3) < 5 * (0.3 * 0.7 / len(changed)) ** 0.5
    assert set(others[shown][changed].tolist()) == codes, "any code may come"


def test_noise_belongs_to_the_batch(processor, mixed):
    samples = [mixed[number] for number in range(8)]
    collate = WorldVLADataCollator(processor, code_noise=0.5)
    first, again, turned = (collate(batch)["input_ids"] for batch in (samples, samples, samples[::-1]))
    assert torch.equal(first, again) and not torch.equal(first, turned.flip(0))
    with pytest.raises(ValueError, match="code_noise is a share from 0 to below 1, not 1"):
        WorldVLADataCollator(processor, code_noise=1)
