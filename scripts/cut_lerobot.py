"""Cuts episodes out of a LeRobot v3.0 dataset into a small v3.0 dataset that LeRobot itself reads.

    python scripts/cut_lerobot.py SOURCE TARGET --episodes 0 27 30 --max-frames 60 --cameras image

Episodes are renumbered from 0; those that shared a video file still do, camera by camera. Video packets are copied, and
the copy is decoded and compared with the source. Where a cut does not fall on a key frame the file is encoded anew
(libsvtav1 for AV1, else libx264, crf 12), which is not lossless; the script says which happened. Statistics are
computed from the frames that stay.
"""

import argparse
import json
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transformers_worldvla.data import load_episodes
from transformers_worldvla.data.lerobot import FRAME_TOLERANCE, LeRobotEpisodes, flat_values, read_episode_rows
from transformers_worldvla.data.lerobot_meta import EPISODES_V3, INFO, TASKS_V3, EpisodeEntry
from transformers_worldvla.data.video import VideoError, decode_frames

DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--episodes", type=int, nargs="+", required=True)
    parser.add_argument("--cameras", nargs="+", help="all by default")
    parser.add_argument("--max-frames", type=int, help="shorten longer episodes to their first so many frames")
    options = parser.parse_args()
    if options.target.exists():
        parser.error(f"{options.target} exists already")
    dataset = load_episodes(options.source, cameras=options.cameras)
    if not isinstance(dataset, LeRobotEpisodes) or dataset.info.version[0] != 3:
        parser.error(f"{options.source} is not a LeRobot v3.0 dataset")
    if not set(options.episodes) <= set(range(len(dataset))):
        parser.error(f"{options.source} has episodes 0 to {len(dataset) - 1}")
    cut(dataset, options.target, sorted(set(options.episodes)), options.max_frames)


def cut(dataset: LeRobotEpisodes, target: Path, chosen: list[int], max_frames: int | None) -> None:
    """Write the chosen episodes to `target`."""
    entries = [dataset.entries[index] for index in chosen]
    lengths = [min(entry.length, max_frames or entry.length) for entry in entries]
    tables = copy_rows(dataset, target, entries, lengths)
    rows: list[dict[str, Any]] = []
    for index, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
        first = sum(lengths[:index])
        rows.append({"episode_index": index, "tasks": list(entry.tasks), "length": length})
        rows[-1] |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": first}
        rows[-1] |= {"dataset_to_index": first + length, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    for key in dataset.camera_keys.values():
        if dataset.info.is_video(key):
            copy_videos(dataset, target, key, entries, lengths, rows)
    write_metadata(dataset, target, rows)
    write_statistics(target, pq.read_schema(dataset.files.path(dataset.files.list(EPISODES_V3)[0])), tables)


def copy_rows(
    dataset: LeRobotEpisodes, target: Path, entries: list[EpisodeEntry], lengths: list[int]
) -> list[pa.Table]:
    """Write the data file, one row group an episode as LeRobot does, with episodes, rows and tasks numbered anew."""
    kept = [key for key in dataset.info.features if key not in dataset.info.camera_keys]
    kept += [key for key in dataset.camera_keys.values() if not dataset.info.is_video(key)]
    tasks = sorted({task for entry in entries for task in entry.tasks}, key=list(dataset.tasks.values()).index)
    tables: list[pa.Table] = []
    for index, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
        columns = [key for key in kept if key != "episode_index"]
        table = read_episode_rows(dataset.files.path(entry.data_file), entry.index, columns).slice(0, length)
        first = sum(lengths[:index])
        numbers = {
            "episode_index": [index] * length,
            "index": list(range(first, first + length)),
            "task_index": [tasks.index(dataset.tasks[task]) for task in table["task_index"].to_pylist()],
        }
        for name, values in numbers.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int64()))
        tables.append(table)
    order = [name for name in pq.read_schema(dataset.files.path(entries[0].data_file)).names if name in kept]
    (target / DATA).parent.mkdir(parents=True)
    tables = [table.select(order).cast(tables[0].select(order).schema) for table in tables]
    with pq.ParquetWriter(target / DATA, tables[0].schema, compression="snappy") as writer:
        for table in tables:
            writer.write_table(table)
    source = pq.read_table(dataset.files.path(TASKS_V3))
    rows = {dataset.tasks[number]: position for position, number in enumerate(source["task_index"].to_pylist())}
    table = source.take([rows[task] for task in tasks])
    position = table.column_names.index("task_index")
    table = table.set_column(position, "task_index", pa.array(range(len(tasks)), pa.int64()))
    (target / TASKS_V3).parent.mkdir(parents=True)
    pq.write_table(table, target / TASKS_V3)
    return tables


