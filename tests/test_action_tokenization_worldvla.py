"""Actions to bins and back, exactly as the authors do it, and what an embodiment has to say about a robot."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from transformers_worldvla.action_tokenization_worldvla import (
    EMBODIMENTS,
    LIBERO,
    Embodiment,
    bin_centers,
    denormalize,
    digitize,
    normalize,
)

FIRST_BIN = 10006  # published id of bin 0
LOW, HIGH = np.array(LIBERO.low), np.array(LIBERO.high)
HALF_BINS = np.array([0.00367647, 0.00367647, 0.00367647, 0.00137395, 0.00147059, 0.00147059, 0.00392157])


def encode_silently(embodiment: Embodiment, actions: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return embodiment.encode(actions)


# -------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize(
    ("action", "tokens", "decoded"),
    [
        (
            [0.1, -0.2, 0.3, 0.05, -0.1, 0.2, 1],
            [10147, 10106, 10174, 10142, 10099, 10201, 10260],
            [0.1029412, -0.1985294, 0.3014706, 0.049374, -0.1, 0.2, 0.9960784],
        ),
        (
            [0.5, -0.5, 0.9375, -0.3, 0.1, -0.02, -1],
            [10201, 10065, 10260, 10015, 10167, 10126, 10006],
            [0.5, -0.5, 0.9338235, -0.2996092, 0.1, -0.0205882, -0.9960784],
        ),
        (
            [0, 0, 0, 0, 0, 0, -1],  # LIBERO's dummy step
            [10133, 10133, 10133, 10124, 10133, 10133, 10006],
            [0, 0, 0, -0.0000882, 0, 0, -0.9960784],
        ),
    ],
)
def test_vectors_of_the_authors_code(action, tokens, decoded):
    bins = LIBERO.encode([action])
    assert (bins[0] + FIRST_BIN).tolist() == tokens
    assert np.allclose(LIBERO.decode(bins)[0], decoded, atol=5e-8)


def test_reference_actions_are_reproduced_exactly(authors_tiny):
    reference = json.loads((authors_tiny / "reference.json").read_text())
    bins = encode_silently(LIBERO, np.load(authors_tiny / "actions.npy"))
    assert [[token for token in row[1:-1]] for row in reference["action_tokens"]] == (bins + FIRST_BIN).tolist()
    assert np.array_equal(bin_centers(bins), np.array(reference["action_decoded"]))  # bit for bit
    assert np.array_equal(LIBERO.decode(bins), denormalize(np.array(reference["action_decoded"]), LOW, HIGH))


def test_the_minimum_is_in_the_first_bin():
    assert LIBERO.encode([LIBERO.low]).tolist() == [[0] * 7]
    assert np.allclose(
        LIBERO.decode(np.zeros((1, 7), int)),
        [[-0.933824, -0.933824, -0.933824, -0.324340, -0.373529, -0.373529, -0.996078]],
        atol=1e-6,
    )


def test_the_maximum_is_in_the_last_bin_but_one():
    bins = LIBERO.encode([LIBERO.high])
    assert bins.tolist() == [[254] * 7]
    expected = [[0.933824, 0.933824, 0.933824, 0.373626, 0.373529, 0.373529, 0.996078]]
    assert np.allclose(LIBERO.decode(bins), expected, atol=1e-6)


def test_above_the_maximum_is_the_last_bin_and_decodes_like_the_one_before():
    with pytest.warns(UserWarning, match="clipped"):
        bins = LIBERO.encode(HIGH[None] + 0.01)
    assert bins.tolist() == [[255] * 7]
    assert np.array_equal(LIBERO.decode(bins), LIBERO.decode(bins - 1))


def test_below_the_minimum_is_the_first_bin():
    with pytest.warns(UserWarning, match="clipped"):
        assert LIBERO.encode(LOW[None] - 0.5).tolist() == [[0] * 7]


def test_the_unreachable_index_decodes_like_the_first_bin():
    assert np.array_equal(LIBERO.decode(np.full((1, 7), -1)), LIBERO.decode(np.zeros((1, 7), int)))


def test_centres():
    centres = bin_centers(np.arange(255))
    assert centres[0] == pytest.approx(-0.99607843, abs=1e-8)
    assert centres[254] == pytest.approx(0.99607843, abs=1e-8)
    assert centres[127] == 0
    assert np.allclose(np.diff(centres), 2 / 255, rtol=0, atol=1e-15)
    assert digitize(centres).tolist() == list(range(255))


# -------------------------------------------------------------------- round trips


@settings(max_examples=300, deadline=None)
@given(unit=arrays(np.float64, (3, 7), elements=st.floats(0, 1)))
def test_decode_undoes_encode_within_half_a_bin(unit):
    actions = LOW + unit * (HIGH - LOW)
    error = np.abs(LIBERO.decode(encode_silently(LIBERO, actions)) - actions)
    assert (error <= HALF_BINS + 1e-8).all()


@st.composite
def embodiments_with_actions(draw):
    dim = draw(st.integers(1, 16))
    low = draw(arrays(np.float64, dim, elements=st.floats(-1e3, 1e3)))
    width = draw(arrays(np.float64, dim, elements=st.floats(1e-3, 1e3)))
    unit = draw(arrays(np.float64, (draw(st.integers(1, 5)), dim), elements=st.floats(-0.5, 1.5)))
    return Embodiment("robot", low=low, high=low + width), low + unit * width


@settings(max_examples=300, deadline=None)
@given(embodiments_with_actions())
def test_any_range_any_action(case):
    """Bins are in range, ordered as the values are, and decode to the clipped action within half a bin."""
    embodiment, actions = case
    low, high = np.array(embodiment.low), np.array(embodiment.high)
    bins = encode_silently(embodiment, actions)
    assert bins.shape == actions.shape and bins.min() >= 0 and bins.max() <= 255
    order = np.argsort(actions, axis=0)
    assert (np.diff(np.take_along_axis(bins, order, axis=0), axis=0) >= 0).all()
    half_bin = (high - low + 1e-8) / 255 / 2
    decoded = embodiment.decode(bins)
    assert (np.abs(decoded - np.clip(actions, low, high)) <= half_bin + 1e-8).all()
    # a decoded action is a fixed point: bin 255 has no centre of its own
    assert np.array_equal(encode_silently(embodiment, decoded), np.minimum(bins, 254))


def test_normalize_and_denormalize_are_inverse():
    actions = np.random.default_rng(0).uniform(LOW, HIGH, (50, 7))
    assert np.allclose(denormalize(normalize(actions, LOW, HIGH), LOW, HIGH), actions, rtol=0, atol=1e-15)


def test_a_constant_dimension_survives():
    embodiment = Embodiment("fixed", low=(0.3,), high=(0.3,))
    assert np.allclose(embodiment.decode(embodiment.encode([[0.3]])), 0.3, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_of_any_type(dtype):
    action = torch.tensor([[0, 0, 0, 0, 0, 0, -1]]).to(dtype)
    expected = [[127, 127, 127, 118, 127, 127, 0]]
    assert LIBERO.encode(action).tolist() == expected
    assert LIBERO.encode([action[0]]).tolist() == expected


def test_decoding_keeps_leading_dimensions():
    assert LIBERO.decode(np.zeros((2, 5, 7), int)).shape == (2, 5, 7)
    assert LIBERO.decode(np.zeros(7, int)).dtype == np.float64


# -------------------------------------------------------------------- warnings and errors


def test_the_warning_names_dimensions_and_ranges():
    action = np.zeros((2, 7))
    action[1, 0], action[0, 6] = 2, -1.5
    with pytest.warns(UserWarning, match=r"'libero' are clipped: x \[-0.9375, 0.9375\], gripper \[-1, 1\]"):
        LIBERO.encode(action)


def test_float32_noise_at_the_ends_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LIBERO.encode(np.stack([LOW, HIGH]).astype(np.float32))[0].tolist() == [0] * 7


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((1, 6)), r"shape \(N, 7\) with N >= 1, not \(1, 6\)"),
        (np.zeros(7), r"not \(7,\)"),
        (np.zeros((0, 7)), r"not \(0, 7\)"),
        (np.zeros((1, 1, 7)), r"not \(1, 1, 7\)"),
        (np.full((2, 7), np.nan), "action 0 is nan in dimension x"),
        ([[0] * 7, [0, 0, 0, 0, 0, 0, float("-inf")]], "action 1 is -inf in dimension gripper"),
        ([[0] * 7, [0] * 6], "nested lists of equal length"),
        ("forward", "actions are numbers"),
        ([[None] * 7], "actions are numbers"),
        ([["0"] * 7], "actions are numbers"),
    ],
)
def test_bad_actions_get_one_clear_line(actions, message):
    with pytest.raises(ValueError, match=message) as error:
        LIBERO.encode(actions)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bins", [np.zeros((1, 6), int), np.array(3)])
def test_decoding_another_dimension_raises(bins):
    with pytest.raises(ValueError, match="an action of embodiment 'libero' has 7 bins"):
        LIBERO.decode(bins)


# -------------------------------------------------------------------- embodiments


def test_the_published_embodiment():
    assert EMBODIMENTS["libero"] is LIBERO
    assert LIBERO.low == (-0.9375, -0.9375, -0.9375, -0.32571429, -0.375, -0.375, -1.0)
    assert LIBERO.high == (0.9375, 0.9375, 0.9375, 0.375, 0.375, 0.375, 1.0)
    assert LIBERO.action_names == ("x", "y", "z", "rx", "ry", "rz", "gripper")
    assert LIBERO.gripper == {"index": 6, "open": -1.0, "close": 1.0}
    assert (LIBERO.rotation, LIBERO.control_hz, LIBERO.semantics) == (180, 20.0, "delta")
    assert (LIBERO.cameras, LIBERO.raw_cameras) == (("image",), ("agentview",))
    assert (LIBERO.action_dim, LIBERO.num_cameras) == (7, 1)
    assert len(LIBERO.units) == 7


def test_an_embodiment_survives_json():
    stored = json.loads(json.dumps(LIBERO.to_dict()))
    assert Embodiment.from_dict(stored) == LIBERO
    assert Embodiment.from_dict(stored).describe() == "libero (D=7)"


def test_ranges_may_be_arrays():
    embodiment = Embodiment("arm", low=np.zeros(3, np.float32), high=torch.ones(3), cameras=["front", "wrist"])
    assert embodiment.low == (0.0, 0.0, 0.0) and embodiment.high == (1.0, 1.0, 1.0)
    assert embodiment.num_cameras == 2
    json.dumps(embodiment.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": [0.0]}, "one number for each dimension, not 1 and 7"),
        ({"low": [], "high": []}, "not 0 and 0"),
        ({"low": [2.0] * 7}, "low is not above high"),
        ({"high": [float("inf")] * 7}, "finite"),
        ({"low": 3}, "low is a list, not 3"),
        ({"action_names": ["x"]}, "action_names has 7 entries or none, not 1"),
        ({"units": ["m"] * 8}, "units has 7 entries or none, not 8"),
        ({"cameras": "image"}, "cameras is a list, not 'image'"),
        ({"cameras": []}, "one or more different names"),
        ({"cameras": ["image", "image"]}, "one or more different names"),
        ({"raw_cameras": ["a", "b"]}, "raw_cameras has 1 entries or none, not 2"),
        ({"semantics": "relative"}, "one of delta, absolute, not 'relative'"),
        ({"rotation": 45}, "rotation is one of"),
        ({"control_hz": 0}, "control_hz is a number above 0"),
        ({"gripper": {"index": 6}}, "index, open and close, not \\['index'\\]"),
        ({"gripper": {"index": 7, "open": 0, "close": 1}}, "gripper index 7 is no dimension of 7"),
        ({"colour": "blue"}, "no field 'colour': the fields are name, low, high"),
    ],
)
def test_a_wrong_embodiment_gets_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Embodiment.from_dict({**LIBERO.to_dict(), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["name", "low", "high"])
def test_an_embodiment_needs_a_name_and_ranges(field):
    values = {key: value for key, value in LIBERO.to_dict().items() if key != field}
    with pytest.raises(ValueError, match=f"needs the field '{field}'"):
        Embodiment.from_dict(values)
