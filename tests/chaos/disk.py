"""Takes the disk from a `tucka serve` that holds adapters, in every way that disks go, and says what clients saw.

    .venv/bin/python -m tests.chaos.disk --rounds 20

In each round: the disk refuses every write (RLIMIT_FSIZE of the live process), the state folder is removed, a bit of a
copy flips, and after each of the last two the engine is killed. Right is: a refused change is a 503 and no change,
content that is there loads without a write, `/ready` comes back with every adapter, and each answers as before.
"""

import argparse
import os
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.support import GOLDEN
from tests.support.servers import engine_of, make_base, start_command

PATIENCE = 120.0  # seconds until the engine is back
ASK = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "route": "request"}
SOURCES = {"one": "llama-qv-r8k3t3", "two": "llama-all7-r4k2t2"}


class Disk:
    """A running server and its state folder. `outcomes` counts what was seen, `wrong` what should not have been."""

    def __init__(self, pid: int, url: str, state: Path):
        self.pid, self.state = pid, state
        self.client = httpx.Client(base_url=url, timeout=60)
        self.outcomes: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.back: list[float] = []
        for name in SOURCES:
            self._load(name).raise_for_status()
        self.before = {name: self._answer(name) for name in SOURCES}

    def fill(self) -> None:
        """Nothing can be written: changes are refused whole, content that is here needs no write."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            for _ in range(2):
                self._expect("full: unload", self.client.delete("/v1/adapters/one"), 503, "storage_unavailable")
            self._expect("full: the same content", self._load("one"), 200)
            other = self.client.post("/v1/adapters", json={"name": "new", "path": SOURCES["one"] + "/adapter"})
            self._expect("full: a new name", other, 503, "storage_unavailable")
            self._check("full")
        finally:
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard, hard))
        self._expect("room again: unload", self.client.delete("/v1/adapters/one"), 200)
        self._expect("room again: load", self._load("one"), 201)
        self._check("room again")

    def clean(self) -> None:
        """A cleaner removes the state folder, then the engine dies."""
        shutil.rmtree(self.state)
        self._kill_engine()
        self._check("removed")

    def flip(self, number: int) -> None:
        """One bit of a stored copy's weights changes, then the engine dies."""
        blobs = sorted((self.state / "blobs").iterdir())
        file = blobs[number % len(blobs)] / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1 - number % 64] ^= 1 << number % 7
        file.write_bytes(data)
        self._kill_engine()
        self._check("flipped")  # copies are read when their adapters are asked for
        if file.read_bytes() == data:
            self.wrong["the damaged copy is still there"] += 1

    def _load(self, name: str) -> httpx.Response:
        return self.client.post("/v1/adapters", json={"name": name, "path": SOURCES[name] + "/adapter"})

    def _answer(self, name: str) -> str:
        answer = self.client.post("/v1/completions", json=ASK | {"model": name})
        return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else f"HTTP {answer.status_code}"

    def _expect(self, what: str, answer: httpx.Response, status: int, code: str | None = None) -> None:
        found = None if answer.status_code < 400 else answer.json()["error"]["code"]
        right = (answer.status_code, found) == (status, code)
        (self.outcomes if right else self.wrong)[f"{what}: {answer.status_code} {found or ''}".strip()] += 1

    def _check(self, when: str) -> None:
        """Every adapter is there and says what it said at first."""
        if self.client.get("/ready").status_code != 200:
            self.wrong[f"{when}: not ready"] += 1
        for name, text in self.before.items():
            same = self._answer(name) == text
            (self.outcomes if same else self.wrong)[f"{when}: {'the same answer' if same else 'another answer'}"] += 1

    def _kill_engine(self) -> None:
        begin = time.monotonic()
        os.kill(engine_of(self.pid), signal.SIGKILL)
        while self.client.get("/ready").status_code == 200 and time.monotonic() < begin + PATIENCE:
            time.sleep(0.01)
        while self.client.get("/ready").status_code != 200 and time.monotonic() < begin + PATIENCE:
            time.sleep(0.05)
        self.back.append(time.monotonic() - begin)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="times that each of the three happens")
    rounds = parser.parse_args(given).rounds
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        process, url = start_command(
            "--model", str(make_base(place / "llama-tiny")),
            "--state-dir", str(place / "state"),
            "--adapter-root", str(GOLDEN),
            log=place / "log",
        )  # fmt: skip
        try:
            disk = Disk(process.pid, url, place / "state")
            for number in range(rounds):
                disk.fill()
                disk.clean()
                disk.flip(number)
        finally:
            process.terminate()
            process.wait(60)
        log = (place / "log").read_text()
        if "Traceback" in log:
            disk.wrong["a traceback in the log"] += 1
            print(log)
    for what, count in sorted(disk.outcomes.items()):
        print(f"{count:6d}  {what}")
    print(f"{len(disk.back):6d}  engines killed, all adapters back after {statistics.median(disk.back):.1f} s (median)")
    print(f"wrong: {dict(disk.wrong) or 'nothing'}")
    return 1 if disk.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
