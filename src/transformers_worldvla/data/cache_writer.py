"""Encodes the frames of a `CachePlan`, each once, and writes the frame-token cache.

The unit of work is an episode. Its codes go to `unfinished/POSITION.npy`, whole or not at all; when all are there, the
Parquet files are written, then the card, then the header, then `unfinished/` goes. So a run may be killed at any moment
and started again, and processes and ranks may share the work: batches never cross episodes, and the bytes of the result
depend on the plan alone.
"""

import json
import multiprocessing
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..processes import end_with_parent
from ..vqvae_worldvla import WorldVLAVQVAE
from .cache import CODES, DATA, HEADER, FrameTokenCache, is_unfinished, read_header, unfinished_folder
from .cache_card import write_card
from .cache_plan import CachePlan, codes_of, differences
from .episodes import Episode, EpisodeError
from .preparation import PreparedEpisode

STEPS_READ = 64  # at once from a reader, so that a long episode of large pictures need not fit into memory
EPISODES_PER_TASK = 4  # of a worker process; it reads ahead within a task
PICTURES_PER_FILE = 50_000
ROWS_PER_GROUP = 10_000
COMPRESSION = "zstd"
POLL = 0.5  # seconds
Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int], object]  # told how many more pictures are encoded


def write_cache(
    plan: CachePlan, output: str | Path, vqvae: WorldVLAVQVAE, report: Report = lambda pictures: None
) -> FrameTokenCache:
    """Make the whole cache in this process, or go on with it; `vqvae` is the one that the plan was made with.

    `report` is told how many more pictures are encoded. Raises ValueError where the folder holds something else.
    """
    output = Path(output)
    if not begin_cache(plan, output):
        encode_episodes(plan, missing_episodes(plan, output), output, vqvae, report)
        finish_cache(plan, output)
    return FrameTokenCache(output)


# -------------------------------------------------------------------- begin


