"""What asks for nothing is taken and named in `x-tucka-ignored`: clients work with their defaults, and see what had no
effect. The bodies are those that the named clients send."""

import json

import httpx
import pytest

from tests.support.server_fixtures import StartFake
from tests.support.servers import Server

HEADER = "x-tucka-ignored"
CHAT = {"model": "llama-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
TEXT = {"model": "llama-tiny", "prompt": "hi", "max_tokens": 2, "temperature": 0}
ROUTER = {  # vllm-router and sglang-router write all of their fields out
    "no_stop_trim": False, "ignore_eos": False, "continue_final_message": False, "skip_special_tokens": True,
    "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False, "logprobs": False,
    "stream": False, "regex": None, "ebnf": None, "lora_path": None, "session_params": None, "rid": None,
    "stop_regex": None, "samplingseed": 5,
}  # fmt: skip
SPELLED_OUT = {
    "top_logprobs": 0, "tool_choice": "auto", "function_call": "auto", "length_penalty": 1.0, "priority": 0,
    "bad_words": [], "chat_template_kwargs": {}, "continue_final_message": False, "add_generation_prompt": True,
    "spaces_between_special_tokens": True, "echo": False, "stop": "", "store": True, "reasoning_effort": "low",
    "verbosity": "high", "request_id": "r-1", "rid": "me", "metadata": {"a": "b"}, "tools": [], "functions": [],
    "documents": [], "modalities": ["text"], "service_tier": "auto", "logit_bias": {}, "stop_token_ids": [],
}  # fmt: skip

ACTED_UPON = {
    "top_logprobs", "stop", "logit_bias", "stop_token_ids", "tools", "tool_choice", "chat_template_kwargs",
    "continue_final_message", "add_generation_prompt", "bad_words", "functions", "function_call", "priority",
}  # fmt: skip


def named(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return answer.headers.get(HEADER, "").split(", ")


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        (SPELLED_OUT, SPELLED_OUT.keys() - ACTED_UPON),
        (ROUTER, {name for name in ROUTER if name.endswith(("stream_reasoning", "states", "trim", "seed"))}),
        ({"no_such_field": 1, "nor_this": None}, {"no_such_field"}),
    ],
)
def test_row_51_what_asks_for_nothing_is_taken_and_named(live: Server, fields: dict, ignored: set[str]) -> None:
    plain = live.post("/v1/chat/completions", CHAT)
    assert HEADER not in plain.headers
    answer = live.post("/v1/chat/completions", CHAT | fields)
    assert named(answer) == sorted(ignored)
    assert answer.json()["choices"] == plain.json()["choices"]


def test_row_51_at_every_level(live: Server) -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "refusal": "no", "tool_calls": [], "audio": None, "reasoning": "hm",
         "annotations": [], "provider_specific_fields": {}},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
        {"role": "user", "content": "hi", "id": "m1"},
    ]  # fmt: skip
    body = CHAT | {"messages": history, "response_format": {"type": "text", "x": 1}}
    answer = live.post("/v1/chat/completions", body)
    assert named(answer) == [
        "messages.annotations", "messages.content.cache_control", "messages.id", "messages.provider_specific_fields",
        "messages.refusal", "response_format.x",
    ]  # fmt: skip
    options = {"other": 1, "include_usage": True}
    assert named(live.post("/v1/completions", TEXT | {"stream": True, "stream_options": options})) == [
        "stream_options.other"
    ]
    assert named(live.post("/tokenize", {"prompt": "a", "tools": [], "messages": None, "x": 1})) == ["tools", "x"]
    assert named(live.post("/tokenize", {"prompt": "a", "chat_template_kwargs": {}})) == ["chat_template_kwargs"]
    asked = {"messages": CHAT["messages"], "tools": [], "split_special_tokens": True}
    assert named(live.post("/tokenize", asked)) == ["split_special_tokens"]
    assert named(live.post("/detokenize", {"tokens": [5], "x": 1})) == ["x"]


def test_row_51_thousands_of_unknown_fields_and_names_that_no_header_can_hold(live: Server) -> None:
    many = live.post("/v1/completions", TEXT | {f"x{i}": 1 for i in range(20_000)})
    assert many.status_code == 200 and len(many.headers[HEADER]) < 500 and many.headers[HEADER].endswith(", ...")
    odd = live.post("/v1/completions", TEXT | {"a\r\nset-cookie: b": 1, "é": 1, "": 1, "x" * 65: 1})
    assert named(odd) == ["?"] and "set-cookie" not in odd.headers


