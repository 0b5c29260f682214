"""POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Any

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import FinishReason
from tucka_runtime.server.api import fields, structured
from tucka_runtime.server.api.answer import Answer, OpenAIAnswer
from tucka_runtime.server.api.bodies import ChatBody
from tucka_runtime.server.api.conversation import NamedFunction
from tucka_runtime.server.api.door import Context, Door, Opened
from tucka_runtime.server.api.logprobs import chat_logprobs
from tucka_runtime.server.api.rendering import ChatPrompt, for_template, rendering
from tucka_runtime.server.api.sampling import num_logprobs, num_prompt_logprobs, num_sequences
from tucka_runtime.server.api.tools import CallChoice, Function, Tools, chat_tools, tools_of
from tucka_runtime.server.api.turn import ChatTurn, ask
from tucka_runtime.server.service.events import CallArguments, CallBegun, Event, Message, Reasoning, Text
from tucka_runtime.server.service.generation import ChoiceDelta, Usage
from tucka_runtime.server.service.service import Service


async def open_chat(context: Context, body: ChatBody) -> Opened[Answer]:
    """The assistant's next turn. Raises InvalidRequestError."""
    service = context.service
    options = fields.stream_options(bool(body.stream), body.stream_options)
    max_tokens, param = _max_tokens(body)
    schema = structured.schema_of(body.response_format)
    asked = await ask(
        context,
        ChatTurn(
            body=body,
            conversation=conversation(body),
            max_tokens=max_tokens,
            n=num_sequences(body, 1, service.config),
            logprobs=_logprobs(body, service),
            prompt_logprobs=num_prompt_logprobs(body, context),
            grammar=await structured.grammar(body, "response_format", schema, service),
            thoughts=body.separate_reasoning is not False,
            truncation=fields.truncation(body, 1 if max_tokens is None else max_tokens, service.info),
            max_tokens_param=param,
        ),
    )
    tokenizer = context.defaults.tokenizer
    answer = ChatAnswer(body, options, asked.request, context.adapter, tokenizer, context.fingerprint)
    return Opened(asked.request, answer, asked.prompt_for_log, asked.parser)


CHAT = Door("chat", "chatcmpl-", ChatBody, open_chat)


def conversation(body: ChatBody) -> ChatPrompt:
    """The body's conversation. Raises InvalidRequestError."""
    return ChatPrompt(for_template(body.messages), _tools(body), rendering(body))


def _tools(body: ChatBody) -> Tools:
    if not body.functions and not isinstance(body.function_call, NamedFunction):
        return chat_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    if body.tools:
        raise InvalidRequestError("`functions` are the older form of `tools`. Send one of them.", "functions")
    named = body.function_call.name if isinstance(body.function_call, NamedFunction) else None
    choice = CallChoice("none" if body.function_call == "none" else "auto", named, param="function_call")
    return tools_of(map(Function.of, body.functions or ()), choice, parallel=False, param="functions")


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

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        found = super().whole(choices, usage)
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = self.prompt_logprobs(choices[0])
        return found

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        said = Message.of(delta.events)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        message |= self._thought(said.reasoning)
        if said.calls:
            message["content"] = said.content or None
            functions = [{"name": call.name, "arguments": call.arguments} for call in said.calls]
            if self.body.functions:
                message["function_call"] = functions[0]
            else:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": function}
                    for call, function in zip(said.calls, functions, strict=True)
                ]
        return self._choice("message", message, delta)

    def chunks(self, delta: ChoiceDelta) -> Sequence[dict[str, Any]]:
        """One chunk for what is new; several where what is said, thought and called must keep its order."""
        if not (delta.first or delta.events or delta.finish_reason or delta.tokens):
            return ()
        said = self._deltas(delta.events) or [{} if delta.called else {"content": ""}]
        if delta.first:
            said[0] = {"role": "assistant", "content": "", **said[0]}
        made = [{"index": delta.index, "delta": each, "logprobs": None, "finish_reason": None} for each in said[:-1]]
        return [*made, self._choice("delta", said[-1], delta)]

    def _deltas(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """OpenAI's deltas of events, each new kind of piece in one of its own."""
        made: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Text():
                    made.append({"content": event.text})
                case Reasoning() if self._shows_thoughts:
                    made.append(self._thought(event.text))
                case CallBegun():
                    function = {"name": event.name, "arguments": ""}
                    made += self._call(event.index, {"id": event.id, "type": "function"}, function)
                case CallArguments():
                    made += self._call(event.index, {}, {"arguments": event.text})
        return made

    def _call(self, index: int, head: dict[str, str], function: dict[str, str]) -> list[dict[str, Any]]:
        """A piece of a call. Functions in the older form have one call an answer."""
        if self.body.functions:
            return [] if index else [{"function_call": function}]
        return [{"tool_calls": [{"index": index, **head, "function": function}]}]

    def _thought(self, reasoning: str) -> dict[str, str]:
        """Under both names that clients look for; nothing where there was no thought."""
        return {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning and self._shows_thoughts else {}

    @property
    def _called(self) -> str:
        return "function_call" if self.body.functions else "tool_calls"

    @property
    def _shows_thoughts(self) -> bool:
        return self.body.include_reasoning is not False

    def _choice(self, name: str, message: dict[str, Any], delta: ChoiceDelta) -> dict[str, Any]:
        called = delta.called and delta.finish_reason == FinishReason.STOP
        return {
            "index": delta.index,
            name: message,
            "logprobs": chat_logprobs(self.labels, delta.tokens) if self.body.logprobs else None,
            "finish_reason": self._called if called else delta.finish_reason,
            **self.extras(delta),
        }
