"""The guides do what they say: their bash and python blocks are run in order, one page in one empty folder.

Names in the guides are real here: `my-checkpoint` is a small random checkpoint, `my-robot` a tiny dataset,
`results/mine` a result. Sizes are cut by `CUTS` and by options added to long commands (`ADDED`). A guide's
`worldvla ... &` is a process of its own, on a free port, that must end well; everything else shares this one.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from doc_pages import DOCS, LANGUAGES, PAGES, Block, blocks, command_lines, name, words_of, worldvla_arguments
from robot_folder import write_recordings
from small_checkpoint import write_checkpoint, write_episode

from transformers_worldvla.assets import DEFAULT_CHECKPOINT, DEFAULT_EPISODE, bundled_folder
from transformers_worldvla.cli.checkpoints import Checkpoint
from transformers_worldvla.cli.closed_loop import hash_checkpoint
from transformers_worldvla.cli.main import main
from transformers_worldvla.evaluation.results import ResultFolder, format_summary, read_episodes, summarize

TESTS = Path(__file__).parents[1]
PORT = "8000"  # in the guides
CUTS = {"max_steps=1000": "max_steps=2, use_cpu=True, disable_tqdm=True", "--horizons 10": "--horizons 3"}
ADDED = {
    "train": ["--steps", "2", "--batch-size", "2", "--eval-samples", "4", "--cpu"],
    **{command: ["--device", "cpu"] for command in ("doctor", "imagine", "predict", "serve", "tokenize")},
    "evaluate world-model": ["--device", "cpu"],
}


# -------------------------------------------------------------------- what the guides find in their folder


def a_robot() -> None:
    """A checkpoint, and recordings of other robots by LeRobot's own writer and as pictures."""
    write_checkpoint(Path("my-checkpoint"))
    shutil.copytree(TESTS / "fixtures" / "lerobot_small" / "v30_video", "my-robot")
    write_recordings(Path("other-robot"))


def results() -> None:
    """A checkpoint, a recording of its robot, and two results that pair: 15 and 10 successes of 20."""
    write_checkpoint(Path("my-checkpoint"))
    write_episode(Path("my-robot"), steps=5)
    won = {"mine": "1110111100" + "1111111100", "other": "1111000000" + "1111110000"}
    for model, outcomes in won.items():
        write_results(Path("results") / model, {"model": model}, outcomes)


def published_weights() -> None:
    """The authors' three folders."""
    tiny = TESTS / "fixtures" / "authors_tiny" / "checkpoint"
    for published, folder in {
        "model_256/libero_goal": "model",
        "base_model": "base_model",
        "chameleon/tokenizer": "tokenizer",
    }.items():
        shutil.copytree(tiny / folder, Path("WorldVLA") / published)


def a_trained_robot() -> None:
    """A whole checkpoint, and a result of it."""
    folder = write_checkpoint(Path("runs/my-robot/merged"))
    checkpoint = hash_checkpoint(Checkpoint(str(folder), is_folder=True))
    write_results(Path("results/mine"), {"model": "merged", "checkpoint": checkpoint}, "1111111000" + "1111110011")


def the_bundled_model() -> None:
    for link, asset in {"my-checkpoint": DEFAULT_CHECKPOINT, "my-robot": DEFAULT_EPISODE}.items():
        Path(link).symlink_to(bundled_folder(asset))


def a_client() -> None:
    """openpi's client can be imported, and there is a picture."""
    write_checkpoint(Path("my-checkpoint"))
    shutil.copytree(TESTS / "fixtures" / "openpi_client", "clients/openpi_client")
    shutil.copy(write_episode(Path("my-robot"), steps=1) / "episode_0" / "image" / "image_0.png", "now.png")


