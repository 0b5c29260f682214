"""A bank of adapters: loaded under one name, asked for member by member."""

import json
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.adapter_files import put
from tests.support.api_keys import bearer, write_keys
from tests.support.banks import MEMBERS, save_bank
from tests.support.server_fixtures import StartFake
from tests.support.servers import Server
from tucka_runtime.adapters.base_layout import base_layout
from tucka_runtime.models.weights import read_config

ADAPTER = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")


@pytest.fixture(scope="module")
def bank(live: Server, roots: Path) -> str:
    """A loaded bank, `shelf`, and its members by themselves: `alone0` and so on."""
    _, arch = read_config(GOLDEN / "bases" / "llama-tiny")
    save_bank(roots / "banks" / "bank", base_layout(arch, ""), "full")
    live.post("/v1/adapters", {"name": "shelf", "path": "banks/bank"}).raise_for_status()
    for i in range(MEMBERS):
        live.post("/v1/adapters", {"name": f"alone{i}", "path": f"banks/{i}"}).raise_for_status()
    return "shelf"


def text(live: Server, model: str, **more: object) -> str:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0} | more
    return live.post("/v1/completions", body).raise_for_status().json()["choices"][0]["text"]


def test_a_member_answers_as_it_does_alone(live: Server, bank: str) -> None:
    texts = [text(live, f"{bank}/m{i}") for i in range(MEMBERS)]
    assert texts == [text(live, f"alone{i}") for i in range(MEMBERS)]
    assert len(set(texts)) > 1
    assert text(live, f"llama-tiny:{bank}/m2") == texts[2]
    chat = {"model": f"{bank}/m1", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert live.post("/v1/chat/completions", chat).raise_for_status().json()["model"] == f"{bank}/m1"


def test_what_is_no_member_is_not_found(live: Server, bank: str) -> None:
    for model in (bank, f"{bank}/m{MEMBERS}", f"{bank}/", f"{bank}/m1/m1", "alone1/m1"):
        answer = live.post("/v1/completions", {"model": model, "prompt": "Hello"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), model
    answer = live.post("/v1/completions", {"model": bank, "prompt": "Hello"})
    assert "bank/member" in answer.json()["error"]["message"]


def test_models_are_the_members_and_the_adapter_is_the_bank(live: Server, bank: str) -> None:
    names = {card["id"]: card for card in live.get("/v1/models").json()["data"]}
    assert bank not in names and names[f"{bank}/m3"]["parent"] == bank
    loaded = {card["id"]: card["tucka"] for card in live.get("/v1/adapters").json()["data"]}
    assert loaded[bank]["members"] == [f"m{i}" for i in range(MEMBERS)] and f"{bank}/m3" not in loaded
    assert loaded[bank]["kind"] == "bank" and loaded["alone1"]["members"] is None
    assert live.get(f"/v1/models/{bank}/m3").json()["id"] == f"{bank}/m3"
    assert live.get(f"/v1/models/{bank}/m99").status_code == 404


def test_rows_30_to_34_of_banks(live: Server, bank: str, roots: Path) -> None:
    good = roots / "banks" / "bank"
    config = json.loads((good / "adapter_config.json").read_text())
    weights = (good / "adapter_model.safetensors").read_bytes()
    bad = [
        ({"members": ["../x", *config["members"][1:]]}, weights, "invalid_adapter"),
        ({"members": config["members"][1:]}, weights, "invalid_adapter"),
        ({"members": ["m1"] * MEMBERS}, weights, "invalid_adapter"),
        ({"core": "diagonal"}, weights, "invalid_adapter"),
        ({"auto_map": {"AutoModel": "x.Y"}}, weights, "invalid_adapter"),
        ({"r": 10**9}, weights, "invalid_adapter"),
        ({"target_modules": ["model.layers.99.self_attn.q_proj"]}, weights, "base_model_mismatch"),
        ({}, weights[:-4], "invalid_adapter"),
    ]
    for i, (change, data, code) in enumerate(bad):
        put(roots / "banks" / f"bad{i}", config | change, data)
        answer = live.post("/v1/adapters", {"name": "bad", "path": f"banks/bad{i}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), change


def test_an_unloaded_bank_takes_its_members_with_it(live: Server, bank: str) -> None:
    live.post("/v1/adapters", {"name": "brief", "path": "banks/bank"}).raise_for_status()
    assert text(live, "brief/m0") == text(live, f"{bank}/m0")
    assert live.client.delete(f"{live.url}/v1/adapters/brief").status_code in (200, 202)
    assert live.post("/v1/completions", {"model": "brief/m0", "prompt": "Hello"}).status_code == 404


def test_a_key_sees_the_members_that_it_names(start_fake: StartFake, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", root={"roles": ("infer", "admin")}, law={"adapters": ("shelf/law",)})
    server = start_fake(api_key_file=str(tmp_path / "keys"))
    server.service.engine.members = ("law", "tax")
    body = {"name": "shelf", "path": ADAPTER}
    server.post("/v1/adapters", body, headers=bearer(keys["root"])).raise_for_status()
    listed = server.get("/v1/models", headers=bearer(keys["law"])).json()["data"]
    assert [card["id"] for card in listed] == ["shelf/law"]
    for model, status in (("shelf/law", 200), ("shelf/tax", 404), ("shelf", 404)):
        asked = {"model": model, "prompt": [5], "max_tokens": 1}
        assert server.post("/v1/completions", asked, headers=bearer(keys["law"])).status_code == status, model


def test_a_bank_that_is_there_can_be_kept_resident(live: Server, bank: str) -> None:
    for keep in (True, False):
        again = live.post("/v1/adapters", {"name": bank, "path": "banks/bank", "keep_resident": keep})
        assert again.status_code == 200 and again.json()["tucka"]["keep_resident"] is keep


def test_a_member_can_be_an_aliass_target_and_its_bank_cannot(live: Server, bank: str) -> None:
    refused = live.post("/v1/aliases", {"name": "shelved", "targets": {bank: 1}}).json()["error"]
    assert (refused["code"], refused["param"]) == ("model_not_found", "targets")
    live.post("/v1/aliases", {"name": "shelved", "targets": {f"{bank}/m1": 1}}).raise_for_status()
    assert text(live, "shelved") == text(live, f"{bank}/m1")
    live.client.delete(live.url + "/v1/aliases/shelved").raise_for_status()
