"""Calls of functions and thoughts over a socket, with OpenAI's client: what a model says becomes calls, and what has
to be called is."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.support.chat_templates import HERMES, LLAMA, MISTRAL, PLAIN, THINKS
from tests.support.functions import WEATHER
from tests.support.server_fixtures import StartFake
from tests.support.servers import Server, make_base, start_command

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
ASK: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]}
BERN = '{"city": "Bern", "days": 2}'


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """OpenAI's choice among some of the functions."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def streamed(server: Server, **ask: Any) -> tuple[dict[str, Any], str]:
    """The message that a stream's deltas make, put together as OpenAI's clients do, and the finish reason."""
    message: dict[str, Any] = {"content": "", "calls": [], "reasoning": ""}
    finish = ""
    for chunk in client(server).chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        message["content"] += choice.delta.content or ""
        message["reasoning"] += getattr(choice.delta, "reasoning", "")
        assert getattr(choice.delta, "reasoning", None) == getattr(choice.delta, "reasoning_content", None)
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(message["calls"]) and call.type == "function"
                message["calls"].append({"id": call.id, "name": call.function.name, "arguments": ""})
            message["calls"][call.index]["arguments"] += call.function.arguments
        finish = choice.finish_reason or finish
    return message, finish


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (HERMES, 'I will.\n<tool_call>\n{{"name": "get_weather", "arguments": {0}}}\n</tool_call>\n<tool_call>\n'
         '{{"name": "now", "arguments": {{}}}}\n</tool_call>'),
        (LLAMA, 'I will.<|python_tag|>{{"name": "get_weather", "parameters": {0}}}; '
         '{{"name": "now", "parameters": {{}}}}'),
        (MISTRAL, 'I will.[TOOL_CALLS] [{{"name": "get_weather", "arguments": {0}}}, '
         '{{"name": "now", "arguments": {{}}}}]'),
    ],
)  # fmt: skip
def test_calls_of_the_models_own_choice(start_fake: StartFake, template: str, said: str) -> None:
    server = start_fake(template=template)
    assert server.engine
    server.engine.script = said.format(BERN)
    whole = client(server).chat.completions.create(**ASK, tools=TOOLS).choices[0]
    assert whole.message.content == "I will." and whole.finish_reason == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
    assert calls == [("get_weather", BERN), ("now", "{}")]
    message, finish = streamed(server, **ASK, tools=TOOLS)
    assert message["content"] == "I will." and finish == "tool_calls"
    assert [(call["name"], call["arguments"]) for call in message["calls"]] == calls
    assert len({call["id"] for call in message["calls"]}) == 2
    assert server.engine.requests[-1].sampling.grammar is None
    # Without functions, and where none may be called, it is text: all that the model said.
    without: list[dict[str, Any]] = [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS[:0]}]
    for fields in without:
        answer = client(server).chat.completions.create(**ASK, **fields).choices[0]
        assert answer.message.content == server.engine.script and answer.finish_reason == "stop"
        assert answer.message.tool_calls is None


def test_a_history_of_calls_is_rendered(start_fake: StartFake) -> None:
    """What a client sends back is what it got; a template that takes no functions is told of them in text."""
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "index": 0, "function": {"name": "get_weather", "arguments": BERN}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]  # fmt: skip
    native, plain = start_fake(template=HERMES), start_fake(template=PLAIN)
    texts = []
    for server in (native, plain):
        body = {"messages": history, "tools": TOOLS}
        ids = server.post("/tokenize", body).raise_for_status().json()["tokens"]
        texts.append(bytes(token - 3 for token in ids).decode())
        assert client(server).chat.completions.create(model="base", messages=history, tools=TOOLS, max_tokens=1)
        assert server.engine and list(server.engine.requests[-1].prompts[0]) == ids
    assert '# {"type": "function", "function": {"name": "get_weather", "description": "Weather."' in texts[0]
    assert f'assistant: <tool_call>{{"name": "get_weather", "arguments": {BERN}}}</tool_call>\ntool: sunny' in texts[0]
    assert texts[1].startswith("user: You can call functions.") and "Weather?" in texts[1]
    assert f'{{"name": "get_weather", "arguments": {BERN}}}\nuser: get_weather returned:\nsunny' in texts[1]


