"""A scripted expert for LIBERO: solves a task's goal predicates from the simulator's own state and sees no camera.

    expert = LiberoExpert(env)              # env: a LiberoEnv that was just reset
    while not env.step(expert.act()): ...

Its demonstrations are scripted, not LIBERO's human ones: say so wherever a number rests on them. Actions are those of
LIBERO's OSC_POSE controller, (7,): position in units of 0.05 m, rotation vector in units of 0.5 rad, gripper -1 open
and +1 closed. A skill is a generator that yields one action a control step and reads the simulator after each; the
geometry is in `libero_scene`, the choice of grasps in `libero_grasps`.

It never stands still: while the fingers move, the hand goes on slowly. Who learns from pictures cannot tell the end of
a pause from its beginning, and a policy that answers its likeliest action would wait for ever.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

from .libero_grasps import DOWN, Grasp, narrowest_grasp, rim_grasps, tilted
from .libero_scene import Scene, center

OPEN, CLOSE = -1.0, 1.0
METERS, RADIANS = 0.05, 0.5  # of an action of 1
MAX_TURN = 0.4  # of an action, per axis
FINGER_STEPS, GENTLE = 11, 0.07  # the fingers take so long to close; how fast the hand moves meanwhile, of an action
OVER = 0.02  # metres beside a grasp from which a hand goes straight down
STALLED_STEPS = 12  # without progress, and a motion is given up
HANDLE_TILTS = (1.4, 1.2, 1.55)  # radians from straight down; a hand that is less level slips off a drawer's handle
DRAWER_REACH, DRAWER_PULL = 0.235, 0.16  # metres in front of a closed handle to keep free, and to pull it

Motion = Generator[np.ndarray, None, None]


class Touch(NamedTuple):
    """How closed fingers drag something along."""

    height: float  # metres over its lowest point
    inset: float  # where they press, from its middle (0) to its rim (1)
    lead: float  # metres that the hand aims ahead
    speed: float  # of an action
    tolerance: float  # metres


PLATE = Touch(height=0.006, inset=0.45, lead=0.025, speed=0.5, tolerance=0.01)
BOWL = Touch(height=0.02, inset=0.3, lead=0.05, speed=1.0, tolerance=0.05)


class LiberoExpert:
    """Solves the task of a `LiberoEnv` that has just been reset; make a new one after every reset."""

    def __init__(self, env: Any):
        self._scene = Scene(env.simulator)
        self._grip = OPEN
        self._steps = self._solve()

    def act(self) -> np.ndarray:
        """The next action (7,) float32, for the state that the simulator is in now.

        Never ends: what is not done after all skills is begun anew. Raises NotImplementedError for a predicate that
        no skill reaches.
        """
        return next(self._steps).astype(np.float32)

    def _solve(self) -> Motion:
        while True:
            for goal in self._scene.goals:
                if not self._scene.is_satisfied(goal):
                    yield from self._reach(goal)
            yield np.array([0, 0, 0, 0, 0, 0, self._grip])

    def _reach(self, goal: list[str]) -> Motion:
        predicate, *names = goal
        if predicate in ("in", "on"):
            yield from self._bring(*names)
        elif predicate == "open":
            yield from self._open(names[0])
        elif predicate == "close":
            yield from self._close(names[0])
        elif predicate == "turnon":
            yield from self._turn_on(names[0])
        else:
            raise NotImplementedError(f"the scripted expert cannot reach {goal}")

    # ---------------------------------------------------------------- motions

    def _move(
        self,
        target: np.ndarray,
        rotation: np.ndarray = DOWN,
        tolerance: float = 0.008,
        angle: float = 0.08,
        steps: int = 80,
        speed: float = 1.0,
        gentle_steps: int = 0,
    ) -> Motion:
        """Straight to a position (3,) and rotation (3, 3), until both are met, nothing moves any more or time is up.

        `gentle_steps` are slow ones at the start, while the fingers open or close.
        """
        from scipy.spatial.transform import Rotation

        best, since = np.inf, 0
        for step in range(steps):
            offset = np.asarray(target) - self._scene.hand
            turn = Rotation.from_matrix(rotation @ self._scene.hand_rotation.T).as_rotvec()
            distance, left = float(np.linalg.norm(offset)), float(np.linalg.norm(turn))
            if distance < tolerance and left < angle:
                return
            error = distance + 0.1 * left
            best, since = (error, 0) if error < best - 5e-4 else (best, since + 1)
            if since > STALLED_STEPS:
                return
            push = offset / METERS
            limit = GENTLE if step < gentle_steps else speed
            push *= min(1.0, limit / max(np.abs(push).max(), 1e-9))
            yield np.array([*push, *np.clip(turn / RADIANS, -MAX_TURN, MAX_TURN), self._grip])

    def _rise(self, height: float, rotation: np.ndarray = DOWN, steps: int = 80, gentle_steps: int = 0) -> Motion:
        target = self._scene.hand + [0, 0, height]
        yield from self._move(target, rotation, 0.02, steps=steps, speed=0.7, gentle_steps=gentle_steps)

    # ---------------------------------------------------------------- picking and placing

    def _grasps(self, name: str) -> list[Grasp]:
        """Ways to take hold of an object, the best first."""
        vertices = self._scene.object_vertices(name)
        if "bowl" in name:
            return rim_grasps(vertices, self._scene.clutter(without=name))[:3]
        return [narrowest_grasp(vertices, depth) for depth in (0.035, 0.027, 0.019)]

    def _pick(self, name: str, lift: float) -> Generator[np.ndarray, None, np.ndarray]:
        """Take hold of an object and lift it; returns the rotation of the hand that holds it."""
        if self._scene.is_held(name):  # by whoever acted before
            self._grip = CLOSE
            return self._scene.hand_rotation
        for attempt in range(3):
            position, rotation = self._grasps(name)[attempt]
            before = self._scene.height(name)
            self._grip = OPEN
            hover = position[2] + (0.15 if attempt == 0 else 0.12)
            over = attempt == 0 and bool(np.linalg.norm(self._scene.hand[:2] - position[:2]) < OVER)
            if not over:
                yield from self._move(np.array([*position[:2], hover]), rotation, 0.012)
            if not over or self._scene.hand[2] > position[2] + 0.05:
                yield from self._move(position + [0, 0, 0.05], rotation, speed=0.8)
            yield from self._move(position, rotation, 0.006, steps=40, speed=0.4)
            self._grip = CLOSE
            yield from self._rise(lift, rotation, gentle_steps=FINGER_STEPS)
            if self._scene.height(name) > before + 0.2 * lift:
                break
        return rotation

    def _place(self, name: str, xy: np.ndarray, bottom: float, rotation: np.ndarray) -> Motion:
        """Carry what is held so that its own middle is over `xy` and its lowest point at z = `bottom`, and let go."""
        target = np.array([*xy, bottom]) + self._hold_offset(name)
        height = float(np.clip(self._scene.hand[2], target[2] + 0.06, target[2] + 0.2))
        yield from self._move(np.array([*self._scene.hand[:2], max(height, self._scene.hand[2])]), rotation, 0.04)
        yield from self._move(np.array([*target[:2], height]), rotation, 0.012)
        target = np.array([*xy, bottom]) + self._hold_offset(name)  # it may have slipped on the way
        yield from self._move(target, rotation, 0.01, steps=60, speed=0.5)
        self._grip = OPEN
        yield from self._rise(0.1, rotation, steps=30, gentle_steps=FINGER_STEPS)

    def _hold_offset(self, name: str) -> np.ndarray:
        """From the middle of an object's lower side to the hand (3,)."""
        vertices = self._scene.object_vertices(name)
        return self._scene.hand - [*center(vertices)[:2], vertices[:, 2].min()]

    def _bring(self, name: str, destination: str) -> Motion:
        """Put an object into or onto a region, a fixture or another object."""
        scene = self._scene
        if name.startswith("plate"):
            yield from self._push(name, scene.region_center(destination)[:2], PLATE)
            return
        if "cabinet" in destination and any(level in destination for level in ("top_r", "middle_r", "bottom_r")):
            joint = scene.drawer_joint(destination)
            if not scene.is_open(joint):
                yield from self._clear_drawer(name, joint)
                yield from self._open(destination)
        rotation = yield from self._pick(name, lift=0.2)
        if scene.is_body(destination):
            vertices = scene.object_vertices(destination)
            low, high = vertices[:, 2].min(), vertices[:, 2].max()
            bottom = low + 0.03 if "plate" in destination else high + (0.01 if "bowl" in destination else 0.02)
            yield from self._place(name, center(vertices)[:2], bottom, rotation)
        else:
            spot = scene.region_center(destination)
            yield from self._place(name, spot[:2], spot[2] + (0.02 if "basket" in destination else 0.03), rotation)

    def _clear_drawer(self, name: str, joint: int) -> Motion:
        """Set an object aside that lies where a drawer opens."""
        handle, outwards = self._scene.handle(joint)
        vertices = self._scene.object_vertices(name)
        offset = center(vertices) - handle
        if not 0 < offset @ outwards < DRAWER_REACH or abs(outwards[0] * offset[1] - outwards[1] * offset[0]) > 0.2:
            return
        spot = center(vertices) + (DRAWER_REACH - offset @ outwards) * outwards
        yield from self._push(name, spot[:2], BOWL)

    def _push(self, name: str, xy: np.ndarray, touch: Touch) -> Motion:
        """Slide a plate or a bowl: closed fingers press inside its rim and drag it along."""
        self._grip = CLOSE
        for _ in range(4):
            vertices = self._scene.object_vertices(name)
            middle, radius, bottom = center(vertices)[:2], np.ptp(vertices[:, 0]) / 2, vertices[:, 2].min()
            way = xy - middle
            if np.linalg.norm(way) < touch.tolerance:
                return
            way /= np.linalg.norm(way)
            contact = np.array([*(middle + way * touch.inset * radius), bottom])
            yield from self._move(contact + [0, 0, 0.12], tolerance=0.015)
            yield from self._move(
                contact + [0, 0, touch.height + 0.006], tolerance=0.006, steps=50, speed=0.8 * touch.speed
            )
            for _ in range(150):
                middle = center(self._scene.object_vertices(name))[:2]
                left, hand = xy - middle, self._scene.hand[:2]
                if left @ way < 0.004 or (hand - middle) @ way > radius + 0.03:  # there, or the fingers slipped out
                    break
                ahead = hand + touch.lead * left / max(np.linalg.norm(left), 1e-6)
                yield from self._move(
                    np.array([*ahead, bottom + touch.height]), tolerance=0.001, steps=1, speed=touch.speed
                )
            yield from self._rise(0.1, steps=30)

    # ---------------------------------------------------------------- drawers and knobs

    def _open(self, region: str) -> Motion:
        """Pull a drawer by its handle, the hand nearly level."""
        joint = self._scene.drawer_joint(region)
        for tilt in HANDLE_TILTS:
            handle, outwards = self._scene.handle(joint)
            rotation = tilted(outwards, tilt)
            pointing = rotation[:, 2]
            self._grip = OPEN
            above = handle - 0.14 * pointing + [0, 0, 0.05]
            yield from self._move(above, rotation, 0.03, 0.06, steps=110)
            yield from self._move(handle - 0.06 * pointing, rotation, 0.015, 0.05, speed=0.8)
            yield from self._move(handle + 0.004 * pointing, rotation, 0.006, steps=40, speed=0.5)
            self._grip = CLOSE
            pulled = self._scene.hand + DRAWER_PULL * outwards
            yield from self._move(pulled, rotation, 0.016, speed=0.7, gentle_steps=FINGER_STEPS)
            self._grip = OPEN
            yield from self._move(self._scene.hand - 0.08 * pointing, rotation, 0.02, steps=30, gentle_steps=6)
            if self._scene.is_open(joint):
                return

    def _close(self, region: str) -> Motion:
        """Push a drawer shut with closed fingers."""
        joint = self._scene.drawer_joint(region)
        self._grip = CLOSE
        handle, outwards = self._scene.handle(joint)
        front = handle + 0.08 * outwards
        yield from self._move(front + [0, 0, 0.2], tolerance=0.02)
        yield from self._move(front, tolerance=0.012, speed=0.6)
        for _ in range(6):
            handle, outwards = self._scene.handle(joint)
            yield from self._move(handle - 0.03 * outwards, tolerance=0.01, speed=0.5, steps=25)
        yield from self._move(self._scene.hand + 0.05 * outwards + [0, 0, 0.12], tolerance=0.03, steps=30)

    def _turn_on(self, fixture: str) -> Motion:
        """Take a stove's knob from above and twist."""
        corners, axis, sign = self._scene.knob(fixture)
        top = corners[:, 2].max()
        self._grip = OPEN
        yield from self._move(np.array([*axis[:2], top + 0.12]), tolerance=0.015)
        yield from self._move(np.array([*axis[:2], top + 0.05]), tolerance=0.01)
        yield from self._move(np.array([*axis[:2], top - 0.012]), steps=50, speed=0.4)
        self._grip = CLOSE
        for _ in range(50):
            yield np.array([0, 0, 0, 0, 0, 0.35 * sign, CLOSE])
