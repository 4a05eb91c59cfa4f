"""A page on which a WorldVLA checkpoint acts, imagines and is driven by hand.

Only the page is made here: what the model is asked and how answers are drawn is the library's. Nothing is remembered
but in `gr.State`, which is each visitor's own, and the model serves one event at a time.

Environment: WORLDVLA_MODEL (folder or Hub id; by default the small checkpoint that comes with the library),
WORLDVLA_EMBODIMENT (where the checkpoint has several robots and no default), WORLDVLA_EPISODES (dataset whose first
episode is the example; by default the one that comes with the library).
"""

import base64
import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from transformers_worldvla import WorldVLAPolicy
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.data import load_episodes
from transformers_worldvla.data.pictures import decode_picture
from transformers_worldvla.evaluation import pictures as drawing
from transformers_worldvla.serving.dream_world import Dream, DreamWorld
from transformers_worldvla.serving.observations import MAX_SIDE
from transformers_worldvla.serving.play import STAY, TOGGLE, Keyboard

MAX_STEPS = 20  # frames of a rollout
RUN = 10  # frames of the button that goes on
SHOWN = 6  # frames of a strip
FPS = 5.0  # of animations: slower than robots move, so that a visitor can follow
SIDE, SMALL, PLOT = 320, 128, (300, 150)  # pixels: a large picture, a small one, a plot
POLICY = "what the policy would do"
HEADING = """# WorldVLA: one model that acts and imagines
`{model}`, robot `{robot}`. From pictures and an instruction it predicts actions; from a picture and actions it imagines
the next pictures. Nothing here comes from a camera or a simulator but the pictures you give."""


