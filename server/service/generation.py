"""One request in the engine: submitted, its outputs turned into text per choice, aborted when nobody waits any more."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from tucka_runtime.errors import EngineDeadError, InvalidRequestError
from tucka_runtime.messages import FinishReason, Request, RouteReport, RouteScope, SamplingParams, SequenceOutput
from tucka_runtime.server.service.request_log import Origin, RequestRecord, SequenceRecord
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.stops import stop_table
from tucka_runtime.server.service.text import Delta, SequenceText
from tucka_runtime.tokenizer import Detokenizer


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

    def __init__(self, service: Service, ask: Ask, received: float, origin: Origin):
        self.ask = ask
        self._service = service
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
        engine = service.engine.config
        if request.num_sequences > engine.max_num_seqs + engine.max_queue:
            raise InvalidRequestError(
                f"The request asks for {request.num_sequences} answers (prompts x n); this server takes at most "
                f"{engine.max_num_seqs + engine.max_queue} at once (--max-num-seqs plus --max-queue). Ask for fewer.",
                "n",
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
        self._stream = service.engine.submit(request)
        self._record = RequestRecord(
            service.metrics,
            service.traces,
            origin,
            ask.model,
            self.adapter,
            self.scope,
            ask.sampling,
            self.prompt_tokens,
            received,
            [SequenceRecord() for _ in self._texts],
            ask.n,
        )

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
            "prompt_tokens_details": {"cached_tokens": self._record.cached_tokens},
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
        """Ends when every choice has its finish reason. Raises EngineDeadError or TuckaError when the engine fails.

        Whoever iterates comes back for the next step when it has sent this one: the metrics' times are those.
        """
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
                if text.finished and output.finish_reason is None:  # a stop string: the engine does not know of those
                    self._stream.end(output.index)
                self._record.output(output)
                yield Step(output.index, delta, output)
                self._record.sent(output, self._shows(delta))
                if delta.finish_reason is not None:
                    self._record.finished(output, delta.finish_reason)
                unfinished -= text.finished
                if not unfinished:
                    break
        except (asyncio.CancelledError, GeneratorExit):  # the client left
            raise
        except BaseException as error:
            self._record.error = error
            raise
        finally:
            self._stream.abort()
            if self.adapter:
                self._service.adapters.release(self.adapter.key)
            self._record.close()

    def _shows(self, delta: Delta) -> bool:
        """Whether a reader sees something new: not so with half a character, or with a token that has no text."""
        return bool(delta.text or delta.finish_reason or (delta.tokens and self._service.tokenizer is None))


def _raise_failure(output: SequenceOutput) -> None:
    if output.finish_reason is FinishReason.ABORT:
        raise EngineDeadError("The request was ended by the server before it was finished. Try again.")
    if output.finish_reason is FinishReason.ERROR:
        raise InvalidRequestError(
            "The JSON schema takes too much to follow. Simplify its patterns and alternatives.", "response_format"
        )
