"""The metrics of several servers as one exposition, which prometheus_client reads."""

from prometheus_client.parser import text_string_to_metric_families

from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.ray.figures import merged


def test_every_figure_says_whose_it_is() -> None:
    replicas = {name: Metrics() for name in ("one", "two")}
    for count, metrics in enumerate(replicas.values(), 1):
        for _ in range(count):
            metrics.answered("/v1/models", "GET", "200")
            metrics.adapter_waited(0.1)
    whole = merged({name: metrics.render(True).decode() for name, metrics in replicas.items()})
    alone = list(text_string_to_metric_families(replicas["one"].render(True).decode()))
    families = list(text_string_to_metric_families(whole))
    assert [(family.name, family.type) for family in families] == [(family.name, family.type) for family in alone]
    samples = {sample for family in families for sample in [tuple(s.labels.items()) for s in family.samples]}
    assert all(dict(labels)["replica"] in replicas for labels in samples)
    (requests,) = [family for family in families if family.name == "tucka_http_requests"]
    counts = {sample.labels["replica"]: sample.value for sample in requests.samples if sample.name.endswith("_total")}
    assert counts == {"one": 1, "two": 2}


def test_values_with_braces_and_blanks() -> None:
    text = '# HELP a b c\n# TYPE a gauge\na{x="y} 1",z="#"} 2\n'
    assert merged({"r": text}) == '# HELP a b c\n# TYPE a gauge\na{x="y} 1",z="#",replica="r"} 2\n'
    assert merged({}) == ""
