"""The result of a closed-loop evaluation: a folder that grows by an episode at a time and can be taken up again.

`episodes.jsonl` has one JSON object a line, an episode each, and nothing that depends on time or on the order in which
episodes ended: two runs with the same settings end with the same bytes. `run.json` holds the settings that the numbers
depend on; a folder takes no episodes of other settings.

A row: `suite`, `task` (0-based, official order), `trial` (number of the official initial state), `success` (null when
the episode crashed, with `error`), `steps` (settle steps not counted), `instruction`, `seed`, `episode_seed`, `model`,
and what else the run says about itself (`versions`, `renderer`, `checkpoint` ...).
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..durable import append_line, write_json, write_whole
from .statistics import mcnemar_exact, wilson_interval

EPISODES_FILE, SETTINGS_FILE = "episodes.jsonl", "run.json"
Key: TypeAlias = tuple[str, int, int]


def episode_key(row: Mapping[str, Any]) -> Key:
    """What identifies an episode: suite, task, trial."""
    return row["suite"], row["task"], row["trial"]


class ResultFolder:
    """A folder with the episodes of one run.

    Args:
        folder: made when it is not there.
        settings: all that the outcome of an episode depends on besides suite, task and trial.

    Raises:
        ValueError: the folder holds episodes of other settings; nothing is changed then.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.episodes_file = folder / EPISODES_FILE
        settings_file = folder / SETTINGS_FILE
        settings = json.loads(json.dumps(settings))
        if settings_file.is_file():
            _check_settings(folder, _read_settings(settings_file), settings)
        elif self.episodes_file.exists():
            raise ValueError(f"{folder} has an {EPISODES_FILE} without {SETTINGS_FILE}: choose another --output")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(settings_file, settings)
        self.rows = {episode_key(row): row for row in _read_rows(self.episodes_file, torn=True)}
        self.finish()  # a line that a killed run left torn goes

    def is_done(self, key: Key) -> bool:
        """Whether the episode ended; one that crashed is tried again."""
        return key in self.rows and self.rows[key]["success"] is not None

    def add(self, row: dict[str, Any]) -> None:
        """Keep an episode, on disk when this returns."""
        self.rows[episode_key(row)] = row
        append_line(self.episodes_file, _line(row))

    def finish(self) -> None:
        """Put the rows into their order: by suite, task and trial."""
        write_whole(self.episodes_file, "".join(_line(self.rows[key]) for key in sorted(self.rows)))


