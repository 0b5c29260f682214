"""A server whose work is timed: requests to it, and what it says of itself."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tucka_runtime.client import Client
from tucka_runtime.loadtest.client import LoadClient, ServerError
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.workload import WORDS

FEW, MANY = 8, 56
"""Tokens of the answers of two runs that differ in nothing else: the difference is decoding alone."""
STREAM = 512
"""Tokens of a stream that is there while others are timed."""
MOST_LOADS = 64
"""Adapters that are asked one after the other to see how long loads take, if not more are needed to go through all
slots twice."""


@dataclass
class TimedServer:
    """One server: `names` are its adapters, of which `slots` can be in a batch at once; `longest` is the base's context
    in tokens."""

    load: LoadClient
    admin: Client
    names: list[str]
    slots: int
    longest: int
    rng: random.Random

    async def ask(self, name: str, words: int, tokens: int) -> Record:
        """One request of random words, so that no KV is reused. Raises ServerError."""
        body = self.load.body(name, " ".join(self.rng.choices(WORDS, k=words)), tokens, 0.0)
        record = await self.load.generate(Record("load", name), body)
        if not record.ok:
            raise ServerError(f"a request failed ({record.cause}): {record.detail or 'no details'}")
        return record

    async def together(self, rows: int, adapters: int, tokens: int) -> float:
        """Seconds that so many requests take, which begin at once, evenly of so many adapters."""
        begin = time.perf_counter()
        await asyncio.gather(*(self.ask(self.names[i % adapters], 1, tokens) for i in range(rows)))
        return time.perf_counter() - begin

    async def step(self, rows: int, adapters: int) -> float:
        """Seconds of a step that only decodes, by how much longer long answers take than short ones."""
        short, long = [await self.together(rows, adapters, tokens) for tokens in (FEW, MANY)]
        return max((long - short) / (MANY - FEW), 0.0)

    @asynccontextmanager
    async def streaming(self, name: str) -> AsyncIterator[None]:
        """One answer after the other is streamed meanwhile."""

        async def stream() -> None:
            while True:
                await self.ask(name, 1, min(STREAM, self.longest // 2))

        task = asyncio.create_task(stream())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def window(self, work: Coroutine[Any, Any, object]) -> "Window":
        """What the server does while `work` is."""
        before, begin = self.scrape(), time.perf_counter()
        await work
        seconds, now = time.perf_counter() - begin, self.scrape()
        _, loads = now.since(before, "tucka_adapter_transition_seconds", transition="load")
        return Window(seconds, now("tucka_steps_total") - before("tucka_steps_total"), loads, now.read_since(before))

    async def each(self, names: list[str]) -> None:
        """A request for each, one after the other."""
        for name in names:
            await self.ask(name, 1, 1)

    @property
    def cycled(self) -> list[str]:
        """As many adapters as come and go where they are asked one after the other."""
        return self.names[: max(MOST_LOADS, 2 * self.slots)]

    def scrape(self) -> "Totals":
        return Totals(self.admin.get("/metrics").decode())


class Totals:
    """A scrape."""

    def __init__(self, text: str) -> None:
        self._samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        return sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items())

    def since(self, before: "Totals", histogram: str, **labels: str) -> tuple[float, float]:
        """What was added to a histogram's sum and count."""
        total, count = (self(f"{histogram}_{what}", **labels) for what in ("sum", "count"))
        return total - before(f"{histogram}_sum", **labels), count - before(f"{histogram}_count", **labels)

    def read_since(self, before: "Totals") -> float:
        """Seconds of a load from the disk that were the engine's own work."""
        stages = [self.since(before, "tucka_load_duration_seconds", stage=stage) for stage in ("read", "fold")]
        return sum(total / count for total, count in stages if count)


@dataclass(frozen=True)
class Window:
    """Some time of a server: the steps in it, loads from the disk, and what those took of the engine itself, each."""

    seconds: float
    steps: float
    loads: float
    read: float
