"""Robot data: episodes from any source, read lazily."""

from .augmentation import ImageAugmentation
from .cache import FrameTokenCache
from .cache_plan import CacheOptions, CachePlan, plan_cache
from .cache_writer import write_cache
from .collator import WorldVLADataCollator
from .embodiments import build_embodiment
from .episodes import Episode, EpisodeDataset, EpisodeError
from .loading import load_episodes
from .mixture import MixtureDataset
from .pixels import PixelSampleDataset
from .preparation import Preparation, prepare_episodes
from .samples import EpisodeSamples, SampleDataset, TokenizedEpisode, tokenize_episode
from .scan import ScanReport, scan_episodes
from .splits import name_trajectories, split_trajectories
from .statistics import ActionStatistics, action_statistics

__all__ = [
    "ActionStatistics",
    "CacheOptions",
    "CachePlan",
    "Episode",
    "EpisodeDataset",
    "EpisodeError",
    "EpisodeSamples",
    "FrameTokenCache",
    "ImageAugmentation",
    "MixtureDataset",
    "PixelSampleDataset",
    "Preparation",
    "SampleDataset",
    "ScanReport",
    "TokenizedEpisode",
    "WorldVLADataCollator",
    "action_statistics",
    "build_embodiment",
    "load_episodes",
    "name_trajectories",
    "plan_cache",
    "prepare_episodes",
    "scan_episodes",
    "split_trajectories",
    "tokenize_episode",
    "write_cache",
]
