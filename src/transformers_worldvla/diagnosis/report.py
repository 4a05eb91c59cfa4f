"""What a check finds, and all of it as a table. Nothing here knows what is checked."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
VERDICTS = (OK, WARNING, FAILED, SKIPPED)
_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """What one check says.

    Attributes:
        check: its name.
        verdict: `ok`; `warning`, worth a look; `failed`, do not go on; `skipped`, it could not be made.
        found: what was seen, one line.
        advice: what to do about it, one line; empty when it is ok.
        numbers: what was measured.
    """

    check: str
    verdict: str
    found: str
    advice: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"a verdict is one of {', '.join(VERDICTS)}, not {self.verdict!r}")
        if self.verdict in (WARNING, FAILED) and not self.advice:
            raise ValueError(f"the check {self.check!r} says {self.verdict} without advice")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "check": self.check,
            "verdict": self.verdict,
            "found": self.found,
            "advice": self.advice,
            "numbers": dict(self.numbers),
        }


@dataclass
class Diagnosis:
    """The findings of all checks, in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, check: str) -> Finding:
        """The finding of a check. Raises KeyError when it was not made."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings have each verdict."""
        return {verdict: sum(each.verdict == verdict for each in self.findings) for verdict in VERDICTS}

    @property
    def has_failed(self) -> bool:
        """Whether any check failed."""
        return any(finding.verdict == FAILED for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"counts": self.counts, "checks": [finding.to_dict() for finding in self.findings]}

    def __str__(self) -> str:
        """A row a check, what to do below it, and the counts."""
        if not self.findings:
            return "nothing was checked"
        name, verdict = (
            max(len(getattr(finding, column)) for finding in self.findings) for column in ("check", "verdict")
        )
        indent = " " * (name + verdict + 4)
        lines = []
        for each in self.findings:
            head = f"{each.check:<{name}}  {each.verdict:<{verdict}}  "
            lines += textwrap.wrap(head + each.found, _WIDTH, subsequent_indent=indent, break_long_words=False)
            if each.advice:
                lines += textwrap.wrap(
                    f"{indent}-> {each.advice}", _WIDTH, subsequent_indent=f"{indent}   ", break_long_words=False
                )
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items() if count)
        return "\n".join([*lines, "", counts])
