"""Anthropic's official client against the server: messages whole and streamed, tools, thoughts, counts and errors."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest

from tests.support.functions import WEATHER
from tests.support.server_fixtures import StartFake, fake_servers
from tests.support.servers import Server
from tucka_runtime.errors import EngineDeadError, OverloadedError
from tucka_runtime.server.api import anthropic_answer, anthropic_history, anthropic_messages, door, sampling, turn
from tucka_runtime.server.api.anthropic_bodies import MessagesBody
from tucka_runtime.tokenizer import Tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}# {{ tool.function | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}{{ '(' ~ m.name ~ ')' if m.name }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking is defined %}{{ ' thinks' if enable_thinking and thinking else ' speaks' }}{% endif %}"
    "{% endif %}"
)
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "Weather.", "input_schema": WEATHER},
    {"name": "now", "type": "custom", "input_schema": {"type": "object", "properties": {}}},
]
ASK: dict[str, Any] = {"model": "base", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello"}]}
CALLS = (
    'I will.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"


@pytest.fixture(scope="module")
def fake(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with fake_servers(tokenizer, tmp_path_factory.mktemp("anthropic")) as start:
        yield start(template=TEMPLATE, max_body_bytes=50_000)


@pytest.fixture
def server(fake: Server) -> Server:
    """It says letters until it is told otherwise."""
    assert fake.engine
    fake.engine.script = fake.engine.fail_after = None
    return fake


def client(server: Server, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)


def prompt(server: Server) -> str:
    """What the engine was asked last."""
    assert server.engine
    return bytes(token - 3 for token in server.engine.requests[-1].prompts[0]).decode()


def rendered(server: Server, **fields: Any) -> str:
    """The prompt of a body; that it has as many tokens as are counted and charged is seen to."""
    body = ASK | fields
    answer = server.post(MESSAGES, body)
    assert answer.status_code == 200, answer.text
    used, counted = answer.json()["usage"], server.post(COUNT, body).json()
    text = prompt(server)
    assert counted == {"input_tokens": len(text.encode())}
    assert used["input_tokens"] + used["cache_read_input_tokens"] == counted["input_tokens"]
    return text


def streamed(server: Server, **fields: Any) -> tuple[Any, list[str]]:
    """The message that the client puts together of a stream, and the types of the events on the wire."""
    with client(server).messages.stream(**fields) as stream:
        message = stream.get_final_message()
    text = server.post(MESSAGES, fields | fields.pop("extra_body", {}) | {"stream": True}).text
    events = [event.split("\n") for event in text.removesuffix("\n\n").split("\n\n")]
    types = [json.loads(data.removeprefix("data: "))["type"] for _, data in events]
    assert [name for name, _ in events] == [f"event: {kind}" for kind in types]
    return message, types


def alike(whole: Any, other: Any) -> None:
    """Two answers to one body: all but their ids is the same, and how much of the prompt was kept."""
    hidden: dict[str, Any] = {"id": "", "usage": None}
    whole, other = whole.model_dump() | hidden, other.model_dump() | hidden
    for message in (whole, other):
        for block in message["content"]:
            block.pop("id", None)
    assert whole == other


@pytest.mark.parametrize("model", ["llama-tiny", "one", "two"])
def test_a_streamed_message_is_the_whole_one(live: Server, model: str) -> None:
    """Base and adapters; the prompt is counted as it is charged, whether it was kept or not."""
    ask = ASK | {"model": model, "max_tokens": 12, "system": [{"type": "text", "text": "Be nice."}]}
    greedy = {"temperature": 0}  # which the client's newest versions have no argument for
    whole = client(live).messages.create(**ask, extra_body=greedy)
    assert whole.id.startswith("msg_") and whole.role == "assistant" and whole.model == model
    assert whole.stop_reason == "max_tokens" and whole.stop_sequence is None and whole.usage.output_tokens == 12
    message, types = streamed(live, **ask, extra_body=greedy)
    alike(whole, message)
    assert types[:3] == ["message_start", "ping", "content_block_start"]
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(types[3:-3]) == {"content_block_delta"}
    ask.pop("max_tokens")
    counted = client(live).messages.count_tokens(**ask).input_tokens
    for usage in (whole.usage, message.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    text = "".join(block.text for block in whole.content)
    chat = live.post("/v1/chat/completions", {
        "model": model, "max_tokens": 12, "temperature": 0,
        "messages": [{"role": "system", "content": "Be nice."}, *ASK["messages"]]}).json()  # fmt: skip
    assert chat["choices"][0]["message"]["content"] == text and chat["usage"]["prompt_tokens"] == counted


def test_our_own_fields(live: Server) -> None:
    ask = ASK | {"model": "one", "max_tokens": 4, "include_route": True, "route": "request", "top_k": 1}
    route = live.post(MESSAGES, ask).json()["route"]
    assert route["adapter"] == "one" and route["scope"] == "request" and len(route["weights"]) == 3
    last = live.post(MESSAGES, ask | {"stream": True}).text.split("event: message_delta\ndata: ")[1].split("\n")[0]
    assert json.loads(last)["route"] == route
    assert "route" not in live.post(MESSAGES, ASK | {"model": "one", "max_tokens": 4}).json()


def test_why_an_answer_ends(server: Server) -> None:
    assert server.engine
    server.engine.script = "one two three"
    assert client(server).messages.create(**ASK).stop_reason == "end_turn"
    message = client(server).messages.create(**ASK, stop_sequences=["tw", "x"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "tw")
    alike(message, streamed(server, **ASK, stop_sequences=["tw", "x"])[0])
    assert message.content[0].text == "one "  # type: ignore[union-attr]
    server.engine.script = None
    assert server.post(MESSAGES, ASK | {"max_tokens": 2048}).json()["stop_reason"] == "model_context_window_exceeded"
    empty = server.post(MESSAGES, ASK | {"max_tokens": 0}).json()
    assert empty["content"] == [] and empty["stop_reason"] == "max_tokens"


def test_tools_are_called_and_answered(server: Server) -> None:
    """The loop that the client's documentation shows: the answer goes back as it came, with what the tools returned."""
    assert server.engine
    server.engine.script = CALLS
    answer = client(server).messages.create(**ASK, tools=TOOLS)
    assert answer.stop_reason == "tool_use"
    said, first, second = answer.content
    assert said.type == "text" and said.text == "I will."
    assert first.type == "tool_use" and (first.name, first.input) == ("get_weather", {"city": "Bern", "days": 2})
    assert second.type == "tool_use" and (second.name, second.input) == ("now", {}) and first.id != second.id
    message, types = streamed(server, **ASK, tools=TOOLS)
    alike(answer, message)
    assert types.count("content_block_start") == types.count("content_block_stop") == 3
    server.engine.script = "Sunny."
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": first.id, "content": [{"type": "text", "text": "sunny"}]},
        {"type": "tool_result", "tool_use_id": second.id, "content": "no clock", "is_error": True},
        {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
    ]
    history: list[Any] = [
        *ASK["messages"], {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}
    ]  # fmt: skip
    last = client(server).messages.create(**ASK | {"messages": history}, tools=TOOLS)
    assert last.stop_reason == "end_turn" and last.content[0].text == "Sunny."  # type: ignore[union-attr]
    lines = prompt(server).split("\n")
    assert json.loads(lines[0][2:]) == {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}
    assert lines[2:] == [
        "user: Hello",
        'assistant: I will.<tool_call>{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "tool(get_weather): sunny",
        "tool(now): Error: no clock",
        "user: Well?",
        "assistant:",
    ]


