"""Adapters by name at run time, on the real engine: loaded, replaced, unloaded, while requests go on."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import GOLDEN
from tests.support.servers import Server
from tucka_runtime.cli.main import main

ONE = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
TWO = str(GOLDEN / "llama-all7-r4k2t2" / "adapter")


def complete(live: Server, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "route": "request"}
    return live.post("/v1/completions", body | fields)


def text(live: Server, model: str) -> str:
    return complete(live, model).raise_for_status().json()["choices"][0]["text"]


@pytest.fixture
def name(live: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.node.name
    live.client.delete(f"{live.url}/v1/adapters/{request.node.name}")


def test_vllms_routes(live: Server, name: str) -> None:
    answer = live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": ONE})
    assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    assert text(live, name) == text(live, "one")
    assert live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": ONE}).status_code == 200
    answer = live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": TWO})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_exists")
    answer = live.post("/v1/unload_lora_adapter", {"lora_name": name, "lora_int_id": 7})
    assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
    assert complete(live, name).status_code == 404


def test_sglangs_routes_and_names(live: Server, name: str) -> None:
    answer = live.post("/load_lora_adapter", {"lora_name": name, "lora_path": ONE, "pinned": False})
    assert answer.status_code == 200 and answer.json()["success"]
    assert answer.json()["loaded_adapters"][name] == ONE
    answer = complete(live, f"llama-tiny:{name}").json()
    assert (answer["choices"][0]["text"], answer["model"]) == (text(live, "one"), f"llama-tiny:{name}")
    for unknown in (f"other:{name}", f"llama-tiny:llama-tiny:{name}", "llama-tiny:", "llama-tiny:llama-tiny"):
        assert complete(live, unknown).json()["error"]["code"] == "model_not_found", unknown
    assert "llama-tiny:" not in live.get("/metrics").text
    answer = live.post("/unload_lora_adapter", {"lora_name": name})
    assert answer.status_code == 200 and name not in answer.json()["loaded_adapters"]


def test_our_routes(live: Server, name: str) -> None:
    answer = live.post("/v1/adapters", {"name": name, "path": ONE})
    card = answer.json()
    assert answer.status_code == 201 and card["id"] == name and card["tucka"]["scope"] is None
    assert live.post("/v1/adapters", {"name": name, "path": ONE}).status_code == 200
    assert live.get(f"/v1/models/{name}").json() == card
    assert name in [card["id"] for card in live.get("/v1/adapters").json()["data"]]
    answer = live.client.delete(f"{live.url}/v1/adapters/{name}")
    assert (answer.status_code, answer.json()["deleted"]) == (200, True)
    assert live.get(f"/v1/adapters/{name}").status_code == 404


def test_relative_paths_are_looked_for_below_the_roots(live: Server, name: str) -> None:
    body = {"lora_name": name, "lora_path": "llama-qv-r8k3t3/adapter"}
    assert live.post("/v1/load_lora_adapter", body).status_code == 200


def test_what_a_flag_keeps_resident_says_so(live: Server) -> None:
    kept = {card["id"]: card["tucka"]["keep_resident"] for card in live.get("/v1/adapters").json()["data"]}
    assert kept["one"] is True and kept["two"] is False


def test_names_with_slashes(live: Server) -> None:
    assert live.post("/v1/adapters", {"name": "team/a", "path": ONE}).status_code == 201
    assert live.get("/v1/models/team/a").json()["id"] == "team/a"
    assert text(live, "team/a") == text(live, "one")
    assert live.client.delete(f"{live.url}/v1/adapters/team/a").status_code == 200


def test_row_36_the_same_load_at_once(live: Server, name: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: live.post("/v1/adapters", {"name": name, "path": ONE}), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["tucka"]["generation"] for answer in answers}) == 1


def test_row_37_replaced_in_place(live: Server, name: str) -> None:
    old = live.post("/v1/adapters", {"name": name, "path": ONE}).json()["tucka"]
    assert text(live, name) == text(live, "one")
    answer = live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": TWO, "load_inplace": True})
    assert answer.status_code == 200
    new = live.get(f"/v1/adapters/{name}").json()["tucka"]
    assert new["generation"] > old["generation"] and new["digest"] != old["digest"]
    assert text(live, name) == text(live, "two")


def test_only_an_adapters_own_page_has_its_training(live: Server, roots: Path, name: str) -> None:
    folder = roots / "trained"
    shutil.copytree(ONE, folder)
    training = {"route": "request", "final_loss": 0.5}
    (folder / "training.json").write_text(json.dumps(training))
    card = live.post("/v1/adapters", {"name": name, "path": str(folder)}).json()
    shutil.rmtree(folder)
    own = live.get(f"/v1/adapters/{name}").json()
    assert own.pop("tucka") == card["tucka"] | {"training": training}
    for path in ("/v1/models", "/v1/adapters"):
        listed = live.get(path).text
        assert name in listed and "final_loss" not in listed and str(roots) not in listed


def test_training_json_alone_is_other_content(live: Server, roots: Path, name: str) -> None:
    folder = roots / "retrained"
    shutil.copytree(ONE, folder)
    (folder / "training.json").write_text('{"route": "batch"}')
    old = live.post("/v1/adapters", {"name": name, "path": str(folder)}).json()["tucka"]
    (folder / "training.json").write_text('{"route": "request"}')
    assert live.post("/v1/adapters", {"name": name, "path": str(folder)}).status_code == 409
    new = live.post("/v1/adapters", {"name": name, "path": str(folder), "load_inplace": True}).json()["tucka"]
    shutil.rmtree(folder)
    assert (old["scope"], new["scope"]) == ("batch", "request")
    assert new["digest"] == old["digest"] and new["generation"] > old["generation"]


def test_turns_of_a_chat_share_their_kv_under_the_scope_prefix(live: Server, roots: Path, name: str) -> None:
    """As the adapter's training says, or the request."""
    folder = roots / "trained-for-prefix"
    shutil.copytree(ONE, folder)
    (folder / "training.json").write_text('{"route": "prefix", "route_prefix_tokens": 32}')
    card = live.post("/v1/adapters", {"name": name, "path": str(folder)}).json()["tucka"]
    shutil.rmtree(folder)
    assert (card["scope"], card["route_prefix_tokens"]) == ("prefix", 32)
    for model, asked, shared in ((name, {}, 96), ("one", {"route": "prefix"}, 96), ("one", {"route": "request"}, 0)):
        messages = [{"role": "user", "content": "a" * 80}]
        ask = {"model": model, "max_tokens": 16, "temperature": 0, "include_route": True, "ignore_eos": True, **asked}
        for turn, cached in enumerate((0, shared)):
            answer = live.post("/v1/chat/completions", {**ask, "messages": messages}).json()
            choice = answer["choices"][0]
            assert choice["route"]["scope"] == asked.get("route", "prefix")
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached, (model, asked, turn)
            messages += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "more"}]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "vllms"])
