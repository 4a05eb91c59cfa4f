"""The arms of the training benchmark train the same thing: one loss, one set of gradients."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_step.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_have_equal_losses_and_gradients(benchmark: ModuleType) -> None:
    """Each step, with each kind of checkpointing, against the first; chunks smaller than the batch too."""
    model = benchmark.build_model("tiny", dropout=0.0, loss_chunk_size=50)
    rows = benchmark.make_samples(model, batch_size=3, pixels=64)
    found = {}
    for arm in ("authors+no", "authors", "plain", "ours", "ours+selective", "ours+full"):
        name, checkpointing = benchmark.parse_arm(arm)
        if checkpointing is None:
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable(checkpointing)
        model.zero_grad()
        loss = benchmark.STEPS[name](model, rows)
        loss.backward()
        found[arm] = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    expected_loss, expected = found.pop("authors+no")
    assert expected_loss > 1
    for arm, (loss, gradients) in found.items():
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6, msg=arm)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, a=arm, n=name: f"{a} {n}: {text}"
            )


def test_the_masks_of_the_arms_differ_from_causal(benchmark: ModuleType) -> None:
    """Guards the test above: the mask built in Python hides the 10 pairs of 5 blocks of 9 tokens."""
    model = benchmark.build_model("tiny")
    rows = benchmark.make_samples(model, batch_size=2, pixels=64)
    ids, _ = benchmark.right_padded(rows, model.tokens.bos, model.device)
    mask = benchmark.python_mask(ids, model)
    causal = torch.ones_like(mask[0]).tril()
    assert (causal & ~mask[0]).sum() == 10 * 9 * 9
    assert torch.equal(mask[1], causal)


@pytest.mark.slow
def test_one_run_measures_every_arm() -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--batch-size", "2", "--pixels", "64", "--json"]
    command += ["--rounds", "1", "--steps", "1", "--arms", "authors", "ours+selective"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=500).stdout
    rows = json.loads(output)
    assert [row["arm"] for row in rows] == ["authors", "ours+selective"]
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=1e-2)  # dropout differs
    assert all(row["tokens_per_s"] > 0 and row["peak_gb"] > 0 for row in rows)


def test_an_unknown_arm_is_named() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "--arms", "theirs"], capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        "no arm is called 'theirs': ours, plain, authors, each with +full, +selective, +no or nothing" in result.stderr
    )
