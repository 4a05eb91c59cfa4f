"""Reads every frame and every row of a dataset and reports all that is corrupt, truncated, mismatched or missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from .episodes import Episode, EpisodeError
from .loading import open_episodes

Result = TypeVar("Result")


@dataclass
class ScanReport:
    """What a scan has found. `problems` is in reading order; each names file and episode."""

    source: str
    num_episodes: int = 0
    num_frames: int = 0  # pictures decoded, over all cameras
    problems: list[EpisodeError] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def bad_episodes(self) -> list[int]:
        """Episodes with a problem of their own."""
        return sorted({problem.episode for problem in self.problems if problem.episode is not None})

    def add(self, problem: EpisodeError) -> None:
        """Record a problem once; damage to a file shows in every way of reading it."""
        if str(problem) not in map(str, self.problems):
            self.problems.append(problem)

    def attempt(self, read: Callable[..., Result], *arguments: object) -> Result | None:
        """Call `read`, record its EpisodeError if it raises one."""
        try:
            return read(*arguments)
        except EpisodeError as error:
            self.add(error)
            return None

    def __str__(self) -> str:
        verdict = "no problem" if self.ok else f"{len(self.problems)} problems"
        head = f"{self.source}: {self.num_episodes} episodes, {self.num_frames} pictures read, {verdict}"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


def scan_episodes(
    path_or_repo: str | Path,
    revision: str | None = None,
    cameras: str | Sequence[str] | None = None,
    on_episode: Callable[[int, int], None] | None = None,
) -> ScanReport:
    """Read a whole dataset. `on_episode(done, total)` is called after each episode.

    Arguments as `load_episodes`; repositories are fetched file by file. Raises only for what makes looking impossible:
    a path that does not exist or a camera that the dataset lacks.
    """
    report = ScanReport(str(path_or_repo))
    try:
        dataset = open_episodes(path_or_repo, revision, cameras, streaming=True)
    except EpisodeError as error:
        report.add(error)
        return report
    for problem in dataset.problems():
        report.add(problem)
    width = None
    for episode in dataset:
        actions = _scan_episode(episode, report, dataset.source)
        if actions is not None:
            width = width or actions.shape[1]
            if actions.shape[1] != width:
                reason = f"actions have {actions.shape[1]} values, those of earlier episodes {width}"
                report.add(EpisodeError(reason, dataset.source, episode.index))
        if on_episode is not None:
            on_episode(report.num_episodes, len(dataset))
    return report


def _scan_episode(episode: Episode, report: ScanReport, source: str) -> np.ndarray | None:
    """Read each part of an episode on its own, so that one damage does not hide another. Returns the actions."""
    report.num_episodes += 1
    if len(episode) == 0:
        if episode.index not in report.bad_episodes:
            report.add(EpisodeError("holds no step", source, episode.index))
        return None
    actions = report.attempt(getattr, episode, "actions")
    for part in ("state", "success"):
        report.attempt(getattr, episode, part)
    for problem in report.attempt(episode.problems) or []:
        report.add(problem)
    for camera in episode.cameras:
        frames = report.attempt(episode.frames, camera)
        report.num_frames += 0 if frames is None else len(frames)
    return actions
