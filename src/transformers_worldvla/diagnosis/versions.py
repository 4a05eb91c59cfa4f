"""Versions of packages that are known to give wrong results, with the reason, and those that were never tried.

A package that is not installed is no finding: what needs it says so itself.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ..evaluation.rendering import PINNED_MUJOCO, package_version
from .report import FAILED, OK, WARNING, Finding

PACKAGE = "transformers_worldvla"


@dataclass(frozen=True)
class KnownIssue:
    """Versions of a package with which something goes wrong in a simulator.

    `simulators`: where it matters. Elsewhere it is a warning.
    """

    package: str
    versions: str  # a PEP 440 specifier
    verdict: str
    reason: str
    advice: str
    simulators: tuple[str, ...]


_PIN = f"pip install mujoco=={PINNED_MUJOCO}"
KNOWN_ISSUES = (
    KnownIssue(
        "mujoco",
        ">=3.3.3",
        FAILED,
        "draws LIBERO-Object darker (success 88 -> 69 % and 98 -> 91 % with the same weights: LIBERO#88, openvla#335); "
        "from 3.3.7 on objects of LIBERO-10 fall through the table",
        _PIN,
        ("libero",),
    ),
    KnownIssue(
        "mujoco",
        f"!={PINNED_MUJOCO},<3.3.3",
        WARNING,
        f"is not the {PINNED_MUJOCO} that results are made with; it was not compared",
        _PIN,
        ("libero", "metaworld"),
    ),
    KnownIssue(
        "mujoco",
        ">=3.3.3",
        WARNING,
        f"is not the {PINNED_MUJOCO} that Meta-World requires",
        _PIN,
        ("metaworld",),
    ),
    KnownIssue(
        "robosuite",
        "!=1.4.0",
        FAILED,
        "is not the 1.4.0 that LIBERO is written for: 1.5 has other controllers and names",
        "pip install robosuite==1.4.0",
        ("libero",),
    ),
)


def check_versions(
    simulator: str | None = None,
    written_by: str | None = None,
    find: Callable[[str], str | None] = package_version,
) -> Finding:
    """Installed versions against what this library declares to need, the known issues, and the checkpoint's writer.

    Args:
        simulator: `libero` or `metaworld`; without it their issues are warnings.
        written_by: version of this library in the checkpoint (`config.generator_version`).
        find: name of a package -> installed version, None without it.
    """
    installed = {name: found for name in sorted(_requirements()) if (found := find(name)) is not None}
    problems = [*_outside_requirements(installed), *_known_issues(simulator, find), *_newer_writer(written_by)]
    problems.sort(key=lambda problem: problem[0] != FAILED)
    if not problems:
        shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers") if name in installed)
        return Finding("versions", OK, f"{shown}: no known problem", numbers=installed)
    verdict = problems[0][0]
    return Finding(
        "versions",
        verdict,
        "; ".join(found for _, found, _ in problems),
        "; ".join(dict.fromkeys(advice for *_, advice in problems)),
        installed,
    )


def _requirements() -> Mapping[str, SpecifierSet]:
    """Package -> versions, of this library and all its extras, as its own metadata says."""
    try:
        lines = distribution(PACKAGE).requires or []
    except PackageNotFoundError:  # run from a source tree
        return {}
    found: dict[str, SpecifierSet] = {}
    for line in lines:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != PACKAGE.replace("_", "-") and "extra" not in str(requirement.marker or ""):
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def _outside_requirements(installed: Mapping[str, str]) -> list[tuple[str, str, str]]:
    wanted = _requirements()
    return [
        (FAILED, f"{name} {version} is outside {wanted[name]}", f'pip install "{name}{wanted[name]}"')
        for name, version in installed.items()
        if not _matches(version, wanted[name])
    ]


def _known_issues(simulator: str | None, find: Callable[[str], str | None]) -> list[tuple[str, str, str]]:
    found = []
    for issue in KNOWN_ISSUES:
        version = find(issue.package)
        if version is None or not _matches(version, SpecifierSet(issue.versions)):
            continue
        if simulator in issue.simulators:
            found.append((issue.verdict, f"{issue.package} {version} {issue.reason}", issue.advice))
        elif simulator is None and issue.verdict == FAILED:
            found.append((WARNING, f"{issue.package} {version} {issue.reason}", issue.advice))
    return found


def _newer_writer(written_by: str | None) -> list[tuple[str, str, str]]:
    from .. import __version__

    try:
        is_newer = written_by is not None and Version(written_by) > Version(__version__)
    except InvalidVersion:
        is_newer = True
    if not is_newer:
        return []
    found = f"the checkpoint was written by {PACKAGE} {written_by}, newer than this {__version__}"
    return [(WARNING, found, f"pip install --upgrade {PACKAGE}")]


def _matches(version: str, versions: SpecifierSet) -> bool:
    return bool(versions.contains(version, prereleases=True))


def version_table() -> dict[str, Any]:
    """Installed versions of what this library declares to need."""
    return {name: package_version(name) for name in sorted(_requirements())}
