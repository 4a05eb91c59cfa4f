"""The strings of the three kinds of sample, and the two spellings of a LIBERO-Long task."""

import pytest

from transformers_worldvla.prompts_worldvla import (
    ACTION_PROMPT,
    VIDEO_PROMPT,
    WORLD_PROMPTS,
    fill_template,
    resolve_prompts,
    spell_instruction,
)


def test_the_authors_prompts_are_the_default():
    assert resolve_prompts(None) == {
        "action": "What action should the robot take to {instruction}?",
        "world": (
            "Generate the next image based on the provided sequence of historical images and corresponding actions."
        ),
        "video": "Generate the future image based on the task and current image. {instruction}",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation", "Generate the image based on the current image and the action."),
        ("paper", "Generate the next frame based on the current image and the action."),
        ("What comes next?", "What comes next?"),
    ],
)
def test_the_world_prompt_is_a_name_or_a_sentence(name, text):
    assert resolve_prompts({"world": name}) == {"action": ACTION_PROMPT, "world": text, "video": VIDEO_PROMPT}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"act": "{instruction}"}, "no key 'act'"),
        ({"action": "Do it."}, "the action prompt needs a place for {instruction}"),
        ({"video": "Imagine."}, "the video prompt needs a place for {instruction}"),
        ({"world": "trainig"}, "a sentence or one of training, evaluation, paper, not 'trainig'"),
    ],
)
def test_wrong_prompt_fields(prompts, message):
    with pytest.raises(ValueError, match=message):
        resolve_prompts(prompts)


@pytest.mark.parametrize(
    ("task", "name", "language"),
    [
        ("KITCHEN_SCENE3_turn_on_the_stove", "KITCHEN SCENE3 turn on the stove", "turn on the stove"),
        ("LIVING_ROOM_SCENE10_pick_up_the_book", "LIVING ROOM SCENE10 pick up the book", "pick up the book"),
        ("KITCHEN SCENE3 turn on the stove", "KITCHEN SCENE3 turn on the stove", "turn on the stove"),
        ("put_the_bowl_on_the_stove", "put the bowl on the stove", "put the bowl on the stove"),
        ("open the SCENE1 drawer", "open the SCENE1 drawer", "open the SCENE1 drawer"),
    ],
)
def test_both_spellings_of_libero_long(task, name, language):
    assert spell_instruction(task, "as_given") == task
    assert spell_instruction(task, "task_name") == name
    assert spell_instruction(task, "task_language") == language


def test_an_instruction_may_hold_braces():
    assert fill_template("Do {instruction}.", "{x} {instruction}") == "Do {x} {instruction}."


def test_a_template_without_a_place_leaves_the_instruction_out():
    assert fill_template(WORLD_PROMPTS["paper"], "go") == fill_template(WORLD_PROMPTS["paper"], None)


@pytest.mark.parametrize("instruction", [None, "", " \n"])
def test_a_template_with_a_place_needs_an_instruction(instruction):
    with pytest.raises(ValueError, match="needs an instruction"):
        fill_template(ACTION_PROMPT, instruction)
