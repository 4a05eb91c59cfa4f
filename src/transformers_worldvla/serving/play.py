"""Keys in, dreams out, in a terminal: drive the robot of a world model by hand.

`Keyboard` turns keys into actions, `draw` a picture into coloured characters, `play` runs the loop. Keys come from any
iterable, so that a pipe or a test can play as well as a person. Nothing here needs a window or a further package.
"""

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..action_tokenization_worldvla import Embodiment
from .dream_world import Dream, DreamWorld

PAIRS = (("w", "s"), ("a", "d"), ("r", "f"), ("i", "k"), ("j", "l"), ("u", "o"), ("t", "g"), ("y", "h"))  # up, down
STAY, TOGGLE, RESTART, FASTER, SLOWER = ".", " ", "0", "+", "-"
QUIT = ("q", "\x04")  # also Ctrl-D
SPEEDS = (0.1, 0.25, 0.5, 1.0)
ABSOLUTE_STEP = 0.1  # of the range, at full speed, where an action is a pose

_NO_CHARACTER = re.compile(r"\x1b(\[[0-9;]*[A-Za-z~]|O[A-Z])?|[\r\n]")  # arrow and function keys, line breaks
HOME, CLEAR, PLAIN = "\x1b[H", "\x1b[2J", "\x1b[0m"
ERASE_LINE, HIDE_CURSOR, SHOW_CURSOR = "\x1b[K", "\x1b[?25l", "\x1b[?25h"


class Keyboard:
    """What each key does to the robot.

    A key moves one dimension by a share (`speed`) of the end of its range, all others stay: 0 where actions are deltas,
    the pose held so far where they are absolute (at first the middle of the ranges, as no frame tells the pose). The
    gripper has a key of its own and stays as it is.

    Attributes:
        moves: key -> the dimension that it moves and the direction, +1 or -1.
        speed: share of the end of the range.
    """

    def __init__(self, robot: Embodiment):
        self._robot = robot
        self._low, self._high = np.array(robot.low), np.array(robot.high)
        gripper = None if robot.gripper is None else int(robot.gripper["index"])
        moving = [
            index for index in range(robot.action_dim) if index != gripper and self._high[index] > self._low[index]
        ]
        self.moves = {
            key: (index, sign)
            for index, pair in zip(moving, PAIRS, strict=False)
            for key, sign in zip(pair, (1, -1), strict=True)
        }
        self._gripper = gripper
        self.speed = 0.5
        self.rest()

    def rest(self) -> None:
        """Forget what was held: an episode begins."""
        is_delta = self._robot.semantics == "delta"
        self._held = np.clip(0.0, self._low, self._high) if is_delta else (self._low + self._high) / 2
        if self._gripper is not None and self._robot.gripper is not None:
            self._held[self._gripper] = self._robot.gripper["open"]

    def action(self, key: str) -> np.ndarray | None:
        """The action (D,) of a key, None for a key that moves nothing."""
        if key == TOGGLE and self._gripper is not None and self._robot.gripper is not None:
            ends = self._robot.gripper["open"], self._robot.gripper["close"]
            self._held[self._gripper] = ends[1] if self._held[self._gripper] == ends[0] else ends[0]
        elif key in (FASTER, SLOWER):
            place = SPEEDS.index(self.speed) + (1 if key == FASTER else -1)
            self.speed = SPEEDS[min(max(place, 0), len(SPEEDS) - 1)]
            return None
        elif key not in self.moves and key != STAY:
            return None
        action = self._held.copy()
        if key in self.moves:
            index, sign = self.moves[key]
            if self._robot.semantics == "delta":
                action[index] = self.speed * (self._high[index] if sign > 0 else self._low[index])
            else:
                action[index] += sign * self.speed * ABSOLUTE_STEP * (self._high[index] - self._low[index])
                action = np.clip(action, self._low, self._high)
                self._held = action.copy()
        return action

    def help(self) -> str:
        """One line that says what the keys do."""
        names = self._robot.action_names or tuple(str(index) for index in range(self._robot.action_dim))
        pairs = [f"{up}/{down} {names[self.moves[up][0]]}" for up, down in PAIRS if up in self.moves]
        gripper = ["space gripper"] if self._gripper is not None else []
        return ", ".join([*pairs, *gripper, f"{STAY} stay", "+/- speed", f"{RESTART} restart", "q quit"])


