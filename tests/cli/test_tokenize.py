"""`worldvla tokenize`: the same bytes however often it is killed and however many share the work; counts; refusals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_tree import HAS_PROC, children, is_running
from robot_folder import NAMES, TASKS, write_recordings
from small_checkpoint import LIBERO, write_checkpoint

from transformers_worldvla import WorldVLAForCausalLM, WorldVLAProcessor
from transformers_worldvla.action_tokenization_worldvla import ROTATIONS, SEMANTICS, Embodiment
from transformers_worldvla.cli.main import build_parser, main
from transformers_worldvla.data import FrameTokenCache, load_episodes
from transformers_worldvla.data.cache_plan import STATISTICS
from transformers_worldvla.data.preparation import NO_OPS, UNSUCCESSFUL
from transformers_worldvla.data.splits import RULES

STEPS = (9, 12, 7, 10, 8, 11) * 4
TOY = Embodiment(
    "toy", low=(-1.0,) * 3, high=(1.0,) * 3, action_names=NAMES, gripper={"index": 2, "open": -1.0, "close": 1.0}
)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 episodes of two tasks, two cameras; two say that they failed."""
    return write_recordings(tmp_path_factory.mktemp("recorded") / "toy", STEPS, failed=(3, 20))


@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another robot with one camera, and of this one."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "toy", LIBERO, TOY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def arguments(recordings: Path, toy_checkpoint: Path) -> list[object]:
    """One way to call it; a small batch makes many."""
    return ["tokenize", recordings, "--model", toy_checkpoint, "--device", "cpu", "--batch-size", 6, "--seed", 1]


@pytest.fixture(scope="module")
def whole(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an uninterrupted run; read-only."""
    output = tmp_path_factory.mktemp("caches") / "whole"
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    return output


# -------------------------------------------------------------------- what it makes


def test_one_command_makes_a_cache_that_the_checkpoint_reads(
    worldvla: Callable[..., Any], arguments: list[object], toy_checkpoint: Path, recordings: Path, tmp_path: Path
) -> None:
    result = worldvla(*arguments, "--output", tmp_path / "cache", "--json")
    assert result.code == 0, result.err
    document = result.document
    processor = WorldVLAProcessor.from_pretrained(toy_checkpoint)
    model = WorldVLAForCausalLM.from_pretrained(toy_checkpoint)
    cache = FrameTokenCache(tmp_path / "cache").verify(model, processor, load_episodes(recordings))
    assert {key: document[key] for key in cache.header if key != "files"} == {
        key: value for key, value in cache.header.items() if key != "files"
    }
    steps = sum(cache.splits.values())
    assert document["frames"] == document["frames_encoded"] == steps  # the camera of both that the checkpoint knows
    assert cache.cameras == ("image",)
    assert document["bytes"] == sum(
        (tmp_path / "cache" / file["path"]).stat().st_size for file in cache.header["files"]
    )
    assert document["bytes_per_frame"] == document["bytes"] / steps
    assert document["frames_per_second"] > 0

    counted = document["preparation"]
    assert counted["failed_episodes"] == [3, 20]
    assert counted["steps"] + counted["dropped_no_op_steps"] == sum(STEPS) - STEPS[3] - STEPS[20]
    for line in (
        "unsuccessful episodes: 2 dropped (3, 20)",
        f"no-ops: {counted['dropped_no_op_steps']} of {sum(STEPS) - STEPS[3] - STEPS[20]} steps dropped",
        "split (seeded): train ",
        "embodiment toy (D=3): toy, minmax of ",
        "cameras: image, 4 x 4 codes a picture",
        "frames/s",
    ):
        assert line in result.err


def test_options_reach_the_cache(
    worldvla: Callable[..., Any], arguments: list[object], recordings: Path, tmp_path: Path
) -> None:
    options = "--cameras wrist image --no-ops keep --unsuccessful keep --statistics quantile --name arm".split()
    options += "--semantics absolute --rotation 180 --raw-cameras hand corner --val-share 0.3 --ood-share 0.5".split()
    result = worldvla(*arguments, *options, "--output", tmp_path / "cache", "--json")
    assert result.code == 0, result.err
    cache = FrameTokenCache(tmp_path / "cache")
    assert cache.cameras == ("wrist", "image")
    assert sum(cache.splits.values()) == sum(STEPS)
    robot = cache.embodiment
    assert (robot.name, robot.semantics, robot.rotation, robot.control_hz) == ("arm", "absolute", 180, 10)
    assert robot.raw_cameras == ("hand", "corner")
    held_out = set(cache.table("val_ood", ["instruction"])["instruction"].to_pylist())
    assert len(held_out) == 1 and held_out < set(TASKS)
    train = cache.table("train", ["action"])["action"].to_pylist()
    assert np.allclose([robot.low, robot.high], np.percentile(np.float32(train).astype(np.float64), [1, 99], axis=0))
    assert "tasks held out: " in result.err and "no-ops: kept" in result.err


def test_a_cache_of_changed_pictures(
    worldvla: Callable[..., Any], arguments: list[object], whole: Path, tmp_path: Path
) -> None:
    """Crops alone, under another camera's name: the training steps of the plain cache, other codes."""
    options = ["--augment", "7", "--augment-colours", "0"]
    cameras = ["--cameras", "top=image"]
    result = worldvla(*arguments, *options, *cameras, "--output", tmp_path / "crop", "--json")
    assert result.code == 0, result.err
    cache, plain = FrameTokenCache(tmp_path / "crop"), FrameTokenCache(whole)
    assert cache.cameras == ("top",)
    assert cache.header["augmentation"] == {
        **{"seed": 7, "crop": 0.9},
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0),
    }
    columns = ["episode_index", "step", "action"]
    assert cache.table(columns=columns).equals(plain.table("train", columns))
    assert not cache.table(columns=["codes.top"])[0].equals(plain.table("train", ["codes.image"])[0])
    card = (tmp_path / "crop" / "README.md").read_text()
    assert "| pictures | augmented, an episode's alike: seed 7, crop 0.9, brightness 0, " in card
    assert "| pictures | as recorded |" in (whole / "README.md").read_text()


