"""From records to figures, defined as `vllm bench serve` does (its benchmark, calculate_metrics).

For a request that was answered whole, with events at times e_1 ... e_n and o output tokens:

    TTFT   e_1 - start
    ITL    e_2 - e_1, e_3 - e_2, ...          one sample per gap; an event may carry several tokens
    E2EL   end of the answer - start          the end is the last event with `choices`, not [DONE]
    TPOT   (E2EL - TTFT) / (o - 1)            only where o > 1; for goodput it counts as 0 otherwise

    request_throughput  completed / duration          output_throughput  Σ o / duration
    request_goodput     requests within every SLO / duration

`duration` runs from the start of the run to the end of its last request. o is the server's `usage.completion_tokens`;
where it tells none, the number of events. Percentiles are linear between ranks, standard deviations are population's.

One difference, which `count_empty=True` removes: events without text (a chat server's role event, a closing event
that has only finish_reason) are no token that a reader sees, so they neither stop TTFT's clock nor make ITL samples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tucka_runtime.loadtest import slo
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report import stats

LATENCIES = ("ttft", "tpot", "itl", "e2el")


class Latency:
    """The latencies of one answered request, in seconds. `tpot` is None where there is one token or none."""

    __slots__ = ("e2el", "itl", "tokens", "tpot", "ttft")

    def __init__(self, record: Record, count_empty: bool = False) -> None:
        times = [t for t, chars in record.events if chars or count_empty] or [record.events[0][0]]
        self.ttft = times[0] - record.start
        self.itl = [b - a for a, b in pairwise(times)]
        self.e2el = record.events[-1][0] - record.start
        self.tokens = len(times) if record.output_tokens is None else record.output_tokens
        self.tpot = (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    def milliseconds(self) -> dict[str, float]:
        """What an SLO is held against; `itl` is the worst gap."""
        seconds = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el, "itl": max(self.itl, default=0.0)}
        return {name: value * 1000 for name, value in seconds.items()}


def spread(name: str, seconds: Sequence[float], percentiles: Iterable[float]) -> dict[str, float | None]:
    """mean_, median_, std_ and pNN_ of one latency in milliseconds, under vLLM's names. None without samples."""
    names = {f"p{p:g}": p for p in percentiles}
    if not len(seconds):
        return {f"{key}_{name}_ms": None for key in ("mean", "median", "std", *names)}
    ms = np.asarray(seconds) * 1000
    values = {"mean": np.mean(ms), "median": np.median(ms), "std": np.std(ms)}
    values |= {key: np.percentile(ms, p) for key, p in names.items()}
    return {f"{key}_{name}_ms": float(value) for key, value in values.items()}


class Figures:
    """All samples of one run; `summary` is what the JSON has."""

    def __init__(
        self,
        records: Iterable[Record],
        duration: float,
        limits: Mapping[str, float],
        percentiles: Sequence[float] = (50, 90, 99),
        count_empty: bool = False,
    ) -> None:
        self.records = list(records)
        self.duration, self.limits, self.percentiles = duration, limits, percentiles
        self.count_empty = count_empty
        self.done = [(r, Latency(r, count_empty)) for r in self.records if r.ok]
        self.first_start = min((r.start for r, _ in self.done), default=0.0)
        self.samples: dict[str, list[float]] = {
            "ttft": [x.ttft for _, x in self.done],
            "tpot": [x.tpot for _, x in self.done if x.tpot is not None],
            "itl": [gap for _, x in self.done for gap in x.itl],
            "e2el": [x.e2el for _, x in self.done],
        }

    @property
    def good(self) -> list[Record]:
        return [r for r, x in self.done if slo.met(self.limits, x.milliseconds())]

    def summary(self) -> dict[str, Any]:
        duration = self.duration
        total_in = sum(r.prompt_tokens or 0 for r, _ in self.done)
        total_out = sum(x.tokens for _, x in self.done)
        good = len(self.good) if self.limits else None
        result: dict[str, Any] = {
            "duration": duration,
            "completed": len(self.done),
            "failed": len(self.records) - len(self.done),
            "total_input_tokens": total_in,
            "total_output_tokens": total_out,
            "request_throughput": len(self.done) / duration,
            "request_goodput": None if good is None else good / duration,
            "good_share": None if good is None or not self.records else good / len(self.records),
            "output_throughput": total_out / duration,
            "total_token_throughput": (total_in + total_out) / duration,
            "max_output_tokens_per_s": self.peak_tokens(),
            "max_concurrent_requests": self.peak_requests(),
            "most_in_flight": peak_concurrency(self.records),
        }
        for name in LATENCIES:
            result |= spread(name, self.samples[name], self.percentiles)
        return result

    def peak_tokens(self) -> int:
        """Most events in one second, counted in whole seconds from the first start on."""
        events = (t for r, _ in self.done for t, chars in r.events if chars or self.count_empty)
        seconds = Counter(int(t - self.first_start) for t in events)
        return max(seconds.values(), default=0)

    def peak_requests(self) -> int:
        """Most answered requests that ran during one of these seconds, be it one after another."""
        first = self.first_start
        spans = [(int(r.start - first), int(r.events[-1][0] - first)) for r, _ in self.done]
        seconds = Counter(second for start, end in spans for second in range(start, end + 1))
        return max(seconds.values(), default=0)

    def per_adapter(self) -> dict[str, dict[str, Any]]:
        """The same figures for each model, the shares that met the SLO, and the score where answers were expected."""
        result = {}
        by_model: dict[str, list[Record]] = {}
        for record in self.records:
            by_model.setdefault(record.model, []).append(record)
        good = Counter(r.model for r in self.good)
        tokens: Counter[str] = Counter()
        speed: dict[str, list[float]] = {}
        ttft: dict[str, list[float]] = {}
        for record, x in self.done:
            tokens[record.model] += x.tokens
            speed.setdefault(record.model, []).append(x.tokens / x.e2el if x.e2el > 0 else 0.0)
            ttft.setdefault(record.model, []).append(x.ttft)
        for model, records in sorted(by_model.items(), key=lambda item: -len(item[1])):
            scored = [r.correct for r in records if r.correct is not None]
            result[model] = {
                "requests": len(records),
                "completed": sum(r.ok for r in records),
                "request_goodput": good[model] / self.duration,
                "good_share": good[model] / len(records),
                "output_tokens": tokens[model],
                "tokens_per_second_of_a_request": float(np.mean(speed[model])) if model in speed else None,
                "score": sum(scored) / len(scored) if scored else None,
                **spread("ttft", ttft.get(model, []), self.percentiles),
            }
        return result


