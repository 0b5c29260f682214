"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import TokenLogprob
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import CompletionBody, parse, route_scope
from tucka_runtime.server.api.logprobs import Labels, completion_logprobs
from tucka_runtime.server.api.sampling import max_tokens_for, num_logprobs, num_sequences, sampling_params
from tucka_runtime.server.http.body import read_json
from tucka_runtime.server.http.errors import JSON
from tucka_runtime.server.http.stream import EventStream, until_disconnect
from tucka_runtime.server.service.generation import Ask, Generation, Step
from tucka_runtime.server.service.request_log import Origin
from tucka_runtime.server.service.service import Service

DEFAULT_MAX_TOKENS = 16


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = parse(CompletionBody, await read_json(request, service.config.max_body_bytes))
    service.find(body.model)
    prompts = fields.prompts(body.prompt, service.info.vocab_size, service.config.max_n)
    n = num_sequences(body, len(prompts), service.config)
    usage_wanted = fields.include_usage(bool(body.stream), body.stream_options)
    stops = fields.stops(body.stop)
    if stops:
        service.text_tokenizer("stop")
    logprobs = num_logprobs(body.logprobs, "logprobs", service.config)
    texts, ids = await _tokenized(service, prompts, body.add_special_tokens is not False)
    ask = Ask(
        model=body.model,
        prompts=tuple(map(tuple, ids)),
        sampling=sampling_params(
            body,
            service.info,
            max_tokens_for(body.max_tokens, DEFAULT_MAX_TOKENS, max(map(len, ids)), service.info),
            logprobs,
            logprobs if body.echo else None,
        ),
        n=n,
        scope=route_scope(body.route),
        stops=stops,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        cache_salt=request.state.cache_salt,
    )
    if ask.sampling.json_schema is not None:
        service.text_tokenizer("response_format")
    origin = Origin.of(request, "text_completion", body.prompt if service.config.log_prompts else None)
    answer = _Answer(service, body, Generation(service, ask, request.state.received, origin), texts)
    if not body.stream:
        return JSON(await until_disconnect(request.receive, answer.whole()))
    chunks = answer.chunks(usage_wanted)
    return EventStream(await until_disconnect(request.receive, anext(chunks)), chunks)


async def _tokenized(
    service: Service, prompts: list[str] | list[list[int]], add_special_tokens: bool
) -> tuple[list[str | None], list[list[int]]]:
    """The prompts' own texts (None for those given as ids) and their token ids."""
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    if texts[0] is None:
        return texts, [prompt for prompt in prompts if not isinstance(prompt, str)]
    ids = await service.encode([text for text in texts if text is not None], add_special_tokens, "prompt")
    if not all(ids):
        raise InvalidRequestError("A prompt has no tokens. Send text that the tokenizer knows.", "prompt")
    return texts, ids


class _Answer:
    """Formats one generation. With `echo` each choice begins with its prompt, scored if `logprobs` are asked."""

    def __init__(self, service: Service, body: CompletionBody, generation: Generation, texts: list[str | None]):
        self._service = service
        self._body = body
        self._generation = generation
        self._labels = Labels(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._prompt_texts = [self._prompt_text(i, text) for i, text in enumerate(texts)] if body.echo else []
        self._begun: set[int] = set()
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def chunks(self, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        usage = {"usage": None} if include_usage else {}
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                choice = self._choice(step)
                if choice is not None:
                    yield {**self._head, "choices": [choice], **usage}
        if include_usage:
            yield {**self._head, "choices": [], "usage": self._generation.usage()}

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async with aclosing(self._generation.steps()) as steps:
            async for step in steps:
                part = self._choice(step)
                if part is None:
                    continue
                if step.index in choices:
                    _extend(choices[step.index], part)
                else:
                    choices[step.index] = part
        return {**self._head, "choices": [choices[i] for i in sorted(choices)], "usage": self._generation.usage()}

    def _choice(self, step: Step) -> dict[str, Any] | None:
        """The choice as far as this step brought it; None if nothing became final."""
        delta = step.delta
        first = step.index not in self._begun
        if not (delta.text or delta.tokens or delta.finish_reason or first):
            return None
        self._begun.add(step.index)
        prompt = self._generation.ask.prompts[step.index // self._generation.ask.n]
        echoed = self._prompt_texts[step.index // self._generation.ask.n] if self._body.echo else ""
        choice: dict[str, Any] = {
            "index": step.index,
            "text": echoed + delta.text if first else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.logprobs is not None:
            entries = [(token.id, len(echoed) + token.start, token.logprob) for token in delta.tokens]
            if first and self._body.echo:
                entries = self._prompt_entries(prompt, echoed, step.output.prompt_logprobs) + entries
            choice["logprobs"] = completion_logprobs(self._labels, entries)
        if self._body.return_token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
            choice["prompt_token_ids"] = list(prompt) if first else None
        if self._body.include_route and delta.finish_reason:
            choice["route"] = self._generation.route(step.output.route)
        return choice

    def _prompt_entries(
        self, prompt: tuple[int, ...], text: str, logprobs: list[TokenLogprob | None] | None
    ) -> list[tuple[int, int, TokenLogprob | None]]:
        sizes = [len((self._labels.raw(token_id) or b"").decode(errors="ignore")) for token_id in prompt]
        # The tokens may spell more than the text (a start token, a first space): offsets count from its end.
        offset = len(text) - sum(sizes)
        entries = []
        for token_id, size, logprob in zip(prompt, sizes, logprobs or [None] * len(prompt), strict=True):
            entries.append((token_id, max(offset, 0), logprob))
            offset += size
        return entries

    def _prompt_text(self, index: int, text: str | None) -> str:
        if text is not None:
            return text
        if self._service.tokenizer is None:
            return ""
        return self._service.tokenizer.decode(
            list(self._generation.ask.prompts[index]), self._generation.ask.skip_special_tokens
        )


def _extend(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Appends a later part of the same choice."""
    choice["text"] += part["text"]
    if part["logprobs"] is not None:
        for name, values in part["logprobs"].items():
            choice["logprobs"][name] += values
    if "token_ids" in part:
        choice["token_ids"] += part["token_ids"]
    for name in ("finish_reason", "stop_reason", "route"):
        if name in part:
            choice[name] = part[name]
