import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformers_worldvla.data import EpisodeError, load_episodes, scan_episodes

ROWS_V21, ROWS_V30 = "data/chunk-000/episode_000001.parquet", "data/chunk-000/file-000.parquet"
EPISODES_V30 = "meta/episodes/chunk-000/file-000.parquet"
VIDEO_V21 = "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
SMALL = ("v21_video", "v21_image", "v30_video", "v30_image")
VIDEO_V30 = "videos/observation.images.image/chunk-000/file-001.mp4"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_column(path: Path, name: str, change: Callable[[list], list]) -> None:
    table = pq.read_table(path)
    values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)


def drop_rows(path: Path, count: int) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - count), path)


def set_first(value: object) -> Callable[[list], list]:
    return lambda values: [value, *values[1:]]


@pytest.mark.parametrize("name", ["lerobot_v30_video", "lerobot_v21_video", "libero_hdf5"])
def test_undamaged_recordings_have_no_problem(libero, name):
    calls = []
    report = scan_episodes(libero / name, on_episode=lambda done, total: calls.append((done, total)))
    dataset = load_episodes(libero / name)
    assert report.ok and report.bad_episodes == []
    assert report.num_episodes == len(dataset)
    assert report.num_frames == 2 * sum(dataset.lengths)
    assert calls == [(done, len(dataset)) for done in range(1, len(dataset) + 1)]
    assert str(report).endswith("no problem")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (VIDEO_V21, Path.unlink, "file is missing"),
        (VIDEO_V21, truncate, "cannot be decoded: "),
        (VIDEO_V21, lambda path: path.write_bytes(b""), "cannot be decoded: "),
        (
            VIDEO_V21,
            lambda path: shutil.copy(str(path).replace("001.mp4", "000.mp4"), path),
            "holds 9 frames, the episode has 6 steps",
        ),
        (ROWS_V21, Path.unlink, "file is missing"),
        (ROWS_V21, truncate, "cannot be read: "),
        (ROWS_V21, lambda path: drop_rows(path, 3), "holds 3 rows, the metadata says 6"),
        (
            ROWS_V21,
            lambda path: shutil.copy(str(path).replace("001.", "000."), path),
            "holds 0 rows, the metadata says 6",
        ),
        (ROWS_V21, lambda path: edit_column(path, "frame_index", set_first(5)), "frame_index does not count 0, 1, 2"),
        (ROWS_V21, lambda path: edit_column(path, "action", set_first([np.nan] * 4)), "action of step 0 is not finite"),
        (
            ROWS_V21,
            lambda path: edit_column(path, "task_index", set_first(0)),
            "task_index stands for ['open the drawer",
        ),
        (
            ROWS_V21,
            lambda path: pq.write_table(pq.read_table(path).drop(["action"]), path),
            "there is no column action",
        ),
    ],
)
def test_damage_of_one_episode_is_one_line_with_file_and_episode(copy_of, file, damage, message):
    folder = copy_of("v21_video")
    damage(folder / file)
    report = scan_episodes(folder)
    lines = [str(problem) for problem in report.problems]
    assert report.bad_episodes == [1] and report.num_episodes == 4
    assert any(message in line for line in lines), lines
    assert all(f"{folder}/{file}: episode 1: " in line and "\n" not in line for line in lines), lines
    episode = load_episodes(folder)[1]
    with pytest.raises(EpisodeError) as raised:
        _ = episode.actions, episode.frames("front"), episode.frames("wrist")
        raise episode.problems()[0]
    assert str(raised.value) in lines


def test_damage_of_a_shared_file_is_reported_for_each_of_its_episodes(copy_of):
    folder = copy_of("lerobot_v30_video")
    (folder / VIDEO_V30).unlink()
    drop_rows(folder / ROWS_V30, 5)
    report = scan_episodes(folder)
    assert [str(problem) for problem in report.problems] == [
        f"{folder}/{VIDEO_V30}: episode 2: file is missing",
        f"{folder}/{VIDEO_V30}: episode 3: file is missing",
        f"{folder}/{ROWS_V30}: episode 4: holds 55 rows, the metadata says 60",
    ]
    assert report.num_frames == 60 * 6  # the others are read all the same
    assert str(report).splitlines()[0].endswith("5 episodes, 360 pictures read, 3 problems")


