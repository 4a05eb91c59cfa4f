"""Several data sets and kinds of sample in chosen shares, as one data set.

Which sample stands at place i of epoch e is a pure function of (seed, e, i). Nothing is drawn twice before all of its
kind in its data set were drawn once, over the epochs too. It knows no pictures, tokens or robots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .samples import KINDS, EpisodeSamples, EpochDataset


@dataclass(frozen=True)
class Stratum:
    """The samples of one kind in one data set, and how many of them an epoch holds."""

    dataset: int
    kind: str
    items: np.ndarray  # (m,) their numbers in the data set
    per_epoch: int


class MixtureDataset(EpochDataset):
    """Samples of several data sets, whose robots may differ, in the given shares.

    Args:
        datasets: at least one; each has a number of samples of its own.
        weights: share of each data set in an epoch, any numbers >= 0; None: as many as it has samples.
        kind_weights: share of each kind, such as `{"action": 2, "world": 1}`; a kind that is not named is left out,
            and a data set that lacks one shares out the rest. None: as many as there are, which is the authors' ratio
            (about 1 : 1, T - K + 1 action and T - 1 world samples of an episode of T steps).
        seed: >= 0.
        samples_per_epoch: by default all samples of the data sets together. Without weights an epoch then holds each
            of them once.

    Read in order (`TrainingArguments(train_sampling_strategy="sequential")`) every stretch of an epoch has nearly the
    exact shares; a sampler that shuffles keeps them over the epoch. A sample that comes again, in one epoch or a later
    one, is augmented anew.
    """

    def __init__(
        self,
        datasets: Sequence[EpisodeSamples],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        kind_weights: Mapping[str, float] | None = None,
        samples_per_epoch: int | None = None,
    ):
        super().__init__()
        if not datasets:
            raise ValueError("a mixture needs at least one data set")
        sizes = [len(dataset) for dataset in datasets]
        if weights is not None and len(weights) != len(datasets):
            raise ValueError(f"weights are one number for each of the {len(datasets)} data sets, not {len(weights)}")
        if kind_weights is not None and (unknown := sorted(set(kind_weights) - set(KINDS))):
            raise ValueError(f"sample kinds are {', '.join(KINDS)}, not {unknown[0]}")
        _check_weights("weights", dict(enumerate(weights or [1.0])))
        _check_weights("kind_weights", kind_weights or {"any": 1.0})
        self.datasets, self.seed = list(datasets), seed
        self._length = sum(sizes) if samples_per_epoch is None else samples_per_epoch
        if self._length < 1:
            raise ValueError("the data sets hold no sample: the episodes are shorter than num_actions and history")
        self.strata = self._stratify(sizes if weights is None else weights, kind_weights)
        self._table: tuple[int, np.ndarray] = (-1, np.zeros((0, 3), dtype=np.int64))

    def _stratify(self, weights: Sequence[float], kind_weights: Mapping[str, float] | None) -> list[Stratum]:
        """Split an epoch among (data set, kind)."""
        cells = []
        for number, dataset in enumerate(self.datasets):
            if not weights[number]:
                continue
            found = {kind: dataset.items_of(kind) for kind in dict.fromkeys(dataset.kinds)}
            found = {kind: items for kind, items in found.items() if len(items)}
            shares = {kind: len(items) if kind_weights is None else kind_weights.get(kind, 0.0) for kind, items in
                      found.items()}  # fmt: skip
            total = sum(shares.values())
            if not total:
                raise ValueError(
                    f"data set {number} has a weight but no sample to draw: it holds {', '.join(found) or 'none'}"
                )
            cells += [(number, kind, found[kind], weights[number] * share / total) for kind, share in shares.items()]
        counts = apportion([cell[3] for cell in cells], self._length)
        return [
            Stratum(number, kind, items, count)
            for (number, kind, items, _), count in zip(cells, counts, strict=True)
            if count
        ]

    @property
    def shares(self) -> dict[tuple[int, str], float]:
        """(data set, kind) -> share of an epoch's samples."""
        return {(stratum.dataset, stratum.kind): stratum.per_epoch / len(self) for stratum in self.strata}

    def __len__(self) -> int:
        return self._length

    def locate(self, item: int, epoch: int) -> tuple[int, int, int]:
        """Data set, number of the sample in it, and how many times all of its kind there came before."""
        if not 0 <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        if self._table[0] != epoch:
            self._table = (epoch, self._lay_out(epoch))
        dataset, number, turn = self._table[1][item].tolist()
        return dataset, number, turn

    def sample(self, item: int, epoch: int) -> dict[str, Any]:
        dataset, number, turn = self.locate(item, epoch)
        sample = self.datasets[dataset].sample(number, turn)
        return {**sample, "source": f"data set {dataset}, {sample['source']}"}

    def _lay_out(self, epoch: int) -> np.ndarray:
        """The whole epoch: (length, 3) of data set, sample and turn."""
        rows, places = [], []
        for number, stratum in enumerate(self.strata):
            size, count = len(stratum.items), stratum.per_epoch
            turns, positions = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
            items = np.empty(count, dtype=np.int64)
            for turn in np.unique(turns).tolist():
                order = np.random.default_rng((self.seed, number, turn)).permutation(size)
                items[turns == turn] = stratum.items[order[positions[turns == turn]]]
            rows.append(np.stack([np.full(count, stratum.dataset), items, turns], axis=1))
            # one sample in each of `count` equal stretches of the epoch
            jitter = np.random.default_rng((self.seed, number, epoch, 1)).random(count)
            places.append((np.arange(count) + jitter) / count)
        return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers of sum `total` in the ratio of `shares`, the largest remainders rounded up."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def _check_weights(name: str, weights: Mapping[Any, float]) -> None:
    values = np.array([float(value) for value in weights.values()])
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(f"{name} are numbers >= 0, not all of them 0, not {values.tolist()}")