def write_results(folder: Path, settings: dict[str, Any], outcomes: str) -> None:
    """Ten trials of two tasks; `outcomes` has a 1 for each that was solved."""
    result = ResultFolder(folder, settings)
    for number, outcome in enumerate(outcomes):
        task, instruction = ((0, "open the middle drawer of the cabinet"), (7, "turn on the stove"))[number // 10]
        result.add(
            {
                "suite": "libero_goal",
                "task": task,
                "trial": number % 10,
                "success": outcome == "1",
                "steps": 90 + number,
                "instruction": instruction,
                "seed": 0,
                "episode_seed": number,
                "versions": {"mujoco": "3.3.0"},
                **settings,
            }
        )
    result.finish()


# -------------------------------------------------------------------- running


@dataclass
class Guide:
    """A page, what its folder holds, and how long it takes."""

    page: str
    prepare: Callable[[], None] = lambda: None
    slow: bool = False


GUIDES = (
    Guide("guides/act.md"),
    Guide("guides/convert.md", published_weights),
    Guide("guides/data.md", a_robot),
    Guide("guides/doctor.md", the_bundled_model, slow=True),
    Guide("guides/evaluate.md", results),
    Guide("guides/fine_tune.md", a_robot, slow=True),
    Guide("guides/imagine.md", slow=True),
    Guide("guides/publish.md", a_trained_robot),
    Guide("guides/serve.md", a_client),
    Guide("performance.md"),
)

RUN_ELSEWHERE = {"guides/lerobot.md": "lerobot_plugin/test_lerobot_guide.py"}  # in an environment with LeRobot


class Terminal:
    """Runs the commands of a guide; those that end in `&` go on until it closes."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def run(self, line: str, where: object) -> None:
        words = words_of(line)
        arguments = worldvla_arguments(words)
        if arguments is None:
            assert words[0] == "curl", f"{where}: {words[0]} is not run here: mark the block"
            if shutil.which("curl") is None:
                pytest.skip("curl is not installed")
            subprocess.run(["bash", "-c", line], check=True, timeout=60, stdout=subprocess.DEVNULL)
            return
        command = " ".join(arguments[:2]) if arguments[0] == "evaluate" else arguments[0]
        arguments = [*arguments, *([] if "--dry-run" in arguments else ADDED.get(command, []))]
        if line.split()[-1] == "&":
            self._start(arguments)
        else:
            assert main(arguments) == 0, f"{where}: {arguments}"

    def _start(self, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "transformers_worldvla.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._running.append(process)
        assert process.stdout is not None and process.stdout.readline().startswith("serving ")

    def close(self) -> list[int]:
        """Ask what runs to end; exit codes."""
        for process in self._running:
            process.terminate()
        return [process.wait(timeout=30) for process in self._running]


@contextmanager
def open_terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    try:
        yield terminal
    finally:
        codes = terminal.close()
    assert not any(codes), f"a command in the background ended with {codes}"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.mark.parametrize(
    "guide", [pytest.param(each, id=each.page, marks=[pytest.mark.slow] * each.slow) for each in GUIDES]
)
def test_a_guide_runs_from_top_to_bottom(guide: Guide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide.prepare()
    monkeypatch.syspath_prepend(str(tmp_path / "clients"))
    cuts = CUTS | {PORT: str(free_port())}
    names: dict[str, Any] = {}
    done = 0
    with open_terminal() as terminal:
        for block in blocks(DOCS / guide.page):
            if block.reason is not None or block.language not in ("bash", "python"):
                continue
            code = block.code
            for written, cut in cuts.items():
                code = code.replace(written, cut)
            if block.language == "python":
                exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), names)
            else:
                for line in command_lines(code):
                    terminal.run(line, block)
            done += 1
    assert done > 0


# -------------------------------------------------------------------- nothing escapes


def blocks_of_pages() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


def test_every_page_with_code_that_can_run_is_run() -> None:
    pages = {block.page for block in blocks_of_pages() if block.language in ("bash", "python") and not block.reason}
    assert {name(page) for page in pages} == {name(DOCS / page) for page in [*(g.page for g in GUIDES), *RUN_ELSEWHERE]}
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (TESTS / test).read_text(encoding="utf-8")


def test_fences_have_a_language_that_is_known() -> None:
    assert [f"{block}: {block.language}" for block in blocks_of_pages() if block.language not in LANGUAGES] == []


def test_python_that_is_not_run_is_at_least_python() -> None:
    for block in blocks_of_pages():
        if block.language == "python" and block.reason:
            compile("\n" * (block.line - 1) + block.code, block.page, "exec")


def test_a_reason_names_what_is_missing_or_the_test_that_runs_it() -> None:
    words = ("needs", "downloads", "takes")
    reasons = [(str(block), block.reason) for block in blocks_of_pages() if block.reason]
    assert [each for each in reasons if not any(word in each[1] for word in words)] == []


# -------------------------------------------------------------------- what is printed


def test_rates_and_comparison_in_the_guide_are_those_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    results()
    capsys.readouterr()
    assert main(["evaluate", "compare", "results/mine", "results/other"]) == 0
    shown = [block.code for block in blocks(DOCS / "guides" / "evaluate.md") if block.language == "text"]
    assert shown == [format_summary(summarize(read_episodes("results/other"))) + "\n", capsys.readouterr().out]


def test_the_first_answer_in_the_guide_is_that_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As far as kernels agree: instruction, robot and shape to the letter, the first action nearly."""
    monkeypatch.chdir(tmp_path)
    first, *_ = blocks(DOCS / "guides" / "act.md")
    exec(first.code, {})
    instruction = "put the bowl on top of the cabinet"
    files = ["previous.png", "now.png"]
    capfd.readouterr()
    assert main(["predict", "--images", *files, "--instruction", instruction, "--json", "--device", "cpu"]) == 0
    document = json.loads(capfd.readouterr().out)
    (shown,) = (block.code for block in blocks(DOCS / "guides" / "act.md") if block.language == "text")
    lines = shown.splitlines()
    assert lines[0] == f'"{instruction}": {len(document["actions"])} delta actions of libero, 20 a second'
    numbers = [float(each) for each in re.findall(r"[+-]\d+\.\d+", lines[2])]
    assert numbers == pytest.approx(document["actions"][0], abs=0.02)
