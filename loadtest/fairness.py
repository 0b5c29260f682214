"""Does one adapter's flood make another wait? The same load, evenly spread and all on one, beside a quiet adapter.

In every phase `concurrency` requests are in flight all the time, and the quiet adapter sends one now and then. Evenly:
each of the other adapters has as many of them. Flood: the first has all. What is compared was measured in one run, on
one server, in alternating phases: ratios hold on a busy machine where seconds do not.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.client import LoadClient
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report import metrics, stats
from tucka_runtime.loadtest.report.table import columns, number
from tucka_runtime.loadtest.session import Session, SessionResult, choose_models
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import Workload

CONCURRENCY = 100
SECONDS = 20.0  # of a phase
SETTLE = 0.2  # share of a phase before tokens are counted
ALONE = 5  # requests of the quiet adapter without any other
PHASES = ("even", "flood")


@dataclass
class Phase:
    """What one phase left. `tokens` are the events that came once it had settled, by model, in `seconds`."""

    seconds: float = 0.0
    tokens: Counter[str] = field(default_factory=Counter)
    ttfts: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


class Fairness:
    """`quiet` is the last of the models, the flood the first's."""

    def __init__(self, settings: Settings, quiet_rate: float) -> None:
        self.settings, self.quiet_rate = settings, quiet_rate
        self.concurrency = settings.concurrency or CONCURRENCY
        self.seconds = settings.duration or SECONDS
        self.numbers = itertools.count()
        self.phases: dict[str, list[Phase]] = {name: [] for name in PHASES}
        self.alone: list[float] = []

    async def execute(self) -> dict[str, Any]:
        """Raises ConfigError with fewer than three adapters, ServerError."""
        async with LoadClient(self.settings) as client:
            models, base = choose_models(self.settings, await client.models())
            if len(models) < 3:
                raise ConfigError("fairness needs a flood, others and a quiet one: three adapters (--models)")
            *self.loud, self.quiet = models
            self.client = client
            session = SessionResult(self.settings, models, base)
            scale = await Session(self.settings).measure_tokens(client, self.quiet, session)
            self.workload = Workload(self.settings, models, base, scale)
            for _ in range(ALONE):
                self.alone += first_tokens([await self.ask(self.quiet, [])])
            for repeat in range(self.settings.repeats):
                for name in PHASES if repeat % 2 == 0 else reversed(PHASES):
                    self.phases[name].append(await self.phase(self.loud if name == "even" else self.loud[:1]))
        return self.result()

    async def phase(self, loud: Sequence[str]) -> Phase:
        """All of `loud` in closed loops, the quiet one in an open loop, for some seconds."""
        began = time.perf_counter()
        self.client.clock = lambda: time.perf_counter() - began
        others: list[Record] = []
        workers = [
            asyncio.create_task(self.repeat(loud[number % len(loud)], others)) for number in range(self.concurrency)
        ]
        rng = random.Random(f"{self.settings.seed}/quiet")
        mine: list[Record] = []
        asked: list[asyncio.Task[Record]] = []
        due = SETTLE * self.seconds
        while due < self.seconds:
            await asyncio.sleep(due - self.client.clock())  # what is late is asked at once: the loop is open
            asked.append(asyncio.create_task(self.ask(self.quiet, mine)))
            due += rng.expovariate(self.quiet_rate)
        await asyncio.sleep(self.seconds - self.client.clock())
        end = self.client.clock()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await asyncio.gather(*asked)  # what still waits has waited at least until now
        return self.counted(others, mine, end)

    def counted(self, others: list[Record], mine: list[Record], end: float) -> Phase:
        settled = SETTLE * self.seconds
        phase = Phase(end - settled, ttfts=first_tokens(mine))
        for record in [*others, *mine]:
            phase.tokens[record.model] += sum(settled <= at <= end for at, _ in record.events)
            if record.cause is not None:
                phase.failures[record.cause] += 1
        return phase

    async def repeat(self, model: str, records: list[Record]) -> None:
        while True:
            if not (await self.ask(model, records)).ok:
                await asyncio.sleep(0.1)

    async def ask(self, model: str, records: list[Record]) -> Record:
        number = next(self.numbers)
        turn = self.workload.conversation(number, instead=model).turns[0]
        body = self.client.body(model, list(turn.messages) or turn.text, turn.max_tokens, self.settings.temperature)
        record = Record("load", model, number)
        records.append(record)
        return await self.client.generate(record, body)

    def result(self) -> dict[str, Any]:
        """All figures; `ratio` is the quiet adapter's p99 of TTFT in the flood to that beside the even load."""
        found: dict[str, Any] = {}
        for name, phases in self.phases.items():
            seconds = sum(phase.seconds for phase in phases)
            tokens = sum((phase.tokens for phase in phases), Counter())
            failures = sum((phase.failures for phase in phases), Counter())
            ttfts = [ttft for phase in phases for ttft in phase.ttfts]
            found[name] = {
                "quiet_requests": len(ttfts),
                **metrics.spread("ttft", ttfts, (50, 99)),
                "output_throughput": sum(tokens.values()) / seconds,
                "tokens": dict(tokens),
                "failures": dict(failures),
            }
        even, flood = (found[name]["p99_ttft_ms"] for name in PHASES)
        equals = [found["even"]["tokens"].get(model, 0) for model in self.loud]
        return {
            "format": "tucka-loadtest-fairness/1",
            "quiet": self.quiet,
            "flood": self.loud[0],
            "concurrency": self.concurrency,
            "alone_ttft_ms": 1000 * stats.percentile(self.alone, 50) if self.alone else None,
            "phases": found,
            "ratio": _ratio(flood, even),
            "flood_to_alone": _ratio(flood, 1000 * stats.percentile(self.alone, 50) if self.alone else None),
            "jain_equals": stats.jain(equals),
            "throughput_ratio": _ratio(found["flood"]["output_throughput"], found["even"]["output_throughput"]),
        }


def first_tokens(records: Sequence[Record]) -> list[float]:
    return [metrics.Latency(record).ttft for record in records if record.ok]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def render(result: dict[str, Any]) -> str:
    """The table and the verdict's figures."""
    rows = [["load", "quiet requests", "median TTFT", "p99 TTFT (ms)", "tok/s of all", "failed"]]
    for name, phase in result["phases"].items():
        figures = (phase["median_ttft_ms"], phase["p99_ttft_ms"], phase["output_throughput"])
        failed = str(sum(phase["failures"].values()))
        rows.append([name, str(phase["quiet_requests"]), *map(number, figures), failed])
    return "\n".join(
        [
            f"  {result['concurrency']} in flight: spread evenly, or all on {result['flood']}; beside them "
            f"{result['quiet']}, alone {number(result['alone_ttft_ms'])} ms",
            *columns(rows),
            f"  quiet p99 TTFT, flood / even: {number(result['ratio'])}",
            f"  quiet p99 TTFT in the flood / its median alone: {number(result['flood_to_alone'])}",
            f"  tokens per second, flood / even: {number(result['throughput_ratio'])}",
            f"  Jain's index of the others' tokens, even: {number(result['jain_equals'])}",
        ]
    )
