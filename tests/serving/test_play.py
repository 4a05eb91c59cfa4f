"""Playing by keyboard: what keys do, that they arrive from a real terminal, and what `--play` leaves behind."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import tty
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transformers_worldvla.action_tokenization_worldvla import LIBERO, Embodiment
from transformers_worldvla.cli.main import main
from transformers_worldvla.serving.dream_world import Dream, DreamWorld
from transformers_worldvla.serving.play import Keyboard, draw, play, read_keys
from transformers_worldvla.serving.policy import WorldVLAPolicy

LIFT = Embodiment("lift", low=(0.0, -1.0, 5.0), high=(2.0, 1.0, 5.0), semantics="absolute")
STILL = [0.0] * 6 + [-1.0]  # LIBERO's arm with its gripper open


def test_a_key_moves_one_dimension_by_a_share_of_its_range() -> None:
    keyboard = Keyboard(LIBERO)
    for index, (up, down) in enumerate(["ws", "ad", "rf", "ik", "jl", "uo"]):
        for key, end in ((up, LIBERO.high[index]), (down, LIBERO.low[index])):
            expected = np.array(STILL)
            expected[index] = end / 2
            np.testing.assert_allclose(keyboard.action(key), expected)
    np.testing.assert_array_equal(keyboard.action("."), STILL)
    assert all(keyboard.action(key) is None for key in "xz~\x1bé")


def test_speed_has_steps_and_ends() -> None:
    keyboard = Keyboard(LIBERO)

    def reach() -> float:
        return keyboard.action("w")[0] / LIBERO.high[0]

    reached = [reach()]
    for key in "++-----":
        assert keyboard.action(key) is None
        reached.append(reach())
    np.testing.assert_allclose(reached, [0.5, 1.0, 1.0, 0.5, 0.25, 0.1, 0.1, 0.1])


def test_the_gripper_stays_as_it_is_until_its_key() -> None:
    keyboard = Keyboard(LIBERO)
    states = [keyboard.action(key)[6] for key in "w ws "]
    assert states == [-1.0, 1.0, 1.0, 1.0, -1.0]
    keyboard.action(" ")
    keyboard.rest()
    assert keyboard.action(".")[6] == -1.0
    assert Keyboard(replace(LIBERO, gripper=None)).action(" ") is None


def test_absolute_robots_hold_their_pose_and_constant_dimensions_have_no_key() -> None:
    keyboard = Keyboard(LIFT)
    np.testing.assert_allclose(keyboard.action("."), [1.0, 0.0, 5.0])
    np.testing.assert_allclose(keyboard.action("w"), [1.1, 0.0, 5.0])
    np.testing.assert_allclose(keyboard.action("d"), [1.1, -0.1, 5.0])
    assert keyboard.action("r") is None
    for _ in range(20):
        last = keyboard.action("w")
    np.testing.assert_allclose(last, [2.0, -0.1, 5.0])
    assert keyboard.help().startswith("w/s 0, a/d 1, . stay")


def test_pictures_are_drawn_two_pixels_a_character() -> None:
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    picture[0, 0, 0] = (250, 10, 20)
    picture[0, 1, 0] = (1, 2, 3)
    lines = draw(picture, columns=4, rows=10)
    assert len(lines) == 2 and all(line.count("▀") == 4 for line in lines)
    assert lines[0].startswith("\x1b[38;2;250;10;20;48;2;1;2;3m▀")
    two = draw(np.zeros((2, 32, 32, 3), np.uint8), columns=20, rows=50)  # beside each other, as wide as it fits
    assert len(two) == 5 and two[0].count("▀") == 20


@pytest.fixture
def world(arm: WorldVLAPolicy) -> DreamWorld:
    return DreamWorld(arm.model, arm.processor)


def test_playing_is_imagining_the_actions_of_the_keys(world: DreamWorld, frames: list[np.ndarray]) -> None:
    shown: list[Dream] = []
    start = world.begin(frames[0])
    played = play(world, start, "xw +d", lambda dream, keyboard: shown.append(dream))
    keyboard = Keyboard(world.robot)
    actions = [action for key in "w +d" if (action := keyboard.action(key)) is not None]
    np.testing.assert_array_equal(played.actions, actions)
    expected = world.model.imagine(world.processor, image=frames[0], actions=np.array(actions))
    np.testing.assert_array_equal([seen[0] for seen in played.pictures], [np.asarray(one) for one in expected])
    assert [dream.steps for dream in shown] == [0, 0, 1, 2, 2, 3]


def test_restart_and_quit(world: DreamWorld, frames: list[np.ndarray]) -> None:
    start = world.begin(frames[0])
    again = play(world, start, "ww 0dqw", lambda dream, keyboard: None)
    fresh = play(world, start, "d", lambda dream, keyboard: None)
    np.testing.assert_array_equal(again.actions, fresh.actions)
    np.testing.assert_array_equal(again.pictures, fresh.pictures)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal: where a person types, and where a program reads."""
    typed, read = pty.openpty()
    yield typed, read
    os.close(typed)
    os.close(read)


