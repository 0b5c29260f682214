"""POST /v1/responses with OpenAI's client: items in, items out, the same in a stream as in whole."""

import inspect
import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.support.chat_templates import HERMES, THINKS
from tests.support.server_fixtures import StartFake
from tests.support.servers import Server
from tucka_runtime.server.api import (
    door,
    rendering,
    response_history,
    response_output,
    responses,
    sampling,
    structured,
    turn,
)
from tucka_runtime.server.api.response_body import ResponseBody

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": WEATHER, "strict": True},
    {"type": "function", "name": "now"},
]
SAID = (
    "\nhm\n</think>\n\nI will.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ASK: dict[str, Any] = {"model": "base", "input": "Hello"}
DELTAS = {
    "response.output_text.delta": "text",
    "response.reasoning_text.delta": "text",
    "response.function_call_arguments.delta": "arguments",
}


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def streamed(server: Server, **ask: Any) -> list[dict[str, Any]]:
    """A stream's events, each named and numbered as it should be."""
    answer = server.post("/v1/responses", ask | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    events = []
    for number, block in enumerate(answer.text.split("\n\n")[:-1]):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        events.append(event)
    return events


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that the events between the first and the last make, put together from the pieces alone; what is
    `done` has to agree with it."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            assert all(item["status"] != "in_progress" for item in items)
            items.append(event["item"])
            continue
        item = items[event["output_index"]]
        if kind == "response.output_item.done":
            assert event["item"] == item | {"status": event["item"]["status"]}
            items[event["output_index"]] = event["item"]
            continue
        assert event["item_id"] == item["id"] and item["status"] == "in_progress"
        if kind == "response.content_part.added":
            assert event["content_index"] == len(item["content"]) == 0
            item["content"].append(event["part"])
            continue
        inner = item if item["type"] == "function_call" else item["content"][event["content_index"]]
        if kind in DELTAS:
            inner[DELTAS[kind]] += event["delta"]
            if "logprobs" in inner:
                inner["logprobs"] += event["logprobs"]
        elif kind == "response.content_part.done":
            assert event["part"] == inner
        else:
            assert kind.endswith(".done")
            assert event.get("text", event.get("arguments")) == inner.get("text", inner.get("arguments"))
            assert event.get("logprobs") == inner.get("logprobs")
    return items


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def checked(server: Server, **ask: Any) -> dict[str, Any]:
    """The whole response, which a stream of the same request has to make too."""
    answer = server.post("/v1/responses", ask)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    events = streamed(server, **ask)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert all(event["response"]["output"] == [] and not event["response"]["usage"] for event in events[:2])
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert {event["response"]["id"] for event in (*events[:2], events[-1])} == {last["id"]}
    assert rebuilt(events[2:-1]) == last["output"]
    assert len({item["id"] for item in last["output"]}) == len(last["output"])
    assert without_ids(last["output"]) == without_ids(whole["output"])
    for response in (last, whole):  # the second finds the first's prompt
        response["usage"].pop("input_tokens_details")
    own = {"id", "created_at", "completed_at", "output"}
    assert {key: last[key] for key in last.keys() - own} == {key: whole[key] for key in whole.keys() - own}
    return whole


def test_a_thought_a_text_and_two_calls(start_fake: StartFake) -> None:
    server = start_fake(template=THINKS)
    assert server.engine
    server.engine.script = SAID
    whole = checked(server, **ASK, tools=TOOLS, metadata={"a": "b"}, instructions="Be short.")
    thought, text, *calls = whole["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}] and thought["summary"] == []
    assert text["content"] == [{"type": "output_text", "text": "I will.", "annotations": [], "logprobs": []}]
    assert [(call["name"], call["arguments"]) for call in calls] == [("get_weather", '{"city": "Bern"}'), ("now", "{}")]
    assert all(call["call_id"].startswith("call_") for call in calls)
    assert whole["status"] == "completed" and whole["metadata"] == {"a": "b"} and whole["store"] is False
    assert (whole["instructions"], whole["tool_choice"], whole["tools"][0]) == ("Be short.", "auto", TOOLS[0])
    used = server.post("/v1/responses", ASK | {"tools": TOOLS}).json()["usage"]
    assert used["input_tokens"] == len(server.engine.requests[-1].prompts[0])
    assert used["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert used["output_tokens"] == len(SAID)
    assert used["total_tokens"] == used["input_tokens"] + len(SAID)
    assert used["output_tokens_details"] == {"reasoning_tokens": SAID.index("</think>") + len("</think>")}
    with client(server).responses.stream(**ASK, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.output_item.done") == 4 and kinds[-1] == "response.completed"
    assert final.output_text == "I will." and final.output[2].parsed_arguments == {"city": "Bern"}  # type: ignore[union-attr]


def test_a_loop_of_calls(start_fake: StartFake) -> None:
    """What came out goes back in, and makes the same prompt as in chat."""
    server = start_fake(template=HERMES + "{# </think> #}{% for m in messages %}{{ m.reasoning_content }}{% endfor %}")
    assert server.engine
    server.engine.script = SAID.replace("\nhm", "<think>hm")
    sdk = client(server)
    items: list[Any] = [{"role": "developer", "content": "In Celsius."}, {"role": "user", "content": "Weather?"}]
    told = {"model": "base", "instructions": "Be short.", "tools": TOOLS}
    first = sdk.responses.create(**told, input=items)
    items += first.output
    results = {"get_weather": "sunny", "now": [{"type": "input_text", "text": "noon"}]}
    for call in first.output:
        if call.type == "function_call":
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": results[call.name]})
    server.engine.script = "Sunny."
    assert sdk.responses.create(**told, input=items).output_text == "Sunny."
    ours = server.engine.requests[-1].prompts
    calls = [
        {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        for item in first.output
        if item.type == "function_call"
    ]
    history = [
        {"role": "system", "content": "Be short.\n\nIn Celsius."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I will.", "reasoning": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"},
        {"role": "tool", "tool_call_id": calls[1]["id"], "content": "noon"},
    ]
    tools = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS]
    chat = {"model": "base", "messages": history, "tools": tools}
    assert server.post("/v1/chat/completions", chat).status_code == 200
    assert server.engine.requests[-1].prompts == ours
    assert "hm" in bytes(token - 3 for token in ours[0]).decode().partition("assistant:")[2]


def test_items_that_say_little(start_fake: StartFake) -> None:
    """A later system message stays where it is, a summary stands for a thought that was not sent, an encrypted one is
    nothing."""
    server = start_fake(template=THINKS.replace("{{ m.content }}", "{{ m.reasoning_content }}|{{ m.content }}"))
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []},
                                                             {"type": "refusal", "refusal": "c"}]},
        {"type": "message", "role": "system", "content": "d"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
    ]  # fmt: skip
    answer = server.post("/v1/responses", {"model": "base", "input": items, "max_output_tokens": 1})
    assert answer.status_code == 200 and server.engine
    text = bytes(token - 3 for token in server.engine.requests[-1].prompts[0]).decode()
    assert text == "user: |a\nassistant: hm|b\nc\nsystem: |d\nassistant:<think>\n"
    nothing = server.post("/v1/responses", {"model": "base", "input": items[-1:]})
    assert nothing.status_code == 400 and nothing.json()["error"]["param"] == "input"


def test_answers_of_all_kinds(start_fake: StartFake) -> None:
    server = start_fake(template=THINKS)
    assert server.engine
    for script, *items in (
        ("hm</think>Hi", "reasoning completed", "message completed"),
        ("hm</think>", "reasoning completed", "message completed"),
        ("hm", "reasoning completed", "message completed"),
        ("</think>", "message completed"),
        ('</think><tool_call>{"name": "now", "arguments": {"a', "function_call incomplete"),
        ('</think><tool_call>{"name": "now", "arguments": {]</tool_call> x', "function_call incomplete",
         "message completed"),
        ('</think>a<tool_call>{"name": "now"}</tool_call>b', "message completed", "function_call completed",
         "message completed"),
    ):  # fmt: skip
        server.engine.script = script
        whole = checked(server, **ASK, tools=TOOLS)
        assert [f"{item['type']} {item['status']}" for item in whole["output"]] == items, script


def test_a_response_that_fails_says_so_where_it_stands(start_fake: StartFake) -> None:
    server = start_fake(template=HERMES)
    assert server.engine
    server.engine.fail_after = 3
    *events, failed = streamed(server, **ASK)
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "engine_unavailable"
    (item,) = rebuilt(events[2:])
    assert (
        failed["response"]["output"] == [item]
        and item["status"] == "incomplete"
        and len(item["content"][0]["text"]) == 3
    )
    server.engine.fail_after = 0
    assert server.post("/v1/responses", ASK | {"stream": True}).status_code == 503


@pytest.mark.parametrize("model", ["llama-tiny", "one", "two"])
def test_base_and_adapters(live: Server, model: str) -> None:
    """The same text as in chat, cut off where it is asked to; the log-probabilities are chat's too."""
    ask = {"model": model, "temperature": 0, "top_logprobs": 2, "route": "request", "include_route": True}
    include = ["message.output_text.logprobs"]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    whole = checked(live, **ask, input=items, max_output_tokens=12, include=include)
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "logprobs": True}
    choice = live.post("/v1/chat/completions", ask | chat).json()["choices"][0]
    (item,) = whole["output"]
    assert item["content"][0]["text"] == choice["message"]["content"]
    assert item["content"][0]["logprobs"] == choice["logprobs"]["content"]
    assert item["status"] == whole["status"] == "incomplete" and choice["finish_reason"] == "length"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["route"] == choice["route"] and (whole["route"] is None) == (model == "llama-tiny")


class Ticket(BaseModel):
    count: int
    urgent: bool


def test_answers_of_a_schema(live: Server) -> None:
    """Whatever a random model would rather say: a schema, as `parse` asks for it, or vLLM's name for one."""
    ask: dict[str, Any] = {"model": "one", "input": "Hello", "max_output_tokens": 200, "extra_body": {"seed": 1}}
    parsed = client(live).responses.parse(**ask, text_format=Ticket)
    assert isinstance(parsed.output_parsed, Ticket) and parsed.status == "completed"
    with client(live).responses.stream(**ask, text_format=Ticket) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    plain: dict[str, Any] = {"model": "one", "input": "Hello", "temperature": 0}
    one = {"type": "json_schema", "name": "one", "schema": {"const": [1]}}
    assert json.loads(checked(live, **plain, text={"format": one})["output"][0]["content"][0]["text"]) == [1]
    assert json.loads(checked(live, **plain, guided_json={"const": [1]})["output"][0]["content"][0]["text"]) == [1]


def test_what_has_to_be_called_is_held_to_a_grammar(start_fake: StartFake) -> None:
    server = start_fake(template=HERMES)
    assert server.engine
    for choice, held in (("auto", []), ("none", []), ("required", ["get_weather", "now"]),
                         ({"type": "function", "name": "now"}, ["now"]),
                         ({"type": "allowed_tools", "mode": "required",
                           "tools": [{"type": "function", "name": "get_weather"}]}, ["get_weather"])):  # fmt: skip
        answer = server.post("/v1/responses", ASK | {"tools": TOOLS, "tool_choice": choice, "max_output_tokens": 1})
        assert answer.status_code == 200 and answer.json()["tool_choice"] == choice
        grammar = server.engine.requests[-1].sampling.grammar or ""
        assert [name for name in ("get_weather", "now") if name in grammar] == held


CODEX = {  # as Codex asks, with its defaults spelled out
    "instructions": "You are a coding agent.",
    "tools": [
        TOOLS[1], {"type": "local_shell"}, {"type": "web_search", "external_web_access": True},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
    ],
    "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "text": {"verbosity": "low"},
    "service_tier": "auto", "truncation": "disabled", "background": False, "previous_response_id": None,
    "stream_options": {"include_obfuscation": False}, "user": "me", "max_tool_calls": 3, "metadata": {},
    "top_logprobs": 0,
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "x"},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "now", "arguments": "", "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
    ],
}  # fmt: skip


