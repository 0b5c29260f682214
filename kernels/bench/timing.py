"""How things are timed: on a GPU many calls in one CUDA graph, each on tensors of its own; on a CPU the plain clock."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

Call = Callable[[], object]

COLD_BYTES = 256 << 20
"""Bytes that a round of calls goes through before it comes to the same tensors again: several H200 L2s (60 MB)."""
MOST_SETS = 32
REPEATS = 20


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make(seed)` gives the calls to time on fresh tensors: "own", and what it is compared with.

    `moved` are the bytes that must be moved at least, every input read once and every output written once.
    """

    op: str
    shape: dict[str, int | str]
    moved: int
    make: Callable[[int], dict[str, Call]]


@dataclass(frozen=True)
class Timed:
    """`micros` by what was timed: "own", "copy" (the same bytes copied: the floor), "gather-bmm" and the like."""

    op: str
    shape: dict[str, int | str]
    moved: int
    launches: int | None
    micros: dict[str, float]
    gb_per_s: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gb_per_s", self.moved / self.micros["own"] / 1e3)

    def ratio(self, name: str) -> float:
        """How many times `name`'s time our own is."""
        return self.micros["own"] / self.micros[name]

    def as_json(self) -> dict[str, object]:
        ratios = {name: self.ratio(name) for name in self.micros if name != "own"}
        return {**asdict(self), "ratio": ratios}


def measure(case: Case, device: torch.device) -> Timed:
    """Times every call of a case, and a copy of as many bytes."""
    sets = max(1, min(MOST_SETS, -(-COLD_BYTES // max(case.moved, 1)))) if device.type == "cuda" else 1
    made = [case.make(seed) for seed in range(sets)]
    micros = {name: timed([calls[name] for calls in made], device) for name in made[0]}
    half = max(1, case.moved // 2)
    buffers = [torch.empty(2, half, dtype=torch.uint8, device=device) for _ in range(sets)]
    micros["copy"] = timed([lambda b=b: b[1].copy_(b[0]) for b in buffers], device)  # type: ignore[misc]
    return Timed(case.op, case.shape, case.moved, launches(made[0]["own"], device), micros)


def timed(calls: Sequence[Call], device: torch.device) -> float:
    """Microseconds of one call, the median of REPEATS rounds of all."""
    if device.type != "cuda":
        for call in calls:
            call()
        rounds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for call in calls:
                call()
            rounds.append(time.perf_counter() - start)
        return statistics.median(rounds) / len(calls) * 1e6
    graph = captured(calls)
    for _ in range(3):
        graph.replay()
    rounds = []
    for _ in range(REPEATS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        rounds.append(before.elapsed_time(after))
    return statistics.median(rounds) / len(calls) * 1e3


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, in one graph. They run once before, to compile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def launches(call: Call, device: torch.device) -> int | None:
    """Triton kernels that one call launches; None on a CPU, whose reference launches none."""
    if device.type != "cuda":
        return None
    from tucka_runtime.kernels.fused import launch

    counting = launch.Counter()
    real, launch.starter = launch.starter, counting
    try:
        call()
    finally:
        launch.starter = real
    return counting.count


def table(results: Sequence[Timed]) -> str:
    """Results of one op as lines of text; × are times of our own over the other's: under 1 is faster."""
    if not results:
        return ""
    shape = list(dict.fromkeys(key for r in results for key in r.shape))
    others = list(dict.fromkeys(name for r in results for name in r.micros if name != "own"))
    head = [*shape, "us", "GB/s", "launches", *(f"×{name}" for name in others)]
    rows = []
    for r in results:
        rows.append(
            [
                *(str(r.shape.get(key, "")) for key in shape),
                f"{r.micros['own']:.1f}",
                f"{r.gb_per_s:.0f}",
                "-" if r.launches is None else str(r.launches),
                *(f"{r.ratio(name):.2f}" if name in r.micros else "" for name in others),
            ]
        )
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([results[0].op, *lines])
