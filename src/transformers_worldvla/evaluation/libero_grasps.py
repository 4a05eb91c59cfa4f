"""Where the scripted LIBERO expert takes hold of things: geometry in, poses of the hand out.

The hand points straight down in every grasp here. A grasp is the position (3,) between the fingertips and a rotation
(3, 3) of the tool, whose y axis is where the fingers close and whose z axis is where they point.
"""

from typing import NamedTuple

import numpy as np

DOWN = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])  # the tool points down and its fingers close along the world's y
RIM_INSET, RIM_DEPTH = 0.004, 0.034  # how far inside and below a bowl's rim the fingertips go


class Grasp(NamedTuple):
    position: np.ndarray
    rotation: np.ndarray


def turned(yaw: float) -> np.ndarray:
    """A hand that points down, turned by an angle around the world's z axis."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ DOWN


def tilted(outwards: np.ndarray, tilt: float) -> np.ndarray:
    """A hand that leans from pointing down towards -`outwards`, fingers closing in the plane of both."""
    out = np.array([outwards[0], outwards[1], 0.0])
    out /= np.linalg.norm(out)
    up = np.array([0, 0, 1.0])
    pointing = -np.cos(tilt) * up - np.sin(tilt) * out
    closing = -(np.cos(tilt) * out - np.sin(tilt) * up)
    return np.stack([np.cross(closing, pointing), closing, pointing], axis=1)


def narrowest_grasp(vertices: np.ndarray, depth: float) -> Grasp:
    """A thing (n, 3) near its top, `depth` below it, turned so that the fingers have the least to span."""
    top, bottom = vertices[:, 2].max(), vertices[:, 2].min()
    is_flat = top - bottom <= 0.03
    z = (top + bottom) / 2 if is_flat else max(top - depth, bottom + 0.012)
    band = vertices[np.abs(vertices[:, 2] - z) < 0.02]
    if len(band) < 20:
        band = vertices
    best: tuple[float, Grasp] | None = None
    for yaw in np.linspace(-np.pi / 2, np.pi / 2, 37):
        closing = np.array([-np.sin(yaw), np.cos(yaw)])
        across = np.array([closing[1], -closing[0]])
        spans = [band[:, :2] @ axis for axis in (closing, across)]
        cost = np.ptp(spans[0]) + 0.006 * abs(yaw)  # a turn of the wrist has its price
        if best is None or cost < best[0]:
            x, y = sum(
                axis * (span.max() + span.min()) / 2 for axis, span in zip((closing, across), spans, strict=True)
            )
            best = (cost, Grasp(np.array([x, y, z]), turned(yaw)))
    assert best is not None
    return best[1]


def rim_grasps(vertices: np.ndarray, clutter: np.ndarray) -> list[Grasp]:
    """A bowl (n, 3) by its rim, one finger inside: 24 grasps around it, those with the least `clutter` (m, 3) first.

    A turned wrist costs as much as up to 100 points of clutter, the far side of the bowl 50 more: who is to learn from
    this sees the same grasp unless something really is in its way.
    """
    top = vertices[:, 2].max()
    rim = vertices[vertices[:, 2] > top - 0.012][:, :2]
    middle = (rim.max(0) + rim.min(0)) / 2
    radius = np.median(np.linalg.norm(rim - middle, axis=1)) - RIM_INSET
    grasps, costs = [], []
    for angle in np.pi / 2 + np.linspace(-np.pi, np.pi, 24, endpoint=False):
        outwards = np.array([np.cos(angle), np.sin(angle)])
        position = np.array([*(middle + radius * outwards), top - RIM_DEPTH])
        wrist = min(abs(np.sin(angle) - 1), abs(np.sin(angle) + 1) + 0.5)
        grasps.append(Grasp(position, turned(angle % np.pi - np.pi / 2)))
        costs.append(_swept(clutter - position, outwards) + 100 * wrist)
    return [grasps[index] for index in np.argsort(costs)]


def _swept(points: np.ndarray, closing: np.ndarray) -> int:
    """How many points (n, 3), seen from the fingertips, lie where an open hand that closes along (2,) would be."""
    along, across = np.abs(points[:, :2] @ closing), np.abs(points[:, :2] @ np.array([-closing[1], closing[0]]))
    z = points[:, 2]
    fingers = (along > 0.02) & (along < 0.062) & (across < 0.018) & (z > -0.012)
    palm = (along < 0.11) & (across < 0.04) & (z > 0.075)
    return int(fingers.sum()) + int(palm.sum())