def test_row_51_what_asks_for_nothing_is_taken_and_named(start_fake: StartFake) -> None:
    answer = start_fake(template=HERMES).post("/v1/responses", ASK | CODEX | {"x": 1})
    assert answer.status_code == 200, answer.text
    assert [tool["name"] for tool in answer.json()["tools"]] == ["now"]
    assert answer.headers["x-tucka-ignored"].split(", ") == [
        "background", "input.encrypted_content", "input.id", "input.status", "max_tool_calls", "prompt_cache_key",
        "reasoning", "service_tier", "store", "stream_options", "stream_options.include_obfuscation", "text.verbosity",
        "tools.custom", "tools.local_shell", "tools.web_search", "truncation", "x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_SECRET"}]}, "input"),
        ({"input": [{"type": "SECRET"}]}, "input"),
        ({"input": [{"type": ["SECRET"]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "SECRET"}]}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "now"}]}, "input"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "SECRET"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "x"}, {"type": "function", "name": "f", "parameters": {"not": {}}}],
          "tool_choice": "required"}, "tools"),
        ({"text": {"format": {"type": "SECRET"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "SECRET"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex"),
        ({"include": ["SECRET"]}, "include"),
        ({"include": ["message.output_text.logprobs"], "tools": TOOLS}, "include"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(start_fake: StartFake, fields: dict[str, Any], param: str) -> None:
    answer: httpx.Response = start_fake(template=HERMES).post("/v1/responses", ASK | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and "SECRET" not in answer.text and "Input tag" not in error["message"]


def test_what_cannot_be_called_is_the_place_of_a_function(start_fake: StartFake) -> None:
    """The place is counted among the functions, whatever tools stand between them."""
    tools = [TOOLS[1], {"type": "x"}, {"type": "function", "name": "f", "parameters": {"not": {}}}]
    answer = start_fake(template=HERMES).post("/v1/responses", ASK | {"tools": tools, "tool_choice": "required"})
    assert "of function 2 of" in answer.json()["error"]["message"]


def test_no_logprobs_where_a_model_thinks(start_fake: StartFake) -> None:
    answer = start_fake(template=THINKS).post("/v1/responses", ASK | {"include": ["message.output_text.logprobs"]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "include"


def test_every_field_reaches_the_engine_or_the_answer() -> None:
    """A field that is declared but forgotten would be silently ignored: what has no effect is declared as such."""
    modules = (door, rendering, response_history, response_output, responses, sampling, structured, turn)
    text = "".join(map(inspect.getsource, modules))
    for name in ResponseBody.model_fields.keys() - ResponseBody.ignored:
        assert f"body.{name}" in text, name
