"""One port for robots: openpi's websocket protocol, OpenVLA's `POST /act`, `GET /healthz` and `GET /metrics`.

Every websocket client has a policy session of its own, so that nothing of one robot's episode reaches another's; a call
of `/act` has one for itself alone. Requests of all clients are answered in batches. Bad input costs its sender the
connection and nobody else anything. One package, aiohttp, serves websockets and HTTP on one port, with TLS and limits.

A websocket message is an observation (see `WorldVLAPolicy`), and may also say `reset: True` (forget the episode; alone
or with an observation) or `observe: True` (take the frame in, plan nothing).
"""

import asyncio
import hmac
import logging
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from worldvla_client.optional import import_extra
from worldvla_client.protocol import MAX_MESSAGE_BYTES, ProtocolError, pack, unpack

from .. import __version__
from .batching import Overloaded, RequestBatcher
from .metrics import ServerMetrics
from .policy import WorldVLAPolicy
from .prediction import ActionChunk, ChunkRequest
from .rest import read_act, write_actions

aiohttp = import_extra("aiohttp")
web = import_extra("aiohttp.web")

logger = logging.getLogger(__name__)

_HEARTBEAT = 20.0  # seconds between pings; a client that answers none is gone
_KEEP_ALIVE = 60.0  # seconds that a connection may say nothing between HTTP requests, or before its first
_LINGER = 1.0  # seconds to read why: closing at once resets the connection under what the client still sends
_BASE64 = 4 / 3


@dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Attributes:
        api_key: when set, everything but `/healthz` needs `Authorization: Api-Key ...` (or `Bearer ...`).
        tls: a server context when the port speaks TLS.
        max_clients: websocket clients at a time.
        max_batch, batch_wait: requests answered together, and seconds that one waits for others.
        max_pending: requests that may wait for the model.
        request_timeout: seconds until a request is given up, and for a body to arrive.
        max_message_bytes: largest message, arrays unpacked.
        grace: seconds for requests under way when the server is told to stop.
    """

    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    max_clients: int = 32
    max_batch: int = 8
    batch_wait: float = 0.0
    max_pending: int = 64
    request_timeout: float = 30.0
    max_message_bytes: int = MAX_MESSAGE_BYTES
    grace: float = 10.0


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A port for a server, 0 for any free one; it refuses connections until the server listens.

    Raises OSError when it is taken or the address is not this computer's: before weights are read, if called then.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"{host} is no address of a computer: {error.strerror}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{error.strerror}: {host}:{port}") from None
    return bound


class PolicyServer:
    """Serves one policy on a port (see `bind`). `run` blocks until SIGTERM or SIGINT; `start` and `stop` are for
    programs with a loop of their own."""

    def __init__(self, policy: WorldVLAPolicy, port: socket.socket, options: ServerOptions | None = None):
        self.policy = policy
        self._port = port
        self.options = options or ServerOptions()
        self.metrics = ServerMetrics()
        self.metadata = {**policy.metadata, "server": f"transformers_worldvla {__version__}"}
        self._sockets: dict[Any, bool] = {}  # socket -> is it being answered?
        self._stopping = False

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Warm the model up, then listen."""
        options = self.options
        self._batcher: RequestBatcher[ChunkRequest, ActionChunk] = RequestBatcher(
            self.policy.predictor.predict,
            options.max_batch,
            options.batch_wait,
            options.max_pending,
            self.metrics.batch.observe,
        )
        self.metrics.pending.set_function(lambda: self._batcher.pending)
        self.metrics.clients.set_function(lambda: len(self._sockets))
        await asyncio.to_thread(self._warm_up)
        self._runner = web.AppRunner(
            self._application(),
            access_log=None,
            keepalive_timeout=_KEEP_ALIVE,
            shutdown_timeout=options.grace,
        )
        await self._runner.setup()
        await web.SockSite(self._runner, self._port, ssl_context=options.tls).start()

    async def stop(self) -> None:
        """Answer what is under way, say goodbye to the clients, release the port."""
        await self._runner.cleanup()
        await asyncio.to_thread(self._batcher.close, self.options.grace)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT; `on_ready` is called once the port is open."""
        asyncio.run(self._run(on_ready))

    async def _run(self, on_ready: Callable[[], None]) -> None:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
                asyncio.get_running_loop().add_signal_handler(name, stop.set)
        await self.start()
        try:
            on_ready()
            await stop.wait()
        finally:
            await self.stop()

    def _warm_up(self) -> None:
        size = self.policy.processor.image_processor.target_size
        picture = Image.new("RGB", (size, size))
        observation: dict[str, Any] = {key: picture for key in self.policy.reader.keys}
        self.policy.session().predict({**observation, "prompt": self.policy.prompt or "do nothing"})

    def _application(self) -> Any:
        application = web.Application(
            middlewares=[self._guard], client_max_size=int(self.options.max_message_bytes * _BASE64) + 2**16
        )
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_post("/act", self._act)
        application.router.add_get("/{path:.*}", self._websocket)  # openpi's server takes any path
        application.on_shutdown.append(self._say_goodbye)
        return application

    async def _say_goodbye(self, _: Any) -> None:
        self._stopping = True  # who is being answered leaves after the answer
        idle = [socket for socket, is_busy in self._sockets.items() if not is_busy]
        await asyncio.gather(*(socket.close(code=aiohttp.WSCloseCode.GOING_AWAY) for socket in idle))

    # ---------------------------------------------------------------- HTTP

    @web.middleware
    async def _guard(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """Who may come in, and errors as JSON."""
        if "Origin" in request.headers:  # a page in a browser of this computer: no robot is one
            return _refusal(403, "web pages are not served")
        if request.path != "/healthz" and not self._is_authorized(request):
            self.metrics.requests.labels("http", "unauthorized").inc()
            return _refusal(401, "wrong or missing key: send the header Authorization: Api-Key <key>")
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _refusal(error.status, error.reason)

    def _is_authorized(self, request: Any) -> bool:
        if self.options.api_key is None:
            return True
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() in ("api-key", "bearer") and hmac.compare_digest(
            key.strip().encode(), self.options.api_key.encode()
        )

    async def _healthz(self, _: Any) -> Any:
        return web.Response(text="OK\n")

    async def _metrics(self, _: Any) -> Any:
        body, content_type = self.metrics.render()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _act(self, request: Any) -> Any:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self.options.request_timeout):
                body = await request.read()
            call = await asyncio.to_thread(read_act, body, self.policy.reader.keys)
            if call.embodiment not in (None, self.metadata["embodiment"]):
                raise ProtocolError(
                    f"unnorm_key {call.embodiment[:60]!r} is not served: it is {self.metadata['embodiment']!r} or null"
                )
            chunk = await self._predict(self.policy.session(), call.observation)
        except web.HTTPRequestEntityTooLarge:
            self.metrics.requests.labels("rest", "refused").inc()
            return _refusal(413, f"a body has at most {self.options.max_message_bytes} bytes, arrays decoded")
        except Exception as error:
            outcome, line = _explain(error)
            self.metrics.requests.labels("rest", outcome).inc()
            return _refusal(_STATUS[outcome], line)
        self.metrics.requests.labels("rest", "ok").inc()
        self.metrics.seconds.labels("rest").observe(time.perf_counter() - began)
        return web.Response(text=write_actions(chunk.actions, call), content_type="application/json")

    # ---------------------------------------------------------------- websocket

    async def _websocket(self, request: Any) -> Any:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise web.HTTPNotFound(reason="not here: POST /act, GET /healthz, GET /metrics, or a websocket")
        if self._stopping or len(self._sockets) >= self.options.max_clients:
            self.metrics.requests.labels("websocket", "busy").inc()
            return _refusal(503, f"{len(self._sockets)} clients are connected already")
        socket = _Socket(
            max_msg_size=self.options.max_message_bytes + 2**16, compress=False, heartbeat=_HEARTBEAT, timeout=5.0
        )
        self._sockets[socket] = False
        try:
            await socket.prepare(request)
            await socket.send_bytes(pack(self.metadata))
            await self._converse(socket)
        except ConnectionError:
            self.metrics.requests.labels("websocket", "gone").inc()
        finally:
            del self._sockets[socket]
        return socket

    async def _converse(self, socket: Any) -> None:
        """Answer the messages of one client, one after the other, until it leaves or sends something wrong."""
        session = self.policy.session()
        previous: float | None = None
        while not self._stopping:
            message = await socket.receive()
            if message.type is aiohttp.WSMsgType.ERROR:
                self.metrics.requests.labels("websocket", "refused").inc()
            if message.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
                return
            self._sockets[socket] = True
            began = time.perf_counter()
            try:
                if message.type is aiohttp.WSMsgType.TEXT:
                    raise ProtocolError("a message is msgpack in a binary frame, this one is text")
                answer = await self._answer(session, message.data)
            except Exception as error:
                outcome, line = _explain(error)
                self.metrics.requests.labels("websocket", outcome).inc()
                await socket.send_str(line)
                code = aiohttp.WSCloseCode.POLICY_VIOLATION if outcome == "refused" else _SERVER_CODE[outcome]
                await socket.close(code=code)
                return
            timing = {"infer_ms": 1000 * (time.perf_counter() - began)}
            if previous is not None:
                timing["prev_total_ms"] = 1000 * previous
            await socket.send_bytes(pack({**answer, "server_timing": timing}))
            self._sockets[socket] = False
            previous = time.perf_counter() - began
            self.metrics.requests.labels("websocket", "ok").inc()
            self.metrics.seconds.labels("websocket").observe(previous)
        await socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)

    async def _answer(self, session: WorldVLAPolicy, data: bytes) -> dict[str, Any]:
        """The answer to one message, but for the timing."""
        message = await asyncio.to_thread(unpack, data)
        if not isinstance(message, Mapping):
            raise ProtocolError(f"a message is a map, not {type(message).__name__}")
        reset, observe = (_flag(message, name) for name in ("reset", "observe"))
        if reset:
            session.reset()
            if not any(key in message for key in self.policy.reader.keys):
                return {"reset": True}
        if observe:
            await asyncio.to_thread(session.observe, message)
            return {"observed": True}
        chunk = await self._predict(session, message)
        answer = {
            "actions": chunk.actions.astype(np.float32),
            "confidence": chunk.confidence.astype(np.float32),
            "num_frames": chunk.num_frames,
        }
        if chunk.entropy is not None:
            answer["entropy"] = chunk.entropy.astype(np.float32)
        return answer

    async def _predict(self, session: WorldVLAPolicy, observation: Mapping[str, Any]) -> ActionChunk:
        async with asyncio.timeout(self.options.request_timeout):
            request = await asyncio.to_thread(session.request, observation)
            chunk = await asyncio.wrap_future(self._batcher.submit(request))
        self.metrics.confidence.observe(float(chunk.confidence[0]))
        return chunk


class _Socket(web.WebSocketResponse):  # type: ignore[name-defined]
    """Says why in a text frame before it hangs up on a message that is too large."""

    async def close(self, *, code: int = aiohttp.WSCloseCode.OK, message: bytes = b"", drain: bool = True) -> bool:
        if code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG and not self.closed:
            with suppress(ConnectionError):
                await self.send_str("the message is too large: send smaller pictures, or fewer")
                await asyncio.sleep(_LINGER)
        return bool(await super().close(code=code, message=message, drain=drain))


_STATUS = {"refused": 400, "busy": 503, "timeout": 504, "failed": 500}
_SERVER_CODE = {
    "busy": aiohttp.WSCloseCode.TRY_AGAIN_LATER,
    "timeout": aiohttp.WSCloseCode.TRY_AGAIN_LATER,
    "failed": aiohttp.WSCloseCode.INTERNAL_ERROR,
}


def _explain(error: Exception) -> tuple[str, str]:
    """The outcome and the one line that the client reads. What is the server's fault stays in its log."""
    if isinstance(error, ValueError):  # ProtocolError among them
        return "refused", " ".join(str(error).split())
    if isinstance(error, Overloaded):
        return "busy", str(error)
    if isinstance(error, TimeoutError):
        return "timeout", "no answer in time: the server has too much to do, or the body did not arrive"
    logger.error("a request failed", exc_info=error)
    return "failed", f"the server failed ({type(error).__name__}); its log says why"


def _refusal(status: int, line: str) -> Any:
    headers = {"WWW-Authenticate": "Api-Key"} if status == 401 else {}
    return web.json_response({"error": line}, status=status, headers=headers)


def _flag(message: Mapping[Any, Any], name: str) -> bool:
    value = message.get(name, False)
    if not isinstance(value, bool | np.bool_):
        raise ProtocolError(f"{name} is true or false")
    return bool(value)
