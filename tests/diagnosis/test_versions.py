"""Versions known to be bad are named with their reason; those installed here are not."""

import pytest

from transformers_worldvla import __version__
from transformers_worldvla.diagnosis.report import FAILED, OK, WARNING
from transformers_worldvla.diagnosis.versions import check_versions, version_table

INSTALLED = {"torch": "2.13.0", "transformers": "5.23.0", "mujoco": "3.3.0", "robosuite": "1.4.0"}


def test_versions_that_are_known_to_work() -> None:
    finding = check_versions("libero", __version__, INSTALLED.get)
    assert finding.verdict == OK and "transformers 5.23.0" in finding.found


def test_what_is_installed_here_fits_the_requirements() -> None:
    finding = check_versions()
    assert finding.verdict != FAILED
    assert {"torch", "transformers"} <= version_table().keys()


@pytest.mark.parametrize(
    ("simulator", "changes", "verdict", "reason"),
    [
        ("libero", {"mujoco": "3.3.3"}, FAILED, "draws LIBERO-Object darker"),
        ("libero", {"mujoco": "3.9.0"}, FAILED, "fall through the table"),
        ("libero", {"mujoco": "3.3.2"}, WARNING, "it was not compared"),
        ("libero", {"robosuite": "1.5.2"}, FAILED, "other controllers"),
        ("metaworld", {"mujoco": "3.3.7"}, WARNING, "Meta-World requires"),
        (None, {"mujoco": "3.3.7"}, WARNING, "draws LIBERO-Object darker"),
        (None, {"transformers": "5.4.0"}, FAILED, "transformers 5.4.0 is outside"),
        (None, {"transformers": "6.0.0"}, FAILED, "transformers 6.0.0 is outside"),
        (None, {"torch": "2.5.1+cu124"}, FAILED, "torch 2.5.1+cu124 is outside"),
    ],
)
def test_versions_that_are_known_to_be_bad(
    simulator: str | None, changes: dict[str, str], verdict: str, reason: str
) -> None:
    finding = check_versions(simulator, None, (INSTALLED | changes).get)
    assert finding.verdict == verdict and reason in finding.found and "pip install" in finding.advice


def test_a_simulator_that_is_not_asked_about_is_no_failure() -> None:
    finding = check_versions("metaworld", None, (INSTALLED | {"robosuite": "1.5.2"}).get)
    assert finding.verdict == OK


@pytest.mark.parametrize("version", ["999.0", "no version"])
def test_a_checkpoint_of_a_newer_library(version: str) -> None:
    finding = check_versions(None, version, INSTALLED.get)
    assert finding.verdict == WARNING and version in finding.found
