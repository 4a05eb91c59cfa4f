"""One LIBERO task in the simulator: complete resets, physics by itself, pictures only when somebody looks.

`LiberoEnv` is what every closed loop here runs on: evaluation, the scripted expert, the recorder of demonstrations. It
counts no steps, knows no policy and no checkpoint.

What differs from LIBERO's own `OffScreenRenderEnv`, and why:

- Nothing is drawn in `step`. Drawing is some 90 % of a step there; here it is done by `render`, and what it returns is
  bit for bit the picture that LIBERO's observation holds after the same steps, turned by `rotation`. robosuite takes
  observations one physics step (2 ms) before the end of a control step; so do `render` and `state`.
- The model is built once, not at every reset. A reset restores all that an episode can have changed: joint state, time,
  controls, warm start of the solver, controller goals, gripper, places of fixtures, visibility of sites. Fixtures (a
  stove, a rack) are no part of an initial state; LIBERO jitters them from numpy's global generator, so that there an
  episode depends on those before it. Here `seed` decides.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .libero_suites import find_task
from .rendering import choose_gl, renderer_name

NOOP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # still arm, open gripper
SETTLE_STEPS = 10  # objects of an initial state fall into place
ROTATION = 180  # of raw OpenGL pictures, as in the authors' data and the public LeRobot copies
_DRAWN = (  # all that drawing a scene reads from the simulator's data
    *("geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
    *("xpos", "xquat", "xmat", "xipos", "ximat"),
)
_PLACEMENT_ATTEMPTS = 100  # robosuite gives up when objects do not fit; LIBERO tries again, and so does this


class LiberoEnv:
    """A task of a LIBERO suite, with delta actions (7,) of the end effector at 20 Hz.

    Args:
        suite: `libero_goal`, `libero_spatial_swap`, ...
        task: 0-based number in the suite's official order.
        resolution: pixels of a picture's side.
        rotation: degrees that raw pictures are turned by, counter-clockwise: the embodiment's `rotation`.

    Raises:
        ValueError: there is no such suite or task.
        ImportError: the extra `libero` or OpenGL is missing; the message says what to install.
    """

    def __init__(self, suite: str, task: int, resolution: int = 256, rotation: int = ROTATION):
        self.task = find_task(suite, task)
        self.instruction = self.task.instruction
        self.initial_states = self.task.initial_states()  # (N, S)
        self.resolution = resolution
        self._quarter_turns = rotation // 90
        choose_gl()
        logging.disable(logging.WARNING)  # robosuite warns on import about a settings file that it does without
        try:
            import mujoco
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.utils.errors import RandomizationError
        finally:
            logging.disable(logging.NOTSET)
        self._placement_error = RandomizationError
        with _numpy_generator(0):
            self._wrapper = self._retry_placement(
                lambda: ControlEnv(
                    bddl_file_name=str(self.task.bddl_file),
                    use_camera_obs=False,
                    has_offscreen_renderer=False,  # made by the first `render`
                    hard_reset=False,
                    ignore_done=True,
                )
            )
        self.simulator = self._wrapper.env
        self._model, self._data = self.simulator.sim.model._model, self.simulator.sim.data._data
        self._changeable = {name: getattr(self._model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}
        for fixture in self.simulator.fixtures_dict.values():
            # back to where its file has it: LIBERO's samplers take places in the world for places on the fixture, and
            # would put what lies on a stove or in a drawer beside it
            body, root = self._model.body(fixture.root_body).id, fixture.get_obj()
            self._changeable["body_pos"][body] = [float(x) for x in root.get("pos", "0 0 0").split()]
            self._changeable["body_quat"][body] = [float(x) for x in root.get("quat", "1 0 0 0").split()]
        self._seen = mujoco.MjData(self._model)  # the moment of the last observation
        self._observation: dict[str, np.ndarray] = {}
        self._context: Any = None
        self._watch()

    # ------------------------------------------------------------------ episodes

    def reset(self, initial_state: np.ndarray | None, seed: int = 0, settle_steps: int = SETTLE_STEPS) -> None:
        """Start an episode: it is the same whatever ran in this process before.

        Args:
            initial_state: (S,), usually a row of `initial_states`; None draws a new placement of all objects.
            seed: decides what an initial state leaves open (the jitter of fixtures), and a placement that is drawn.
            settle_steps: steps of `NOOP` before the episode; whether the goal is reached there does not count.

        Raises:
            ValueError: the state has another length than this task's.
        """
        simulator = self.simulator
        size = 1 + self._model.nq + self._model.nv
        if initial_state is not None and np.shape(initial_state) != (size,):
            raise ValueError(f"a state of {self.task.name} has shape ({size},), not {np.shape(initial_state)}")
        for name, values in self._changeable.items():
            getattr(self._model, name)[:] = values
        with _numpy_generator(seed):
            self._retry_placement(simulator.reset)
        for robot in simulator.robots:  # robosuite forgets where it had told the fingers to go
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        state = simulator.sim.get_state().flatten() if initial_state is None else np.asarray(initial_state, np.float64)
        simulator.sim.reset()
        simulator.sim.set_state_from_flattened(state)
        simulator.sim.forward()
        simulator._check_success()
        simulator._post_process()
        simulator._update_observables(force=True)
        self._observation = simulator._get_observations()
        for _ in range(settle_steps):
            self.step(NOOP)

    def step(self, action: np.ndarray) -> bool:
        """Carry out one action (7,): position and axis-angle deltas in units of 0.05 m and 0.5 rad, and the gripper
        (-1 opens, 1 closes). Returns whether the task's goal holds now. Values outside [-1, 1] are clipped by the
        controller.

        Raises:
            ValueError: the action has another shape, or a value is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"LIBERO takes 7 finite numbers, not {action}")
        self._observation, _, success, _ = self.simulator.step(action)
        return bool(success)

    @property
    def state(self) -> np.ndarray:
        """Proprioception (8,) float32: end effector position (3) in m, axis-angle (3) in rad, finger positions (2)."""
        from robosuite.utils.transform_utils import quat2axisangle

        seen = self._observation
        rotation = quat2axisangle(np.array(seen["robot0_eef_quat"]))
        return np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]]).astype(np.float32)

    # ------------------------------------------------------------------ pictures

    def render(self, camera: str = "agentview") -> np.ndarray:
        """What a camera saw last, (resolution, resolution, 3) uint8, in the model's orientation.

        LIBERO's cameras are `agentview` and `robot0_eye_in_hand`. Raises ValueError for a camera that is not there.
        """
        cameras = self.simulator.sim.model.camera_names
        if camera not in cameras:
            raise ValueError(f'no camera "{camera}" in the scene; there are {", ".join(cameras)}')
        size = self.resolution
        if self._context is None:
            self._context = self._open_context()
        self._context.gl_ctx.make_current()
        self._context.render(size, size, camera_id=self.simulator.sim.model.camera_name2id(camera))
        raw = self._context.read_pixels(size, size)  # rows from the bottom, as OpenGL has them
        return np.ascontiguousarray(np.rot90(raw, self._quarter_turns))

    @property
    def renderer(self) -> str:
        """What draws the pictures, for reports."""
        self.render()
        return renderer_name()

    def _open_context(self) -> Any:
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        simulator = self.simulator
        try:
            context = MjRenderContextOffscreen(
                _Snapshot(simulator.sim.model, self._seen), device_id=simulator.render_gpu_device_id
            )
        except (RuntimeError, ImportError) as error:
            raise ImportError(f"MuJoCo cannot draw here: {' '.join(str(error).split())}") from error
        context.vopt.geomgroup[0] = int(simulator.render_collision_mesh)
        context.vopt.geomgroup[1] = int(simulator.render_visual_mesh)
        return context

    def _watch(self) -> None:
        """Keep what there is to draw at the moments when robosuite takes its observations."""
        from robosuite.utils.observables import Observable, sensor

        @sensor(modality="snapshot")
        def remember(_: Any) -> np.ndarray:
            for field in _DRAWN:
                getattr(self._seen, field)[:] = getattr(self._data, field)
            return np.zeros(1)

        name = "snapshot"
        self.simulator.add_observable(Observable(name, remember, sampling_rate=self.simulator.control_freq))

    # ------------------------------------------------------------------ housekeeping

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""
        if self._context is not None:
            self._context.gl_ctx.make_current()  # textures are freed by number, in whatever context is current
            self._context = None
        self._wrapper.close()

    def _retry_placement(self, place: Any) -> Any:
        for _ in range(_PLACEMENT_ATTEMPTS - 1):
            try:
                return place()
            except self._placement_error:
                continue
        return place()


class _Snapshot:
    """A moment of the simulation in the shape that robosuite's renderer expects.

    Opened on the simulation itself, the renderer would call its `forward`, which moves the solver's warm start: an
    episode would go another way (by rounding) when its first picture is also the first of its process.
    """

    def __init__(self, model: Any, data: Any):
        self.model, self.data, self._data = model, self, data

    def forward(self) -> None:
        """What is drawn was computed when it was seen."""

    def add_render_context(self, context: Any) -> None:
        """The context belongs to `LiberoEnv`."""


@contextmanager
def _numpy_generator(seed: int) -> Iterator[None]:
    """numpy's global generator, which LIBERO draws from, started at `seed` and afterwards as it was."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
