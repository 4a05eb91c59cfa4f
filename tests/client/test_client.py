"""The robot's end: no torch, one action a control step from chunks, and plans in the background."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import websockets.sync.server

from worldvla_client import ChunkRunner, ServerError, WorldVLAClient, pack, unpack

LIGHT = """
import json, sys, threading
import websockets.sync.server
from worldvla_client import ChunkRunner, WorldVLAClient, pack
import numpy as np

def answer(socket):
    socket.send(pack({"cameras": ["image"]}))
    for _ in socket:
        socket.send(pack({"actions": np.ones((2, 3), np.float32), "server_timing": {}}))

with websockets.sync.server.serve(answer, "127.0.0.1", 0) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with WorldVLAClient(port=server.socket.getsockname()[1]) as client:
        runner = ChunkRunner(client, client.metadata["cameras"], replan_interval=2)
        action = runner.select_action({"image": np.zeros((4, 4, 3), np.uint8), "prompt": "go"})
        runner.close()
    server.shutdown()
heavy = [name for name in ("torch", "transformers", "transformers_worldvla", "PIL") if name in sys.modules]
print(json.dumps({"action": action.tolist(), "heavy": heavy}))
"""


def test_a_client_that_acts_has_imported_no_torch() -> None:
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"action": [1.0, 1.0, 1.0], "heavy": []}


def serve(answer: Callable[[Any], None]) -> Any:
    server = websockets.sync.server.serve(answer, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_what_the_server_says_against_a_message_is_raised() -> None:
    def refuse(socket: Any) -> None:
        socket.send(pack({}))
        socket.recv()
        socket.send("no picture 'image'")

    with serve(refuse) as server:
        client = WorldVLAClient(port=server.socket.getsockname()[1])
        with pytest.raises(ServerError, match="no picture 'image'"):
            client.infer({})
        with pytest.raises(ServerError, match="the connection is closed"):
            client.infer({})
        server.shutdown()


def test_a_late_answer_is_never_taken_for_that_of_the_next_question() -> None:
    go = threading.Event()

    def answer_late(socket: Any) -> None:
        socket.send(pack({}))
        socket.recv()
        go.wait(10)
        socket.send(pack({"actions": "of the first question"}))

    with serve(answer_late) as server:
        with WorldVLAClient(port=server.socket.getsockname()[1], timeout=0.5) as client:
            with pytest.raises(ServerError, match="no answer within 0.5 s"):
                client.infer({})
            go.set()
            with pytest.raises(ServerError, match="the connection is closed"):
                client.infer({})
        server.shutdown()


def test_flags_travel_with_the_observation() -> None:
    heard: list[dict[str, Any]] = []

    def listen(socket: Any) -> None:
        socket.send(pack({}))
        for message in socket:
            heard.append(unpack(message))
            socket.send(pack({}))

    with serve(listen) as server:
        with WorldVLAClient(port=server.socket.getsockname()[1]) as client:
            client.observe({"a": 1})
            client.reset()
        server.shutdown()
    assert heard == [{"a": 1, "observe": True}, {"reset": True}]


def test_nobody_there_is_an_os_error() -> None:
    with serve(lambda socket: None) as server:
        port = server.socket.getsockname()[1]
        server.shutdown()
    with pytest.raises(OSError):
        WorldVLAClient(port=port)


# -------------------------------------------------------------------- chunks


class Planner:
    """Answers the plan of step t with actions t + 0.0, t + 0.1 ...; can be held, and remembers what it was shown."""

    def __init__(self, length: int = 5) -> None:
        self.length = length
        self.shown: list[np.ndarray] = []
        self.go = threading.Event()
        self.go.set()
        self.answered = threading.Event()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        self.go.wait(10)
        self.shown.append(np.asarray(observation["image"]))
        now = float(self.shown[-1].reshape(-1)[-1])
        self.answered.set()
        return {"actions": now + np.arange(self.length)[:, None] / 10}


def at(step: int) -> dict[str, Any]:
    return {"image": np.full((2, 2, 3), step, np.uint8), "prompt": "go"}


def run(runner: ChunkRunner, steps: range) -> list[float]:
    return [float(runner.select_action(at(step))[0]) for step in steps]


def test_a_plan_is_asked_for_every_interval_with_the_frame_before() -> None:
    planner = Planner()
    runner = ChunkRunner(planner, ["image"], replan_interval=3)
    assert run(runner, range(7)) == pytest.approx([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 6.0])
    assert [shown.shape[:-3] for shown in planner.shown] == [(), (2,), (2,)]
    assert [int(shown[0, 0, 0, 0]) for shown in planner.shown[1:]] == [2, 5]  # one control step before the plan's
    runner.close()


def test_in_the_background_the_robot_goes_on_with_the_plan_before() -> None:
    planner = Planner()
    runner = ChunkRunner(planner, ["image"], replan_interval=2, in_background=True)
    assert run(runner, range(2)) == pytest.approx([0.0, 0.1])
    planner.go.clear()
    assert run(runner, range(2, 4)) == pytest.approx([0.2, 0.3])  # asked at 2, not there yet
    planner.answered.clear()
    planner.go.set()
    assert planner.answered.wait(10)
    runner._plan.result(10)  # type: ignore[union-attr]
    assert run(runner, range(4, 5)) == pytest.approx([2.2])  # the plan of 2, without its first two actions
    runner.close()


def test_in_the_background_the_robot_waits_where_no_plan_reaches() -> None:
    planner = Planner(length=2)
    runner = ChunkRunner(planner, ["image"], replan_interval=1, in_background=True)
    run(runner, range(2))
    planner.go.clear()
    threading.Timer(0.1, planner.go.set).start()
    assert run(runner, range(2, 4))[-1] >= 2.0
    runner.close()


def test_plans_that_overlap_may_be_averaged() -> None:
    runner = ChunkRunner(Planner(), ["image"], replan_interval=1, aggregation="ensemble", coefficient=0.0)
    # at step 2: 0.2 of the plan of 0, 1.1 of that of 1, 2.0 of that of 2
    assert run(runner, range(3))[-1] == pytest.approx((0.2 + 1.1 + 2.0) / 3)
    runner.close()


def test_reset_throws_the_plan_under_way_away() -> None:
    planner = Planner()
    runner = ChunkRunner(planner, ["image"], replan_interval=2, in_background=True)
    run(runner, range(3))
    runner.reset()
    assert run(runner, range(7, 8)) == pytest.approx([7.0]) and planner.shown[-1].ndim == 3
    runner.close()


def test_an_interval_beyond_the_chunk_is_refused_where_it_shows() -> None:
    runner = ChunkRunner(Planner(length=2), ["image"], replan_interval=3)
    run(runner, range(2))
    with pytest.raises(ServerError, match="longer than a chunk"):
        runner.select_action(at(2))
    runner.close()
    with pytest.raises(ValueError, match="at least 1"):
        ChunkRunner(Planner(), ["image"], replan_interval=0)


def test_what_goes_wrong_while_planning_reaches_the_robot() -> None:
    class Broken:
        def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
            raise ServerError("gone")

    runner = ChunkRunner(Broken(), ["image"], replan_interval=2, in_background=True)
    with pytest.raises(ServerError, match="gone"):
        runner.select_action(at(0))
    runner.close()
