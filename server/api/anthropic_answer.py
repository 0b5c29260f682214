"""A message in Anthropic's shape, whole or as the events of a stream."""

import json
from collections.abc import Sequence
from typing import Any

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import FinishReason, Request
from tucka_runtime.server.api.answer import Answer, route_json
from tucka_runtime.server.api.anthropic_bodies import MessagesBody
from tucka_runtime.server.api.door import Context
from tucka_runtime.server.http.answers import encode_json
from tucka_runtime.server.http.errors import anthropic_envelope
from tucka_runtime.server.service.events import (
    CallArguments,
    CallBegun,
    CallEnded,
    Event,
    Reasoning,
    ReasoningEnded,
    Text,
)
from tucka_runtime.server.service.generation import ChoiceDelta, Usage

_CONTEXT = "model_context_window_exceeded"  # the context had no room for all of `max_tokens`


class MessageAnswer(Answer):
    """Blocks of text, thoughts and calls, in the order in which the model wrote them. In a stream `_index` counts the
    blocks begun, and `_open` is the type of the one that is not closed yet."""

    def __init__(self, body: MessagesBody, context: Context, request: Request):
        self._body, self._context, self._request = body, context, request
        self._shows_thoughts = body.thinking is None or (
            body.thinking.type != "disabled" and body.thinking.display != "omitted"
        )
        self._index = -1
        self._open: str | None = None
        self._last = ChoiceDelta(0, False)

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        (choice,) = choices
        blocks: list[dict[str, Any]] = []
        arguments: dict[int, str] = {}
        for event in choice.events:
            match event:
                case Text() | Reasoning() if self._is_shown(event):
                    block = _block(event)
                    if not blocks or blocks[-1]["type"] != block["type"]:
                        blocks.append(block)
                    blocks[-1][block["type"]] += event.text
                case CallBegun():
                    blocks.append(_block(event))
                    arguments[len(blocks) - 1] = ""
                case CallArguments():
                    arguments[len(blocks) - 1] += event.text
        for place, text in arguments.items():
            blocks[place]["input"] = _input(text)
        return self._message(blocks, usage) | self._end(choice) | self._route(choice)

    def frame(self, delta: ChoiceDelta) -> bytes:
        made = []
        if delta.first:
            start = self._message([], delta.usage) | {"stop_reason": None, "stop_sequence": None}
            made = [_event("message_start", message=start), _event("ping")]
        for event in delta.events:
            if self._is_shown(event):
                made += self._written(event)
        if delta.finish_reason is not None:
            self._last = delta
            made += self._closed()
        return b"".join(made)

    def ending(self, usage: Usage) -> bytes:
        end = _event("message_delta", delta=self._end(self._last), usage=_usage(usage), **self._route(self._last))
        return end + _event("message_stop")

    def failure(self, error: TuckaError) -> bytes:
        return _event(**anthropic_envelope(error, self._context.request_id))

    def _written(self, event: Event) -> list[bytes]:
        """The stream's events of one of the model's."""
        match event:
            case Text() | Reasoning():
                block = _block(event)
                kind = block["type"]
                begun = [] if self._open == kind else self._begun(block)
                return [*begun, self._delta({"type": f"{kind}_delta", kind: event.text})]
            case CallBegun():
                return self._begun(_block(event))
            case CallArguments():
                return [self._delta({"type": "input_json_delta", "partial_json": event.text})]
            case ReasoningEnded():
                return self._closed() if self._open == "thinking" else []
            case CallEnded():
                return self._closed()

    def _begun(self, block: dict[str, Any]) -> list[bytes]:
        closed = self._closed()
        self._index += 1
        self._open = block["type"]
        return [*closed, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _closed(self) -> list[bytes]:
        """The end of the block that is open. Thoughts are signed there: clients wait for it."""
        if self._open is None:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": ""})] if self._open == "thinking" else []
        self._open = None
        return [*signed, _event("content_block_stop", index=self._index)]

    def _is_shown(self, event: Event) -> bool:
        return self._shows_thoughts or not isinstance(event, Reasoning)

    def _message(self, content: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._context.id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": content,
            "usage": _usage(usage),
        }

    def _end(self, choice: ChoiceDelta) -> dict[str, Any]:
        stop = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        if choice.finish_reason == FinishReason.LENGTH:
            reason = "max_tokens" if self._request.sampling.max_tokens >= self._body.max_tokens else _CONTEXT
        elif stop is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if choice.called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _route(self, choice: ChoiceDelta) -> dict[str, Any]:
        if not self._body.include_route:
            return {}
        return {"route": route_json(self._request, self._context.adapter, choice.route)}


def _block(event: Text | Reasoning | CallBegun) -> dict[str, Any]:
    """The block that an event begins, still empty. Text and thoughts lie under the name of their type."""
    match event:
        case Text():
            return {"type": "text", "text": ""}
        case Reasoning():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case CallBegun():
            return {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments. What the model wrote that is no JSON object, or none that an answer can hold, comes as
    Anthropic's documentation has such."""
    try:
        value = json.loads(arguments)
        encode_json(value)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was kept of a prompt apart from the rest of it."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


def _event(type: str, **fields: Any) -> bytes:
    return b"event: " + type.encode() + b"\ndata: " + encode_json({"type": type, **fields}) + b"\n\n"
