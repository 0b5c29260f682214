"""Calls and thoughts in what models write: the same events come of a text however it is cut into pieces."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tucka_runtime.conversations import call_format
from tucka_runtime.server.service.calls import FORMATS, CallParser
from tucka_runtime.server.service.events import (
    Call,
    CallArguments,
    CallBegun,
    CallEnded,
    Event,
    Message,
    OutputParser,
    PlainText,
    ReasoningEnded,
)
from tucka_runtime.server.service.reasoning import ThinkParser

F1 = '{"name": "f", "arguments": {"a": "}]</tool_call>\\" é"}}'
F2 = '{"name": "g", "arguments": {}}'
A1 = '{"a": "}]</tool_call>\\" é"}'
HALF = '"\\ud83d"'
DEEP = "[" * 2000 + "]" * 2000


def parser(form: str, think: bool | None = None) -> OutputParser:
    """`think`: with a parser of thoughts around it, and whether the prompt has opened one."""
    ids = map(str, itertools.count())
    calls = CallParser(FORMATS[form], {"f", "g", "get_weather"}, lambda: next(ids))
    return calls if think is None else ThinkParser(calls, think)


def parsed(made: OutputParser, *pieces: str) -> tuple[Message, list[Event]]:
    events = [event for piece in pieces for event in made.push(piece)] + made.finish()
    return Message.of(events), events


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{F1}\n</tool_call>", "", [("f", A1)]),
        ("hermes", f"Let me see.\n\n<tool_call>\n{F1}\n</tool_call>\n<tool_call>\n{F2}\n</tool_call>\n", "Let me see.",
         [("f", A1), ("g", "{}")]),
        ("hermes", f"<tool_call>[{F2}, {F2}]</tool_call> Done.", " Done.", [("g", "{}"), ("g", "{}")]),
        ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
        ("hermes", '<tool_call>{"id": {"z": [1]}, "name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", f"<tool_call>{F2}<tool_call>{F2}", "", [("g", "{}"), ("g", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": [{}]}}', "",
         [("f", "{}"), ("g", '{"b": [{}]}')]),
        ("llama3_json", '{"type": "function", "name": "f", "parameters": null}', "", [("f", "{}")]),
        ("mistral", f"[TOOL_CALLS] [{F1}, {F2}]", "", [("f", A1), ("g", "{}")]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x[ARGS]{}', "", [("f", '{"a": 1}'), ("g", "{}")]),
        ("mistral", 'Yes.[TOOL_CALLS]get_weather{"a": 1}', "Yes.", [("get_weather", '{"a": 1}')]),
        ("json", f"\n{F1}", "", [("f", A1)]),
        ("json", f"[{F2}, {F2}]", "", [("g", "{}"), ("g", "{}")]),
        # What no string can hold is left as it was written.
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {HALF}}}</tool_call>', "", [("f", HALF)]),
        ("json", f'{{"arguments": {HALF}, "name": "f"}}', "", [("f", HALF)]),
        # Nor is what Python's parser finds too deep.
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {DEEP}}}</tool_call>', "", [("f", DEEP)]),
        ("json", f'{{"arguments": {DEEP}, "name": "f"}}', "", [("f", DEEP)]),
        # Cut off, or broken after the call has begun: what is there is the call's.
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "tr', "", [("f", '{"a": "tr')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [</tool_call> x', " x", [("f", '{"a": [')]),
    ],
)  # fmt: skip
def test_calls(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text)):
        message, _ = parsed(parser(form), *pieces)
        assert message.content == content
        assert [(call.name, call.arguments) for call in message.calls] == calls
        assert [call.id for call in message.calls] == [str(i) for i in range(len(calls))]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", " One writes <tool_call> and </tool_call> around it.\n"),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),  # is no function of this request
        ("hermes", F1),
        ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}'),
        ("hermes", "<tool_call>[1, 2]</tool_call> <tool_"),
        ("llama3_json", '{"name": "Bob", "parameters": {"a": 1}} '),
        ("llama3_json", f"It is {F2}"),
        ("mistral", "[TOOL_CALLS] rm[ARGS]{} [TOOL_CALLS]"),
        ("json", '{"name": "f"}'),
        ("json", '{"name": "f", "argum'),
        ("json", "[1, 2]"),
        ("json", " plain\ntext "),
    ],
)
def test_what_only_looks_like_a_call_is_text(form: str, text: str) -> None:
    for pieces in ([text], list(text)):
        message, _ = parsed(parser(form), *pieces)
        assert message == Message(text)


def test_calls_are_streamed() -> None:
    """The name as soon as it is known, then the arguments as they come, then the end."""
    made = parser("hermes")
    assert made.push('<tool_call>{"name": "f", "arguments": ') == []
    assert made.push('{"a"') == [CallBegun(0, "0", "f"), CallArguments(0, '{"a"')]
    assert made.push(": 1") == [CallArguments(0, ": 1")]
    assert made.push("}}") == [CallArguments(0, "}"), CallEnded(0)]


def test_a_call_that_is_cut_off_has_no_end() -> None:
    for text in ('<tool_call>{"name": "f", "arguments": {"a": 1', '<tool_call>{"name": "f", "arguments": {"a": 1}'):
        _, events = parsed(parser("hermes"), text)
        assert not any(isinstance(event, CallEnded) for event in events)
    _, events = parsed(parser("mistral"), '[TOOL_CALLS]f[ARGS]{"a')
    assert not any(isinstance(event, CallEnded) for event in events)


@pytest.mark.parametrize(
    ("begun", "text", "message"),
    [
        (False, "<think>\nhm, hm\n</think>\n\nHi", Message("Hi", "hm, hm")),
        (True, "\nhm\n</think>\n\nHi ", Message("Hi ", "hm")),
        (True, "<think>hm</think>Hi", Message("Hi", "hm")),
        (True, "cut off \n", Message("", "cut off")),
        (False, "<think>\n\n</think>\n\nHi", Message("Hi")),
        (False, "I <think> so</think>", Message("I <think> so</think>")),
        (False, " <thi", Message(" <thi")),
        (True, "a </thin", Message("", "a </thin")),
        (True, f"<tool_call>{F2}</think><tool_call>{F2}</tool_call>",
         Message("", f"<tool_call>{F2}", [Call("0", "g", "{}")])),
    ],
)  # fmt: skip
def test_thoughts(begun: bool, text: str, message: Message) -> None:
    for pieces in ([text], list(text)):
        found, events = parsed(parser("hermes", begun), *pieces)
        assert found == message
        ends = "</think>" in text and (begun or text.startswith("<think>"))
        assert [event for event in events if isinstance(event, ReasoningEnded)] == [ReasoningEnded()] * ends


WORDS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>", F1,
    F2, '{"name": "', 'f"', '", "arguments": ', '"parameters": {', "}", "{", "[", "]", ",", ";", ":", '"', "\\", " ",
    "\n",
    "null", "f", "g", "x", "<", "é", '"f"', "{}",
])  # fmt: skip


@given(
    form=st.sampled_from(sorted(FORMATS)),
    think=st.sampled_from([None, False, True]),
    text=st.lists(WORDS, max_size=14).map("".join),
    places=st.lists(st.integers(0, 400), max_size=12),
)
@example(form="hermes", think=None, text=f"<tool_call>{F1}</tool_call>", places=[3, 20, 21, 40])
def test_however_a_text_is_cut(form: str, think: bool | None, text: str, places: list[int]) -> None:
    message, events = parsed(parser(form, think), text)
    pieces, piecewise = parsed(parser(form, think), *cut(text, places))
    assert pieces == message
    ended = [event for event in events if isinstance(event, CallEnded)]
    assert [event for event in piecewise if isinstance(event, CallEnded)] == ended
    assert {call.name for call in message.calls} <= {"f", "g", "get_weather"}
    if not message.calls and think is None:
        assert message.content == text
    begun = 0
    for event in piecewise:  # in the order in which a client can follow them
        if isinstance(event, CallBegun):
            assert event.index == begun
            begun += 1
        elif isinstance(event, CallArguments | CallEnded):
            assert event.index == begun - 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


@given(arguments=st.dictionaries(st.text(), JSON), places=st.lists(st.integers(0, 2000), max_size=8), data=st.data())
def test_arguments_come_through_as_they_were_written(arguments: dict, places: list[int], data: st.DataObject) -> None:
    written = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))
    for form, text in {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>',
        "llama3_json": f'{{"name": "f", "parameters": {written}}}',
        "mistral": f"[TOOL_CALLS]f[ARGS]{written}",
        "json": f'{{"arguments": {written}, "name": "f"}}',
    }.items():
        message, _ = parsed(parser(form), *cut(text, places))
        assert message == Message("", "", [Call("0", "f", written)])


def test_the_format_is_told_by_the_template() -> None:
    assert call_format("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert call_format("[AVAILABLE_TOOLS] [TOOL_CALLS]") == "mistral"
    assert call_format("<|start_header_id|>{{ tools }}") == call_format("<|python_tag|>") == "llama3_json"
    assert call_format("{{ messages }}") == "json"


def test_plain_text() -> None:
    assert parsed(PlainText(), "a", "", "<tool_call>")[0] == Message("a<tool_call>")
