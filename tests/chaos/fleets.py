"""Servers under Ray Serve and behind vllm-router, beside one server and beside round robin.

    python -m tests.chaos.fleets --replicas 2 --cache DIR      where tests/clients/run.py installs routers

Needs the extra ray. Every row starts its own servers of the embedded default, with so many names for its adapters, more
than slots, drawn by Zipf's law with exponent 1; clients stream one chat after the other. Printed for each:

- affinity: the part of an adapter's requests that its main server had, over all; hits: requests whose adapter was in a
  slot when they came
- requests and tokens a second, and the time to the first token
- wrong, cut: answers with another text than a server alone gives, and streams that ended without their end or an error
- errors: what clients were told instead of an answer, by kind; lost: what one more try did not get either
- left: servers that were there at the end

Names have one of four contents, so that an answer of another name's adapter shows in three of four cases. Right is:
nothing wrong, cut or lost, no error at all but in the rows where servers are killed, and one server left where they are
scaled down. A server that is killed behind a router is started again at its address.
"""

import argparse
import asyncio
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.chaos.fleet_load import BUSY, HEAD, PROMPTS, Load, Seen, content_of, references
from tests.clients.two_servers import ANSWERED, ROUTERS, Router, chat, finished, routing
from tests.support.servers import start_command
from tucka_runtime.embedded import FOLDER


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=40, help="names")
    parser.add_argument("--slots", type=int, default=8, help="of each server")
    parser.add_argument("--clients", type=int, default=8, help="that send one request after the other")
    parser.add_argument("--seconds", type=float, default=60, help="of each row")
    parser.add_argument("--kill-every", type=float, default=20, help="seconds between two deaths of replicas")
    parser.add_argument("--only", default="", metavar="WORD", help="rows with this in their name")
    parser.add_argument("--cache", type=Path, required=True, help="where vllm-router is installed, and found again")
    return parser.parse_args(given)


def lookups(urls: list[str]) -> Counter[tuple[str, str]]:
    """Requests that named an adapter, by server and tier."""
    found: Counter[tuple[str, str]] = Counter()
    for url in urls:
        text = httpx.get(f"{url}/metrics", timeout=BUSY).text
        for labels, value in re.findall(r"^tucka_adapter_lookups_total{(.+?)} (\S+)$", text, re.MULTILINE):
            said = dict(re.findall(r'(\w+)="(.*?)"', labels))
            found[said.get("replica", url), said["tier"]] += float(value)  # type: ignore[assignment]
    return found