def test_row_38_unloaded_in_use(live: Server, ours: bool) -> None:
    name = "leaving"
    live.post("/v1/adapters", {"name": name, "path": ONE}).raise_for_status()
    body = {"model": name, "prompt": "Hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body | {"route": "request"}, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        if ours:
            assert live.client.delete(f"{live.url}/v1/adapters/{name}").status_code == 202
        else:
            assert live.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200
        assert complete(live, name).status_code == 404
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]


def test_row_40_bad_loads_amid_good_traffic(live: Server, roots: Path) -> None:
    bad = roots / "bad"
    shutil.copytree(ONE, bad)
    (bad / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    expected = text(live, "one")
    done = threading.Event()
    seen = []

    def ask() -> None:
        while not done.is_set():
            seen.append(text(live, "one"))

    thread = threading.Thread(target=ask)
    thread.start()
    for i in range(50):
        answer = live.post("/v1/load_lora_adapter", {"lora_name": f"bad{i}", "lora_path": str(bad)})
        assert answer.status_code == 400
    done.set()
    thread.join()
    shutil.rmtree(bad)
    assert set(seen) == {expected}


def test_a_pinned_route(live: Server, name: str) -> None:
    pinned = {"group": 1, "weights": [0.5, 0.6, 0.7]}
    card = live.post("/v1/adapters", {"name": name, "path": ONE, "pinned": pinned}).json()
    assert card["tucka"]["pinned"] == pinned and card["tucka"]["scope"] == "pinned"
    answer = complete(live, name, route=None, include_route=True).json()["choices"][0]
    assert (answer["route"]["scope"], answer["route"]["group"]) == ("pinned", 1)
    assert answer["route"]["weights"] == pytest.approx([0.5, 0.6, 0.7])
    refused = complete(live, name, route="batch")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "route"


@pytest.mark.parametrize(
    "pinned",
    [
        {},
        {"group": 0},
        {"group": 9, "weights": [0.5] * 3},
        {"group": 0, "weights": [0.5]},
        {"group": True, "weights": []},
        {"group": 1, "weights": [0.5, 0.5, 1.5]},
        {"group": 1, "weights": [0.5, 0.5, -0.1]},
        {"group": 1, "weights": [10**400, 0, 0]},
        {"group": 1, "weights": [True, 0.5, 0.5]},
    ],
)
def test_a_pinned_route_that_does_not_fit(live: Server, pinned: dict) -> None:
    assert live.post("/v1/adapters", {"name": "unfit", "path": ONE, "pinned": pinned}).status_code == 400
    assert live.get("/v1/adapters/unfit").status_code == 404


def test_metrics_forget_unloaded_names(live: Server, name: str) -> None:
    live.post("/v1/adapters", {"name": name, "path": ONE}).raise_for_status()
    text(live, name)
    assert f'"{name}"' in live.get("/metrics").text
    live.client.delete(f"{live.url}/v1/adapters/{name}")
    assert f'"{name}"' not in live.get("/metrics").text


def test_the_command(live: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = ["--url", live.url]
    assert main(["adapters", "load", "cli", ONE, *url]) == 0
    assert main(["adapters", "list", *url]) == 0
    out = capsys.readouterr().out
    assert "cli is loaded" in out and "cli  tucka  r=8 k=3 t=3" in out
    assert main(["adapters", "load", "cli", TWO, *url]) == 1
    assert "An adapter of that name with other content" in capsys.readouterr().err
    assert main(["adapters", "load", "cli", TWO, "--replace", *url]) == 0
    assert main(["adapters", "unload", "cli", *url]) == 0
    assert main(["adapters", "unload", "cli", *url]) == 1
    assert main(["top", "--interval", "0.1", "--once", *url]) == 0
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "Is the server running" in capsys.readouterr().err


def test_row_50_weights_that_overflow(live: Server, roots: Path, name: str) -> None:
    """Finite as they are, the residual becomes infinite and the logits NaN: its requests end, nobody else's change."""
    base = load_file(GOLDEN / "bases" / "llama-tiny" / "model.safetensors")
    path, (d_out, d_in) = "model.layers.0.self_attn.o_proj", base["model.layers.0.self_attn.o_proj.weight"].shape
    folder = roots / name
    folder.mkdir()
    prefix = f"base_model.model.{path}"
    huge = {f"{prefix}.lora_A.weight": torch.full((2, d_in), 1e30), f"{prefix}.lora_B.weight": torch.ones(d_out, 2)}
    huge[f"{prefix}.lora_B.weight"] *= 1e30
    save_file(huge, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [path]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    card = live.post("/v1/adapters", {"name": name, "path": str(folder)}).raise_for_status().json()
    assert card["tucka"]["overflows"] == 0
    expected = text(live, "one")
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(text, live, "one") for _ in range(6)]
        asked: list[dict] = [{}, {"logprobs": 2}, {"temperature": 1, "seed": 1}, {"top_p": 0.5, "temperature": 1}]
        asked += [{"echo": True, "logprobs": 0, "max_tokens": 0}, {"stream": True}, {"logit_bias": {"70": 5}}]
        for fields in asked:
            answer = complete(live, name, **fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (500, "non_finite_logits", "model"), fields
            assert "overflow" in error["message"]
    assert {other.result() for other in others} == {expected}
    assert live.get(f"/v1/models/{name}").json()["tucka"]["overflows"] == len(asked)
    assert f'tucka_adapter_overflows_total{{model="{name}"}} {len(asked)}' in live.get("/metrics").text
