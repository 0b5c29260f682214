"""Adapters come and go beside streams that nobody may disturb: `python -m tests.chaos.swaps --swaps 1000`.

Two phases against the embedded default, on its own port:

- Swaps: streams of base and adapters run without end while one adapter's name changes between two contents, so many
  times a second. Printed is the time between two tokens without and with it; right is a p99 of at most --ratio times.
  Both are taken in turns of as many seconds. The streams' answers are of different lengths: those of one length begin
  together until something disturbs them, and the fewer begin in one step, the more steps have a prompt among them. The
  processor time of a swap is what each process takes beyond what its tokens take without swaps.
- Copies: so many loads of so many MiB at once, which are refused once they are copied, while text requests come one
  after the other. Printed is their first token's time without and with it.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.support.servers import engine_of, start_command
from tucka_runtime.adapters.files import WEIGHTS_NAME
from tucka_runtime.embedded import FOLDER

STREAMS = ("base", "formats", "words", "sql")
CONTENTS = (FOLDER / "adapters" / "triage", FOLDER / "adapters" / "words")

SWAPS_A_TURN = 8
"""Some two seconds: a machine that others use too is faster and slower by the minute."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=13, help="swaps a second (default: 13)")
    parser.add_argument("--fresh", action="store_true", help="each with weights that the server has never had")
    parser.add_argument("--ratio", type=float, default=1.25, help="p99 between tokens, with against without, at most")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--loads", type=int, default=8, help="loads at once")
    parser.add_argument("--mib", type=int, default=600, help="of each load")
    return parser.parse_args(given)


def summary(seconds: list[float]) -> str:
    ranked = sorted(seconds)
    half, most = statistics.median(ranked), ranked[int(0.99 * (len(ranked) - 1))]
    return f"p50 {1e3 * half:7.1f} ms, p99 {1e3 * most:7.1f} ms, most {1e3 * ranked[-1]:7.1f} ms of {len(ranked)}"


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


class Connection:
    """A client's connection, kept open. Of the least processor time: what httpx takes for an event of a stream, and for
    a load, is more than the server does, and delays the streams that are looked at."""

    def __init__(self, url: str):
        self.netloc = urlsplit(url).netloc
        self._reader: asyncio.StreamReader | None = None

    async def post(self, path: str, body: dict[str, object]) -> asyncio.StreamReader:
        """Where the answer to a request can be read, behind its head. Its status has to be 200."""
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(*self.netloc.split(":"))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        assert b" 200 " in answer.splitlines()[0], answer + await self._reader.read(1000)
        _, found, length = answer.partition(b"content-length:")
        if found:
            await self._reader.readexactly(int(length.split()[0]))
        return self._reader

    def close(self) -> None:
        if self._reader is not None:
            self._writer.close()


