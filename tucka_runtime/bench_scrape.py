"""How long a scrape takes with many adapters: `python -m tucka_runtime.bench_scrape [ADAPTERS]`.

Prints milliseconds of CPU time, best and median of 25, for all metrics as /metrics writes them.
"""

import random
import statistics
import sys
import time

from tucka_runtime.metrics import Metrics
from tucka_runtime.report import AdapterInfo, StepStats
from tucka_runtime.sequence import AdapterKey, FinishReason, Route, Timing

REPEATS = 25
GROUPS = 4


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    metrics = Metrics("base", max_adapters=count, block_size=16)
    keys = [AdapterKey(f"adapter-{i:04d}", i) for i in range(count)]
    for key in keys:
        info = AdapterInfo(key, "0" * 64, "tucka", 8, GROUPS, 3, 2, 16.0, ("q_proj",), 4, "q", None, 100_000, None)
        metrics.adapter_loaded(info, {"copy": 0.1, "read": 0.1, "fold": 0.1, "wait": 0.1})
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/health", "/ready"):
        for code in ("200", "400", "404", "429", "503"):
            metrics.http_requests.labels(route, "POST", code).inc()
    show("none used yet", metrics, [])
    begin = time.thread_time()
    for key in keys:
        serve(metrics, key)
    print(f"counting a request: {1e6 * (time.thread_time() - begin) / count:.0f} us")
    show("all used, none since", metrics, [])
    show("64 used since", metrics, random.sample(keys, min(64, count)))
    show("all used since", metrics, keys)


def serve(metrics: Metrics, key: AdapterKey) -> None:
    """One request with two steps, as the server counts it."""
    route = Route(random.randrange(GROUPS), (0.3, 0.5, 0.7))
    stats = StepStats(0.001, 0.001, 0.001, 0.01, 0.001, 0.001, 9, 1, 1, ((key, route),), 1, 0, 3, 99, 0, 1, (key,))
    metrics.admitted(key.name, 10, 1)
    metrics.on_step(stats)
    metrics.first_token(key.name, random.random(), 0, Timing(0.0, 0.1, 0.2, 0.0))
    metrics.tokens(1)
    metrics.on_step(stats)
    metrics.tokens(1)
    metrics.waited(0.01, 1)
    metrics.decoded(0.01)
    metrics.finished(key.name, FinishReason.STOP, 1, 1)
    metrics.closed(key.name, 9 * random.random(), 2, failed=False)


def show(title: str, metrics: Metrics, used: list[AdapterKey]) -> None:
    times, text = [], b""
    for _ in range(REPEATS):
        for key in used:
            serve(metrics, key)
        begin = time.thread_time()
        text = metrics.render()
        times.append(1000 * (time.thread_time() - begin))
    size = f"{text.count(b'{')} series, {len(text) / 2**20:.1f} MiB"
    print(f"{title}: {min(times):.2f} ms best, {statistics.median(times):.2f} ms median, {size}")


if __name__ == "__main__":
    main()
