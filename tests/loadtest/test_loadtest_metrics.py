"""The figures, from recorded time stamps: against hand-made truth and against vLLM's definitions, written out anew."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.report import metrics, stats
from tucka_runtime.loadtest.report.metrics import Figures, Latency


def record(start, times, tokens=None, model="a", chars=None, **more):
    events = list(zip(times, chars or [4] * len(times), strict=True))
    end = times[-1] if times else start
    return Record("load", model, start=start, end=end, events=events, output_tokens=tokens, prompt_tokens=10, **more)


def test_by_hand():
    x = Latency(record(10.0, [10.5, 10.6, 10.8, 11.1], tokens=4))
    assert x.ttft == pytest.approx(0.5)
    assert x.itl == pytest.approx([0.1, 0.2, 0.3])
    assert x.e2el == pytest.approx(1.1)
    assert x.tpot == pytest.approx(0.2)


def test_tokens_in_bundles_count_for_tpot_and_not_for_itl():
    x = Latency(record(0.0, [1.0, 2.0], tokens=11))
    assert x.itl == pytest.approx([1.0])
    assert x.tpot == pytest.approx(0.1)


def test_one_token_has_no_tpot_and_counts_as_zero_for_goodput():
    single = record(0.0, [0.2], tokens=1)
    assert Latency(single).tpot is None
    summary = Figures([single], 1.0, {"tpot": 0.001}).summary()
    assert summary["request_goodput"] == 1.0
    assert summary["mean_tpot_ms"] is None


def test_events_without_text_are_no_tokens_unless_counted():
    chat = record(0.0, [0.1, 0.5, 0.6, 0.6001], tokens=2, chars=[0, 3, 3, 0])
    assert Latency(chat).ttft == pytest.approx(0.5)
    assert Latency(chat).itl == pytest.approx([0.1])
    exact = Latency(chat, count_empty=True)
    assert exact.ttft == pytest.approx(0.1)
    assert exact.itl == pytest.approx([0.4, 0.1, 0.0001])
    assert Latency(chat).e2el == exact.e2el == pytest.approx(0.6001)


def test_an_answer_of_no_text_has_the_time_of_its_only_event():
    assert Latency(record(0.0, [0.3], tokens=1, chars=[0])).ttft == pytest.approx(0.3)


def vllm_figures(records, duration, slo):
    """calculate_metrics of `vllm bench serve`, from its description: per request ttft, itl, latency, output_tokens."""
    ttfts, itls, tpots, all_tpots, e2els, out, good = [], [], [], [], [], 0, 0
    for r in records:
        ttft = r.events[0][0] - r.start
        last = r.start + ttft
        for t, _ in r.events[1:]:
            itls.append(t - last)
            last = t
        latency = last - r.start
        tpot = 0.0
        if r.output_tokens > 1:
            tpot = (latency - ttft) / (r.output_tokens - 1)
            tpots.append(tpot)
        all_tpots.append(tpot)
        ttfts.append(ttft)
        e2els.append(latency)
        out += r.output_tokens
        measured = {"ttft": ttft, "tpot": tpot, "e2el": latency}
        good += all(slo[name] / 1000 >= measured[name] for name in slo)
    result = {
        "completed": len(records),
        "request_throughput": len(records) / duration,
        "request_goodput": good / duration,
        "output_throughput": out / duration,
        "total_token_throughput": (sum(r.prompt_tokens for r in records) + out) / duration,
    }
    for name, values in (("ttft", ttfts), ("tpot", tpots), ("itl", itls), ("e2el", e2els)):
        result[f"mean_{name}_ms"] = np.mean(values) * 1000
        result[f"median_{name}_ms"] = np.median(values) * 1000
        result[f"std_{name}_ms"] = np.std(values) * 1000
        result[f"p99_{name}_ms"] = np.percentile(values, 99) * 1000
        result[f"p99.9_{name}_ms"] = np.percentile(values, 99.9) * 1000
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans())
def test_the_same_figures_as_vllm_on_the_same_time_stamps(seed, n, some_empty):
    rng = random.Random(seed)
    records = []
    for i in range(n):
        start, t = i * 0.1, i * 0.1 + rng.expovariate(5)
        times = [t]
        for _ in range(rng.randint(1, 30)):
            times.append(times[-1] + rng.expovariate(50))
        chars = [rng.choice((0, 5)) if some_empty else 5 for _ in times]
        records.append(record(start, times, tokens=len(times) + rng.randint(0, 3), chars=chars))
    slo = {"ttft": 200.0, "tpot": 25.0, "e2el": 900.0}
    ours = Figures(records, 12.5, slo, (99, 99.9), count_empty=some_empty).summary()
    for name, value in vllm_figures(records, 12.5, slo).items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name


def test_the_same_figures_as_vllms_own_function_on_a_recorded_run():
    """The file has the requests of a run against vLLM and what its calculate_metrics returned for them."""
    recorded = json.loads(Path(__file__).with_name("vllm_figures.json").read_text())
    records = [Record.from_json({"kind": "load", "model": "m"} | r) for r in recorded["requests"]]
    limits = recorded["goodput_slo_ms"]
    ours = Figures(records, recorded["duration"], limits, (50, 90, 99, 99.9), count_empty=True).summary()
    assert len(recorded["figures"]) == 38 and recorded["figures"]["failed"] == 2
    for name, value in recorded["figures"].items():
        assert ours[name] == pytest.approx(value, rel=1e-12), name


def test_failed_requests_count_and_have_no_latency():
    bad = record(0.0, [0.1], tokens=1, cause="truncated")
    summary = Figures([bad, record(0.0, [0.2], tokens=1)], 1.0, {"ttft": 500.0}).summary()
    assert (summary["completed"], summary["failed"], summary["good_share"]) == (1, 1, 0.5)
    assert summary["mean_ttft_ms"] == pytest.approx(200)
    assert metrics.failures([bad]) == {"truncated": 1}


def test_nothing_answered_gives_nulls_not_zeros():
    summary = Figures([record(0.0, [], cause="connect")], 1.0, {}).summary()
    assert summary["completed"] == 0
    assert summary["mean_ttft_ms"] is None
    assert summary["request_goodput"] is None


def test_itl_slo_is_held_against_the_worst_gap():
    stalled = record(0.0, [0.1, 0.11, 0.9], tokens=3)
    assert Figures([stalled], 1.0, {"itl": 500.0}).summary()["request_goodput"] == 0
    assert Figures([stalled], 1.0, {"itl": 800.0}).summary()["request_goodput"] == 1


def test_per_adapter_and_fairness():
    records = [record(0.0, [0.1, 0.2], tokens=2, model="fast", correct=True)] * 3
    records += [record(0.0, [0.9, 1.0], tokens=2, model="slow", correct=c) for c in (True, False)]
    per_adapter = Figures(records, 2.0, {"ttft": 500.0}).per_adapter()
    assert list(per_adapter) == ["fast", "slow"]
    assert per_adapter["fast"]["request_goodput"] == 1.5
    assert (per_adapter["fast"]["good_share"], per_adapter["slow"]["good_share"]) == (1.0, 0.0)
    assert per_adapter["slow"]["score"] == 0.5
    assert per_adapter["fast"]["tokens_per_second_of_a_request"] == pytest.approx(10)
    fairness = metrics.fairness(per_adapter)
    assert fairness["jain_goodput"] == pytest.approx(0.5)
    assert fairness["jain_speed"] == pytest.approx(12**2 / (2 * (100 + 4)))


def test_adapters_tokens_add_up_to_all_where_the_server_tells_no_usage():
    records = [record(0.0, [0.1, 0.2, 0.3]), record(0.0, [0.1, 0.2], tokens=7, model="b")]
    records.append(record(0.0, [0.1], model="b", cause="truncated"))
    figures = Figures(records, 1.0, {})
    tokens = {model: a["output_tokens"] for model, a in figures.per_adapter().items()}
    assert tokens == {"a": 3, "b": 7} and sum(tokens.values()) == figures.summary()["total_output_tokens"]


def test_cold_and_warm_are_of_the_same_adapters():
    cold = record(0.0, [1.0], model="a")
    cold.kind = "cold"
    result = metrics.cold_and_warm([cold, record(0.0, [0.2], model="a"), record(0.0, [9.0], model="b")], [50], False)
    assert (result["cold_requests"], result["warm_requests"]) == (1, 1)
    assert result["median_cold_ttft_ms"] == pytest.approx(1000)
    assert result["median_warm_ttft_ms"] == pytest.approx(200)


def test_peak_concurrency_of_half_open_intervals():
    assert metrics.peak_concurrency([record(0.0, [1.0]), record(1.0, [2.0])]) == 1
    assert metrics.peak_concurrency([record(0.0, [1.5]), record(1.0, [2.0])]) == 2


def test_series_conserve_what_they_count():
    records = [record(i * 0.3, [i * 0.3 + 0.1 * j for j in range(1, 8)]) for i in range(20)]
    s = metrics.series(records, 7.0, buckets=10)
    assert sum(s["output_events_per_s"]) * s["width"] == pytest.approx(140, rel=1e-3)
    assert sum(s["completed_per_s"]) * s["width"] == pytest.approx(20, rel=1e-3)
    assert sum(s["in_flight"]) * s["width"] == pytest.approx(sum(r.end - r.start for r in records), rel=1e-2)


def test_a_record_survives_json():
    r = record(1.5, [1.7, 1.9], tokens=2, chars=[3, 0], text="hey", expected="hey", correct=False)
    assert Record.from_json(r.to_json()) == Record.from_json(Record.from_json(r.to_json()).to_json())
    again = Record.from_json(r.to_json())
    assert again.correct is False
    assert Latency(again).ttft == pytest.approx(Latency(r).ttft, abs=1e-6)


# ---- statistics


@given(st.lists(st.just(0.0) | st.floats(1e-6, 1e6), max_size=50))
def test_jain_is_between_one_nth_and_one(values):
    index = stats.jain(values)
    assert index is None if len(values) < 2 or not any(values) else 1 / len(values) - 1e-9 <= index <= 1 + 1e-9


def test_jain_by_hand():
    assert stats.jain([5, 5, 5]) == pytest.approx(1)
    assert stats.jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert stats.jain([1, 2, 3]) == pytest.approx(36 / 42)
    assert stats.jain([0, 0]) is None and stats.jain([5]) is None, "nothing to compare"


def test_the_t_interval_by_hand():
    mean, low, high = stats.mean_interval([10.0, 12.0, 14.0])
    assert mean == 12
    assert high - mean == pytest.approx(4.303 * 2 / 3**0.5)
    assert mean - low == pytest.approx(high - mean)


@pytest.mark.parametrize("p", [50, 90, 99])
def test_intervals_cover_the_truth_as_often_as_they_say(p):
    rng = np.random.default_rng(0)
    truth = -np.log(1 - p / 100)
    inside = 0
    for _ in range(400):
        low, high = stats.percentile_interval(rng.exponential(size=1000), p)
        inside += low <= truth <= high
    assert 0.91 <= inside / 400 <= 1.0


def test_mean_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    inside = sum(low <= 3 <= high for _, low, high in (stats.mean_interval(rng.normal(3, 1, 5)) for _ in range(1000)))
    assert 0.93 <= inside / 1000 <= 0.97


def test_ratio_interval_is_symmetric_in_logarithms():
    mean, low, high = stats.ratio_interval([0.5, 2.0])
    assert mean == pytest.approx(1)
    assert low * high == pytest.approx(1)