def test_damage_inside_a_video_hits_only_its_episodes(copy_of):
    folder = copy_of("lerobot_v30_video")
    zero_the_middle(folder / VIDEO_V30)
    report = scan_episodes(folder)
    assert report.problems and set(report.bad_episodes) <= {2, 3}
    assert {problem.file for problem in report.problems} == {f"{folder}/{VIDEO_V30}"}


def test_a_picture_that_is_cut_short(copy_of):
    folder = copy_of("v21_image")

    def damage(cells: list[dict]) -> list[dict]:
        return [cells[0], {**cells[1], "bytes": cells[1]["bytes"][:90]}, {"bytes": None, "path": None}, *cells[3:]]

    edit_column(folder / ROWS_V21, "observation.images.front", damage)
    report = scan_episodes(folder)
    assert len(report.problems) == 1
    assert "episode 1: observation.images.front of step 1 is not a picture: " in str(report.problems[0])
    with pytest.raises(EpisodeError, match="observation.images.front of step 2 is empty"):
        load_episodes(folder)[1].frame("front", 2)


@pytest.mark.parametrize(
    ("name", "damage", "messages"),
    [
        ("v21_video", lambda f: (f / "meta/info.json").write_text("{"), ["meta/info.json: is not JSON: "]),
        (
            "v21_video",
            lambda f: edit_json(f / "meta/info.json", fps=None),
            ["meta/info.json: is not complete: "],
        ),
        (
            "v21_video",
            lambda f: edit_json(f / "meta/info.json", total_episodes=9, total_frames=5),
            ["info.json: says 9 episodes, 4 are listed", "info.json: says 5 frames, the episodes have 33"],
        ),
        ("v21_video", lambda f: (f / "meta/tasks.jsonl").unlink(), ["meta/tasks.jsonl: file is missing"]),
        ("v21_video", lambda f: (f / "meta/tasks.jsonl").write_text('{"task": "a"}'), ['a row lacks "task_index"']),
        ("v21_video", lambda f: truncate(f / "meta/episodes.jsonl"), ["meta/episodes.jsonl: is not JSON: "]),
        (
            "v21_video",
            lambda f: edit_json(f / "meta/info.json", video_path=None),
            ["video_path is null, yet observation.images.front is a video"],
        ),
        (
            "v21_video",
            lambda f: edit_json(f / "meta/info.json", data_path="data/{nothing}.parquet"),
            ['the path "data/{nothing}.parquet" cannot be filled in: '],
        ),
        ("lerobot_v30_video", lambda f: shutil.rmtree(f / "meta/episodes"), ["meta/episodes: holds no parquet file"]),
        ("lerobot_v30_video", lambda f: truncate(f / EPISODES_V30), [f"{EPISODES_V30}: cannot be read: "]),
        (
            "lerobot_v30_video",
            lambda f: edit_column(f / EPISODES_V30, "data/file_index", set_first(None)),
            [f'{EPISODES_V30}: episode 0: a row has None as "data/file_index"'],
        ),
        (
            "lerobot_v30_video",
            lambda f: edit_column(f / EPISODES_V30, "episode_index", set_first(7)),
            ["episode 0 is not listed, 1 stands in its place", f"{ROWS_V30}: episode 7: holds 0 rows"],
        ),
        (
            "lerobot_v30_video",
            lambda f: edit_column(f / EPISODES_V30, "tasks", set_first(["fly"])),
            ["meta: episode 0: tasks ['fly'], length 60: not a known task", "the metadata says ['fly']"],
        ),
        (
            "lerobot_v30_video",
            lambda f: edit_column(f / EPISODES_V30, "videos/observation.images.image/to_timestamp", set_first(2.0)),
            [
                "the metadata gives 60 steps 2.000 s of the video",
                "step 59 is at 2.950 s, the episode's part ends at 2.0",
            ],
        ),
    ],
)
def test_damaged_metadata(copy_of, name, damage, messages):
    folder = copy_of(name)
    damage(folder)
    lines = [str(problem) for problem in scan_episodes(folder).problems]
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert message in line and line.startswith(str(folder)) and "\n" not in line


