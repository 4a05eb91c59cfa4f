"""What a frame-token cache is going to hold, decided before the first frame is encoded.

The header made here is everything that the bytes of a cache depend on, so that a run that was killed goes on only with
the same one, and so that two caches with one fingerprint hold the same rows. It has no times, paths or process counts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..action_tokenization_worldvla import Embodiment
from ..image_processing_worldvla import GRID_UNIT
from ..tokens_worldvla import CODES_PER_GRID_UNIT
from ..vqvae_worldvla import WorldVLAVQVAE
from .augmentation import ImageAugmentation
from .cache import VERSION
from .embodiments import build_embodiment, check_template, find_template, source_name
from .episodes import EpisodeDataset, EpisodeError
from .image_tokenizer import hash_image_tokenizer
from .preparation import Preparation, PreparedEpisode, find_gripper, prepare_episodes
from .splits import name_trajectories, split_trajectories
from .statistics import ActionStatistics, action_statistics

STATISTICS = ("minmax", "quantile", "checkpoint")
MAX_CODES = 2**16  # uint16


@dataclass(frozen=True)
class CacheOptions:
    """What may be chosen about a cache; see `prepare_episodes`, `split_trajectories` and `build_embodiment`.

    `no_ops=None` means `authors` for delta actions and `keep` for absolute ones, `gripper=None` the dimension that the
    template or a name tells (-1: none). `rotation` is the embodiment's, of raw pictures; the dataset's are upright.
    `statistics="checkpoint"` keeps the template's ranges. `device` and `batch_size` belong to it, as another kernel may
    round a code to its neighbour.

    `augment`, a number >= 0, makes a cache of changed pictures to train on beside the plain one: the training episodes
    alone, cropped and recoloured as `ImageAugmentation` does by default, its colours scaled by `augment_colours`. All
    pictures of an episode change alike; another number, other changes. Ranges and split are those of the plain cache.
    """

    no_ops: str | None = None
    unsuccessful: str = "drop"
    gripper: int | None = None
    split: str = "seeded"
    seed: int = 0
    val_share: float = 0.1
    ood_share: float = 0.1
    statistics: str = "minmax"
    name: str | None = None
    semantics: str | None = None
    rotation: int | None = None
    raw_cameras: tuple[str, ...] | None = None
    batch_size: int = 32
    device: str = "cpu"
    augment: int | None = None
    augment_colours: float = 1.0


@dataclass
class CachePlan:
    """A cache to be made. Plain data inside, so it may travel to worker processes."""

    dataset: EpisodeDataset
    image_processor: Any
    preparation: Preparation
    splits: dict[str, list[int]]  # split -> positions in the dataset
    statistics: ActionStatistics | None
    embodiment: Embodiment
    header: dict[str, Any]

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.embodiment.cameras

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture: (h, w)."""
        height, width = self.header["image_transform"]["codes"]
        return height, width

    @property
    def num_pictures(self) -> int:
        return self.preparation.num_steps * len(self.cameras)

    def __str__(self) -> str:
        names = name_trajectories(self.dataset)
        counts = {name: sum(len(e) for e in self.of_split(name)) for name in self.splits}
        parts = [f"{name} {len(self.splits[name])} episodes, {counts[name]} steps" for name in self.splits]
        held_out = sorted({names[position].task for position in self.splits["val_ood"]})
        lines = [
            repr(self.dataset),
            str(self.preparation),
            f"split ({self.header['split']['rule']}): {'; '.join(parts)}",
        ]
        lines += [f"  tasks held out: {', '.join(held_out)}"] if held_out else []
        lines.append(f"embodiment {self.embodiment.describe()}: {self.embodiment.dataset}")
        lines.append(f"cameras: {', '.join(self.cameras)}, {self.grid[0]} x {self.grid[1]} codes a picture")
        return "\n".join([*lines, str(self.statistics or "ranges of the checkpoint's embodiment")])

    @property
    def augmentation(self) -> ImageAugmentation | None:
        """How the pictures change, None where they do not."""
        found = self.header.get("augmentation")
        return None if found is None else ImageAugmentation(**{k: v for k, v in found.items() if k != "seed"})

    def of_split(self, split: str) -> list[PreparedEpisode]:
        """The episodes of a split, in the order of the dataset."""
        members = set(self.splits[split])
        return [episode for episode in self.preparation.episodes if episode.position in members]


