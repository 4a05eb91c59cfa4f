"""Requests of several robots, answered together: one thread runs the model on whatever has come in meanwhile.

It knows neither sockets nor policies. A request that fails does so alone: when a batch raises, its requests are asked
one by one.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Overloaded(Exception):
    """Too many requests wait already."""


class RequestBatcher(Generic[Request, Answer]):
    """Collects requests into batches.

    Args:
        answer: what is asked; a list of requests -> a list of answers in the same order.
        max_batch: requests answered together.
        max_wait: seconds that a request waits for others to join it. 0 takes what has come in while the model was busy.
        max_pending: requests that may wait; `submit` raises `Overloaded` beyond.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], list[Answer]],
        max_batch: int = 8,
        max_wait: float = 0.0,
        max_pending: int = 64,
        on_batch: Callable[[int], None] = lambda size: None,
    ):
        self._answer = answer
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._on_batch = on_batch
        self._queue: queue.Queue[tuple[Request, Future[Answer]] | None] = queue.Queue()
        self._max_pending = max_pending
        self._thread = threading.Thread(target=self._work, name="worldvla-batches", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait, about."""
        return self._queue.qsize()

    def submit(self, request: Request) -> "Future[Answer]":
        """Ask; a future that is cancelled while it waits is never run."""
        if self._queue.qsize() >= self._max_pending:
            raise Overloaded(f"{self._max_pending} requests wait already: try again later")
        future: Future[Answer] = Future()
        self._queue.put((request, future))
        return future

    def close(self, timeout: float = 60.0) -> None:
        """Answer what waits, then stop."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while (batch := self._collect()) is not None:
            live = [(request, future) for request, future in batch if future.set_running_or_notify_cancel()]
            if live:
                self._on_batch(len(live))
                self._run(live)

    def _collect(self) -> list[tuple[Request, "Future[Answer]"]] | None:
        """The next batch; None when there will be none."""
        entry = self._queue.get()
        if entry is None:
            return None
        batch = [entry]
        deadline = time.monotonic() + self._max_wait
        while len(batch) < self._max_batch:
            try:
                entry = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if entry is None:
                self._queue.put(None)  # stop after this batch
                break
            batch.append(entry)
        return batch

    def _run(self, batch: list[tuple[Request, "Future[Answer]"]]) -> None:
        try:
            answers = self._answer([request for request, _ in batch])
        except Exception as error:  # whatever it is, it belongs to those who asked
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:
                self._run([entry])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
