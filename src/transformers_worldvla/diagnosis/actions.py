"""Do a dataset's actions fit the embodiment of a checkpoint: dimensions, ranges, bins, pauses, rate.

Numbers only: no picture is decoded and no model is asked. Thresholds are constants below, with what they mean.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..action_tokenization_worldvla import CLIP_TOLERANCE, RANGE_EPSILON, Embodiment, normalize
from ..data.episodes import EpisodeDataset
from ..data.preparation import moving_steps
from ..data.statistics import ActionStatistics, action_statistics
from ..tokens_worldvla import NUM_BINS
from .report import FAILED, OK, WARNING, Finding

CLIPPED = (0.001, 0.05)  # share of the steps outside a range: warning, failed
USED_BINS = (64, 8)  # of 255, between the 1 % and 99 % quantiles of a dimension that moves: warning, failed
QUANTISATION = (0.05, 0.25)  # RMS error of encoding and decoding, in standard deviations: warning, failed
IDLE = (0.05, 0.5)  # share of the steps that move nothing: warning, failed
SHIFT = (1.5, 4.0)  # distance of the means, in standard deviations of the training actions: warning, failed
TIGHT = 4.0  # times the motion of a dimension: in a range narrower than that its noise fills many bins
GRIPPER = 0.1  # of the distance from open to close
STATISTICS_FILE = "training_statistics.json"
_RANGES = "run `worldvla tokenize` on this dataset and fine-tune: the ranges are then its own"


def check_actions(dataset: EpisodeDataset, robot: Embodiment, checkpoint: Path) -> list[Finding]:
    """All checks of a dataset's actions; only `action dimensions` where these differ.

    `checkpoint` is the folder that may hold the statistics of the training actions. Raises EpisodeError for an episode
    that cannot be read.
    """
    episodes = [episode.actions for episode in dataset]
    dimensions = check_dimensions(dataset, robot, episodes)
    if dimensions.verdict == FAILED:
        return [dimensions]
    statistics = action_statistics(episodes, names=names_of(robot))
    rows = np.concatenate(episodes).astype(np.float64)  # (N, D)
    findings = [
        dimensions,
        check_ranges(rows, statistics, robot),
        check_quantisation(rows, statistics, robot),
        check_constant(statistics, robot),
        check_gripper(statistics, robot),
        check_idle(episodes, robot),
        check_statistics(statistics, checkpoint),
        check_rate(dataset, robot),
    ]
    return [finding for finding in findings if finding is not None]


def names_of(robot: Embodiment) -> tuple[str, ...]:
    """Names of the action dimensions; their numbers where there are none."""
    return robot.action_names or tuple(str(index) for index in range(robot.action_dim))


def check_dimensions(dataset: EpisodeDataset, robot: Embodiment, episodes: Sequence[np.ndarray]) -> Finding:
    """Number, names and order of the action dimensions."""
    widths = sorted({rows.shape[1] for rows in episodes})
    advice = "name the embodiment with --embodiment, or fine-tune on this dataset with `worldvla train`"
    if widths != [robot.action_dim]:
        found = f"the dataset has actions of {', '.join(map(str, widths))} values, {robot.name} {robot.action_dim}"
        return Finding("action dimensions", FAILED, found, advice)
    theirs, ours = dataset.action_names, robot.action_names
    if theirs and ours and tuple(theirs) != tuple(ours):
        found = f"the dataset calls them {', '.join(theirs)}, the checkpoint {', '.join(ours)}"
        if sorted(theirs) == sorted(ours):
            return Finding("action dimensions", FAILED, f"other order: {found}", "reorder the dataset's actions")
        return Finding("action dimensions", WARNING, found, "make sure that they mean the same, in the same order")
    return Finding("action dimensions", OK, f"{robot.action_dim}: {', '.join(names_of(robot))}")


def check_ranges(rows: np.ndarray, statistics: ActionStatistics, robot: Embodiment) -> Finding:
    """How many actions lie outside the ranges, and how much of the ranges they use."""
    low, high = np.array(robot.low), np.array(robot.high)
    outside = (np.abs(normalize(rows, low, high)) > 1.0 + CLIP_TOLERANCE) & (low < high)
    clipped = outside.mean(0)  # (D,)
    middle, moves = statistics.q99 - statistics.q01, statistics.q99 > statistics.q01
    used = np.where(moves, middle / (high - low + RANGE_EPSILON) * (NUM_BINS - 1), np.inf)
    names, numbers = names_of(robot), {"clipped": clipped, "used_bins": np.where(moves, used, np.nan)}
    verdict = _worst([_grade(clipped.max(), CLIPPED), _grade(-used.min(), tuple(-count for count in USED_BINS))])
    problems = [
        f"{names[d]} is clipped in {clipped[d]:.1%} of the steps "
        f"([{statistics.minimum[d]:g}, {statistics.maximum[d]:g}], range [{low[d]:g}, {high[d]:g}])"
        for d in np.flatnonzero(clipped > CLIPPED[0])
    ]
    problems += [f"{names[d]} uses {used[d]:.1f} of {NUM_BINS - 1} bins" for d in np.flatnonzero(used < USED_BINS[0])]
    if not problems:
        share, least = outside.any(1).mean(), "" if not moves.any() else f", each uses {used.min():.0f} bins or more"
        return Finding("action ranges", OK, f"{share:.2%} of the steps are clipped{least}", numbers=numbers)
    advice = f"other units or another robot? else {_RANGES}" if verdict == FAILED else f"fine if rare; else {_RANGES}"
    return Finding("action ranges", verdict, "; ".join(problems), advice, numbers)


def check_quantisation(rows: np.ndarray, statistics: ActionStatistics, robot: Embodiment) -> Finding:
    """What becomes of the actions when they are encoded and decoded again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clipping, which `action ranges` reports
        error = robot.decode(robot.encode(rows)) - rows  # (N, D)
    rms, largest = np.sqrt((error**2).mean(0)), np.abs(error).max(0)
    moves = statistics.std > 0
    relative = np.where(moves, rms / np.where(moves, statistics.std, 1.0), 0.0)
    worst = int(relative.argmax())
    numbers = {"rms": rms, "largest": largest, "rms_in_standard_deviations": relative}
    name = names_of(robot)[worst]
    found = (
        f"RMS error at most {relative[worst]:.2%} of a standard deviation ({name}: {rms[worst]:.3g}, at most "
        f"{largest[worst]:.3g})"
    )
    verdict = _grade(relative[worst], QUANTISATION)
    advice = "" if verdict == OK else f"the range is wide for what the data does in it: {_RANGES}"
    return Finding("quantisation", verdict, found, advice, numbers)