def test_which_tools_may_be_called(server: Server) -> None:
    assert server.engine
    server.engine.script = CALLS
    told = "# " in rendered(server, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert told and server.engine.requests[-1].sampling.grammar is None
    assert "# " not in rendered(server, tools=TOOLS, tool_choice={"type": "none"})
    for choice, names in (({"type": "any"}, 2), ({"type": "tool", "name": "now"}, 1)):
        rendered(server, tools=TOOLS, tool_choice=choice)
        grammar = server.engine.requests[-1].sampling.grammar
        assert grammar and grammar.count("%json") == names and "now" in grammar
    # What Anthropic's own servers would run is skipped, and named.
    served = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}, {"type": "a b", "name": "x"}]
    answer = server.post(MESSAGES, ASK | {"tools": [*served, *TOOLS]})
    assert answer.headers["x-tucka-ignored"] == "?, tools.web_search_20250305"
    assert answer.json()["stop_reason"] == "tool_use" and "web_search" not in prompt(server)


def test_a_call_that_is_no_json(server: Server) -> None:
    """As Anthropic's documentation wraps such. To Python's parser some of it is JSON."""
    assert server.engine
    for arguments in ('{"a": 1', '{"a": 1e999}', r'{"a": "\ud83d"}', r'{"\udc00": 1}'):
        server.engine.script = '<tool_call>{"name": "now", "arguments": ' + arguments
        (call,) = server.post(MESSAGES, ASK | {"tools": TOOLS}).raise_for_status().json()["content"]
        assert call["input"] == {"INVALID_JSON": arguments}


