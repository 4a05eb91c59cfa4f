"""The driver of the paper's tables: the plan, which rows share a run, and the document made from result files."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_worldvla import WorldVLAForCausalLM
from transformers_worldvla.assets import DEFAULT_CHECKPOINT, bundled_folder

ROOT = Path(__file__).parents[2]
FOLDER, DOCS, HUB = ROOT / "examples" / "paper_tables", ROOT / "docs", ROOT / "hub"
sys.path[:0] = [str(FOLDER), str(Path(__file__).parents[1] / "evaluation")]

import report  # noqa: E402
import reproduce  # noqa: E402
import rows  # noqa: E402
import stages  # noqa: E402
from small_checkpoint import write_checkpoint  # noqa: E402
from store import Budget, Store, read_budget  # noqa: E402

RECORDINGS = Path(__file__).parents[1] / "fixtures" / "libero" / "lerobot_v30_video"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, Budget())


# -------------------------------------------------------------------- where every row starts


def test_rows_start_from_the_same_weights_and_answer_as_the_paper_does(store: Store) -> None:
    """Of the bundled checkpoint: its image tokenizer, not its decoder nor how it chooses bins."""
    training = rows.ROWS["table3.4"].training
    starts = [stages.make_start(store, replace(training, action_attention=mask)) for mask in ("independent", "causal")]
    one, other, bundled = (
        WorldVLAForCausalLM.from_pretrained(path) for path in (*starts, bundled_folder(DEFAULT_CHECKPOINT))
    )
    assert bundled.config.action_bin_window > 0 == one.config.action_bin_window == other.config.action_bin_window
    assert (one.config.action_attention, other.config.action_attention) == ("independent", "causal")
    weights, others, taken = one.state_dict(), other.state_dict(), bundled.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    same = {name for name, value in weights.items() if torch.equal(value, taken[name])}
    assert {name for name in weights if "vqmodel" in name} <= same
    assert not any(torch.equal(weights[name], taken[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))


# -------------------------------------------------------------------- the plan


def test_the_most_telling_rows_come_first() -> None:
    names = [row.name for row in rows.choose_rows()]
    assert sorted(names) == sorted(rows.ROWS) and len(names) == len(set(names))
    assert names[:3] == ["table3.3", "table3.4", "table3.5"]
    assert {name.split(".")[1] for name in names[3:8]} == {"1", "5", "10"} and names[3].startswith("figure6")
    assert all(name.startswith("table5.") for name in names[8:14])


def test_rows_are_chosen_by_name() -> None:
    assert [row.name for row in rows.choose_rows(("figure7.*", "table3.2"))] == [
        "table3.2", "figure7.action", "figure7.video", "figure7.world"
    ]  # fmt: skip
    with pytest.raises(ValueError, match='no row is called "table9"'):
        rows.choose_rows(("table3.1", "table9"))


@pytest.mark.parametrize(
    ("name", "paper"),
    [  # Table 3 of the paper, LIBERO-Goal
        ("table3.1", (("action",), 1, "independent", 67.3)),
        ("table3.2", (("action", "world"), 1, "independent", 73.1)),
        ("table3.3", (("action",), 5, "causal", 79.6)),
        ("table3.4", (("action",), 5, "independent", 84.4)),
        ("table3.5", (("action", "world"), 5, "independent", 85.1)),
    ],
)
def test_table_3_switches_what_the_paper_switches(name: str, paper: tuple[Any, ...]) -> None:
    row = rows.ROWS[name]
    training = row.training
    found = (training.kinds, training.num_actions, training.action_attention, row.paper["success"]["libero_goal"])
    assert found == paper and training.history == 2


def test_rows_that_are_one_model_share_its_run(store: Store) -> None:
    """The paper prints 67.3 % in tables 3, 5 and 6, and 84.4 % in 3 and 5: the same models."""
    name = {row: store.name(rows.ROWS[row].training) for row in rows.ROWS}
    assert name["table3.1"] == name["table5.2.single"] == name["table6.without"] == name["figure6.1"]
    assert name["table3.4"] == name["table5.2.chunk"] == name["figure6.5.independent"] == name["figure7.action"]
    assert name["table3.5"] == name["table4.both"] == name["figure7.world"] == name["resolution.128"]
    assert name["table3.3"] == name["figure6.5.causal"] != name["table3.4"]
    assert rows.ROWS["table6.with"].training.start_from == rows.ROWS["table4.world"].training
    assert len(set(name.values())) == len({row.training for row in rows.ROWS.values()}) == 29


def test_a_run_is_named_by_all_that_decides_it(store: Store, tmp_path: Path) -> None:
    training = rows.ROWS["table3.5"].training
    name = store.name(training)
    assert re.fullmatch(r"action\+world-k5-m2-128px-[0-9a-f]{8}", name)
    assert name == Store(tmp_path / "elsewhere", Budget()).name(replace(training)), "on every machine alike"
    changes: list[dict[str, Any]] = [
        {"kinds": ("action",)}, {"num_actions": 6}, {"history": 1}, {"action_attention": "causal"},
        {"world_loss_weight": 0.04}, {"px": 256}, {"start_from": training},
    ]  # fmt: skip
    others = [store.name(replace(training, **change)) for change in changes]
    others += [Store(tmp_path, Budget(steps=2)).name(training), Store(tmp_path, Budget(seed=1)).name(training)]
    assert len({name, *others}) == 1 + len(others)
    assert Store(tmp_path, Budget(trials="50")).name(training) == name, "how it is measured does not change the model"


def test_a_folder_has_one_budget(tmp_path: Path) -> None:
    assert read_budget(tmp_path, {"steps": 7}) == Budget(steps=7)
    (tmp_path / "budget.json").write_text(json.dumps({"steps": 7, "trials": "2"}))
    assert read_budget(tmp_path, {}) == Budget(steps=7, trials="2")
    assert read_budget(tmp_path, {"trials": "10", "steps": 7}).trials == "10", "more trials go on"
    assert read_budget(tmp_path, {"dataset": "data"}).dataset == "data", "begun with a cache"
    with pytest.raises(ValueError, match="was begun with --steps 7"):
        read_budget(tmp_path, {"steps": 8})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rows", "table9"], 'no row is called "table9": see --list'),
        (["--tasks", "3-1"], "--tasks 3-1: give numbers and ranges, such as 1,4 or 0-9"),
        ([], "--dataset DATA is needed, or --cache with pictures of 128 pixels"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        reproduce.main(["--output", str(tmp_path / "out"), *words])
    assert end.value.code == 2 and capsys.readouterr().err == f"reproduce.py: {reason}\n"
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_what_rows_share_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 3000 steps of 16 samples of 217 tokens (text 20, two frames of 76, five actions of 9) at 0.29 ms."""
    reproduce.main(["--output", str(tmp_path / "out"), "--list", "--rows", "table3.4", "figure7.action", "table6.with"])
    rows_of_plan = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows_of_plan["table3.4"].split()[2] == f"{3000 * 16 * 217 * 0.29e-3 / 3600:.1f}h"
    assert rows_of_plan["figure7.action"].split()[2:4] == ["0.0h", "0.0h"]
    assert rows_of_plan["figure7.action"].endswith("shares the run of table3.4")
    pretraining = 20 + 76 + 9 + 76, 20 + 2 * 76 + 9  # tokens of a world sample, and of an action sample with K = 1
    assert rows_of_plan["table6.with"].split()[2] == f"{3000 * 16 * sum(pretraining) * 0.29e-3 / 3600:.1f}h"
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------- the document


