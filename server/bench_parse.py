"""What reading a body costs the API's process: `python -m tucka_runtime.server.bench_parse`.

Typical bodies of every door, each read many times over, step by step: strict JSON, the typed model, the search for what
is ignored, and what the chat template is told. Processor time in microseconds, the median of the rounds, beside
Python's own `json.loads`. No server is needed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tucka_runtime.server.api import anthropic_history, chat, response_history
from tucka_runtime.server.api.anthropic_bodies import MessagesBody
from tucka_runtime.server.api.bodies import ChatBody, CompletionBody, EmbeddingBody
from tucka_runtime.server.api.reading import ignored_names, parse
from tucka_runtime.server.api.response_body import ResponseBody
from tucka_runtime.server.api.values import Body
from tucka_runtime.server.http.body import parse_json

TEXT = "The quick brown fox jumps over the lazy dog, and so on for some words. " * 4
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}
FUNCTIONS = [{"name": f"forecast_{i}", "description": TEXT[:70], "parameters": PARAMETERS} for i in range(10)]
SAMPLING = {
    "model": "base",
    "temperature": 0.7,
    "top_p": 0.9,
    "stream": True,
    "stream_options": {"include_usage": True},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "forecast_1", "arguments": '{"city": "Rome"}'}}


def _chat(count: int) -> dict[str, Any]:
    roles = [("system", "user", "assistant")[0 if not i else 1 + (i + 1) % 2] for i in range(count)]
    return SAMPLING | {"max_tokens": 256, "messages": [{"role": role, "content": TEXT} for role in roles]}


def _chat_with_tools() -> dict[str, Any]:
    """Calls, what they returned and what an answer has beside that, as clients send it back."""
    said = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]}
    turn = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}, said]
    turn.append({"role": "tool", "tool_call_id": "call_1", "content": TEXT})
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    return SAMPLING | {"messages": turn * 10, "tools": tools, "tool_choice": "auto"}


def _response() -> dict[str, Any]:
    said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    said["content"] = [{"type": "output_text", "text": TEXT, "annotations": []}]  # type: ignore[assignment]
    call = {"type": "function_call", "call_id": "call_1", "name": "forecast_1", "arguments": '{"city": "Rome"}'}
    turn = [{"role": "user", "content": [{"type": "input_text", "text": TEXT}]}, said, call]
    turn.append({"type": "function_call_output", "call_id": "call_1", "output": TEXT})
    tools = [{"type": "function", "strict": False, **function} for function in FUNCTIONS]
    return {"model": "base", "instructions": TEXT, "input": turn * 10, "tools": tools, "stream": True, "store": False}


def _messages() -> dict[str, Any]:
    kept = {"type": "ephemeral"}
    used = {"type": "tool_use", "id": "toolu_1", "name": "forecast_1", "input": {"city": "Rome"}}
    turn: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": TEXT, "cache_control": kept}]}]
    turn.append({"role": "assistant", "content": [{"type": "text", "text": TEXT}, used]})
    turn.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": TEXT}]})
    tools = [{"name": f["name"], "description": f["description"], "input_schema": PARAMETERS} for f in FUNCTIONS]
    return {"model": "base", "max_tokens": 256, "system": TEXT, "messages": turn * 10, "tools": tools, "stream": True}


def _nothing(body: Any) -> None:
    """What a door without a template makes of its body."""


CASES: list[tuple[str, type[Body], dict[str, Any], Callable[[Any], object]]] = [
    *((f"chat, {n} message{'s'[: n > 1]}", ChatBody, _chat(n), chat.conversation) for n in (1, 10, 100)),
    ("chat, 30 with tools", ChatBody, _chat_with_tools(), chat.conversation),
    ("completions, a text", CompletionBody, SAMPLING | {"prompt": TEXT}, _nothing),
    ("completions, 2,000 ids", CompletionBody, SAMPLING | {"prompt": list(range(2000))}, _nothing),
    ("responses, 40 items", ResponseBody, _response(), response_history.conversation),
    ("messages, 30 turns", MessagesBody, _messages(), anthropic_history.conversation),
    ("embeddings, 32 texts", EmbeddingBody, {"model": "base", "input": [TEXT] * 32}, _nothing),
]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.server.bench_parse", description="What reading a body costs the API's process."
    )
    parser.add_argument("--rounds", type=int, default=200, help="of each body (default: 200)")
    rounds: int = parser.parse_args(given).rounds
    columns = "bytes", "json.loads", "json", "model", "ignored", "template", "all us"
    print(" ".join([f"{'':22s}", *(f"{column:>10}" for column in columns)]))
    for name, kind, value, template in CASES:
        raw = bytearray(json.dumps(value).encode())
        body = parse(kind, value)
        ignored_names(body)
        steps = (
            partial(json.loads, raw),
            partial(parse_json, raw),
            partial(parse, kind, value),
            partial(ignored_names, body),
            partial(template, body),
        )
        plain, *took = (_cost(rounds, step) for step in steps)
        print(" ".join([f"{name:22s}", f"{len(raw):10d}", *(f"{us:10.1f}" for us in (plain, *took, sum(took)))]))


def _cost(rounds: int, step: Callable[[], object]) -> float:
    """Microseconds of processor time that a step takes."""
    took = []
    for _ in range(rounds):
        begin = time.thread_time_ns()
        step()
        took.append(time.thread_time_ns() - begin)
    return statistics.median(took) / 1000


if __name__ == "__main__":
    main()
