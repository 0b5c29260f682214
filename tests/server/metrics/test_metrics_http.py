"""/metrics over HTTP: closed label sets whatever clients send (row 46), adapters that come and go, a dead engine."""

import time
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import GOLDEN
from tests.support.servers import ASK, Server, series


def vllm_adapters(server: Server, state: str) -> set[str]:
    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics").text)}
    (sample,) = families["vllm:lora_requests_info"].samples
    return set(filter(None, sample.labels[f"{state}_lora_adapters"].split(",")))


def test_row_46_what_clients_make_up_never_becomes_a_label(live: Server) -> None:
    def nonsense(i: int) -> None:
        live.post("/v1/completions", ASK | {"model": f"made-up-{i}"})
        live.get(f"/made-up-{i}")
        live.get(f"/v1/models/made-up-{i}")
        live.client.request(f"MADEUP{i}", live.url + "/v1/completions")
        live.client.delete(f"{live.url}/v1/adapters/made-up-{i}")
        live.post("/v1/adapters", {"name": f"made-up-{i}", "path": f"made-up-{i}"})

    nonsense(0)
    series(live)
    before = set(series(live))
    for i in range(1, 10):
        nonsense(i)
    after = series(live)
    assert set(after) == before
    assert not [name for name in after if "made-up" in name.lower() or "MADEUP" in name]


def test_refused_loads_are_counted_by_the_code_that_was_answered(live: Server) -> None:
    one, other = (str(GOLDEN / name / "adapter") for name in ("llama-qv-r8k3t3", "gpt2-all-r8k2t2"))
    refused = [("bad", "../x"), ("bad", "/etc"), ("bad", "nowhere"), ("bad", other), ("two", one), ("a b", one)]
    before, answered = series(live), Counter()
    for name, path in refused:
        for route, body in (
            ("/v1/adapters", {"name": name, "path": path}),
            ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}),
        ):
            error = live.post(route, body).json()["error"]
            answered[error["code"] or error["type"]] += 1
    after = series(live)
    key = 'tucka_load_failures_total{code="%s"}'
    assert {code: after[key % code] - before[key % code] for code in answered} == answered
    assert answered == {
        "invalid_adapter": 6, "base_model_mismatch": 2, "adapter_exists": 2, "invalid_request_error": 2
    }  # fmt: skip


def test_an_adapter_comes_and_goes(live: Server) -> None:
    path = str(GOLDEN / "llama-qv-r16k4t2-a512" / "adapter")
    for _ in range(2):  # the second time from nothing again
        assert live.post("/v1/adapters", {"name": "guest", "path": path}).status_code == 201
        assert live.post("/v1/completions", ASK | {"model": "guest"}).status_code == 200
        found = series(live)
        assert found['tucka_adapter_requests_total{model="guest",finish_reason="length"}'] == 1
        assert found['tucka_adapter_generation_tokens_total{model="guest"}'] == 3
        assert sum(found[f'tucka_adapter_group_selections_total{{model="guest",group="{i}"}}'] for i in range(4)) == 3
        assert all(
            found[f'tucka_adapter_load_seconds{{model="guest",stage="{stage}"}}'] > 0
            for stage in ("read", "fold", "wait")
        )
        assert [name for name in found if name.startswith("vllm:lora_adapter_loaded") and '"guest"' in name]
        assert live.client.delete(live.url + "/v1/adapters/guest").status_code == 200
        assert not [name for name in series(live) if "guest" in name]


@pytest.mark.parametrize("at_once", [1, 2, 7, 100])
def test_a_slow_reader_gets_all_and_each_answer_is_counted_once(start_fake, at_once: int) -> None:
    """Several outputs of a choice, its last among them, may come in one go."""
    server: Server = start_fake()
    server.engine.at_once = at_once
    answer = server.post("/v1/completions", ASK | {"model": "base", "n": 3, "max_tokens": 4}).json()
    assert [(len(c["text"]), c["finish_reason"]) for c in answer["choices"]] == [(4, "length")] * 3
    assert answer["usage"]["completion_tokens"] == 12
    found = series(server)
    assert found['tucka_requests_total{finish_reason="length"}'] == 3
    assert not [name for name in found if "requests_total" in name and "abort" in name and found[name]]


def held(server: Server) -> tuple[float, ...]:
    """Running, waiting and pages in use, by our names and by vLLM's."""
    found = series(server)
    vllm = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return (
        *(found[f"tucka_{name}"] for name in ("requests_running", "requests_waiting", "kv_blocks_used")),
        *(next(value for key, value in found.items() if key.startswith(f"vllm:{name}{{")) for name in vllm),
    )


def test_what_the_engine_holds_goes_back_to_nothing(live: Server) -> None:
    """By the engine's own account: after answers that ended by themselves, and after clients that left."""
    body = ASK | {"model": "one", "max_tokens": 200, "ignore_eos": True, "n": 3}
    assert live.post("/v1/completions", body | {"max_tokens": 4}).status_code == 200
    assert held(live) == (0,) * 6
    with live.client.stream("POST", live.url + "/v1/completions", json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        for _ in range(12):
            next(lines)
        running, waiting, used, *vllm = held(live)
        assert running == 3 and waiting == 0 and used >= 3
        assert vllm[:2] == [3, 0] and 0 < vllm[2] <= 1
    deadline = time.monotonic() + 10
    while any(held(live)):  # the client left; no step follows that could say so
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    assert held(live) == (0,) * 6


def test_routers_see_who_is_at_work(live: Server) -> None:
    body = ASK | {"model": "one", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with live.client.stream("POST", live.url + "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        assert vllm_adapters(live, "running") | vllm_adapters(live, "waiting") == {"one"}
        assert series(live)['vllm:num_requests_running{model_name="llama-tiny",engine="0"}'] == 1
    deadline = time.monotonic() + 2
    while series(live)["tucka_requests_running"]:  # the client left; no step follows that could say so
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert vllm_adapters(live, "running") == vllm_adapters(live, "waiting") == set()
    assert series(live)["tucka_kv_blocks_used"] == 0


def test_a_dead_engine_is_seen(start_fake) -> None:
    server = start_fake()
    assert series(server)["tucka_engine_up"] == 1
    server.engine.ready, server.engine.restarts = False, 3
    assert series(server)["tucka_engine_up"] == 0 and series(server)["tucka_engine_restarts_total"] == 3


def test_failures_count_as_errors(start_fake) -> None:
    server = start_fake()
    server.engine.fail_after = 1
    assert server.post("/v1/completions", ASK | {"model": "base"}).status_code == 503
    found = series(server)
    assert found['tucka_requests_total{finish_reason="error"}'] == 1
    assert found['tucka_adapter_errors_total{model="base"}'] == 1
    assert found["tucka_requests_running"] == found["tucka_requests_waiting"] == 0
