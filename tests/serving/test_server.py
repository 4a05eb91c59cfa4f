"""The server over real sockets: openpi's client, OpenVLA's calls, and everything that clients do wrong."""

import concurrent.futures
import http.client
import json
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import json_numpy
import numpy as np
import pytest
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus

from transformers_worldvla.serving.policy import WorldVLAPolicy
from transformers_worldvla.serving.server import bind
from worldvla_client import ServerError, WorldVLAClient, pack, unpack

PROMPT = "push the square to the right"
Serve = Callable[..., Any]


@pytest.fixture(scope="module")
def openpi() -> ModuleType:
    """openpi's own client."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
    try:
        from openpi_client import websocket_client_policy
    finally:
        sys.path.pop(0)
    return websocket_client_policy


def chunk_by_hand(arm: WorldVLAPolicy, *pictures: np.ndarray, instruction: str = PROMPT) -> np.ndarray:
    inputs = arm.processor(images=list(pictures), instruction=instruction)
    return np.asarray(arm.processor.decode_actions(arm.model.generate_actions(**inputs, num_actions=4))[0])


def see(picture: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"image": picture, "prompt": PROMPT, **more}


def connect(port: int, **options: Any) -> Any:
    options = {"compression": None, "max_size": None, "proxy": None, **options}
    return websockets.sync.client.connect(f"ws://127.0.0.1:{port}", **options)


def request(url: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = body if body is None or isinstance(body, bytes) else json_numpy.dumps(body).encode()
    call = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(call, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def assert_serves(port: int, arm: WorldVLAPolicy, picture: np.ndarray) -> None:
    with WorldVLAClient(port=port) as client:
        np.testing.assert_allclose(client.infer(see(picture))["actions"], chunk_by_hand(arm, picture), atol=1e-6)


# -------------------------------------------------------------------- openpi's protocol


def test_openpis_own_client_gets_what_the_model_answers(
    serve: Serve, arm: WorldVLAPolicy, openpi: ModuleType, frames: list[np.ndarray]
) -> None:
    client = openpi.WebsocketClientPolicy("127.0.0.1", serve().port)
    told = client.get_server_metadata()
    wanted = {"cameras": ["image"], "action_dim": 7, "num_actions": 4, "control_hz": 20.0, "embodiment": "libero"}
    assert {key: told[key] for key in wanted} == wanted
    for index, picture in enumerate(frames[:3]):
        answer = client.infer({"image": picture, "prompt": PROMPT, "state": np.zeros(8, np.float32)})
        assert answer["actions"].dtype == np.float32 and answer["actions"].shape == (4, 7)
        np.testing.assert_array_equal(answer["actions"], chunk_by_hand(arm, picture).astype(np.float32))
        assert answer["confidence"].shape == (4,) and answer["server_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in answer["server_timing"]) == (index > 0)
    client._ws.close()


def test_openpis_client_reads_the_servers_error(serve: Serve, openpi: ModuleType) -> None:
    client = openpi.WebsocketClientPolicy("127.0.0.1", serve().port)
    with pytest.raises(RuntimeError, match="the observation has no picture 'image'.*camera_map"):
        client.infer({"observation/image": np.zeros((4, 4, 3), np.uint8), "prompt": "go"})


def test_clients_with_other_keys_are_served_through_the_map(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    policy = WorldVLAPolicy(arm.model, arm.processor, camera_map={"observation/image": "image"})
    with WorldVLAClient(port=serve(policy).port) as client:
        assert client.metadata["cameras"] == ["observation/image"]
        answer = client.infer({"observation/image": frames[0], "task": PROMPT})
    np.testing.assert_allclose(answer["actions"], chunk_by_hand(arm, frames[0]), atol=1e-6)


def test_a_client_can_show_frames_between_plans_and_begin_anew(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    with WorldVLAClient(port=serve().port) as client:
        client.observe({"image": frames[0]})
        answer = client.infer(see(frames[1]))
        np.testing.assert_allclose(answer["actions"], chunk_by_hand(arm, frames[0], frames[1]), atol=1e-6)
        assert answer["num_frames"] == 2
        client.observe({"image": frames[2]})
        client.reset()
        assert client.infer(see(frames[1]))["num_frames"] == 1
        client.observe({"image": frames[2]})
        assert client.infer(see(frames[1], reset=True))["num_frames"] == 1


def test_clients_at_the_same_time_share_batches_and_no_frames(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    running = serve(batch_wait=0.2, max_batch=4)
    ready = threading.Barrier(4)

    def drive(index: int) -> list[np.ndarray]:
        with WorldVLAClient(port=running.port) as client:
            ready.wait()
            client.observe({"image": frames[index]})
            prompt = f"do thing {index}"
            return [client.infer({"image": frames[index + 4], "prompt": prompt})["actions"] for _ in range(2)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(drive, range(4)))
    for index, (first, second) in enumerate(answers):
        prompt = f"do thing {index}"
        expected = chunk_by_hand(arm, frames[index], frames[index + 4], instruction=prompt)
        np.testing.assert_allclose(first, expected, atol=1e-6)
        np.testing.assert_allclose(second, chunk_by_hand(arm, frames[index + 4], instruction=prompt), atol=1e-6)
    sizes = running.server.metrics.batch
    assert sizes._sum.get() == 8 and sum(bucket.get() for bucket in sizes._buckets[1:]) > 0


def test_entropy_travels_when_it_was_asked_for(serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray]) -> None:
    policy = WorldVLAPolicy(arm.model, arm.processor, entropy=True)
    with WorldVLAClient(port=serve(policy).port) as client:
        entropy = client.infer(see(frames[0]))["entropy"]
    assert entropy.shape == (4, 7) and (entropy > 0).all() and (entropy <= np.log(256) + 1e-4).all()


# -------------------------------------------------------------------- what clients do wrong

BAD_MESSAGES: list[tuple[Any, str]] = [
    (b"", "no msgpack map"),
    (b"\xc1\xc1\xc1", "no msgpack map"),
    (b"\x90", "a message is a map, not list"),
    ("text", "binary frame, this one is text"),
    (pack({}), "the observation has no picture 'image'"),
    (pack({"image": np.zeros((4, 4, 3), np.uint8)}), "has no prompt"),
    (pack({"image": np.zeros((4, 4), np.uint8), "prompt": "go"}), "is a picture (H, W, 3)"),
    (pack({"image": np.zeros((5000, 1, 3), np.uint8), "prompt": "go"}), "is larger than 4096"),
    (pack({"image": np.zeros((4, 4, 3)) + np.inf, "prompt": "go"}), "a float picture lies in [0, 1]"),
    (pack({"image": np.zeros((4, 4, 3), np.uint8), "prompt": "<reserved08706>"}), "reserved"),
    (pack({"image": np.zeros((4, 4, 3), np.uint8), "prompt": "go", "reset": "yes"}), "reset is true or false"),
    (pack({"image": np.zeros((9, 9000, 3), np.uint8), "prompt": "go"}), "too large"),
]


@pytest.mark.parametrize(("message", "reason"), BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_a_bad_message_is_one_line_of_text_then_the_end(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray], message: Any, reason: str
) -> None:
    running = serve(max_message_bytes=100_000)
    with connect(running.port) as other, connect(running.port) as client:
        other.recv(), client.recv()
        client.send(message)
        line = client.recv(timeout=20)
        assert isinstance(line, str) and reason in line and "\n" not in line
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=20)
        other.send(pack(see(frames[0][:50, :50])))  # nobody else notices
        assert unpack(other.recv(timeout=20))["actions"].shape == (4, 7)
    assert running.count("websocket", "refused") == 1
    assert_serves(running.port, arm, frames[0])


def test_the_servers_own_failure_stays_in_its_log(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(arm.session())
    with monkeypatch.context() as patch, connect(running.port) as client:
        patch.setattr(arm.processor, "decode_actions", lambda *_: 1 / 0)
        client.recv()
        client.send(pack(see(frames[0])))
        assert client.recv(timeout=20) == "the server failed (ZeroDivisionError); its log says why"
        status, body = request(running.url + "/act", {"image": frames[0], "instruction": PROMPT})
        assert status == 500 and json.loads(body) == {
            "error": "the server failed (ZeroDivisionError); its log says why"
        }
    assert running.count("websocket", "failed") == running.count("rest", "failed") == 1
    assert_serves(running.port, arm, frames[0])


def handshake(port: int) -> socket.socket:
    """A websocket connection by hand, its metadata read."""
    raw = socket.create_connection(("127.0.0.1", port))
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    received = b""
    while b"server" not in received:
        received += raw.recv(4096)
    return raw


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x82",  # half a header
        b"\x82\xff" + b"\0" * 7 + b"\x40" + b"mask",  # 64 bytes are announced, none come
        b"\x82\x05hello",  # a client must mask
        b"\xf2\x80mask",  # reserved bits
        b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xffmask",  # 2^63 bytes are announced
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 40,
    ],
)
def test_frames_that_are_none_and_sudden_ends_harm_nobody(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray], data: bytes
) -> None:
    running = serve()
    raw = handshake(running.port)
    raw.sendall(data)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not a goodbye
    time.sleep(0.05)
    raw.close()
    until(lambda: not running.server._sockets)
    assert_serves(running.port, arm, frames[0])


def test_a_client_that_leaves_before_its_answer_harms_nobody(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    running = serve()
    for _ in range(3):
        client = connect(running.port)
        client.recv()
        client.send(pack(see(frames[0])))
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
    assert_serves(running.port, arm, frames[0])
    until(lambda: not running.server._sockets)


def test_more_clients_than_allowed_are_told_so(serve: Serve, frames: list[np.ndarray]) -> None:
    running = serve(max_clients=1)
    with WorldVLAClient(port=running.port) as client:
        with pytest.raises(ServerError, match="503.*1 clients are connected already"):
            WorldVLAClient(port=running.port)
        client.infer(see(frames[0]))
    until(lambda: not running.server._sockets)
    WorldVLAClient(port=running.port).close()


def hold_the_model(arm: WorldVLAPolicy, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let the model wait; events that it has begun, and that it may go on."""
    began, go = threading.Event(), threading.Event()
    generate = arm.model.generate_actions

    def wait(*args: Any, **kwargs: Any) -> Any:
        began.set()
        go.wait(30)
        return generate(*args, **kwargs)

    monkeypatch.setattr(arm.model, "generate_actions", wait)
    return began, go


