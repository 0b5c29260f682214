"""Several adapters with weights in one request, at every door."""

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import GOLDEN
from tests.support.api_keys import bearer, write_keys
from tests.support.driving import save_lora
from tests.support.server_fixtures import StartFake
from tests.support.servers import Server, series
from tucka_runtime.adapters.base_layout import base_layout
from tucka_runtime.models.weights import read_config
from tucka_runtime.server.service.combinations import MAX_KNOWN

BASE = "llama-tiny"
ADAPTER = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
MIX = [{"name": "tone", "weight": 0.8}, {"name": "law", "weight": 1.2}]
PINNED = {"group": 1, "weights": [0.9, 0.3, 0.5]}


@pytest.fixture(scope="module")
def loaded(live: Server, roots: Path) -> Server:
    """`law` and `tone`, LoRAs, and `fixed`, a TuckA with a pinned route; `one` and `two` of the server have routers."""
    _, arch = read_config(GOLDEN / "bases" / BASE)
    for seed, name in enumerate(("law", "tone")):
        save_lora(roots / "combined" / name, base_layout(arch, ""), seed, ("q_proj", "o_proj"))
        live.post("/v1/adapters", {"name": name, "path": f"combined/{name}"}).raise_for_status()
    live.post("/v1/adapters", {"name": "fixed", "path": ADAPTER, "pinned": PINNED}).raise_for_status()
    return live


def ask(server: Server, adapters: list[dict[str, Any]] | None, **more: object) -> Any:
    body = {"model": BASE, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "adapters": adapters} | more
    return server.post("/v1/completions", body).raise_for_status().json()


def text(server: Server, adapters: list[dict[str, Any]] | None, **more: object) -> str:
    return ask(server, adapters, **more)["choices"][0]["text"]


def test_every_door_answers_with_the_sum(loaded: Server) -> None:
    """Both together are neither alone; weights of nothing are the base; one with the weight 1 is that adapter."""
    both = text(loaded, MIX)
    assert len({both, text(loaded, None), text(loaded, None, model="law"), text(loaded, None, model="tone")}) == 4
    assert both == text(loaded, MIX[::-1])
    assert text(loaded, [{"name": "law", "weight": 0}, {"name": "tone", "weight": 0}]) == text(loaded, None)
    assert text(loaded, [{"name": "law"}]) == text(loaded, None, model="law")
    chat = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
    said = {}
    for adapters in (None, MIX):
        more = {"adapters": adapters}
        answer = loaded.post("/v1/chat/completions", chat | more).raise_for_status().json()
        assert answer["model"] == BASE
        message = loaded.post("/v1/messages", chat | more).raise_for_status().json()
        response = {"model": BASE, "input": "Hi", "max_output_tokens": 6, "temperature": 0} | more
        response = loaded.post("/v1/responses", response).raise_for_status().json()
        said[adapters is None] = answer["choices"][0]["message"]["content"]
        assert message["content"][0]["text"] == response["output"][0]["content"][0]["text"] == said[adapters is None]
        vectors = loaded.post("/v1/embeddings", {"model": BASE, "input": "Hi"} | more).raise_for_status().json()
        said[adapters is None, 0] = vectors["data"][0]["embedding"][0]
    assert said[True] != said[False] and said[True, 0] != said[False, 0]


def test_a_router_and_pinned_routes_mix(loaded: Server) -> None:
    mix = [{"name": "one", "weight": 0.7}, {"name": "law", "weight": 0.6}, {"name": "fixed", "weight": 0.5}]
    answer = ask(loaded, mix, route="request", include_route=True)
    route = answer["choices"][0]["route"]
    assert route["scope"] == "request" and route["adapter"] == "fixed+law+one"
    alone = ask(loaded, None, model="one", route="request", include_route=True)["choices"][0]["route"]
    assert route["adapters"] == [{"name": "one", "group": alone["group"], "weights": alone["weights"]}]
    both = ask(loaded, [mix[0], {"name": "two"}], route="request", include_route=True)["choices"][0]["route"][
        "adapters"
    ]
    assert both[0] == route["adapters"][0] and both[1]["name"] == "two" and len(both[1]["weights"]) == 2
    assert ask(loaded, mix[1:], include_route=True)["choices"][0]["route"] is None
    assert loaded.get("/health").status_code == 200


