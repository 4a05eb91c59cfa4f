"""Datasets from outside: whatever happened to them, they are read, or refused in one line that names the file."""

import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damaged_bytes, damaged_json, fuzz, refused_or_read, scalars, to_text, written
from hypothesis import strategies as st
from robot_folder import write_recordings

from transformers_worldvla.data import load_episodes
from transformers_worldvla.data.video import VideoError, count_frames, decode_frames

EXAMPLES = [pytest.param(15, id="few"), pytest.param(400, id="many", marks=pytest.mark.slow)]
pytestmark = pytest.mark.timeout(900)


def read_all(path: Path) -> None:
    """Everything that training reads of a dataset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = load_episodes(path)
        dataset.fingerprint, str(dataset)
        for episode in dataset:
            if len(episode):
                episode.actions, episode.state, episode.success, episode.problems()
                for camera in episode.cameras:
                    episode.frame(camera, len(episode) - 1)


# -------------------------------------------------------------------- LeRobot


@pytest.mark.parametrize("examples", EXAMPLES)
def test_lerobot_info(recording: Path, examples: int) -> None:
    file = recording / "meta" / "info.json"

    def claim(document: Any) -> None:
        with written(file, to_text(document)):
            refused_or_read(lambda: read_all(recording), [recording])

    fuzz(damaged_json(json.loads(file.read_text())), claim, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["episodes.jsonl", "tasks.jsonl"])
def test_lerobot_lines(recording: Path, name: str, examples: int) -> None:
    file = recording / "meta" / name
    if not file.exists():
        pytest.skip("v3.0 keeps this in parquet")
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def claim(document: Any) -> None:
        lines = document if isinstance(document, list) else [document]
        with written(file, "".join(to_text(line) + "\n" for line in lines)):
            refused_or_read(lambda: read_all(recording), [recording])

    fuzz(damaged_json(rows), claim, examples)


@st.composite
def damaged_table(draw: st.DrawFn, table: pa.Table) -> pa.Table:
    """The table with a column gone or renamed, a value of it replaced, or rows missing or repeated."""
    position = draw(st.integers(0, table.num_columns - 1))
    name, column = table.column_names[position], table.column(position)
    row = draw(st.integers(0, max(len(table) - 1, 0)))
    match draw(st.sampled_from(["value", "value", "remove", "rename", "rows", "repeat"])):
        case "remove":
            return table.remove_column(position)
        case "rename":
            return table.rename_columns([draw(st.text(max_size=4)) if n == name else n for n in table.column_names])
        case "rows":
            return table.slice(row)
        case "repeat":
            return pa.concat_tables([table, table.slice(row)])
    cells = column.to_pylist()
    if not cells:
        return table
    cells[row] = draw(st.one_of(scalars, st.lists(scalars, max_size=3)))
    for values, kind in ((cells, column.type), ([cells[row]] * len(cells), None)):
        try:
            return table.set_column(position, name, pa.array(values, kind))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue  # no column can hold it
    return table


@pytest.mark.parametrize("examples", EXAMPLES)
def test_lerobot_tables(recording: Path, examples: int) -> None:
    files = sorted(recording.rglob("*.parquet"))
    tables = [pq.read_table(file) for file in files]

    def claim(damaged: tuple[Path, pa.Table]) -> None:
        buffer = io.BytesIO()
        pq.write_table(damaged[1], buffer)
        with written(damaged[0], buffer.getvalue()):
            refused_or_read(lambda: read_all(recording), [recording])

    one = st.integers(0, len(files) - 1)
    fuzz(one.flatmap(lambda i: st.tuples(st.just(files[i]), damaged_table(tables[i]))), claim, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_videos(recording: Path, examples: int) -> None:
    files = sorted(recording.rglob("*.mp4"))
    if not files:
        pytest.skip("this one keeps pictures in parquet")
    file = files[0]
    seconds = np.arange(3) / 10

    def claim(content: bytes) -> None:
        with written(file, content):
            count_frames(file)
            try:
                frames = decode_frames(file, seconds, 0.025)
                assert frames.shape[0] == 3 and frames.dtype == np.uint8
            except VideoError as error:
                assert "\n" not in str(error)

    fuzz(damaged_bytes(file.read_bytes()), claim, examples)


@pytest.mark.parametrize(
    "template",
    ["{episode_index:99999999999}", "{episode_index.__class__}", "../../{episode_index}.parquet", "/etc/passwd"],
)
def test_a_path_template_is_only_a_path_inside_the_dataset(recording: Path, template: str) -> None:
    file = recording / "meta" / "info.json"
    with written(file, to_text(json.loads(file.read_text()) | {"data_path": template})):
        with pytest.raises(ValueError, match=f"{recording.name}.*(cannot be filled in|leads out of the dataset)"):
            read_all(recording)


# -------------------------------------------------------------------- LIBERO HDF5


@st.composite
def damaged_demo(draw: st.DrawFn, parts: list[str]) -> tuple[str, Any]:
    """A part of a demonstration and what stands in its place: None for nothing, an array, or attributes' text."""
    part = draw(st.sampled_from(parts))
    if part.startswith("@"):
        facts = damaged_json({"env_kwargs": {"control_freq": 20}, "language_instruction": "go"})
        return part, draw(st.one_of(facts.map(to_text), scalars.filter(lambda value: value is not None)))
    shape = draw(st.sampled_from([(), (0,), (3,), (3, 7), (3, 0), (2, 3, 4), (3, 8, 8, 3), (2, 2**31, 2**31, 3)]))
    dtype = draw(st.sampled_from(["u1", "f4", "f8", "i8", "S3", "?", "c8"]))
    return part, draw(st.sampled_from([None, (shape, dtype)]))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_libero_demonstrations(demonstrations: Path, examples: int) -> None:
    file = next(demonstrations.glob("*.hdf5"))
    content = file.read_bytes()
    with h5py.File(file) as data:
        first = data["data"][sorted(data["data"])[0]]
        parts = [name for name in ("actions", "rewards", "states") if name in first]
        parts += [f"obs/{name}" for name in first["obs"]] + ["obs", "@env_args", "@problem_info", "@num_demos"]

    def claim(damaged: tuple[str, Any]) -> None:
        part, change = damaged
        with written(file, content):
            with h5py.File(file, "r+") as data:
                demo = data["data"][sorted(data["data"])[0]]
                if part.startswith("@"):
                    try:
                        data["data"].attrs[part[1:]] = change
                    except (TypeError, ValueError, OverflowError):
                        return  # no attribute can be that
                else:
                    del demo[part]
                    if change is not None:
                        chunks = True if np.prod(change[0], dtype=float) > 10**6 else None  # kept without being written
                        try:
                            demo.create_dataset(part, shape=change[0], dtype=change[1], chunks=chunks)
                        except ValueError:
                            return  # beyond what HDF5 can count
            refused_or_read(lambda: read_all(demonstrations), [file])

    fuzz(damaged_demo(parts), claim, examples)


