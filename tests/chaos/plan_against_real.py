"""A fleet on paper held to a real one: `python -m tests.chaos.plan_against_real --seconds 60 --rate 8`.

Two servers of the embedded default, 40 adapters, 8 slots, a host cache with room for some 23: the same drawn requests
are sent to them under each policy, which this script's own router follows, and simulated with the servers' times as
`tucka plan --measure` takes them before and after, of which the mean counts. Printed are both, and the ratio; it ends
with 1 where one is off by more than --within. Prompts are random tokens, so that no KV is reused. Both servers share
this machine, with each other and with the client.

A first token is the engine's: the first event of a stream, whether it has text or not. Answers to random tokens often
begin with some that show nothing, so that what a reader sees first comes later; that is printed beside the table. So is
the time between two tokens: where it differs from that on paper, the machine was slower, or faster, than when the
servers were timed, and first tokens are so too.

With --one-by-one every request is sent when the one before is answered: who finds its adapter in a slot then depends on
the rules alone, and has to be the same on paper, whatever else the machine does.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from tests.support.servers import start_command
from tucka_runtime.client import Client
from tucka_runtime.embedded import FOLDER
from tucka_runtime.loadtest.client import LoadClient
from tucka_runtime.loadtest.lengths import parse
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report.metrics import Latency
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.planning.arrivals import Arrivals, Drawn, synthetic
from tucka_runtime.planning.measure import measure
from tucka_runtime.planning.policies import POLICIES
from tucka_runtime.planning.profile import Profile, read_profile
from tucka_runtime.planning.replica import ReplicaSettings
from tucka_runtime.planning.simulation import Simulation
from tucka_runtime.planning.timed_server import Totals

PERCENTILES = (50.0, 99.0)
CONTENTS = ("formats", "words", "triage", "sql")
APART = 1000.0
"""Seconds between requests on paper that are sent one by one."""
ROWS = (1, 2, 4, 8)
"""Decoding sequences of one server that are timed: more than it has on the whole."""
HOST_MIB = 24
"""Of a server's host cache, so that adapters come from it and from the disk."""


@dataclass(frozen=True)
class Compared:
    """What is held against each other; seconds. `token_seconds`, the median time between two tokens of an answer, says
    whether the machine was what it was when the servers were timed."""

    hit_rate: float
    first_token: dict[float, float]
    output_tokens_per_second: float
    token_seconds: float


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each policy (default: 60)")
    parser.add_argument("--rate", default="8", help="requests a second (default: 8)")
    parser.add_argument("--prompt-tokens", default="uniform:16:128", help="default: uniform:16:128")
    parser.add_argument("--output-tokens", default="uniform:8:56", help="default: uniform:8:56")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", nargs="+", default=["round-robin", "consistent-hash"], choices=POLICIES)
    parser.add_argument("--one-by-one", action="store_true", help="see above")
    parser.add_argument("--within", type=float, default=0.15, help="how far off the paper may be (default: 0.15)")
    parser.add_argument("--profile", type=Path, help="of such servers, instead of measuring one first")
    parser.add_argument("-o", "--output", type=Path, help="where the profile that is measured goes")
    return parser.parse_args(given)


def names(count: int) -> list[str]:
    return [f"adapter-{number}" for number in range(count)]


@contextmanager
def serving(adapters: int, slots: int) -> Iterator[list[str]]:
    """The addresses of two servers, each with all adapters."""
    flags = ["--adapter-slots", str(slots), "--adapter-host-bytes", str(HOST_MIB * 2**20), "--shutdown-timeout", "1"]
    for number, name in enumerate(names(adapters)):
        flags += ["--adapter", f"{name}={FOLDER / 'adapters' / CONTENTS[number % len(CONTENTS)]}"]
    with tempfile.TemporaryDirectory() as folder:
        running = [start_command(*flags, log=Path(folder) / f"log{i}") for i in range(2)]
        try:
            yield [url for _, url in running]
        finally:
            for process, _ in running:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def looked_up(urls: list[str]) -> tuple[float, float]:
    """Requests that named an adapter, and those of them that found it in a slot."""
    scrapes = [Totals(Client(url, None).get("/metrics").decode()) for url in urls]
    series = "tucka_adapter_lookups_total"
    return sum(s(series) for s in scrapes), sum(s(series, tier="resident") for s in scrapes)