def write_episodes(store: Store, row: str, outcomes: str) -> None:
    """`+` solved, `-` not, `x` crashed: one a trial of task 0."""
    folder = store.success(rows.ROWS[row].training)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"suite": "libero_goal", "task": 0, "trial": trial, "success": {"+": True, "-": False, "x": None}[outcome],
         "steps": 50, "episode_seed": trial}
        for trial, outcome in enumerate(outcomes)
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line_of(document: str, start: str) -> list[str]:
    """The cells of the one line of a table that begins like this."""
    (line,) = {line for line in document.splitlines() if line.startswith(f"| {start}")}
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_was_not_run_says_so(store: Store) -> None:
    document = report.write_report(store)
    measured = [line for line in document.splitlines() if re.search(r"^\| .*\(`\w+\..*`\)", line)]
    assert len(measured) == 39 + 2, "every row, those of Table 4 at two horizons"
    assert all("not run" in line for line in measured)
    assert "0 of 29 trainings, 0 of 39 rows" in document
    assert line_of(document, "action + world model, chunks, proposed mask (`table3.5`)")[1:] == ["not run", "85.1 %"]
    assert line_of(document, "`table3.3` -> `table3.4`")[2:4] == ["+4.8", "not run"]


def test_the_document_says_what_was_trained_on(store: Store, tmp_path: Path) -> None:
    assert "Demonstrations: not chosen yet." in report.write_report(store)
    named = Store(tmp_path, Budget(dataset="runs/demonstrations/lerobot/"))
    assert "Demonstrations: `lerobot`." in report.write_report(named)
    store.cache(128).parent.mkdir()
    store.cache(128).symlink_to(HUB / "libero-goal-tokens")
    assert "Demonstrations: 150 episodes of 6 tasks." in report.write_report(store)
    chosen = replace(store.budget, instructions=["turn on the stove", "put the bowl on the plate"])
    assert "Demonstrations: 50 episodes of 2 tasks." in report.write_report(Store(tmp_path, chosen))