def test_null_content_and_top_p_0(live: Server) -> None:
    free = {**CHAT, "temperature": 1.0, "top_p": 0, "max_tokens": 12}
    greedy = live.post("/v1/chat/completions", CHAT | {"max_tokens": 12}).json()["choices"]
    assert live.post("/v1/chat/completions", free).json()["choices"] == greedy


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT | {"no_such_field": 1}, "no_such_field"),
        ("/v1/chat/completions", CHAT | {"store": True}, "store"),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.x"),
        ("/v1/completions", TEXT | {"a b": 1}, None),
        ("/tokenize", {"prompt": "a", "x": 1}, "x"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b", "base_model_name": "base"}, "base_model_name"),
    ],
)
def test_row_51_strict(start_fake: StartFake, path: str, body: dict, param: str | None) -> None:
    answer = start_fake(strict=True).post(path, body)
    assert answer.status_code == 400 and "--strict" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_a_syncer_of_the_gateway_api_names_the_base(start_fake: StartFake) -> None:
    server = start_fake()
    body = {"lora_name": "a", "lora_path": "llama-qv-r8k3t3/adapter", "base_model_name": "base"}
    assert named(server.post("/v1/load_lora_adapter", body)) == ["base_model_name"]
    assert named(server.post("/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": 1})) == ["lora_int_id"]


def test_openapi_describes_what_is_served(start_fake: StartFake) -> None:
    server = start_fake()
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatBody"}
    assert schemas["ChatBody"]["required"] == ["model", "messages"]
    assert schemas["ChatBody"]["additionalProperties"] is True
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.partition('"')[0] for reference in references} <= schemas.keys()
    assert "text/html" in server.get("/docs").headers["content-type"]


def test_no_docs(start_fake: StartFake) -> None:
    server = start_fake(docs=False)
    assert server.get("/openapi.json").status_code == server.get("/docs").status_code == 404


def test_cors(start_fake: StartFake) -> None:
    """A preflight carries no key, and other origins get nothing that a browser would let through."""
    server = start_fake(cors_origin=("https://app.example.org",), api_key=("k",))
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}

    def preflight(origin: str) -> httpx.Response:
        return server.client.options(server.url + "/v1/chat/completions", headers=ask | {"origin": origin})

    allowed = preflight("https://app.example.org")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.org"
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in preflight("https://evil.example.org").headers
    key = {"authorization": "Bearer k"}
    mine = server.get("/v1/models", headers=key | {"origin": "https://app.example.org"})
    assert mine.headers["access-control-allow-origin"] == "https://app.example.org"
    assert HEADER in mine.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in mine.headers
    locked = server.get("/v1/models", headers={"origin": "https://app.example.org"})
    assert locked.status_code == 401, "a preflight's freedom is nobody else's"
    for answer in (locked, server.get("/nowhere", headers=key | {"origin": "https://app.example.org"})):
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org", "its error can be read too"
        assert "x-request-id" in answer.headers
    fat = server.get(
        "/v1/models", headers=key | {"origin": "https://app.example.org"} | {f"x-{i}": "" for i in range(120)}
    )
    assert fat.status_code == 431 and fat.headers["access-control-allow-origin"] and fat.headers["x-request-id"]
    ask = {"model": "base", "prompt": "a", "max_tokens": 2, "stream": True}
    stream = server.post("/v1/completions", ask, headers=key | {"origin": "https://app.example.org"})
    assert stream.headers["access-control-allow-origin"] == "https://app.example.org" and "[DONE]" in stream.text
    delete = {"origin": "https://app.example.org", "access-control-request-method": "DELETE"}
    assert (
        "DELETE"
        in server.client.options(server.url + "/v1/adapters/x", headers=delete).headers["access-control-allow-methods"]
    )
    other = server.get("/v1/models", headers=key | {"origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in other.headers


def test_no_cors_without_the_setting(start_fake: StartFake) -> None:
    answer = start_fake().get("/v1/models", headers={"origin": "https://app.example.org"})
    assert "access-control-allow-origin" not in answer.headers
