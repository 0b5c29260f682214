"""Names change in every way beside streams that nobody may disturb: `python -m tests.chaos.cycles --cycles 1000`.

The embedded default with `--adapter-versions 3`, on its own port. A cycle loads a name, replaces its content, points an
alias at it and the version before, rolls it back, deletes the alias and unloads the name: six changes, between which
the name, the version and the alias are asked for something. Streams of base and adapters run without end beside it.

Cycles and quiet take turns, so that what else the machine does in these minutes falls on both. Right is that no change,
request or stream fails; a p99 between two tokens of at most --ratio times that without cycles; the server's and the
engine's memory at the end within --memory percent of what it was after the first cycles; and as
many open descriptors, and bytes in the state folder but the table of names and its log, as before.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import httpx

from tests.chaos.swaps import CONTENTS, Streams, p99, summary
from tests.support.servers import start_command
from tucka_runtime.embedded import FOLDER

WARM_UP = 50  # cycles until caches, pools and the allocator have what they need


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two cycles (default: none)")
    parser.add_argument("--turns", type=int, default=20, help="that the cycles are parted into (default: 20)")
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds before each turn (default: 10)")
    parser.add_argument("--ratio", type=float, default=1.25, help="p99 between tokens, with against without, at most")
    parser.add_argument("--memory", type=float, default=1.0, help="percent that memory may differ by")
    return parser.parse_args(given)


class Cycles:
    """One client that changes names. `changes` and `asked` count what has succeeded; anything else raises."""

    def __init__(self, client: httpx.AsyncClient, url: str):
        self.client, self.url = client, url
        self.changes = self.asked = 0

    async def change(self, method: str, path: str, body: dict[str, object] | None = None) -> dict:
        answer = await self.client.request(method, self.url + path, json=body)
        assert answer.status_code in (200, 201, 202), (method, path, answer.status_code, answer.text)
        self.changes += 1
        return answer.json()

    async def ask(self, model: str, digests: Sequence[str]) -> None:
        body = {"model": model, "prompt": "2024-03-05 =>", "max_tokens": 4, "user": f"user {self.asked}"}
        answer = await self.client.post(f"{self.url}/v1/completions", json=body)
        assert answer.status_code == 200, (model, answer.text)
        assert answer.json()["system_fingerprint"].removeprefix("fp_") in [digest[:12] for digest in digests], model
        self.asked += 1

    async def run(self, count: int, pause: float) -> None:
        for _ in range(count):
            first, second = [await self._load(str(content)) for content in CONTENTS]
            version = f"changing@{first[:12]}"
            await self.ask("changing", [second])
            await self.ask(version, [first])
            await self.change("POST", "/v1/aliases", {"name": "alias", "targets": {"changing": 3, version: 1}})
            await self.ask("alias", [first, second])
            card = await self.change("POST", "/v1/adapters/changing/rollback", {})
            assert card["tucka"]["digest"] == first
            await self.ask("changing", [first])
            await self.change("DELETE", "/v1/aliases/alias")
            await self.change("DELETE", "/v1/adapters/changing")
            await asyncio.sleep(pause)

    async def _load(self, path: str) -> str:
        body = {"name": "changing", "path": path, "load_inplace": True}
        digest: str = (await self.change("POST", "/v1/adapters", body))["tucka"]["digest"]
        return digest


def processes(pid: int) -> list[Path]:
    """The server's process, its engine's and its templates', as they stand in /proc."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in tasks for child in path.read_text().split()]
    return [Path(f"/proc/{pid}"), *(path for child in children for path in processes(child))]


def memory(pid: int) -> float:
    """MiB that the server's processes have to themselves."""
    lines = [line for path in processes(pid) for line in (path / "smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


async def descriptors(pid: int) -> int:
    """The fewest of a second: a connection or a file comes and goes while streams run."""
    counts = []
    for _ in range(20):
        counts.append(_descriptors(pid))
        await asyncio.sleep(0.05)
    return min(counts)


def _descriptors(pid: int) -> int:
    return sum(len(list((path / "fd").iterdir())) for path in processes(pid))


def disk(state: Path) -> int:
    """Bytes of the copies, as they are on the disk."""
    return sum(path.stat().st_blocks * 512 for path in (state / "blobs").rglob("*"))


async def trial(url: str, pid: int, state: Path, flags: argparse.Namespace) -> bool:
    """Prints what was measured. Returns whether all of it is right."""
    quiet: list[list[float]] = []
    busy: list[list[float]] = []
    took, turns = 0.0, min(flags.turns, flags.cycles)
    async with httpx.AsyncClient(timeout=120) as client:
        streams, cycles = Streams(url, flags.streams), Cycles(client, url)
        await cycles.run(min(WARM_UP, flags.cycles), flags.pause)
        before = memory(pid), await descriptors(pid), disk(state)
        for turn in range(turns):
            count = flags.cycles * (turn + 1) // turns - flags.cycles * turn // turns
            quiet.append(await streams.during(lambda: asyncio.sleep(flags.quiet)))
            begin = time.monotonic()
            busy.append(await streams.during(lambda count=count: cycles.run(count, flags.pause)))  # type: ignore[misc]
            took += time.monotonic() - begin
        after = memory(pid), await descriptors(pid), disk(state)
        await streams.stop()
    without, beside = list(chain(*quiet)), list(chain(*busy))
    ratio, grown = p99(beside) / p99(without), 100 * (after[0] / before[0] - 1)
    each = sorted(p99(own) / p99(other) for own, other in zip(busy, quiet, strict=True))
    print(
        f"{cycles.changes} changes and {cycles.asked} requests, none failed; {flags.cycles / took:.1f} cycles a second"
    )
    print(f"between tokens, no cycles    {summary(without)}")
    print(f"between tokens, with cycles  {summary(beside)}")
    print(f"p99 between tokens           {ratio:.2f} times ({flags.ratio} are allowed)")
    print(f"p99 of each turn             {each[0]:.2f} to {each[-1]:.2f} times, median {statistics.median(each):.2f}")
    print(f"memory                       {before[0]:.1f} MiB, then {after[0]:.1f}: {grown:+.2f}%")
    print(f"descriptors                  {before[1]}, then {after[1]}")
    print(f"copies on the disk           {before[2]} bytes, then {after[2]}", flush=True)
    return ratio <= flags.ratio and abs(grown) <= flags.memory and before[1:] == after[1:]


def main(given: list[str] | None = None) -> int:
    """Returns 1 where something is not right."""
    flags = arguments(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = folder / "state"
        process, url = start_command(
            "--adapter-root", str(FOLDER / "adapters"),
            "--state-dir", str(state),
            "--adapter-versions", "3",
            log=folder / "log",
        )  # fmt: skip
        try:
            right = asyncio.run(trial(url, process.pid, state, flags))
        finally:
            process.terminate()
            process.wait(60)
        log = (folder / "log").read_text()
        if "Traceback" in log:
            print(log)
            return 1
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
