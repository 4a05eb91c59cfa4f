"""Runs arms interleaved, reads the clock, and puts figures beside what the machine could do.

Arms alternate within a repeat (A, C, D, A, C, D, ...), so that a machine that slows down slows all of them; medians are
reported, with the processor's time beside the wall's on a CPU. Compilation and captures happen before the first repeat.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .arms import QUANTISED, Arms
from .cases import Case
from .counts import Forward, bytes_read, count, forwards_of, roofline_seconds

PEAKS = {  # data sheets: bytes and bfloat16 operations a second
    "H100 SXM": (3.35e12, 989e12),
    "H100 80GB HBM3": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
}


@dataclass
class Samples:
    """What the repeats of one arm and case gave."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    answers: list[torch.Tensor] = field(default_factory=list)
    forwards: int = 0
    peak_bytes: int | None = None


class ForwardClock:
    """Counts forwards of the decoder's modules and notes when the second begins, which is when the prefill is over.

    What runs outside modules (compiled layers, graphs) is not seen.
    """

    def __init__(self, model: Any):
        self.decoder, self.count = model.model, 0
        self.second: float | None = None

    def __enter__(self) -> "ForwardClock":
        self.handle = self.decoder.layers[0].register_forward_pre_hook(self._begins)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _begins(self, *_: Any) -> None:
        self.count += 1
        if self.count == 2:
            synchronize(self.decoder.device)
            self.second = time.perf_counter()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: Any,
    arms: list[str],
    cases: list[Case],
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[tuple[str, Case], Samples]:
    """Run every arm on every case, `repeats` times in turn, each repeat with fresh random prompts."""
    runner = Arms(model)
    models = {arm: quantised(model, arm) for arm in arms if arm in QUANTISED}
    runners = {arm: Arms(other) for arm, other in models.items()}
    samples = {(arm, case): Samples() for case in cases for arm in arms}
    for repeat in range(-1, repeats):  # the first is a warm-up
        for case in cases:
            shown = case if repeat >= 0 or model.device.type == "cuda" else shortened(case)
            ids = shown.prompts(model.tokens, seed=repeat + 1).to(model.device)
            for arm in arms:
                progress(f"{arm} {describe(case)}" if repeat >= 0 else f"warm-up {arm} {describe(case)}")
                owner = runners.get(arm, runner)
                answer = owner.prepare(arm if arm not in QUANTISED else "D", shown, ids)
                if repeat >= 0:
                    run_once(owner.model, answer, samples[arm, case])
                else:
                    answer()
    model.engine = None
    return samples


def shortened(case: Case) -> Case:
    """The same code on less work: enough to warm a CPU up, where nothing is compiled for a shape."""
    return Case(case.what, 64, 1, 1, 1)


def run_once(model: Any, answer: Callable[[], torch.Tensor], samples: Samples) -> None:
    device = model.device
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ForwardClock(model) as clock:
        processor, began = time.process_time(), time.perf_counter()
        result = answer()
        returned = time.perf_counter()
        synchronize(device)
        ended = time.perf_counter()
    samples.wall.append(ended - began)
    samples.processor.append(time.process_time() - processor)
    if clock.second is not None:
        samples.prefill.append(clock.second - began)
    if device.type == "cuda":
        samples.host.append(returned - began)  # until everything is queued; all of it where the answer is waited for
        samples.peak_bytes = torch.cuda.max_memory_allocated(device)
    samples.forwards = clock.count
    samples.answers.append(result.cpu())


def quantised(model: Any, arm: str) -> Any:
    """A copy of the model with its decoder's weights in fewer bits. Needs torchao."""
    from copy import deepcopy

    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
        from torchao.quantization import Int4WeightOnlyConfig as Int4
    except ImportError as error:
        raise ValueError(f"{arm} needs torchao: pip install torchao") from error
    configs = {
        "D-int8": Int8WeightOnlyConfig,
        "D-fp8": Float8WeightOnlyConfig,
        "D-int4": lambda: Int4(group_size=128, int4_packing_format="tile_packed_to_4d"),
    }
    copy = deepcopy(model)
    quantize_(copy.model.layers, configs[arm]())
    return copy


def describe(case: Case) -> str:
    if case.what == "frame":
        return f"frame {case.px} px B={case.batch}"
    return f"chunk {case.px} px M={case.frames} K={case.actions} B={case.batch}"


# ------------------------------------------------------------------------------------------------ the machine


@dataclass(frozen=True)
class Ceilings:
    """Bytes read and operations a second, measured in this run, and those of the data sheet where it is known."""

    bandwidth: float
    throughput: float
    sheet_bandwidth: float | None = None
    sheet_throughput: float | None = None


