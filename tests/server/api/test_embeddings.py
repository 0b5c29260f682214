"""POST /v1/embeddings with the official client and below it, against the model in transformers."""

import base64
import json
from array import array
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tucka_runtime.trainer  # noqa: F401  peft learns of TuckA
from tests.support import GOLDEN
from tests.support.server_fixtures import StartFake
from tests.support.servers import Server

MODELS = {"llama-tiny": None, "one": "llama-qv-r8k3t3", "two": "llama-all7-r4k2t2"}


@pytest.fixture(scope="module")
def client(live: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("model", MODELS)
def test_as_transformers_and_peft(client: openai.OpenAI, model: str, pooling: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "bases" / "llama-tiny")
    if (case := MODELS[model]) is not None:
        base = PeftModel.from_pretrained(base, GOLDEN / case / "adapter")
    texts = ["a", "Some prompt", "x" * 200]
    answer = client.embeddings.create(model=model, input=texts, extra_body={"pooling": pooling, "route": "request"})
    assert answer.model == model and [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
    for text, item in zip(texts, answer.data, strict=True):
        with torch.inference_mode():
            states = base(torch.tensor([[3 + b for b in text.encode()]]), output_hidden_states=True).hidden_states[-1]
        expected = states[0].mean(dim=0) if pooling == "mean" else states[0, -1]
        expected = expected / torch.linalg.vector_norm(expected)
        error = torch.linalg.vector_norm(torch.tensor(item.embedding) - expected)
        assert float(error) < 1e-4


def test_four_forms_and_two_formats(live: Server) -> None:
    def ask(value: Any, **more: Any) -> list[Any]:
        answer = live.post("/v1/embeddings", {"model": "llama-tiny", "input": value, **more})
        assert answer.status_code == 200, answer.text
        return [item["embedding"] for item in answer.json()["data"]]

    ids = [3 + b for b in b"abc"]
    (vector,) = ask("abc")
    assert ask(["abc", "abc"]) == ask([ids, ids]) == [vector, vector] and ask(ids) == [vector]
    (packed,) = ask("abc", encoding_format="base64")
    assert array("f", base64.b64decode(packed)).tolist() == vector
    assert ask("abc", dimensions=len(vector), normalize=True, encoding_format="float") == [vector]


def test_more_prompts_than_answers_may_be_asked(live: Server) -> None:
    """langchain sends a thousand at once."""
    answer = live.post("/v1/embeddings", {"model": "one", "input": [f"text {i}" for i in range(1000)]})
    assert [item["index"] for item in answer.json()["data"]] == list(range(1000))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "x" * 257}, "input"),
        ({"input": ["a"] * 1089}, "input"),
        ({"input": None}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
        ({"normalize": False}, "normalize"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"route": "pinned"}, "route"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_what_is_refused(live: Server, fields: dict[str, Any], param: str) -> None:
    answer = live.post("/v1/embeddings", {"model": "one", "input": "abc"} | fields)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_without_a_tokenizer_token_ids_are_embedded(start_fake: StartFake) -> None:
    server = start_fake(with_tokenizer=False)
    (item,) = server.post("/v1/embeddings", {"model": "base", "input": [3, 4]}).json()["data"]
    assert item["embedding"][:2] == [1.0, 0.0]
    refused = server.post("/v1/embeddings", {"model": "base", "input": "abc"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "input"


def test_tokenizer_info(live: Server) -> None:
    """What lm-eval's remote tokenizer reads."""
    info = live.get("/tokenizer_info").json()
    files = json.loads((GOLDEN / "bases" / "llama-tiny" / "tokenizer_config.json").read_text())
    assert all(info[name] == files[name] for name in ("bos_token", "eos_token", "pad_token"))
    assert "assistant" in info["chat_template"] and info["model_max_length"] == 256


def test_what_sglang_router_asks(live: Server) -> None:
    """It takes a server's name from the first of these that answers, never a folder of this machine."""
    for path in ("/server_info", "/get_server_info"):
        info = live.get(path).json()
        assert (info["model_path"], info["served_model_name"]) == ("llama-tiny", "llama-tiny")
        assert (info["tp_size"], info["dp_size"], info["context_length"]) == (1, 1, 256)
    for path in ("/model_info", "/get_model_info"):
        assert live.get(path).json() == {
            "model_path": "llama-tiny", "tokenizer_path": "llama-tiny", "is_generation": True, "model_type": "llama",
        }  # fmt: skip


def test_tokenizer_info_without_a_tokenizer(start_fake: StartFake) -> None:
    assert start_fake(with_tokenizer=False).get("/tokenizer_info").status_code == 400
