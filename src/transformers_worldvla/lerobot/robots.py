"""Whose actions a policy predicts: an embodiment of the checkpoint, or a new one made of the dataset it is trained on.

What LeRobot knows of the robot (features, statistics) is held against the embodiment here, before weights are read.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from ..action_tokenization_worldvla import Embodiment
from ..data import action_statistics, build_embodiment, load_episodes
from .batches import ACTION, camera_keys
from .configuration_worldvla import LeRobotWorldVLAConfig

logger = logging.getLogger(__name__)


def choose_robot(processor: Any, config: LeRobotWorldVLAConfig, dataset_meta: Any = None) -> Embodiment:
    """The embodiment that `config.embodiment` names.

    A name that the processor does not know, together with a dataset, makes a new robot, which takes the place of the
    others: the ranges of an action token are what it was last trained with. Raises ValueError that lists those known.
    """
    name = config.embodiment
    if name is not None and name not in processor.embodiments:
        if config.new_robot is None and dataset_meta is not None and dataset_meta.total_episodes > 0:
            robot = robot_of_dataset(dataset_meta.root, name, config.camera_map)
            config.new_robot = robot.to_dict()
            logger.info("new embodiment %s of %s: %s to %s", robot.describe(), robot.dataset, robot.low, robot.high)
        if config.new_robot is not None and config.new_robot["name"] == name:
            processor.embodiments, processor.default_embodiment = {name: config.new_robot}, None
    return processor.get_embodiment(name)


def robot_of_dataset(root: str | Path, name: str, camera_map: dict[str, str]) -> Embodiment:
    """As `worldvla tokenize` makes it: ranges by minimum and maximum of all actions, names and cameras of the dataset.

    With a `camera_map` (key -> camera) only its keys are cameras, under its names.
    """
    dataset = load_episodes(root, cameras=list(camera_map) or None)
    statistics = action_statistics([episode.actions for episode in dataset], names=dataset.action_names)
    return build_embodiment(dataset, statistics, list(camera_map.values()) or dataset.cameras, name)


def check_features(config: LeRobotWorldVLAConfig, robot: Embodiment) -> None:
    """Raise ValueError, one line, when LeRobot's features do not fit the embodiment."""
    config.validate_features()
    if config.image_features:
        camera_keys(robot.cameras, config.image_features, config.camera_map)
    if config.action_feature is not None and config.action_feature.shape[0] != robot.action_dim:
        raise ValueError(
            f"actions have {config.action_feature.shape[0]} dimensions here, embodiment {robot.name!r} has "
            f"{robot.action_dim}: --policy.embodiment=NEW_NAME trains a new robot with the ranges of the dataset"
        )


def warn_of_clipping(robot: Embodiment, dataset_stats: dict[str, dict[str, Any]] | None) -> None:
    """Warn when the dataset's actions reach beyond the embodiment's ranges: they are clipped."""
    stats = (dataset_stats or {}).get(ACTION, {})
    if not {"min", "max"} <= stats.keys():
        return
    low, high = np.array(robot.low), np.array(robot.high)
    lowest, highest = (np.asarray(stats[name], dtype=np.float64).reshape(-1) for name in ("min", "max"))
    slack = 0.01 * (high - low) + 1e-6
    beyond = np.flatnonzero((lowest < low - slack) | (highest > high + slack))
    if len(beyond):
        names = robot.action_names or tuple(map(str, range(robot.action_dim)))
        logger.warning(
            "actions of the dataset reach beyond the ranges of embodiment %r in %s and are clipped: "
            "--policy.embodiment=NEW_NAME trains a new robot with the ranges of the dataset",
            robot.name,
            ", ".join(f"{names[i]} ({lowest[i]:.3g} to {highest[i]:.3g})" for i in beyond),
        )