def test_kv_and_the_fingerprint_are_those_of_contents_and_weights(loaded: Server, roots: Path) -> None:
    prompt = list(range(20, 84))
    first, again = (ask(loaded, MIX, prompt=prompt) for _ in range(2))
    other = ask(loaded, [MIX[0], {"name": "law", "weight": 1.1}], prompt=prompt)
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, again, other)]
    assert cached[0] == 0 and cached[1] > 0 and cached[2] == 0
    assert first["system_fingerprint"] == again["system_fingerprint"] != other["system_fingerprint"]
    assert first["choices"] == again["choices"]
    _, arch = read_config(GOLDEN / "bases" / BASE)
    save_lora(roots / "combined" / "tone2", base_layout(arch, ""), 9, ("q_proj", "o_proj"))
    body = {"name": "tone", "path": "combined/tone2", "load_inplace": True}
    loaded.post("/v1/adapters", body).raise_for_status()
    new = ask(loaded, MIX, prompt=prompt)
    assert new["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert new["system_fingerprint"] != first["system_fingerprint"] and new["choices"] != first["choices"]
    loaded.post("/v1/adapters", body | {"path": "combined/tone"}).raise_for_status()
    assert ask(loaded, MIX, prompt=prompt)["choices"] == first["choices"]


def test_metrics_and_the_log_name_the_combination(loaded: Server) -> None:
    before = series(loaded).get('tucka_adapter_requests_total{model="law+tone",finish_reason="length"}', 0)
    text(loaded, MIX, ignore_eos=True)
    found = series(loaded)
    assert found['tucka_adapter_requests_total{model="law+tone",finish_reason="length"}'] == before + 1
    assert found["tucka_adapters_combined"] > 0
    assert not any("law+tone" in name for name in found if name.startswith("vllm:lora_adapter_loaded"))
    assert loaded.log is not None and "law+tone: " in loaded.log.read_text()


def test_row_53_lists_that_cannot_be_combined(loaded: Server) -> None:
    law, tone = {"name": "law"}, {"name": "tone"}
    headed = {"name": "headed", "path": str(GOLDEN / "llama-modules-to-save" / "adapter")}
    loaded.post("/v1/adapters", headed).raise_for_status()
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"adapters": [law, {"name": "nobody"}]}, 404, "adapters[1].name"),
        ({"adapters": [law, {"name": BASE}]}, 400, "adapters[1].name"),
        ({"adapters": [law, tone, law]}, 400, "adapters"),
        ({"adapters": [law, {"name": "headed"}]}, 400, "adapters"),
        ({"adapters": [law, tone], "model": "law"}, 400, "model"),
        ({"adapters": [law, tone], "model": "nobody"}, 400, "model"),
        ({"adapters": []}, 400, "adapters"),
        ({"adapters": [law] * 9}, 400, "adapters"),
        ({"adapters": "law"}, 400, "adapters"),
        ({"adapters": [{"name": "law", "weight": 1e3}]}, 400, "adapters"),
        ({"adapters": [{"name": "law", "weight": "1"}]}, 400, "adapters"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters"),
    ]
    for change, status, param in cases:
        answer = loaded.post("/v1/completions", {"model": BASE, "prompt": "Hello", "max_tokens": 1} | change)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), change
        assert "nobody" not in error["message"]
    for weight in ("NaN", "Infinity", "1e999"):
        body = json.dumps({"model": BASE, "prompt": "Hello", "adapters": [law]})
        body = body.replace('"law"', f'"law", "weight": {weight}')
        assert loaded.client.post(loaded.url + "/v1/completions", content=body).status_code == 400


def test_an_unloaded_adapter_takes_its_combinations_with_it(loaded: Server) -> None:
    loaded.post("/v1/adapters", {"name": "brief", "path": "combined/tone"}).raise_for_status()
    mix = [{"name": "brief", "weight": 0.8}, {"name": "law", "weight": 1.2}]
    assert text(loaded, mix) == text(loaded, MIX)
    combined = series(loaded)["tucka_adapters_combined"]
    assert loaded.client.delete(f"{loaded.url}/v1/adapters/brief").status_code in (200, 202)
    assert series(loaded)["tucka_adapters_combined"] == combined - 1
    body = {"model": BASE, "prompt": "Hello", "adapters": mix}
    assert loaded.post("/v1/completions", body).status_code == 404


def test_a_key_has_to_see_every_adapter(start_fake: StartFake, tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys", root={"roles": ("infer", "admin")}, law={"adapters": ("law*",)}, both={"adapters": ("l*",)}
    )
    server = start_fake(api_key_file=str(tmp_path / "keys"))
    for name in ("law", "lex"):
        body = {"name": name, "path": ADAPTER, "pinned": PINNED}
        server.post("/v1/adapters", body, headers=bearer(keys["root"])).raise_for_status()
    for key, status in (("both", 200), ("law", 404)):
        asked = {"model": "base", "prompt": [5], "max_tokens": 1, "adapters": [{"name": "law"}, {"name": "lex"}]}
        answer = server.post("/v1/completions", asked, headers=bearer(keys[key]))
        assert answer.status_code == status, answer.text
        if status == 404:
            assert answer.json()["error"]["param"] == "adapters[1].name" and "lex" not in answer.text


def test_row_54_a_flood_of_weights(start_fake: StartFake) -> None:
    """As many combinations as there may be are in use: one of the same weights is answered, another is refused, until
    one of them is over. What nobody uses makes room."""
    server = start_fake()
    assert server.engine is not None
    for name in ("law", "tone"):
        server.post("/v1/adapters", {"name": name, "path": ADAPTER, "pinned": PINNED}).raise_for_status()

    def body(weight: float) -> dict[str, Any]:
        adapters = [{"name": "law", "weight": weight}, {"name": "tone"}]
        return {"model": "base", "prompt": [5], "max_tokens": 1, "adapters": adapters}

    def combined() -> int:
        return sum("+" in key.name for key in server.engine.loaded) if server.engine is not None else 0

    for i in range(MAX_KNOWN + 6):
        server.post("/v1/completions", body(i)).raise_for_status()
    assert combined() == MAX_KNOWN
    server.engine.seconds_per_token = 3600
    with ExitStack() as clients:
        begun, held = len(server.engine.requests), []
        for i in range(MAX_KNOWN):
            held.append(clients.enter_context(socket.create_connection(server.address, timeout=30)))
            content = json.dumps(body(i + 0.5)).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            held[-1].sendall(head.encode() + content)
        while len(server.engine.requests) < begun + MAX_KNOWN:
            time.sleep(0.01)
        server.engine.seconds_per_token = 0
        refused = server.post("/v1/completions", body(99))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (429, "overloaded", "adapters")
        assert refused.headers["retry-after"] == "1" and combined() == MAX_KNOWN
        server.post("/v1/completions", body(0.5)).raise_for_status()
        server.post("/v1/completions", {"model": "law", "prompt": [5], "max_tokens": 1}).raise_for_status()
        held.pop().close()
        while server.post("/v1/completions", body(99)).status_code == 429:
            time.sleep(0.01)
        assert combined() == MAX_KNOWN