def draw(pictures: np.ndarray, columns: int, rows: int) -> list[str]:
    """Pictures (C, H, W, 3) beside each other as lines of coloured half blocks, two pixels a character."""
    image = Image.fromarray(np.concatenate(list(pictures), axis=1))
    scale = min(columns / image.width, 2 * rows / image.height)
    width, height = max(1, int(image.width * scale)), max(1, int(image.height * scale / 2))
    pixels = np.asarray(image.resize((width, 2 * height), Image.Resampling.BOX)).tolist()
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\N{UPPER HALF BLOCK}"
            for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + PLAIN)
    return lines


@dataclass
class Played:
    """What was done since the last restart: actions (D,), and the pictures (C, H, W, 3) that followed each."""

    actions: list[np.ndarray] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)


def play(world: DreamWorld, start: Dream, keys: Iterable[str], show: Callable[[Dream, Keyboard], None]) -> Played:
    """Dream along the keys until one of them quits or there are no more; `show` is called with every new frame."""
    keyboard, dream, played = Keyboard(world.robot), start, Played()
    show(dream, keyboard)
    for key in keys:
        if key in QUIT:
            break
        if key == RESTART:
            keyboard.rest()
            dream, played = start, Played()
        elif (action := keyboard.action(key)) is not None:
            dream = world.step([dream], action[None])[0]
            played.actions.append(action)
            played.pictures.append(dream.pictures)
        show(dream, keyboard)
    return played


def read_keys(descriptor: int) -> Iterator[str]:
    """Characters from a terminal as they are pressed, or from a pipe, until it ends.

    Arrow and function keys are passed over, and so are line breaks: keys may be piped in line by line.
    """
    with _unbuffered(descriptor):
        while text := os.read(descriptor, 64).decode("utf-8", "ignore"):
            yield from _NO_CHARACTER.sub("", text)


@contextmanager
def _unbuffered(descriptor: int) -> Iterator[None]:
    """A terminal that gives each key at once and does not show it; as it was before, afterwards."""
    if not os.isatty(descriptor):
        yield
        return
    try:
        import termios
        import tty
    except ModuleNotFoundError:
        raise OSError("playing by keyboard needs a Unix terminal: pipe the keys in instead") from None
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)  # keys that were pressed early count
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class TerminalScreen:
    """Draws dreams into a terminal, in place."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, dream: Dream, keyboard: Keyboard) -> None:
        size = os.get_terminal_size(sys.stderr.fileno())
        columns, rows = size.columns or 80, size.lines or 24  # some terminals do not know
        text = [f"step {dream.steps}, speed {keyboard.speed:g}", *textwrap.wrap(keyboard.help(), columns)]
        lines = [*draw(dream.pictures, columns, max(1, rows - len(text))), *text]
        clear = "" if self._begun else HIDE_CURSOR + CLEAR
        self._begun = True
        print(clear + HOME + "\n".join(line + ERASE_LINE for line in lines), end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._begun:
            print(f"{PLAIN}{SHOW_CURSOR}", file=sys.stderr, flush=True)


def play_in_terminal(world: DreamWorld, start: Dream) -> Played:
    """Play with this process's keyboard, or with keys piped in; frames are drawn where stderr is a terminal."""
    screen = TerminalScreen()
    show = screen if sys.stderr.isatty() else _say_nothing
    try:
        return play(world, start, read_keys(sys.stdin.fileno()), show)
    finally:
        screen.close()


def _say_nothing(dream: Dream, keyboard: Keyboard) -> None:
    pass