class Space:
    """What the page does, without the page. `pictures` are the files of all cameras now, then (or None each) of all
    cameras one control step earlier."""

    def __init__(self, model: str | None = None, embodiment: str | None = None, episodes: str | None = None):
        self.name = model or DEFAULT_CHECKPOINT
        self.world = DreamWorld.from_pretrained(model, embodiment=embodiment)
        self.policy = WorldVLAPolicy(self.world.model, self.world.processor, embodiment=embodiment, overlap=False)
        self.robot = self.world.robot
        names = self.robot.action_names or tuple(map(str, range(self.robot.action_dim)))
        units = self.robot.units or ("",) * len(names)
        self.titles = [f"{name} ({unit})" if unit else name for name, unit in zip(names, units, strict=True)]
        episode = load_episodes(episodes or bundled_folder(DEFAULT_EPISODE))[0]
        self.episode = episode if set(self.robot.cameras) <= set(episode.cameras) else None
        keyboard = Keyboard(self.robot)
        self.rest = keyboard.action(STAY)
        self.moving = [index for index, low in enumerate(self.robot.low) if self.robot.high[index] > low]
        self.plans = {POLICY: (), "stay": (STAY, STAY)}  # the first key and the one that follows
        if self.robot.gripper is not None:
            self.plans["move the gripper"] = (TOGGLE, STAY)
        for key, (index, sign) in keyboard.moves.items():
            self.plans[f"{names[index]} {'up' if sign > 0 else 'down'}"] = (key, key)

    def example(self, step: float) -> list[Any]:
        """The instruction of the example, its pictures at a step and the ones before it."""
        times = int(step), max(int(step) - 1, 0)
        now, before = ([self.episode.frame(name, time) for name in self.robot.cameras] for time in times)
        return [self.episode.instruction, *now, *(before if step else [None] * len(now))]

    def act(self, instruction: str, *pictures: str | None) -> tuple[Image.Image, list[list[float]]]:
        """A chunk of actions as plots, and as a table in robot units with the confidence of each action."""
        with one_line():
            chunk = self.policy.session().predict(self.see(pictures) | {"prompt": instruction})
        steps = range(1, len(chunk.actions) + 1)
        lines = [drawing.Line(steps, values, drawing.BLUE) for values in chunk.actions.T]
        lines.append(drawing.Line(steps, chunk.confidence, drawing.ORANGE))
        titled = zip([*self.titles, "confidence"], lines, strict=True)
        plots = [drawing.line_plot(each, [line], PLOT, "step") for each, line in titled]
        page = drawing.below([drawing.beside(plots[first : first + 4]) for first in range(0, len(plots), 4)])
        return page, np.column_stack([steps, chunk.actions, chunk.confidence]).round(3).tolist()

    def imagine(
        self, plan: str, steps: float, instruction: str, *pictures: str | None
    ) -> Iterator[tuple[str, Image.Image | None]]:
        """Frame after frame as HTML, at the end all of them as an animation and a strip."""
        with one_line():
            if plan not in self.plans or not 1 <= steps <= MAX_STEPS:
                raise ValueError(f"choose one of the plans and 1 to {MAX_STEPS} steps")
            seen = self.see(pictures)
            dreams = [self.world.begin({camera: frames[-1] for camera, frames in seen.items()})]
            keyboard, policy = Keyboard(self.robot), self.policy.session()
            for step in range(int(steps)):
                if plan == POLICY:
                    action = policy.select_action(seen | {"prompt": instruction})
                else:
                    action = keyboard.action(self.plans[plan][step > 0])
                dreams += self.world.step(dreams[-1:], action[None])
                seen = dict(zip(self.robot.cameras, dreams[-1].pictures, strict=True))
                yield show(self.panel(dreams[-1])), None
        yield animate([self.panel(dream) for dream in dreams]), self.strip(dreams)

    def begin(self, *pictures: str | None) -> tuple[list[Dream], str, Image.Image | None]:
        """A new dream, as the newest entry of a trail; an empty trail while there is no picture."""
        if None in pictures:
            return [], "Choose a picture to start from.", None
        with one_line():
            trail = [self.world.begin({camera: frames[-1] for camera, frames in self.see(pictures).items()})]
        return trail, show(self.panel(trail[-1])), self.strip(trail)

    def drag(self, count: int, trail: list[Dream], *values: float) -> Iterator[tuple[list[Dream], str, Image.Image]]:
        """One action `count` times, from the newest imagined frame on; `values` are those of the sliders."""
        with one_line():
            if not trail or len(values) != len(self.moving):
                raise ValueError("choose a picture to start from")
            action = self.rest.copy()
            action[self.moving] = values
            for _ in range(count):
                trail = [*trail, *self.world.step(trail[-1:], action[None])][-SHOWN:]
                yield trail, show(self.panel(trail[-1])), self.strip(trail)

    # ---------------------------------------------------------------- helpers

    def see(self, files: Sequence[str | None]) -> dict[str, list[np.ndarray]]:
        """The pictures of each camera, oldest first."""
        now, before = files[: self.robot.num_cameras], files[self.robot.num_cameras :]
        if None in now:
            raise ValueError(f"choose a picture of {' and of '.join(self.robot.cameras)} first")
        times = [before, now] if before and None not in before else [now]
        columns = zip(*(map(read_picture, time) for time in times), strict=True)
        return dict(zip(self.robot.cameras, map(list, columns), strict=True))

    def panel(self, dream: Dream, side: int = SIDE) -> Image.Image:
        """The newest frame with its number."""
        frames = [drawing.enlarge(Image.fromarray(picture), side) for picture in dream.pictures]
        title = f"imagined, step {dream.steps}" if dream.steps else "given"
        return drawing.captioned(drawing.beside(frames, gap=0), title)

    def strip(self, dreams: Sequence[Dream]) -> Image.Image:
        """Some of the frames beside each other, first and last among them."""
        shown = [dreams[index] for index in sorted(set(np.linspace(0, len(dreams) - 1, SHOWN).round().astype(int)))]
        return drawing.beside([self.panel(dream, SMALL) for dream in shown])


def read_picture(file: str) -> np.ndarray:
    """An uploaded picture. Raises ValueError; what is too large is not decoded."""
    with Image.open(file) as picture:
        if max(picture.size) > MAX_SIDE:
            raise ValueError(f"the picture is larger than {MAX_SIDE} pixels on a side: {picture.size}")
    return decode_picture(Path(file))


