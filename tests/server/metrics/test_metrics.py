"""Metrics: what is counted, that label sets stay bounded, and that a scrape's work does too."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.figures import adapter, serve_one, step
from tucka_runtime.messages import AdapterInfo, AdapterKey, EngineInfo, FinishReason, Route
from tucka_runtime.server.metrics import adapters as adapter_metrics
from tucka_runtime.server.metrics.adapters import BLOCK, MAX_STALE, AdapterMetrics
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.metrics.specs import TIERS
from tucka_runtime.server.metrics.vllm import ALIASES, Residence

AGE = "tucka_adapter_oldest_waiting_seconds"


def samples(metrics: Metrics, **state) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render(**state).decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("llama", max_adapters=4, block_size=16)
    metrics.adapter_arrived(adapter("fin"))
    return metrics


def test_a_request_from_start_to_end(metrics: Metrics) -> None:
    serve_one(metrics)
    assert value(metrics, "tucka_requests_total", finish_reason="length") == 1
    assert value(metrics, "tucka_requests_total", finish_reason="error") == 0
    assert value(metrics, "tucka_prompt_tokens_total") == 10
    assert value(metrics, "tucka_cached_prompt_tokens_total") == 4
    assert value(metrics, "tucka_generation_tokens_total") == 3
    assert value(metrics, "tucka_time_to_first_token_seconds_bucket", le="0.3") == 1
    assert value(metrics, "tucka_time_to_first_token_seconds_bucket", le="0.2") == 0
    assert value(metrics, "tucka_inter_token_seconds_sum") == pytest.approx(0.025)
    assert value(metrics, "tucka_request_queue_seconds_sum") == pytest.approx(0.1)
    assert value(metrics, "tucka_request_prefill_seconds_sum") == pytest.approx(0.1)
    assert value(metrics, "tucka_request_decode_seconds_sum") == pytest.approx(0.05)
    assert value(metrics, "tucka_adapter_requests_total", model="fin", finish_reason="length") == 1
    assert value(metrics, "tucka_adapter_generation_tokens_total", model="fin") == 3
    assert value(metrics, "tucka_adapter_time_to_first_token_seconds_bucket", model="fin", le="0.5") == 1
    assert value(metrics, "tucka_adapter_request_latency_seconds_sum", model="fin") == pytest.approx(0.4)
    assert value(metrics, "tucka_adapter_route_changes_total", model="fin") == 2
    assert value(metrics, "tucka_adapter_errors_total", model="fin") == 0
    assert value(metrics, "tucka_adapter_load_seconds", model="fin", stage="fold") == pytest.approx(0.2)
    assert value(metrics, "tucka_adapter_resident_bytes", model="fin") == 4096


def held(metrics: Metrics) -> tuple[float | None, ...]:
    """What the engine is said to hold: running, waiting, pages; and running as vLLM calls it."""
    found = samples(metrics)
    vllm = next(value for (name, _), value in found.items() if name == "vllm:num_requests_running")
    names = ("tucka_requests_running", "tucka_requests_waiting", "tucka_kv_blocks_used")
    return (*(found[name, ()] for name in names), vllm)


def test_what_the_engine_holds_is_what_it_says(metrics: Metrics) -> None:
    """Not what is in flight here: else nobody would see what it does not give back."""
    assert held(metrics) == (0, 0, 0, 0)
    metrics.admitted("fin", 10, sequences=3)
    assert held(metrics) == (0, 0, 0, 0)
    metrics.on_step(*step(running=2, waiting=1, blocks_used=3, adapters=(AdapterKey("fin", 1),)))
    assert held(metrics) == (2, 1, 3, 2)
    metrics.finished("fin", FinishReason.ABORT, 3)
    assert held(metrics) == (2, 1, 3, 2)
    metrics.on_idle(step(running=0, blocks_used=0)[1])
    assert held(metrics) == (0, 0, 0, 0)
    assert value(metrics, "tucka_steps_total") == 1


def test_what_the_engine_never_gave_back_is_seen(metrics: Metrics) -> None:
    metrics.on_step(*step(running=1, blocks_used=2))
    assert held(metrics) == (1, 0, 2, 1)
    metrics.on_idle(step(running=0, blocks_used=2)[1])
    assert held(metrics) == (0, 0, 2, 0)


def test_a_dead_engine_runs_nothing(metrics: Metrics) -> None:
    metrics.admitted("fin", 10, sequences=1)
    metrics.on_step(*step())
    metrics.on_idle(None)
    assert held(metrics) == (0, 0, 0, 0)  # a new one may be up before it has told anything
    metrics.on_step(*step())
    found = samples(metrics, up=False, restarts=2)
    assert found["tucka_engine_up", ()] == 0 and found["tucka_requests_running", ()] == 0
    assert found["tucka_engine_restarts_total", ()] == 2
    assert samples(metrics, restarts=2)["tucka_engine_restarts_total", ()] == 2


def test_preemptions_go_on_counting_after_a_restart(metrics: Metrics) -> None:
    for total in (2, 5, 1):
        metrics.on_step(*step(preemptions=total, displacements=2 * total))
    assert value(metrics, "tucka_preemptions_total") == 6
    assert value(metrics, "tucka_displacements_total") == 12


def test_steps_by_stage(metrics: Metrics) -> None:
    metrics.on_step(*step(route=0.25))
    assert value(metrics, "tucka_step_seconds_total", stage="route") == 0.25
    assert value(metrics, "tucka_step_duration_seconds_sum") == pytest.approx(0.255)
    assert value(metrics, "tucka_batch_tokens_bucket", le="4.0") == 0
    assert value(metrics, "tucka_batch_tokens_bucket", le="8.0") == 1
    assert value(metrics, "tucka_step_tokens_total", kind="prefill") == 5


def test_expert_groups_and_their_balance(metrics: Metrics) -> None:
    key = AdapterKey("fin", 1)
    assert value(metrics, "tucka_adapter_group_selections_total", model="fin", group="2") == 0
    assert value(metrics, "tucka_adapter_load_balance", model="fin") is None
    for group in (0, 1, 2) * 20:
        metrics.on_step(*step(routes=((key, Route(group, (0.35, 0.5, 0.65))),)))
    assert value(metrics, "tucka_adapter_group_selections_total", model="fin", group="1") == 20
    assert value(metrics, "tucka_adapter_load_balance", model="fin") == pytest.approx(1, abs=1e-3)
    assert value(metrics, "tucka_adapter_route_weight_bucket", model="fin", le="0.5") == 120
    for _ in range(20_000):  # a router that collapses shows, however well it worked before
        metrics.adapters.routed(key, Route(1, (0.5,)))
    assert value(metrics, "tucka_adapter_load_balance", model="fin") == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("info", [adapter("fin", 2, "lora", k=0), adapter("fin", 2, scope="pinned")])
def test_adapters_without_a_router_have_no_expert_series(metrics: Metrics, info: AdapterInfo) -> None:
    metrics.adapter_arrived(info)
    metrics.on_step(*step(routes=((AdapterKey("fin", 1), Route(0, (0.5,))),)))
    assert not [key for key in samples(metrics) if "group_selections" in key[0] or "load_balance" in key[0]]


def test_a_reload_counts_on_but_for_its_experts(metrics: Metrics) -> None:
    serve_one(metrics)
    metrics.on_step(*step(routes=((AdapterKey("fin", 1), Route(0, (0.5,))),)))
    metrics.adapter_arrived(adapter("fin", 7))
    metrics.on_step(*step(routes=((AdapterKey("fin", 1), Route(0, (0.5,))),)))  # a request of the old generation
    assert value(metrics, "tucka_adapter_generation", model="fin") == 7
    assert value(metrics, "tucka_adapter_loads_total", model="fin") == 2
    assert value(metrics, "tucka_adapter_prompt_tokens_total", model="fin") == 10
    assert value(metrics, "tucka_adapter_group_selections_total", model="fin", group="0") == 0


def test_unloading_deletes_every_series_and_late_requests_add_none(metrics: Metrics) -> None:
    metrics.admitted("fin", 10, 1)
    metrics.on_step(*step(adapters=(AdapterKey("fin", 1),)))
    metrics.adapter_unloaded("fin")
    metrics.first_token("fin", 0.1, 0, None)
    metrics.on_step(*step(adapters=(AdapterKey("fin", 1),), routes=((AdapterKey("fin", 1), Route(0, (0.5,))),)))
    metrics.finished("fin", FinishReason.STOP)
    metrics.closed("fin", 1.0, 3, failed=False)
    assert b'fin"' not in metrics.render() and b'="fin' not in metrics.render()
    assert value(metrics, "tucka_requests_total", finish_reason="stop") == 1


def test_labels_come_from_closed_sets_only(metrics: Metrics) -> None:
    before = set(samples(metrics))
    for i in range(1000):
        serve_one(metrics, f"unknown-{i}")
        metrics.adapter_refused("invalid_adapter")
    added = set(samples(metrics)) - before
    assert not [key for key in added if "unknown" in str(key)]
    assert len(added) < 5


def test_label_values_are_escaped() -> None:
    metrics = Metrics('a"b\\c\nd%s', vllm=True)
    serve_one(metrics, 'a"b\\c\nd%s')
    assert value(metrics, "tucka_adapter_prompt_tokens_total", model='a"b\\c\nd%s') == 10
    assert value(metrics, "tucka_adapter_time_to_first_token_seconds_count", model='a"b\\c\nd%s') == 1


def test_what_dashboards_for_vllm_read_is_ours_under_another_name(metrics: Metrics) -> None:
    """By the names of vLLM's own Grafana dashboard; the whole server's, by the base's name."""
    serve_one(metrics)
    metrics.on_step(*step(preemptions=2, drafts=3))
    metrics.adapter_brought("load", 0.2)
    found = samples(metrics)
    vllm = {"model_name": "llama", "engine": "0"}
    for name, (own, *_) in ALIASES.items():
        ours = {
            (key.removeprefix(own), tuple(value for _, value in labels)): value
            for (key, labels), value in found.items()
            if key.startswith(own)
        }
        theirs = {
            (key.removeprefix(name), tuple(value for label, value in labels if label not in vllm)): value
            for (key, labels), value in found.items()
            if key.startswith(name) and dict(labels).items() >= vllm.items()
        }
        assert theirs == ours and any(ours.values()), name
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total", **vllm) == 15
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total", **vllm) == 6
    assert value(metrics, "vllm:request_success_total", finished_reason="length", **vllm) == 1
    assert value(metrics, "vllm:time_to_first_token_seconds_bucket", le="0.3", **vllm) == 1
    assert value(metrics, "vllm:request_prompt_tokens_bucket", le="10.0", **vllm) == 1
    assert value(metrics, "vllm:request_generation_tokens_sum", **vllm) == 3


