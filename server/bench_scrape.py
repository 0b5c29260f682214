"""How long a scrape takes with many adapters: `python -m tucka_runtime.server.bench_scrape [ADAPTERS]`.

Prints milliseconds, best and median of 50: the CPU time of writing all metrics as text; the CPU time of the server's
thread for a whole scrape over HTTP, with the kernel's part of sending it; and how long its client waited. The client is
a process of its own, as Prometheus is, and asks over one connection.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tucka_runtime.children import python
from tucka_runtime.config import ServerConfig
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    EngineInfo,
    EngineLoad,
    FinishReason,
    Route,
    StepStats,
    Timing,
)
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.http.server import HTTPServer, bind
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.service.service import Service

REPEATS = 50
GROUPS = 4

CLIENT = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in sys.stdin:
    begin = time.monotonic()
    connection.sendall(b"GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\nAccept-Encoding: gzip\\r\\n\\r\\n")
    head, _, body = connection.recv(65536).partition(b"\\r\\n\\r\\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    left = int(head.lower().partition(b"content-length: ")[2].split(b"\\r\\n")[0]) - len(body)
    while left:
        left -= len(connection.recv(min(left, 1 << 20)))
    print(1000 * (time.monotonic() - begin), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.server.bench_scrape", description="How long a scrape of /metrics takes."
    )
    parser.add_argument("adapters", nargs="?", type=int, default=1000, help="adapters in use (default: 1000)")
    count = parser.parse_args().adapters
    metrics = Metrics("base", max_adapters=count, block_size=16)
    keys = [AdapterKey(f"adapter-{i:04d}", i) for i in range(count)]
    for key in keys:
        info = AdapterInfo(key, "0" * 64, "tucka", 8, GROUPS, 3, 2, 16.0, ("q_proj",), 4, "q", None, 100_000, None)
        metrics.adapter_arrived(replace(info, load_seconds={"read": 0.1, "fold": 0.1, "wait": 0.1}))
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/health", "/ready"):
        for code in ("200", "400", "404", "429", "503"):
            metrics.answered(route, "POST", code)
    with Scraped(metrics) as scraped:
        scraped.show("none used yet", [])
        begin = time.thread_time()
        for key in keys:
            serve(metrics, key)
        print(f"counting a request: {1e6 * (time.thread_time() - begin) / count:.0f} us")
        scraped.show("all used, none since", [])
        scraped.show("64 used since", random.sample(keys, min(64, count)))
        scraped.show("all used since", keys)


def serve(metrics: Metrics, key: AdapterKey) -> None:
    """One request with two steps, as the server counts it."""
    route = Route(random.randrange(GROUPS), (0.3, 0.5, 0.7))
    stats = StepStats(0.001, 0.001, 0.001, 0.01, 0.001, 0.001, 9, 1, 1, (key,), ((key, route),))
    load = EngineLoad(running=1, waiting=0, blocks_used=3, blocks_total=99, preemptions=0, displacements=0)
    metrics.admitted(key.name, 10, 1)
    metrics.on_step(stats, load)
    metrics.first_token(key.name, random.random(), 0, Timing(0.0, 0.1, 0.2, 0.0))
    metrics.tokens(1)
    metrics.on_step(stats, load)
    metrics.tokens(1)
    metrics.waited(0.01, 1)
    metrics.decoded(0.01)
    metrics.finished(key.name, FinishReason.STOP, 1, 1)
    metrics.closed(key.name, 9 * random.random(), 2, failed=False)


class Scraped:
    """The server's own application over HTTP, without an engine: a thread of this process, whose CPU time is read."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics
        info = EngineInfo("llama", 320, 256, (2,), "float32", "cpu", 4096, "none", 2048, "reference", 2, 64, "float32")
        engine: Any = SimpleNamespace(ready=True, restarts=0, info=info, pid=None, silence=0.0, waiting={})
        self.info = info
        names: Any = SimpleNamespace(ready=True, lost=0, tiers=AdapterTiers())
        service = Service(
            ServerConfig(),
            "base",
            engine,
            None,
            None,
            names,
            metrics,
        )
        self.listener = bind("127.0.0.1", 0)
        self.server = HTTPServer(create_app(service), service.config, self.listener)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)

    def __enter__(self) -> "Scraped":
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.listener.getsockname()[1]
        pipe = subprocess.PIPE
        self.client = subprocess.Popen(python("-c", CLIENT, str(port)), stdin=pipe, stdout=pipe, text=True)
        self.metrics.watch_engine(lambda: self.client.pid)
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.terminate()
        self.client.wait()
        self.server.should_exit = True
        self.thread.join()

    def scrape(self) -> tuple[float, float]:
        """Milliseconds: (of the server's CPU time, that the client waited)."""
        assert self.client.stdin is not None and self.client.stdout is not None and self.thread.ident is not None
        clock = time.pthread_getcpuclockid(self.thread.ident)
        begin = time.clock_gettime(clock)
        self.client.stdin.write("\n")
        self.client.stdin.flush()
        waited = float(self.client.stdout.readline())
        time.sleep(0.01)  # the connection's last bookkeeping
        return 1000 * (time.clock_gettime(clock) - begin), waited

    def show(self, title: str, used: list[AdapterKey]) -> None:
        """Uses the adapters before every scrape."""
        rows: dict[str, list[float]] = {"text": [], "HTTP": [], "client": []}
        text = b""
        for _ in range(REPEATS):
            for key in used:
                serve(self.metrics, key)
            begin = time.thread_time()
            text = self.metrics.render(True, 0, self.info, "0")
            rows["text"].append(1000 * (time.thread_time() - begin))
            for key in used:
                serve(self.metrics, key)
            cpu, waited = self.scrape()
            rows["HTTP"].append(cpu)
            rows["client"].append(waited)
        figures = ", ".join(
            f"{name} {min(ms):.2f} best {statistics.median(ms):.2f} median" for name, ms in rows.items()
        )
        print(f"{title}: {figures} ms; {text.count(b'{')} series, {len(text) / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