@pytest.mark.parametrize("template", [HERMES, PLAIN])
def test_a_history_of_calls_with_half_a_surrogate_pair_is_rendered(start_fake: StartFake, template: str) -> None:
    """As the escape that it was: models write such, and no text can hold what it stands for."""
    arguments = r'{"city": "\ud83d"}'
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    history = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    server = start_fake(template=template)
    ids = server.post("/tokenize", {"messages": history}).raise_for_status().json()["tokens"]
    assert json.dumps(arguments) in bytes(token - 3 for token in ids).decode()
    server.post("/v1/chat/completions", ASK | {"messages": history, "max_tokens": 1}).raise_for_status()
    items = [
        {"type": "message", "role": "user", "content": "Hello"},
        {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": arguments},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    server.post("/v1/responses", {"model": "base", "input": items, "max_output_tokens": 1}).raise_for_status()
    assert server.engine
    assert [list(request.prompts[0]) for request in server.engine.requests] == [ids, ids]


def test_functions_in_their_older_form(start_fake: StartFake) -> None:
    """`functions` and `function_call` are tools in other words: the same prompt, one call, its own shape of answer."""
    server = start_fake(template=HERMES)
    assert server.engine
    older: dict[str, Any] = {"functions": [tool["function"] for tool in TOOLS]}
    server.engine.script = f'I will.<tool_call>{{"name": "get_weather", "arguments": {BERN}}}</tool_call>'
    server.engine.script += '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    whole = client(server).chat.completions.create(**ASK, **older).choices[0]
    assert whole.finish_reason == "function_call" and whole.message.content == "I will."
    assert whole.message.tool_calls is None and whole.message.function_call is not None
    assert (whole.message.function_call.name, whole.message.function_call.arguments) == ("get_weather", BERN)
    name, arguments, said, finish = "", "", "", None
    for chunk in client(server).chat.completions.create(**ASK, **older, stream=True):
        (choice,) = chunk.choices
        assert choice.delta.tool_calls is None
        said, finish = said + (choice.delta.content or ""), choice.finish_reason or finish
        if call := choice.delta.function_call:
            name, arguments = name + (call.name or ""), arguments + (call.arguments or "")
    assert (said, name, arguments, finish) == ("I will.", "get_weather", BERN, "function_call")
    client(server).chat.completions.create(**ASK, tools=TOOLS)
    assert server.engine.requests[-1].prompts == server.engine.requests[0].prompts
    forced = client(server).chat.completions.create(**ASK, **older, function_call={"name": "now"})
    named = client(server).chat.completions.create(
        **ASK, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}}
    )
    one, two = server.engine.requests[-2:]
    assert one.sampling.grammar == two.sampling.grammar and one.sampling.grammar
    assert forced.choices[0].message.function_call and named.choices[0].message.tool_calls
    none = client(server).chat.completions.create(**ASK, **older, function_call="none").choices[0]
    assert none.message.content == server.engine.script and none.finish_reason == "stop"


def test_a_history_of_functions_in_their_older_form(start_fake: StartFake) -> None:
    server = start_fake(template=HERMES.replace("{{ m.role }}", "{{ m.role }}{{ m.tool_call_id }}"))
    call = {"name": "get_weather", "arguments": BERN}
    older = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    newer = [
        older[0],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call1", "type": "function", "function": call}]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call1", "content": "sunny"},
    ]
    one, two = (server.post("/tokenize", {"messages": m}).raise_for_status().json()["tokens"] for m in (older, newer))
    assert one == two and b"toolcall1: sunny" in bytes(token - 3 for token in one)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "now"}], "tools": TOOLS}, "functions"),
        ({"functions": [{"name": "now"}, {"name": "now"}]}, "functions"),
        ({"functions": [{"name": "now"}], "function_call": {"name": "then"}}, "function_call"),
        ({"function_call": {"name": "now"}}, "function_call"),
        ({"functions": [{"name": "now"}], "function_call": "required"}, "function_call"),
    ],
)
def test_what_is_wrong_with_the_older_form(start_fake: StartFake, fields: dict[str, Any], param: str) -> None:
    answer = start_fake(template=HERMES).post("/v1/chat/completions", ASK | fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_mistrals_ids_have_nine_letters(start_fake: StartFake) -> None:
    server = start_fake(template=MISTRAL.replace("{{ call.function", "{{ call.id }}{{ call.function"))
    assert server.engine
    server.engine.script = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    call = client(server).chat.completions.create(**ASK, tools=TOOLS).choices[0].message.tool_calls
    assert call and len(call[0].id) == 9 and call[0].id.isalnum()
    history = [
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_of_another_server", "function": {"name": "now", "arguments": ""}}],
        }
    ]
    text = bytes(t - 3 for t in server.post("/tokenize", {"messages": history}).json()["tokens"]).decode()
    assert "call_of_another_server" not in text and '{"name": "now", "arguments": {}}' in text