def test_the_oldest_that_waits_is_shown_by_name_while_it_waits(metrics: Metrics) -> None:
    metrics.adapter_arrived(adapter("fin"))
    found = samples(metrics, oldest={None: 2.5, "fin": 7.0, "gone": 9.0})
    assert found["tucka_oldest_waiting_seconds", ()] == 9
    ages = {dict(labels)["model"]: age for (name, labels), age in found.items() if name == AGE}
    assert ages == {metrics.adapters.base_name: 2.5, "fin": 7.0}, "a name that is not loaded has no series"
    found = samples(metrics)
    assert found["tucka_oldest_waiting_seconds", ()] == 0 and AGE not in {name for name, _ in found}


def test_vllm_names_can_be_left_out() -> None:
    assert b"vllm:" in Metrics(vllm=True).render() and b"vllm:" not in Metrics(vllm=False).render()


def test_the_engine_is_described() -> None:
    info = EngineInfo("llama", 320, 256, (2,), "float32", "cpu", 4096, "f", 2048, "reference", 2, 64, "float32")
    found = samples(Metrics(block_size=16), info=info, version="1.2")
    labels = {"version": "1.2", "type": "llama", "dtype": "float32", "device": "cpu", "kernels": "reference"}
    assert found["tucka_engine_info", tuple(sorted(labels.items()))] == 1
    assert found["tucka_kv_blocks", ()] == 256


