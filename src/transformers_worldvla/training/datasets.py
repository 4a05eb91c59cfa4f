"""From frame-token caches to the data sets of a run, and the robots of those caches into the processor.

A run may mix several caches, whose robots may differ in D, cameras and ranges. Validation sets are never mixed: each
keeps its own metrics.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from ..action_tokenization_worldvla import Embodiment
from ..data import FrameTokenCache, MixtureDataset, SampleDataset, TokenizedEpisode

VALIDATION = ("val_ind", "val_ood")


@dataclass
class Source:
    """The episodes of one dataset of a run."""

    name: str  # of its metrics
    embodiment: Embodiment
    fingerprint: str
    splits: dict[str, list[TokenizedEpisode]]
    weight: float | None = None

    @classmethod
    def from_cache(cls, cache: FrameTokenCache, weight: float | None = None) -> "Source":
        """All splits of a cache that `verify` has been called on."""
        splits = {name: cache.episodes(name) for name in ("train", *VALIDATION)}
        return cls(cache.embodiment.name, cache.embodiment, cache.fingerprint, splits, weight)

    def choose(self, instructions: Sequence[str]) -> "Source":
        """The episodes whose instruction is one of these, as another dataset: its fingerprint is another one."""
        splits = {
            name: [episode for episode in episodes if episode.instruction in instructions]
            for name, episodes in self.splits.items()
        }
        chosen = json.dumps([self.fingerprint, *sorted(set(instructions))])
        return replace(self, splits=splits, fingerprint=hashlib.sha256(chosen.encode()).hexdigest())


@dataclass(frozen=True)
class SampleOptions:
    """What a sample shows and asks; see `EpisodeSamples`."""

    kinds: Sequence[str] = ("action", "world")
    kind_weights: Mapping[str, float] | None = None
    num_actions: int = 5
    history: int = 2
    world_history: int = 1
    history_dropout: float = 0.0
    seed: int = 0
    max_eval_samples: int | None = field(default=None)


def adopt_embodiments(processor: Any, sources: Sequence[Source]) -> None:
    """Make the sources' robots those of the processor, the first its default.

    Robots that the run does not train on are dropped: the ranges of an action token are what it was last trained with.
    Raises ValueError when two datasets give different robots one name.
    """
    robots: dict[str, Embodiment] = {}
    for source in sources:
        robot = source.embodiment
        if robot.name in robots and not _same_actions(robots[robot.name], robot):
            raise ValueError(
                f"two datasets call their robot {robot.name!r}, but its ranges or cameras differ: "
                "run `worldvla tokenize` for one of them with another --name"
            )
        robots.setdefault(robot.name, robot)
    processor.embodiments = {name: robot.to_dict() for name, robot in robots.items()}
    processor.default_embodiment = next(iter(robots)) if len(robots) > 1 else None


def _same_actions(one: Embodiment, other: Embodiment) -> bool:
    return (one.low, one.high, one.cameras) == (other.low, other.high, other.cameras)


def name_sources(sources: Sequence[Source]) -> None:
    """Number the sources that share a name."""
    names = [source.name for source in sources]
    for index, source in enumerate(sources):
        if names.count(source.name) > 1:
            source.name = f"{source.name}_{names[: index + 1].count(source.name)}"


def training_set(sources: Sequence[Source], options: SampleOptions) -> MixtureDataset:
    """The training episodes of all sources, mixed by their weights; an epoch holds as many samples as they have."""
    weights = None
    if any(source.weight is not None for source in sources):
        weights = [1.0 if source.weight is None else source.weight for source in sources]
    datasets = [_samples(source.splits["train"], options) for source in sources]
    return MixtureDataset(datasets, weights, options.seed, options.kind_weights)


def validation_sets(sources: Sequence[Source], options: SampleOptions) -> dict[str, Dataset]:
    """`val_ind` and `val_ood` where they have episodes; with several sources `<name>_val_ind`, ...

    At most `max_eval_samples` of each, evenly spaced, so that every evaluation sees the same ones.
    """
    name_sources(sources)
    sets: dict[str, Dataset] = {}
    for source in sources:
        for split in VALIDATION:
            samples = _samples(source.splits[split], options, history_dropout=0.0)
            if len(samples):
                count = min(len(samples), options.max_eval_samples or len(samples))
                chosen = np.linspace(0, len(samples) - 1, count).round().astype(int).tolist()
                sets[f"{source.name}_{split}" if len(sources) > 1 else split] = Subset(samples, chosen)
    return sets


def _samples(episodes: Sequence[TokenizedEpisode], options: SampleOptions, **changed: Any) -> SampleDataset:
    names = ("num_actions", "history", "world_history", "history_dropout", "seed")
    arguments = {name: getattr(options, name) for name in names} | changed
    return SampleDataset(episodes, kinds=options.kinds, **arguments)
