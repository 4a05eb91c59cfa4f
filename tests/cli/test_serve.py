"""`worldvla serve`: it serves until it is told to stop, and wrong arguments are one line before anything is loaded."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from worldvla_client import ServerError, WorldVLAClient

PROMPT = "push the square to the right"


@pytest.fixture
def serving() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start `worldvla serve` on a free port; gives the process and the port."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **environment: str) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "transformers_worldvla.cli", "serve", "--port", "0", *map(str, arguments)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        processes.append(process)
        stream = process.stderr if "--json" in arguments else process.stdout
        assert stream is not None
        for line in stream:
            if match := re.search(r"at wss?://127\.0\.0\.1:(\d+)$", line):
                return process, int(match[1])
        raise AssertionError(f"it did not start: {process.communicate()}")

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_it_serves_what_the_checkpoint_answers_and_stops_when_told(
    serving: Callable[..., tuple[subprocess.Popen[str], int]], robot_checkpoint: Path
) -> None:
    options = ["--camera-map", "observation/image=image", "--num-actions", 3, "--json"]
    process, port = serving("--model", robot_checkpoint, *options, WORLDVLA_API_KEY="s3cret")
    picture = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    with pytest.raises(ServerError, match="401"):
        WorldVLAClient(port=port)
    with WorldVLAClient(port=port, api_key="s3cret") as client:
        assert client.metadata["cameras"] == ["observation/image"]
        actions = client.infer({"observation/image": picture, "prompt": PROMPT})["actions"]
        processor = WorldVLAProcessor.from_pretrained(robot_checkpoint)
        model = WorldVLAForCausalLM.from_pretrained(robot_checkpoint)
        tokens = model.generate_actions(**processor(images=[picture], instruction=PROMPT), num_actions=3)
        np.testing.assert_allclose(actions, processor.decode_actions(tokens)[0], atol=1e-6)
        process.send_signal(signal.SIGTERM)  # with a client still there
        out, _ = process.communicate(timeout=60)
        with pytest.raises(ServerError, match="1001"):
            client.infer({"observation/image": picture, "prompt": PROMPT})
    assert process.returncode == 0
    document: dict[str, Any] = json.loads(out)
    assert document["address"] == f"ws://127.0.0.1:{port}" and document["metadata"]["num_actions"] == 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "70000"], "'70000' is no port"),
        (["--camera-map", "front"], "--camera-map front: write KEY=CAMERA"),
        (["--camera-map", "front=imag"], "did you mean 'image'?"),
        (["--embodiment", "panda"], "unknown embodiment 'panda'; known: libero"),
        (["--tls-key", "key.pem"], "--tls-key needs --tls-cert"),
        (["--tls-cert", "no-such.pem"], "no-such.pem"),
        (["--tls-cert", __file__], "no certificate with its key in PEM"),
        (["--device", "no-such-device"], "'no-such-device' cannot be used here"),
        (["--host", "no-such-host.invalid"], "no-such-host.invalid"),
        (["--batch-wait", "-1"], "'-1'"),
        (["--revision", "main"], "--revision belongs to Hub ids"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    worldvla: Callable[..., Any], robot_checkpoint: Path, arguments: list[str], reason: str
) -> None:
    try:
        result = worldvla("serve", "--model", robot_checkpoint, "--port", 0, *arguments)
        code, lines = result.code, result.err
    except SystemExit as error:  # argparse
        code, lines = error.code, None
    assert code == 2
    if lines is not None:
        assert reason in lines and len(lines.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(worldvla: Callable[..., Any], robot_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = worldvla("serve", "--model", robot_checkpoint, "--port", port)
    assert result.code == 2 and f"127.0.0.1:{port}" in result.err


def test_a_folder_without_a_checkpoint_is_one_line(worldvla: Callable[..., Any], tmp_path: Path) -> None:
    result = worldvla("serve", "--model", tmp_path, "--port", 0)
    assert result.code == 2 and "holds no WorldVLA checkpoint" in result.err
