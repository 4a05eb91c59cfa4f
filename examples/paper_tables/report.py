"""Writes the document of the tables from what is in the store: measured beside the paper's, and what was not run.

Every number comes from a result file through the library's own statistics; a row without one says "not run".
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rows import HORIZONS, SUITES, TABLES, Row, Table
from store import Store

from transformers_worldvla.evaluation.results import compare_pairs, format_rate, pair_episodes, rate

NOT_RUN, UNTOLD = "not run", "-"
METRICS = {"psnr": ("PSNR, dB", 1), "ssim": ("SSIM, %", 100), "lpips": ("LPIPS, %", 100), "fvd": ("FVD", 1)}
BASELINES = {"copy_last_frame": "first frame, repeated", "reconstruction_ceiling": "image tokenizer alone (ceiling)"}


def write_report(store: Store) -> str:
    """The document, in Markdown."""
    return "\n\n".join([_introduction(store), *(_section(store, table) for table in TABLES)]) + "\n"


def _introduction(store: Store) -> str:
    budget = store.budget
    steps = f"{budget.steps} optimizer steps of {budget.batch_size} samples, learning rate {budget.learning_rate:g}"
    limit = "" if budget.max_steps is None else f", stopped after {budget.max_steps} steps"
    lines = [
        "# The paper's tables, small",
        "",
        "Written by `examples/paper_tables/reproduce.py --report`; not edited by hand. What the paper asks of a 7B "
        "model is asked here of a small one with the same grammar, losses and masks: **whether the differences have "
        "the same sign, not whether the numbers are the same**.",
        "",
        f"- A row: {steps}, seed {budget.seed}, from random weights; then LIBERO-{SUITES[budget.suite]}, "
        f"tasks {budget.tasks}, {_describe_trials(budget.trials)} of each task{limit}. "
        f"Demonstrations: {_describe_data(store)}.",
        f"- Run so far: {_count_done(store)}.",
        "- Intervals are Wilson's, 95 %. Comparisons are paired by initial state, with McNemar's exact test and no "
        "correction for their number: of twenty comparisons of equals one has p < 0.05.",
        "- The paper's success rates: 50 episodes a task, one training run, no interval given.",
        "",
        "What differs from the paper in every row: a small decoder from random weights in place of Chameleon 7B (of "
        "`worldvla-libero-tiny`: 3 million weights); its image tokenizer of 1024 codes, trained on LIBERO frames; "
        "pictures of 128 px, not 256; demonstrations of a scripted expert, not of people, with all their steps; one "
        "suite; alpha = 1, not 0.04, and predicted codes that differ from the frame before weigh "
        f"{budget.moved_weight:g} times as much as others; not all of the fifty official initial states.",
    ]
    return "\n".join(lines)


def _describe_data(store: Store) -> str:
    """What was trained on, by the tokens that are there; by its name before there are any."""
    from transformers_worldvla.data.cache import HEADER, FrameTokenCache

    for px in (128, 256):
        if (store.cache(px) / HEADER).is_file():
            cache = FrameTokenCache(store.cache(px))
            rows = cache.table(columns=["episode_index", "instruction"])
            told = dict(zip(rows["episode_index"].to_pylist(), rows["instruction"].to_pylist(), strict=True))
            chosen = [text for text in told.values() if text in (store.budget.instructions or told.values())]
            return f"{len(chosen)} episodes of {len(set(chosen))} tasks"
    name = store.budget.dataset
    return "not chosen yet" if name is None else f"`{name.rstrip('/').rsplit('/', 1)[-1]}`"


def _describe_trials(trials: str) -> str:
    return f"the first {trials} official initial states" if trials.isdecimal() else f"official initial states {trials}"


def _count_done(store: Store) -> str:
    rows = [row for table in TABLES for row in table.rows]
    trainings = {store.name(row.training): row.training for row in rows}
    trained = sum(store.is_trained(training) for training in trainings.values())
    measured = sum(is_measured(store, row) for row in rows)
    return f"{trained} of {len(trainings)} trainings, {measured} of {len(rows)} rows measured in part or whole"


def is_measured(store: Store, row: Row) -> bool:
    """Whether anything of a row was measured."""
    training = row.training
    found = {
        "success": bool(store.episodes(training)),
        "speed": store.name(training) in store.speeds(),
        "frames": store.imagined(training) is not None,
    }
    return any(found[measure] for measure in row.measures)


def _section(store: Store, table: Table) -> str:
    parts = [f"## {table.title}"]
    if "frames" in table.rows[0].measures:
        parts += [_frames_table(store, table), _frames_comparisons(store, table)]
    else:
        parts += [_success_table(store, table), _success_comparisons(store, table)]
    return "\n\n".join([*parts, table.notes])


# -------------------------------------------------------------------- success in the simulator


def _success_table(store: Store, table: Table) -> str:
    suite, with_speed = store.budget.suite, "speed" in table.rows[0].measures
    header = ["row", "success [95 %]", "paper"]
    lines = []
    for row in table.rows:
        episodes = store.episodes(row.training)
        cells = [f"{row.label} (`{row.name}`)", format_rate(rate(episodes)) if episodes else NOT_RUN]
        cells.append(_percent(row.paper.get("success", {}).get(suite)))
        if with_speed:
            found = store.speeds().get(store.name(row.training))
            cells += [NOT_RUN if found is None else f"{found['actions_per_second']:.2f}", f"{row.paper['speed']:.2f}"]
        lines.append(cells)
    return _markdown([*header, "actions/s", "paper"] if with_speed else header, lines)


def _success_comparisons(store: Store, table: Table) -> str:
    rows = {row.name: row for row in table.rows}
    lines = []
    for first, second, claim in table.comparisons:
        cells = [f"`{first}` -> `{second}`", claim, _paper_difference(store, rows[first], rows[second])]
        pairs = pair_episodes(store.episodes(rows[first].training), store.episodes(rows[second].training))
        lines.append([*cells, *(_paired_cells(compare_pairs(pairs)) if pairs else [NOT_RUN, "", ""])])
    return _markdown(["A -> B", "the paper says", "its points", "points here", "only A / only B / pairs", "p"], lines)


def _paired_cells(numbers: Mapping[str, Any]) -> list[str]:
    counts = f"{numbers['only_first']} / {numbers['only_second']} / {numbers['pairs']}"
    return [f"{100 * numbers['difference']:+.1f}", counts, f"{numbers['p_value']:.3g}"]


def _paper_difference(store: Store, first: Row, second: Row) -> str:
    numbers = [row.paper.get("success", {}).get(store.budget.suite) for row in (first, second)]
    return UNTOLD if None in numbers else f"{numbers[1] - numbers[0]:+.1f}"


# -------------------------------------------------------------------- imagined frames


def _frames_table(store: Store, table: Table) -> str:
    lines = []
    for horizon in HORIZONS:
        found = {row.name: store.imagined(row.training) for row in table.rows}
        for row in table.rows:
            paper = row.paper["frames"][horizon]
            cells = [f"{row.label} (`{row.name}`)", str(horizon)]
            for metric, (_, factor) in METRICS.items():
                cells += [_frames_cell(found[row.name], horizon, metric, "model", factor), str(paper[metric])]
            lines.append(cells)
        measured = next((summary for summary in found.values() if summary is not None), None)
        for baseline, label in BASELINES.items() if measured else ():
            values = [_frames_cell(measured, horizon, name, baseline, factor) for name, (_, factor) in METRICS.items()]
            lines.append([label, str(horizon), *(cell for value in values for cell in (value, ""))])
    titles = [title for name, _ in METRICS.values() for title in (name, "paper")]
    return _markdown(["row", "frames", *titles], lines)


def _frames_cell(summary: Mapping[str, Any] | None, horizon: int, metric: str, candidate: str, factor: int) -> str:
    """Mean and its standard error over episodes."""
    if summary is None:
        return NOT_RUN
    numbers = summary["horizons"].get(str(horizon), {}).get(metric, {}).get(candidate)
    if numbers is None:
        return UNTOLD
    if metric == "fvd":
        return f"{numbers:.1f}"
    error = numbers["standard_error"]
    return f"{factor * numbers['mean']:.2f}" + ("" if error is None else f" +- {factor * error:.2f}")


def _frames_comparisons(store: Store, table: Table) -> str:
    rows, lines = {row.name: row for row in table.rows}, []
    for first, second, claim in table.comparisons:
        found = [store.imagined(rows[name].training) for name in (first, second)]
        for horizon in HORIZONS:
            paper = [rows[name].paper["frames"][horizon]["psnr"] for name in (first, second)]
            cells = [f"`{first}` -> `{second}`, {horizon} frames", claim, f"{paper[1] - paper[0]:+.2f}"]
            first_rows, second_rows = ([] if summary is None else summary["rows"] for summary in found)
            measured = paired_psnr(first_rows, second_rows, horizon)
            lines.append([*cells, *(measured or (NOT_RUN, ""))])
    return _markdown(["A -> B", "the paper says", "its dB PSNR", "dB PSNR here", "paired episodes"], lines)


def paired_psnr(
    first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], horizon: int
) -> tuple[str, str] | None:
    """Mean of the episodes' differences in PSNR, B - A, with its standard error, and their number; None without any."""
    means = [
        {row["episode"]: np.mean(row["psnr"]["model"]) for row in rows if row["horizon"] == horizon}
        for rows in (first, second)
    ]
    differences = np.array([means[1][episode] - means[0][episode] for episode in sorted(means[0].keys() & means[1])])
    if not len(differences):
        return None
    error = f" +- {differences.std(ddof=1) / np.sqrt(len(differences)):.2f}" if len(differences) > 1 else ""
    return f"{differences.mean():+.2f}{error}", str(len(differences))


# -------------------------------------------------------------------- Markdown


def _percent(value: float | None) -> str:
    return UNTOLD if value is None else f"{value:.1f} %"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
