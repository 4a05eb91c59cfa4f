"""Measures imagined rollouts against recorded episodes: PSNR, SSIM, LPIPS and FVD, beside the baselines.

Clips begin at recorded frames, lie end to end in an episode and follow its recorded actions, `horizon` steps each; the
generated frame of a step is fed back into the next (`feedback="pixels"`: decoded to a picture and tokenized again, as
the evaluation of RynnVLA-002 does, but without its lossy mp4 in between). Every clip is measured three times: imagined
(`model`), the first frame repeated (`copy_last_frame`) and the recorded frames through the image tokenizer
(`reconstruction_ceiling`), which no imagined frame can pass by much.

`WorldModelResults` is the folder that grows by an episode at a time and can be taken up again.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.episodes import Episode
from ..durable import append_line, write_json, write_whole
from .metrics import psnr
from .open_loop import Recording, read_recording, roll_out, rollout_candidates, rollout_starts
from .open_loop_pictures import draw_rollout_gif
from .perceptual import I3DFeatures, Lpips, fvd, fvd_name, ssim
from .results import EPISODES_FILE, SETTINGS_FILE

CANDIDATES = ("model", "copy_last_frame", "reconstruction_ceiling")
SUMMARY_FILE, FEATURES_FOLDER = "summary.json", "features"
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (..., H, W, 3) twice -> (...)


@dataclass(frozen=True)
class Protocol:
    """What a number depends on besides the model and the episodes."""

    horizons: tuple[int, ...] = (10, 50)
    feedback: str = "pixels"
    num_history: int = 1
    clips: int | None = None  # of an episode, at most, spread over it; all by default
    batch_size: int = 16  # clips imagined at once: the last bits of their logits depend on it


@dataclass(frozen=True)
class Instruments:
    """The metrics that can be computed here; `missing` says why others cannot."""

    metrics: Mapping[str, Metric]
    features: I3DFeatures | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


def find_instruments(weights: str | Path | None = None, device: Any = "cpu") -> Instruments:
    """PSNR and SSIM always; LPIPS and FVD where their networks can be had (`weights`: a folder that holds them).

    Raises ImportError without torchmetrics.
    """
    metrics: dict[str, Metric] = {"psnr": psnr, "ssim": ssim}
    features, missing = None, {}
    try:
        metrics["lpips"] = Lpips.from_weights(weights, device).measure
    except OSError as error:
        missing["lpips"] = str(error)
    try:
        features = I3DFeatures(weights, device)
    except OSError as error:
        missing["fvd"] = str(error)
    return Instruments(metrics, features, missing)


# -------------------------------------------------------------------- measuring one episode


def clip_starts(length: int, horizon: int, clips: int | None = None) -> list[int]:
    """Steps at which the clips of an episode begin: end to end, or `clips` of these spread evenly. May be empty."""
    if length <= horizon:
        return []
    starts = rollout_starts(length, horizon)
    if clips is not None and clips < len(starts):
        starts = [starts[round(index)] for index in np.linspace(0, len(starts) - 1, clips)]
    return starts


def measure_episode(
    model: Any,
    processor: Any,
    recording: Recording,
    horizon: int,
    protocol: Protocol,
    instruments: Instruments,
    progress: bool = False,
    **generate_kwargs: Any,
) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """Imagine the clips of one episode and compare them.

    Returns the row (`starts` and, a metric and candidate, one number a clip and frame ahead, mean of the cameras), the
    imagined clips (S, horizon, C, H, W, 3), and the I3D features of each candidate and of what was `recorded`, cameras
    as clips of their own (S * C, D); these are empty without I3D. Raises ValueError for an episode without a clip.
    """
    starts = clip_starts(len(recording), horizon, protocol.clips)
    if not starts:
        raise ValueError(f"an episode of {len(recording)} steps has no clip of {horizon} steps")
    imagined = roll_out(
        model,
        processor,
        recording,
        starts,
        horizon,
        num_history=protocol.num_history,
        feedback=protocol.feedback,
        batch_size=protocol.batch_size,
        progress=progress,
        **generate_kwargs,
    )
    target, candidates = rollout_candidates(recording, starts, imagined)
    row: dict[str, Any] = {
        "episode": recording.index,
        "horizon": horizon,
        "instruction": recording.instruction,
        "starts": starts,
    }
    for name, metric in instruments.metrics.items():
        values = {key: metric(candidates[key], target).mean(-1) for key in CANDIDATES}  # (S, horizon)
        row[name] = {key: np.round(value, 5).tolist() for key, value in values.items()}
    features = {}
    if instruments.features is not None:
        features = {name: instruments.features(_clips(value)) for name, value in candidates.items()}
        features["recorded"] = instruments.features(_clips(target))
    return row, imagined, features


def _clips(frames: np.ndarray) -> np.ndarray:
    """Rollouts (S, T, C, H, W, 3) as clips of one camera: (S * C, T, H, W, 3)."""
    return np.moveaxis(frames, 2, 1).reshape(-1, frames.shape[1], *frames.shape[3:])


# -------------------------------------------------------------------- all episodes


class WorldModelResults:
    """A folder with the measurements of one run: `episodes.jsonl`, a row an episode and horizon, and `run.json`.

    Raises ValueError when the folder holds rows of other settings; nothing is changed then.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self._file = folder, folder / EPISODES_FILE
        wanted = json.loads(json.dumps(settings))
        settings_file = folder / SETTINGS_FILE
        if settings_file.is_file():
            found = json.loads(settings_file.read_text(encoding="utf-8"))
            differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
            if differing:
                raise ValueError(f"{folder} holds another run, its {differing[0]} differs: choose another --output")
        elif self._file.exists():
            raise ValueError(f"{folder} has an {EPISODES_FILE} without {SETTINGS_FILE}: choose another --output")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(settings_file, wanted)
        self.rows: dict[tuple[int, int], dict[str, Any]] = {}
        if self._file.exists():
            complete = self._file.read_text(encoding="utf-8").split("\n")[:-1]  # a killed run may leave a torn line
            self.rows = {(row["episode"], row["horizon"]): row for row in map(json.loads, complete)}
            self.finish()

    def is_done(self, episode: int, horizon: int) -> bool:
        return (episode, horizon) in self.rows

    def add(self, row: dict[str, Any], features: Mapping[str, np.ndarray]) -> None:
        """Keep a row, on disk when this returns; its features first, so that a row which is there has them."""
        if features:
            path = self._features(row["episode"], row["horizon"])
            path.parent.mkdir(exist_ok=True)
            with path.with_suffix(".partial").open("wb") as file:
                np.savez(file, **dict(features))  # type: ignore[arg-type]
            path.with_suffix(".partial").replace(path)
        self.rows[row["episode"], row["horizon"]] = row
        append_line(self._file, json.dumps(row) + "\n")

    def finish(self) -> None:
        """Put the rows into their order."""
        write_whole(self._file, "".join(json.dumps(self.rows[key]) + "\n" for key in sorted(self.rows)))

    def features(self, horizon: int) -> dict[str, np.ndarray] | None:
        """I3D features (N, D) of each candidate over all episodes; None without them."""
        paths = [self._features(*key) for key in sorted(self.rows) if key[1] == horizon]
        if not paths or not all(path.is_file() for path in paths):
            return None
        archives = [np.load(path, allow_pickle=False) for path in paths]
        return {name: np.concatenate([archive[name] for archive in archives]) for name in archives[0].files}

    def _features(self, episode: int, horizon: int) -> Path:
        return self.folder / FEATURES_FOLDER / f"episode_{episode:06d}_h{horizon}.npz"