def best_rate(work: float, run: Callable[[], Any], device: torch.device, tries: int = 5) -> float:
    rates = []
    for _ in range(tries):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        rates.append(work / (time.perf_counter() - began))
    return max(rates[1:])


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A matrix times a vector reads memory, a matrix times a matrix computes."""
    on_gpu = device.type == "cuda"
    rows, side = (1 << 17, 8192) if on_gpu else (1 << 14, 1024)
    matrix = torch.randn(rows, side if on_gpu else 4096, device=device, dtype=dtype)
    vector = torch.randn(matrix.shape[1], device=device, dtype=dtype)
    bandwidth = best_rate(matrix.numel() * matrix.element_size(), lambda: matrix @ vector, device)
    square = matrix[:side, :side].contiguous()
    throughput = best_rate(2.0 * side**3, lambda: square @ square, device)
    name = torch.cuda.get_device_name(device) if on_gpu else ""
    sheet = next((peak for key, peak in PEAKS.items() if key in name), (None, None))
    return Ceilings(bandwidth, throughput, *sheet)


def machine(device: torch.device) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }


# ------------------------------------------------------------------------------------------------ rows


def rows_of(samples: dict[tuple[str, Case], Samples], model: Any, ceilings: Ceilings) -> list[dict[str, Any]]:
    """One row for each arm and case, in the order of `samples`."""
    rows = []
    for (arm, case), taken in samples.items():
        prompt = case.prompts(model.tokens, 0).shape[1]
        element = torch.finfo(model.dtype).bits // 8
        forwards = forwards_of(arm, case, model.config, model.tokens, prompt)
        reference = samples[next(iter(key for key in samples if key[1] == case))]
        median = statistics.median(taken.wall)
        row: dict[str, Any] = {
            "arm": arm,
            **asdict(case),
            "median_s": median,
            "p95_s": percentile(taken.wall, 0.95),
            "min_s": min(taken.wall),
            "cpu_s": statistics.median(taken.processor),
            "forwards": len(forwards) if forwards else taken.forwards,
            **split(taken, median),
            "agreement": agreement(taken.answers, reference.answers),
            "peak_bytes": taken.peak_bytes,
        }
        answers = case.batch / median
        if case.what == "chunk":
            row |= {"actions_per_s": case.actions * answers, "replans_per_s": answers}
        else:
            row |= {"frames_per_s": answers}
        if forwards:
            row |= asdict(count(forwards, case, model.config, element, prompt))
        if forwards and arm not in QUANTISED:
            row |= against_the_limit(forwards, case, model.config, element, ceilings, median, arm == "A")
        rows.append(row)
    return rows


def split(taken: Samples, median: float) -> dict[str, float | None]:
    """Prefill (up to the first token), decode (the rest), host (until everything is queued): None where unseen."""
    prefill = statistics.median(taken.prefill) if taken.prefill else None
    decode = None
    if taken.prefill:
        decode = statistics.median(wall - first for wall, first in zip(taken.wall, taken.prefill, strict=True))
    return {"prefill_s": prefill, "decode_s": decode, "host_s": statistics.median(taken.host) if taken.host else None}


def against_the_limit(
    forwards: list[Forward],
    case: Case,
    config: Any,
    element: int,
    ceilings: Ceilings,
    median: float,
    row_by_row: bool,
) -> dict[str, float]:
    """What the counts predict on this machine, and how much of its bandwidth was used."""
    times, batch = (case.batch, 1) if row_by_row else (1, case.batch)
    moved = times * sum(bytes_read(one, batch, config, element) for one in forwards)
    least = times * roofline_seconds(forwards, batch, config, element, ceilings.bandwidth, ceilings.throughput)
    return {
        "bytes_read": moved,
        "achieved_gb_per_s": moved / median / 1e9,
        "fraction_of_bandwidth": moved / median / ceilings.bandwidth,
        "predicted_s": least,
        "fraction_of_limit": least / median,
    }


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def agreement(answers: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Share of tokens equal to the first arm's."""
    same = [(one == other).float().mean() for one, other in zip(answers, reference, strict=True)]
    return float(torch.stack(same).mean())


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster D is than the others, whole and by phase; beside what the counts predict."""
    ratios = []
    cases = {tuple(row[name] for name in ("what", "px", "frames", "actions", "batch")): row for row in rows}
    for key in cases:
        of_case = {
            row["arm"]: row
            for row in rows
            if tuple(row[name] for name in ("what", "px", "frames", "actions", "batch")) == key
        }
        for fast in ("D", "D-overlap"):
            for slow in ("A", "B1", "B2", "C"):
                if fast in of_case and slow in of_case:
                    ratios.append(ratio(of_case[slow], of_case[fast]))
    return ratios


def ratio(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    measured = slow["median_s"] / fast["median_s"]
    decode = slow["decode_s"] / fast["decode_s"] if slow["decode_s"] and fast["decode_s"] else None
    predicted = slow["predicted_s"] / fast["predicted_s"]
    case = {name: fast[name] for name in ("what", "px", "frames", "actions", "batch")}
    return {
        **case,
        "ratio": f"{slow['arm']}/{fast['arm']}",
        "measured": measured,
        "cpu_time": slow["cpu_s"] / fast["cpu_s"],
        "decode_phase": decode,
        "predicted": predicted,
        "of_predicted": measured / predicted,
    }


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