def test_a_request_that_takes_too_long_is_given_up(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(request_timeout=3.0)
    _, go = hold_the_model(arm, monkeypatch)
    with pytest.raises(ServerError, match="no answer in time"), WorldVLAClient(port=running.port) as client:
        client.infer(see(frames[0]))
    status, body = request(running.url + "/act", {"image": frames[0], "instruction": PROMPT})
    assert status == 504 and "no answer in time" in json.loads(body)["error"]
    go.set()
    monkeypatch.undo()
    assert_serves(running.port, arm, frames[0])


def test_a_full_queue_refuses_at_once(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve(max_pending=1, max_batch=1)
    began, go = hold_the_model(arm, monkeypatch)
    call = {"image": frames[0], "instruction": PROMPT}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running_call = pool.submit(request, running.url + "/act", call)
        assert began.wait(20)
        waiting_call = pool.submit(request, running.url + "/act", call)
        until(lambda: running.server._batcher.pending == 1)
        status, body = request(running.url + "/act", call)
        assert status == 503 and "1 requests wait already" in json.loads(body)["error"]
        go.set()
        assert running_call.result(20)[0] == waiting_call.result(20)[0] == 200


# -------------------------------------------------------------------- REST


def test_openvlas_call_gets_one_action_in_json_numpy(
    serve: Serve, arm: WorldVLAPolicy, frames: list[np.ndarray]
) -> None:
    url = serve().url + "/act"
    status, body = request(url, {"image": frames[0], "instruction": PROMPT, "unnorm_key": "libero"})
    assert status == 200
    np.testing.assert_array_equal(json_numpy.loads(body), chunk_by_hand(arm, frames[0])[0])
    status, body = request(url, {"encoded": json_numpy.dumps({"image": frames[1], "instruction": PROMPT})})
    np.testing.assert_array_equal(json_numpy.loads(json.loads(body)), chunk_by_hand(arm, frames[1])[0])
    status, body = request(url, {"image": frames[0], "instruction": PROMPT, "chunk": True, "format": "list"})
    np.testing.assert_array_equal(json.loads(body), chunk_by_hand(arm, frames[0]))


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "no JSON"),
        (b"", 400, "no JSON"),
        ({"instruction": "go"}, 400, "the observation has no picture 'image'"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, 400, "has no prompt"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "instruction": "go", "unnorm_key": "bridge_orig"}, 400, "'libero'"),
        (b" " * 300_000, 413, "at most 100000 bytes"),
    ],
)
def test_a_bad_call_is_a_status_and_one_line(serve: Serve, body: Any, status: int, reason: str) -> None:
    running = serve(max_message_bytes=100_000)
    found, answer = request(running.url + "/act", body)
    assert found == status and list(json.loads(answer)) == ["error"]
    line = json.loads(answer)["error"]
    assert reason in line and "\n" not in line
    assert running.count("rest", "refused") == 1