def begin_cache(plan: CachePlan, output: Path) -> bool:
    """Make the folder ready for the plan; True when it holds the finished cache already.

    Raises ValueError when it holds something else: another cache, finished or not, or foreign files.
    """
    try:
        header = {key: value for key, value in read_header(output).items() if key != "files"}
    except FileNotFoundError:
        header = None
    if header is None and is_unfinished(output):
        header = json.loads((unfinished_folder(output) / HEADER).read_text(encoding="utf-8"))
    elif header is None and output.exists() and set(output.iterdir()) - {unfinished_folder(output)}:
        raise ValueError(f"{output} is not empty and holds no cache: give another folder")
    if header is not None and header != json.loads(json.dumps(plan.header)):
        found = [line for line in differences(header, plan.header) if not line.startswith("fingerprint")]
        raise ValueError(
            f"{output} holds a cache of something else: {'; '.join(found[:4])} there and here. "
            "Use the same options to go on, or another folder"
        )
    if (output / HEADER).is_file():
        shutil.rmtree(unfinished_folder(output), ignore_errors=True)
        return True
    unfinished_folder(output).mkdir(parents=True, exist_ok=True)
    write_whole(output, unfinished_folder(output) / HEADER, to_json(plan.header))
    return False


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_whole(output: Path, path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file of a cache, or let `content` write it: it appears whole or not at all, whatever kills us."""
    staging = unfinished_folder(output) / f".{path.name}.{uuid.uuid4().hex}"
    if callable(content):
        content(staging)
    else:
        staging.write_bytes(content)
    with staging.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(staging, path)


# -------------------------------------------------------------------- encode


def part_file(output: Path, episode: PreparedEpisode) -> Path:
    """Where the codes of an episode wait for the end."""
    return unfinished_folder(output) / f"{episode.position:06d}.npy"


def missing_episodes(plan: CachePlan, output: Path) -> list[PreparedEpisode]:
    """The episodes whose codes are not there yet; none when the cache is finished, maybe by another rank just now."""
    missing = [each for each in plan.preparation.episodes if not part_file(output, each).is_file()]
    return [] if (output / HEADER).is_file() else missing


def encode_episodes(
    plan: CachePlan,
    episodes: Sequence[PreparedEpisode],
    output: Path,
    vqvae: WorldVLAVQVAE,
    report: Report = lambda pictures: None,
) -> None:
    """Encode episodes in this process, on the device of `vqvae`, and write the part of each.

    The next batches are read while others are encoded. Raises EpisodeError for pictures that cannot be read or give
    another number of codes than the rest; what was read before is encoded and kept.
    """
    batches = (
        (episode, pixels, is_last)
        for episode in episodes
        for pixels, is_last in pixel_batches(plan, plan.dataset[episode.position], episode.steps)
    )

    # a CPU convolves channels-last pictures about 1.4 times faster, to the same codes
    layout = torch.channels_last if vqvae.device.type == "cpu" else torch.contiguous_format

    def encode(batch: tuple[PreparedEpisode, np.ndarray, bool]) -> tuple[PreparedEpisode, np.ndarray, bool]:
        with torch.inference_mode():
            codes = vqvae.encode_codes(torch.from_numpy(batch[1]).to(vqvae.device, memory_format=layout))
        return batch[0], codes.cpu().numpy().astype(np.uint16), batch[2]  # (n, h, w)

    collected: list[np.ndarray] = []
    for episode, codes, is_last in encode_ahead(encode, batches, vqvae.device):
        collected.append(codes)
        if is_last:
            views = np.concatenate(collected).reshape(len(episode), len(plan.cameras), *plan.grid)
            write_whole(output, part_file(output, episode), partial(save_array, array=views))
            collected = []
        report(len(codes))


def encode_ahead(encode: Callable[[Item], Result], batches: Iterator[Item], device: Any) -> Iterator[Result]:
    """The encoded batches, in order; a few are in work while the next is read.

    On the CPU every batch gets one thread, and as many batches run at once as torch has threads: a convolution that is
    shared among threads may round otherwise, and the code that a picture gets must not depend on the machine's cores.
    """
    threads = torch.get_num_threads()
    workers, each = (threads, 1) if device.type == "cpu" else (1, threads)
    torch.set_num_threads(each)
    waiting, damage = deque[Future[Result]](), None
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            try:
                for batch in batches:
                    waiting.append(pool.submit(encode, batch))
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
            except EpisodeError as error:
                damage = error
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
    if damage is not None:
        raise damage


def save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save adds a suffix to names
        np.save(file, array)


def pixel_batches(plan: CachePlan, episode: Episode, steps: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """Pictures of an episode's kept steps, time-major, cameras in order: (n, 3, H, W), and whether it is the last."""
    size, left = plan.header["encoding"]["batch_size"], len(steps) * len(plan.cameras)
    batch: list[np.ndarray] = []
    for picture in pictures(plan, episode, steps):
        pixels = plan.image_processor.pixels(picture)
        if codes_of(pixels) != plan.grid:
            found = "a picture of {} x {} codes, earlier ones have {} x {}".format(*codes_of(pixels), *plan.grid)
            raise EpisodeError(f"{found}: one cache holds one size", plan.dataset.source, episode.index)
        batch.append(pixels)
        left -= 1
        if len(batch) == size or not left:
            yield np.stack(batch), not left
            batch = []


def pictures(plan: CachePlan, episode: Episode, steps: np.ndarray) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 of every kept step and camera, changed as the plan says."""
    beginning = None
    for start in range(0, len(steps), STEPS_READ):
        wanted = steps[start : start + STEPS_READ]
        first, stop = int(wanted[0]), int(wanted[-1]) + 1
        views = [episode.frames(camera, first, stop) for camera in plan.cameras]
        shown = [view[step - first] for step in wanted for view in views]
        beginning = shown[0] if beginning is None else beginning
        yield from augment(plan, episode, beginning, shown)


def augment(plan: CachePlan, episode: Episode, beginning: np.ndarray, shown: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures, changed alike with all others of the episode; its first picture sets the mean of the contrast."""
    if plan.augmentation is None:
        return shown
    rng = np.random.default_rng((plan.header["augmentation"]["seed"], episode.index))
    return plan.augmentation([beginning, *shown], rng)[1:]


# -------------------------------------------------------------------- several processes


def encode_in_processes(
    plan: CachePlan,
    episodes: Sequence[PreparedEpisode],
    output: Path,
    load: Callable[[], WorldVLAVQVAE],
    devices: Sequence[str],
    report: Report = lambda pictures: None,
) -> None:
    """As `encode_episodes`, in one new process for each of `devices`; `load` gives each its image tokenizer.

    They end with this process, however it ends. Raises what a worker raises, and ChildProcessError when one is killed.
    """
    context = multiprocessing.get_context("spawn")
    counter, ticket = context.Value("q", 0), context.Value("i", 0)
    threads = max(1, torch.get_num_threads() // len(devices))
    tasks = [episodes[start : start + EPISODES_PER_TASK] for start in range(0, len(episodes), EPISODES_PER_TASK)]
    reported = 0
    pool = ProcessPoolExecutor(
        len(devices), context, _begin_worker, (plan, output, load, tuple(devices), threads, counter, ticket)
    )
    try:
        pending = {pool.submit(_work, task) for task in tasks}
        while pending:
            done, pending = wait(pending, POLL, FIRST_COMPLETED)
            for future in done:
                future.result()
            now = counter.value
            report(now - reported)
            reported = now
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process was killed (out of memory?): the same command goes on where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}  # of a worker process: what every task needs


def _begin_worker(
    plan: CachePlan,
    output: Path,
    load: Callable[[], WorldVLAVQVAE],
    devices: Sequence[str],
    threads: int,
    counter: Any,
    ticket: Any,
) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    with ticket.get_lock():
        device = devices[ticket.value % len(devices)]
        ticket.value += 1

    def count(pictures: int) -> None:
        with counter.get_lock():
            counter.value += pictures

    _worker.update(plan=plan, output=output, vqvae=load().to(device), report=count)


def _work(episodes: Sequence[PreparedEpisode]) -> None:
    encode_episodes(_worker["plan"], episodes, _worker["output"], _worker["vqvae"], _worker["report"])


def wait_for_ranks(plan: CachePlan, output: Path, report: Report = lambda pictures: None) -> None:
    """Wait until the other ranks have written their episodes too."""
    waiting = missing_episodes(plan, output)
    while waiting:
        time.sleep(POLL)
        missing = missing_episodes(plan, output)
        report(sum(map(len, waiting)) - sum(map(len, missing)))
        waiting = missing


# -------------------------------------------------------------------- finish


def finish_cache(plan: CachePlan, output: Path) -> None:
    """Turn the codes of all episodes into the Parquet files, the card and the header."""
    (output / DATA).mkdir(exist_ok=True)
    files = []
    for split in plan.splits:
        groups = group_episodes(plan.of_split(split), PICTURES_PER_FILE // len(plan.cameras))
        for number, group in enumerate(groups):
            name = f"{DATA}/{split}-{number:05d}-of-{len(groups):05d}.parquet"
            write_whole(output, output / name, partial(write_rows, plan, output, group))
            files.append({"path": name, "split": split, "rows": sum(map(len, group))})
    header = {**plan.header, "files": files}
    card = write_card(header, cache_size(output, header))
    write_whole(output, output / "README.md", card.encode())
    write_whole(output, output / HEADER, to_json(header))
    shutil.rmtree(unfinished_folder(output))


def cache_size(output: Path, header: dict[str, Any]) -> int:
    """Bytes of the Parquet files."""
    return sum((output / entry["path"]).stat().st_size for entry in header["files"])


def group_episodes(episodes: Sequence[PreparedEpisode], steps: int) -> list[list[PreparedEpisode]]:
    """Consecutive episodes of about so many steps, never part of one."""
    groups: list[list[PreparedEpisode]] = []
    size = steps
    for episode in episodes:
        if size >= steps:
            groups.append([])
            size = 0
        groups[-1].append(episode)
        size += len(episode)
    return groups


def write_rows(plan: CachePlan, output: Path, episodes: Sequence[PreparedEpisode], path: Path) -> None:
    """One Parquet file of some episodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([episode_rows(plan, output, episode) for episode in episodes])
    pq.write_table(table, path, compression=COMPRESSION, row_group_size=ROWS_PER_GROUP)


def episode_rows(plan: CachePlan, output: Path, kept: PreparedEpisode) -> Any:
    """The rows of an episode, as `cache.py` describes them."""
    import pyarrow as pa

    episode = plan.dataset[kept.position]
    codes = np.load(part_file(output, kept))  # (T, C, h, w)
    columns = {
        "episode_index": pa.array(np.full(len(kept), episode.index), pa.int64()),
        "step": pa.array(kept.steps, pa.int32()),
        "instruction": pa.array([episode.instruction] * len(kept), pa.string()),
        "action": _lists(episode.actions[kept.steps], pa.float32()),
    }
    if episode.state is not None:
        columns["state"] = _lists(episode.state[kept.steps], pa.float32())
    for number, camera in enumerate(plan.cameras):
        columns[CODES + camera] = _lists(codes[:, number].reshape(len(kept), -1), pa.uint16())
    return pa.table(columns)


def _lists(rows: np.ndarray, kind: Any) -> Any:
    """(T, n) as an Arrow array of lists of n."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel(), kind), rows.shape[1])
