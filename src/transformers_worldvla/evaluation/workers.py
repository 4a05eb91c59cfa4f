"""Environments in processes of their own: one environment, one episode at a time in each.

The parent gives out jobs and hears back; it never waits for one worker in particular. A worker that plays with
`frames` asks the parent for every chunk of actions, the other policies act inside it. An exception in a worker, and
the death of one, become the result of the episode that it was playing: the others go on.

Workers are spawned, not forked: OpenGL contexts and threads of the parent do not survive a fork.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..registration import SIMULATOR_PROCESS
from .rollout import EnvironmentSpec, ExpertPolicy, FramePolicy, Outcome, Policy, StillPolicy, play

POLICIES = ("frames", "expert", "noop")
_QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """An episode to play. `policy` is one of `POLICIES`; `frames` looks through `cameras`, at `history` time steps."""

    spec: EnvironmentSpec
    trial: int
    seed: int
    budget: int
    policy: str
    cameras: tuple[str, ...] = ()
    history: int = 1


@dataclass(frozen=True)
class Film:
    """Play the last episode's actions again, this time drawing every `stride`-th step, into an mp4 or gif file."""

    path: Path
    camera: str
    stride: int
    fps: float
    caption: str = ""


@dataclass(frozen=True)
class Query:
    """A worker waits for a chunk. `frames` (n, C, H, W, 3) are new since its last query; `begins` a new episode."""

    frames: np.ndarray
    begins: bool


@dataclass(frozen=True)
class Played:
    """An episode is over. Without an `error`, `success` says how; `steps` were carried out in any case. `about` is what
    the environment says about itself, empty when it could not be opened."""

    success: bool | None
    steps: int
    error: str | None
    about: dict[str, Any]
    opening_seconds: float = 0.0  # of the simulator, before the episode began


@dataclass(frozen=True)
class Filmed:
    """A film is written, or could not be."""

    path: Path
    error: str | None


class WorkerPool:
    """A fixed number of workers. Use as a context manager."""

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"there is at least one worker, not {size}")
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._spawn() for _ in range(size)]

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def send(self, worker: int, message: Job | Film | np.ndarray) -> None:
        """Give a worker a job, or the chunk (K, D) that it waits for. One that has died says so in `receive`."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._workers[worker][1].send(message)

    def receive(self, timeout: float | None) -> Iterator[tuple[int, Query | Played | Filmed]]:
        """What workers have said, after waiting for the first to say something; nothing after `timeout` seconds.

        A worker that died is replaced, and its episode reported as one that was not finished.
        """
        ready = wait([connection for _, connection in self._workers], timeout)
        for number, (_, connection) in enumerate(list(self._workers)):
            if connection not in ready:
                continue
            try:
                yield number, connection.recv()
            except (EOFError, ConnectionResetError):
                yield number, self._bury(number)

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for _, connection in self._workers:
            with suppress(OSError):
                connection.send(None)
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()

    def _spawn(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), name=SIMULATOR_PROCESS, daemon=True)
        with _environment(_QUIET):
            process.start()
        theirs.close()
        return process, ours

    def _bury(self, number: int) -> Played:
        process, connection = self._workers[number]
        process.join()
        connection.close()
        self._workers[number] = self._spawn()
        code = process.exitcode
        reason = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return Played(None, 0, f"the simulator's process died: {reason}", {})


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# -------------------------------------------------------------------- in the worker


def _work(connection: Connection) -> None:
    """Serve the parent until it says None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    bench = _Bench(connection)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (job := connection.recv()) is not None:
            connection.send(bench.play(job) if isinstance(job, Job) else bench.film(job))
    bench.close()


class _Bench:
    """Holds the environment that was opened last, and the episode that was played last."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._spec: EnvironmentSpec | None = None
        self._environment: Any = None
        self._about: dict[str, Any] = {}
        self._job: Job | None = None
        self._outcome = Outcome()

    def play(self, job: Job) -> Played:
        self._job, self._outcome, error = job, Outcome(), None
        began = opened = time.perf_counter()
        try:
            self._open(job)
            opened = time.perf_counter()
            self._environment.start(job.trial, job.seed)
            play(self._environment, self._policy(job), job.budget, self._outcome)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as problem:  # whatever it is: this episode crashed, and the report says so
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
            self.close()
        outcome = self._outcome
        success = None if error else outcome.success
        return Played(success, len(outcome.actions), error, self._about, opened - began)

    def film(self, film: Film) -> Filmed:
        from .videos import write_video

        try:
            assert self._job is not None
            self._environment.start(self._job.trial, self._job.seed)
            frames = [self._environment.render(film.camera)]
            actions = self._outcome.actions
            for number, action in enumerate(actions, start=1):
                success = self._environment.step(action)
                if number % film.stride == 0 or number == len(actions):
                    frames.append(self._environment.render(film.camera))
            if success != self._outcome.success:
                raise RuntimeError("the episode went another way when its actions were carried out again")
            write_video(frames, film.path, film.fps, film.caption)
        except Exception as problem:
            return Filmed(film.path, f"{type(problem).__name__}: {' '.join(str(problem).split())}")
        return Filmed(film.path, None)

    def _open(self, job: Job) -> None:
        if job.spec == self._spec and self._environment is not None:
            return
        self.close()
        self._about = {}
        self._environment, self._spec = job.spec.open(), job.spec
        self._about = self._environment.describe(looks=job.policy == "frames")

    def close(self) -> None:
        environment, self._environment, self._spec = self._environment, None, None
        if environment is not None:
            environment.close()

    def _policy(self, job: Job) -> Policy:
        if job.policy == "expert":
            return ExpertPolicy()
        if job.policy == "noop":
            return StillPolicy()
        return FramePolicy(self._ask, job.cameras, job.history)

    def _ask(self, frames: np.ndarray, begins: bool) -> np.ndarray:
        self._connection.send(Query(frames, begins))
        chunk: np.ndarray = self._connection.recv()
        if chunk is None:
            raise EOFError
        return chunk
