"""Makes a profile of servers that run: closed loops of a few timed requests, and the servers' own figures of loads."""

import asyncio
import json
import os
import platform
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, median
from urllib.parse import quote

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tucka_runtime.client import Client
from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.client import LoadClient, ServerError
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import WORDS
from tucka_runtime.planning.profile import Profile

ROWS = (1, 2, 4, 8, 16, 32)
FEW, MANY = 8, 56
"""Tokens of the answers of two runs that differ in nothing else: the difference is decoding alone."""
PROMPT_WORDS = (8, 32, 96, 192)
ROUNDS = 3
MOST_LOADS = 64
"""Adapters that are asked one after the other to see how long loads take, twice."""

Say = Callable[[str], None]


@dataclass
class Measuring:
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

    def scrape(self) -> "Totals":
        return Totals(self.admin.get("/metrics").decode())


class Totals:
    """A scrape."""

    def __init__(self, text: str) -> None:
        self._samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        return sum(s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items())


def measure(
    urls: list[str], api_key: str | None, command: str, say: Say, rows_timed: tuple[int, ...] = ROWS
) -> Profile:
    """The mean of several servers, measured at the same time: so what those on one machine cost each other is in it.
    `rows_timed` are the numbers of decoding sequences that are timed, in rising order.

    Raises ServerError, and ConfigError for servers that say nothing of loads."""
    return asyncio.run(_measure(urls, api_key, command, say, rows_timed))


async def _measure(
    urls: list[str], api_key: str | None, command: str, say: Say, rows_timed: tuple[int, ...]
) -> Profile:
    async with AsyncExitStack() as stack:
        servers = []
        for number, url in enumerate(urls):
            load = await stack.enter_async_context(LoadClient(Settings(url=url, api_key=api_key, ignore_eos=True)))
            cards = [card for card in await load.models() if card.parent is not None]
            if not cards:
                raise ConfigError("The server has no adapters, so that nothing can be timed. Load some.")
            admin = Client(url, api_key)
            slots = int(Totals(admin.get("/metrics").decode())("tucka_adapter_slots"))
            if not slots:
                raise ConfigError("/metrics says nothing of adapter slots: only tucka serve can be measured.")
            longest = cards[0].max_model_len or 2048
            servers.append(Measuring(load, admin, [card.name for card in cards], slots, longest, random.Random(number)))

        say("loads")
        loads = await asyncio.gather(*map(_loads, servers))
        most = min(min(len(server.names), server.slots) for server in servers)
        adapters = [min(rows, most) for rows in rows_timed]
        one: list[float] = []
        own: list[float] = []
        for rows, some in zip(rows_timed, adapters, strict=True):
            say(f"steps of {rows}")
            one.append(await _step(servers, rows, 1))
            own.append(await _step(servers, rows, some) if some > 1 else one[-1])
        say("prompts")
        fits = await asyncio.gather(*map(_prompts, servers))
    prompt_token, alone = (max(mean(values), 0.0) for values in zip(*fits, strict=True))
    return Profile(
        rows=list(rows_timed),
        one_adapter=one,
        adapters=adapters,
        own_adapters=own,
        prompt_token=prompt_token,
        load=mean(found.load for found in loads),
        activate=mean(found.activate for found in loads),
        request=max(alone - one[0] + prompt_token, 0.0),
        adapter_bytes=round(mean(found.bytes for found in loads)),
        measured={
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": f"{os.getloadavg()[0]:.1f}",
            "servers": str(len(servers)),
            "command": command,
        },
    )


async def _step(servers: list[Measuring], rows: int, adapters: int) -> float:
    """Seconds of a step that only decodes, by how much longer long answers take than short ones."""

    async def one(server: Measuring) -> float:
        for name in server.names[:adapters]:  # they are resident then
            await server.ask(name, 1, 1)
        differences = []
        for _ in range(ROUNDS):
            short, long = [await server.together(rows, adapters, tokens) for tokens in (FEW, MANY)]
            differences.append((long - short) / (MANY - FEW))
        return max(median(differences), 0.0)

    return mean(await asyncio.gather(*map(one, servers)))


async def _prompts(server: Measuring) -> tuple[float, float]:
    """What a token of a prompt adds to a request that is alone, and what is left of that without any: a line through
    the times of prompts of several lengths."""
    await server.ask(server.names[0], 1, 1)
    tokens, seconds = [], []
    for words in PROMPT_WORDS:
        if 8 * words > server.longest:
            break
        records = [await server.ask(server.names[0], words, 1) for _ in range(ROUNDS)]
        tokens.append(mean(record.prompt_tokens or words for record in records))
        seconds.append(median(record.end - record.start for record in records))
    if len(tokens) < 2:
        raise ConfigError("The base's context is too short to tell what a token of a prompt costs.")
    slope, rest = np.polyfit(tokens, seconds, 1)
    return float(slope), float(rest)


@dataclass(frozen=True)
class Loads:
    """Seconds into a slot from the disk and from the host cache, and bytes of an adapter."""

    load: float
    activate: float
    bytes: float


async def _loads(server: Measuring) -> Loads:
    """Asks adapters one after the other, so that those beyond the slots come and go. Where none came from the disk
    meanwhile, what the server took at its start stands for it.

    Raises ConfigError where nothing came."""
    names = server.names[:MOST_LOADS]
    before = server.scrape()
    for name in names * 2:
        await server.ask(name, 1, 1)
    now = server.scrape()

    def seconds(transition: str) -> float | None:
        series = "tucka_adapter_transition_seconds"
        total, some = (
            now(f"{series}_{what}", transition=transition) - before(f"{series}_{what}", transition=transition)
            for what in ("sum", "count")
        )
        return total / some if some else None

    load, activate = seconds("load"), seconds("activate")
    if load is None and activate is None:
        raise ConfigError("All adapters have a slot: to time loads, start the server with fewer --adapter-slots.")
    if load is None:
        stages = [(now("tucka_load_duration_seconds_sum", stage=s), now("tucka_load_duration_seconds_count", stage=s))
                  for s in ("read", "fold")]  # fmt: skip
        load = sum(total / some for total, some in stages if some)
    cards = [json.loads(server.admin.get(f"/v1/adapters/{quote(name, safe='')}")) for name in names]
    return Loads(load, load if activate is None else activate, mean(card["tucka"]["bytes"] for card in cards))
