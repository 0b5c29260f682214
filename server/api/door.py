"""The one handler and the one response writer of every route that generates. A door is a parser and a format."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from logging import getLogger
from typing import Any, ClassVar, Generic, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import Request, RouteReport, RouteScope, SamplingParams
from tucka_runtime.server.api import fields
from tucka_runtime.server.api.bodies import GenerationBody, StreamOptions
from tucka_runtime.server.api.logprobs import Labels
from tucka_runtime.server.api.reading import read_body
from tucka_runtime.server.http.answers import JSONAnswer, encode_json
from tucka_runtime.server.http.errors import envelope, internal_error, reason
from tucka_runtime.server.http.stream import EventStream, until_disconnect
from tucka_runtime.server.service.generation import ChoiceDelta, Generation, Usage
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.request_log import Origin
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.text import stopping

log = getLogger(__name__)

Endpoint = Callable[[HTTPRequest], Awaitable[Response]]
B = TypeVar("B", bound=GenerationBody)


class Door(ABC, Generic[B]):
    """One request at a door: its body made into the engine's request, and the engine's deltas into its answer.

    What is here is OpenAI's framing: `data: {...}` per chunk, then `data: [DONE]`; an error ends a stream with a chunk
    `{"error": ...}` and no [DONE].
    """

    operation: ClassVar[str]
    """The GenAI conventions' name."""
    body_type: ClassVar[type[GenerationBody]]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, service: Service, body: B, adapter: LoadedAdapter | None, cache_salt: str):
        self.service, self.body, self.adapter = service, body, adapter
        self.labels = Labels(service.tokenizer, bool(body.return_tokens_as_token_ids))
        self._cache_salt = cache_salt
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"  # of the answer, and of the request in the engine
        self.head = {
            "id": self.id,
            "object": self.chunk_name if body.stream else self.object_name,
            "created": int(time.time()),
            "model": body.model,
        }

    # The parser.

    @abstractmethod
    async def ask(self) -> Request:
        """What the engine is asked. Raises InvalidRequestError."""

    @property
    @abstractmethod
    def prompt_for_log(self) -> Any:
        """The prompt as the request log may show it."""

    def request(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int) -> Request:
        """The engine's request, built once. Raises InvalidRequestError for a route that the adapter does not have."""
        self.asked = Request(
            id=self.id,
            prompts=tuple(map(tuple, prompts)),
            sampling=stopping(sampling, self.service.tokenizer),
            n=n,
            adapter=self.adapter.key if self.adapter else None,
            route_scope=self.service.scope(self.adapter, RouteScope(self.body.route) if self.body.route else None),
            cache_salt=self._cache_salt + (f"\0{self.body.cache_salt}" if self.body.cache_salt else ""),
        )
        return self.asked

    # The format.

    @abstractmethod
    def choice(self, delta: ChoiceDelta, chunk: bool) -> dict[str, Any]:
        """A choice as JSON: of a chunk what is new, else all of it."""

    def chunks(self, delta: ChoiceDelta, usage: Usage, options: StreamOptions) -> Iterator[bytes]:
        """`usage` is what was used so far."""
        chunk = {**self.head, "choices": [self.choice(delta, True)]}
        if options.include_usage:
            chunk["usage"] = usage_json(usage) if options.continuous_usage_stats else None
        yield event(chunk)

    def ending(self, usage: Usage, options: StreamOptions) -> Iterator[bytes]:
        if options.include_usage:
            yield event({**self.head, "choices": [], "usage": usage_json(usage)})
        yield b"data: [DONE]\n\n"

    def failure(self, error: TuckaError) -> bytes:
        """How a stream ends that has begun and cannot go on."""
        return event(envelope(error))

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> dict[str, Any]:
        done = [self.choice(delta, False) for delta in choices]
        return {**self.head, "choices": done, "usage": usage_json(usage)}

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt that the choice of that index answers."""
        return self.asked.prompts[index // self.asked.n]

    def extras(self, delta: ChoiceDelta, chunk: bool) -> dict[str, Any]:
        """What a choice has beside OpenAI's fields."""
        found: dict[str, Any] = {"stop_reason": delta.stop_reason}
        if self.body.return_token_ids:
            found["token_ids"] = [token.id for token in delta.tokens]
            found["prompt_token_ids"] = list(self.prompt_of(delta.index)) if delta.first or not chunk else None
        if self.body.include_route and delta.finish_reason:
            found["route"] = self._route(delta.route)
        return found

    def _route(self, report: RouteReport | None) -> dict[str, Any] | None:
        """The route as JSON; None for the base and for adapters that have no router."""
        adapter = self.adapter
        if adapter is not None and adapter.pinned is not None:
            report = RouteReport(adapter.pinned, 0)
        if adapter is None or report is None:
            return None
        return {
            "adapter": adapter.key.name,
            "digest": adapter.digest,
            "scope": str(self.asked.route_scope),
            "group": report.route.group,
            "weights": list(report.route.weights),
            "changes": report.changes,
        }


def generating(kind: type[Door[Any]]) -> Endpoint:
    """The handler of a door."""

    async def handle(http: HTTPRequest) -> Response:
        service: Service = http.app.state.service
        body = await read_body(http, kind.body_type)
        options = fields.stream_options(bool(body.stream), body.stream_options)
        lease = service.resolve(body.model)
        try:
            door = kind(service, body, lease.adapter, http.state.cache_salt)
            request = await door.ask()
            shown = door.prompt_for_log if service.config.log_prompts else None
            generation = Generation(service, request, lease, Origin.of(http, kind.operation, body.model, shown))
        except BaseException:
            lease.release()
            raise
        if not body.stream:
            return JSONAnswer(await until_disconnect(http.receive, _whole(door, generation)))
        frames = _frames(door, generation, options, http)
        return EventStream(await until_disconnect(http.receive, anext(frames)), frames)

    return handle


async def _whole(door: Door[Any], generation: Generation) -> dict[str, Any]:
    choices: dict[int, ChoiceDelta] = {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.index in choices:
                choices[delta.index].extend(delta)
            else:
                choices[delta.index] = delta
    return door.whole([choices[i] for i in sorted(choices)], generation.usage)


async def _frames(
    door: Door[Any], generation: Generation, options: StreamOptions, http: HTTPRequest
) -> AsyncGenerator[bytes, None]:
    """A failure before the first frame is raised: it still has a status code of its own."""
    begun = False
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                if delta.shows:
                    for frame in door.chunks(delta, generation.usage, options):
                        begun = True
                        yield frame
        for frame in door.ending(generation.usage, options):
            yield frame
    except TuckaError as error:
        if not begun:
            raise
        http.state.error = reason(error)
        yield door.failure(error)
    except Exception as error:  # the headers are out: the client must learn of it here, the log has the rest
        if not begun:
            raise
        http.state.error = reason(error)
        log.exception("request %s failed while streaming", http.state.request_id)
        yield door.failure(internal_error(http.state.request_id))


def event(chunk: dict[str, Any]) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + encode_json(chunk) + b"\n\n"


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
