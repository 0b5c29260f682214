"""docs/operations.md names every metric, label, alert and setting, and no others."""

import re
from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from tests.support import ROOT
from tests.support.figures import adapter, serve_one, step
from tucka_runtime.config import EngineConfig, ServerConfig
from tucka_runtime.messages import AdapterKey, EngineInfo, Route
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.metrics.vllm import Residence

TEXT = (ROOT / "docs" / "operations.md").read_text()


def shown() -> dict[str, tuple[str, set[str]]]:
    """(type, labels) by name, of a server that has done everything."""
    metrics = Metrics("base", max_adapters=4, block_size=16)
    metrics.adapter_arrived(adapter("fin"))
    serve_one(metrics)
    metrics.on_step(*step(routes=((AdapterKey("fin", 1), Route(0, (0.5,))),)))
    metrics.load_took({"read": 0.1})
    metrics.answered("/health", "GET", "200")
    metrics.keys.names(["acme"])
    info = EngineInfo("llama", 320, 256, (2,), "float32", "cpu", 4096, "f", 2048, "reference", 2, 64, "float32")
    found = {}
    tiers = AdapterTiers(1, (Residence("fin", 8),))
    for family in text_string_to_metric_families(metrics.render(info=info, oldest={"fin": 1.0}, tiers=tiers).decode()):
        if family.name.startswith("process_"):
            continue
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    return found


def test_every_metric_has_its_row() -> None:
    rows = {}
    for name, kind, labels in re.findall(r"^\| `(tucka_\w+)` \| (\w+) \|([^|]*)\|", TEXT, re.MULTILINE):
        assert name not in rows
        rows[name] = (kind, set(re.findall(r"`(\w+)`", labels)))
    assert rows == {name: row for name, row in shown().items() if name.startswith("tucka_")}


def test_every_vllm_name_has_its_row() -> None:
    rows = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(vllm:\w+)` \|([^|]*)\|", TEXT, re.MULTILINE)
    }
    expected = {name: labels for name, (_, labels) in shown().items() if name.startswith("vllm:")}
    assert rows == {name: labels - {"model_name", "engine"} for name, labels in expected.items()}


def test_every_name_in_the_text_is_real() -> None:
    names = {name for name in re.findall(r"`((?:tucka_|vllm:)\w+)", TEXT) if not name.startswith("tucka_runtime")}
    names = {re.sub("_bucket$", "", name) for name in names} - {"tucka_engine_process_resident_memory_bytes"}
    assert names <= set(shown())


def test_every_alert_has_its_row() -> None:
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    assert re.findall(r"- alert: (\w+)", rules) == re.findall(r"^\| `(Tucka\w+)`", TEXT, re.MULTILINE)


def test_the_rules_and_the_dashboard_name_real_metrics() -> None:
    real = {re.sub("_(sum|count|bucket)$", "", name) for name in shown()}
    for path in ("prometheus/rules.yml", "grafana/tucka.json"):
        text = (ROOT / "deploy" / path).read_text()
        used = set(re.findall(r"\btucka_\w+", text)) - set(re.findall(r"tucka_engine_process_\w+", text))
        assert {re.sub("_(sum|count|bucket)$", "", name) for name in used} <= real, path


def test_every_setting_that_is_named_exists() -> None:
    known = {"--" + field.name.replace("_", "-") for kind in (EngineConfig, ServerConfig) for field in fields(kind)}
    known |= {"--no-vllm-metrics", "--no-console", "--replace", "--interval", "--once", "--balance"}
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= known
