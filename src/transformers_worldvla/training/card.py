"""The model card of a trained checkpoint: the general card, and what this run knows of itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..action_tokenization_worldvla import Embodiment
from ..card_worldvla import CARD_NAME, model_card
from ..configuration_worldvla import WorldVLAConfig

_HEADING = "## Training"


def write_training_card(
    path: Path,
    config: WorldVLAConfig,
    robots: Sequence[Embodiment],
    result: dict[str, Any],
    adapter_of: str | None = None,
) -> None:
    """Write README.md; `adapter_of` is the base of an adapter."""
    card = ModelCard(model_card(config))
    data: Any = card.data
    data.base_model = None if Path(str(result["model"])).exists() else result["model"]
    if adapter_of is not None:
        data.library_name = "peft"
        data.tags = [*data.tags, "lora"]
    card.text += "\n" + "\n".join(_training_section(robots, result, adapter_of)) + "\n"
    card.save(path)


def _training_section(robots: Sequence[Embodiment], result: dict[str, Any], adapter_of: str | None) -> list[str]:
    lines = [_HEADING, ""]
    start = Path(str(result["model"])).name if Path(str(result["model"])).exists() else result["model"]
    kind = "a LoRA adapter on" if adapter_of is not None else "from"
    lines.append(
        f"`worldvla train`, recipe `{result['recipe']}`, {kind} `{start}`: {result['steps']} optimizer steps, "
    )
    lines.append(f"{result['epochs']:.2f} epochs.")
    lines += ["", "| robot | action dimension | cameras | ranges of |", "|---|---|---|---|"]
    for robot in {robot.name: robot for robot in robots}.values():
        cameras = ", ".join(robot.cameras)
        lines.append(f"| {robot.name} | {robot.action_dim} | {cameras} | {robot.dataset or 'not said'} |")
    numbers = {
        name.removeprefix("eval_"): value
        for name, value in result["metrics"].items()
        if name.startswith("eval_") and name.endswith(("_loss", "_accuracy")) and not name.endswith("z_loss")
    }
    if numbers:
        lines += ["", "| on held-out episodes, teacher-forced | |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in numbers.items()]
    return lines


def copy_training_section(source: Path, target: Path) -> None:
    """Append the section of one folder's card to that of another, where there is one."""
    card = source / CARD_NAME
    section = card.read_text(encoding="utf-8").partition(f"\n{_HEADING}\n")[2] if card.is_file() else ""
    if section:
        with (target / CARD_NAME).open("a", encoding="utf-8") as file:
            file.write(f"\n{_HEADING}\n{section}")
