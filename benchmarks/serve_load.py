"""Drive a policy server with several robots at once while some of them misbehave, and say what became of it.

    python benchmarks/serve_load.py --model hub/worldvla-libero-tiny --clients 8 --seconds 60

It starts `worldvla serve` on a free port of this computer and talks to nothing else. Every client is a robot with
pictures of its own. Before the load it learns the answer to each of its observations alone; under load every answer
must be that one again, or something has leaked from another robot. With the chance of `--faults` a client does
something wrong instead: the whole list is `FAULTS`. At the end the server must still answer, and stop at SIGTERM with
exit code 0. Arguments that it does not know go to `worldvla serve`.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldvla_client import ServerError, WorldVLAClient, pack

HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds for an answer: the computer may be busy with other things


class Robot:
    """One client: observations of its own, and the answers that belong to them."""

    def __init__(self, port: int, number: int, side: int):
        rng = np.random.default_rng(number)
        self.port = port
        self.random = random.Random(number)
        base = rng.integers(0, 256, (8, 8, 3)).repeat(side // 8, 0).repeat(side // 8, 1)
        self.pictures = [np.clip(base + shift, 0, 255).astype(np.uint8) for shift in (0, 15, 30)]
        self.prompt = f"put block {number} into bowl {number}"
        self.client = WorldVLAClient(HOST, port, timeout=PATIENCE)
        self.seconds: list[float] = []
        self.rest_seconds: list[float] = []
        self.faults: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.answers = {shown: self.ask(shown) for shown in ((0,), (1, 2))}
        self.rest_answer = self.call(1)
        self.wrong = 0

    def observation(self, shown: tuple[int, ...]) -> dict[str, Any]:
        """One frame, or the frame of one control step ago and the present one."""
        image = self.pictures[shown[0]] if len(shown) == 1 else np.stack([self.pictures[index] for index in shown])
        return {"image": image, "prompt": self.prompt, "state": np.zeros(8, np.float32)}

    def ask(self, shown: tuple[int, ...]) -> np.ndarray:
        began = time.perf_counter()
        actions = np.asarray(self.client.infer(self.observation(shown))["actions"])
        self.seconds.append(time.perf_counter() - began)
        return actions

    def call(self, index: int) -> list[float]:
        """One action over REST."""
        from transformers_worldvla.serving.rest import encode_array

        body = {"image": encode_array(self.pictures[index]), "instruction": self.prompt, "format": "list"}
        began = time.perf_counter()
        answer = post(self.port, json.dumps(body).encode())[1]
        self.rest_seconds.append(time.perf_counter() - began)
        return list(json.loads(answer))

    def run(self, until: float, chance: float) -> None:
        """Ask, and now and then misbehave, until that time."""
        while time.monotonic() < until:
            try:
                if self.random.random() < chance:
                    name = self.random.choice(sorted(FAULTS))
                    self.faults[name] += 1
                    if complaint := FAULTS[name](self):
                        self.unexpected.append(f"{name}: {complaint}")
                elif self.random.random() < 0.2:
                    self.wrong += self.call(1) != self.rest_answer
                else:
                    shown = self.random.choice(sorted(self.answers))
                    self.wrong += not np.array_equal(self.ask(shown), self.answers[shown])
            except (ServerError, OSError, TimeoutError, ValueError) as error:
                self.unexpected.append(f"a good request: {error}")
                self.client = WorldVLAClient(HOST, self.port, timeout=PATIENCE)


# -------------------------------------------------------------------- what goes wrong


def post(port: int, body: bytes) -> tuple[int, bytes]:
    call = urllib.request.Request(f"http://{HOST}:{port}/act", body)
    try:
        with urllib.request.urlopen(call, timeout=PATIENCE) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def handshake(port: int) -> socket.socket:
    raw = socket.create_connection((HOST, port), timeout=PATIENCE)
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    received = b""
    while b"server" not in received:
        received += raw.recv(4096)
    return raw


def reset(raw: socket.socket) -> None:
    """Hang up without a goodbye."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def refused(message: Callable[[Robot], Any]) -> Callable[[Robot], str | None]:
    """A message that must be answered by one line of text and the end of the connection."""

    def fault(robot: Robot) -> str | None:
        with WorldVLAClient(HOST, robot.port, timeout=PATIENCE) as client:
            client._socket.send(message(robot))
            line = client._socket.recv(timeout=PATIENCE)
        return None if isinstance(line, str) and "\n" not in line else f"answered {str(line)[:80]}"

    return fault