def copy_videos(
    dataset: LeRobotEpisodes,
    target: Path,
    key: str,
    entries: list[EpisodeEntry],
    lengths: list[int],
    rows: list[dict[str, Any]],
) -> None:
    """Write the video files of a camera and enter into `rows` where each episode lies."""
    fps, positions = dataset.info.fps, range(len(entries))
    for file, (name, members) in enumerate(groupby(positions, key=lambda each: entries[each].videos[key].file)):
        group = list(members)
        source, spans = dataset.files.path(name), [entries[each].videos[key] for each in group]
        starts = [sum(lengths[each] for each in group[:count]) / fps for count in range(len(group))]
        for each, start in zip(group, starts, strict=True):
            rows[each] |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
            rows[each] |= {
                f"videos/{key}/from_timestamp": start,
                f"videos/{key}/to_timestamp": start + lengths[each] / fps,
            }
        wanted = [
            decode_frames(source, span.start + np.arange(lengths[each]) / fps, FRAME_TOLERANCE / fps)
            for each, span in zip(group, spans, strict=True)
        ]
        frames = np.concatenate(wanted)
        path = target / str(dataset.info.video_path).format(video_key=key, chunk_index=0, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        copy_packets(source, path, [(span.start, lengths[each]) for span, each in zip(spans, group, strict=True)], fps)
        if is_same(path, frames, fps):
            print(f"{path}: {len(frames)} frames copied")
        else:
            encode(source, path, frames, fps)
            print(f"{path}: {len(frames)} frames encoded anew, not lossless")


def copy_packets(source: Path, path: Path, spans: list[tuple[float, int]], fps: float) -> None:
    """Copy the packets of some (start in seconds, number of frames) spans, one after another."""
    with av.open(str(source)) as reader, av.open(str(path), "w", options={"movflags": "faststart"}) as writer:
        stream = reader.streams.video[0]
        output = writer.add_stream_from_template(stream, opaque=True)
        output.time_base = stream.time_base
        tick = 1 / (fps * float(stream.time_base))  # time units a frame
        packets = [packet for packet in reader.demux(stream) if packet.pts is not None]
        done = 0
        for start, length in spans:
            begin = round(start / float(stream.time_base))
            for packet in packets:
                if -tick / 2 <= packet.pts - begin < (length - 0.5) * tick:
                    shift = round(done * tick) - begin
                    copy = av.Packet(bytes(packet))
                    copy.pts, copy.dts, copy.duration = packet.pts + shift, packet.dts + shift, packet.duration
                    copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, output
                    writer.mux(copy)
            done += length


def is_same(path: Path, frames: np.ndarray, fps: float) -> bool:
    """Whether a file decodes to exactly these frames."""
    try:
        return bool((decode_frames(path, np.arange(len(frames)) / fps, FRAME_TOLERANCE / fps) == frames).all())
    except VideoError:
        return False


def encode(source: Path, path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode frames with the codec family of `source`, a key frame every two frames as LeRobot does."""
    with av.open(str(source)) as reader:
        is_av1 = reader.streams.video[0].codec.canonical_name == "av1"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as writer:
        options = {"crf": "12", "g": "2"}
        stream = writer.add_stream("libsvtav1" if is_av1 else "libx264", Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        writer.mux(stream.encode())


def write_metadata(dataset: LeRobotEpisodes, target: Path, rows: list[dict[str, Any]]) -> None:
    """Write `meta/episodes`, still without statistics, and `meta/info.json`."""
    schema = pq.read_schema(dataset.files.path(dataset.files.list(EPISODES_V3)[0]))
    schema = pa.schema([field for field in schema if field.name in rows[0]], metadata=schema.metadata)
    (target / EPISODES).parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), target / EPISODES)
    info = json.loads(dataset.files.path(INFO).read_text(encoding="utf-8"))
    for key in set(dataset.info.camera_keys) - set(dataset.camera_keys.values()):
        del info["features"][key]
    info["total_episodes"], info["splits"] = len(rows), {"train": f"0:{len(rows)}"}
    info["total_frames"] = sum(row["length"] for row in rows)
    info["total_tasks"] = len({task for row in rows for task in row["tasks"]})
    (target / INFO).write_text(json.dumps(info, indent=4), encoding="utf-8")


def write_statistics(target: Path, source_schema: pa.Schema, tables: list[pa.Table]) -> None:
    """Compute statistics from what was written: per episode into `meta/episodes`, overall into `meta/stats.json`."""
    dataset = load_episodes(target)
    assert isinstance(dataset, LeRobotEpisodes)
    values = [
        {
            key: flat_values(table[key]).reshape(len(table), -1)
            for key in table.column_names
            if key in dataset.info.features
        }
        | {key: episode.frames(key) for key in dataset.camera_keys.values()}
        for table, episode in zip(tables, dataset, strict=True)
    ]
    rows = pq.read_table(target / EPISODES).to_pylist()
    for row, parts in zip(rows, values, strict=True):
        for key, part in parts.items():
            row |= {f"stats/{key}/{name}": value for name, value in statistics(part).items()}
    schema = pa.schema([field for field in source_schema if field.name in rows[0]], metadata=source_schema.metadata)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), target / EPISODES)
    overall = {key: statistics(np.concatenate([parts[key] for parts in values])) for key in values[0]}
    (target / "meta/stats.json").write_text(json.dumps(overall, indent=4), encoding="utf-8")


def statistics(values: np.ndarray) -> dict[str, Any]:
    """LeRobot's statistics: of every dimension of rows (T, D), or of every colour (3, 1, 1) of frames (T, H, W, 3)."""
    is_picture = values.ndim == 4
    axes, scale = ((0, 1, 2), 255.0) if is_picture else ((0,), 1.0)
    found = {
        "min": values.min(axes),
        "max": values.max(axes),
        "mean": values.mean(axes, dtype=np.float64),
        "std": values.std(axes, dtype=np.float64),
        **{name: np.quantile(values, share, axis=axes) for name, share in QUANTILES.items()},
    }
    shape = (3, 1, 1) if is_picture else (-1,)
    return {name: (value / scale).reshape(shape).tolist() for name, value in found.items()} | {"count": [len(values)]}


if __name__ == "__main__":
    main()
