"""From a conversation in Anthropic's shape to what chat templates know."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.conversations import Message
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.anthropic_bodies import (
    AssistantBlock,
    AssistantTurn,
    ConversationBody,
    CustomTool,
    SystemTurn,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from tucka_runtime.server.api.rendering import ChatPrompt, called, joined, returned, said, template_variables
from tucka_runtime.server.api.tools import CallChoice, Function, Mode, Tools, tools_of
from tucka_runtime.server.service.chat_template import Rendering

ERROR = "Error: "
"""Stands before what a failed call returned: chat templates have no other way to say so."""
_MODES: dict[str, Mode] = {"auto": "auto", "any": "required", "none": "none", "tool": "auto"}


def conversation(body: ConversationBody) -> ChatPrompt:
    """The body's conversation. Where it ends with words of the assistant, the answer goes on with them. Raises
    InvalidRequestError."""
    messages = _messages(body)
    goes_on = messages[-1]["role"] == "assistant"
    if goes_on and "tool_calls" in messages[-1]:
        raise InvalidRequestError(
            "The last message calls tools. Send what they returned, as `tool_result` blocks of a user's message.",
            "messages",
        )
    return ChatPrompt(
        messages,
        _tools(body),
        Rendering(variables=_variables(body), add_generation_prompt=not goes_on, continue_final_message=goes_on),
    )


def _variables(body: ConversationBody) -> dict[str, Any]:
    """Whether to think is `enable_thinking` to Qwen's and GLM's templates, `thinking` to Granite's and DeepSeek's."""
    given = template_variables(body.chat_template_kwargs)
    if body.thinking is None:
        return given
    thinks = body.thinking.type != "disabled"
    return {"enable_thinking": thinks, "thinking": thinks, **given}


def _tools(body: ConversationBody) -> Tools:
    asked = body.tool_choice or ToolChoice(type="auto")
    if (asked.type == "tool") != (asked.name is not None):
        raise InvalidRequestError("A `tool_choice` has a `name` if its `type` is `tool`, and only then.", "tool_choice")
    custom = (tool for tool in body.tools or () if isinstance(tool, CustomTool))
    functions = (Function(tool.name, tool.description, tool.input_schema) for tool in custom)
    return tools_of(functions, CallChoice(_MODES[asked.type], asked.name), not asked.disable_parallel_tool_use)


def _messages(body: ConversationBody) -> list[Message]:
    """At least one message. Turns of one role that follow each other are one, as Anthropic has it: many templates
    refuse such. Raises InvalidRequestError."""
    made: list[Message] = []
    if body.system and (text := joined(body.system)):
        made.append({"role": "system", "content": text})
    names: dict[str, str] = {}
    for turn in body.messages:
        for message in _turn(turn, names):
            if made and made[-1]["role"] == message["role"] in ("user", "assistant"):
                _extend(made[-1], message)
            else:
                made.append(message)
    last = made[-1] if made else {}
    if last.get("role") == "assistant" and not last["content"].strip() and "tool_calls" not in last:
        made.pop()  # Anthropic allows an empty last turn of the assistant: it goes on nothing
    if not made:
        raise InvalidRequestError("The messages have no content. Send some text.", "messages")
    return made


def _extend(message: Message, later: Message) -> None:
    for key in ("content", "reasoning_content"):
        if text := "\n".join(filter(None, (message.get(key), later.get(key)))):
            message[key] = text
    if calls := [*message.get("tool_calls", ()), *later.get("tool_calls", ())]:
        message["tool_calls"] = calls


def _turn(turn: UserTurn | AssistantTurn | SystemTurn, names: dict[str, str]) -> list[Message]:
    """A turn's messages; `names` are the functions of the calls so far by id, and gets those of the turn."""
    if isinstance(turn, SystemTurn):
        return [{"role": "system", "content": joined(turn.content)}]
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    if isinstance(turn, AssistantTurn):
        return [_said(turn.content, names)]
    made: list[Message] = []
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            made.append(_returned(block, names))
        else:
            made.append({"role": "user", "content": block.text})
    return made


def _said(blocks: Sequence[AssistantBlock], names: dict[str, str]) -> Message:
    """The assistant's message."""
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    names.update((call.id, call.name) for call in calls)
    return said(
        joined([block for block in blocks if isinstance(block, TextBlock)]),
        "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)),
        [called(call.name, call.input, call.id) for call in calls],
    )


def _returned(block: ToolResultBlock, names: dict[str, str]) -> Message:
    text = joined(block.content)
    return returned(ERROR + text if block.is_error else text, block.tool_use_id, names.get(block.tool_use_id))
