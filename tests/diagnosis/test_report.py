"""Findings, their counts and their table."""

import pytest

from transformers_worldvla.diagnosis import Diagnosis, Finding
from transformers_worldvla.diagnosis.report import FAILED, OK, SKIPPED, WARNING

FINDINGS = [
    Finding("files", OK, "complete"),
    Finding("idle frames", WARNING, "30 % " + "of the steps move nothing " * 8, "drop them"),
    Finding("model", SKIPPED, "not loaded"),
]


def test_a_diagnosis_fails_when_a_check_does() -> None:
    assert not Diagnosis(FINDINGS).has_failed
    failed = Diagnosis([*FINDINGS, Finding("code", FAILED, "missing", "copy it")])
    assert failed.has_failed
    assert failed.counts == {OK: 1, WARNING: 1, FAILED: 1, SKIPPED: 1}
    assert failed["code"].advice == "copy it"
    with pytest.raises(KeyError):
        failed["cameras"]


def test_the_table_has_all_of_it_in_lines_that_fit() -> None:
    table = str(Diagnosis(FINDINGS))
    assert max(map(len, table.splitlines())) <= 120
    assert "-> drop them" in table and table.endswith("1 ok, 1 warning, 1 skipped")
    assert " ".join(FINDINGS[1].found.split()) in " ".join(table.split())


def test_a_warning_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="without advice"):
        Finding("files", WARNING, "odd")
    with pytest.raises(ValueError, match="a verdict is one of"):
        Finding("files", "perhaps", "odd")
