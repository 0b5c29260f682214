"""What every door makes of its body's conversation: what chat templates know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tucka_runtime.conversations import Message, call_arguments
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.conversation import (
    AssistantMessage,
    ChatMessage,
    FunctionMessage,
    RefusalPart,
    RenderingFields,
    ToolMessage,
)
from tucka_runtime.server.api.tools import Tools
from tucka_runtime.server.service.chat_template import Rendering

_RESERVED = {
    "messages", "tools", "documents", "conversations", "chat_template", "return_assistant_tokens_mask",
    "continue_final_message", "add_generation_prompt",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a prompt is made of. `param` is the field that the messages came in."""

    messages: list[Message]
    tools: Tools
    rendering: Rendering
    param: str = "messages"


# Messages as chat templates know them.


def said(content: str, thought: str | None = None, calls: Sequence[Message] = ()) -> Message:
    """The assistant's."""
    found: Message = {"role": "assistant", "content": content}
    if thought:
        found["reasoning_content"] = thought
    if calls:
        found["tool_calls"] = list(calls)
    return found


def called(name: str, arguments: Any, call_id: str | None) -> Message:
    """A call of an assistant's message."""
    made: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | {"id": call_id} if call_id else made


def returned(content: str, call_id: str | None, name: str | None = None) -> Message:
    """A function's, or what it returned."""
    found: Message = {"role": "tool", "content": content}
    if name:
        found["name"] = name
    if call_id:
        found["tool_call_id"] = call_id
    return found


class WithText(Protocol):
    """A part of a content, as every door but chat's refusals has them."""

    @property
    def text(self) -> str: ...


def joined(content: str | Sequence[WithText | RefusalPart] | None) -> str:
    """Content that is a text or a list of parts with one each; templates join strings, so null is empty."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)


# What chat's own bodies have.


def for_template(messages: Sequence[ChatMessage]) -> list[Message]:
    """`developer` is the newer name of `system`. The older `function_call` and its result are a call and a tool's
    message, told by the place of the call."""
    made, place = [], 0
    for i, message in enumerate(messages):
        place = i if isinstance(message, AssistantMessage) and message.function_call else place
        made.append(_for_template(message, f"call{place}"))
    return made


def rendering(body: RenderingFields) -> Rendering:
    """How the messages are to be rendered. Raises InvalidRequestError."""
    variables = template_variables(body.chat_template_kwargs)
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise InvalidRequestError(
            "`continue_final_message` and `add_generation_prompt` exclude each other. Send one of them.",
            "continue_final_message",
        )
    return Rendering(
        variables=variables,
        add_generation_prompt=not goes_on and body.add_generation_prompt is not False,
        continue_final_message=goes_on,
    )


def template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """`chat_template_kwargs`. Raises InvalidRequestError."""
    variables = given or {}
    if not _RESERVED.isdisjoint(variables):
        raise InvalidRequestError(
            "`chat_template_kwargs` has a name that the server sets itself, from the field of that name.",
            "chat_template_kwargs",
        )
    return variables


def _for_template(message: ChatMessage, legacy_id: str) -> Message:
    content = joined(message.content)
    if isinstance(message, ToolMessage):
        return returned(content, message.tool_call_id, message.name)
    if isinstance(message, FunctionMessage):
        return returned(content, legacy_id, message.name)
    if isinstance(message, AssistantMessage):
        calls = [(call.function, call.id) for call in message.tool_calls or ()]
        if not calls and message.function_call:
            calls = [(message.function_call, legacy_id)]
        made = [called(function.name, call_arguments(function.arguments), call_id) for function, call_id in calls]
        found = said(content, message.reasoning_content or message.reasoning, made)
    else:
        found = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return found | {"name": message.name} if message.name else found