def refused_call(body: Callable[[Robot], bytes], status: int) -> Callable[[Robot], str | None]:
    """A call of /act that must be answered by that status."""

    def fault(robot: Robot) -> str | None:
        found, answer = post(robot.port, body(robot))
        return None if found == status and b"error" in answer else f"status {found}"

    return fault


def raw_bytes(data: Callable[[Robot], bytes]) -> Callable[[Robot], str | None]:
    """Bytes on a websocket's line that are no frame, then a reset."""

    def fault(robot: Robot) -> str | None:
        raw = handshake(robot.port)
        raw.sendall(data(robot))
        time.sleep(0.01)
        reset(raw)
        return None

    return fault


def damaged(robot: Robot) -> bytes:
    """A good message in which some bytes of the structure are others."""
    data = bytearray(pack(robot.observation((0,))))
    for _ in range(3):
        data[robot.random.randrange(60)] = robot.random.randrange(256)
    return bytes(data)


def leave_before_the_answer(robot: Robot) -> None:
    client = WorldVLAClient(HOST, robot.port, timeout=PATIENCE)
    client._socket.send(pack(robot.observation((0,))))
    reset(client._socket.socket)


def another_frame_size(robot: Robot) -> str | None:
    """A good request that does not fit the others of its batch."""
    with WorldVLAClient(HOST, robot.port, timeout=PATIENCE) as client:
        actions = client.infer({"image": robot.pictures[0][:, : len(robot.pictures[0]) // 2], "prompt": "go"})[
            "actions"
        ]
    return None if np.isfinite(actions).all() else "actions are not finite"


def damaged_message(robot: Robot) -> None:
    """It may even be a good one still: any answer or none is right."""
    try:
        with WorldVLAClient(HOST, robot.port, timeout=PATIENCE) as client:
            client._socket.send(damaged(robot))
            client._socket.recv(timeout=PATIENCE)
    except Exception as error:
        if not type(error).__module__.startswith("websockets"):
            raise


def _array(shape: tuple[int, ...], dtype: str, data: bytes) -> dict[bytes, Any]:
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": list(shape)}


FAULTS: dict[str, Callable[[Robot], str | None]] = {
    "empty message": refused(lambda robot: b""),
    "random bytes": refused(lambda robot: b"\xc1" + robot.random.randbytes(200)),
    "text": refused(lambda robot: "open the drawer"),
    "a list": refused(lambda robot: pack([1, 2, 3])),
    "no picture": refused(lambda robot: pack({"prompt": "go"})),
    "misspelled picture": refused(lambda robot: pack({"imgae": robot.pictures[0], "prompt": "go"})),
    "no prompt": refused(lambda robot: pack({"image": robot.pictures[0]})),
    "reserved token in the prompt": refused(
        lambda robot: pack({"image": robot.pictures[0], "prompt": "<reserved08706>"})
    ),
    "object array": refused(lambda robot: pack({"image": _array((1,), "|O", b"12345678"), "prompt": "go"})),
    "array that lies about its shape": refused(
        lambda robot: pack({"image": _array((4000, 4000, 3), "|u1", b"1234"), "prompt": "go"})
    ),
    "NaN picture": refused(lambda robot: pack({"image": np.full((64, 64, 3), np.nan), "prompt": "go"})),
    "picture of 5000 pixels": refused(lambda robot: pack({"image": np.zeros((5000, 8, 3), np.uint8), "prompt": "go"})),
    "20 MB": refused(lambda robot: pack({"image": np.zeros((2600, 2600, 3), np.uint8), "prompt": "go"})),
    "a million empty maps": refused(lambda robot: b"\xdd" + (10**6).to_bytes(4, "big") + b"\x80" * 10**6),
    "nesting": refused(lambda robot: b"\x91" * 100_000 + b"\x80"),
    "damaged message": damaged_message,
    "unmasked frame": raw_bytes(lambda robot: b"\x82\x05hello"),
    "half a frame": raw_bytes(lambda robot: b"\x82\xff" + b"\0" * 6 + b"\x40\0mask" + b"x" * 1000),
    "2^63 bytes announced": raw_bytes(lambda robot: b"\x82\xff\x7f" + b"\xff" * 7 + b"mask"),
    "random frames": raw_bytes(lambda robot: robot.random.randbytes(500)),
    "reset before the answer": leave_before_the_answer,
    "picture of another size": another_frame_size,
    "REST: no JSON": refused_call(lambda robot: b"{", 400),
    "REST: object array": refused_call(
        lambda robot: b'{"image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}}', 400
    ),
    "REST: deep nesting": refused_call(lambda robot: b"[" * 9000, 400),
    "REST: many entries": refused_call(lambda robot: b"[" + b"0," * 100_000 + b"0]", 400),
    "REST: another robot's key": refused_call(
        lambda robot: json.dumps({"image": "", "instruction": "go", "unnorm_key": "bridge_orig"}).encode(), 400
    ),
    "REST: 30 MB": refused_call(lambda robot: b" " * 30_000_000, 413),
}


# -------------------------------------------------------------------- the run


def start_server(model: str, arguments: list[str]) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "transformers_worldvla.cli", "serve", "--model", model, "--port", "0"]
    command += ["--request-timeout", str(PATIENCE), *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if match := re.search(r"at wss?://.*:(\d+)$", line):
            return server, int(match[1])
    raise SystemExit(f"the server did not start (exit code {server.wait()})")


def memory_mb(pid: int) -> float:
    """Resident memory of a process, where /proc tells."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hub/worldvla-libero-tiny")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--faults", type=float, default=0.2, help="chance of a fault instead of a request")
    parser.add_argument("--side", type=int, default=256, help="pixels of a picture, a multiple of 8")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args, server_arguments = parser.parse_known_args()
    server, port = start_server(args.model, server_arguments)
    try:
        robots = [Robot(port, number, args.side) for number in range(args.clients)]
        for robot in robots:
            robot.seconds, robot.rest_seconds = [], []
        before, began = memory_mb(server.pid), time.monotonic()
        threads = [threading.Thread(target=robot.run, args=(began + args.seconds, args.faults)) for robot in robots]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append(memory_mb(server.pid))
            time.sleep(min(5.0, args.seconds / 25))
        took = time.monotonic() - began
        crashed = server.poll() is not None
        alive = not crashed and robots[0].ask((0,)).shape == robots[0].answers[(0,)].shape
        metrics = urllib.request.urlopen(f"http://{HOST}:{port}/metrics").read().decode()
        for robot in robots:
            robot.client.close()
    finally:
        os.kill(server.pid, signal.SIGTERM)
        code = server.wait(60)
    websocket = [value for robot in robots for value in robot.seconds]
    rest = [value for robot in robots for value in robot.rest_seconds]
    faults: Counter[str] = sum((robot.faults for robot in robots), Counter())
    batches = (
        re.search(r"worldvla_batch_size_sum ([\d.]+)", metrics),
        re.search(r"worldvla_batch_size_count (\S+)", metrics),
    )
    figures = {
        "clients": args.clients,
        "seconds": round(took, 1),
        "good_requests": len(websocket) + len(rest),
        "requests_per_second": round((len(websocket) + len(rest)) / took, 2),
        "websocket_ms": [round(1000 * percentile(websocket, share), 1) for share in (0.5, 0.95)],
        "rest_ms": [round(1000 * percentile(rest, share), 1) for share in (0.5, 0.95)],
        "mean_batch": round(float(batches[0][1]) / float(batches[1][1]), 2) if all(batches) else None,
        "bad_inputs": sum(faults.values()),
        "kinds_of_bad_input": len(faults),
        "wrong_answers": sum(robot.wrong for robot in robots),
        "unexpected": [line for robot in robots for line in robot.unexpected],
        "server_memory_mb": {
            "start": round(before),
            # growing to the end is a leak
            "median_by_fifth": [round(float(np.median(part))) for part in np.array_split(memory, 5)],
            "largest": round(max(memory)),
        },
        "crashes": int(crashed),
        "answers_afterwards": alive,
        "exit_code_after_sigterm": code,
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps({**figures, "faults": dict(faults)}, indent=2) + "\n")
    sys.exit(bool(crashed or not alive or code or figures["wrong_answers"] or figures["unexpected"]))


if __name__ == "__main__":
    main()
