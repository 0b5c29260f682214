"""Our text says what prometheus-client's says of the same things."""

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tucka_runtime.server.metrics.exposition import Family, Histogram, Value, head, label

BOUNDS = (0.1, 1, 2.5)
OBSERVED = (0.05, 0.1, 0.11, 2.5, 7, 0.3)
NASTY = 'a"b\\c\nd%s{}='


def families(text: bytes | str) -> dict[str, tuple[str, str, set[tuple[object, ...]]]]:
    text = text.decode() if isinstance(text, bytes) else text
    return {
        family.name: (
            family.type,
            family.documentation,
            {(sample.name, tuple(sorted(sample.labels.items())), sample.value) for sample in family.samples},
        )
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }


def test_it_is_the_reference_text() -> None:
    registry = prometheus_client.CollectorRegistry()
    counter = prometheus_client.Counter("t_done", "done so far", ["code", "who"], registry=registry)
    gauge = prometheus_client.Gauge("t_now", "now", registry=registry)
    histogram = prometheus_client.Histogram("t_seconds", "how long", ["who"], registry=registry, buckets=BOUNDS)
    prometheus_client.Histogram("t_none", "nothing yet", registry=registry, buckets=BOUNDS)
    ours_counter: Family[Value] = Family("t_done_total", "counter", "done so far", ("code", "who"), Value)
    ours_gauge: Family[Value] = Family("t_now", "gauge", "now", (), Value)
    ours_histogram: Family[Histogram] = Family(
        "t_seconds", "histogram", "how long", ("who",), lambda name, labels: Histogram(name, BOUNDS, labels)
    )
    ours_none: Family[Histogram] = Family(
        "t_none", "histogram", "nothing yet", (), lambda name, labels: Histogram(name, BOUNDS, labels)
    )
    ours_none.labels()
    for who in ("x", NASTY):
        counter.labels("200", who).inc()
        counter.labels("200", who).inc(1e9 + 0.25)
        ours_counter.labels("200", who).inc()
        ours_counter.labels("200", who).inc(1e9 + 0.25)
        for seconds in OBSERVED:
            histogram.labels(who).observe(seconds)
            ours_histogram.labels(who).observe(seconds)
    gauge.set(True)
    ours_gauge.labels().set(True)
    text = "".join(family.render() for family in (ours_counter, ours_gauge, ours_histogram, ours_none))
    assert families(text) == families(prometheus_client.generate_latest(registry))


def test_labels_are_as_many_as_the_family_has() -> None:
    family: Family[Value] = Family("t", "gauge", "", ("a", "b"), Value)
    with pytest.raises(ValueError, match="shorter"):
        family.labels("1")
    assert family.render() == head("t", "gauge", "")
    assert family.labels("1", "2") is family.labels("1", "2")


def test_a_histogram_knows_whether_it_has_seen_anything() -> None:
    histogram = Histogram("t", BOUNDS, label("who", "x"))
    assert not histogram
    histogram.observe(100)
    assert histogram
