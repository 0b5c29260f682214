"""From a response's items to what chat templates know."""

from typing import Any

from tucka_runtime.conversations import Message, call_arguments
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.rendering import ChatPrompt, called, joined, rendering, returned, said
from tucka_runtime.server.api.response_body import (
    AllowedChoice,
    CallItem,
    CallOutputItem,
    FunctionChoice,
    FunctionTool,
    Item,
    MessageItem,
    ReasoningItem,
    ResponseBody,
)
from tucka_runtime.server.api.tools import CallChoice, Function, Tools, tools_of


def conversation(body: ResponseBody) -> ChatPrompt:
    """The body's conversation. Raises InvalidRequestError."""
    return ChatPrompt(_messages(body), _tools(body), rendering(body), "input")


def function_tools(body: ResponseBody) -> list[FunctionTool]:
    return [tool for tool in body.tools or () if isinstance(tool, FunctionTool)]


def _tools(body: ResponseBody) -> Tools:
    match body.tool_choice:
        case FunctionChoice(name=name):
            choice = CallChoice(named=name)
        case AllowedChoice(mode=mode, tools=tools):
            choice = CallChoice(mode, allowed=frozenset(tool.name for tool in tools))
        case mode:
            choice = CallChoice(mode or "auto")
    return tools_of(map(Function.of, function_tools(body)), choice, body.parallel_tool_calls)


def _messages(body: ResponseBody) -> list[Message]:
    """The instructions and what the items begin with as the system's are one message; what the assistant thinks, says
    and calls in a row is another. Raises InvalidRequestError."""
    items = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    told = [body.instructions] if body.instructions else []
    begin = 0
    for item in items:
        if not isinstance(item, MessageItem) or item.role not in ("system", "developer"):
            break
        told.append(joined(item.content))
        begin += 1
    made: list[Message] = [{"role": "system", "content": "\n\n".join(told)}] if told else []
    turn = _AssistantTurn()
    for item in items[begin:]:
        if turn.takes(item):
            continue
        made += turn.message()
        turn = _AssistantTurn()
        if isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            made.append({"role": role, "content": joined(item.content)})
        elif isinstance(item, CallOutputItem):
            made.append(returned(joined(item.output), item.call_id))
    made += turn.message()
    if not made:
        raise InvalidRequestError("`input` has nothing that the model could read. Send some text.", "input")
    return made


class _AssistantTurn:
    """Items of the assistant that follow each other."""

    def __init__(self) -> None:
        self._thoughts: list[str] = []
        self._said: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def takes(self, item: Item) -> bool:
        """Takes the item in, if it is the assistant's."""
        match item:
            case ReasoningItem():
                self._thoughts += [part.text for part in item.content or item.summary or ()]
            case MessageItem(role="assistant"):
                self._said.append(joined(item.content))
            case CallItem():
                self._calls.append(called(item.name, call_arguments(item.arguments), item.call_id))
            case _:
                return False
        return True

    def message(self) -> list[Message]:
        """The one message of them; none where there is nothing to read."""
        if not (self._thoughts or self._said or self._calls):
            return []
        return [said("\n".join(self._said), "\n".join(self._thoughts), self._calls)]