def test_thoughts_are_told_apart(start_fake: StartFake) -> None:
    server = start_fake(template=THINKS)
    assert server.engine
    server.engine.script = '\nhm\n</think>\n\nHi<tool_call>{"name": "now"}</tool_call>'
    for tools in ([], TOOLS):
        rest = "Hi" if tools else server.engine.script.split("\n\n")[1]
        whole = client(server).chat.completions.create(**ASK, tools=tools)
        answer, used = whole.choices[0], whole.usage.completion_tokens_details.reasoning_tokens
        assert used == server.engine.script.index("</think>") + len("</think>")
        assert answer.message.content == rest and bool(answer.message.tool_calls) == bool(tools)
        assert answer.message.reasoning == answer.message.reasoning_content == "hm"  # type: ignore[attr-defined]
        message, _ = streamed(server, **ASK, tools=tools)
        assert (message["content"], message["reasoning"]) == (rest, "hm")
        message, _ = streamed(server, **ASK, tools=tools, extra_body={"include_reasoning": False})
        assert (message["content"], message["reasoning"]) == (rest, "")
    apart = client(server).chat.completions.create(**ASK, extra_body={"separate_reasoning": False}).choices[0]
    assert apart.message.content == server.engine.script


def test_thoughts_can_stay_in_the_text(start_fake: StartFake) -> None:
    server = start_fake(template=THINKS, reasoning_parser="none")
    assert server.engine
    server.engine.script = "hm</think>Hi"
    assert client(server).chat.completions.create(**ASK).choices[0].message.content == "hm</think>Hi"


def test_the_format_can_be_chosen(start_fake: StartFake) -> None:
    server = start_fake(template=HERMES, tool_call_parser="llama3_json")
    assert server.engine
    server.engine.script = '{"name": "now", "parameters": {}}'
    assert client(server).chat.completions.create(**ASK, tools=TOOLS).choices[0].finish_reason == "tool_calls"


def test_what_templates_are_told(start_fake: StartFake) -> None:
    server = start_fake(template=HERMES)

    def text(**fields: Any) -> str:
        answer = server.post("/tokenize", {"messages": ASK["messages"]} | fields)
        return bytes(token - 3 for token in answer.raise_for_status().json()["tokens"]).decode()

    assert text() == "user: Hello\nassistant:"
    assert text(add_generation_prompt=False) == "user: Hello\n"
    assert text(chat_template_kwargs={"mood": "!"}) == "user: Hello!\nassistant:"
    last = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am"}]
    assert text(messages=last, continue_final_message=True) == "user: Hello\nassistant: I am"


def test_some_of_the_functions_may_be_called(start_fake: StartFake) -> None:
    """The model is told of those alone, and held to them where it has to call."""
    server = start_fake(template=HERMES)
    assert server.engine
    for mode, held in (("auto", False), ("required", True)):
        answer = server.post("/v1/chat/completions", ASK | {"tools": TOOLS, "tool_choice": allowed(mode, "now")})
        request = server.engine.requests[-1]
        told = bytes(token - 3 for token in request.prompts[0]).decode()
        grammar = request.sampling.grammar or ""
        assert answer.status_code == 200 and "now" in told and "get_weather" not in told
        assert ("now" in grammar) == held and "get_weather" not in grammar


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "rm")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("none", "now")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
          "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 70_000]}}}],
          "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)  # fmt: skip
def test_row_18_20_what_cannot_be_called(start_fake: StartFake, fields: dict[str, Any], param: str) -> None:
    answer = start_fake(template=HERMES).post("/v1/chat/completions", ASK | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.fixture(
    scope="module", params=[HERMES, LLAMA, MISTRAL, PLAIN, THINKS], ids="hermes llama mistral plain thinks".split()
)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model, which would never call anything by itself."""
    folder = tmp_path_factory.mktemp("tools")
    base = make_base(folder / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": request.param}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    process, url = start_command("--model", str(base), "--strict", log=folder / "log")
    yield Server(url, process.pid)
    process.terminate()
    assert process.wait(30) == 0


def test_what_has_to_be_called_is(real: Server) -> None:
    """Required and named, streamed or not, whatever the template's format; thoughts come before it."""
    ask = ASK | {"tools": TOOLS, "seed": 1, "max_tokens": 180, "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        answers = client(real).chat.completions.create(**ask, tool_choice=choice, n=3).choices
        message, finish = streamed(real, **ask, tool_choice=choice)
        made = [(a.message.content, a.finish_reason, a.message.tool_calls or []) for a in answers]
        calls = [(c.function.name, c.function.arguments) for _, _, found in made for c in found]
        calls += [(call["name"], call["arguments"]) for call in message["calls"]]
        if all(reason == "length" for _, reason, _ in made):  # a random model thinks to the end
            assert all(getattr(a.message, "reasoning", None) for a in answers)
            continue
        assert finish == "tool_calls" and len(calls) == 4
        assert all((content, reason, len(found)) == (None, "tool_calls", 1) for content, reason, found in made)
        for name, arguments in calls:
            assert name == "get_weather" if choice is named else name in ("get_weather", "now")
            jsonschema.validate(json.loads(arguments), WEATHER if name == "get_weather" else {"maxProperties": 0})
