"""Adapters that come and go during the run: load, reload (unload, then load) and unload, at Poisson times.

A router in front of a server knows which adapters are there; so the tester sends nothing to an adapter while it is
away (its conversations go to others, drawn again), and it forgives a 404 only to requests that were on their way while
their adapter was being changed. With `drain` it waits for their answers before it unloads. At the end all adapters are
loaded again with their first path.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.client import LoadClient, ModelCard
from tucka_runtime.loadtest.record import Record

DRAIN_INTERVAL = 0.01  # seconds between looks at whether an adapter's requests are answered


@dataclass
class ChurnedAdapter:
    """One adapter under churn. `generation` counts its loads. `absent` are the times when it was away; `swapped` those
    of reloads in place, during which it must answer, either as before or as after."""

    name: str
    paths: tuple[str, ...]
    loaded: bool = True
    steady: bool = True
    generation: int = 0
    absent: list[tuple[float, float]] = field(default_factory=list)
    swapped: list[tuple[float, float]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.paths[self.generation % len(self.paths)]


def adapters(given: Iterable[str], cards: Iterable[ModelCard], in_use: Iterable[str]) -> list[ChurnedAdapter]:
    """The adapters that NAME=PATH[,PATH] flags name; without flags, all in use whose path /v1/models tells."""
    pool = []
    for item in given:
        name, _, paths = item.partition("=")
        if not name or not all(paths.split(",")):
            raise ConfigError("--churn-adapter must be NAME=PATH or NAME=PATH,PATH")
        pool.append(ChurnedAdapter(name, tuple(paths.split(","))))
    if not pool:
        cards = list(cards)
        bases = {c.name for c in cards if c.parent is None} | {c.root for c in cards if c.parent is None}
        roots = {c.name: c.root for c in cards if c.parent is not None and c.root and c.root not in bases}
        pool = [ChurnedAdapter(name, (str(roots[name]),)) for name in in_use if name in roots]
    if not pool:
        raise ConfigError("--churn-rate needs --churn-adapter NAME=PATH: /v1/models does not tell the adapters' paths")
    return pool


class Churn:
    """Runs beside the load. `on_loaded(name)` is called after each load that worked."""

    def __init__(
        self,
        client: LoadClient,
        pool: list[ChurnedAdapter],
        rate: float,
        inplace: bool,
        drain: bool,
        seed: int,
        on_loaded: Callable[[str], Coroutine[Any, Any, None]],
        on_probe: Callable[[Record], None],
    ) -> None:
        self.client, self.rate, self.inplace, self.drain = client, rate, inplace, drain
        self.on_loaded, self.on_probe = on_loaded, on_probe
        self.pool = {adapter.name: adapter for adapter in pool}
        self.rng = random.Random(f"{seed}/churn")
        self.events: list[dict[str, Any]] = []
        self.callbacks: set[asyncio.Task[None]] = set()

    def serves(self, model: str) -> bool:
        """Whether requests to this model may be sent now."""
        adapter = self.pool.get(model)
        return adapter is None or (adapter.loaded and adapter.steady)

    def generation(self, model: str) -> int:
        return self.pool[model].generation if model in self.pool else 0

    def path(self, model: str) -> str | None:
        return self.pool[model].path if model in self.pool else None

    def absent_during(self, model: str, start: float, end: float) -> bool:
        """Whether the model was away at any time between start and end."""
        return model in self.pool and _overlap(self.pool[model].absent, start, end)

    def changed_during(self, model: str, start: float, end: float) -> bool:
        """Whether it was away or exchanged in place."""
        swapped = model in self.pool and _overlap(self.pool[model].swapped, start, end)
        return swapped or self.absent_during(model, start, end)

    async def run(self, until: asyncio.Event) -> None:
        """Changes one adapter after another until the event is set; never unloads more than half of them."""
        while not until.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), self.rng.expovariate(self.rate))
            if not until.is_set():
                await self.change(self.rng.choice(list(self.pool.values())))

    async def change(self, adapter: ChurnedAdapter) -> None:
        away = sum(not a.loaded for a in self.pool.values())
        if not adapter.loaded:
            await self.load(adapter, "load")
        elif away < len(self.pool) // 2 and self.rng.random() < 0.5:
            await self.unload(adapter, "unload")
        elif self.inplace:
            await self.swap(adapter)
        else:
            await self.unload(adapter, "reload")
            await self.load(adapter, "reload")

    async def unload(self, adapter: ChurnedAdapter, action: str) -> None:
        adapter.steady = False
        while self.drain and self.client.running[adapter.name]:
            await asyncio.sleep(DRAIN_INTERVAL)
        adapter.absent.append((self.client.clock(), math.inf))
        if await self.tell(action, "unload", adapter):
            adapter.loaded = False
            body = self.client.body(adapter.name, "the", 1, 0.0)
            self.on_probe(await self.client.generate(Record("probe", adapter.name), body))
        else:
            self.settle(adapter)

    def settle(self, adapter: ChurnedAdapter) -> None:
        adapter.steady = True
        if adapter.absent:
            adapter.absent[-1] = (adapter.absent[-1][0], self.client.clock())

    async def load(self, adapter: ChurnedAdapter, action: str) -> None:
        adapter.generation += 1
        if await self.tell(action, "load", adapter):
            adapter.loaded = True
            self.settle(adapter)
            self.announce(adapter)
        elif adapter.loaded:  # it could not be unloaded before: the server has what it had
            adapter.generation -= 1

    async def swap(self, adapter: ChurnedAdapter) -> None:
        """The next path under the same name, which stays there. What is sent from now on is compared to no answer but
        the old or the new one; after the server's 200 only to the new."""
        adapter.swapped.append((self.client.clock(), math.inf))
        adapter.generation += 1
        ok = await self.tell("reload", "load", adapter, inplace=True)
        adapter.swapped[-1] = (adapter.swapped[-1][0], self.client.clock())
        if ok:
            self.announce(adapter)
        else:
            adapter.generation -= 1

    def announce(self, adapter: ChurnedAdapter) -> None:
        task = asyncio.create_task(self.on_loaded(adapter.name))
        self.callbacks.add(task)
        task.add_done_callback(self.callbacks.discard)

    async def tell(self, action: str, call: str, adapter: ChurnedAdapter, inplace: bool = False) -> bool:
        at = self.client.clock()
        path = adapter.path if call == "load" else None
        status, detail = await self.client.adapter(call, adapter.name, path, inplace)
        ok = 200 <= status < 300
        event = {"at": at, "action": action, "call": call, "name": adapter.name, "path": adapter.path, "status": status}
        self.events.append(event | {"seconds": self.client.clock() - at, "ok": ok} | ({} if ok else {"detail": detail}))
        return ok

    async def restore(self) -> None:
        """Everything loaded again, from its first path; what was exchanged in place as well (see Session.put)."""
        if self.callbacks:
            await asyncio.wait(self.callbacks)
        for adapter in self.pool.values():
            if not (adapter.loaded and adapter.path == adapter.paths[0]) or adapter.swapped:
                if adapter.loaded:
                    await self.tell("restore", "unload", adapter)
                adapter.generation = 0
                adapter.loaded = adapter.steady = await self.tell("restore", "load", adapter)
            adapter.generation, adapter.absent, adapter.swapped = 0, [], []


def _overlap(times: list[tuple[float, float]], start: float, end: float) -> bool:
    return any(first < end and start < last for first, last in times)