def test_timestamps_that_are_not_the_clock_of_the_dataset(copy_of):
    folder = copy_of("v21_image")
    edit_column(folder / ROWS_V21, "timestamp", set_first(0.04))
    lines = [str(problem) for problem in scan_episodes(folder).problems]
    assert lines == [f"{folder}/{ROWS_V21}: episode 1: timestamps are up to 0.040 s off a clock of 10 fps"]


@pytest.mark.parametrize(
    "changes",
    [{"fps": 0}, {"fps": "fast"}, {"chunks_size": 0}, {"features": []}, {"features": {"action": {"dtype": "float32"}}}],
)
def test_nonsense_in_the_metadata_is_named(copy_of, changes):
    folder = copy_of("v21_image")
    edit_json(folder / "meta/info.json", **changes)
    with pytest.raises(EpisodeError, match="meta/info.json: (is not complete|has an fps, a chunks_size or a shape)"):
        load_episodes(folder)


@pytest.mark.parametrize(
    "line", ['{"episode_index": 0, "tasks": "stack", "length": 9}', "[1]", '{"episode_index": "x"}']
)
def test_nonsense_in_the_list_of_episodes_is_named(copy_of, line):
    folder = copy_of("v21_image")
    (folder / "meta/episodes.jsonl").write_text(line)
    with pytest.raises(EpisodeError, match="meta/episodes.jsonl: "):
        load_episodes(folder)


def test_pictures_of_another_size_than_declared(copy_of):
    folder = copy_of("v21_video")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["shape"] = [480, 640, 3]
    edit_json(folder / "meta/info.json", **info)
    lines = [str(problem) for problem in scan_episodes(folder).problems]
    assert len(lines) == 4 and "observation.images.front is 64 x 96 pixels, meta/info.json says 480 x 640" in lines[0]


def test_actions_of_another_width_than_declared(copy_of):
    folder = copy_of("v21_video")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["action"]["shape"] = [6]
    edit_json(folder / "meta/info.json", **info)
    with pytest.raises(EpisodeError, match="episode_000000.parquet: episode 0: action has 4 values a row, not 6"):
        _ = load_episodes(folder)[0].actions


def test_actions_that_differ_in_width_between_episodes(tmp_path):
    for number, width in enumerate((4, 4, 6)):
        folder = tmp_path / f"episode_{number}"
        folder.mkdir()
        np.save(folder / "actions.npy", np.zeros((3, width)))
    (tmp_path / "instruction.txt").write_text("wait")
    report = scan_episodes(tmp_path)
    assert [str(problem) for problem in report.problems] == [
        f"{tmp_path}: episode 2: actions have 6 values, those of earlier episodes 4"
    ]


def test_what_cannot_be_scanned_raises(tmp_path, small):
    with pytest.raises(FileNotFoundError):
        scan_episodes(tmp_path / "nothing")
    with pytest.raises(ValueError, match='no camera "top" here'):
        scan_episodes(small / "v21_video", cameras="top")


@pytest.fixture(scope="module")
def scratch(libero, small, tmp_path_factory) -> dict[str, Path]:
    """Small datasets of every kind that the next test damages one byte range at a time."""
    root = tmp_path_factory.mktemp("fuzz")
    for source in (*(small / name for name in SMALL), libero / "libero_hdf5"):
        shutil.copytree(source, root / source.name)
    return {folder.name: folder for folder in root.iterdir()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*SMALL, "libero_hdf5"]),
    choice=st.floats(0, 1, exclude_max=True),
    where=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=64),
)
def test_any_damage_ends_in_a_report(scratch, kind, choice, where, junk):
    """Bytes overwritten anywhere in any file: the scan may find nothing wrong, but never fails in another way."""
    files = sorted(path for path in scratch[kind].rglob("*") if path.is_file())
    path = files[int(choice * len(files))]
    data = path.read_bytes()
    start = int(where * len(data))
    path.write_bytes(data[:start] + junk + data[start + len(junk) :])
    try:
        report = scan_episodes(scratch[kind])
        assert all("\n" not in str(problem) for problem in report.problems)
    finally:
        path.write_bytes(data)
