"""A client for a robot's computer: numpy, msgpack and websockets, no torch.

`WorldVLAClient` speaks openpi's protocol and asks for chunks. `ChunkRunner` turns chunks into one action a control
step, and can have the next one planned while the robot goes on with the last.
"""

import ssl
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np

from .chunking import ActionTimeline
from .optional import import_extra
from .protocol import MAX_MESSAGE_BYTES, pack, unpack


class ServerError(RuntimeError):
    """The server refused a message, its text being the server's line, or did not answer in time. The connection is
    closed: connect anew."""


class WorldVLAClient:
    """A connection to a policy server, as a context manager or until `close`.

    Args:
        host, port: of the server; `host` may be a whole address (`wss://robot.example:8000`).
        api_key: when the server asks for one.
        tls: a client context for `wss://` with a certificate of one's own.
        timeout: seconds for connecting and for each answer.

    Attributes:
        metadata: what the server says of the policy: `cameras`, `action_dim`, `num_actions`, `control_hz`,
            `embodiment` ...

    Raises OSError when nobody answers there, ServerError when the server refuses.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float = 60.0,
    ):
        sync_client = import_extra("websockets.sync.client")
        self._exceptions = import_extra("websockets.exceptions")
        address = host if "://" in host else f"{'ws' if tls is None else 'wss'}://{host}"
        if port is not None and "://" not in host:
            address += f":{port}"
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._timeout = timeout
        self._lock = threading.Lock()
        self._open = ExitStack()
        try:
            connection = sync_client.connect(
                address,
                additional_headers=headers,
                ssl=tls,
                compression=None,
                open_timeout=timeout,
                max_size=MAX_MESSAGE_BYTES,
                proxy=None,
            )
            self._socket = self._open.enter_context(connection)
        except self._exceptions.InvalidStatus as error:
            body = (error.response.body or b"").decode(errors="replace").strip()
            raise ServerError(f"{address} refused ({error.response.status_code}): {body}") from None
        try:
            self.metadata: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for a chunk: a map with `actions` (K, D) float32, `confidence` (K,) and `server_timing`."""
        return self._ask(observation)

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Show a frame between plans, so that the next plan sees it."""
        self._ask({**observation, "observe": True})

    def reset(self) -> None:
        """A new episode begins: the server forgets what it has seen."""
        self._ask({"reset": True})

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> "WorldVLAClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        data = pack(dict(message))
        with self._lock:
            try:
                self._socket.send(data)
            except self._exceptions.ConnectionClosed:
                pass  # the server has said why
            return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._socket.recv(timeout=self._timeout)
        except self._exceptions.ConnectionClosed as error:
            raise ServerError(f"the connection is closed: {error}") from None
        except TimeoutError:
            self.close()  # or the late answer would be taken for that of the next question
            raise ServerError(f"no answer within {self._timeout:g} s") from None
        if isinstance(answer, str):
            self.close()
            raise ServerError(answer)
        return dict(unpack(answer))


class Planner(Protocol):
    """Whoever answers an observation with a map that holds `actions` (K, D)."""

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]: ...


class ChunkRunner:
    """One action a control step from a server that plans chunks.

    It sees every frame, so it shows the server the frame of one control step ago beside the present one.

    Args:
        planner: a `WorldVLAClient`.
        cameras: picture keys of the observations (`client.metadata["cameras"]`).
        replan_interval: control steps from asking for one plan to asking for the next.
        in_background: do not wait for a plan but go on with the one before it; when it arrives, those of its actions
            whose time has passed are dropped. The robot waits only where no plan reaches the present step.
        aggregation, coefficient: how overlapping chunks become one action, see `ActionTimeline`.
    """

    def __init__(
        self,
        planner: Planner,
        cameras: list[str],
        replan_interval: int,
        in_background: bool = False,
        aggregation: str = "latest",
        coefficient: float = 0.01,
    ):
        if replan_interval < 1:
            raise ValueError(f"replan_interval is at least 1, not {replan_interval}")
        self._planner = planner
        self._cameras = cameras
        self._replan_interval = replan_interval
        self._in_background = in_background
        self._timeline = ActionTimeline(aggregation, coefficient)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worldvla-plan")
        self._plan: Future[dict[str, Any]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the episode; a plan under way is thrown away."""
        if self._plan is not None:
            self._plan.exception()  # wait for it: the connection answers one question at a time
        self._plan = None
        self._timeline.clear()
        self._step = 0
        self._planned_at: int | None = None
        self._previous: Mapping[str, Any] | None = None

    def select_action(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (D,) for this control step; call it at every control step."""
        if self._plan is not None and self._plan.done():
            self._take_plan()
        if self._plan is None and (self._planned_at is None or self._step >= self._planned_at + self._replan_interval):
            self._plan = self._thread.submit(self._planner.infer, self._with_previous(observation))
            self._planned_at = self._step
        if self._plan is not None and not (self._in_background and self._timeline.reaches(self._step)):
            self._take_plan()
        action = self._timeline.action(self._step)
        if action is None:
            raise ServerError(f"no plan reaches control step {self._step}: replan_interval is longer than a chunk")
        self._previous = observation
        self._step += 1
        return action

    def close(self) -> None:
        self._thread.shutdown()

    def _take_plan(self) -> None:
        """Wait for the plan under way and lay it out from the step at which it was asked for."""
        assert self._plan is not None and self._planned_at is not None
        plan, self._plan = self._plan, None
        self._timeline.add(self._planned_at, np.asarray(plan.result()["actions"]))

    def _with_previous(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The observation with the frame of one control step ago before its own."""
        shown = dict(observation)
        if self._previous is not None:
            for key in self._cameras:
                shown[key] = np.stack([self._previous[key], observation[key]])
        return shown
