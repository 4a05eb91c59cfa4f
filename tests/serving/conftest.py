"""A small policy, and servers of it that run in a thread with real sockets."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoint import write_checkpoint

from transformers_worldvla.serving.policy import WorldVLAPolicy
from transformers_worldvla.serving.server import PolicyServer, ServerOptions, bind

PROMPT = "push the square to the right"


@pytest.fixture(scope="session")
def arm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint of LIBERO's arm; treat it as read-only."""
    return write_checkpoint(tmp_path_factory.mktemp("serving") / "arm")


@pytest.fixture(scope="session")
def arm(arm_checkpoint: Path) -> WorldVLAPolicy:
    """Its weights; take a `session()`."""
    return WorldVLAPolicy.from_pretrained(arm_checkpoint, device="cpu")


@pytest.fixture
def frames() -> list[np.ndarray]:
    """Pictures (96, 96, 3) that differ."""
    return list(np.random.default_rng(11).integers(0, 256, (12, 96, 96, 3), dtype=np.uint8))


@dataclass
class RunningServer:
    server: PolicyServer
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, transport: str, outcome: str) -> float:
        """Requests that ended so, by the server's own count."""
        return float(self.server.metrics.requests.labels(transport, outcome)._value.get())


@pytest.fixture
def serve(arm: WorldVLAPolicy) -> Iterator[Callable[..., RunningServer]]:
    """Start a server of the small policy, or of another, on a free port; `ServerOptions` by keyword."""
    running: list[tuple[RunningServer, threading.Thread]] = []

    def start(policy: WorldVLAPolicy | None = None, **options: Any) -> RunningServer:
        port = bind(port=0)
        server = PolicyServer(policy or arm.session(), port, ServerOptions(**options))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(60)
        running.append((RunningServer(server, port.getsockname()[1], loop), thread))
        return running[-1][0]

    yield start
    for handle, thread in running:
        asyncio.run_coroutine_threadsafe(handle.server.stop(), handle.loop).result(60)
        handle.loop.call_soon_threadsafe(handle.loop.stop)
        thread.join()
        handle.loop.close()