def test_an_answer_of_a_schema(live: Server) -> None:
    """By a random model, which would rather say something else."""
    config: Any = {"format": {"type": "json_schema", "schema": WEATHER}, "effort": "low"}
    ask = ASK | {"model": "one", "max_tokens": 180, "output_config": config, "extra_body": {"seed": 1}}
    answer = client(live).messages.create(**ask)
    (said,) = answer.content
    assert answer.stop_reason == "end_turn" and said.type == "text"
    jsonschema.validate(json.loads(said.text), WEATHER)
    with client(live).messages.stream(**ask) as stream:
        alike(answer, stream.get_final_message())


def test_thoughts_have_blocks_of_their_own(server: Server) -> None:
    assert server.engine
    server.engine.script = "<think>\nhm\n</think>\n\nHi"
    budget: Any = {"type": "enabled", "budget_tokens": 1024}
    answer = client(server).messages.create(**ASK, thinking=budget)
    thought, said = answer.content
    assert thought.type == "thinking" and thought.thinking == "hm" and said.type == "text" and said.text == "Hi"
    assert prompt(server).endswith("assistant: thinks")
    alike(answer, streamed(server, **ASK, thinking=budget)[0])
    for thinking, end in (({"type": "disabled"}, " speaks"), ({"type": "adaptive", "display": "omitted"}, " thinks")):
        assert rendered(server, thinking=thinking).endswith("assistant:" + end)
        for message in (client(server).messages.create(**ASK, thinking=thinking), streamed(
            server, **ASK, thinking=thinking)[0]):  # fmt: skip
            assert [block.type for block in message.content] == ["text"]
    assert rendered(server, thinking={"type": "adaptive"}, chat_template_kwargs={"thinking": False}).endswith("speaks")
    assert rendered(server).endswith("assistant:")
    turn: Any = {"role": "assistant", "content": [*answer.content, {"type": "redacted_thinking", "data": "x"}]}
    history = [*ASK["messages"], turn, {"role": "user", "content": "And?"}]
    client(server).messages.create(**ASK | {"messages": history})
    assert "assistant: <think>hm</think>Hi\nuser: And?" in prompt(server)


def test_turns_of_one_role_are_one_and_the_last_of_the_assistant_goes_on(server: Server) -> None:
    user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    text: dict[str, Any] = {"type": "text", "text": "b"}
    assert rendered(server, messages=[user, user | {"content": [text, text]}]) == "user: a\nb\nb\nassistant:"
    assert rendered(server, messages=[user, assistant, assistant, user]).startswith("user: a\nassistant: a\na\nuser: a")
    assert rendered(server, system="s", messages=[user, assistant]) == "system: s\nuser: a\nassistant: a"
    assert rendered(server, messages=[user, {"role": "assistant", "content": ""}]) == "user: a\nassistant:"
    middle = {"role": "system", "content": [text]}
    assert rendered(server, messages=[user, middle, user]) == "user: a\nsystem: b\nuser: a\nassistant:"


