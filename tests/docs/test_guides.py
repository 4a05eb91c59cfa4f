"""The guides do what they say: their bash and python blocks are run in order, one page in one empty folder.

Names in the guides are real here: `my-checkpoint` is a small random checkpoint, `my-robot` a tiny dataset by LeRobot's
own writer, `other-robot` a folder of pictures. Sizes are cut by `CUTS` and by options added to long commands (`ADDED`).
A block under `<!-- not run: reason -->` is left out.
"""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from robot_folder import write_recordings
from small_checkpoint import write_checkpoint

from transformers_worldvla.cli.main import main

DOCS = Path(__file__).parents[2] / "docs"
DATASET = Path(__file__).parents[1] / "fixtures" / "lerobot_small" / "v30_video"
GUIDES = ("guides/data.md", "guides/fine_tune.md", "guides/imagine.md")
CUTS = {"max_steps=1000": "max_steps=2, use_cpu=True, disable_tqdm=True", "--horizons 10": "--horizons 3"}
ADDED = {
    "train": ["--steps", "2", "--batch-size", "2", "--eval-samples", "4", "--cpu"],
    "evaluate": ["--device", "cpu"],
    "tokenize": ["--device", "cpu"],
    "imagine": ["--device", "cpu"],
    "predict": ["--device", "cpu"],
}
BLOCK = re.compile(
    r"^(<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass
class Block:
    """A block of code in a guide, and the line it begins in."""

    language: str
    code: str
    line: int
    reason: str | None  # why it is not run


def read_blocks(file: Path) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    return [
        Block(each["language"], each["code"], text.count("\n", 0, each.start("code")) + 1, each["reason"])
        for each in BLOCK.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """The words of each command; a backslash continues a line."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    code = block.code
    for written, cut in CUTS.items():
        code = code.replace(written, cut)
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + code, page, "exec"), names)
        return
    for program, *words in commands(code):
        assert program == "worldvla", f"{page}:{block.line}: only worldvla commands are run here, not {program}"
        assert main([*words, *([] if "--dry-run" in words else ADDED[words[0]])]) == 0, f"{page}:{block.line}: {words}"


@pytest.mark.parametrize("name", [GUIDES[0], pytest.param(GUIDES[1], marks=pytest.mark.slow)])
def test_a_guide_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("my-checkpoint"))
    shutil.copytree(DATASET, "my-robot")
    write_recordings(Path("other-robot"))
    blocks = [block for block in read_blocks(DOCS / name) if block.reason is None]
    assert len(blocks) > 4
    names: dict[str, Any] = {}
    for block in blocks:
        run(block, DOCS / name, names)


@pytest.mark.parametrize("name", GUIDES)
def test_commands_that_are_not_run_are_at_least_understood(name: str) -> None:
    from transformers_worldvla.cli.main import build_parser

    for block in read_blocks(DOCS / name):
        for words in commands(block.code) if block.language == "bash" else []:
            module = words.index("transformers_worldvla.cli") if "transformers_worldvla.cli" in words else None
            arguments = words[1:] if words[0] == "worldvla" else words[module + 1 :] if module else None
            if arguments is not None:
                build_parser().parse_args(arguments)  # SystemExit with a line on stderr otherwise


@pytest.mark.parametrize("name", [*GUIDES, "user_complaints.md", "../examples/trl_sft/README.md"])
def test_links_and_tests_that_are_named_exist(name: str) -> None:
    page = DOCS / name
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{name}: {target}"
    root = DOCS.parent
    for file, test in re.findall(r"`((?:tests|examples|src|docs|benchmarks)/[\w./]+?)(?:::(\w+))?`", text):
        assert (root / file).exists(), f"{name}: {file}"
        assert not test or re.search(rf"def {test}\(", (root / file).read_text(encoding="utf-8")), f"{name}: {test}"
