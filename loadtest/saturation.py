"""Was the client the limit? Measurements of the tester itself while it runs, and a verdict.

A timer that fires late was either held up by the tester's own work, or by a machine that had no core free for it: the
kernel counts the second for each thread.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

from tucka_runtime.loadtest.report import stats

INTERVAL = 0.02  # seconds between looks at the event loop
# A lag is too long when it exceeds both an absolute floor that idle machines reach now and then and a share of what
# it distorts: event-loop lag is an error of every time stamp (so of TTFT, held against the same percentile), schedule
# lag bends the arrival process.
LOOP_FLOOR, LOOP_SHARE = {50: 0.002, 99: 0.010}, 0.10
SEND_FLOOR, SEND_SHARE = 0.010, 0.10
CPU_LIMIT = 0.85  # of one core: the event loop has one


class ClientWatch:
    """Samples the event loop's lag (how late a timer fires), how much of it its thread waited for a core, and the
    process's CPU time between start() and stop()."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self.waits: list[float] = []
        self.cpu_share = 0.0
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            before, waited = time.perf_counter(), waited_for_a_core()
            await asyncio.sleep(INTERVAL)
            self.lags.append(time.perf_counter() - before - INTERVAL)
            self.waits.append(waited_for_a_core() - waited)

    async def stop(self) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        wall = time.perf_counter() - self.began
        self.cpu_share = (time.process_time() - self.cpu_began) / wall


def waited_for_a_core() -> float:
    """Seconds that this thread was ready to run and did not, since it began; 0 where the kernel does not tell."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def verdict(
    loop_lags: Sequence[float],
    core_waits: Sequence[float],
    cpu_share: float,
    send_lags: Sequence[float],
    mean_gap: float | None,
    ttfts: Sequence[float],
    capped: bool,
) -> dict[str, Any]:
    """Lags, all in seconds. `core_waits`: how much of each loop lag was waiting for a core. `send_lags`: actual start
    minus planned start, open loop only. `mean_gap`: mean planned gap between starts. `capped`: --concurrency holds an
    open loop back, so late sends are what was asked for.

    `reasons` say how the client was the limit, `warnings` what the machine did to its times."""
    own_lags = [max(lag - wait, 0.0) for lag, wait in zip(loop_lags, core_waits, strict=True)]
    loop = {p: stats.percentile(loop_lags, p) if loop_lags else 0.0 for p in LOOP_FLOOR}
    own = {p: stats.percentile(own_lags, p) if own_lags else 0.0 for p in LOOP_FLOOR}
    send_p99 = stats.percentile(send_lags, 99) if send_lags else None
    reasons, warnings = [], []
    for p, lag in loop.items():
        limit = max(LOOP_FLOOR[p], LOOP_SHARE * stats.percentile(ttfts, p)) if ttfts else math.inf
        if own[p] > limit:
            reasons.append(f"its event loop ran {own[p] * 1000:.0f} ms late (p{p}): times are that uncertain")
        elif lag > limit:
            warnings.append(f"the client waited {lag * 1000:.0f} ms for a core (p{p}): times are that uncertain")
    if send_p99 is not None and send_p99 > max(SEND_FLOOR, SEND_SHARE * (mean_gap or 0.0)):
        if capped:
            reasons.append(f"--concurrency held requests back by {send_p99 * 1000:.0f} ms (p99): the loop was not open")
        else:
            late = f"requests left {send_p99 * 1000:.0f} ms late (p99): the arrivals were not as planned"
            (warnings if warnings and not reasons else reasons).append(late)
    if cpu_share > CPU_LIMIT:
        reasons.append(f"it used {cpu_share:.0%} of a core")
    return {
        "client_limited": bool(reasons),
        "reasons": reasons,
        "warnings": warnings,
        "cpu_share": cpu_share,
        "loop_lag_p50_ms": loop[50] * 1000,
        "loop_lag_p99_ms": loop[99] * 1000,
        "loop_lag_max_ms": max(loop_lags, default=0.0) * 1000,
        "send_lag_p99_ms": None if send_p99 is None else send_p99 * 1000,
        "send_lag_max_ms": max(send_lags) * 1000 if send_lags else None,
    }