def fairness(per_adapter: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Jain's index over adapters, of two things that demand does not skew: the share of an adapter's requests that
    were good (without SLOs: answered), and the tokens per second that its requests got while they ran."""
    shares = [a["good_share"] for a in per_adapter.values()]
    speeds = [a["tokens_per_second_of_a_request"] or 0.0 for a in per_adapter.values()]
    return {
        "jain_goodput": stats.jain(shares),
        "jain_speed": stats.jain(speeds),
    }


def cold_and_warm(records: Iterable[Record], percentiles: Sequence[float], count_empty: bool) -> dict[str, Any]:
    """TTFT of the first request after an adapter was loaded, beside that of all other requests to the same adapters.
    Both have prompts of the same distribution."""
    answered = [r for r in records if r.ok and r.kind in ("load", "cold")]
    cold = [r for r in answered if r.kind == "cold"]
    models = {r.model for r in cold}
    warm = [r for r in answered if r.kind == "load" and r.model in models]
    result: dict[str, Any] = {"cold_requests": len(cold), "warm_requests": len(warm)}
    for name, some in (("cold_ttft", cold), ("warm_ttft", warm)):
        result |= spread(name, [Latency(r, count_empty).ttft for r in some], percentiles)
    return result


def failures(records: Iterable[Record]) -> dict[str, int]:
    """How many requests failed, by cause, most frequent first."""
    return dict(Counter(r.cause for r in records if r.cause is not None).most_common())


def first_details(records: Iterable[Record]) -> dict[str, str]:
    """What the first failure of each cause said, where it said anything."""
    details: dict[str, str] = {}
    for record in records:
        if record.cause is not None and record.detail:
            details.setdefault(record.cause, record.detail)
    return details


def peak_concurrency(records: Iterable[Record]) -> int:
    """Most requests in flight at once, over half-open intervals."""
    steps = sorted(step for r in records for step in ((r.start, 1), (r.end, -1)))
    running = most = 0
    for _, change in steps:
        running += change
        most = max(most, running)
    return most


def series(records: Iterable[Record], duration: float, buckets: int = 120) -> dict[str, Any]:
    """What to draw over time, in equal buckets of at least half a second: output events per second, requests that
    ended well and badly per second, and the mean number in flight."""
    width = max(duration / buckets, 0.5)
    n = int(duration / width) + 1
    events, ended, failed, busy = (np.zeros(n) for _ in range(4))
    edges = np.arange(n) * width
    for r in records:
        for t, chars in r.events:
            events[min(int(t / width), n - 1)] += bool(chars)
        (ended if r.ok else failed)[min(max(int(r.end / width), 0), n - 1)] += 1
        busy += np.clip(np.minimum(r.end, edges + width) - np.maximum(r.start, edges), 0, None)
    return {
        "width": width,
        "output_events_per_s": (events / width).round(3).tolist(),
        "completed_per_s": (ended / width).round(3).tolist(),
        "failed_per_s": (failed / width).round(3).tolist(),
        "in_flight": (busy / width).round(3).tolist(),
    }