def test_a_scrape_writes_few_rows_however_many_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = AdapterMetrics("base")
    for i in range(1000):
        table.arrived(adapter(f"a{i}", i))
    table.render()
    written = []
    render = adapter_metrics._Row.render
    monkeypatch.setattr(adapter_metrics._Row, "render", lambda row: written.append(1) or render(row))
    for i in range(1000):
        table.first_token(f"a{i}", 0.1)
        assert len(table._stale) <= MAX_STALE
    before = len(written)
    text = b"".join(table.render())
    assert len(written) - before <= MAX_STALE
    assert text.count(b"_time_to_first_token_seconds_count{") == 1000
    written.clear()
    assert b"".join(table.render()) == text and not written


def test_rows_that_come_and_go_leave_every_family_whole() -> None:
    table = AdapterMetrics("base")
    alone = b"".join(table.render())
    names = [f"a{i}" for i in range(3 * BLOCK)]
    for i, name in enumerate(names):
        table.arrived(adapter(name, i))
    for name in names[::2] + names[1:BLOCK:2]:  # a block is empty then, others have room
        table.unloaded(name)
    for i, name in enumerate(names):  # some of them are there, and are loaded again
        table.arrived(adapter(name, 100 + i))
        table.first_token(name, 0.1)
    found = {family.name: family for family in text_string_to_metric_families(b"".join(table.render()).decode())}
    generations = {s.labels["model"]: s.value for s in found["tucka_adapter_generation"].samples}
    assert generations == {name: 100 + i for i, name in enumerate(names)}
    assert len(found["tucka_adapter_loads"].samples) == len(names)
    assert sorted(found) == sorted(set(found)) and len(found) == len(adapter_metrics.FAMILIES)
    for name in names:
        table.unloaded(name)
    assert b"".join(table.render()) == alone and len(table._blocks) == 1


