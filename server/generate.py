"""One request in the engine: submitted, its outputs turned into text per choice, aborted when nobody waits any more."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from tucka_runtime.errors import EngineDeadError, InvalidRequestError, TuckaError
from tucka_runtime.sequence import FinishReason, Request, RouteReport, RouteScope, SamplingParams, SequenceOutput
from tucka_runtime.server.service import Service
from tucka_runtime.server.stops import stop_table
from tucka_runtime.server.text import Delta, SequenceText
from tucka_runtime.tokenizer import Detokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """A request whose fields are all checked; only the adapter's name is still to be resolved."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: SamplingParams
    n: int
    scope: RouteScope | None
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    cache_salt: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine step brought for the choice `index`."""

    index: int
    delta: Delta
    output: SequenceOutput


class Generation:
    """Created by submitting: resolving the name and handing the request to the engine is one uninterrupted act.

    Raises ModelNotFoundError, InvalidRequestError, OverloadedError, EngineDeadError.
    """

    def __init__(self, service: Service, ask: Ask, started: float):
        self.ask = ask
        self._service = service
        self._started = started
        self.adapter = service.find(ask.model)
        own = self.adapter.info.scope if self.adapter else None
        if own == RouteScope.PINNED and ask.scope is not None:
            raise InvalidRequestError("This adapter was loaded with a pinned route. Leave `route` out.", "route")
        self.scope = RouteScope(ask.scope or own or service.config.route)
        request = Request(
            id=uuid.uuid4().hex,
            prompts=ask.prompts,
            sampling=ask.sampling,
            n=ask.n,
            adapter=self.adapter.key if self.adapter else None,
            route_scope=self.scope,
            cache_salt=ask.cache_salt,
        )
        table = stop_table(ask.stops)
        self._texts = [
            SequenceText(
                Detokenizer(service.tokenizer, ask.skip_special_tokens) if service.tokenizer else None,
                table,
                ask.sampling.stop_token_ids,
                ask.include_stop,
                ask.sampling.min_tokens,
            )
            for _ in range(request.num_sequences)
        ]
        self._last_token = [0.0] * request.num_sequences
        self._cached_tokens = [0] * request.num_sequences
        self._stream = service.engine.submit(request)
        service.metrics.prompt_tokens.inc(self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.ask.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(text.generated for text in self._texts)

    def usage(self) -> dict[str, Any]:
        """Tokens the engine worked on; those of a stop string that was cut are among them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens[:: self.ask.n])},
        }

    def route(self, report: RouteReport | None) -> dict[str, Any] | None:
        """`choice.route`: None for the base and for adapters that have no router."""
        if self.adapter is not None and self.adapter.pinned is not None:
            report = RouteReport(self.adapter.pinned, 0)
        if self.adapter is None or report is None:
            return None
        return {
            "adapter": self.adapter.key.name,
            "digest": self.adapter.digest,
            "scope": str(self.scope),
            "group": report.route.group,
            "weights": list(report.route.weights),
            "changes": report.changes,
        }

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Ends when every choice has its finish reason. Raises EngineDeadError or TuckaError when the engine fails."""
        unfinished = len(self._texts)
        if self.adapter:
            self._service.adapters.lease(self.adapter.key)
        try:
            async for output in self._stream:
                text = self._texts[output.index]
                if text.finished:
                    continue
                _raise_failure(output)
                delta = text.push(output)
                self._measure(output)
                yield Step(output.index, delta, output)
                if text.finished:
                    unfinished -= 1
                    self._service.metrics.requests.labels(str(delta.finish_reason)).inc()
                if not unfinished:
                    break
        finally:
            self._stream.abort()
            if self.adapter:
                self._service.adapters.release(self.adapter.key)
            self._close(unfinished)

    def _measure(self, output: SequenceOutput) -> None:
        metrics = self._service.metrics
        now = time.monotonic()
        before = self._last_token[output.index]
        self._last_token[output.index] = now
        if not before:
            metrics.first_token.observe(now - self._started)
            metrics.cached_tokens.inc(output.cached_tokens)
            self._cached_tokens[output.index] = output.cached_tokens
        elif output.token_ids:
            metrics.inter_token.observe((now - before) / len(output.token_ids))
        metrics.generation_tokens.inc(len(output.token_ids))

    def _close(self, unfinished: int) -> None:
        metrics = self._service.metrics
        if unfinished:
            metrics.requests.labels(str(FinishReason.ABORT)).inc(unfinished)
        metrics.latency.observe(time.monotonic() - self._started)
        metrics.count_model(self.adapter.key.name if self.adapter else None, self.completion_tokens)


def _raise_failure(output: SequenceOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        log.error("the engine failed on request %s: %s", output.request_id, output.error)
        raise TuckaError("The engine failed on this request. The server's log says why.")
    if output.finish_reason is FinishReason.ABORT:
        raise EngineDeadError("The request was ended by the server before it was finished. Try again.")