def check_constant(statistics: ActionStatistics, robot: Embodiment) -> Finding:
    """Dimensions that never or hardly move, and what their ranges make of it."""
    still = [flag for flag in statistics.flags if flag.kind in ("constant", "near-constant")]
    other = [flag for flag in statistics.flags if flag not in still]
    width = {flag.dimension: robot.high[flag.dimension] - robot.low[flag.dimension] for flag in still}
    motion = statistics.maximum - statistics.minimum
    amplified = [
        flag
        for flag in still
        if flag.kind == "near-constant" and 0 < width[flag.dimension] < TIGHT * motion[flag.dimension]
    ]
    numbers = {"flags": [str(flag) for flag in statistics.flags]}
    if amplified:
        found = "; ".join(f"{flag.name} {flag.found}, and so does its range" for flag in amplified)
        advice = "noise fills all bins of it: tokenize again (`worldvla tokenize` widens such ranges) and fine-tune"
        return Finding("constant dimensions", FAILED, found, advice, numbers)
    if free := [flag for flag in still if width[flag.dimension] > 0]:
        found = "; ".join(f"{flag.name} is {flag.kind} ({flag.found}), the checkpoint may move it" for flag in free)
        advice = "fine if other data moves it; else tokenize again: a range without width keeps it still"
        return Finding("constant dimensions", WARNING, found, advice, numbers)
    if other:
        found = "; ".join(f"{flag.name}: {flag.kind}, {flag.found}" for flag in other)
        advice = "`worldvla tokenize --statistics quantile` gives what is usual finer bins"
        return Finding("constant dimensions", WARNING, found, advice, numbers)
    return Finding("constant dimensions", OK, "every dimension that may move does", numbers=numbers)