@pytest.mark.parametrize("part", ["actions", "obs/agentview_rgb"])
def test_a_small_file_cannot_ask_for_much_memory(demonstrations: Path, part: str) -> None:
    """HDF5 keeps what was never written as nothing."""
    file = next(demonstrations.glob("*.hdf5"))
    with written(file, file.read_bytes()):
        with h5py.File(file, "r+") as data:
            for demo in data["data"].values():
                rows = len(demo["actions"])
                del demo[part], demo["obs/joint_states"]
                shape = (rows, 2**20, 2**20, 3) if part.startswith("obs") else (10**11, 7)
                chunks = tuple(min(side, 64) for side in shape)
                demo.create_dataset(part, shape=shape, dtype="u1", chunks=chunks)
                if part == "actions":
                    for name in [name for name in (*demo["obs"],) if len(demo["obs"][name]) == rows]:
                        del demo["obs"][name]
        with pytest.raises(ValueError, match=f"{file.name}.*(pixels|steps)"):
            read_all(demonstrations)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_libero_bytes(demonstrations: Path, examples: int) -> None:
    file = next(demonstrations.glob("*.hdf5"))

    def claim(content: bytes) -> None:
        with written(file, content):
            refused_or_read(lambda: read_all(demonstrations), [file, demonstrations])

    fuzz(damaged_bytes(file.read_bytes(), head=20_000), claim, examples)


# -------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("folder") / "toy", (3, 2), cameras=("image",))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def forged_npy(shape: str, dtype: str = "'<f4'") -> bytes:
    """A header that promises what does not follow."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


ARRAYS = [
    npy(np.zeros(())),
    npy(np.zeros((3, 0))),
    npy(np.array(["a", "b", "c"])),
    npy(np.array([object(), None], dtype=object)),
    npy(np.zeros((3, 2), np.complex64)),
    npy(np.zeros(3, [("a", "f4")])),
    npy(np.array(["2020-01-01"] * 3, "M8[D]")),
    forged_npy("(1000000000000, 7)"),
    forged_npy("(-1, 7)"),
    forged_npy("(3, 7)", "[('a', '<f4')]"),
    b"PK\x03\x04 no archive",
]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_arrays(pictures: Path, examples: int) -> None:
    actions = pictures / "episode_0" / "actions.npy"
    state = pictures / "episode_0" / "state.npy"
    valid = npy(np.zeros((3, 3), np.float32))

    def claim(damaged: tuple[Path, bytes]) -> None:
        with written(*damaged):
            refused_or_read(lambda: read_all(pictures), [pictures])

    content = st.one_of(st.sampled_from(ARRAYS), damaged_bytes(valid))
    fuzz(st.tuples(st.sampled_from([actions, state]), content), claim, 2 * examples)


@pytest.mark.parametrize("content", ARRAYS)
def test_every_strange_array(pictures: Path, content: bytes) -> None:
    with written(pictures / "episode_0" / "actions.npy", content):
        with pytest.raises(ValueError, match="episode_0/actions.npy"):
            read_all(pictures)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_tables_of_actions(pictures: Path, examples: int) -> None:
    file = pictures / "episode_0" / "actions.csv"
    rows = list(csv.reader(io.StringIO(file.read_text())))

    def claim(content: bytes | str) -> None:
        with written(file, content):
            refused_or_read(lambda: read_all(pictures), [pictures])

    cells = damaged_json(rows).map(
        lambda table: (
            "\n".join(",".join(map(str, row if isinstance(row, list) else [row])) for row in table)
            if isinstance(table, list)
            else str(table)
        )
    )
    fuzz(st.one_of(cells, damaged_bytes(file.read_bytes())), claim, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_facts_instructions_and_pictures(pictures: Path, examples: int) -> None:
    folder = pictures / "episode_0"
    facts, text, picture = folder / "episode.json", folder / "instruction.txt", folder / "image" / "image_0.png"

    def claim(damaged: tuple[Path, bytes | str]) -> None:
        with written(*damaged):
            refused_or_read(lambda: read_all(pictures), [pictures])

    damaged = st.one_of(
        st.tuples(st.just(facts), damaged_json(json.loads(facts.read_text())).map(to_text)),
        st.tuples(st.just(facts), st.just("[" * 100_000)),
        st.tuples(st.just(text), st.binary(max_size=8)),
        st.tuples(st.just(picture), damaged_bytes(picture.read_bytes())),
    )
    fuzz(damaged, claim, 2 * examples)
