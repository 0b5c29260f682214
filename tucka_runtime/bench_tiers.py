"""More adapters than slots: `python -m tucka_runtime.bench_tiers`.

Makes a random Llama (8 layers, hidden 512) and random TuckA adapters, starts `tucka serve` with few slots, and loads
many names. `--clients` clients ask one request after the other: of eight adapters, which are resident, and of all,
drawn by Zipf's law with exponent 1 (the k-th name is asked for as often as 1/k says). Phases alternate. Printed:
seconds to the first token by where the adapter was just before it was asked for, and the tokens per second of all names
as a share of the eight's. Contents repeat after `--contents` names; no two names share a slot or a place in the host
cache. A prompt has 64 random tokens, an answer 32; seeds are fixed.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tucka_runtime.children import python
from tucka_runtime.engine import environment

environment.prepare()  # torch reads it when it is imported

import torch  # noqa: E402

from tucka_runtime import LLM  # noqa: E402
from tucka_runtime.bench import arguments, make_adapter, make_model, small  # noqa: E402
from tucka_runtime.client import Client  # noqa: E402

FEW = 8
"""Adapters that all names are compared with: they are resident."""
PROMPT, ANSWER = 64, 32
START_SECONDS = 600


@dataclass
class Measured:
    """What clients saw: seconds to first tokens by where the adapter was before, and tokens, in `seconds`."""

    firsts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    seconds: float = 0.0
    failed: int = 0

    def add(self, other: "Measured") -> None:
        for tier, firsts in other.firsts.items():
            self.firsts[tier] += firsts
        self.tokens, self.failed = self.tokens + other.tokens, self.failed + other.failed


@contextlib.contextmanager
def serving(scratch: Path, *flags: str) -> Iterator[str]:
    """The address of `tucka serve` on the model of the folder."""
    log = scratch / "log"
    command = python("-m", "tucka_runtime.cli.main", "serve", "--port", "0")
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *flags], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"ready at (http://[\w.]+:\d+)\b", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def ask(address: str, name: str, prompt: list[int], phase: Measured) -> None:
    """One streamed request, and where its adapter is just before."""
    card = json.loads(Client(address, None).get(f"/v1/adapters/{name}"))
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    body = {"model": name, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    begin = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), {"Content-Type": "text/json"})
    answer = connection.getresponse()
    events = 0
    for line in answer if answer.status == 200 else ():
        if line.startswith(b"data: {"):
            if not events:
                phase.firsts[card["tucka"]["tier"]].append(time.monotonic() - begin)
            events += 1
    phase.tokens += ANSWER if events else 0
    phase.failed += not events
    connection.close()


def run(address: str, names: list[str], weights: list[float], args: argparse.Namespace, seed: str) -> Measured:
    """Every client asks until the time is over."""
    whole = Measured()
    begin = time.monotonic()

    def client(number: int) -> None:
        draw, own = random.Random(f"{seed} {number}"), Measured()
        while time.monotonic() < begin + args.seconds:
            (name,) = draw.choices(names, weights)
            ask(address, name, [draw.randrange(10, args.vocab) for _ in range(PROMPT)], own)
        with lock:
            whole.add(own)

    lock = threading.Lock()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    whole.seconds = time.monotonic() - begin
    return whole


def measure(address: str, names: list[str], args: argparse.Namespace) -> tuple[Measured, Measured]:
    """The eight's phases and those of all names, after one of each that warms up."""
    few, everyone = Measured(), Measured()
    zipf = [1 / (rank + 1) for rank in range(len(names))]
    for number in range(args.rounds + 1):
        for total, own, weights in ((few, names[:FEW], [1.0] * FEW), (everyone, names, zipf)):
            for name in names[:FEW]:  # they are resident when a phase begins
                ask(address, name, [10], Measured())
            phase = run(address, own, weights, args, f"{number} {len(own)}")
            if number:
                total.add(phase)
                total.seconds += phase.seconds
    return few, everyone


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def show(few: Measured, everyone: Measured) -> None:
    """Prints the table."""
    print(f"{'':28}{'requests':>9}{'p50 (ms)':>10}{'p99 (ms)':>10}{'tok/s':>8}")
    for what, phase in ((f"{FEW} adapters", few), ("all names", everyone)):
        everything = [first for firsts in phase.firsts.values() for first in firsts]
        rows = [(what, everything), *((f"  it was {tier}", firsts) for tier, firsts in sorted(phase.firsts.items()))]
        for name, firsts in rows:
            times = [f"{1000 * percentile(firsts, share):10.1f}" for share in (0.5, 0.99)]
            rate = f"{phase.tokens / phase.seconds:8.0f}" if name == what else ""
            print(f"{name:28}{len(firsts):9}{''.join(times)}{rate}")
    ratio = everyone.tokens / everyone.seconds / (few.tokens / few.seconds)
    print(f"tokens per second, all names / {FEW}: {ratio:.3f}; failed requests: {few.failed + everyone.failed}")


def main(argv: list[str] | None = None) -> int:
    parser = arguments("bench_tiers", __doc__, rounds=3)
    parser.add_argument("--names", type=int, default=1000, help="names that are loaded (default: 1000)")
    parser.add_argument("--contents", type=int, default=32, help="different contents of them (default: 32)")
    parser.add_argument("--slots", type=int, default=32, help="--adapter-slots of the server (default: 32)")
    parser.add_argument("--host-bytes", type=int, default=2**31, help="--adapter-host-bytes of the server")
    parser.add_argument("--clients", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase (default: 20)")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(argv)
    shape = small(args.layers, args.hidden)
    args.vocab = shape["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", shape, torch.float32)
        layout = LLM(scratch / "model", kv_cache_tokens=4096, num_threads=args.threads).engine.layout
        for content in range(args.contents):
            make_adapter(scratch / "adapters" / str(content), layout, ["q_proj", "v_proj"], args.rank, seed=content)
        flags = ["--model", str(scratch / "model"), "--adapter-root", str(scratch / "adapters"), "--route", "request"]
        flags += ["--adapter-slots", str(args.slots), "--adapter-host-bytes", str(args.host_bytes)]
        flags += ["--state-dir", str(scratch / "state")]
        with serving(scratch, *flags, *(["--num-threads", str(args.threads)] if args.threads else [])) as address:
            client, begin = Client(address, None), time.monotonic()
            names = [f"n{number}" for number in range(args.names)]
            for number, name in enumerate(names):
                client.post("/v1/adapters", {"name": name, "path": str(number % args.contents)})
            took = time.monotonic() - begin
            card = json.loads(client.get("/v1/adapters/n0"))["tucka"]
            print(f"{args.names} names of {card['bytes']} bytes each loaded in {took:.1f} s, {args.slots} slots")
            print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.clients} clients")
            show(*measure(address, names, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
