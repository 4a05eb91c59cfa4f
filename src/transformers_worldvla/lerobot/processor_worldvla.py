"""LeRobot's pipelines around the policy: rename, add the batch dimension, move; and back to the CPU.

They normalise nothing: pictures and actions are normalised by the checkpoint's own processor inside the policy. The two
normalising steps are there because `lerobot-train` overrides them by name whenever it goes on from a saved policy.
"""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from .configuration_worldvla import LeRobotWorldVLAConfig


def make_worldvla_pre_post_processors(
    config: LeRobotWorldVLAConfig,
    dataset_stats: dict[str, dict[str, Any]] | None = None,
    dataset_meta: Any = None,
) -> tuple[Any, Any]:
    """Pre- and post-processor of a policy; the dataset's statistics and metadata are not needed.

    Returns:
        Two `PolicyProcessorPipeline`s: an observation, or a batch of a dataset, to the policy's batch; the policy's
        actions (B, D) to the same on the CPU.
    """
    config.validate_features()
    features = {**(config.input_features or {}), **(config.output_features or {})}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features=features, norm_map=config.normalization_mapping),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features or {}, norm_map=config.normalization_mapping),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=after,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