def replicas_of(server: int) -> list[int]:
    """The process ids of a `tucka serve --ray`'s replicas."""
    found, todo = [], [server]
    while todo:
        process = Path(f"/proc/{todo.pop()}")
        try:
            if b"ServeReplica:tucka:Replica" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
            todo += [
                int(child) for task in (process / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@dataclass
class Fleet:
    """What a row has started: processes and their addresses, and the address that clients ask. `how` are the flags of
    each process, which writes into `folder`."""

    how: tuple[str, ...]
    folder: Path
    started: list[tuple[subprocess.Popen[bytes], str]]
    url: str = ""
    killed: int = 0

    @property
    def urls(self) -> list[str]:
        return [url for _, url in self.started]

    def start(self, *more: str) -> tuple[subprocess.Popen[bytes], str]:
        with tempfile.NamedTemporaryFile(prefix="log", dir=self.folder, delete=False) as log:
            return start_command(*self.how, *more, log=Path(log.name))


async def kill_replicas(fleet: Fleet, flags: argparse.Namespace) -> None:
    """Kills one replica of Ray Serve after the other; each time when all are there."""
    draw = random.Random(0)
    async with httpx.AsyncClient(timeout=BUSY) as client:
        while True:
            await asyncio.sleep(flags.kill_every)
            while True:
                text = (await client.get(f"{fleet.url}/metrics")).text
                if len(set(re.findall(r'^tucka_engine_up{replica="(.+?)"} 1', text, re.MULTILINE))) == flags.replicas:
                    break
                await asyncio.sleep(1)
            os.kill(draw.choice(replicas_of(fleet.started[0][0].pid)), signal.SIGKILL)
            fleet.killed += 1


async def kill_servers(fleet: Fleet, flags: argparse.Namespace) -> None:
    """Kills one server after the other, and starts it again at its address; each time when all are there."""
    draw = random.Random(0)
    while True:
        await asyncio.sleep(flags.kill_every)
        place = draw.randrange(len(fleet.started))
        process, url = fleet.started[place]
        process.kill()
        process.wait()
        fleet.killed += 1
        again = asyncio.ensure_future(asyncio.to_thread(fleet.start, "--port", url.rpartition(":")[2]))
        try:
            await asyncio.shield(again)
        finally:
            fleet.started[place] = await again


async def nothing(fleet: Fleet, flags: argparse.Namespace) -> None:
    """Is done while a row runs."""


@dataclass(frozen=True)
class Row:
    """`fleet` is the file of --ray, without what all rows have; None for so many plain servers, asked in turn, or
    through the router if there is one. `left` is how many there have to be at the end, if that is known."""

    name: str
    fleet: dict[str, Any] | None = None
    servers: int = 1
    router: Router | None = None
    meanwhile: Callable[[Fleet, argparse.Namespace], Awaitable[None]] = nothing
    errors: bool = False
    left: int | None = None


def rows(flags: argparse.Namespace, names: list[str]) -> list[Row]:
    count = flags.replicas
    down = {"min_replicas": 1, "initial_replicas": count, "max_replicas": count, "target_ongoing_requests": 1000}
    down |= {"downscale_delay_s": flags.seconds / 4, "look_back_period_s": 11}
    everywhere = {"copies": dict.fromkeys(names, count)}
    by_header, in_turn = (
        next(router for router in ROUTERS if (router.client, router.policy) == ("vllm-router", policy))
        for policy in ("consistent_hash", "round_robin")
    )
    killed = f"one killed every {flags.kill_every:g} s"
    return [
        Row("one server"),
        Row(f"{count}, round robin", servers=count),
        Row("Ray Serve, 1", {"replicas": 1}),
        Row(f"Ray Serve, {count}, least loaded", {"replicas": count, "routing": everywhere}),
        Row(f"Ray Serve, {count}, by adapter", {"replicas": count}),
        Row(f"Ray Serve, {count}, scaled down to 1", {"autoscaling": down}, left=1),
        Row(f"Ray Serve, {count}, {killed}", {"replicas": count}, meanwhile=kill_replicas, errors=True),
        Row(f"vllm-router, {count}, round robin", servers=count, router=in_turn),
        Row(f"vllm-router, {count}, by adapter", servers=count, router=by_header),
        Row(f"vllm-router, {count}, {killed}", servers=count, router=by_header, meanwhile=kill_servers, errors=True),
    ]


def declare(folder: Path, names: list[str]) -> Path:
    """The file that every server follows."""
    models = [{"id": name, "source": str(FOLDER / "adapters" / content_of(name))} for name in names]
    path = folder / "adapters.yaml"
    path.write_text(yaml.safe_dump({"vLLMLoRAConfig": {"ensureExist": {"models": models}}}))
    return path


def measure(row: Row, names: list[str], expected: dict[tuple[str, str], str], flags: argparse.Namespace) -> Seen:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {"adapters_file": str(declare(folder, names)), "adapter_slots": flags.slots}
        (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
        common = {"serve": settings, "resources": {"num_cpus": 0.5}, "health_check_period_s": 2}
        (folder / "fleet.yaml").write_text(yaml.safe_dump(common | (row.fleet or {})))
        how = ("--config", str(folder / "serve.yaml")) if row.fleet is None else ("--ray", str(folder / "fleet.yaml"))
        fleet = Fleet(how, folder, [])
        try:
            for _ in range(row.servers):
                fleet.started.append(fleet.start())
            fleet.url = fleet.urls[0]
            if not expected:
                expected |= asyncio.run(references(fleet.url))
            if row.router is not None:
                fleet.url, _ = stack.enter_context(routing(row.router, flags.cache, fleet.urls, "none"))
            for one in ANSWERED:
                for stream in (False, True):
                    assert chat(fleet.url, "none", one, stream) == one["answer"], one
            return asyncio.run(loaded(row, fleet, names, expected, flags))
        except BaseException:
            for log in folder.glob("log*"):
                print(log.read_text()[-8000:], file=sys.stderr)
            raise
        finally:
            for process, _ in fleet.started:
                process.send_signal(signal.SIGTERM)
            for process, _ in fleet.started:
                process.wait(BUSY)


async def loaded(
    row: Row, fleet: Fleet, names: list[str], expected: dict[tuple[str, str], str], flags: argparse.Namespace
) -> Seen:
    asked = fleet.urls if row.fleet is None and row.router is None else [fleet.url]
    load = Load(asked, names, expected, flags.clients, row.router.header if row.router else "")
    before = await asyncio.to_thread(lookups, fleet.urls)
    had = await asyncio.to_thread(lambda: [finished(url) for url in fleet.urls])
    beside = asyncio.ensure_future(row.meanwhile(fleet, flags))
    await load.run(flags.seconds)
    if beside.done():
        beside.result()  # raises what it did
    beside.cancel()
    await asyncio.wait((beside,))
    if not beside.cancelled():
        beside.result()
    counts = await asyncio.to_thread(lookups, fleet.urls)
    load.seen.left = len({server for server, _ in counts})
    counts.subtract({key: count for key, count in before.items() if count <= counts.get(key, 0)})
    hits = sum(count for (_, tier), count in counts.items() if tier == "resident")
    load.seen.hits = hits / max(counts.total(), 1)
    load.seen.killed = fleet.killed
    if row.router is not None:  # who answered, the servers know
        load.seen.by_server.clear()
        for url, then in zip(fleet.urls, had, strict=True):
            for name, count in (await asyncio.to_thread(finished, url)).items():
                load.seen.by_server[name][url] = count - (then[name] if then[name] <= count else 0)
        load.seen.by_server.pop("base", None)
    return load.seen


def main(given: list[str] | None = None) -> int:
    """Prints the table. Returns 1 where something was wrong."""
    flags = arguments(given)
    names = [f"{content}-{number}" for number, content in zip(range(flags.adapters), itertools.cycle(PROMPTS))]
    expected: dict[tuple[str, str], str] = {}
    print(HEAD, flush=True)
    faults = 0
    for row in rows(flags, names):
        if flags.only not in row.name:
            continue
        seen = measure(row, names, expected, flags)
        print(seen.row(row.name), flush=True)
        faults += seen.wrong + seen.cut + seen.lost + (0 if row.errors else seen.errors.total())
        faults += row.left not in (None, seen.left)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