async def replay(urls: list[str], arrivals: Arrivals, policy: str, skip: int, seed: int, one_by_one: bool) -> Compared:
    """Sends every request at its time, or `one_by_one`, to the server that the policy chooses. Raises RuntimeError if
    one fails."""
    router, rng = POLICIES[policy](len(urls), arrivals.names), random.Random(f"{seed}/{policy}")
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(LoadClient(Settings(url=url, ignore_eos=True))) for url in urls]
        began = time.perf_counter()
        for client in clients:
            client.clock = lambda: time.perf_counter() - began

        async def send(request: int) -> Record:
            name = arrivals.names[arrivals.adapter[request]]
            replica = router.route(arrivals.adapter[request])
            prompt = [rng.randrange(100, 125) for _ in range(arrivals.prompt[request])]
            body = clients[replica].body(name, "", arrivals.output[request], 0.0) | {"prompt": prompt}
            record = await clients[replica].generate(Record("load", name, planned=arrivals.at[request]), body)
            router.ended(replica)
            return record

        tasks = []
        for request, at in enumerate(arrivals.at):
            if one_by_one:
                await asyncio.gather(*tasks[-1:])
            else:
                await asyncio.sleep(max(at - clients[0].clock(), 0.0))
            if request == skip:
                scrape = asyncio.create_task(asyncio.to_thread(looked_up, urls))
                await asyncio.gather(*[scrape] * one_by_one)
            tasks.append(asyncio.create_task(send(request)))
        records = await asyncio.gather(*tasks)
        before = await scrape
    after = await asyncio.to_thread(looked_up, urls)
    if failed := [record.cause for record in records if not record.ok]:
        raise RuntimeError(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    lookups, hits = (now - then for now, then in zip(after, before, strict=True))
    waits = [Latency(record, count_empty=True).ttft for record in records[skip:]]
    seen = float(np.median([Latency(record).ttft for record in records[skip:]]))
    late = float(np.percentile([record.start - (record.planned or 0.0) for record in records], 99))
    timed = "one by one" if one_by_one else f"sent {1000 * late:.0f} ms late at p99"
    gaps = [(record.end - record.events[0][0]) / (record.output_tokens - 1) for record in records[skip:]
            if record.output_tokens and record.output_tokens > 1]  # fmt: skip
    print(
        f"{policy}: {timed}; text seen after {1000 * seen:.1f} ms at p50; load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    tokens = sum(record.output_tokens or 0 for record in records)
    first = {p: float(np.percentile(waits, p)) for p in PERCENTILES}
    pace = float(np.median(gaps)) if gaps else 0.0
    return Compared(hits / lookups, first, tokens / max(record.end for record in records), pace)


def after_all(arrivals: Arrivals) -> Arrivals:
    """The same after a request for each adapter, by which slots are in the same state on paper and in servers that have
    done other things."""
    count = len(arrivals.names)
    gap = arrivals.at[-1] / len(arrivals)
    return Arrivals(
        [gap * number for number in range(count)] + [gap * count + at for at in arrivals.at],
        list(range(count)) + arrivals.adapter,
        [8] * count + arrivals.prompt,
        [1] * count + arrivals.output,
        arrivals.names,
    )


def simulate(arrivals: Arrivals, policy: str, skip: int, profile: Profile, slots: int) -> Compared:
    settings = ReplicaSettings(slots=slots, host=HOST_MIB * 2**20 // profile.adapter_bytes)
    simulation = Simulation(arrivals, 2, policy, settings, profile)
    simulation.run(skip=skip)
    figures = simulation.figures(PERCENTILES)
    times = zip(simulation.first[skip:], simulation.last[skip:], arrivals.output[skip:], strict=True)
    gaps = [(last - first) / (tokens - 1) for first, last, tokens in times if tokens > 1]
    pace = float(np.median(gaps)) if gaps else 0.0
    return Compared(figures.hit_rate or 0.0, figures.first_token, figures.output_tokens_per_second, pace)


def compare(real: Compared, paper: Compared, one_by_one: bool) -> list[tuple[str, float, float]]:
    """Rows of (figure, real, on paper). One by one there is no throughput."""
    rows = [("hit rate (%)", 100 * real.hit_rate, 100 * paper.hit_rate)]
    for p in PERCENTILES:
        rows.append((f"first token p{p:g} (ms)", 1000 * real.first_token[p], 1000 * paper.first_token[p]))
    if not one_by_one:
        rows.append(("output tokens/s", real.output_tokens_per_second, paper.output_tokens_per_second))
    return rows


def hold(urls: list[str], args: argparse.Namespace) -> int:
    """Replays, measures, simulates and prints. Returns how many figures are off by more than --within."""
    lengths = (parse(args.prompt_tokens, "--prompt-tokens"), parse(args.output_tokens, "--output-tokens"))
    arrivals = synthetic(Drawn(*lengths, args.zipf, args.adapters, args.seed), args.rate, 1.0, None, args.seconds)
    if args.one_by_one:
        arrivals = replace(arrivals, at=[APART * number for number in range(len(arrivals))])
    arrivals, skip = after_all(arrivals), args.adapters
    print(f"{len(arrivals)} requests, the first {skip} not counted", flush=True)
    given = read_profile(args.profile) if args.profile else None
    profiles, real = [given or measured(urls)], []
    for policy in args.policy:
        real.append(asyncio.run(replay(urls, arrivals, policy, skip, args.seed, args.one_by_one)))
        profiles.append(given or measured(urls))
    if args.output:
        mean_of(profiles).write(args.output)
    off = 0
    for policy, found, *around in zip(args.policy, real, profiles, profiles[1:], strict=False):
        print(f"{policy}\n  {'':24}{'real':>10}{'on paper':>10}{'ratio':>8}")
        paper = simulate(arrivals, policy, skip, mean_of(around), args.slots)
        for figure, seen, simulated in compare(found, paper, args.one_by_one):
            off += abs(simulated / seen - 1) > args.within
            print(f"  {figure:24}{seen:10.1f}{simulated:10.1f}{simulated / seen:8.2f}")
        print(f"  {'not held: ms a token':24}{1000 * found.token_seconds:10.2f}{1000 * paper.token_seconds:10.2f}")
    print(f"{off} figures off by more than {args.within:.0%}")
    return off


def measured(urls: list[str]) -> Profile:
    profile = measure(urls, None, "python -m tests.chaos.plan_against_real", lambda what: None, ROWS)
    print(
        f"timed: a step {1000 * profile.one_adapter[0]:.2f} ms, {profile.crowded:.2f} times as long while both servers "
        f"compute, {profile.step_beside:.2f} times beside a load; that takes {1000 * profile.load:.1f} ms, and "
        f"{1000 * profile.load_beside:.1f} beside steps",
        flush=True,
    )
    return profile


def mean_of(profiles: Sequence[Profile]) -> Profile:
    """Profiles of the same servers, taken at different times."""
    values = {field.name: [getattr(profile, field.name) for profile in profiles] for field in fields(Profile)}
    means = {
        name: np.mean(all_of, axis=0).tolist()
        for name, all_of in values.items()
        if isinstance(all_of[0], float) or (isinstance(all_of[0], list) and isinstance(all_of[0][0], float))
    }
    return replace(profiles[-1], **means)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    with serving(args.adapters, args.slots) as urls:
        return 1 if hold(urls, args) else 0


if __name__ == "__main__":
    sys.exit(main())
