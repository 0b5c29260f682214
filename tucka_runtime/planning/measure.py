"""Makes a profile of servers that run: closed loops of a few timed requests, and the servers' own figures of loads."""

import asyncio
import json
import os
import platform
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, median
from urllib.parse import quote

import numpy as np

from tucka_runtime.client import Client
from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.client import LoadClient
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.timed_server import TimedServer, Totals, Window

ROWS = (1, 2, 4, 8, 16, 32)
PROMPT_WORDS = (1, 4, 8, 16, 32, 64, 128, 256)
ROUNDS = 5
"""Of everything, one after the other: a machine that is slower for a while is so for all that is timed."""
ALONE_SECONDS = 1.0

Say = Callable[[str], None]


def measure(
    urls: list[str], api_key: str | None, command: str, say: Say, rows_timed: tuple[int, ...] = ROWS
) -> Profile:
    """Of the first server; of several, which share a machine, also what steps of all at once take. `rows_timed` are the
    numbers of decoding sequences that are timed, in rising order.

    Raises ServerError, and ConfigError for servers that say nothing of loads."""
    return asyncio.run(_measure(urls, api_key, command, say, rows_timed))


async def _measure(
    urls: list[str], api_key: str | None, command: str, say: Say, rows_timed: tuple[int, ...]
) -> Profile:
    async with AsyncExitStack() as stack:
        servers = [await _reached(stack, url, api_key) for url in urls]
        one = servers[0]
        say("loads")
        loads = await _loads(one)
        say("loads beside a stream")
        beside = await _beside(one)
        adapters = [min(rows, len(one.names), one.slots) for rows in rows_timed]
        await one.each(one.names[: max(adapters)])  # they are resident then
        await asyncio.gather(*(server.each(server.names[:1]) for server in servers[1:]))
        alone: dict[int, list[float]] = {rows: [] for rows in rows_timed}
        own: dict[int, list[float]] = {rows: [] for rows in rows_timed}
        crowded, prompts = [], []
        for number in range(ROUNDS):
            say(f"steps and prompts, {number + 1} of {ROUNDS}")
            for rows, some in zip(rows_timed, adapters, strict=True):
                alone[rows].append(await one.step(rows, 1))
                own[rows].append(await one.step(rows, some) if some > 1 else alone[rows][-1])
            if len(servers) > 1:
                together = await asyncio.gather(*(server.step(1, 1) for server in servers))
                crowded.append(mean(together) / max(alone[rows_timed[0]][-1], 1e-9))
            prompts.append(await _prompts(one))
    one_adapter = [median(alone[rows]) for rows in rows_timed]
    tokens, prefills, beyond = (
        np.median(values, axis=0)
        for values in zip(*((one.tokens, one.seconds, one.beyond) for one in prompts), strict=True)
    )
    return Profile(
        rows=list(rows_timed),
        one_adapter=one_adapter,
        adapters=adapters,
        own_adapters=[median(own[rows]) for rows in rows_timed],
        prompt_tokens=tokens.tolist(),
        prompt_seconds=np.maximum.accumulate(np.maximum(prefills - one_adapter[0], 0.0)).tolist(),
        load=loads.load,
        load_beside=max(loads.load + beside.read - loads.read, 0.0) if beside.read else loads.load,
        step_beside=beside.step,
        activate=loads.activate,
        request=max(float(np.median(beyond)), 0.0),
        servers=len(servers),
        crowded=max(median(crowded), 1.0) if crowded else 1.0,
        adapter_bytes=round(loads.bytes),
        measured={
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": f"{os.getloadavg()[0]:.1f}",
            "command": command,
        },
    )


async def _reached(stack: AsyncExitStack, url: str, api_key: str | None) -> TimedServer:
    load = await stack.enter_async_context(LoadClient(Settings(url=url, api_key=api_key, ignore_eos=True)))
    cards = [card for card in await load.models() if card.parent is not None]
    if not cards:
        raise ConfigError("The server has no adapters, so that nothing can be timed. Load some.")
    admin = Client(url, api_key)
    slots = int(Totals(admin.get("/metrics").decode())("tucka_adapter_slots"))
    if not slots:
        raise ConfigError("/metrics says nothing of adapter slots: only tucka serve can be measured.")
    longest = cards[0].max_model_len or 2048
    return TimedServer(load, admin, [card.name for card in cards], slots, longest, random.Random())


