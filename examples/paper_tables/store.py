"""Where the results of the tables lie, and what of them is there. Reads only; `stages` writes.

    OUTPUT/budget.json      what every row gets: one budget a folder
    OUTPUT/start/NAME       untrained checkpoints, the same weights for every row
    OUTPUT/cache/128px      frames as tokens
    OUTPUT/runs/RUN         a trained checkpoint, as `worldvla train` writes it
    OUTPUT/success/RUN      as `worldvla evaluate libero` writes it
    OUTPUT/frames/RUN       as `worldvla evaluate world-model` writes it
    OUTPUT/speed.json       seconds of an answer

RUN names the training and ends in a hash of it and of the budget's training part: rows that share it share everything.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rows import Training

BUDGET_FILE, SPEED_FILE = "budget.json", "speed.json"
EXTENSIBLE = ("tasks", "trials")  # more of them go on in the same folder
TRAINED_WITH = ("instructions", "steps", "batch_size", "learning_rate", "moved_weight", "precision", "seed")


@dataclass(frozen=True)
class Budget:
    """What every row gets.

    `model`: whose image tokenizer, vocabulary and sizes are taken, not its decoder. `instructions`, `moved_weight`,
    `precision`: of `worldvla train`. `clips`: at most so many of a validation episode and horizon.
    """

    model: str = "worldvla-libero-tiny"
    dataset: str | None = None
    instructions: list[str] | None = None
    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 1e-3
    moved_weight: float = 3.0
    precision: str | None = None
    seed: int = 0
    suite: str = "libero_goal"
    tasks: str = "0-9"
    trials: str = "10"
    max_steps: int | None = None
    clips: int | None = None


def read_budget(output: Path, given: dict[str, Any]) -> Budget:
    """The budget of a folder with what was `given` now; defaults for a new folder.

    Raises ValueError where something given differs from the folder's and is not `EXTENSIBLE`, or a dataset at last.
    """
    file = output / BUDGET_FILE
    if not file.is_file():
        return Budget(**given)
    budget = Budget(**json.loads(file.read_text(encoding="utf-8")))
    for name, value in given.items():
        begun_without = name == "dataset" and budget.dataset is None  # with a cache
        if name not in EXTENSIBLE and value != getattr(budget, name) and not begun_without:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{output} was begun with {option} {getattr(budget, name)}: choose another --output")
    return replace(budget, **given)


class Store:
    """The results below an output folder."""

    def __init__(self, output: Path, budget: Budget):
        self.output, self.budget = output, budget

    def name(self, training: Training) -> str:
        """Such as `action+world-k5-m2-128px-1a2b3c4d`."""
        shared = {name: getattr(self.budget, name) for name in TRAINED_WITH}
        identity = json.dumps({**asdict(training), **shared}, sort_keys=True)
        parts = ["+".join(training.kinds), f"k{training.num_actions}", f"m{training.history}", f"{training.px}px"]
        parts += ["causal"] if training.action_attention == "causal" else []
        parts += ["pretrained"] if training.start_from else []
        return "-".join([*parts, hashlib.sha256(identity.encode()).hexdigest()[:8]])

    # ---------------------------------------------------------------- folders

    def start(self, training: Training) -> Path:
        alpha = f"{training.world_loss_weight:g}"
        return self.output / "start" / f"{training.px}px-{training.action_attention}-alpha{alpha}"

    def cache(self, px: int) -> Path:
        return self.output / "cache" / f"{px}px"

    def run(self, training: Training) -> Path:
        return self.output / "runs" / self.name(training)

    def success(self, training: Training) -> Path:
        return self.output / "success" / self.name(training)

    def frames(self, training: Training) -> Path:
        return self.output / "frames" / self.name(training)

    # ---------------------------------------------------------------- what is there

    def is_trained(self, training: Training) -> bool:
        return "result" in (_read_json(self.run(training) / "run.json") or {})

    def episodes(self, training: Training) -> list[dict[str, Any]]:
        """Rows of the closed-loop episodes that were run so far."""
        from transformers_worldvla.evaluation.results import EPISODES_FILE, read_episodes

        file = self.success(training) / EPISODES_FILE
        return read_episodes(file) if file.is_file() else []

    def imagined(self, training: Training) -> dict[str, Any] | None:
        """`summary.json` of the world model's evaluation with all its `rows`; None before it ended."""
        folder = self.frames(training)
        summary = _read_json(folder / "summary.json")
        if summary is None:
            return None
        lines = (folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
        return {**summary, "rows": [json.loads(line) for line in lines]}

    def speeds(self) -> dict[str, dict[str, Any]]:
        """Of each run that was timed, in turns with the others: `seconds`, `actions_per_second`, ..."""
        return _read_json(self.output / SPEED_FILE) or {}


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
