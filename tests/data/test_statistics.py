"""Action statistics against NumPy, the flags and what they do to the ranges, and the embodiment that comes of them."""

import warnings

import numpy as np
import pytest
from robot_folder import NAMES, write_recordings

from transformers_worldvla.action_tokenization_worldvla import LIBERO, Embodiment
from transformers_worldvla.data import action_statistics, build_embodiment, load_episodes

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(1000, 3)).astype(np.float32)


def kinds(statistics):
    return {flag.name: flag.kind for flag in statistics.flags}


def robot(statistics):
    low, high = statistics.ranges
    return Embodiment("toy", low=low, high=high)


@pytest.mark.parametrize("method", ["minmax", "quantile"])
def test_numbers_are_numpys(method):
    statistics = action_statistics([ROWS[:300], ROWS[300:301], ROWS[301:]], method)
    rows = ROWS.astype(np.float64)
    assert statistics.count == 1000
    for name, expected in {
        "minimum": rows.min(0),
        "maximum": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "q01": np.percentile(rows, 1, axis=0),
        "q99": np.percentile(rows, 99, axis=0),
    }.items():
        assert np.allclose(getattr(statistics, name), expected, rtol=1e-12, atol=0), name
    expected = (rows.min(0), rows.max(0)) if method == "minmax" else np.percentile(rows, [1, 99], axis=0)
    assert np.allclose(statistics.ranges, expected)
    assert not statistics.flags


def test_min_and_max_clip_nothing_that_was_seen():
    statistics = action_statistics([ROWS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robot(statistics).encode(ROWS)


@pytest.mark.parametrize("value", [0.0, 0.3, -1000.0])
@pytest.mark.parametrize("method", ["minmax", "quantile"])
def test_a_constant_dimension_is_masked(method, value):
    """Whatever bin the model chooses, the robot is told the value it was always told."""
    rows = ROWS.copy()
    rows[:, 1] = value
    statistics = action_statistics([rows], method)
    assert kinds(statistics) == {"1": "constant"}
    assert "masked" in str(statistics.flags[0])
    bins = np.tile(np.arange(256)[:, None], (1, 3))
    assert np.allclose(robot(statistics).decode(bins)[:, 1], value, rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantiles clip the others
        assert len(set(robot(statistics).encode(rows)[:, 1].tolist())) == 1


def test_noise_does_not_fill_the_range():
    rows = ROWS.copy()
    rows[:, 2] = 0.5 + 1e-6 * RNG.uniform(-1, 1, 1000)
    statistics = action_statistics([rows])
    assert kinds(statistics) == {"2": "near-constant"}
    low, high = statistics.ranges
    assert high[2] - low[2] == pytest.approx(1e-3 * np.median(np.ptp(rows[:, :2], axis=0)), rel=1e-5)
    assert len(set(robot(statistics).encode(rows)[:, 2].tolist())) <= 2
    assert f"range widened to {high[2] - low[2]:.3g}" in str(statistics.flags[0])


@pytest.mark.parametrize("method", ["minmax", "quantile"])
def test_a_gripper_that_rarely_opens_keeps_its_range(method):
    """Its quantiles coincide: as a range they would make it a constant."""
    rows = ROWS.copy()
    rows[:, 0] = -1.0
    rows[17:22, 0] = 1.0
    statistics = action_statistics([rows], method, ("gripper", "x", "y"))
    assert kinds(statistics) == {"gripper": "rarely moves"}
    low, high = statistics.ranges
    assert (low[0], high[0]) == (-1.0, 1.0)


def test_outliers_are_reported_with_what_they_cost():
    rows = ROWS.copy()
    rows[5, 1] = 100.0
    by_range, by_quantile = action_statistics([rows]), action_statistics([rows], "quantile")
    assert kinds(by_range) == kinds(by_quantile) == {"1": "outliers"}
    times = np.ptp(rows[:, 1]) / np.ptp(np.percentile(rows[:, 1], [1, 99]))
    assert f"quantile ranges would make bins {times:.1f} times finer" in str(by_range.flags[0])
    assert "2.00% of the steps are clipped" in str(by_quantile.flags[0])
    assert by_range.ranges[1][1] == 100.0 and by_quantile.ranges[1][1] < 4


def test_a_robot_that_never_moves():
    statistics = action_statistics([np.full((4, 2), 0.25)])
    assert kinds(statistics) == {"0": "constant", "1": "constant"}
    assert np.allclose(robot(statistics).decode(np.full((1, 2), 255)), 0.25)


def test_the_table_has_a_row_a_dimension():
    lines = str(action_statistics([ROWS], names=NAMES)).splitlines()
    assert lines[0] == "actions, 1000 steps, ranges by minmax"
    assert [line.split()[0] for line in lines[2:]] == list(NAMES)


def test_wrong_options():
    with pytest.raises(ValueError, match="statistics are one of minmax, quantile, not 'mean'"):
        action_statistics([ROWS], "mean")
    with pytest.raises(ValueError, match="at least one action"):
        action_statistics([np.zeros((0, 3))])


# -------------------------------------------------------------------- the embodiment


def test_the_embodiment_says_what_the_dataset_says(tmp_path):
    dataset = load_episodes(write_recordings(tmp_path / "My robot.v2"))
    rows = np.concatenate([episode.actions for episode in dataset])
    statistics = action_statistics([rows], names=dataset.action_names)
    built = build_embodiment(dataset, statistics, ("wrist", "image"), semantics="absolute")
    assert built.name == "my_robot_v2"
    assert built.dataset == f"My robot.v2, minmax of {len(rows)} steps"
    assert np.array_equal([built.low, built.high], [rows.min(0), rows.max(0)])
    assert (built.action_names, built.cameras, built.control_hz) == (NAMES, ("wrist", "image"), 10)
    assert (built.semantics, built.gripper, built.rotation) == ("absolute", None, 0)
    assert Embodiment.from_dict(built.to_dict()) == built


def test_a_template_says_what_the_dataset_does_not(libero):
    dataset = load_episodes(libero / "libero_hdf5", cameras="agentview_rgb")
    statistics = action_statistics([dataset[0].actions], "quantile")
    built = build_embodiment(dataset, statistics, dataset.cameras, name="goal", template=LIBERO)
    assert (built.name, built.cameras, built.raw_cameras) == ("goal", ("agentview_rgb",), ())
    for field in ("action_names", "units", "semantics", "gripper", "rotation", "control_hz"):
        assert getattr(built, field) == getattr(LIBERO, field)
    assert np.array_equal([built.low, built.high], statistics.ranges)
    kept = build_embodiment(dataset, None, ("image",), template=LIBERO)
    assert kept == LIBERO


def test_embodiments_that_cannot_be_built(tmp_path):
    dataset = load_episodes(write_recordings(tmp_path, steps=(3,)))
    with pytest.raises(ValueError, match=r"libero \(D=7\) is no template for actions of 3 dimensions"):
        build_embodiment(dataset, action_statistics([dataset[0].actions]), ("image",), template=LIBERO)
    with pytest.raises(ValueError, match="without a template needs statistics"):
        build_embodiment(dataset, None, ("image",))
