"""`worldvla demo`: the bundled checkpoint on a real recorded episode, predicted and imagined beside what happened.

Needs no network and no GPU. The comparison itself is `evaluation.open_loop`; here it is run once, drawn and printed.
Where the extra `libero` is installed, the checkpoint also acts once in the simulator, in the task of that episode.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint, add_device_argument, find_checkpoint, load_model, load_processor
from .errors import UserError, one_line

_EPILOG = """\
examples:
  # the bundled checkpoint on the bundled episode, to ./worldvla-demo
  worldvla demo
  worldvla demo --output /tmp/demo --json
  # a checkpoint of one's own on the fourth episode of a dataset of one's own (LeRobot, LIBERO HDF5, pictures)
  worldvla demo --model my-checkpoint --episodes my-dataset --index 3
"""
GIF, PICTURE, NUMBERS = "demo.gif", "demo.png", "demo.json"
CLOSED_LOOP_GIF, CLOSED_LOOP_FPS = "libero.gif", 4.0  # a frame a query: faster than it was
MAX_HORIZON = 20  # steps of a rollout
MAX_SAMPLES = 64  # chunks and next frames compared; a longer episode is compared at every second, third ... step
BATCH_SIZE = 32


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "demo",
        help="see the bundled model act and imagine on a real episode",
        description="Predict actions and imagine frames of a real recorded episode, beside what happened there. With "
        "the extra `libero` the model also acts in the simulator: one episode of that task, from initial state 0.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="worldvla-demo", metavar="DIR", help="where to write (./%(default)s)")
    parser.add_argument("--model", metavar="M", help="checkpoint: a folder or a Hub id (default: the bundled one)")
    parser.add_argument("--episodes", metavar="DATA", help="dataset: a folder or a Hub id (default: the bundled one)")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="which of its episodes (%(default)s)")
    parser.add_argument("--embodiment", metavar="E", help="whose actions, where the checkpoint has several")
    parser.add_argument("--no-simulator", action="store_true", help="do not act in LIBERO")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help=f"print what {NUMBERS} holds")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..assets import DEFAULT_EPISODE, bundled_folder
    from ..data import load_episodes
    from ..evaluation.open_loop_pictures import draw_gif, draw_picture
    from ..evaluation.videos import write_video
    from .files import check_output_folder, new_files
    from .main import to_json

    output = Path(args.output).expanduser()
    check_output_folder(output)
    clock = Clock()
    checkpoint = find_checkpoint(args.model)
    episodes = args.episodes or bundled_folder(DEFAULT_EPISODE)
    with clock("load"):
        processor = load_processor(checkpoint)
        robot = processor.get_embodiment(args.embodiment)
        dataset = load_episodes(episodes, cameras=robot.cameras)
        if not 0 <= args.index < len(dataset):
            raise UserError(f"--index {args.index}: {episodes} has the episodes 0 to {len(dataset) - 1}")
        episode = dataset[args.index]
        mean = training_mean(checkpoint, robot.action_dim)
        model = load_model(checkpoint, args.device)
    report, recording, imagined = measure(model, processor, episode, robot, mean, clock)
    report = {"checkpoint": describe_checkpoint(model, checkpoint), "dataset": str(episodes), **report}
    report["closed_loop"], acted = None, None
    if not args.no_simulator:
        report["closed_loop"], acted = act(model, processor, robot, episode.instruction, clock)
    with clock("draw"), new_files(output) as folder:
        draw_gif(report, recording, imagined, folder / GIF)
        draw_picture(report, recording, imagined, folder / PICTURE)
        if acted is not None:
            caption = f"{describe_outcome(report['closed_loop'])}: {episode.instruction}"
            write_video(acted.frames, folder / CLOSED_LOOP_GIF, CLOSED_LOOP_FPS, caption)
        report["timings"] = clock.seconds()
        numbers = json.dumps(to_json(report), indent=2, allow_nan=False)
        (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
    print(format_table(report))
    written = (GIF, PICTURE, NUMBERS, *([] if acted is None else [CLOSED_LOOP_GIF]))
    print(f"\nwrote {', '.join(str(output / name) for name in written)}")
    return report


class Clock:
    """Seconds that each stage took; says on stderr what has begun."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        print(f"{stage} ...", file=sys.stderr)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stages[stage] = time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Of every stage that has ended, and of all so far."""
        return {**self._stages, "total": time.perf_counter() - self._began}


# -------------------------------------------------------------------- measuring