def evaluate_world_model(
    model: Any,
    processor: Any,
    episodes: Sequence[Episode],
    output: str | Path,
    protocol: Protocol,
    instruments: Instruments,
    *,
    settings: Mapping[str, Any] | None = None,
    embodiment: str | None = None,
    gifs: int = 0,
    progress: bool = False,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Measure a world model on recorded episodes; run again with the same settings, it goes on.

    Args:
        output: folder for rows, features, GIFs and `summary.json`.
        settings: what else the numbers depend on (checkpoint, dataset); a folder takes no rows of other settings.
        gifs: of so many episodes, the first clip of every horizon.

    Returns what `summary.json` holds; see `summarize`. Raises ValueError when no episode is as long as a horizon.
    """
    everything = {**(settings or {}), **asdict(protocol), "metrics": sorted(instruments.metrics)}
    results = WorldModelResults(Path(output), {**everything, "fvd": instruments.features is not None})
    fps = processor.get_embodiment(embodiment).control_hz or 10.0
    for position, episode in enumerate(episodes):
        todo = [
            horizon
            for horizon in protocol.horizons
            if len(episode) > horizon and not results.is_done(episode.index, horizon)
        ]
        if not todo:
            continue
        recording = read_recording(model, processor, episode, embodiment, batch_size=protocol.batch_size)
        for horizon in todo:
            row, imagined, features = measure_episode(
                model, processor, recording, horizon, protocol, instruments, progress, **generate_kwargs
            )
            if position < gifs:
                path = results.folder / f"episode_{episode.index:06d}_h{horizon}.gif"
                draw_rollout_gif(recording, row["starts"][0], imagined[0], path, fps)
            results.add(row, features)
    results.finish()
    wanted = {(episode.index, horizon) for episode in episodes for horizon in protocol.horizons}
    rows = [results.rows[key] for key in sorted(wanted & results.rows.keys())]
    if not rows:
        longest = max((len(episode) for episode in episodes), default=0)
        raise ValueError(f"no episode has a clip: the longest has {longest} steps, horizons are {protocol.horizons}")
    summary = {**summarize(rows), "missing": dict(instruments.missing)}
    for horizon, numbers in summary["horizons"].items():
        if (found := results.features(int(horizon))) is not None:
            numbers["fvd"] = summarize_fvd(found, int(horizon))
    write_whole(results.folder / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def summarize(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Pool episodes: `{"episodes": n, "horizons": {"10": {"episodes", "clips", "psnr": {"model": ..., ...}, ...}}}`.

    A metric and candidate has its `mean` over all clips and frames, the `standard_error` of that from the means of
    episodes (None with a single one), and the `curve`, the mean at every step ahead.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["horizon"], []).append(row)
    horizons: dict[str, Any] = {}
    for horizon, members in sorted(groups.items()):
        numbers: dict[str, Any] = {"episodes": len(members), "clips": sum(len(row["starts"]) for row in members)}
        for metric in (name for name in ("psnr", "ssim", "lpips") if name in members[0]):
            numbers[metric] = {name: _pool([row[metric][name] for row in members]) for name in CANDIDATES}
        horizons[str(horizon)] = numbers
    episodes = {row["episode"] for members in groups.values() for row in members}
    return {"episodes": len(episodes), "horizons": horizons}


def _pool(episodes: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Numbers of several episodes, one a clip and step: mean, its standard error and the curve."""
    clips = np.concatenate([np.asarray(values, np.float64) for values in episodes])  # (clips, horizon)
    means = np.array([np.mean(values) for values in episodes])
    error = None if len(means) < 2 else float(means.std(ddof=1) / np.sqrt(len(means)))
    return {"mean": float(clips.mean()), "standard_error": error, "curve": clips.mean(0).tolist()}


def summarize_fvd(features: Mapping[str, np.ndarray], horizon: int) -> dict[str, Any]:
    """FVD of each candidate under the name of its protocol; null with the reason where there are too few clips."""
    recorded = features["recorded"]
    found: dict[str, Any] = {"protocol": fvd_name(len(recorded), horizon), "clips": len(recorded)}
    for name in CANDIDATES:
        found[name], found["warning"] = fvd(features[name], recorded)
    return found


def format_summary(summary: Mapping[str, Any]) -> str:
    """The means for people, a table a horizon."""
    names = {"model": "imagined", "copy_last_frame": "copy last frame", "reconstruction_ceiling": "tokenizer's ceiling"}
    lines = []
    for horizon, numbers in summary["horizons"].items():
        lines.append(f"{horizon} frames ahead, {numbers['clips']} clips of {numbers['episodes']} episodes")
        lines.append(f"  {'':<28}" + "".join(f"{name:>22}" for name in names.values()))
        for metric, title, digits in (("psnr", "PSNR in dB", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS (VGG)", 4)):
            if metric in numbers:
                cells = (_cell(numbers[metric][name], digits) for name in names)
                lines.append(f"  {title:<28}" + "".join(f"{cell:>22}" for cell in cells))
        if "fvd" in numbers:
            cells = ("-" if numbers["fvd"][name] is None else f"{numbers['fvd'][name]:.1f}" for name in names)
            lines.append(f"  {numbers['fvd']['protocol']:<28}" + "".join(f"{cell:>22}" for cell in cells))
            if numbers["fvd"]["warning"]:
                lines.append(f"  {numbers['fvd']['warning']}")
        lines.append("")
    lines += [f"{metric.upper()} was not computed: {reason}" for metric, reason in summary["missing"].items()]
    return "\n".join(lines).rstrip()


def _cell(numbers: Mapping[str, Any], digits: int) -> str:
    error = numbers["standard_error"]
    return f"{numbers['mean']:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")