@dataclass(frozen=True)
class Prompts:
    """Of requests that are alone, by the lengths of their prompts: those in tokens, seconds of the engine's work until
    the first token, and what the first token takes beyond that."""

    tokens: list[float]
    seconds: list[float]
    beyond: list[float]


async def _prompts(server: TimedServer) -> Prompts:
    """Raises ConfigError where the server does not say what prompts take."""
    found = Prompts([], [], [])
    await server.each(server.names[:1])
    for words in PROMPT_WORDS:
        if 8 * words > server.longest:
            break
        before = server.scrape()
        records = [await server.ask(server.names[0], words, 1) for _ in range(3)]
        prefill, count = server.scrape().since(before, "tucka_request_prefill_seconds")
        if not count:
            raise ConfigError("/metrics says nothing of prompts: only tucka serve can be measured.")
        found.tokens.append(mean(record.prompt_tokens or words for record in records))
        found.seconds.append(prefill / count)
        found.beyond.append(mean(record.events[0][0] - record.start for record in records) - found.seconds[-1])
    if len(found.tokens) < 2:
        raise ConfigError("The base's context is too short to tell what a token of a prompt costs.")
    return found


@dataclass(frozen=True)
class Loads:
    """Seconds into a slot from the disk and from the host cache, those of the former that are the engine's own work,
    and bytes of an adapter."""

    load: float
    activate: float
    read: float
    bytes: float


async def _loads(server: TimedServer) -> Loads:
    """Asks adapters one after the other, and back again: those beyond the slots and the host cache come from the disk,
    and on the way back the others from the host cache. Where none came from the disk, what the server took at its start
    stands for it.

    Raises ConfigError where nothing came."""
    names = server.cycled
    before = server.scrape()
    await server.each(names + names[::-1])
    now = server.scrape()
    (load, loads), (activate, activations) = (
        now.since(before, "tucka_adapter_transition_seconds", transition=transition)
        for transition in ("load", "activate")
    )
    if not loads and not activations:
        raise ConfigError("All adapters have a slot: to time loads, start the server with fewer --adapter-slots.")
    read = now.read_since(before if loads else Totals(""))
    load = load / loads if loads else read
    cards = [json.loads(server.admin.get(f"/v1/adapters/{quote(name, safe='')}")) for name in names]
    size = mean(card["tucka"]["bytes"] for card in cards)
    return Loads(load, activate / activations if activations else load, read, size)


@dataclass(frozen=True)
class Beside:
    """A load from the disk beside a stream: the engine's own work, and how many times as long steps take meanwhile. A
    `read` of 0: there was none."""

    read: float
    step: float


async def _beside(server: TimedServer) -> Beside:
    """Asks adapters one after the other while a stream is answered."""
    own, *others = server.cycled[::-1]  # the least recently used first, after `_loads`
    if server.slots < 2 or not others:
        return Beside(0.0, 1.0)
    async with server.streaming(own):
        await server.each(others[:1])
        alone = await server.window(asyncio.sleep(ALONE_SECONDS))
        hits = await server.window(server.each(others[:1] * len(others)))
        misses = await server.window(server.each(others[1:] + others[:1]))
    return Beside(misses.read, slower(alone, hits, misses))


def slower(alone: Window, hits: Window, misses: Window) -> float:
    """How many times as long steps take beside loads: what the same requests take longer where their adapters are to be
    loaded, and how many steps more. One of these a load has nothing beside it, the one that has begun when the
    adapter's request comes."""
    if not alone.steps or not misses.loads:
        return 1.0
    step = alone.seconds / alone.steps
    seconds = (misses.seconds - hits.seconds) / misses.loads - step
    steps = (misses.steps - hits.steps) / misses.loads - 1
    return max(seconds / steps / step, 1.0) if steps > 0.5 else 1.0
