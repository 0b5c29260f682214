"""A base that has several names, as `vllm serve --served-model-name A B` gives them."""

import pytest

from tests.support import GOLDEN
from tests.support.server_fixtures import StartFake
from tests.support.servers import ASK, Server, series

NAMES = ("base", "llama", "publishers/ns/models/llama")
ADAPTER = {"name": "law", "path": str(GOLDEN / "llama-qv-r8k3t3" / "adapter")}


@pytest.fixture
def server(start_fake: StartFake) -> Server:
    return start_fake(served_model_name=NAMES)


def test_every_name_answers_and_is_listed(server: Server) -> None:
    assert server.post("/v1/adapters", ADAPTER).status_code == 201
    texts = set()
    for name in NAMES:
        answer = server.post("/v1/completions", ASK | {"model": name}).raise_for_status().json()
        assert answer["model"] == name
        texts.add(answer["choices"][0]["text"])
        assert server.post("/tokenize", {"model": name, "prompt": "hello"}).status_code == 200
        card = server.get(f"/v1/models/{name}").raise_for_status().json()
        assert (card["id"], card["root"], card["parent"]) == (name, "base", None)
        assert server.post("/v1/completions", ASK | {"model": f"{name}:law"}).status_code == 200
    assert len(texts) == 1
    assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [*NAMES, "law"]
    counted = {name: count for name, count in series(server).items() if name.startswith("tucka_adapter_requests_total")}
    assert sum(count for name, count in counted.items() if 'model="base"' in name) == len(NAMES), counted
    assert not any("llama" in name for name in counted), counted


def test_none_of_them_can_be_an_adapters(server: Server) -> None:
    for name in NAMES:
        assert server.post("/v1/adapters", ADAPTER | {"name": name}).status_code == 409
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 400
    assert server.post("/v1/aliases", {"name": "mine", "targets": {"llama": 1}}).status_code == 400
    assert "llama" in server.post("/v1/completions", ASK | {"model": "nobody"}).json()["error"]["message"]