def test_ranges_of_the_checkpoint(worldvla: Callable[..., Any], arguments: list[object], tmp_path: Path) -> None:
    options = ["--statistics", "checkpoint", "--embodiment", "toy", "--split", "authors"]
    result = worldvla(
        *[each for each in arguments if each not in ("--seed", 1)], *options, "--output", tmp_path / "cache"
    )
    assert result.code == 0, result.err
    cache = FrameTokenCache(tmp_path / "cache")
    assert cache.embodiment == TOY and cache.header["split"]["rule"] == "authors"
    assert "ranges of the checkpoint's embodiment" in result.out


def test_a_dry_run_counts_and_writes_nothing(
    worldvla: Callable[..., Any], arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = worldvla(*arguments, "--dry-run", "--gripper", "gripper")
    assert result.code == 0, result.err
    assert "no-ops: " in result.out and "actions, " in result.out and not list(tmp_path.iterdir())
    result = worldvla(*arguments, "--dry-run", "--gripper", "none", "--json")
    assert result.document["preparation"]["gripper"] is None


# -------------------------------------------------------------------- killed, shared


def start(arguments: list[object], **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "transformers_worldvla.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until
        time.sleep(0.001)


def parts(output: Path) -> list[Path]:
    return sorted((output / "unfinished").glob("0*.npy"))


def test_killed_and_run_again_gives_the_same_bytes(
    worldvla: Callable[..., Any], arguments: list[object], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    process = start([*arguments, "--output", output])
    wait_for(lambda: len(parts(output)) > 2, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(parts(output))
    assert 2 < done < len(STEPS) - 2 and not (output / "worldvla_cache.json").exists()
    with pytest.raises(FileNotFoundError, match="unfinished cache: run the same"):
        FrameTokenCache(output)

    result = worldvla(*arguments, "--output", output, "--seed", 2)  # other options must not be mixed in
    assert (
        result.code == 2
        and "cache of something else: split.seed (1, not 2); " in result.err
        and len(parts(output)) == done
    )

    result = worldvla(*arguments, "--output", output, "--json")
    assert result.code == 0, result.err
    assert contents(output) == contents(whole)
    assert result.document["frames_encoded"] < result.document["frames"]
    assert f"of {result.document['frames']} frames are there already" in result.err

    again = worldvla(*arguments, "--output", output, "--json")
    assert again.document["frames_encoded"] == 0 and contents(output) == contents(whole)


def test_killed_before_anything_was_written(
    worldvla: Callable[..., Any], arguments: list[object], whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "killed/unfinished").mkdir(parents=True)
    (tmp_path / "killed/unfinished/.worldvla_cache.json.0").write_text("{")
    result = worldvla(*arguments, "--output", tmp_path / "killed")
    assert result.code == 0, result.err
    assert contents(tmp_path / "killed") == contents(whole)


@pytest.mark.parametrize("last", ["data", "worldvla_cache.json"])
def test_killed_while_it_ends(
    worldvla: Callable[..., Any], arguments: list[object], whole: Path, tmp_path: Path, last: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All is encoded, and the Parquet files, or all but the clean-up, are there: what a kill leaves at these points."""
    from transformers_worldvla.data import cache_writer

    class Killed(BaseException):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Killed

    output = tmp_path / "killed"
    with monkeypatch.context() as patch:
        if last == "data":
            patch.setattr(cache_writer, "write_card", stop)
        else:
            patch.setattr(cache_writer.shutil, "rmtree", stop)
        with pytest.raises(Killed):
            worldvla(*arguments, "--output", output)
    assert (output / last).exists() and parts(output)
    result = worldvla(*arguments, "--output", output)
    assert result.code == 0, result.err
    assert contents(output) == contents(whole)


def test_ranks_share_the_work(
    worldvla: Callable[..., Any], arguments: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "ranks"
    monkeypatch.setenv("WORLD_SIZE", "3")
    encoded = []
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        result = worldvla(*arguments, "--output", output, "--json")
        assert result.code == 0, result.err
        encoded.append(result.document["frames_encoded"])
        assert (output / "worldvla_cache.json").exists() == (rank == 0)
    assert contents(output) == contents(whole)
    assert min(encoded) > 0 and sum(encoded) == result.document["frames"]


@pytest.mark.slow
def test_torchrun(arguments: list[object], whole: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "transformers_worldvla.cli",
    ]
    output = tmp_path / "ranks"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments), "--output", str(output)], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert contents(output) == contents(whole)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
def test_processes_share_the_work_and_end_with_the_one_that_was_killed(
    arguments: list[object], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "processes"
    process = start([*arguments, "--output", output, "--processes", 2])
    wait_for(lambda: parts(output), process)
    workers = children(process)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < until, "workers outlive the command"
        time.sleep(0.05)
    assert not (output / "worldvla_cache.json").exists()

    process = start([*arguments, "--output", output, "--processes", 3])
    assert process.wait() == 0, process.communicate()[1].decode()
    assert contents(output) == contents(whole)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
def test_a_killed_worker_is_one_clear_line(arguments: list[object], whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "processes"
    process = start([*arguments, "--output", output, "--processes", 2])
    wait_for(lambda: parts(output), process)
    for pid in children(process):
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert process.returncode == 2
    assert "worldvla tokenize: a worker process was killed (out of memory?): the same command goes on" in error
    process = start([*arguments, "--output", output])
    assert process.wait() == 0
    assert contents(output) == contents(whole)


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--output DIR is needed (or --dry-run)"),
        (["--output", "{tmp}/new", "--private"], "--private does nothing without --push-to-hub"),
        (
            ["--output", "{tmp}/new", "--cameras", "imag"],
            'no camera "imag" here; the cameras are: image, wrist, did you',
        ),
        (
            ["--output", "{tmp}/new", "--split", "authors", "--seed", "1"],
            "--seed belongs to --split seeded, not authors",
        ),
        (
            ["--output", "{tmp}/new", "--gripper", "hand"],
            '--gripper hand: a dimension\'s number, "none", or one of x, y',
        ),
        (["--output", "{tmp}/new", "--gripper", "3"], "dimension 3 is no gripper: actions have the dimensions 0 to 2"),
        (["--output", "{tmp}/new", "--embodiment", "arm"], "unknown embodiment 'arm'; known: libero (D=7)"),
        (
            ["--output", "{tmp}/new", "--embodiment", "libero"],
            "libero (D=7) is no template for actions of 3 dimensions",
        ),
        (["--output", "{tmp}/new", "--no-ops", "authors", "--semantics", "absolute"], "rule is for delta actions"),
        (["--output", "{tmp}/new", "--dataset-revision", "main"], "revision applies to Hub repositories"),
        (["--output", "{tmp}/new", "--augment-colours", "0"], "--augment-colours does nothing without --augment N"),
        (["--output", "{tmp}/new", "--augment", "-1"], "'-1' is no whole number >= 0"),
        (["--output", "{tmp}/new", "--augment", "1", "--augment-colours", "6"], "'6' is no number from 0 to 5"),
        (["--output", "{tmp}/new", "--cameras", "wrist", "wrist=image"], 'two cameras would be called "wrist"'),
        (["--output", "{tmp}/new", "--val-share", "1"], "'1' is no number from 0 to below 1"),
    ],
)
def test_bad_input_is_one_line(
    worldvla: Callable[..., Any],
    recordings: Path,
    toy_checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    given = [option.replace("{tmp}", str(tmp_path)) for option in options]
    try:
        result = worldvla("tokenize", recordings, "--model", toy_checkpoint, *given)
        code, error = result.code, result.err
    except SystemExit as stopped:  # argparse
        code, error = stopped.code, None
    assert code == 2 and not list(tmp_path.iterdir())
    if error is not None:
        assert message in error.splitlines()[-1]


def test_damage_names_the_episode_and_keeps_what_was_done(
    worldvla: Callable[..., Any], toy_checkpoint: Path, tmp_path: Path
) -> None:
    source = write_recordings(tmp_path / "toy", (5, 5, 5))
    picture = source / "episode_2/image/image_4.png"
    intact = picture.read_bytes()
    picture.write_bytes(intact[:40])
    command = ["tokenize", source, "--model", toy_checkpoint, "--output", tmp_path / "cache", "--no-ops", "keep"]
    result = worldvla(*command)
    assert result.code == 2
    assert "episode_2/image/image_4.png: episode 2: is not a picture" in result.err.splitlines()[-1]
    assert len(parts(tmp_path / "cache")) == 2


def test_ranks_or_processes(
    worldvla: Callable[..., Any], arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = worldvla(*arguments, "--output", tmp_path / "cache", "--processes", 2)
    assert result.code == 2 and "--processes 2: the 2 ranks share the work already" in result.err


def test_the_choices_on_the_command_line_are_the_librarys() -> None:
    """They are written out there, so that `--help` need not load the library."""
    parser = build_parser()
    tokenize = next(iter(parser._subparsers._group_actions)).choices["tokenize"]
    choices = {action.dest: action.choices for action in tokenize._actions if action.choices}
    assert choices == {
        "no_ops": NO_OPS,
        "unsuccessful": UNSUCCESSFUL,
        "split": RULES,
        "statistics": STATISTICS,
        "semantics": SEMANTICS,
        "rotation": ROTATIONS,
    }