def test_series_stay_bounded_however_many_adapters_come_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in slots, and the last that had one. Counts go on where one comes back in time."""
    monkeypatch.setattr(adapter_metrics, "MAX_IDLE_ROWS", 3)
    table = AdapterMetrics("base")
    for i in range(50):
        key = AdapterKey(f"a{i}", i)
        table.arrived(adapter(key.name, i))
        table.first_token(key.name, 0.1)
        if i >= 2:
            table.left(AdapterKey(f"a{i - 2}", i - 2))
    text = b"".join(table.render()).decode()
    assert text.count("tucka_adapter_info{") <= 2 + 4
    assert 'resident_bytes{model="a49"} 4096' in text and 'resident_bytes{model="a47"} 0' in text
    table.arrived(adapter("a47", 47))
    table.first_token("a47", 0.1)
    text = b"".join(table.render()).decode()
    assert 'first_token_seconds_count{model="a47"} 2' in text and 'resident_bytes{model="a47"} 4096' in text
    table.left(AdapterKey("a47", 46))  # an older generation of it
    assert 'resident_bytes{model="a47"} 4096' in b"".join(table.render()).decode()


def test_tiers_are_counted_and_told_to_routers(metrics: Metrics) -> None:
    tiers = AdapterTiers(9, (Residence("fin", 8, True),), (Residence("law", 16), Residence("tax", 4)), 300, 2)
    found = samples(metrics, tiers=replace(tiers, awaited_names=frozenset({"fin"})))
    assert [found["tucka_adapters", (("tier", tier),)] for tier in TIERS] == [1, 2, 6]
    assert found["tucka_adapters_loaded", ()] == 9 and found["tucka_adapter_host_bytes", ()] == 300
    assert found["tucka_adapters_awaited", ()] == 2
    told = {
        tuple(dict(labels)[name] for name in ("adapter_name", "level", "pinned", "rank"))
        for (name, labels) in found
        if name == "vllm:lora_adapter_loaded"
    }
    assert told == {("fin", "gpu", "true", "8"), ("law", "cpu", "false", "16"), ("tax", "cpu", "false", "4")}
    (info,) = [dict(labels) for name, labels in found if name == "vllm:lora_requests_info"]
    assert info["waiting_lora_adapters"] == "fin"


def test_the_engine_knows_nothing_of_metrics() -> None:
    """They are counted in the HTTP process, so that neither counting nor a scrape takes a step's time."""
    ours = {"metrics.py", "adapter_metrics.py", "vllm_metrics.py", "exposition.py"}
    package = Path(adapter_metrics.__file__).parent
    for path in package.rglob("*.py"):
        if path.name not in ours:
            assert not re.search(r"import.*metrics|prometheus_client", path.read_text()), path