def read_episodes(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a result folder, of an `episodes.jsonl`, or of one that is gzipped; in order.

    Raises ValueError that names the file when it holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (EPISODES_FILE, f"{EPISODES_FILE}.gz") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has no {EPISODES_FILE}: give a folder that `worldvla evaluate` wrote")
        path = found[0]
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    rows = {episode_key(row): row for row in _read_rows(path)}
    return [rows[key] for key in sorted(rows)]


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Success rates with Wilson intervals of each task, each suite and all: `{"suites": ..., "average": ...}`.

    The average's rate is the mean of the suites' rates, as the field reports it; its interval is that of all episodes
    together, which is the same where suites have equally many. Crashed episodes are counted and take part in no rate.
    """
    groups: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(row["suite"], {}).setdefault(row["task"], []).append(row)
    suites = {}
    for suite, tasks in sorted(groups.items()):
        of_tasks = {
            str(task): {"instruction": members[0].get("instruction"), **rate(members)}
            for task, members in sorted(tasks.items())
        }
        suites[suite] = {**rate([row for members in tasks.values() for row in members]), "tasks": of_tasks}
    everything = [row for tasks in groups.values() for members in tasks.values() for row in members]
    average = rate(everything)
    rates = [suite["success_rate"] for suite in suites.values() if suite["success_rate"] is not None]
    average["success_rate"] = sum(rates) / len(rates) if rates else None
    return {"suites": suites, "average": average}


def rate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`success_rate` (None without an episode that ended), its 95 % `interval`, `successes`, `episodes`, `crashed`, and
    `mean_steps` of the successes."""
    ended = [row for row in rows if row["success"] is not None]
    won = [row for row in ended if row["success"]]
    return {
        "success_rate": len(won) / len(ended) if ended else None,
        "interval": list(wilson_interval(len(won), len(ended))),
        "successes": len(won),
        "episodes": len(ended),
        "crashed": len(rows) - len(ended),
        "mean_steps": sum(row["steps"] for row in won) / len(won) if won else None,
    }


def pair_episodes(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The episodes of two results that began alike (suite, task, trial) and ended in both, in order.

    Raises ValueError where the two were run with different seeds: fixtures then stood elsewhere.
    """
    left, right = ({episode_key(row): row for row in rows} for rows in (first, second))
    shared = sorted(left.keys() & right.keys())
    for key in shared:
        if left[key]["episode_seed"] != right[key]["episode_seed"]:
            raise ValueError("the two were run with different --seed: they have no pairs")
    pairs = [(left[key], right[key]) for key in shared]
    return [(one, other) for one, other in pairs if one["success"] is not None and other["success"] is not None]


def compare_pairs(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Counts of at least one pair of episodes that ended, both rates, and McNemar's exact p value."""
    outcomes = [(one["success"], other["success"]) for one, other in pairs]
    only_first, only_second = outcomes.count((True, False)), outcomes.count((False, True))
    return {
        "pairs": len(pairs),
        "rates": [rate([one for one, _ in pairs]), rate([other for _, other in pairs])],
        "difference": (only_second - only_first) / len(pairs),
        "both": outcomes.count((True, True)),
        "only_first": only_first,
        "only_second": only_second,
        "neither": outcomes.count((False, False)),
        "p_value": mcnemar_exact(only_first, only_second),
    }


def format_rate(numbers: Mapping[str, Any]) -> str:
    """A rate for people: `70.0 % [48.1, 85.5] (14 of 20, 1 crashed)`."""
    crashed = f", {numbers['crashed']} crashed" if numbers["crashed"] else ""
    if numbers["success_rate"] is None:
        return f"no episode ended{crashed}"
    low, high = (100 * bound for bound in numbers["interval"])
    counts = f"{numbers['successes']} of {numbers['episodes']}{crashed}"
    return f"{100 * numbers['success_rate']:.1f} % [{low:.1f}, {high:.1f}] ({counts})"


def format_summary(summary: Mapping[str, Any]) -> str:
    """The rates of `summarize` as lines of text."""
    lines = []
    for suite, numbers in summary["suites"].items():
        lines.append(f"{suite}: {format_rate(numbers)}")
        for task, of_task in numbers["tasks"].items():
            steps = "" if of_task["mean_steps"] is None else f", {of_task['mean_steps']:.0f} steps"
            lines.append(f"  {task:>2}  {format_rate(of_task)}{steps}  {of_task['instruction']}")
    if len(summary["suites"]) > 1:
        lines.append(f"average of suites: {format_rate(summary['average'])}")
    return "\n".join(lines)


# -------------------------------------------------------------------- files


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _read_rows(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The rows in a file; with `torn` a last line without its end is left out instead of refused."""
    if not path.is_file():
        return []
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8", errors="ignore" if torn else "strict")
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lines = text.split("\n")
    if torn:
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            suite, task, trial = episode_key(row)
            if not isinstance(suite, str) or type(task) is not int or type(trial) is not int:
                raise TypeError("suite, task and trial")
            if row["success"] not in (True, False, None):
                raise TypeError("success")
            if row["success"] and not isinstance(row["steps"], int | float):
                raise TypeError("steps")
            _line(row).encode()  # refuses NaN, infinities and lone surrogates, which could not be written again
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no episode: {error}") from error
        rows.append(row)
    return rows


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}: choose another --output") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: choose another --output")
    return settings


def _check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            then, now = (repr(settings.get(name))[:100] for settings in (old, new))
            label = " ".join(name.split())[:40]
            raise ValueError(
                f"{folder} holds episodes of another run ({label} was {then}, is now {now}): choose another --output"
            )
