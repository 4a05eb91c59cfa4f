"""The rows of the paper's tables as data: how each model is trained, what is measured, and what the paper measured.

Nothing runs here. Two rows whose `Training` is equal share one run. The paper's numbers are as printed in
arXiv 2506.21539; its figures 6 and 7 are plots without numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

# where the paper's chunks have five actions
SUITES = {"libero_goal": "Goal", "libero_object": "Object", "libero_spatial": "Spatial"}
HORIZONS = (10, 50)  # frames of Table 4


@dataclass(frozen=True)
class Training:
    """All in which training runs differ; the budget (steps, batch, data) is the same for every one."""

    kinds: tuple[str, ...] = ("action",)  # of samples: action, world, video
    num_actions: int = 5  # K, length of a chunk
    history: int = 2  # M, frames that are seen
    action_attention: str = "independent"  # the paper's mask; `causal` is the naive one
    world_loss_weight: float = 1.0  # alpha
    px: int = 128
    start_from: "Training | None" = None  # else from random weights


@dataclass(frozen=True)
class Row:
    """`measures`: of `success`, `speed` and `frames`. `paper`: of those, success by suite."""

    name: str
    label: str
    training: Training
    measures: tuple[str, ...] = ("success",)
    paper: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """`comparisons`: (name of A, name of B, what the paper says about B against A). `notes`: what differs here."""

    name: str
    title: str
    rows: tuple[Row, ...]
    comparisons: tuple[tuple[str, str, str], ...]
    notes: str


def _success(goal: float, object_: float, spatial: float) -> dict[str, Any]:
    return {"success": {"libero_goal": goal, "libero_object": object_, "libero_spatial": spatial}}


BOTH = ("action", "world")
SINGLE = Training(num_actions=1)  # one action: there is no other that a mask could hide
SINGLE_BOTH = Training(BOTH, num_actions=1)
CHUNK = Training()
CHUNK_CAUSAL = Training(action_attention="causal")
CHUNK_BOTH = Training(BOTH)
WORLD = Training(("world",))

TABLE_3 = Table(
    "table3",
    "Table 3: world model, action chunks, attention mask",
    (
        Row("table3.1", "action model", SINGLE, paper=_success(67.3, 82.9, 77.8)),
        Row("table3.2", "action + world model", SINGLE_BOTH, paper=_success(73.1, 88.0, 80.2)),
        Row("table3.3", "action model, chunks, naive mask", CHUNK_CAUSAL, paper=_success(79.6, 82.9, 36.7)),
        Row("table3.4", "action model, chunks, proposed mask", CHUNK, paper=_success(84.4, 90.9, 81.8)),
        Row("table3.5", "action + world model, chunks, proposed mask", CHUNK_BOTH, paper=_success(85.1, 90.9, 84.0)),
    ),
    (
        ("table3.1", "table3.2", "the world model helps"),
        ("table3.3", "table3.4", "the proposed mask helps"),
        ("table3.4", "table3.5", "the world model helps with chunks too"),
    ),
    "All rows take equally many optimizer steps of equally many samples, so a model that also learns the world sees "
    "about half as many action samples; the paper trains for 40 epochs of whatever data a row has.",
)

TABLE_4 = Table(
    "table4",
    "Table 4: the world model alone and with actions",
    (
        Row("table4.world", "world model", WORLD, ("frames",), {"frames": {
            10: {"fvd": 250.0, "psnr": 29.62, "ssim": 90.73, "lpips": 11.97},
            50: {"fvd": 718.6, "psnr": 23.98, "ssim": 83.41, "lpips": 15.60}}}),
        Row("table4.both", "action + world model", CHUNK_BOTH, ("frames",), {"frames": {
            10: {"fvd": 255.1, "psnr": 29.77, "ssim": 90.40, "lpips": 11.94},
            50: {"fvd": 674.1, "psnr": 24.30, "ssim": 83.55, "lpips": 15.44}}}),
    ),
    (("table4.world", "table4.both", "actions help the world model, above all over 50 frames"),),
    "The action + world model sees half as many world samples as the world model here (equal steps). The paper does "
    "not say where its clips begin or on which network its FVD rests; here clips lie end to end in the validation "
    "episodes, each frame is decoded and encoded again, and LPIPS and FVD are left out where their networks cannot be "
    "had.",
)  # fmt: skip

TABLE_5 = Table(
    "table5",
    "Table 5: frames seen",
    tuple(
        Row(
            f"table5.{frames}.{'chunk' if chunk else 'single'}",
            f"{frames} frame{'s' * (frames > 1)}, {'chunks' if chunk else 'one action at a time'}",
            Training(num_actions=5 if chunk else 1, history=frames),
            ("success", "speed"),
            {"success": {"libero_goal": success}, "speed": speed},
        )
        for frames, chunk, success, speed in (
            (1, False, 58.4, 2.27),
            (2, False, 67.3, 1.77),
            (4, False, 78.7, 1.22),
            (1, True, 74.0, 3.67),
            (2, True, 84.4, 3.13),
            (4, True, 84.7, 2.78),
        )
    ),
    (
        ("table5.1.single", "table5.2.single", "two frames are better than one"),
        ("table5.2.single", "table5.4.single", "four are better still"),
        ("table5.1.chunk", "table5.2.chunk", "two frames are better than one"),
        ("table5.2.chunk", "table5.4.chunk", "with chunks two are enough"),
        ("table5.2.single", "table5.2.chunk", "chunks help"),
    ),
    "Actions/s: those of a chunk over the median time of an answer (pictures to tokens, prompt, decoding), batch 1, "
    "all rows timed in turns; the simulator has no part in it. The paper's FPS are of a 7B model on a GPU.",
)

TABLE_6 = Table(
    "table6",
    "Table 6: world-model pre-training",
    (
        Row("table6.without", "action model", SINGLE, paper=_success(67.3, 82.9, 77.8)),
        Row(
            "table6.with",
            "action model, pre-trained as a world model",
            Training(num_actions=1, start_from=WORLD),
            paper=_success(73.1, 84.0, 79.8),
        ),
    ),
    (("table6.without", "table6.with", "pre-training helps"),),
    "Both take the same number of action steps; pre-training comes on top, as in the paper.",
)


def _chunk_row(length: int, attention: str) -> Row:
    label = f"K = {length}" + ("" if length == 1 else f", {'proposed' if attention == 'independent' else 'naive'} mask")
    name = f"figure6.{length}" + ("" if length == 1 else f".{attention}")
    return Row(name, label, Training(num_actions=length, action_attention=attention))


FIGURE_6 = Table(
    "figure6",
    "Figure 6: length of the action chunk",
    (
        _chunk_row(1, "independent"),
        *(_chunk_row(length, attention) for length in range(2, 11) for attention in ("causal", "independent")),
    ),
    tuple(
        (
            f"figure6.{length}.causal",
            f"figure6.{length}.independent",
            "the proposed mask helps, more with longer chunks",
        )
        for length in range(2, 11)
    ),
    "The paper shows a plot without numbers: success falls with the chunk's length under the naive mask, and under the "
    "proposed one only for long chunks.",
)

FIGURE_7 = Table(
    "figure7",
    "Figure 7: world model or video prediction",
    (
        Row("figure7.action", "action model", CHUNK),
        Row("figure7.video", "action model + video prediction", Training(("action", "video"))),
        Row("figure7.world", "action + world model", CHUNK_BOTH),
    ),
    (
        ("figure7.action", "figure7.world", "the world model helps on every suite"),
        ("figure7.action", "figure7.video", "video prediction helps on two suites and harms on one"),
        ("figure7.video", "figure7.world", "the world model is the better companion"),
    ),
    "The paper shows bars without numbers, and released no code of its video prediction: here it sees the text and two "
    "frames and predicts the next one.",
)

RESOLUTION = Table(
    "resolution",
    "Resolution (Table 2)",
    (
        Row("resolution.128", "128 px", CHUNK_BOTH),
        Row("resolution.256", "256 px", Training(BOTH, px=256)),
    ),
    (("resolution.128", "resolution.256", "more pixels are better (256 to 512 px: 82.6 to 83.4 % on Goal)"),),
    "The paper compares 256 with 512 px, which its image tokenizer was made for. Here one image tokenizer serves both "
    "sizes, and it was trained on pictures of 128 px.",
)

TABLES = (TABLE_3, TABLE_4, TABLE_5, TABLE_6, FIGURE_6, FIGURE_7, RESOLUTION)
ROWS = {row.name: row for table in TABLES for row in table.rows}

# what is run first when time is short
ORDER = ("table3.[345]", "figure6.1", "figure6.5.*", "figure6.10.*", "table5.*", "*")


def choose_rows(patterns: tuple[str, ...] = ("*",)) -> list[Row]:
    """Rows whose names fit a pattern such as `table3.*`, in the order in which they are run.

    Raises ValueError for a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in ROWS):
            raise ValueError(f'no row is called "{pattern}": see --list')
    ordered = dict.fromkeys(name for first in ORDER for name in ROWS if fnmatch(name, first))
    return [ROWS[name] for name in ordered if any(fnmatch(name, pattern) for pattern in patterns)]