@contextmanager
def one_line() -> Iterator[None]:
    """What the library refuses, shown in the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


def show(frame: Image.Image) -> str:
    """A frame inside HTML: unlike a file it leaves nothing behind."""
    frame.save(content := io.BytesIO(), "PNG")
    return _html(content.getvalue(), "png", "the newest frame")


def animate(frames: Sequence[Image.Image]) -> str:
    """Frames as an animation inside HTML."""
    with tempfile.TemporaryDirectory() as folder:
        drawing.save_gif(frames, file := Path(folder) / "frames.gif", FPS)
        return _html(file.read_bytes(), "gif", "the imagined rollout")


def _html(content: bytes, kind: str, alt: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{alt}">'


def build(space: Space) -> gr.Blocks:
    """The page."""
    robot, episode = space.robot, space.episode
    model = {"concurrency_id": "model", "concurrency_limit": 1}  # one event at a time, of all visitors
    live = {"show_progress": "hidden", "trigger_mode": "always_last", **model}
    plain = {"interactive": False, "show_label": False, "buttons": []}
    with gr.Blocks(title="WorldVLA", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(HEADING.format(model=space.name, robot=robot.name))
        with gr.Row():
            labels = [*robot.cameras, *(f"{name}, one step earlier (optional)" for name in robot.cameras)]
            pictures = [gr.Image(label=label, type="filepath", image_mode=None, height=240) for label in labels]
            with gr.Column():
                instruction = gr.Textbox(label="instruction", lines=2, max_length=200)
                last = 0 if episode is None else len(episode) - 1
                frame = gr.Slider(0, last, step=1, label="frame of the example", visible=last > 0)
        with gr.Tab("Act"):
            act = gr.Button("Predict actions", variant="primary")
            plots = gr.Image(elem_id="plots", **plain)
            table = gr.Dataframe(headers=["step", *space.titles, "confidence"], interactive=False)
        with gr.Tab("Imagine"):
            with gr.Row():
                plan = gr.Dropdown(list(space.plans), label="actions")
                steps = gr.Slider(1, MAX_STEPS, value=10, step=1, label="steps")
            imagine = gr.Button("Imagine", variant="primary")
            animation, strip = gr.HTML(), gr.Image(**plain)
        with gr.Tab("Drag and watch"):
            with gr.Row():
                with gr.Column(elem_id="sliders"):
                    sliders = [slider(space, index) for index in space.moving]
                with gr.Column():
                    screen = gr.HTML(elem_id="screen")
                    again, run = gr.Button("The same again"), gr.Button(f"{RUN} times")
                    reset = gr.Button("Reset")
            trail, trail_strip = gr.State([], time_to_live=3600), gr.Image(**plain)

        act.click(space.act, [instruction, *pictures], [plots, table], api_name="act", **model)
        imagined = [animation, strip]
        imagine.click(space.imagine, [plan, steps, instruction, *pictures], imagined, api_name="imagine", **model)
        now, watched = pictures[: robot.num_cameras], [trail, screen, trail_strip]
        begins = [reset.click, *(picture.change for picture in now)]
        gr.on(begins, space.begin, now, watched, api_name="begin", **live)
        moves = [again.click, *(each.input for each in sliders)]
        gr.on(moves, partial(space.drag, 1), [trail, *sliders], watched, api_name="drag", **live)
        run.click(partial(space.drag, RUN), [trail, *sliders], watched, api_name="run", **live)
        reset.click(lambda: list(space.rest[space.moving]), None, sliders, api_visibility="private")
        if episode is not None:
            gr.on([page.load, frame.release], space.example, frame, [instruction, *pictures], api_name="example")
    return page


def slider(space: Space, index: int) -> gr.Slider:
    """A slider over about a hundred round values of a dimension's range."""
    low, high = space.robot.low[index], space.robot.high[index]
    step = 10 ** math.floor(math.log10((high - low) / 50))
    ends = round(math.ceil(low / step) * step, 9), round(math.floor(high / step) * step, 9)
    return gr.Slider(*ends, value=space.rest[index], step=step, label=space.titles[index])


def launch(space: Space, **options: Any) -> Any:
    """Serve the page; `options` are those of Gradio."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    limits = {"max_file_size": "10mb", "show_error": True}
    return build(space).queue(max_size=32).launch(**limits, theme=theme, ssr_mode=False, **options)


if __name__ == "__main__":
    launch(Space(*(os.environ.get(f"WORLDVLA_{name}") for name in ("MODEL", "EMBODIMENT", "EPISODES"))))
