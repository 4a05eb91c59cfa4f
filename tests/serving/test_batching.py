"""Requests of several robots are answered together, and fail alone."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from transformers_worldvla.serving.batching import Overloaded, RequestBatcher


class Model:
    """Doubles numbers; refuses 13; can be held."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.batches: list[list[int]] = []

    def __call__(self, requests: Sequence[int]) -> list[int]:
        self.go.wait(10)
        self.batches.append(list(requests))
        if 13 in requests:
            raise ValueError("13 is refused")
        return [2 * request for request in requests]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batcher(model: Model) -> Iterator[Callable[..., RequestBatcher[int, int]]]:
    started = []

    def start(**options: float) -> RequestBatcher[int, int]:
        started.append(RequestBatcher(model, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    model.go.set()
    for one in started:
        one.close(10)


def hold(model: Model, batcher: RequestBatcher[int, int], request: int = 0) -> None:
    """Let the model be busy with one request."""
    model.go.clear()
    batcher.submit(request)
    while batcher.pending:
        time.sleep(0.001)


def test_what_comes_in_while_the_model_is_busy_is_one_batch(
    model: Model, batcher: Callable[..., RequestBatcher[int, int]]
) -> None:
    one = batcher(max_batch=3)
    hold(model, one)
    futures = [one.submit(number) for number in range(1, 6)]
    model.go.set()
    assert [future.result(10) for future in futures] == [2, 4, 6, 8, 10]
    assert model.batches == [[0], [1, 2, 3], [4, 5]]


def test_a_request_waits_for_others_as_long_as_it_is_told(
    model: Model, batcher: Callable[..., RequestBatcher[int, int]]
) -> None:
    one = batcher(max_wait=5.0, max_batch=2)
    first = one.submit(1)
    time.sleep(0.05)
    assert not first.done()
    assert one.submit(2).result(10) == 4 and model.batches == [[1, 2]]


def test_a_request_that_fails_fails_alone(model: Model, batcher: Callable[..., RequestBatcher[int, int]]) -> None:
    one = batcher()
    hold(model, one)
    futures = [one.submit(number) for number in (1, 13, 2)]
    model.go.set()
    assert futures[0].result(10) == 2 and futures[2].result(10) == 4
    with pytest.raises(ValueError, match="13 is refused"):
        futures[1].result(10)
    assert one.submit(5).result(10) == 10


def test_a_request_that_was_given_up_is_not_run(model: Model, batcher: Callable[..., RequestBatcher[int, int]]) -> None:
    one = batcher()
    hold(model, one)
    gone, stays = one.submit(1), one.submit(2)
    assert gone.cancel()
    model.go.set()
    assert stays.result(10) == 4 and model.batches == [[0], [2]]


def test_too_many_requests_are_refused(model: Model, batcher: Callable[..., RequestBatcher[int, int]]) -> None:
    one = batcher(max_pending=2)
    hold(model, one)
    futures = [one.submit(1), one.submit(2)]
    with pytest.raises(Overloaded, match="2 requests wait already"):
        one.submit(3)
    model.go.set()
    assert [future.result(10) for future in futures] == [2, 4]


def test_close_answers_what_waits(model: Model, batcher: Callable[..., RequestBatcher[int, int]]) -> None:
    one = batcher(max_batch=2)
    hold(model, one)
    futures = [one.submit(number) for number in range(3)]
    threading.Timer(0.05, model.go.set).start()
    one.close(10)
    assert [future.result(0) for future in futures] == [0, 2, 4]


def test_batch_sizes_are_reported(model: Model) -> None:
    sizes: list[int] = []
    one = RequestBatcher(model, on_batch=sizes.append)
    assert one.submit(1).result(10) == 2
    one.close(10)
    assert sizes == [1]
