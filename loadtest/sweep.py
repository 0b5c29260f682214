"""The knee: the highest rate at which the SLO still holds.

Rates grow by half until one fails, then the gap between the highest that held and the lowest that failed is halved
until it is narrower than `tolerance`. A rate holds if the share of requests that were answered within every limit is
at least `share`. If the client was the limit at a rate, that rate says nothing about the server: the sweep ends. It
ends too, without a point for that rate, where it is interrupted or a run sends nothing.
"""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.loadtest.report.table import columns, number

GROWTH = 1.5
POINT = (
    "request_throughput", "request_goodput", "output_throughput",
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
)  # fmt: skip


@dataclass
class Sweep:
    """`measure(rate)` gives a result as report.build does."""

    measure: Callable[[float], Awaitable[dict[str, Any]]]
    share: float
    start: float
    tolerance: float
    most_runs: int
    points: list[dict[str, Any]] = field(default_factory=list)

    async def execute(self) -> dict[str, Any]:
        low, high, rate = 0.0, math.inf, self.start
        ended = "runs"
        while len(self.points) < self.most_runs:
            result = await self.measure(rate)
            if interrupted(result):
                ended = "interrupted"
                break
            if result["good_share"] is None:
                ended = "nothing"
                break
            point = self.point(rate, result)
            if point["client_limited"]:
                ended = "client"
                break
            if point["holds"]:
                low = rate
            else:
                high = rate
            if math.isinf(high):
                rate = low * GROWTH
            elif low == 0:
                rate = high / 2
            elif high - low <= self.tolerance * low:
                ended = "found"
                break
            else:
                rate = (low + high) / 2
        return {"knee": low or None, "fails_at": None if math.isinf(high) else high, "ended": ended}

    def point(self, rate: float, result: dict[str, Any]) -> dict[str, Any]:
        share = result["good_share"]
        point = {"rate": rate, "good_share": share, "holds": share >= self.share} | {n: result.get(n) for n in POINT}
        self.points.append(point | {"client_limited": result["client_limited"], "result": result})
        return self.points[-1]


def interrupted(result: dict[str, Any]) -> bool:
    return any(run["interrupted"] for run in result["runs"] + result["base_runs"])


def default_limits(alone: dict[str, Any]) -> tuple[str, ...]:
    """Limits where none were given: five times the TTFT and three times the TPOT of requests sent one at a time."""
    limits = [f"ttft:{max(1.0, 5 * (alone['median_ttft_ms'] or 0)):.0f}"]
    if alone["median_tpot_ms"]:
        limits.append(f"tpot:{max(1.0, 3 * alone['median_tpot_ms']):.0f}")
    return tuple(limits)


ENDINGS = {
    "found": "",
    "runs": " (not narrowed further: --most-runs)",
    "client": " (the sweep ended there: the client, not the server, was the limit)",
    "interrupted": " (the sweep was interrupted)",
    "nothing": " (the sweep ended: a run sent no request; give a longer --duration or a higher --start-rate)",
}


def render(outcome: dict[str, Any]) -> str:
    head = ["rate (1/s)", "good", "answered (1/s)", "tok/s", "median TTFT", "p99 TTFT", "median TPOT", ""]
    rows = [head]
    for p in sorted(outcome["points"], key=lambda p: p["rate"]):
        names = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")
        row = [number(p["rate"]), f"{p['good_share']:.1%}", *(number(p[name]) for name in names)]
        rows.append([*row, "client limited" if p["client_limited"] else "holds" if p["holds"] else "fails"])
    limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in outcome["goodput_slo_ms"].items())
    lines = columns(rows)
    where = f"{number(outcome['knee'])} conversations/s" if outcome["knee"] else "no rate held"
    lines.append(f"  knee: {where} with {outcome['share']:.0%} of requests at {limits}{ENDINGS[outcome['ended']]}")
    return "\n".join(lines)