def test_a_body_that_never_arrives_is_given_up(serve: Serve) -> None:
    running = serve(request_timeout=0.3)
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        raw.settimeout(20)
        assert raw.recv(4096).startswith(b"HTTP/1.1 504")


def test_other_paths_say_what_is_there(serve: Serve) -> None:
    running = serve()
    status, body = request(running.url + "/predict")
    assert status == 404 and "POST /act" in json.loads(body)["error"]
    assert request(running.url + "/act")[0] == 404 and request(running.url + "/healthz", b"x")[0] == 405


def test_health_and_metrics(serve: Serve, frames: list[np.ndarray]) -> None:
    running = serve()
    assert request(running.url + "/healthz") == (200, b"OK\n")
    with WorldVLAClient(port=running.port) as client:
        client.infer(see(frames[0]))
        text = request(running.url + "/metrics")[1].decode()
    assert 'worldvla_requests_total{outcome="ok",transport="websocket"} 1.0' in text
    assert "worldvla_websocket_clients 1.0" in text and "worldvla_pending_requests 0.0" in text
    assert 'worldvla_request_seconds_count{transport="websocket"} 1.0' in text


# -------------------------------------------------------------------- who may come in


def test_a_key_is_asked_for_everywhere_but_at_healthz(
    serve: Serve, openpi: ModuleType, frames: list[np.ndarray]
) -> None:
    running = serve(api_key="s3cret")
    assert request(running.url + "/healthz")[0] == 200
    for headers in (
        {},
        {"Authorization": "Api-Key wrong"},
        {"Authorization": "s3cret"},
        {"Authorization": "Basic s3cret"},
    ):
        assert request(running.url + "/metrics", **headers)[0] == 401
        assert request(running.url + "/act", b"{}", **headers)[0] == 401
        with pytest.raises(InvalidStatus, match="401"):
            connect(running.port, additional_headers=headers)
    with pytest.raises(ServerError, match="401.*Authorization: Api-Key"):
        WorldVLAClient(port=running.port)
    assert request(running.url + "/metrics", Authorization="Bearer s3cret")[0] == 200
    with WorldVLAClient(port=running.port, api_key="s3cret") as client:
        client.infer(see(frames[0]))
    client = openpi.WebsocketClientPolicy("127.0.0.1", running.port, api_key="s3cret")
    assert client.infer(see(frames[0]))["actions"].shape == (4, 7)
    client._ws.close()


def test_pages_in_a_browser_are_kept_out(serve: Serve) -> None:
    running = serve()
    assert request(running.url + "/act", b"{}", Origin="http://evil.example")[0] == 403
    with pytest.raises(InvalidStatus, match="403"):
        connect(running.port, origin="http://evil.example")


CERTIFICATE = Path(__file__).parents[1] / "fixtures" / "tls" / "localhost.pem"


def test_tls(serve: Serve, frames: list[np.ndarray]) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATE)
    running = serve(tls=tls)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    with WorldVLAClient("localhost", running.port, tls=trusting) as client:
        assert client.infer(see(frames[0]))["actions"].shape == (4, 7)
    with pytest.raises(ssl.SSLError):
        WorldVLAClient("localhost", running.port, tls=ssl.create_default_context())
    plain = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/healthz")
        plain.getresponse()


def test_it_listens_on_this_computer_alone_unless_told_otherwise() -> None:
    with bind(port=0) as port:
        assert port.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_found_before_anything_is_loaded(serve: Serve) -> None:
    running = serve()
    with pytest.raises(OSError, match=rf"in use: 127.0.0.1:{running.port}"):
        bind(port=running.port)
