"""Episodes in several processes with a model in between: the result is the same however it is computed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting_environment import SIDE, CountingSpec
from small_checkpoint import small_model, small_processor

from transformers_worldvla.evaluation.closed_loop import Episode, Filming, run_episodes
from transformers_worldvla.evaluation.policies import ModelPlanner, PlanRequest
from transformers_worldvla.evaluation.results import ResultFolder

INSTRUCTIONS = {"sliders": ["push the slider", "push the slider to the far end of the line"]}
BUDGET = 9


def episodes(trials: int = 3, **spec: Any) -> list[Episode]:
    return [
        Episode(CountingSpec(goal=2.0 + task, **spec), "sliders", task, trial, text, BUDGET)
        for task, text in enumerate(INSTRUCTIONS["sliders"])
        for trial in range(trials)
    ]


def planner(batch_size: int = 1, sampling: dict[str, Any] | None = None) -> ModelPlanner:
    processor = small_processor()
    return ModelPlanner(small_model(processor), processor, INSTRUCTIONS, batch_size=batch_size, sampling=sampling)


def run(folder: Path, workers: int, jobs: list[Episode] | None = None, **options: Any) -> bytes:
    arguments = {"policy": "frames", "planner": planner(), "cameras": ("front",), **options}
    results = ResultFolder(folder, {"seed": 3})
    run_episodes(jobs or episodes(), results, {"model": "small"}, 3, workers=workers, progress=False, **arguments)
    return results.episodes_file.read_bytes()


def rows_of(written: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.splitlines()]


def test_workers_order_and_history_of_processes_do_not_matter(tmp_path: Path) -> None:
    one = run(tmp_path / "one", workers=1)
    three = run(tmp_path / "three", workers=3, jobs=episodes()[::-1])
    assert one == three
    alone = run(tmp_path / "alone", workers=1, jobs=[episodes()[4]])
    assert alone.splitlines()[0] == one.splitlines()[4], "an episode does not depend on those before it"
    rows = rows_of(one)
    assert [(row["task"], row["trial"]) for row in rows] == [(task, trial) for task in (0, 1) for trial in (0, 1, 2)]
    assert {row["renderer"] for row in rows} == {"numpy"}
    assert all("warning" not in row and "error" not in row and row["versions"] == {"slider": "1"} for row in rows)
    assert all(row["steps"] == BUDGET or row["success"] for row in rows)


def test_a_full_batch_answers_as_a_partial_one(tmp_path: Path) -> None:
    """Whether rows are independent is for this machine to say; where they are, workers must not matter either."""
    model = planner(batch_size=3)
    if not model.batch_is_independent("sliders"):
        pytest.skip("rows of a batch influence one another on this machine: it evaluates with a batch size of 1")
    one = run(tmp_path / "one", workers=1, planner=model)
    three = run(tmp_path / "three", workers=3, planner=planner(batch_size=3))
    assert one == three


def test_dependent_rows_are_found_out() -> None:
    """A model that lets rows see one another, as one that pads to the longest row of a batch may."""
    model = planner(batch_size=2)
    generate = model.model.generate_actions

    def leaking(input_ids: torch.Tensor, **inputs: Any) -> Any:
        answer = generate(input_ids, **inputs)
        return type(answer)(answer.sequences, answer.logprobs + 1e-6 * input_ids.float().mean())

    assert model.batch_is_independent("sliders")
    model.model.generate_actions = leaking
    assert not model.batch_is_independent("sliders")


def test_a_planner_answers_as_the_processor_and_the_model_do() -> None:
    """Frames that come one by one, tokenized once, against all pictures of a query at once."""
    model, rng = planner(), np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 1, SIDE, SIDE, 3), dtype=np.uint8)
    text = INSTRUCTIONS["sliders"][0]
    for step in range(4):
        request = PlanRequest("e", "sliders", text, frames[step : step + 1], begins=step == 0, seed=0)
        (chunk,) = model.plan([request])
        shown = [frames[index, 0] for index in range(max(0, step - 1), step + 1)]
        inputs = model.processor(images=shown, instruction=text)
        tokens = model.model.generate_actions(**inputs, num_actions=model.processor.num_actions)
        np.testing.assert_array_equal(chunk, model.processor.decode_actions(tokens)[0])


def test_sampling_draws_from_a_generator_of_the_episode(tmp_path: Path) -> None:
    sampling = {"do_sample": True, "temperature": 2.0}
    one = run(tmp_path / "one", workers=1, planner=planner(sampling=sampling))
    two = run(tmp_path / "two", workers=2, planner=planner(sampling=sampling))
    assert one == two
    with pytest.raises(ValueError, match="batch size of 1"):
        planner(batch_size=2, sampling=sampling)


def test_a_crash_is_a_crash_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = episodes(4, failing=(1,), dying=(2,))
    rows = rows_of(run(tmp_path, workers=2, jobs=jobs, policy="expert", planner=None, cameras=()))
    for row in rows:
        expected = {1: "FloatingPointError: the slider fell off", 2: "the simulator's process died: signal SIGKILL"}
        assert row.get("error") == expected.get(row["trial"])
        assert row["success"] is (None if row["trial"] in expected else True)
    assert [row["steps"] for row in rows if row["trial"] == 1] == [2, 2]
    assert "task 0 trial 1 crashed: FloatingPointError" in capfd.readouterr().err


def test_videos_of_some_failures_and_successes(tmp_path: Path) -> None:
    import av

    jobs = [
        Episode(CountingSpec(goal=goal), "sliders", task, trial, "push", BUDGET)
        for task, goal in enumerate((2.0, 1e9))
        for trial in range(2)
    ]
    filming = Filming(failures=1, successes=2, camera="front", stride=2)
    run(tmp_path, workers=1, jobs=jobs, policy="expert", planner=None, cameras=(), filming=filming)
    videos = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert videos == ["sliders_0_0_success.mp4", "sliders_0_1_success.mp4", "sliders_1_0_failure.mp4"]
    with av.open(str(tmp_path / "videos" / videos[-1])) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 1 + 4 + 1, "the start, every second step, the last one"


_RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_closed_loop import episodes, run
if __name__ == "__main__":
    run(Path(sys.argv[1]), workers=2, jobs=episodes(12))
"""


def test_killed_and_taken_up_again_it_ends_with_the_same_file(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", workers=2, jobs=episodes(12))
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    here = Path(__file__).parent
    command = [sys.executable, str(script), str(tmp_path / "killed"), str(here), str(here.parent)]
    killed = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / "episodes.jsonl"
    until = time.monotonic() + 200
    while (not file.exists() or file.read_bytes().count(b"\n") < 3) and time.monotonic() < until:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = file.read_bytes().count(b"\n")
    assert 3 <= done < 24, "it was killed in the middle"
    assert run(tmp_path / "killed", workers=2, jobs=episodes(12)) == whole
