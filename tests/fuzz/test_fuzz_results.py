"""What our own commands wrote and somebody changed: caches of frame tokens, results of evaluations, plans, pictures."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import damaged_bytes, damaged_json, fuzz, refused_or_read, to_text, written
from hypothesis import strategies as st
from PIL import Image
from robot_folder import write_recordings
from small_checkpoint import small_model, small_processor, write_checkpoint

from transformers_worldvla.cli.errors import UserError
from transformers_worldvla.cli.files import read_picture, read_plan
from transformers_worldvla.cli.main import main
from transformers_worldvla.data import FrameTokenCache
from transformers_worldvla.data.cache import HEADER
from transformers_worldvla.evaluation.results import (
    EPISODES_FILE,
    SETTINGS_FILE,
    ResultFolder,
    read_episodes,
    summarize,
)

EXAMPLES = [pytest.param(20, id="few"), pytest.param(500, id="many", marks=pytest.mark.slow)]
pytestmark = pytest.mark.timeout(900)


# -------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    dataset = write_recordings(root / "toy", (3, 2, 4), cameras=("image",))
    arguments = [dataset, "--model", write_checkpoint(root / "model"), "--output", root / "cache", "--device", "cpu"]
    assert main(["tokenize", *map(str, arguments)]) == 0
    return root / "cache"


@pytest.mark.parametrize("examples", EXAMPLES)
def test_cache_headers(cache: Path, examples: int) -> None:
    processor = small_processor()
    model = small_model(processor)
    file = cache / HEADER

    def use() -> None:
        found = FrameTokenCache(cache)
        found.fingerprint, found.embodiment, found.cameras, found.grid, found.splits, repr(found)
        found.verify(model, processor).episodes()

    def claim(content: str | bytes) -> None:
        with written(file, content):
            refused_or_read(use, [cache, "embodiment"])

    content = file.read_bytes()
    damaged = st.one_of(damaged_json(json.loads(content)).map(to_text), damaged_bytes(content), st.just("[" * 100_000))
    fuzz(damaged, claim, 3 * examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_cache_shards(cache: Path, examples: int) -> None:
    processor = small_processor()
    model = small_model(processor)
    file = next((cache / "data").glob("*.parquet"))

    def claim(content: bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: FrameTokenCache(cache).verify(model, processor).episodes(), [cache])

    fuzz(damaged_bytes(file.read_bytes()), claim, 2 * examples)


# -------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    run = ResultFolder(folder, {"model": "mine", "seed": 0})
    for trial in range(3):
        row = {"suite": "libero_goal", "task": 1, "trial": trial, "success": trial > 0, "steps": 80}
        run.add({**row, "instruction": "open the drawer", "episode_seed": trial, "versions": {"mujoco": "3.3.0"}})
    run.finish()
    return folder


@pytest.mark.parametrize("examples", EXAMPLES)
def test_episodes_of_an_evaluation(results: Path, examples: int) -> None:
    file = results / EPISODES_FILE
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def resume() -> None:
        ResultFolder(results, {"model": "mine", "seed": 0})

    def claim(content: str | bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: summarize(read_episodes(results)), [results])
            refused_or_read(resume, [results])

    lines = damaged_json(rows).map(
        lambda rows: "".join(to_text(r) + "\n" for r in rows) if isinstance(rows, list) else ""
    )
    fuzz(st.one_of(lines, damaged_bytes(file.read_bytes()), st.just("[" * 100_000 + "\n")), claim, 4 * examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_zipped_episodes(results: Path, tmp_path: Path, examples: int) -> None:
    file = tmp_path / f"{EPISODES_FILE}.gz"

    def claim(content: bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: read_episodes(file), [file])

    fuzz(damaged_bytes(gzip.compress((results / EPISODES_FILE).read_bytes(), mtime=0)), claim, 4 * examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_settings_of_an_evaluation(results: Path, examples: int) -> None:
    file = results / SETTINGS_FILE

    def claim(content: str | bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: ResultFolder(results, {"model": "mine", "seed": 0}), [results])

    content = file.read_bytes()
    fuzz(st.one_of(damaged_json(json.loads(content)).map(to_text), damaged_bytes(content)), claim, 4 * examples)


# -------------------------------------------------------------------- what commands are given


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


PLANS = {
    "plan.json": json.dumps({"actions": [[0.0, 0.5, -1.0], [1.0, 2.0, 3.0]]}).encode(),
    "plan.csv": b"x,y,z\n0,0.5,-1\n1,2,3\n",
    "plan.npy": npy(np.zeros((2, 3))),
}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", PLANS)
def test_plans(tmp_path: Path, name: str, examples: int) -> None:
    file = tmp_path / name
    damaged: st.SearchStrategy[Any] = damaged_bytes(PLANS[name])
    if name.endswith("json"):
        damaged = st.one_of(damaged, damaged_json(json.loads(PLANS[name])).map(to_text), st.just("[" * 100_000))

    def claim(content: str | bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: read_plan(file, ("x", "y", "z"), 3), [file], (UserError, OSError))

    fuzz(damaged, claim, 4 * examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_pictures(tmp_path: Path, kind: str, examples: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(32 * 24 * 3, dtype=np.uint8).reshape(32, 24, 3)).save(buffer, kind)
    file = tmp_path / f"picture.{kind.lower()}"

    def claim(content: bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: read_picture(file), [file], (UserError, OSError))

    fuzz(damaged_bytes(buffer.getvalue(), head=200), claim, examples)
