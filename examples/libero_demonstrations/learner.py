"""A policy that acts before the expert takes over, so that demonstrations begin where that policy's own errors lead.

What a policy meets in the simulator is not what a faultless expert shows (Ross et al. 2011, DAgger). Here a trained
checkpoint acts for a while from a new placement; what is recorded is how the expert goes on from there.
"""

import numpy as np
import torch

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.evaluation.libero_benchmark import check_robot, libero_cameras
from transformers_worldvla.evaluation.libero_env import LiberoEnv
from transformers_worldvla.evaluation.policies import ModelPlanner, PlanRequest
from transformers_worldvla.evaluation.rollout import FramePolicy


class Learner:
    """A checkpoint as a policy for one environment, as `worldvla evaluate libero` runs it.

    Args:
        checkpoint: folder or Hub id, for LIBERO's arm.
        steps: (fewest, most) that it acts; drawn anew for each episode.

    Raises:
        ValueError: the checkpoint is for another robot.
    """

    def __init__(self, checkpoint: str, steps: tuple[int, int]):
        torch.set_num_threads(1)  # the recorder's processes share the cores
        self._model = WorldVLAForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._processor = WorldVLAProcessor.from_pretrained(checkpoint)
        check_robot(self._processor.get_embodiment())
        self._steps = steps

    def act(self, env: LiberoEnv, seed: int) -> bool:
        """Act in an environment that has just been reset; whether the goal was reached, and nothing is left to show."""
        suite, text = env.task.suite, env.instruction
        planner = ModelPlanner(self._model, self._processor, {suite: [text]})
        left = int(np.random.default_rng(seed).integers(*self._steps, endpoint=True))

        def answer(frames: np.ndarray, begins: bool) -> np.ndarray:
            return planner.plan([PlanRequest("the one", suite, text, frames, begins, seed)])[0]

        policy = FramePolicy(answer, libero_cameras(planner.robot), self._processor.history)
        policy.begin(env)
        while left:
            chunk = policy.plan()  # (K, 7)
            for remaining in reversed(range(len(chunk))):
                if env.step(chunk[len(chunk) - 1 - remaining]):
                    return True
                left -= 1
                if not left:
                    break
                policy.stepped(remaining)
        return False
