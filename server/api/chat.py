"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import ChatBody, parse, route_scope
from tucka_runtime.server.api.logprobs import Labels, chat_logprobs
from tucka_runtime.server.api.sampling import max_tokens_for, num_logprobs, num_sequences, sampling_params
from tucka_runtime.server.http.body import read_json
from tucka_runtime.server.http.errors import JSON
from tucka_runtime.server.http.stream import EventStream, until_disconnect
from tucka_runtime.server.service.generation import Ask, Generation, Step
from tucka_runtime.server.service.request_log import Origin
from tucka_runtime.server.service.service import Service


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = parse(ChatBody, await read_json(request, service.config.max_body_bytes))
    service.find(body.model)
    messages = fields.messages(body.messages)
    n = num_sequences(body, 1, service.config)
    usage_wanted = fields.include_usage(bool(body.stream), body.stream_options)
    stops = fields.stops(body.stop)
    logprobs = _logprobs(body, service)
    prompt = await service.render_chat([message.for_template() for message in messages])
    (ids,) = await service.encode([prompt], body.add_special_tokens is True, "messages")
    if not ids:
        raise InvalidRequestError("The messages have no tokens once rendered. Send some text.", "messages")
    ask = Ask(
        model=body.model,
        prompts=(tuple(ids),),
        sampling=sampling_params(body, service.info, _max_tokens(body, len(ids), service), logprobs),
        n=n,
        scope=route_scope(body.route),
        stops=stops,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        cache_salt=request.state.cache_salt,
    )
    origin = Origin.of(request, "chat", prompt if service.config.log_prompts else None)
    answer = _Answer(service, body, Generation(service, ask, request.state.received, origin))
    if not body.stream:
        return JSON(await until_disconnect(request.receive, answer.whole()))
    chunks = answer.chunks(usage_wanted)
    return EventStream(await until_disconnect(request.receive, anext(chunks)), chunks)


def _logprobs(body: ChatBody, service: Service) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("`top_logprobs` is only allowed with `logprobs: true`.", "top_logprobs")
    return (num_logprobs(body.top_logprobs, "top_logprobs", service.config) or 0) if body.logprobs else None


def _max_tokens(body: ChatBody, prompt_tokens: int, service: Service) -> int:
    asked, param = body.max_tokens, "max_tokens"
    if body.max_completion_tokens is not None:
        if asked not in (None, body.max_completion_tokens):
            raise InvalidRequestError("`max_tokens` and `max_completion_tokens` differ. Send one of them.", param)
        asked, param = body.max_completion_tokens, "max_completion_tokens"
    return max_tokens_for(asked, None, prompt_tokens, service.info, param, prompt_param="messages")


class _Answer:
    """Formats one generation as messages."""

    def __init__(self, service: Service, body: ChatBody, generation: Generation):
        self._body = body
        self._generation = generation
        self._labels = Labels(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._begun: set[int] = set()
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        usage = {"usage": None} if include_usage else {}
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                delta = step.delta
                first = step.index not in self._begun
                self._begun.add(step.index)
                if not (first or delta.text or delta.tokens or delta.finish_reason):
                    continue
                message = {"role": "assistant", "content": delta.text} if first else {"content": delta.text}
                choice = {"index": step.index, "delta": message, **self._rest(step)}
                if self._body.return_token_ids:
                    choice["token_ids"] = [token.id for token in delta.tokens]
                    choice["prompt_token_ids"] = self._prompt_ids() if first else None
                yield {**self._head, "choices": [choice], **usage}
        if include_usage:
            yield {**self._head, "choices": [], "usage": self._generation.usage()}

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        ids: dict[int, list[int]] = {}
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                rest = self._rest(step)
                choice = choices.setdefault(
                    step.index,
                    {"index": step.index, "message": {"role": "assistant", "content": "", "refusal": None}, **rest},
                )
                choice["message"]["content"] += step.delta.text
                if step.index not in ids:
                    ids[step.index] = []
                elif rest["logprobs"] is not None:
                    choice["logprobs"]["content"] += rest["logprobs"]["content"]
                ids[step.index] += [token.id for token in step.delta.tokens]
                choice |= {name: value for name, value in rest.items() if name != "logprobs"}
        if self._body.return_token_ids:
            for index, choice in choices.items():
                choice |= {"token_ids": ids[index], "prompt_token_ids": self._prompt_ids()}
        return {**self._head, "choices": [choices[i] for i in sorted(choices)], "usage": self._generation.usage()}

    def _rest(self, step: Step) -> dict[str, Any]:
        """What a choice has beside its text."""
        rest = {
            "logprobs": chat_logprobs(self._labels, step.delta.tokens) if self._body.logprobs else None,
            "finish_reason": step.delta.finish_reason,
            "stop_reason": step.delta.stop_reason,
        }
        if self._body.include_route and step.delta.finish_reason:
            rest["route"] = self._generation.route(step.output.route)
        return rest

    def _prompt_ids(self) -> list[int]:
        return list(self._generation.ask.prompts[0])
