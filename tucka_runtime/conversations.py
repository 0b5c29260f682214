"""What a chat template is given of a conversation with functions, for the server and the trainer alike: its messages as
templates know them, and the functions that may be called."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
OPEN, CLOSE = "<think>", "</think>"  # what stands around a thought

_TOLD = (
    "You can call functions. Each line is one, with the JSON schema of its parameters:\n{functions}\n"
    'To call one, answer with nothing but JSON: {{"name": ..., "arguments": {{...}}}}; for several a list of those.'
)


def takes_tools(template: str) -> bool:
    """Whether a template knows of functions that may be called."""
    return re.search(r"\btools\b", template) is not None


def call_format(template: str) -> str:
    """The format of calls that a chat template teaches."""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return "llama3_json"
    return "json"


def call_arguments(arguments: str) -> Any:
    """What the text of a call's arguments says, or the text itself where that is no JSON, or escapes half of a
    surrogate pair, which no prompt can hold: models write such, and clients send it back."""
    try:
        value = json.loads(arguments) if arguments else {}
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return value


def with_short_ids(messages: list[Message]) -> list[Message]:
    """The same, with calls' ids of nine letters and digits: Mistral's templates take no others."""
    made = []
    for message in messages:
        calls = [call | {"id": _short(call["id"])} if "id" in call else call for call in message.get("tool_calls", ())]
        message = message | {"tool_calls": calls} if calls else message
        if "tool_call_id" in message:
            message = message | {"tool_call_id": _short(message["tool_call_id"])}
        made.append(message)
    return made


def without_tools(messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same for a template that knows no functions: what may be called stands in the first message, calls and what
    they returned are text. `tools` are as templates know them."""
    made = []
    names: dict[str, str] = {}
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]
            content += ("\n" if content else "") + json.dumps(call["function"], ensure_ascii=False)
        role = message["role"]
        if role == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "the function")
            role, content = "user", f"{name} returned:\n{content}"
        kept = {key: message[key] for key in ("name", "reasoning_content") if key in message and role != "user"}
        made.append({"role": role, "content": content} | kept)
    if tools:
        told = _TOLD.format(functions="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        first = made[0]
        parts = (first["content"], told) if first["role"] == "system" else (told, first["content"])
        made[0] = first | {"content": "\n\n".join(filter(None, parts))}
    return made


def _short(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
