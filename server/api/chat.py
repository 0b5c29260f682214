"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.answer import OpenAIAnswer
from tucka_runtime.server.api.bodies import ChatBody
from tucka_runtime.server.api.door import Context, Door, Opened
from tucka_runtime.server.api.logprobs import chat_logprobs
from tucka_runtime.server.api.sampling import num_logprobs, num_sequences
from tucka_runtime.server.api.turn import Turn, ask
from tucka_runtime.server.service.events import Message
from tucka_runtime.server.service.generation import ChoiceDelta
from tucka_runtime.server.service.service import Service


async def open_chat(context: Context, body: ChatBody) -> Opened:
    """The assistant's next turn. Raises InvalidRequestError."""
    service = context.service
    options = fields.stream_options(bool(body.stream), body.stream_options)
    max_tokens, param = _max_tokens(body)
    asked = await ask(
        context,
        Turn(
            body=body,
            messages=fields.for_template(body.messages),
            max_tokens=max_tokens,
            n=num_sequences(body, 1, service.config),
            logprobs=_logprobs(body, service),
            schema=fields.response_format(body.response_format),
            max_tokens_param=param,
        ),
    )
    answer = ChatAnswer(body, options, asked.request, context.adapter, service.tokenizer)
    return Opened(asked.request, answer, asked.prompt_for_log, asked.parser)


CHAT = Door("chat", "chatcmpl-", ChatBody, open_chat)


def _logprobs(body: ChatBody, service: Service) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("`top_logprobs` is only allowed with `logprobs: true`.", "top_logprobs")
    if not body.logprobs:
        return None
    return num_logprobs(body.top_logprobs, "top_logprobs", service.config) or 0


def _max_tokens(body: ChatBody) -> tuple[int | None, str]:
    """What is asked, and the field that asks."""
    if body.max_completion_tokens is None:
        return body.max_tokens, "max_tokens"
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequestError("`max_tokens` and `max_completion_tokens` differ. Send one of them.", "max_tokens")
    return body.max_completion_tokens, "max_completion_tokens"


class ChatAnswer(OpenAIAnswer[ChatBody]):
    """An assistant's message, or its pieces."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        message = Message.of(delta.events)
        return self._choice("message", {"role": "assistant", "content": message.content, "refusal": None}, delta)

    def chunks(self, delta: ChoiceDelta) -> Sequence[dict[str, Any]]:
        if not (delta.first or delta.events or delta.tokens or delta.finish_reason):
            return ()
        found = {"content": Message.of(delta.events).content}
        return (self._choice("delta", {"role": "assistant", **found} if delta.first else found, delta),)

    def _choice(self, name: str, message: dict[str, Any], delta: ChoiceDelta) -> dict[str, Any]:
        return {
            "index": delta.index,
            name: message,
            "logprobs": chat_logprobs(self.labels, delta.tokens) if self.body.logprobs else None,
            "finish_reason": delta.finish_reason,
            **self.extras(delta),
        }