class Streams:
    """Clients that stream without end. `gaps` are the seconds between two events of a stream since it was emptied."""

    def __init__(self, url: str, count: int):
        self.url = url
        self.gaps: list[float] = []
        self.tasks = [asyncio.create_task(self._run(i)) for i in range(count)]

    async def _run(self, number: int) -> None:
        model, tokens = STREAMS[number % len(STREAMS)], 50 + 7 * number
        body = {"model": model, "prompt": "2024-03-05 =>", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        connection = Connection(self.url)
        try:
            while True:
                answer = await connection.post("/v1/completions", body)
                last: float | None = None
                while (line := await answer.readline()) != b"0\r\n":  # the last chunk
                    assert line, "the server has closed the connection of a stream"
                    if line.startswith(b"data: {"):
                        now = time.monotonic()
                        if last is not None:
                            self.gaps.append(now - last)
                        last = now
                await answer.readline()
        finally:
            connection.close()

    async def during(self, work: Callable[[], Awaitable[None]]) -> list[float]:
        """The gaps while something goes on. Raises what a stream raised."""
        self.gaps = []
        await work()
        for task in self.tasks:
            if task.done():
                task.result()
        return self.gaps

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def fresh(folder: Path, count: int) -> list[Path]:
    """So many adapters, no two of the same weights."""
    made = []
    for i in range(count):
        made.append(Path(shutil.copytree(CONTENTS[i % 2], folder / f"fresh{i}")))
        weights = bytearray((made[-1] / WEIGHTS_NAME).read_bytes())
        weights[-4:] = struct.pack("<f", 1e-6 * i)
        (made[-1] / WEIGHTS_NAME).write_bytes(weights)
    return made


async def swap(connection: Connection, contents: Sequence[Path], rate: float) -> float:
    """Loads one name again and again with other content. Returns the seconds that it took."""
    begin = time.monotonic()
    for i, content in enumerate(contents):
        body = {"lora_name": "swapped", "lora_path": str(content), "load_inplace": True}
        await connection.post("/v1/load_lora_adapter", body)
        await asyncio.sleep(max(0.0, begin + (i + 1) / rate - time.monotonic()))
    return time.monotonic() - begin


def processor_seconds(server: int) -> Counter[str]:
    """What the processes of a server have taken so far."""
    engine = engine_of(server)
    spent: Counter[str] = Counter()
    children = [child for path in Path(f"/proc/{engine}/task").glob("*/children") for child in path.read_text().split()]
    for name, pids in (("server", [server]), ("engine", [engine]), ("reader", children)):
        for pid in pids:
            user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            spent[name] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return spent


async def swaps(server: int, url: str, folder: Path, flags: argparse.Namespace) -> float:
    """Prints the gaps without and with swaps, and what a swap takes of the processor. Returns the ratio of their
    p99."""
    quiet: list[float] = []
    churned: list[float] = []
    spent: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    contents = fresh(folder, flags.swaps) if flags.fresh else [CONTENTS[i % 2] for i in range(flags.swaps)]

    async def gaps(swapping: bool, work: Callable[[], Awaitable[None]]) -> list[float]:
        before = processor_seconds(server)
        found = await streams.during(work)
        spent[swapping].update(processor_seconds(server))
        spent[swapping].subtract(before)
        return found

    connection, streams = Connection(url), Streams(url, flags.streams)
    await asyncio.sleep(2)
    seconds = 0.0
    for begin in range(0, len(contents), SWAPS_A_TURN):
        own, took = contents[begin : begin + SWAPS_A_TURN], 0.0

        async def work(own: list[Path] = own) -> None:
            nonlocal took
            took = await swap(connection, own, flags.rate)

        churned += await gaps(True, work)
        seconds += took
        quiet += await gaps(False, lambda took=took: asyncio.sleep(took))  # type: ignore[misc]
    await streams.stop()
    connection.close()
    reached = len(contents) / seconds
    print(f"between tokens, no swaps           {summary(quiet)}")
    print(f"between tokens, {reached:4.1f} swaps a second {summary(churned)}", flush=True)
    share = len(churned) / len(quiet)
    each = {name: 1e3 * (spent[True][name] - share * spent[False][name]) / len(contents) for name in spent[True]}
    took = ", ".join(f"{name} {own:.1f}" for name, own in each.items())
    print(f"a swap's processor time            {sum(each.values()):.1f} ms: {took}", flush=True)
    return p99(churned) / p99(quiet)


def bulky(folder: Path, mib: int) -> Path:
    """An adapter of so many MiB that is none: a sparse file whose one tensor has a name that no base has."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    size = mib * 2**20
    header = json.dumps({"base_model.model.x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


async def first_tokens(client: httpx.AsyncClient, url: str, until: Callable[[], bool]) -> list[float]:
    """Seconds to the first token of text requests, one after the other."""
    body = {"model": "base", "prompt": "2024-03-05 =>", "max_tokens": 1}
    took = []
    while not until() or len(took) < 5:
        begin = time.monotonic()
        (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()
        took.append(time.monotonic() - begin)
        await asyncio.sleep(0.02)
    return took


async def copies(url: str, folder: Path, flags: argparse.Namespace) -> float:
    """Prints the first token's time without and with big loads. Returns the longest with them."""
    names = [bulky(folder / f"bulky{i}", flags.mib) for i in range(flags.loads)]
    async with httpx.AsyncClient(timeout=600) as client:
        quiet = await first_tokens(client, url, lambda: True)

        async def load(path: Path) -> int:
            body = {"lora_name": path.name, "lora_path": str(path)}
            return (await client.post(f"{url}/v1/load_lora_adapter", json=body)).status_code

        loading = asyncio.gather(*(load(path) for path in names))
        busy = await first_tokens(client, url, loading.done)
        refused = await loading
    assert set(refused) == {400}, refused
    print(f"first token, no loads              {summary(quiet)}")
    print(f"first token, {flags.loads} loads of {flags.mib} MiB    {summary(busy)}", flush=True)
    return max(busy)


def main(given: list[str] | None = None) -> int:
    """Returns 1 where streams were disturbed more than they may be."""
    flags = arguments(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        roots = ("--adapter-root", str(FOLDER / "adapters"), "--adapter-root", name)
        process, url = start_command(*roots, log=folder / "log")
        try:
            ratio = asyncio.run(swaps(process.pid, url, folder, flags))
            longest = asyncio.run(copies(url, folder, flags))
        finally:
            process.terminate()
            process.wait(60)
    print(f"p99 between tokens: {ratio:.2f} times ({flags.ratio} are allowed); longest first token {longest:.2f} s")
    return int(ratio > flags.ratio)


if __name__ == "__main__":
    sys.exit(main())
