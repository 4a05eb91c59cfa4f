"""Many closed-loop episodes: given out to workers, answered by a model, kept in a result folder.

`run_episodes` knows neither LIBERO nor a checkpoint; the commands `worldvla evaluate libero` and `gym` put together
what it needs.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .policies import ModelPlanner, PlanRequest
from .results import ResultFolder
from .rollout import EnvironmentSpec, episode_seed
from .workers import Film, Filmed, Job, Played, Query, WorkerPool

GATHER_SECONDS = 0.05  # how long a batch that is not full waits for one more query


@dataclass(frozen=True)
class Episode:
    """One episode that is to be run. `budget`: steps it may take."""

    spec: EnvironmentSpec
    suite: str
    task: int
    trial: int
    instruction: str
    budget: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.suite, self.task, self.trial


@dataclass(frozen=True)
class Filming:
    """Which episodes are drawn again as videos: at most so many a task."""

    failures: int = 1
    successes: int = 0
    camera: str = "agentview"
    suffix: str = ".mp4"
    stride: int = 2
    fps: float = 10.0


@dataclass
class Speed:
    """Where the time went."""

    workers: int
    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    episodes: int = 0
    opening_seconds: float = 0.0
    model_seconds: float = 0.0
    queries: int = 0
    model_calls: int = 0

    def report(self) -> dict[str, Any]:
        """Numbers of the episodes that ran now; those of an earlier run of the same folder have no part in them."""
        wall = time.perf_counter() - self.began
        opening = self.opening_seconds / self.workers
        return {
            "workers": self.workers,
            "episodes": self.episodes,
            "wall_seconds": wall,
            "opening_seconds": opening,  # mean of the workers: simulators being built
            "env_steps": self.steps,
            "env_steps_per_second": self.steps / max(wall - opening, 1e-9),
            "model_seconds": self.model_seconds,
            "model_share": self.model_seconds / wall,
            "model_calls": self.model_calls,
            "queries": self.queries,
        }


def run_episodes(
    episodes: Sequence[Episode],
    results: ResultFolder,
    common: Mapping[str, Any],
    seed: int,
    policy: str,
    planner: ModelPlanner | None = None,
    cameras: tuple[str, ...] = (),
    workers: int = 1,
    filming: Filming | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the episodes that `results` does not have yet, and return where the time went.

    Args:
        common: what is the same in every row of the result.
        policy: `expert`, `noop`, or `frames`, which needs a `planner` and what the environment calls its cameras.
    """
    runner = _Runner(episodes, results, common, seed, policy, planner, cameras, filming)
    if not runner.waiting:
        return Speed(workers).report()
    with (
        WorkerPool(min(workers, len(runner.waiting))) as pool,
        tqdm(
            total=len(episodes),
            initial=len(episodes) - len(runner.waiting),
            desc="episodes",
            disable=not progress,
            smoothing=0,
        ) as bar,
    ):
        speed = runner.run(pool, bar)
    results.finish()
    return speed.report()


