"""What the three kinds of sample say in words: prompt templates, and how a task's name is spelled in them.

Which strings a checkpoint was trained with is a field of its `processor_config.json`; these are the ones known to
exist. Pure functions of strings: no tokens, no pictures.
"""

import re
from collections.abc import Mapping

INSTRUCTION = "{instruction}"
KINDS = ("action", "world", "video")

ACTION_PROMPT = "What action should the robot take to {instruction}?"
VIDEO_PROMPT = "Generate the future image based on the task and current image. {instruction}"
WORLD_PROMPTS = {
    # the authors' training data code, their evaluation code, and section 3.3 of the paper
    "training": (
        "Generate the next image based on the provided sequence of historical images and corresponding actions."
    ),
    "evaluation": "Generate the image based on the current image and the action.",
    "paper": "Generate the next frame based on the current image and the action.",
}

# LIBERO-10 and LIBERO-90 name tasks KITCHEN_SCENE3_turn_on_the_stove: the authors train with the scene and evaluate
# without
INSTRUCTION_STYLES = ("as_given", "task_name", "task_language")
_SCENE = re.compile(r"[A-Z][A-Z ]*SCENE\d+ ")


def resolve_prompts(prompts: Mapping[str, str] | None) -> dict[str, str]:
    """Complete prompt templates: `{"action": ..., "world": ..., "video": ...}`, what is missing being the authors'.

    The world prompt may be a name of `WORLD_PROMPTS` and comes back as the string itself. Raises ValueError on an
    unknown kind and on an action or video template without `{instruction}`.
    """
    resolved = {"action": ACTION_PROMPT, "world": WORLD_PROMPTS["training"], "video": VIDEO_PROMPT, **(prompts or {})}
    if unknown := sorted(set(resolved) - set(KINDS)):
        raise ValueError(f"prompts has no key {unknown[0]!r}: the keys are {', '.join(KINDS)}")
    resolved["world"] = WORLD_PROMPTS.get(resolved["world"], resolved["world"])
    for kind in ("action", "video"):
        if INSTRUCTION not in resolved[kind]:
            raise ValueError(
                f"the {kind} prompt needs a place for {INSTRUCTION}, this one has none: {resolved[kind]!r}"
            )
    if len(resolved["world"].split()) < 2:
        raise ValueError(
            f"the world prompt is a sentence or one of {', '.join(WORLD_PROMPTS)}, not {resolved['world']!r}"
        )
    return resolved


def spell_instruction(instruction: str, style: str) -> str:
    """Spell a task as a checkpoint wants it.

    `as_given` changes nothing. The other two take a task's file name and are the two spellings of LIBERO-Long:
    `task_name` "KITCHEN SCENE3 turn on the stove" (the authors' training data), `task_language` "turn on the stove"
    (the simulator's `task.language`, their evaluation). A name without a scene is the same in both.
    """
    if style == "as_given":
        return instruction
    words = instruction.replace("_", " ")
    return _SCENE.sub("", words, count=1) if style == "task_language" and _SCENE.match(words) else words


def fill_template(template: str, instruction: str | None) -> str:
    """Put the instruction into a template; braces in the instruction stay what they are.

    Raises ValueError when the template wants an instruction and there is none. A template without a place for it leaves
    the instruction out: a world prompt says the same for every task.
    """
    if INSTRUCTION not in template:
        return template
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"this prompt needs an instruction, a string that says what to do, not {instruction!r}")
    return template.replace(INSTRUCTION, instruction)


__all__ = ["ACTION_PROMPT", "INSTRUCTION_STYLES", "VIDEO_PROMPT", "WORLD_PROMPTS", "spell_instruction"]
