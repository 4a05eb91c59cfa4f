"""`worldvla bench`: rows, document, wrong calls. Shapes are shrunk, the code is the real one."""

import json

import pytest

from transformers_worldvla.benchmarking import cases
from transformers_worldvla.cli.main import main

FIELDS = {"arm", "what", "px", "frames", "actions", "batch", "median_s", "p95_s", "forwards"}


@pytest.fixture(autouse=True)
def toy_shape(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    toy = {**cases.SHAPES["small"], **sizes, "num_key_value_heads": 4}
    monkeypatch.setitem(cases.SHAPES, "small", toy)


def bench(capfd, *arguments: str) -> dict:
    assert main(["bench", "--json", "--device", "cpu", *arguments]) == 0
    return json.loads(capfd.readouterr().out)


def test_rows(capfd):
    document = bench(capfd, "--px", "64", "--actions", "1", "2", "--repeats", "2")
    rows = document["rows"]
    assert [(row["arm"], row["actions"], row["forwards"]) for row in rows] == [
        ("A", 1, 10), ("C", 1, 10), ("D", 1, 7), ("A", 2, 19), ("C", 2, 19), ("D", 2, 7)
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= FIELDS and row["agreement"] == 1.0
        assert (row["what"], row["px"], row["frames"], row["batch"]) == ("chunk", 64, 2, 1)
        assert row["actions_per_s"] == pytest.approx(row["actions"] / row["median_s"])
    assert document["shape"] == "small" and document["dtype"] == "float32"
    assert {one["ratio"] for one in document["ratios"]} == {"A/D", "C/D"}


def test_chunks_and_frames(capfd):
    arguments = ["--px", "32", "--actions", "2", "--what", "chunk", "frame", "--repeats", "1", "--batch", "1", "2"]
    rows = bench(capfd, *arguments, "--arms", "C", "D", "D-overlap", "D-draft75")["rows"]
    assert len({tuple(row[name] for name in ("arm", "what", "batch")) for row in rows}) == len(rows) == 12
    kinds = {(row["arm"], row["what"]) for row in rows}
    assert kinds == {
        ("C", "chunk"), ("D", "chunk"), ("D-overlap", "chunk"), ("C", "frame"), ("D", "frame"), ("D-draft75", "frame")
    }  # fmt: skip
    drafted = next(row for row in rows if row["arm"] == "D-draft75")
    assert 1 < drafted["forwards"] <= 5 and drafted["agreement"] == 1.0


def test_for_people(capfd):
    assert main(["bench", "--device", "cpu", "--px", "32", "--actions", "1", "--repeats", "1", "--arms", "D"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("small shape, float32") and "GB/s read" in lines[0]
    assert lines[2].split()[:5] == ["arm", "what", "px", "frames", "actions"]
    assert lines[3].split()[:5] == ["D", "chunk", "32", "2", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "E"], "there is no arm E for chunk"),
        (["--arms", "D-draft"], "there is no arm D-draft for chunk"),
        (["--arms", "D-parallel", "--what", "frame"], "there is no arm D-parallel for frame"),
        (["--px", "100"], "a picture side is a multiple of 32 up to 1024, not 100"),
        (["--arms", "D-overlap", "--frames", "1"], "D-overlap prefills the older frames"),
        (["--actions", "0"], "is no whole number above 0"),
    ],
)
def test_wrong_calls(capfd, arguments, message):
    try:
        code = main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capfd.readouterr().err
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