def training_mean(checkpoint: Checkpoint, action_dim: int) -> Any:
    """Mean action (D,) of the training set, None where the checkpoint does not tell."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from ..evaluation.metrics import STATISTICS_FILE, read_action_mean

    folder = Path(checkpoint.name)
    if not checkpoint.is_folder:
        try:
            folder = Path(hf_hub_download(checkpoint.name, STATISTICS_FILE)).parent
        except EntryNotFoundError:
            return None
    return read_action_mean(folder, action_dim)


def measure(
    model: Any, processor: Any, episode: Any, robot: Any, mean: Any, clock: Clock
) -> tuple[dict[str, Any], Any, Any]:
    """Compare one episode: the report, the recording and the imagined rollouts (S, horizon, C, H, W, 3)."""
    from ..evaluation import open_loop

    length, num_actions = len(episode), processor.num_actions
    horizon = min(MAX_HORIZON, length - 1)
    stride = -(-length // MAX_SAMPLES)
    starts = open_loop.chunk_starts(length, num_actions, stride)
    steps = list(range(0, length - 1, stride))
    rollouts = open_loop.rollout_starts(length, horizon)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "progress": True}
    with clock("read the episode"):
        recording = open_loop.read_recording(model, processor, episode, robot.name, batch_size=BATCH_SIZE)
    with clock("predict actions"):
        chunks = open_loop.predict_chunks(model, processor, recording, starts, num_actions, **options)
    with clock("imagine next frames"):
        next_frames = open_loop.predict_next_frames(model, processor, recording, steps, **options)
    with clock("imagine rollouts"):
        imagined = open_loop.roll_out(model, processor, recording, rollouts, horizon, draft="previous", **options)

    source = "the training set"
    if mean is None:
        mean, source = recording.actions.mean(axis=0), "this episode (the checkpoint has no training_statistics.json)"
    compared = open_loop.compare_actions(recording, starts, chunks)
    report = {
        "episode": {
            "index": recording.index,
            "instruction": recording.instruction,
            "steps": length,
            "fps": episode.fps,
            "cameras": recording.cameras,
        },
        "actions": {
            "names": list(robot.action_names) or [str(dimension) for dimension in range(robot.action_dim)],
            "units": list(robot.units),
            "mean_action": mean,
            "mean_action_of": source,
            **open_loop.summarize_actions([compared], mean),
            **compared,
        },
        "next_frame": open_loop.summarize_psnr([open_loop.compare_next_frames(recording, steps, next_frames)]),
        "rollout": {
            "horizon": horizon,
            "starts": rollouts,
            **open_loop.summarize_psnr([open_loop.compare_rollouts(recording, rollouts, imagined)]),
        },
        "versions": versions(),
        "device": str(model.device),
    }
    return report, recording, imagined


def act(model: Any, processor: Any, robot: Any, instruction: str, clock: Clock) -> tuple[dict[str, Any], Any]:
    """One closed-loop episode in LIBERO: what to report, and the `ActedEpisode`, None where there could be none."""
    from ..evaluation.libero_episode import act_in_libero
    from ..evaluation.libero_suites import match_task

    try:
        task = match_task(instruction)
        if task is None:
            return {"not_run": f'"{instruction}" is no task of LIBERO'}, None
        with clock("act in LIBERO"):
            acted = act_in_libero(model, processor, task, robot.name, progress=True)
    except (ImportError, ValueError) as error:
        return {"not_run": one_line(error)}, None
    place = {"suite": task.suite, "task": task.index, "trial": 0}
    return {**place, "success": acted.success, "steps": acted.steps}, acted


def describe_outcome(closed_loop: dict[str, Any]) -> str:
    return f"{'solved' if closed_loop['success'] else 'not solved'} in {closed_loop['steps']} steps"


def describe_checkpoint(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """Which checkpoint this was; weight files of a folder by their hash."""
    weights = sorted(Path(checkpoint.name).glob("*.safetensors")) if checkpoint.is_folder else []
    hashes = {}
    for path in weights:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": Path(checkpoint.name).name if checkpoint.is_folder else checkpoint.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hashes,
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers."""
    import torch
    import transformers

    from .. import __version__

    return {
        "transformers_worldvla": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# -------------------------------------------------------------------- printing


def format_table(report: dict[str, Any]) -> str:
    """The numbers for people."""
    actions, frames, rollout, episode = (report[key] for key in ("actions", "next_frame", "rollout", "episode"))
    l1 = actions["l1"]
    columns = ("model", "mean_action", "repeat_last_action")
    rows = [["", *(name.replace("_", " ") for name in columns)]]
    rows.append(["all", *(f"{l1[name]['total']:.4f}" for name in columns)])
    for dimension, action_name in enumerate(actions["names"]):
        mark = " (constant)" if dimension in actions["constant_dimensions"] else ""
        rows.append([action_name + mark, *(f"{l1[name]['per_dimension'][dimension]:.4f}" for name in columns)])
    for step in _some(actions["num_actions"]):
        rows.append([f"step {step} of a chunk", *(f"{l1[name]['per_step'][step - 1]:.4f}" for name in columns)])
    lines = [
        f'"{episode["instruction"]}": {episode["steps"]} recorded steps, {report["checkpoint"]["name"]} '
        f"({report['checkpoint']['parameters'] / 1e6:.1f} M parameters)",
        "",
        f"mean absolute error of actions, {actions['chunks']} chunks of {actions['num_actions']}; "
        f"mean action of {actions['mean_action_of']}",
        *_table(rows),
        "",
        f"PSNR in dB, {frames['samples']} next frames and {rollout['samples']} rollouts of {rollout['horizon']} steps",
    ]
    names = {"model": "imagined", "copy_last_frame": "copy last frame", "reconstruction_ceiling": "tokenizer's ceiling"}
    rows = [["", *names.values()], ["next frame", *(f"{frames['psnr'][name]:.2f}" for name in names)]]
    for step in _some(rollout["horizon"]):
        rows.append([f"rollout, {step} ahead", *(f"{rollout['psnr'][name][step - 1]:.2f}" for name in names)])
    lines += [*_table(rows), ""]
    if report["closed_loop"] is not None:
        lines += [_closed_loop_line(report["closed_loop"]), ""]
    return "\n".join([*lines, f"{report['timings']['total']:.1f} s on {report['device']}"])


def _closed_loop_line(closed_loop: dict[str, Any]) -> str:
    if "not_run" in closed_loop:
        return f"closed loop in LIBERO: not run, {closed_loop['not_run']}"
    place = f"{closed_loop['suite']} task {closed_loop['task']}, initial state {closed_loop['trial']}"
    return f"closed loop in LIBERO, {place}: {describe_outcome(closed_loop)}"


def _some(count: int) -> list[int]:
    """A few of the numbers 1 .. count, both ends among them."""
    return sorted({1, *(step for step in (2, 5, 8, 10, 15, 20) if step < count), count})


def _table(rows: list[list[str]]) -> list[str]:
    """Columns aligned, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