class _Runner:
    """The state of one run: who plays what, and who waits for an answer."""

    def __init__(
        self,
        episodes: Sequence[Episode],
        results: ResultFolder,
        common: Mapping[str, Any],
        seed: int,
        policy: str,
        planner: ModelPlanner | None,
        cameras: tuple[str, ...],
        filming: Filming | None,
    ):
        self.waiting = [episode for episode in episodes if not results.is_done(episode.key)]
        self._results, self._common, self._seed = results, dict(common), seed
        self._policy, self._planner, self._cameras, self._filming = policy, planner, cameras, filming
        self._playing: dict[int, Episode] = {}
        self._queries: dict[int, Query] = {}
        self._last_spec: dict[int, EnvironmentSpec] = {}
        self._filmed: Counter[tuple[str, int, bool]] = Counter()
        self._warned: set[str] = set()
        self._films: set[int] = set()  # workers that draw a video

    def run(self, pool: WorkerPool, bar: Any) -> Speed:
        self._bar, self._pool, self._speed = bar, pool, Speed(len(pool))
        for worker in range(len(pool)):
            self._start_next(worker)
        while self._playing:
            heard = False
            timeout = GATHER_SECONDS if self._queries else None
            for worker, message in pool.receive(timeout):
                heard = True
                if isinstance(message, Query):
                    self._queries[worker] = message
                elif isinstance(message, Filmed) or worker in self._films:
                    self._end_film(worker, message)
                else:
                    self._queries.pop(worker, None)
                    self._end(worker, message)
            if self._queries and (not heard or len(self._queries) >= self._full_batch()):
                self._answer()
        return self._speed

    def _full_batch(self) -> int:
        assert self._planner is not None
        return min(self._planner.batch_size, len(self._playing))

    def _start_next(self, worker: int) -> None:
        """Give a worker its next episode: of the task that it has open, else of one that nobody has."""
        if not self.waiting:
            return
        own, taken = self._last_spec.get(worker), set(self._last_spec.values())
        order = (
            [episode for episode in self.waiting if episode.spec == own]
            or [episode for episode in self.waiting if episode.spec not in taken]
            or self.waiting
        )
        episode = order[0]
        self.waiting.remove(episode)
        self._playing[worker], self._last_spec[worker] = episode, episode.spec
        self._pool.send(
            worker,
            Job(
                spec=episode.spec,
                trial=episode.trial,
                seed=self._episode_seed(episode),
                budget=episode.budget,
                policy=self._policy,
                cameras=self._cameras,
                history=1 if self._planner is None else self._planner.processor.history,
            ),
        )

    def _episode_seed(self, episode: Episode) -> int:
        return episode_seed(self._seed, *episode.key)

    def _answer(self) -> None:
        """One call of the model for the queries that fit into a batch."""
        assert self._planner is not None
        batch = list(self._queries.items())[: self._planner.batch_size]
        requests = []
        for worker, query in batch:
            del self._queries[worker]
            episode = self._playing[worker]
            if query.begins:
                self._save_view(episode, query.frames[0, 0])
            seed = self._episode_seed(episode)
            requests.append(
                PlanRequest(episode.key, episode.suite, episode.instruction, query.frames, query.begins, seed)
            )
        began = time.perf_counter()
        chunks = self._planner.plan(requests)
        self._speed.model_seconds += time.perf_counter() - began
        self._speed.model_calls += 1
        self._speed.queries += len(requests)
        for (worker, _), chunk in zip(batch, chunks, strict=True):
            self._pool.send(worker, chunk)

    def _save_view(self, episode: Episode, frame: np.ndarray) -> None:
        """Keep the first picture of a task as the model sees it: a wrong orientation shows at a glance."""
        assert self._planner is not None
        path = self._results.folder / "views" / f"{_file_name(episode, with_trial=False)}.png"
        if not path.exists():
            from .open_loop import crop_for_model

            path.parent.mkdir(exist_ok=True)
            Image.fromarray(crop_for_model(self._planner.processor, frame)).save(path)

    def _end(self, worker: int, played: Played) -> None:
        episode = self._playing[worker]
        if self._planner is not None:
            self._planner.forget(episode.key)
        if not played.about:
            self._last_spec.pop(worker, None)
        about = dict(played.about)
        if (warning := about.pop("warning", None)) and warning not in self._warned:
            self._warned.add(warning)
            self._bar.write(f"warning: {warning}", sys.stderr)
        row = {
            **self._common,
            "suite": episode.suite,
            "task": episode.task,
            "trial": episode.trial,
            "instruction": episode.instruction,
            "success": played.success,
            "steps": played.steps,
            "seed": self._seed,
            "episode_seed": self._episode_seed(episode),
            **about,
            "versions": {**self._common.get("versions", {}), **about.get("versions", {})},
        }
        if played.error is not None:
            row["error"] = played.error
            name = f"{episode.suite} task {episode.task} trial {episode.trial}"
            self._bar.write(f"{name} crashed: {played.error}", sys.stderr)
        self._results.add(row)
        self._speed.steps += played.steps
        self._speed.opening_seconds += played.opening_seconds
        self._speed.episodes += 1
        self._bar.update()
        self._bar.set_postfix_str(self._score(), refresh=False)
        if not self._start_film(worker, episode, played):
            del self._playing[worker]
            self._start_next(worker)

    def _score(self) -> str:
        outcomes = [row["success"] for row in self._results.rows.values() if row["success"] is not None]
        return f"{sum(outcomes)} of {len(outcomes)} solved"

    def _start_film(self, worker: int, episode: Episode, played: Played) -> bool:
        filming = self._filming
        if filming is None or played.success is None:
            return False
        limit = filming.successes if played.success else filming.failures
        counted = (episode.suite, episode.task, played.success)
        if self._filmed[counted] >= limit:
            return False
        self._filmed[counted] += 1
        outcome = "success" if played.success else "failure"
        path = self._results.folder / "videos" / f"{_file_name(episode)}_{outcome}{filming.suffix}"
        caption = f"{self._common.get('model', self._policy)}: {episode.instruction}"
        self._films.add(worker)
        self._pool.send(worker, Film(path, filming.camera, filming.stride, filming.fps, caption))
        return True

    def _end_film(self, worker: int, filmed: Filmed | Played) -> None:
        """A video is written, or its worker could not do it; the episode is in the result already."""
        if filmed.error is not None:
            self._bar.write(f"no video of {_file_name(self._playing[worker])}: {filmed.error}", sys.stderr)
        self._films.remove(worker)
        del self._playing[worker]
        self._start_next(worker)


def _file_name(episode: Episode, with_trial: bool = True) -> str:
    suite = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in episode.suite)
    return f"{suite}_{episode.task}" + (f"_{episode.trial}" if with_trial else "")


def videos_in(folder: Path) -> list[Path]:
    """The videos of a result folder."""
    return sorted((folder / "videos").glob("*_*.*"))