def test_what_has_no_effect_is_named(server: Server) -> None:
    body = ASK | {
        "metadata": {"user_id": "me"}, "service_tier": "auto", "mcp_servers": [], "context_management": {},
        "stop": "l", "thinking": {"type": "enabled", "budget_tokens": 5},
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    }  # fmt: skip
    named = (
        "context_management, mcp_servers, metadata, service_tier, stop, system.cache_control, thinking.budget_tokens"
    )
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-b,c"}
    assert server.post(MESSAGES + "?beta=true", body, headers=headers).headers["x-tucka-ignored"] == named
    assert server.engine and not server.engine.requests[-1].sampling.stop


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "`max_tokens`"),
    ({"messages": []}, "`messages`"),
    ({"messages": [{"role": "user", "content": ""}], "max_tokens": 4096}, "`max_tokens` must lie between"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "`messages[0]`: A message's `role` must be user,"),
    ({"messages": [{"role": "assistant", "content": " "}]}, "no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
     "`messages[0].content[0]`: It must be a string or a list of blocks"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
     "Images, documents, search results"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
     "in an assistant's `tool_use`"),
    ({"messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}]}]},
     "`tool_result` with text"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
     "The last message calls tools"),
    ({"system": [{"type": "image"}]}, "`system"),
    ({"stop_sequences": "a"}, "`stop_sequences`: It must be a list"),
    ({"tools": [{"name": "a"}]}, "`tools[0].input_schema`"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "Two of the `tools`"),
    ({"tools": TOOLS * 65}, "`tools`"),
    ({"tool_choice": {"type": "any"}}, "there are no `tools`"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "a `name` if"),
    ({"tools": TOOLS, "tool_choice": {"type": "auto", "name": "now"}}, "a `name` if"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "rm"}}, "not among the `tools`"),
    ({"tools": [{"name": "a", "input_schema": {"not": {}}}], "tool_choice": {"type": "any"}}, "of function 1 of"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "The JSON schema cannot be"),
    ({"output_format": {"type": "json_schema"}}, "`output_format`: what it asks for is not supported"),
    ({"container": "c"}, "`container`: what it asks for is not supported"),
    ({"mcp_servers": [{}]}, "`mcp_servers`: what it asks for is not supported"),
    ({"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs`"),
    ({"temperature": 3}, "`temperature`"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_bad_bodies(server: Server, fields: dict[str, Any], said: str) -> None:
    answer = server.post(MESSAGES, {k: v for k, v in (ASK | fields).items() if v is not None})
    refused(answer, 400, "invalid_request_error")
    assert said in answer.json()["error"]["message"]


def refused(answer: httpx.Response, status: int, kind: str) -> None:
    """An error has Anthropic's shape and says nothing of ours."""
    error = answer.json()
    assert answer.status_code == status and set(error) == {"type", "error", "request_id"}, answer.text
    assert error["type"] == "error" and set(error["error"]) == {"type", "message"}
    assert error["error"]["type"] == kind and error["error"]["message"]
    assert error["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


def test_errors_of_every_status(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.engine
    refused(server.post(MESSAGES, ASK | {"model": "nobody"}), 404, "not_found_error")
    refused(server.post(COUNT, ASK | {"model": "nobody"}), 404, "not_found_error")
    refused(server.post("/v1/messages/batches", {}), 404, "not_found_error")
    refused(server.get(MESSAGES), 405, "invalid_request_error")
    refused(server.post(MESSAGES, ASK | {"system": "a" * 51_000}), 413, "request_too_large")
    refused(server.post(MESSAGES, ASK, headers={"content-encoding": "gzip"}), 415, "invalid_request_error")
    refused(server.client.post(server.url + MESSAGES, content=b"{"), 400, "invalid_request_error")
    long = {"role": "user", "content": "a" * 3000}
    for path in (MESSAGES, COUNT):
        answer = server.post(path, ASK | {"messages": [long]})
        refused(answer, 400, "invalid_request_error")
        assert "prompt is too long" in answer.json()["error"]["message"]
    many = {f"x-{i}": "1" for i in range(101)}
    refused(server.post(MESSAGES, ASK, headers=many), 431, "invalid_request_error")
    for error, status, kind in (
        (OverloadedError("Full."), 429, "rate_limit_error"),
        (EngineDeadError("Down."), 503, "overloaded_error"),
        (RuntimeError("/secret"), 500, "api_error"),
    ):
        monkeypatch.setattr(server.engine, "submit_error", error)
        for stream in (False, True):
            answer = server.post(MESSAGES, ASK | {"stream": stream})
            refused(answer, status, kind)
            assert "secret" not in answer.text and ("retry-after" in answer.headers) == (status != 500)
    with pytest.raises(anthropic.NotFoundError) as caught:
        client(server).messages.create(**ASK | {"model": "nobody"})
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("failure", "kind"), [(EngineDeadError("Down."), "overloaded_error"), (RuntimeError("/secret"), "api_error")]
)
def test_a_stream_that_fails_ends_with_an_error(server: Server, failure: Exception, kind: str) -> None:
    assert server.engine
    server.engine.failure, server.engine.fail_after = failure, 2
    answer = server.post(MESSAGES, ASK | {"stream": True})
    *_, name, data = answer.text.strip().split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and "message_stop" not in answer.text and "secret" not in answer.text
    assert error == {
        "type": "error",
        "error": {"type": kind, "message": error["error"]["message"]},
        "request_id": answer.headers["request-id"],
    }
    with (
        pytest.raises(anthropic.APIStatusError, match=kind),
        client(server).messages.stream(**ASK) as stream,
    ):
        stream.get_final_message()


def test_keys(start_fake: StartFake) -> None:
    server = start_fake(template=TEMPLATE, api_key=("user",))
    assert client(server, "user").messages.create(**ASK | {"max_tokens": 1}).usage.output_tokens == 1
    token = anthropic.Anthropic(base_url=server.url, auth_token="user", max_retries=0)
    assert token.messages.create(**ASK | {"max_tokens": 1}).usage.output_tokens == 1
    with pytest.raises(anthropic.AuthenticationError):
        client(server, "other").messages.create(**ASK)
    refused(server.post(MESSAGES, ASK), 401, "authentication_error")
    refused(server.post("/v1/messages/none", {}), 401, "authentication_error")
    assert server.post("/v1/chat/completions", {}).json()["error"]["code"] == "invalid_api_key"
    assert "request-id" not in server.get("/health").headers


def test_every_field_reaches_the_engine_or_the_answer() -> None:
    """A field that is declared but forgotten would be silently ignored."""
    modules = (anthropic_answer, anthropic_history, anthropic_messages, door, sampling, turn)
    text = "".join(map(inspect.getsource, modules))
    for name in MessagesBody.model_fields.keys() - MessagesBody.ignored:
        assert f"body.{name}" in text, name


def test_models_as_its_client_reads_them(server: Server) -> None:
    """Of OpenAI's clients, which do not send `anthropic-version`, nothing changes."""
    asking = client(server)
    listed = asking.models.list()
    (base,) = listed
    assert base == asking.models.retrieve("base") and listed.first_id == listed.last_id == base.id == "base"
    created = server.get("/v1/models/base").json()["created"]
    assert base.display_name == "base" and base.created_at.timestamp() == created
    shown = {"type": "model", "lifecycle": "active", "max_input_tokens": 2048, "max_tokens": 2048}
    assert shown.items() <= base.to_dict().items()
    with pytest.raises(anthropic.NotFoundError):
        asking.models.retrieve("nothing")
