"""What a folder holds (model, adapter, frame-token cache, Space), if all of it is there, and which files go to the Hub.

Nothing is changed and nothing is sent here. Training leaves more in a folder than readers of a checkpoint need: the
Trainer's own checkpoints, the settings of the run with this machine's paths, pickles. Those stay.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import RepoCard
from yaml import YAMLError

from ..card_worldvla import CARD_NAME
from ..data.cache import DATA, HEADER, FrameTokenCache
from ..diagnosis.files import ADAPTER_CONFIG, check_folder, is_adapter
from ..diagnosis.report import FAILED, OK, WARNING, Finding

MODEL, ADAPTER, CACHE, SPACE = "model", "adapter", "dataset cache", "Space"
PUBLIC = (".safetensors", ".json", ".py", ".md", ".txt", ".jinja", ".model", ".png", ".jpg", ".gif", ".mp4")
LEGAL = ("LICENSE", "NOTICE")
PRIVATE = ("run.json",)  # holds paths of this machine
# what an earlier push may have left in the repository and this one does not bring: shards of another count, old modules
_WEIGHTS_AND_CODE = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model*.safetensors",
    "*_worldvla.py",
)
STALE = {MODEL: _WEIGHTS_AND_CODE, ADAPTER: _WEIGHTS_AND_CODE, CACHE: (f"{DATA}/*",), SPACE: ()}


@dataclass(frozen=True)
class Publication:
    """A complete folder that can be published.

    Attributes:
        kind: `model`, `adapter`, `dataset cache` or `Space`.
        files: what goes to the Hub, relative to the folder, in order.
        findings: the checks that were made; none failed.
        space_sdk: what runs a Space, None for the other kinds.
    """

    folder: Path
    kind: str
    files: tuple[str, ...]
    findings: tuple[Finding, ...] = ()
    space_sdk: str | None = None

    @property
    def repo_type(self) -> str:
        """`model`, `dataset` or `space`, as the Hub calls it."""
        return {CACHE: "dataset", SPACE: "space"}.get(self.kind, "model")


def inspect_folder(folder: Path) -> Publication:
    """What there is to publish in a folder.

    Raises ValueError (or EpisodeError, which is one) in one line that says what is missing or damaged, and
    FileNotFoundError when the folder holds nothing of the four kinds.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if (folder / HEADER).is_file():
        return _inspect_cache(folder)
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        if (space := _inspect_space(folder)) is not None:
            return space
        raise FileNotFoundError(
            f"{folder} holds nothing to push: no config.json (model), {ADAPTER_CONFIG} (adapter), {HEADER} (cache) "
            f"or {CARD_NAME} that names an sdk (Space)"
        )
    findings = [*check_folder(folder), _check_settings(folder)]
    for finding in findings:
        if finding.verdict == FAILED:
            raise ValueError(f"{folder} is not complete: {finding.check}: {finding.found}; {finding.advice}")
    kind = ADAPTER if is_adapter(folder) else MODEL
    return Publication(folder, kind, public_files(folder), tuple(findings))


def public_files(folder: Path) -> tuple[str, ...]:
    """Names of the files of a checkpoint that go to the Hub; the card is among them even before it is written."""
    found = {
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name not in PRIVATE
        if path.suffix in PUBLIC or path.name.startswith(LEGAL)
    }
    return tuple(sorted(found | {CARD_NAME}))


def _check_settings(folder: Path) -> Finding:
    """The processor and the config load and are of this library, and robots have their ranges."""
    from ..configuration_worldvla import WorldVLAConfig
    from ..serving.loading import open_processor

    try:
        if not is_adapter(folder):
            found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
            if found != WorldVLAConfig.model_type:
                return Finding("settings", FAILED, f"model type {found!r}", "`worldvla convert` makes one of ours")
        robots = open_processor(folder).embodiments
    except (OSError, ValueError, AttributeError) as error:
        return Finding("settings", FAILED, " ".join(str(error).split()), "save the processor into the folder again")
    if not robots:
        advice = "without ranges nobody can read its actions: fine-tune it, or give the processor an embodiment"
        return Finding("settings", WARNING, "no embodiment", advice)
    return Finding("settings", OK, f"embodiments {', '.join(robots)}")


def _inspect_space(folder: Path) -> Publication | None:
    """A Space, which its card makes one, with all its files; None for another folder."""
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    try:
        data = RepoCard.load(path).data
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path}: its header cannot be read: {' '.join(str(error).split())}") from error
    if (sdk := data.get("sdk")) is None:
        return None
    app = data.get("app_file", "app.py")
    if sdk == "gradio" and not (folder / app).is_file():
        raise ValueError(f"{folder} is not complete: its card names the app {app}, which is not there")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = [file.as_posix() for file in files if not any(part.startswith((".", "__")) for part in file.parts)]
    return Publication(folder, SPACE, tuple(sorted(names)), (Finding("app", OK, f"{sdk}, {app}"),), str(sdk))


def _inspect_cache(folder: Path) -> Publication:
    """A cache whose header, shards and row counts agree."""
    cache = FrameTokenCache(folder)
    cache.table(columns=["episode_index"])  # opens every shard and counts its rows
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no {CARD_NAME}: run the same `worldvla tokenize` again, which writes it")
    names = [HEADER, CARD_NAME, *(entry["path"] for entry in cache.header["files"])]
    for path in sorted((folder / DATA).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in names:
            raise ValueError(f"{folder}: {name} is in no header: delete it or tokenize again")
    steps = sum(cache.splits.values())
    return Publication(folder, CACHE, tuple(sorted(names)), (Finding("cache", OK, f"{steps} steps, all readable"),))