def check_gripper(statistics: ActionStatistics, robot: Embodiment) -> Finding | None:
    """The gripper's commands are those that the embodiment calls open and close. None without a gripper."""
    if robot.gripper is None:
        return None
    index, ends = int(robot.gripper["index"]), sorted([robot.gripper["open"], robot.gripper["close"]])
    seen = [float(statistics.minimum[index]), float(statistics.maximum[index])]
    off = max(abs(a - b) for a, b in zip(seen, ends, strict=True))
    found = f"commands from {seen[0]:g} to {seen[1]:g}; the checkpoint knows {ends[0]:g} and {ends[1]:g}"
    if off <= GRIPPER * (ends[1] - ends[0]):
        return Finding("gripper", OK, found)
    if seen[0] == seen[1]:
        advice = "fine if these recordings never use the gripper"
        return Finding("gripper", WARNING, found, advice)
    advice = "map the dataset's gripper to these values: as it is, the robot will not close its hand"
    return Finding("gripper", FAILED, found, advice)


def check_idle(episodes: Sequence[np.ndarray], robot: Embodiment) -> Finding:
    """Steps that move nothing: the authors' no-op rule for deltas, a repeated target for absolute actions."""
    gripper = None if robot.gripper is None else int(robot.gripper["index"])
    total = sum(map(len, episodes))
    if robot.semantics == "delta":
        idle = total - sum(len(moving_steps(rows, gripper)) for rows in episodes)
        fix = "`worldvla tokenize --no-ops authors` drops them"
    else:
        idle = sum(int((np.abs(np.diff(rows, axis=0)) < CLIP_TOLERANCE).all(1).sum()) for rows in episodes)
        fix = "cut pauses out of the recordings"
    share = idle / total
    verdict = _grade(share, IDLE)
    advice = "" if verdict == OK else f"a policy learns to freeze from them: {fix}"
    return Finding(
        "idle frames", verdict, f"{idle} of {total} steps move nothing ({share:.1%})", advice, {"idle": idle}
    )


def check_statistics(statistics: ActionStatistics, checkpoint: Path) -> Finding | None:
    """Mean and spread of the actions beside those of the training data. None where the checkpoint does not say."""
    file = checkpoint / STATISTICS_FILE
    if not file.is_file():
        return None
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    mean, std = (np.asarray(document[f"action_{name}"], dtype=np.float64) for name in ("mean", "std"))
    if mean.shape != statistics.mean.shape:
        found = f"{STATISTICS_FILE} has {len(mean)} dimensions, the data {len(statistics.mean)}"
        return Finding(
            "action statistics", WARNING, found, "the statistics are of another robot: give its --embodiment"
        )
    moves = std > 0
    shift = np.where(moves, np.abs(statistics.mean - mean) / np.where(moves, std, 1.0), 0.0)
    ratio = np.where(moves, statistics.std / np.where(moves, std, 1.0), 1.0)
    worst = int(shift.argmax())
    numbers = {"shift": shift, "std_ratio": ratio}
    found = (
        f"means at most {shift[worst]:.2f} standard deviations from the training data's ({statistics.names[worst]}), "
        f"spread {ratio.min():.2f} to {ratio.max():.2f} times as wide"
    )
    verdict = _grade(shift[worst], SHIFT)
    advice = "" if verdict == OK else "other units, another controller or another task: compare before you deploy"
    return Finding("action statistics", verdict, found, advice, numbers)


def check_rate(dataset: EpisodeDataset, robot: Embodiment) -> Finding | None:
    """Frames a second beside the control rate. None where one is unknown."""
    if dataset.fps is None or robot.control_hz is None:
        return None
    found = f"recorded at {dataset.fps:g} fps, the checkpoint acts at {robot.control_hz:g} Hz"
    if abs(dataset.fps - robot.control_hz) <= 0.05 * robot.control_hz:
        return Finding("control rate", OK, found)
    advice = "delta actions of another rate move another distance; for simulators the declared fps is often wrong"
    return Finding("control rate", WARNING, found, advice)


def _grade(value: float, limits: tuple[float, ...]) -> str:
    """`ok` up to the first limit, `warning` up to the second, else `failed`."""
    return OK if value <= limits[0] else WARNING if value <= limits[1] else FAILED


def _worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=(OK, WARNING, FAILED).index)