def test_a_terminal_gives_each_key_at_once(terminal: tuple[int, int]) -> None:
    typed, read = terminal
    before = tty.tcgetattr(read)
    keys = read_keys(read)
    ready = threading.Event()

    def type_keys() -> None:
        ready.wait(10)
        os.write(typed, b"w")  # no line break: a terminal by itself would wait for one

    person = threading.Thread(target=type_keys)
    person.start()
    ready.set()
    assert next(keys) == "w"
    person.join()
    os.write(typed, b"\x1b[A\x1b[1;5C\x1bOPd ")  # up, ctrl-right, F1, then two keys
    assert [next(keys), next(keys)] == ["d", " "]
    assert not tty.tcgetattr(read)[tty.LFLAG] & tty.ICANON
    keys.close()
    assert tty.tcgetattr(read) == before, "the terminal is left as it was"


def test_keys_may_be_piped_in() -> None:
    read, write = os.pipe()
    os.write(write, b"ww\nd \r\nq")
    os.close(write)
    assert "".join(read_keys(read)) == "wwd q"
    os.close(read)


COMMAND = ["imagine", "--play", "--device", "cpu"]


@pytest.fixture
def picture(tmp_path: Path, frames: list[np.ndarray]) -> Path:
    Image.fromarray(frames[0]).save(tmp_path / "now.png")
    return tmp_path / "now.png"


def test_the_command_keeps_what_was_played(
    arm_checkpoint: Path,
    world: DreamWorld,
    picture: Path,
    frames: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "keys.txt").write_text("w d\n")
    options = ["--model", str(arm_checkpoint), "--image", str(picture), "--output", str(tmp_path / "played"), "--json"]
    with (tmp_path / "keys.txt").open() as keys:
        monkeypatch.setattr(sys, "stdin", keys)
        assert main([*COMMAND, *options]) == 0
    document = json.loads(capfd.readouterr().out)
    expected = play(world, world.begin(frames[0]), "w d", lambda dream, keyboard: None)
    assert document["actions"] == np.array(expected.actions).tolist()
    assert [Path(name).name for name in document["frames"]] == [f"imagined_00{step}.png" for step in (1, 2, 3)]
    for name, seen in zip(document["frames"], expected.pictures, strict=True):
        with Image.open(name) as file:
            np.testing.assert_array_equal(np.asarray(file), seen[0])
    with Image.open(document["gif"]) as gif:
        assert gif.n_frames == 4


def test_the_command_says_what_is_missing(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["imagine", "--image", str(picture), "--actions", "plan.csv"]) == 2
    assert "--output is missing" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["imagine", "--image", str(picture), "--output", "frames"])
    assert stopped.value.code == 2 and "--actions --play" in capfd.readouterr().err


def test_a_person_at_a_terminal_sees_the_dream(arm_checkpoint: Path, picture: Path, terminal: tuple[int, int]) -> None:
    typed, screen = terminal
    tty.setraw(typed)
    os.set_blocking(typed, False)
    program = [sys.executable, "-m", "transformers_worldvla.cli"]
    command = [*program, *COMMAND, "--model", str(arm_checkpoint), "--image", str(picture)]
    game = subprocess.Popen(command, stdin=screen, stderr=screen, stdout=subprocess.PIPE)
    seen = io.StringIO()

    def wait_for(pattern: str) -> None:
        """Read the screen until it shows that."""
        while not re.search(pattern, seen.getvalue(), re.S):
            assert select.select([typed], [], [], 120)[0], seen.getvalue()[-500:]
            seen.write(os.read(typed, 1 << 16).decode("utf-8", "ignore"))

    try:
        wait_for(r"step 0, speed 0\.5.*q\s+quit")
        os.write(typed, b"w")
        wait_for(r"step 1, speed 0\.5")
        os.write(typed, b"+ ")
        wait_for(r"step 2, speed 1")
        os.write(typed, b"q")
        while game.poll() is None:  # the program leaves only when its last output has been read
            if select.select([typed], [], [], 0.1)[0]:
                seen.write(os.read(typed, 1 << 16).decode("utf-8", "ignore"))
        assert game.stdout is not None
        out = game.stdout.read()
    finally:
        game.kill()
        game.wait()
    assert game.returncode == 0 and b"2 frames in" in out
    assert "▀" in seen.getvalue()
