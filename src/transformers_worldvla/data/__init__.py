"""Robot data: episodes from any source, read lazily."""

from .episodes import Episode, EpisodeDataset, EpisodeError
from .loading import load_episodes
from .samples import SampleDataset, TokenizedEpisode, WorldVLADataCollator, tokenize_episode
from .scan import ScanReport, scan_episodes

__all__ = [
    "Episode",
    "EpisodeDataset",
    "EpisodeError",
    "SampleDataset",
    "ScanReport",
    "TokenizedEpisode",
    "WorldVLADataCollator",
    "load_episodes",
    "scan_episodes",
    "tokenize_episode",
]
