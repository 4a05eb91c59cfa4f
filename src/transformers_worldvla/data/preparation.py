"""Which episodes and which of their steps are worth training on: the unsuccessful filter and the no-op filter.

It only chooses: the result names episodes and step numbers, frames and actions stay with the reader, and everything
left out is counted. Nothing here decodes a picture or knows a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .episodes import EpisodeDataset, EpisodeError

NO_OPS, UNSUCCESSFUL = ("authors", "keep"), ("drop", "keep")
NO_OP_NORM = 1e-4  # authors' `regenerate_libero_dataset_filter_no_op.py`, as OpenVLA's


def moving_steps(actions: np.ndarray, gripper: int | None) -> np.ndarray:
    """Step numbers that are no no-ops: (T, D) delta actions -> (kept,) int64, ascending.

    The authors' rule: an action is a no-op when the L2 norm of all dimensions but the gripper is below 1e-4 and the
    gripper's command equals that of the last *kept* action; before any is kept, the norm alone decides. The comparison
    runs in float64, as theirs on HDF5 files. `gripper` is its dimension; without one (None) all dimensions count.

    They then replay what is left in the simulator and record new frames; here the recorded frames of the kept steps
    stay, so that the frame after a gap shows what the robot saw before its next action.
    """
    actions = np.asarray(actions, dtype=np.float64)
    motion = actions if gripper is None else np.delete(actions, gripper, axis=1)
    still = np.linalg.norm(motion, axis=1) < NO_OP_NORM
    kept: list[int] = []
    for step in range(len(actions)):
        same_grip = gripper is None or not kept or actions[step, gripper] == actions[kept[-1], gripper]
        if not (still[step] and same_grip):
            kept.append(step)
    return np.array(kept, dtype=np.int64)


def find_gripper(action_names: Sequence[str] | None) -> int | None:
    """The one dimension whose name has "gripper" in it; None when there is none, or several (two arms)."""
    found = [index for index, name in enumerate(action_names or ()) if "gripper" in name.lower()]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class PreparedEpisode:
    """An episode that stays: its place in the dataset and the numbers of the steps kept."""

    position: int
    steps: np.ndarray  # (kept,) int64, ascending
    length: int  # steps recorded

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Preparation:
    """The episodes that stay, and what was left out and why."""

    no_ops: str
    unsuccessful: str
    gripper: int | None
    episodes: list[PreparedEpisode] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)  # positions of episodes that say they did not succeed
    unknown_success: int = 0
    empty: list[int] = field(default_factory=list)  # positions of episodes that were nothing but no-ops

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.episodes))

    @property
    def dropped_steps(self) -> int:
        """No-ops left out of the episodes that stay."""
        return sum(episode.length - len(episode) for episode in self.episodes)

    def to_dict(self) -> dict[str, Any]:
        """Settings and counts, ready for JSON."""
        return {
            "no_ops": self.no_ops,
            "unsuccessful": self.unsuccessful,
            "gripper": self.gripper,
            "episodes": len(self.episodes),
            "steps": self.num_steps,
            "dropped_no_op_steps": self.dropped_steps,
            "dropped_empty_episodes": self.empty,
            "failed_episodes": self.failed,
            "episodes_without_success": self.unknown_success,
        }

    def __str__(self) -> str:
        verdict = "dropped" if self.unsuccessful == "drop" else "kept"
        total = self.num_steps + self.dropped_steps
        share = f" ({self.dropped_steps / total:.1%})" if total else ""
        no_ops = f"{self.dropped_steps} of {total} steps dropped{share}" if self.no_ops == "authors" else "kept"
        lines = [
            f"unsuccessful episodes: {len(self.failed)} {verdict}{_numbers(self.failed)}, "
            f"{self.unknown_success} that do not say kept",
            f"no-ops: {no_ops}",
        ]
        if self.empty:
            lines.append(f"episodes of nothing but no-ops: {len(self.empty)} dropped{_numbers(self.empty)}")
        return "\n".join([*lines, f"left: {len(self.episodes)} episodes, {self.num_steps} steps"])


def prepare_episodes(
    dataset: EpisodeDataset,
    no_ops: str = "authors",
    unsuccessful: str = "drop",
    gripper: int | None = None,
    on_episode: Callable[[int, int], object] | None = None,
) -> tuple[Preparation, list[np.ndarray]]:
    """Choose episodes and steps of a dataset by its actions and its word on success.

    Args:
        no_ops: `authors` drops them by `moving_steps` (meaningful for delta actions only), `keep` keeps every step.
        unsuccessful: `drop` or `keep` episodes that say they failed. Those that do not say are kept and counted.
        gripper: its dimension; None when the robot has none.
        on_episode: called with (done, total) after each episode.

    Returns:
        The choice, and the actions (kept, D) float32 of each episode that stays.

    Raises:
        EpisodeError: an episode cannot be read, has another D than the first, or nothing is left.
        ValueError: an option is unknown, or there is no such dimension as `gripper`.
    """
    for name, value, known in (("no_ops", no_ops, NO_OPS), ("unsuccessful", unsuccessful, UNSUCCESSFUL)):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
    result, actions = Preparation(no_ops, unsuccessful, gripper), list[np.ndarray]()
    width: int | None = None
    for position, episode in enumerate(dataset):
        rows, success = episode.actions, episode.success
        width = rows.shape[1] if width is None else width
        if rows.shape[1] != width:
            reason = f"actions have {rows.shape[1]} values, those of earlier episodes {width}"
            raise EpisodeError(reason, dataset.source, episode.index)
        if gripper is not None and not 0 <= gripper < width:
            raise ValueError(f"dimension {gripper} is no gripper: actions have the dimensions 0 to {width - 1}")
        if success is None:
            result.unknown_success += 1
        elif not success:
            result.failed.append(position)
        if success is not False or unsuccessful == "keep":
            steps = moving_steps(rows, gripper) if no_ops == "authors" else np.arange(len(rows))
            if len(steps) == 0:
                result.empty.append(position)
            else:
                result.episodes.append(PreparedEpisode(position, steps, len(rows)))
                actions.append(rows[steps])
        if on_episode is not None:
            on_episode(position + 1, len(dataset))
    if not result.episodes:
        raise EpisodeError(f"nothing is left to train on: {'; '.join(str(result).splitlines())}", dataset.source)
    return result, actions


def _numbers(positions: Sequence[int], most: int = 10) -> str:
    """Episode numbers in brackets, the first few of many."""
    if not positions:
        return ""
    more = ", ..." if len(positions) > most else ""
    return f" ({', '.join(map(str, positions[:most]))}{more})"
