"""What the scripted LIBERO expert knows: geometry and poses, read from the simulator, never from a camera.

Positions are in metres in the world frame (z up), rotations matrices, joints as MuJoCo stores them. Nothing here moves
anything; every property is read anew, so that it holds for the simulator's present state.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

VISUAL, COLLISION = 1, 0  # geom groups of robosuite's models
# points of a box of side 2: enough of them that a hand does not pass between those of a drawer's wall
LATTICE = np.stack(np.meshgrid(*[np.linspace(-1, 1, 7)] * 3), axis=-1).reshape(-1, 3)
BACKGROUND = ("robot", "gripper", "mount", "world", "table", "floor", "wall")  # names of bodies that are not clutter
MAX_VERTICES = 4000  # of a mesh; finer ones are thinned out
OPEN_DRAWER = 0.12  # metres


class Scene:
    """A robosuite environment of LIBERO, seen with all its state."""

    def __init__(self, simulator: Any):
        self._simulator = simulator

    # the model is rebuilt by resets, so neither it nor its data is kept
    @property
    def _model(self) -> Any:
        return self._simulator.sim.model._model

    @property
    def _data(self) -> Any:
        return self._simulator.sim.data._data

    @property
    def goals(self) -> list[list[str]]:
        """The predicates of the task, such as ["in", "akita_black_bowl_1", "wooden_cabinet_1_top_region"]."""
        return self._simulator.parsed_problem["goal_state"]

    def is_satisfied(self, goal: Sequence[str]) -> bool:
        return bool(self._simulator._eval_predicate(goal))

    @property
    def hand(self) -> np.ndarray:
        """(3,), the point between the fingertips that the controller moves."""
        return self._data.site_xpos[self._simulator.robots[0].eef_site_id].copy()

    @property
    def hand_rotation(self) -> np.ndarray:
        """(3, 3), columns are the tool's axes: y is where the fingers close, z where they point."""
        name = self._simulator.robots[0].robot_model.eef_name
        return self._data.xmat[self._model.body(name).id].reshape(3, 3).copy()

    # ---------------------------------------------------------------- bodies

    def is_body(self, name: str) -> bool:
        """Whether a name stands for an object or a fixture (else for a region of one)."""
        return name in self._simulator.obj_body_id

    def body(self, name: str) -> int:
        return self._simulator.obj_body_id[name] if self.is_body(name) else self._model.body(name).id

    def height(self, name: str) -> float:
        """z of the origin of an object."""
        return float(self._data.xpos[self.body(name)][2])

    def is_held(self, name: str) -> bool:
        """Whether both fingers touch an object."""
        fingers = self._simulator.robots[0].gripper.important_geoms
        sides = [fingers["left_finger"], fingers["right_finger"]]
        return bool(self._simulator._check_grasp(sides, self._simulator.get_object(name)))

    def subtree(self, body: int) -> list[int]:
        """A body and all that hangs on it."""
        found = [body]
        for each in range(self._model.nbody):  # parents come before their children
            if each != body and self._model.body_parentid[each] in found:
                found.append(each)
        return found

    def vertices(self, bodies: Iterable[int], groups: Sequence[int] = (VISUAL,)) -> np.ndarray:
        """World positions (n, 3) of points of some bodies' geoms; meshes in detail, all else as boxes."""
        from mujoco import mjtGeom

        model, data, chosen, parts = self._model, self._data, set(bodies), []
        for geom in range(model.ngeom):
            if model.geom_bodyid[geom] not in chosen or model.geom_group[geom] not in groups:
                continue
            if model.geom_type[geom] == mjtGeom.mjGEOM_MESH:
                mesh = model.geom_dataid[geom]
                first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
                corners = model.mesh_vert[first : first + count : max(1, count // MAX_VERTICES)]
            else:
                corners = LATTICE * model.geom_size[geom]
            parts.append(corners @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
        return np.concatenate(parts) if parts else np.empty((0, 3))

    def object_vertices(self, name: str) -> np.ndarray:
        """Corners (n, 3) of an object as it is seen, else as it collides."""
        bodies = self.subtree(self.body(name))
        seen = self.vertices(bodies)
        return seen if len(seen) else self.vertices(bodies, (COLLISION,))

    def clutter(self, without: str | None = None) -> np.ndarray:
        """Corners (n, 3) of everything but the robot, the room and one object."""
        own = set() if without is None else set(self.subtree(self.body(without)))
        others = [
            body
            for body in range(1, self._model.nbody)
            if body not in own and not any(word in self._model.body(body).name for word in BACKGROUND)
        ]
        return self.vertices(others, (VISUAL, COLLISION))

    def region_center(self, region: str) -> np.ndarray:
        """(3,), the middle of a region of a fixture or of the table. KeyError when there is none of that name."""
        return self._data.site_xpos[self._model.site(region).id].copy()

    # ---------------------------------------------------------------- drawers and knobs

    def drawer_joint(self, region: str) -> int:
        """The joint that a region such as `wooden_cabinet_1_top_region` moves with."""
        level = region.replace("_region", "").split("_")[-1]  # top, middle, bottom
        fixture = region.split("_1")[0]
        joints = [
            joint
            for joint in range(self._model.njnt)
            if fixture in self._model.joint(joint).name and self._model.jnt_type[joint] in (2, 3)  # slide, hinge
        ]
        return next((joint for joint in joints if level in self._model.joint(joint).name), joints[0])

    def is_open(self, joint: int) -> bool:
        return abs(self._data.qpos[self._model.jnt_qposadr[joint]]) > OPEN_DRAWER

    def handle(self, joint: int) -> tuple[np.ndarray, np.ndarray]:
        """Centre (3,) of a drawer's handle and the direction (3,) in which it opens."""
        body = self._model.jnt_bodyid[joint]
        axis = self._data.xmat[body].reshape(3, 3) @ self._model.jnt_axis[joint]
        low, high = self._model.jnt_range[joint]
        outwards = axis if abs(high) > abs(low) else -axis
        parts = set(self.subtree(body))
        centers = [
            self._data.geom_xpos[geom].copy()
            for geom in range(self._model.ngeom)
            if self._model.geom_bodyid[geom] in parts and self._model.geom_group[geom] == COLLISION
        ]
        return max(centers, key=lambda center: float(center @ outwards)), outwards  # the outermost box

    def knob(self, fixture: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Corners (n, 3) of a fixture's knob, a point (3,) of its axis, and the sign of the turn that is on."""
        names = [self._model.joint(joint).name for joint in range(self._model.njnt)]
        joint = next(j for j, name in enumerate(names) if fixture in name and ("knob" in name or "button" in name))
        low, high = self._model.jnt_range[joint]
        corners = self.vertices(self.subtree(self._model.jnt_bodyid[joint]))
        return corners, self._data.xanchor[joint].copy(), 1.0 if high > abs(low) else -1.0


def center(vertices: np.ndarray) -> np.ndarray:
    """The middle (3,) of the box around some points (n, 3)."""
    return (vertices.max(0) + vertices.min(0)) / 2
