"""Sends varied requests to a `tucka serve` of the embedded default and prints how the engine's memory grows.

    .venv/bin/python -m tests.chaos.memory_slope --requests 20000
    .venv/bin/python -m tests.chaos.memory_slope --minutes 60

Prompt lengths, answers, models and how many requests run at once differ all the time, so that every batch is of another
size. Right is that the memory is flat: after the first quarter it may grow by --percent.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.support.servers import engine_of, start_command

MODELS = ("base", "formats", "words", "triage", "sql")
PARTS = 24


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, help="instead of a number of requests")
    parser.add_argument("--percent", type=float, default=1.0, help="growth after the first quarter that is a fault")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


async def send(url: str, count: float, until: float, draw: random.Random) -> int:
    """So many requests, in bursts of 1 to 48, or as many as begin before `until` by the monotonic clock."""

    async def one(client: httpx.AsyncClient) -> None:
        body = {
            "model": draw.choice(MODELS),
            "prompt": [draw.randrange(3, 259) for _ in range(int(2 ** draw.uniform(0, 8)))],
            "max_tokens": draw.randint(1, 24),
            "n": draw.choice((1, 1, 1, 2, 3)),
            "temperature": draw.choice((0.0, 1.0)),
        }
        (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        sent = 0
        while sent < count and time.monotonic() < until:
            burst = int(min(count - sent, draw.randint(1, 48)))
            await asyncio.gather(*(one(client) for _ in range(burst)))
            sent += burst
        return sent


def main(given: list[str] | None = None) -> int:
    """Prints the memory along the way. Returns 1 where it grew by more than it may."""
    flags = arguments(given)
    draw = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_command(log=Path(folder) / "log")
        try:
            engine, begin = engine_of(process.pid), time.monotonic()
            seen, times = [resident(engine)], [0.0]
            print(f"       0 requests {seen[0]:8.1f} MiB", flush=True)
            done = 0
            for part in range(1, PARTS + 1):
                if flags.minutes is None:
                    count, until = flags.requests * part // PARTS - done, math.inf
                else:
                    count, until = math.inf, begin + 60 * flags.minutes * part / PARTS
                done += asyncio.run(send(url, count, until, draw))
                seen.append(resident(engine))
                times.append(time.monotonic() - begin)
                print(f"{done:8} requests {seen[-1]:8.1f} MiB {times[-1]:7.0f} s", flush=True)
        finally:
            process.terminate()
            process.wait()
    first = PARTS // 4
    grown = seen[-1] - seen[first]
    percent = 100 * grown / seen[first]
    slope = 3600 * statistics.linear_regression(times[first:], seen[first:]).slope
    print(f"after the first quarter: {grown:+.1f} MiB, {percent:+.2f}% ({flags.percent}% are allowed)")
    minutes = (times[-1] - times[first]) / 60
    print(f"slope after the first quarter: {slope:+.1f} MiB an hour, over {minutes:.0f} minutes")
    return percent > flags.percent


if __name__ == "__main__":
    sys.exit(main())
