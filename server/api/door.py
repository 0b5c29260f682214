"""The one handler of every route to the engine. A door is a body, what opens it, and the answer that this makes."""

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Generic, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import Pooling, Request, RouteScope, SamplingParams
from tucka_runtime.names import combined_name
from tucka_runtime.server.api.answer import Answer
from tucka_runtime.server.api.bodies import ModelBody, SamplingBody, weights
from tucka_runtime.server.api.reading import read_body
from tucka_runtime.server.http.access import Access
from tucka_runtime.server.http.answers import JSONAnswer
from tucka_runtime.server.http.errors import internal_error, reason
from tucka_runtime.server.http.limits import UNBOUNDED_ANSWER
from tucka_runtime.server.http.stream import HEARTBEAT, EventStream, until_disconnect, with_silences
from tucka_runtime.server.service.defaults import Defaults
from tucka_runtime.server.service.events import ParserFactory, PlainText
from tucka_runtime.server.service.generation import ChoiceDelta, Generation, Usage
from tucka_runtime.server.service.leases import Served
from tucka_runtime.server.service.request_log import Origin
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.text import stopping

log = getLogger(__name__)

Endpoint = Callable[[HTTPRequest], Awaitable[Response]]
Submit = Callable[[], Awaitable[Generation]]
A = TypeVar("A")
B = TypeVar("B", bound=ModelBody)
S = TypeVar("S", bound=SamplingBody)


@dataclass(frozen=True)
class Context:
    """What a request has beside its body. `id` is the answer's, and the request's in the engine; `request_id` is what
    the client knows the HTTP request by; `tenant` stands for the request's key, or for all of its tenant. `defaults`
    are the adapter's, or the base's."""

    service: Service
    adapter: Served | None
    defaults: Defaults
    tenant: str
    id: str
    request_id: str

    @property
    def vocab_size(self) -> int:
        """How many tokens the adapter has, or the base."""
        return self.service.vocab_size(self.adapter)

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: the first digits of the digest of the adapter that answers, or of the base."""
        digest = self.adapter.digest if self.adapter is not None else self.service.info.fingerprint
        return f"fp_{digest[:12]}"

    def request(
        self,
        body: ModelBody,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        n: int,
        pooling: Pooling | None = None,
    ) -> Request:
        """The engine's request. Raises InvalidRequestError for a route that the adapter does not have."""
        return Request(
            id=self.id,
            prompts=tuple(map(tuple, prompts)),
            sampling=stopping(sampling, self.defaults.tokenizer),
            n=n,
            adapter=self.adapter.key if self.adapter else None,
            route_scope=self.service.scope(self.adapter, RouteScope(body.route) if body.route else None),
            cache_salt=self.tenant + (f"\0{body.cache_salt}" if body.cache_salt else ""),
            pooling=pooling,
            tenant=self.tenant,
            priority=body.priority or 0,
            member=self.adapter.member if self.adapter else None,
        )


@dataclass(frozen=True)
class Opened(Generic[A]):
    """What a door makes of a body: what the engine is asked, how its answer is written and parsed, and the prompt as
    the request log may show it."""

    request: Request
    answer: A
    prompt_for_log: Callable[[], Any]
    parser: ParserFactory = PlainText


@dataclass(frozen=True)
class Door(Generic[B, A]):
    """A route to the engine. `operation` is the GenAI conventions' name; `open` raises InvalidRequestError."""

    operation: str
    id_prefix: str
    body_type: type[B]
    open: Callable[[Context, B], Awaitable[Opened[A]]]


async def begin(door: Door[B, A], http: HTTPRequest) -> tuple[B, A, Submit]:
    """Reads a request; what is returned last submits it to the engine, once its adapter is resident, and has to be
    called. Raises TuckaError, ClientDisconnect; so does that."""
    service: Service = http.app.state.service
    body = await read_body(http, door.body_type)
    access: Access = http.state.access
    weighted = weights(body.adapters)
    lease = await service.resolve(body.model, access, body.user, weighted)
    try:
        answer_id = f"{door.id_prefix}{uuid.uuid4().hex}"
        defaults = await service.defaults(lease.adapter)
        context = Context(service, lease.adapter, defaults, access.tenant, answer_id, http.state.request_id)
        opened = await door.open(context, body)  # meanwhile an adapter that is not resident is on its way
        http.state.admission.reserve(most_tokens(opened.request, service.info.max_model_len))
        shown = opened.prompt_for_log() if service.config.log_prompts else None
        model = lease.adapter.key.name if lease.adapter else service.model_name
        asked = body.model if weighted is None else combined_name(f"{n}*{w:g}" for n, w in weighted)
        origin = Origin.of(http, door.operation, model, asked, shown)
    except BaseException:
        lease.release()
        raise

    async def submit() -> Generation:
        try:
            if lease.waits:
                await lease.ready()
            return Generation(service, opened.request, lease, origin, defaults.tokenizer, opened.parser)
        except BaseException:
            lease.release()
            raise

    return body, opened.answer, submit


def most_tokens(request: Request, context: int) -> int:
    """How many tokens a request may take: its prompts, and of every answer as many as it asked for. An answer that only
    the context ends counts as UNBOUNDED_ANSWER, if that is less."""
    most = request.sampling.max_tokens
    answers = [min(most, UNBOUNDED_ANSWER) if len(prompt) + most >= context else most for prompt in request.prompts]
    return sum(map(len, request.prompts)) + request.n * sum(answers)


def generating(door: Door[S, Answer]) -> Endpoint:
    """The handler of a door whose answers are generated."""

    async def handle(http: HTTPRequest) -> Response:
        body, answer, submit = await begin(door, http)
        if not body.stream:
            choices, usage = await until_disconnect(http.receive, finished(submit))
            return JSONAnswer(answer.whole(choices, usage))
        frames = _frames(answer, submit, http)
        return EventStream(await until_disconnect(http.receive, anext(frames)), frames)

    return handle


async def finished(submit: Submit) -> tuple[list[ChoiceDelta], Usage]:
    """All choices, each with all of its deltas in one."""
    generation = await submit()
    choices: dict[int, ChoiceDelta] = {}
    async with aclosing(generation.steps()) as steps:
        async for deltas in steps:
            for delta in deltas:
                if delta.index in choices:
                    choices[delta.index].extend(delta)
                else:
                    choices[delta.index] = delta
    return [choices[i] for i in sorted(choices)], generation.usage


async def _written(answer: Answer, submit: Submit) -> AsyncGenerator[bytes, None]:
    generation = await submit()
    async with aclosing(generation.steps()) as steps:
        async for deltas in steps:
            if frames := b"".join([answer.frame(delta) for delta in deltas]):
                yield frames
    yield answer.ending(generation.usage)


async def _frames(answer: Answer, submit: Submit, http: HTTPRequest) -> AsyncGenerator[bytes, None]:
    """A failure before the first frame, or the first heartbeat, is raised: it still has a status code of its own."""
    heartbeat = http.app.state.service.config.sse_heartbeat
    begun = False
    try:
        async with (
            aclosing(_written(answer, submit)) as frames,
            aclosing(with_silences(frames, heartbeat) if heartbeat else frames) as heard,
        ):
            async for frame in heard:
                begun = True
                yield HEARTBEAT if frame is None else frame
    except TuckaError as error:
        if not begun:
            raise
        http.state.error = reason(error)
        yield answer.failure(error)
    except Exception as error:  # the headers are out: the client must learn of it here, the log has the rest
        if not begun:
            raise
        http.state.error = reason(error)
        log.exception("request %s failed while streaming", http.state.request_id)
        yield answer.failure(internal_error(http.state.request_id))