def plan_cache(
    dataset: EpisodeDataset,
    image_processor: Any,
    vqvae: WorldVLAVQVAE,
    options: CacheOptions | None = None,
    template: Embodiment | None = None,
    on_episode: Callable[[int, int], object] | None = None,
) -> CachePlan:
    """Choose episodes, steps, split and ranges of a dataset opened with the cameras to encode, in their order.

    `template` is an embodiment of the same robot; LIBERO's own files need none. Raises EpisodeError for damage and when
    nothing is left, ValueError for options that contradict one another.
    """
    options = options or CacheOptions()
    if options.statistics not in STATISTICS:
        raise ValueError(f"statistics are one of {', '.join(STATISTICS)}, not {options.statistics!r}")
    if options.statistics == "checkpoint" and template is None:
        raise ValueError("statistics of the checkpoint need an embodiment of it: name it")
    if not dataset.cameras:
        raise ValueError(f"{dataset.source} has no camera")
    if vqvae.config.num_embeddings > MAX_CODES:
        raise ValueError(f"{vqvae.config.num_embeddings} codes do not fit 16 bits")
    if len(dataset) == 0:
        raise EpisodeError("holds no episode", dataset.source)
    action_dim = dataset[0].actions.shape[1]
    template = template or find_template(dataset, action_dim)
    check_template(template, action_dim)
    no_ops = _no_op_rule(options, template)
    gripper = _gripper(options, template, dataset)
    preparation, actions = prepare_episodes(dataset, no_ops, options.unsuccessful, gripper, on_episode)
    splits = _split(dataset, preparation, options)
    statistics = None
    if options.statistics != "checkpoint":
        training = set(splits["train"])
        kept = [rows for e, rows in zip(preparation.episodes, actions, strict=True) if e.position in training]
        names = template.action_names if template and template.action_names else dataset.action_names
        statistics = action_statistics(kept, options.statistics, names)
    embodiment = build_embodiment(
        dataset,
        statistics,
        dataset.cameras,
        options.name,
        template,
        semantics=options.semantics,
        rotation=options.rotation,
        raw_cameras=options.raw_cameras,
    )
    description, augmentation = _describe_split(options, splits), _augmentation(options)
    if augmentation is not None:
        splits = {name: members if name == "train" else [] for name, members in splits.items()}
        members = set(splits["train"])
        preparation = replace(preparation, episodes=[e for e in preparation.episodes if e.position in members])
    header = {
        "version": VERSION,
        "dataset": {
            "source": source_name(dataset),
            "format": dataset.format,
            "revision": dataset.revision,
            "fingerprint": dataset.fingerprint,
        },
        "image_tokenizer": {"sha256": hash_image_tokenizer(vqvae), "num_codes": vqvae.config.num_embeddings},
        "image_transform": _transform(dataset, preparation.episodes[0], image_processor),
        "encoding": {"batch_size": options.batch_size, "device": options.device},
        "cameras": list(dataset.cameras),
        "preparation": preparation.to_dict(),
        "split": description,
        "statistics": statistics.to_dict() if statistics else {"method": "checkpoint"},
        "embodiment": embodiment.to_dict(),
    }
    if augmentation is not None:
        header["augmentation"] = {"seed": options.augment, **asdict(augmentation)}
    header["fingerprint"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    return CachePlan(dataset, image_processor, preparation, splits, statistics, embodiment, header)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two headers differ, as `encoding.batch_size (32, not 16)`; long values are left out."""
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        first, second = one.get(key), other.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            found += [f"{key}.{line}" for line in differences(first, second)]
        elif first != second:
            values = f"{first}, not {second}"
            found.append(f"{key} ({values})" if len(values) < 60 else key)
    return found


def _augmentation(options: CacheOptions) -> ImageAugmentation | None:
    if options.augment is None:
        return None
    if options.augment < 0:
        raise ValueError(f"augment is a number >= 0, not {options.augment}")
    usual = ImageAugmentation()
    names = ("brightness", "contrast", "saturation", "hue")
    return replace(usual, **{name: getattr(usual, name) * options.augment_colours for name in names})


def _no_op_rule(options: CacheOptions, template: Embodiment | None) -> str:
    semantics = options.semantics or (template.semantics if template else "delta")
    if options.no_ops == "authors" and semantics == "absolute":
        raise ValueError("the authors' no-op rule is for delta actions, these are absolute: keep no-ops")
    return options.no_ops or ("authors" if semantics == "delta" else "keep")


def _gripper(options: CacheOptions, template: Embodiment | None, dataset: EpisodeDataset) -> int | None:
    if options.gripper is not None:
        return None if options.gripper == -1 else options.gripper
    if template is not None and template.gripper is not None:
        return int(template.gripper["index"])
    return find_gripper(template.action_names if template and template.action_names else dataset.action_names)


def _split(dataset: EpisodeDataset, preparation: Preparation, options: CacheOptions) -> dict[str, list[int]]:
    kept = {episode.position for episode in preparation.episodes}
    trajectories = [each for each in name_trajectories(dataset) if each.position in kept]
    return split_trajectories(trajectories, options.split, options.seed, options.val_share, options.ood_share)


def _describe_split(options: CacheOptions, splits: dict[str, list[int]]) -> dict[str, Any]:
    seeded = {"seed": options.seed, "val_share": options.val_share, "ood_share": options.ood_share}
    return {"rule": options.split, **(seeded if options.split == "seeded" else {}), "episodes": splits}


def _transform(dataset: EpisodeDataset, first: PreparedEpisode, image_processor: Any) -> dict[str, Any]:
    """Name and size of the image transform, and the codes of a picture, by the first frame of every camera."""
    sizes = {}
    for camera in dataset.cameras:
        pixels = image_processor.pixels(dataset[first.position].frame(camera, int(first.steps[0])))
        sizes[camera] = codes_of(pixels)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{camera} {height} x {width}" for camera, (height, width) in sizes.items())
        raise ValueError(f"pictures of one cache have one size; by camera they get these codes: {found}")
    return {
        "type": type(image_processor).__name__,
        "target_size": image_processor.target_size,
        "codes": list(next(iter(sizes.values()))),
    }


def codes_of(pixels: np.ndarray) -> tuple[int, int]:
    """Codes (h, w) of a picture (3, H, W)."""
    height, width = (side // GRID_UNIT * CODES_PER_GRID_UNIT for side in pixels.shape[1:])
    return height, width
