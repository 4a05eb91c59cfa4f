"""All checks of a checkpoint, a dataset and a simulator, in an order in which a failed one saves the later their time.

A check that cannot be made, because one before it failed, is left out or `skipped`; nothing a check meets ends the
diagnosis. Files are checked before anything is loaded, names before weights.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..action_tokenization_worldvla import Embodiment
from ..data.episodes import EpisodeDataset, EpisodeError
from .actions import check_actions
from .cameras import check_cameras, check_picture_shapes, draw_views
from .files import check_folder
from .probes import (
    check_image_tokenizer,
    check_language_sensitivity,
    check_orientation,
    check_picture_sensitivity,
    check_round_trip,
)
from .recording import Moment, invent_moments, read_moments
from .report import FAILED, OK, SKIPPED, Diagnosis, Finding
from .simulators import check_simulator
from .versions import check_versions

BATCH_LIMIT = 4  # moments without a dataset
_TROUBLE = (ValueError, OSError, RuntimeError, ImportError, KeyError, TypeError)


@dataclass
class Patient:
    """What is diagnosed. `dataset` is opened already; `simulator` is `libero`, `metaworld` or None.

    Attributes:
        folder: of the checkpoint or adapter.
        moments: recorded moments that the model is probed with.
        picture: where the picture goes; None for none.
    """

    folder: Path
    dataset: EpisodeDataset | EpisodeError | None = None
    simulator: str | None = None
    embodiment: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "auto"
    moments: int = 8
    picture: Path | None = None


def diagnose(patient: Patient, on_check: Callable[[str], object] | None = None) -> Diagnosis:
    """Make all checks that can be made. `on_check` is called with the name of each group before it is made.

    Raises ValueError for an embodiment that the checkpoint does not have.
    """
    doctor = _Doctor(patient, on_check or (lambda _: None))
    doctor.examine()
    return doctor.diagnosis


class _Doctor:
    def __init__(self, patient: Patient, on_check: Callable[[str], object]):
        self.patient, self.on_check = patient, on_check
        self.diagnosis = Diagnosis()

    def examine(self) -> None:
        patient = self.patient
        self._do("files", lambda: check_folder(patient.folder))
        self._do("versions", lambda: [check_versions(patient.simulator, written_by(patient.folder))])
        processor = self._load("processor", self._load_processor)
        robot = None if processor is None else processor.get_embodiment(patient.embodiment)
        dataset = None
        if patient.dataset is not None and robot is not None:
            dataset = self._examine_dataset(patient.dataset, robot)
        frame = None
        if patient.simulator is not None and robot is not None:
            frame = self._examine_simulator(robot, dataset)
        if self._has_failed("files", "weights", "processor") or processor is None or robot is None:
            self._add(Finding("model", SKIPPED, "not loaded, because its files or processor are not in order"))
            return
        model = self._load("model", self._load_model)
        if model is not None:
            self._examine_model(model, processor, robot, dataset, frame)

    # ---------------------------------------------------------------- parts

    def _examine_dataset(self, dataset: EpisodeDataset | EpisodeError, robot: Embodiment) -> EpisodeDataset | None:
        """Checks without a model; the dataset where pictures and actions of it can be shown to the model."""
        if isinstance(dataset, EpisodeError):
            self._add(Finding("dataset", FAILED, str(dataset), "record or download the file again"))
            return None
        self._add(Finding("dataset", OK, str(dataset)))
        before = len(self.diagnosis.findings)
        self._do("cameras", lambda: [check_cameras(dataset, robot)])
        if not self._has_failed("cameras"):
            self._do("pictures", lambda: [check_picture_shapes(dataset, robot)])
        self._do("actions", lambda: check_actions(dataset, robot, self.patient.folder))
        blocking = {"cameras", "action dimensions", "actions"}
        found = self.diagnosis.findings[before:]
        return None if any(each.check in blocking and each.verdict == FAILED for each in found) else dataset

    def _examine_simulator(self, robot: Embodiment, dataset: EpisodeDataset | None) -> Any:
        frames: list[Any] = [None]

        def check() -> list[Finding]:
            findings, frames[0] = check_simulator(self.patient.simulator or "", robot, dataset)
            return findings

        self._do("simulator", check)
        return frames[0]

    def _examine_model(
        self, model: Any, processor: Any, robot: Embodiment, dataset: EpisodeDataset | None, frame: Any
    ) -> None:
        moments, instructions = self._moments(processor, robot, dataset)
        if not moments:
            return
        self._do("picture sensitivity", lambda: [check_picture_sensitivity(model, processor, robot, moments)])
        self._do(
            "language sensitivity",
            lambda: [check_language_sensitivity(model, processor, robot, moments, instructions)],
        )
        if dataset is not None:
            self._do("orientation", lambda: [check_orientation(model, processor, robot, moments)])
            self._do("image tokenizer", lambda: [self._examine_pictures(model, processor, robot, moments, frame)])
        self._do("round trip", lambda: [check_round_trip(model, processor, robot, moments)])

    def _examine_pictures(
        self, model: Any, processor: Any, robot: Embodiment, moments: list[Moment], frame: Any
    ) -> Finding:
        finding, seen = check_image_tokenizer(model, processor, robot, moments)
        if self.patient.picture is not None:
            title = f"{robot.cameras[0]} of {robot.name}: all must stand upright in the same way"
            draw_views(self.patient.picture, moments[0].images[-robot.num_cameras], seen[0], frame, title)
        return finding

    def _moments(
        self, processor: Any, robot: Embodiment, dataset: EpisodeDataset | None
    ) -> tuple[list[Moment], list[str]]:
        """Moments to probe with, and the instructions of the dataset."""
        shape = processor.history, processor.num_actions
        if dataset is None:
            return invent_moments(robot, *shape, min(self.patient.moments, BATCH_LIMIT)), []
        try:
            moments = read_moments(dataset, robot, *shape, self.patient.moments)
        except ValueError as error:  # too short, or an episode that cannot be read
            self._add(Finding("frames", FAILED, _one_line(error), "record or download the dataset again"))
            return [], []
        return moments, list(dict.fromkeys(episode.instruction for episode in dataset))

    # ---------------------------------------------------------------- loading

    def _load_processor(self) -> Any:
        from ..serving.loading import load_processor

        return load_processor(self.patient.folder)

    def _load_model(self) -> Any:
        from ..serving.loading import load_model

        return load_model(self.patient.folder, None, self.patient.device, self.patient.dtype)

    def _load(self, name: str, load: Callable[[], Any]) -> Any:
        """What `load` gives, or None and a failed check."""
        self.on_check(name)
        try:
            loaded = load()
        except _TROUBLE as error:
            self._add(Finding(name, FAILED, f"cannot be loaded: {_one_line(error)}", "see the checks before this one"))
            return None
        self._add(Finding(name, OK, "loads"))
        return loaded

    # ---------------------------------------------------------------- bookkeeping

    def _do(self, name: str, check: Callable[[], list[Finding]]) -> None:
        """Make a group of checks; what stops it is a finding of its own."""
        self.on_check(name)
        try:
            self.diagnosis.findings += check()
        except _TROUBLE as error:
            advice = "this checkpoint or dataset is damaged in a way that no check names: see the message"
            self._add(Finding(name, FAILED, f"{type(error).__name__}: {_one_line(error)}", advice))

    def _add(self, finding: Finding) -> None:
        self.diagnosis.findings.append(finding)

    def _has_failed(self, *checks: str) -> bool:
        return any(each.check in checks and each.verdict == FAILED for each in self.diagnosis)


def written_by(folder: Path) -> str | None:
    """The version of this library that wrote a checkpoint, where it can be read."""
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("generator_version") if isinstance(document, dict) else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