def test_success_has_wilsons_interval_and_a_paired_test(store: Store) -> None:
    """Closed forms: Wilson's bounds of 0 of n are 0 and z^2 / (n + z^2); McNemar's p of 0 against 6 is 2 / 2^6."""
    write_episodes(store, "table3.3", "--------")
    write_episodes(store, "table3.4", "++++++--x")
    document = report.write_report(store)
    z2 = 1.959963984540054**2
    upper = 100 * z2 / (8 + z2)
    assert line_of(document, "action model, chunks, naive mask")[1] == f"0.0 % [0.0, {upper:.1f}] (0 of 8)"
    center, reach = (6 + z2 / 2) / (8 + z2), (z2 * (6 * 2 / 8 + z2 / 4)) ** 0.5 / (8 + z2)
    interval = f"[{100 * (center - reach):.1f}, {100 * (center + reach):.1f}]"
    shown = f"75.0 % {interval} (6 of 8, 1 crashed)"
    assert line_of(document, "action model, chunks, proposed mask")[1:] == [shown, "84.4 %"]
    assert line_of(document, "`table3.3` -> `table3.4`")[2:] == ["+4.8", "+75.0", "0 / 6 / 8", f"{2 / 2**6:.3g}"]
    assert line_of(document, "K = 5, proposed mask")[1] == shown, "rows that share a run share its result"
    assert "4 of 39 rows" not in document and "6 of 39 rows" in document


def test_speed_stands_beside_success(store: Store) -> None:
    name = store.name(rows.ROWS["table5.4.chunk"].training)
    (store.output / "speed.json").write_text(json.dumps({name: {"seconds": 0.4, "actions_per_second": 12.5}}))
    assert line_of(report.write_report(store), "4 frames, chunks")[1:] == ["not run", "84.7 %", "12.50", "2.78"]


def write_frames(store: Store, row: str, values: dict[int, float]) -> None:
    """PSNR of episodes at horizon 10, as the evaluation of world models writes it."""
    from transformers_worldvla.evaluation.world_model import summarize

    candidates = {"copy_last_frame": 20.0, "reconstruction_ceiling": 31.5}
    lines = [
        {"episode": episode, "horizon": 10, "starts": [0], "psnr": {
            name: [[value] * 10] for name, value in {"model": psnr, **candidates}.items()}}
        for episode, psnr in values.items()
    ]  # fmt: skip
    folder = store.frames(rows.ROWS[row].training)
    folder.mkdir(parents=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({**summarize(lines), "missing": {}}))


def test_imagined_frames_are_compared_episode_by_episode(store: Store) -> None:
    """Differences 1, 2 and 3 dB: mean 2, standard error 1 / sqrt(3)."""
    write_frames(store, "table4.world", {3: 24.0, 5: 25.0, 8: 26.0})
    document = report.write_report(store)
    assert line_of(document, "`table4.world` -> `table4.both`, 10 frames")[3:] == ["not run", ""]
    write_frames(store, "table4.both", {3: 25.0, 5: 27.0, 8: 29.0})
    document = report.write_report(store)
    assert line_of(document, "`table4.world` -> `table4.both`, 10 frames")[2:] == ["+0.15", "+2.00 +- 0.58", "3"]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in document.splitlines()
        if line.startswith("| world model (`table4.world`) | 10")
    ][0]
    assert cells[2:4] == ["25.00 +- 0.58", "29.62"]
    assert "| image tokenizer alone (ceiling) | 10 | 31.50" in document


def test_the_document_is_what_the_committed_results_say(tmp_path: Path) -> None:
    with tarfile.open(DOCS / "results" / "paper_tables.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    store = Store(tmp_path, read_budget(tmp_path, {}))
    store.cache(128).parent.mkdir()
    store.cache(128).symlink_to(HUB / "libero-goal-tokens")
    assert report.write_report(store) == (DOCS / "paper_tables.md").read_text(encoding="utf-8")


# -------------------------------------------------------------------- for real


def start(output: Path, checkpoint: Path) -> subprocess.Popen[bytes]:
    """Two rows, a handful of steps, one episode of a dozen steps."""
    budget = {
        "--dataset": RECORDINGS, "--model": checkpoint, "--steps": 6, "--batch-size": 2, "--tasks": 7, "--trials": 1,
        "--max-steps": 12, "--clips": 1, "--output": output,
    }  # fmt: skip
    words = [sys.executable, "reproduce.py", "--rows", "table5.1.chunk", "table4.world"]
    words += [str(word) for option in budget.items() for word in option]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (output.parent / "log").open("ab") as log:
        return subprocess.Popen(words, cwd=FOLDER, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_two_rows_survive_a_kill(tmp_path: Path) -> None:
    from simulator_extras import need_libero

    need_libero()
    output, checkpoint = tmp_path / "tables", write_checkpoint(tmp_path / "model")
    store = Store(output, Budget(steps=6, batch_size=2))
    first = rows.ROWS["table5.1.chunk"].training
    process, deadline = start(output, checkpoint), time.monotonic() + 400
    while not store.is_trained(first) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert store.is_trained(first) and not store.episodes(first), (tmp_path / "log").read_text()
    trained = (store.run(first) / "model.safetensors").stat().st_mtime_ns
    assert start(output, checkpoint).wait(500) == 0, (tmp_path / "log").read_text()
    assert (store.run(first) / "model.safetensors").stat().st_mtime_ns == trained, "it is not trained again"

    document = (output / "paper_tables.md").read_text()
    success, _, speed, _ = line_of(document, "1 frame, chunks")[1:]
    assert success.endswith("(0 of 1)") and float(speed) > 0
    assert "2 of 29 trainings, 7 of 39 rows" in document, "the speed of all of Table 5 is measured at once"
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
    assert start(output, checkpoint).wait(300) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a third call has nothing to do"
