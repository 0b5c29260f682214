"""From messages and functions as bodies have them to what chat templates know."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.conversations import call_arguments
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.conversation import (
    AssistantMessage,
    ChatMessage,
    FunctionMessage,
    RenderingFields,
    TextPart,
    ToolCall,
    ToolMessage,
)
from tucka_runtime.server.service.chat_template import Rendering

_RESERVED = {
    "messages", "tools", "documents", "conversations", "chat_template", "return_assistant_tokens_mask",
    "continue_final_message", "add_generation_prompt",
}  # fmt: skip


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates know them. `developer` is the newer name of `system`; content that is null is
    empty, since templates join strings; arguments of calls are objects. The older `function_call` and its result are a
    call and a tool's message, told by the place of the call."""
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


def _for_template(message: ChatMessage, legacy_id: str) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    found: dict[str, Any] = {"role": role, "content": _text(message)}
    if message.name:
        found["name"] = message.name
    if isinstance(message, AssistantMessage):
        if thought := message.reasoning_content or message.reasoning:
            found["reasoning_content"] = thought
        if message.tool_calls:
            found["tool_calls"] = [_call(call) for call in message.tool_calls]
        elif message.function_call:
            found["tool_calls"] = [_call(ToolCall(id=legacy_id, function=message.function_call))]
    elif isinstance(message, ToolMessage) and message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    elif isinstance(message, FunctionMessage):
        found["tool_call_id"] = legacy_id
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call_arguments(call.function.arguments)}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def _text(message: ChatMessage) -> str:
    content = message.content or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
