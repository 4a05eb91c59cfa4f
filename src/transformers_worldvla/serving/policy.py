"""`WorldVLAPolicy`: observations in, robot actions out, with everything in between that has to be remembered.

A policy is one robot's: its frames, its chunks of actions, its control step. The weights behind it may be shared by
many (`session`). Which frames a prompt may show is decided in `history`, how chunks become actions in
`worldvla_client.chunking`, what the model is asked in `prediction`.
"""

import copy
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from worldvla_client.chunking import ActionTimeline

from .history import Frame, FrameHistory
from .loading import choose_device, load_model, load_processor
from .observations import Observation, ObservationReader
from .prediction import ActionChunk, ActionPredictor, ChunkRequest


class WorldVLAPolicy:
    """A WorldVLA checkpoint as a policy. Methods may be called from several threads; they wait for one another.

    An observation is `{camera: (H, W, 3) uint8, ..., "prompt": str}`, pictures in the model's orientation. Aliases of
    `prompt` are `instruction` and `task`; other keys, `state` among them, are ignored. A camera may hold (M, H, W, 3),
    M successive control steps, oldest first. `step` may hold the number of the control step.

    The prompt shows up to `processor.history` frames, but only ones that are known to be one control step apart: every
    frame given to `select_action` or `observe` is one step after the one before it; that of `predict_action_chunk` is
    one step after an observed one, and of unknown distance after one that was planned on (unless `replan_interval` is
    1). Where observations hold `step`, the numbers decide. A client that sends one frame a plan thus gets prompts with
    one image.

    Args:
        model, processor: of one checkpoint; `from_pretrained` loads both.
        embodiment: whose actions; not needed where the checkpoint has one, or a default.
        camera_map: key in the observations -> camera (`{"observation/image": "image"}`).
        prompt: instruction for observations without one.
        num_actions: K, actions a chunk; the checkpoint's by default.
        replan_interval: actions of a chunk that are executed before the next is planned; K by default, 1 with
            `aggregation="ensemble"`.
        aggregation: `latest` or `ensemble` (temporal ensembling), see `ActionTimeline`.
        ensemble_coefficient: m of the weights exp(-m i), i = 0 for the oldest chunk.
        entropy, expected_value, generate_kwargs: see `ActionPredictor`.
        overlap: once `select_action` has answered the last step before a plan, tokenize the frame it was given and run
            the prompt up to it in a thread, while the robot moves: the plan then has one frame left to run. The answers
            are the same.
        measure_surprise: rate every frame that `select_action` is given with the world model, see `last_surprise`.
            It costs a pass of the world model a control step.

    Attributes:
        last_chunk: the newest `ActionChunk`, with its confidence; None before the first.
        last_surprise: nats for each image token of the newest frame after the frame and action before it, None where
            these are not known.

    Raises ValueError for options that contradict the checkpoint, before anything is computed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        embodiment: str | None = None,
        camera_map: Mapping[str, str] | None = None,
        prompt: str | None = None,
        num_actions: int | None = None,
        replan_interval: int | None = None,
        aggregation: str = "latest",
        ensemble_coefficient: float = 0.01,
        entropy: bool = False,
        expected_value: bool = False,
        overlap: bool = True,
        measure_surprise: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
    ):
        self.predictor = ActionPredictor(
            model, processor, embodiment, num_actions, entropy, expected_value, generate_kwargs
        )
        self.reader = ObservationReader(self.predictor.robot.cameras, camera_map)
        if replan_interval is None:
            replan_interval = 1 if aggregation == "ensemble" else self.predictor.num_actions
        if not 1 <= replan_interval <= self.predictor.num_actions:
            raise ValueError(
                f"replan_interval is 1 to {self.predictor.num_actions} (actions a chunk), not {replan_interval}"
            )
        self.replan_interval = replan_interval
        self.prompt = prompt
        self.overlap = overlap
        self.measure_surprise = measure_surprise
        self._begin(ActionTimeline(aggregation, ensemble_coefficient))

    def _begin(self, timeline: ActionTimeline) -> None:
        """What is this robot's own."""
        self._timeline = timeline
        self._history = FrameHistory(self.predictor.processor.history)
        self._lock = threading.RLock()
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: Any = "auto",
        engine: bool = False,
        observation_keys: Iterable[str] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> "WorldVLAPolicy":
        """Load a checkpoint or an adapter: a folder or a Hub id.

        Names are checked before weights are read: `embodiment`, `camera_map`, all other options of the class, and the
        keys that observations will have, where `observation_keys` gives them (an observation itself will do).

        Args:
            device: "auto" is CUDA where there is some, else the CPU.
            dtype: of the weights, as they are stored by default.
            engine: compile the decoder (`model.enable_engine`): the first plans take long, later ones a fraction.
            model_kwargs: for the model's `from_pretrained` (`attn_implementation`, `quantization_config` ...).

        Raises ValueError, OSError or ImportError, one line each.
        """
        target = choose_device(device)
        processor = load_processor(source, revision)
        policy = cls(None, processor, **options)  # checks every option
        if observation_keys is not None:
            policy.reader.check_keys(observation_keys)
        policy.predictor.model = load_model(source, revision, target, dtype, **(model_kwargs or {}))
        if engine:
            policy.model.enable_engine()
        return policy

    def session(self) -> "WorldVLAPolicy":
        """A policy of its own, with nothing remembered, over the same weights: one for each robot."""
        policy = copy.copy(self)
        policy._begin(ActionTimeline(self._timeline.aggregation, self._timeline.coefficient))
        return policy

    @property
    def processor(self) -> Any:
        return self.predictor.processor

    @property
    def model(self) -> Any:
        return self.predictor.model

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client has to know, in plain values: `cameras` are the picture keys that observations must hold."""
        robot = self.predictor.robot
        return {
            "cameras": self.reader.keys,
            "action_dim": robot.action_dim,
            "num_actions": self.predictor.num_actions,
            "control_hz": robot.control_hz,
            "embodiment": robot.name,
            "action_names": list(robot.action_names),
            "units": list(robot.units),
            "semantics": robot.semantics,
            "gripper": robot.gripper,
            "history": self.processor.history,
            "replan_interval": self.replan_interval,
        }

    # ---------------------------------------------------------------- acting

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        with self._lock:
            self._history.clear()
            self._timeline.clear()
            self._step = 0  # of the next frame
            self._planned_at: int | None = None
            self._follows = False  # is the next frame one control step after the newest?
            self._instruction: str | None = None
            self._last_action: np.ndarray | None = None
            self._prefix: Future[Any] | None = None  # of the next plan's prompt
            self.last_chunk: ActionChunk | None = None
            self.last_surprise: float | None = None

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Take in a frame between plans: call it at every control step at which nothing is planned.

        The first frame after `predict_action_chunk` may be any later one; those after it are one control step apart.
        """
        with self._lock:
            seen = self.reader.read(observation)
            self._take(seen)
            self._last_action = None  # somebody else acts
            self._step = (self._step if seen.step is None else seen.step) + 1
            self._follows = True

    def select_action(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (D,) for this control step, in robot units; call it at every control step.

        A chunk is planned where none reaches this step, `replan_interval` steps after the last plan, and where the
        instruction has changed.
        """
        with self._lock:
            seen = self.reader.read(observation)
            instruction = self._instruction_of(seen)
            if seen.step is not None:
                if seen.step < self._step - 1:  # the count began again: another episode
                    self.reset()
                self._step = seen.step
            self._take(seen)
            if self.measure_surprise:
                self.last_surprise = self._surprise()
            if instruction != self._instruction:
                self._timeline.clear()
                self._instruction = instruction
            if self._is_due():
                request = ChunkRequest(self._history.frames, instruction, self._prefix)
                chunk = self.predictor.predict([request])[0]
                self._timeline.add(self._step, chunk.actions)
                self._planned_at, self.last_chunk = self._step, chunk
            action = self._timeline.action(self._step)
            assert action is not None  # a plan reaches this step
            self._last_action = action
            self._step += 1
            self._follows = True
            self._prefix = None
            if self.overlap and self._is_due():
                self._prefix = self.predictor.prepare(ChunkRequest(self._history.frames, instruction))
            return action

    def predict_action_chunk(self, observation: Mapping[str, Any]) -> np.ndarray:
        """A chunk of actions (K, D) in robot units for whoever executes them."""
        return self.predict(observation).actions

    def predict(self, observation: Mapping[str, Any]) -> ActionChunk:
        """As `predict_action_chunk`, with the confidence of every action."""
        with self._lock:
            chunk = self.predictor.predict([self.request(observation)])[0]
            self.last_chunk = chunk
            return chunk

    def request(self, observation: Mapping[str, Any]) -> ChunkRequest:
        """Take in a frame that is planned on and return what the model is to be asked about it.

        This is all of `predict_action_chunk` but the model: a server collects the requests of several robots.
        """
        with self._lock:
            seen = self.reader.read(observation)
            instruction = self._instruction_of(seen)
            self._take(seen)
            self._last_action = None
            self._step += 1
            self._follows = self.replan_interval == 1
            return ChunkRequest(self._history.frames, instruction)

    # ---------------------------------------------------------------- imagining

    def imagine(self, actions: np.ndarray, observation: Mapping[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        """The frames that the world model expects under actions (T, D) in robot units, without remembering anything.

        It starts from the observation, or from the newest frame that the policy has seen. Returns T PIL images (lists
        of C with several cameras); `kwargs` are those of `model.imagine`.
        """
        with self._lock:
            if observation is not None:
                frame = Frame(self.reader.read(observation).steps[-1])
            elif len(self._history):
                frame = self._history.frames[-1]
            else:
                raise ValueError("nothing was seen yet: pass observation= to imagine what follows it")
        return self.predictor.imagine(frame, np.asarray(actions), **kwargs)

    def surprise(self, before: Mapping[str, Any], action: np.ndarray, after: Mapping[str, Any]) -> float:
        """How unexpected the frame of `after` is, one control step after `before` and under that action (D,).

        In nats for each image token, see `ActionPredictor.surprise`; nothing is remembered.
        """
        frames = [Frame(self.reader.read(observation).steps[-1]) for observation in (before, after)]
        return self.predictor.surprise(frames[0], action, frames[1])

    # ---------------------------------------------------------------- helpers

    def _take(self, seen: Observation) -> None:
        self._history.add(seen.steps, seen.step, self._follows)

    def _instruction_of(self, seen: Observation) -> str:
        instruction = seen.prompt or self.prompt
        if instruction is None:
            raise ValueError("the observation has no prompt: say what to do under the key 'prompt'")
        return instruction

    def _is_due(self) -> bool:
        """Does this step begin with a plan?"""
        since_plan = None if self._planned_at is None else self._step - self._planned_at
        return since_plan is None or since_plan >= self.replan_interval or not self._timeline.reaches(self._step)

    def _surprise(self) -> float | None:
        """Of the newest frame, where the frame and the action one step before it are known."""
        if self._last_action is None or len(self._history) < 2:
            return None
        before, after = self._history.frames[-2:]
        return self.predictor.surprise(before, self._last_action, after)
