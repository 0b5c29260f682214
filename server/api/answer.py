"""Answers written: what every door's format does with a generation's deltas, and OpenAI's JSON and events."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import Request, Route, RouteReport
from tucka_runtime.server.api.bodies import GenerationBody, StreamOptions
from tucka_runtime.server.api.logprobs import Labels, prompt_logprobs
from tucka_runtime.server.http.answers import encode_json, encode_text
from tucka_runtime.server.http.errors import envelope
from tucka_runtime.server.service.events import Text
from tucka_runtime.server.service.generation import ChoiceDelta, Usage
from tucka_runtime.server.service.leases import Combination, Served
from tucka_runtime.tokenizer import Tokenizer

G = TypeVar("G", bound=GenerationBody)


class Answer(ABC):
    """One request's answer at a door. It is asked for `frame` after `frame` and one `ending`, or once for the
    `whole`."""

    @abstractmethod
    def frame(self, delta: ChoiceDelta) -> bytes:
        """The server-sent events for what is new; empty where there is nothing to tell."""

    @abstractmethod
    def ending(self, usage: Usage) -> bytes:
        """The last events of a stream that was completed."""

    @abstractmethod
    def failure(self, error: TuckaError) -> bytes:
        """How a stream ends that has begun and cannot go on."""

    @abstractmethod
    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        """The answer of all choices, each with all of its deltas in one, as JSON."""


class OpenAIAnswer(Answer, Generic[G]):
    """What completions and chat have in common: `data: {...}` per chunk, then `data: [DONE]`; an error ends a stream
    with a chunk `{"error": ...}` and no [DONE].

    What chunks have in common is encoded once.
    """

    object_name: str
    chunk_name: str

    def __init__(
        self,
        body: G,
        options: StreamOptions,
        request: Request,
        adapter: Served | None,
        tokenizer: Tokenizer | None,
        fingerprint: str,
    ):
        self.body, self.options, self.request, self.adapter = body, options, request, adapter
        self.labels = Labels(tokenizer, bool(body.return_tokens_as_token_ids))
        self.tokenizer = tokenizer
        self.head = {
            "id": request.id,
            "object": self.chunk_name if body.stream else self.object_name,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
        }
        self._before = b"data: " + encode_json(self.head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self._plain = not body.return_token_ids and request.sampling.logprobs is None
        self._prepared: dict[int, tuple[bytes, bytes]] = {}

    @abstractmethod
    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """All of a choice as JSON."""

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> Sequence[dict[str, Any]]:
        """What is new of a choice, as the choices of one chunk each."""

    def frame(self, delta: ChoiceDelta) -> bytes:
        after = self._after
        if self.options.include_usage and self.options.continuous_usage_stats:
            after = b'],"usage":' + encode_json(usage_json(delta.usage)) + b"}\n\n"
        if self._plain and not delta.first and delta.finish_reason is None:
            match delta.events:
                case [Text(text)]:
                    before, behind = self._prepared.get(delta.index) or self._prepare(delta.index)
                    return before + encode_text(text) + behind + after
        return b"".join(self._before + encode_json(choice) + after for choice in self.chunks(delta))

    def _prepare(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text in a chunk that has nothing else, as most do."""
        (choice,) = self.chunks(ChoiceDelta(index, False, self.request.id, [Text(self.request.id)]))
        before, behind = encode_json(choice).split(encode_text(self.request.id))
        self._prepared[index] = self._before + before, behind
        return self._prepared[index]

    def ending(self, usage: Usage) -> bytes:
        last = event({**self.head, "choices": [], "usage": usage_json(usage)}) if self.options.include_usage else b""
        return last + b"data: [DONE]\n\n"

    def failure(self, error: TuckaError) -> bytes:
        return event(envelope(error))

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        return {**self.head, "choices": [self.choice(delta) for delta in choices], "usage": usage_json(usage)}

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt that the choice of that index answers."""
        return self.request.prompts[index // self.request.n]

    def prompt_logprobs(self, delta: ChoiceDelta) -> list[dict[str, dict[str, Any]] | None]:
        """The scores of the choice's prompt; `delta` is all of it."""
        return prompt_logprobs(self.tokenizer, delta.prompt_logprobs or [None] * len(self.prompt_of(delta.index)))

    def extras(self, delta: ChoiceDelta) -> dict[str, Any]:
        """What a choice has beside OpenAI's fields."""
        found: dict[str, Any] = {"stop_reason": delta.stop_reason}
        if self.body.return_token_ids:
            found["token_ids"] = [token.id for token in delta.tokens]
            found["prompt_token_ids"] = list(self.prompt_of(delta.index)) if delta.first else None
        if self.body.include_route and delta.finish_reason:
            found["route"] = route_json(self.request, self.adapter, delta.route)
        return found


def route_json(request: Request, adapter: Served | None, report: RouteReport | None) -> dict[str, Any] | None:
    """The route as JSON, of a combination those of its adapters that have one; None for the base and for adapters that
    have no router."""
    if adapter is not None and adapter.pinned is not None:
        report = RouteReport(adapter.pinned, 0)
    if adapter is None or report is None:
        return None
    head = {"adapter": adapter.key.name, "digest": adapter.digest, "scope": str(request.route_scope)}
    if isinstance(adapter, Combination):
        each = [{"name": one.key.name} | _choice(route) for one, route in adapter.split(report.route)]
        return {**head, "adapters": each, "changes": report.changes}
    return {**head, **_choice(report.route), "changes": report.changes}


def _choice(route: Route) -> dict[str, Any]:
    return {"group": route.group, "weights": list(route.weights)}


def event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + encode_json(chunk) + b"\n\n"


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
