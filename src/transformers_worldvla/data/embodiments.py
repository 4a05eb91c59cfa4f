"""From a dataset to the embodiment that training writes into the checkpoint, so that nobody types ranges or names.

What the dataset says (dimensions, names, cameras, rate) and what its actions show (ranges) come from here; what no
dataset says (delta or absolute, which way the gripper opens, units) comes from a template embodiment, if there is one.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..action_tokenization_worldvla import LIBERO, Embodiment
from .episodes import EpisodeDataset
from .libero_hdf5 import HDF5Episodes
from .statistics import ActionStatistics


def source_name(dataset: EpisodeDataset) -> str:
    """A dataset's name without this machine's folders: the repository, else the last part of the path."""
    return dataset.source if dataset.revision is not None else Path(dataset.source).expanduser().resolve().name


def find_template(dataset: EpisodeDataset, action_dim: int) -> Embodiment | None:
    """What is known about the robot from the format alone: LIBERO's own HDF5 files are of LIBERO's arm."""
    is_libero = isinstance(dataset, HDF5Episodes) and action_dim == LIBERO.action_dim
    return LIBERO if is_libero else None


def check_template(template: Embodiment | None, action_dim: int) -> None:
    """Raise ValueError when the template is of a robot with another number of dimensions."""
    if template is not None and template.action_dim != action_dim:
        raise ValueError(f"{template.describe()} is no template for actions of {action_dim} dimensions")


def build_embodiment(
    dataset: EpisodeDataset,
    statistics: ActionStatistics | None,
    cameras: Sequence[str],
    name: str | None = None,
    template: Embodiment | None = None,
    semantics: str | None = None,
    rotation: int | None = None,
    raw_cameras: Sequence[str] | None = None,
) -> Embodiment:
    """The embodiment of a dataset.

    Args:
        statistics: of the training episodes' actions; their ranges become `low` and `high`. None keeps the template's.
        cameras: those of a time step, in order.
        name: by default the template's, else the dataset's.
        template: an embodiment of the same robot, for what the dataset does not say: action names, units, semantics,
            gripper, rotation, control rate.
        semantics: `delta` or `absolute`; by default the template's, else `delta`.
        rotation: degrees that raw camera pictures must be turned by; by default the template's, else 0. No dataset
            says it, and whoever runs the robot needs it.
        raw_cameras: what the robot or simulator calls the cameras; by default as the template says for the same ones.

    The declared fps becomes the control rate only without a template: for simulators it is often wrong.
    """
    if statistics is not None:
        low, high = (tuple(values.tolist()) for values in statistics.ranges)
        place = source_name(dataset) + (f" at {dataset.revision}" if dataset.revision else "")
        origin: str | None = f"{place}, {statistics.method} of {statistics.count} steps"
    elif template is not None:
        low, high, origin = template.low, template.high, template.dataset
    else:
        raise ValueError("an embodiment without a template needs statistics")
    check_template(template, len(low))
    same_cameras = template is not None and tuple(cameras) == template.cameras
    if raw_cameras is None:
        raw_cameras = template.raw_cameras if template is not None and same_cameras else ()
    if rotation is None:
        rotation = template.rotation if template else 0
    own_names = dataset.action_names or ()
    return Embodiment(
        name=name or (template.name if template else _identifier(source_name(dataset))),
        low=low,
        high=high,
        action_names=template.action_names if template and template.action_names else own_names,
        units=template.units if template else (),
        semantics=semantics or (template.semantics if template else "delta"),
        gripper=template.gripper if template else None,
        rotation=rotation,
        control_hz=template.control_hz if template else dataset.fps,
        cameras=tuple(cameras),
        raw_cameras=tuple(raw_cameras),
        dataset=origin,
    )


def _identifier(source: str) -> str:
    """`lab/My robot.v2` -> `my_robot_v2`."""
    return re.sub(r"\W+", "_", source.rsplit("/", 1)[-1]).strip("_").lower() or "robot"
