"""Conversations of training records, in the forms that tools write them, brought to what chat templates know."""

import json
from typing import Any

from tucka_runtime.conversations import Message, call_arguments

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Roles by the names that messages give them: OpenAI's, ShareGPT's, Gemma's and LLaMA-Factory's."""

KNOWN = frozenset(
    "role content name reasoning_content reasoning tool_calls tool_call_id function_call from value weight".split()
)


def messages_of(value: Any, key: str) -> tuple[tuple[Message, ...], tuple[bool, ...], frozenset[str]]:
    """The messages, which of them are learnt (those of the assistant that no `weight` of 0 excepts), and the keys that
    nothing was made of. Raises ValueError with the reason."""
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{key!r} must be a list of at least two messages")
    made: list[Message] = []
    learnt: list[bool] = []
    ignored: set[str] = set()
    for i, given in enumerate(value, 1):
        if not isinstance(given, dict):
            raise ValueError(f"message {i} must be an object")
        message = {name: item for name, item in given.items() if item is not None}
        weight = message.get("weight", 1)
        if weight not in (0, 1):
            raise ValueError(f"the weight of message {i} must be 0 or 1")
        made.append(_message(message, i))
        learnt.append(made[-1]["role"] == "assistant" and i > 1 and weight == 1)
        ignored |= message.keys() - KNOWN
    return tuple(made), tuple(learnt), frozenset(ignored)


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The functions that may be called, as templates know them; `value` may be JSON as text, and a function may stand
    without the object that names its type. Raises ValueError with the reason."""
    if isinstance(value, str):
        value = _json(value, "'tools'") if value.strip() else []
    if not isinstance(value, list):
        raise ValueError("'tools' must be a list of functions")
    found = []
    for i, tool in enumerate(value, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {i} must be a function with a name")
        check_whole(json.dumps(function, ensure_ascii=False))
        found.append({"type": "function", "function": function})
    return tuple(found)


def check_whole(text: str) -> None:
    """Raises ValueError for half a surrogate pair."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("a text holds half a surrogate pair: a character was cut in two where the file was written")


def _message(message: dict[str, Any], i: int) -> Message:
    said = message.get("role", message.get("from"))
    if not isinstance(said, str) or said not in ROLES:
        raise ValueError(f"message {i} must be an object with 'role' and 'content'; a role other than "
                         f"{', '.join(ROLES)} is not known")  # fmt: skip
    made: Message = {"role": ROLES[said], "content": _text(message.get("content", message.get("value", "")), i)}
    if said == "function_call":
        made["tool_calls"], made["content"] = _calls(_json(made["content"], f"message {i}"), i), ""
    elif calls := message.get("tool_calls") or message.get("function_call"):
        made["tool_calls"] = _calls(_json(calls, f"message {i}") if isinstance(calls, str) else calls, i)
    if thought := message.get("reasoning_content") or message.get("reasoning"):
        made["reasoning_content"] = _text(thought, i)
    for name in ("name", "tool_call_id"):
        if name in message:
            made[name] = _text(message[name], i)
    if not made["content"] and "tool_calls" not in made and made["role"] != "tool":
        raise ValueError(f"message {i} must be an object with a non-empty string as 'content'")
    return made


def _calls(value: Any, i: int) -> list[dict[str, Any]]:
    """Calls of functions, each with its arguments as an object: templates write them in their own way."""
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"message {i} has a call without the name of a function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = call_arguments(arguments)
        check_whole(json.dumps([function["name"], arguments], ensure_ascii=False))
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return found


def _text(value: Any, i: int) -> str:
    """A text, or the texts of a message's parts, a line each, as the server joins them."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"message {i} has a part that is no text")
        value = "\n".join(map(str, parts))
    if not isinstance(value, str):
        raise ValueError(f"message {i} must be an object with a non-empty string as 'content'")
    check_whole(value)
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON") from None
