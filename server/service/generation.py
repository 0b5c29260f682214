"""One request in the engine: submitted, its outputs turned into text per choice, aborted when nobody waits any more."""

import asyncio
from array import array
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from tucka_runtime.messages import FinishReason, Request, RouteReport, SequenceOutput, TokenLogprob
from tucka_runtime.server.service.events import CallBegun, Event, ParserFactory, PlainText
from tucka_runtime.server.service.leases import Lease
from tucka_runtime.server.service.request_log import Origin, RequestLog
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.stops import stop_table
from tucka_runtime.server.service.text import SequenceText, TextDelta, Token


@dataclass(slots=True)
class ChoiceDelta:
    """What became final of one choice in one step, or in all of them.

    `first` marks a choice's first; `text` is what the model wrote, `events` what its parser makes of it; `tokens` are
    those whose text is in `text` (or that have none); `prompt_logprobs` come with the first where the prompt is scored.
    `called`: the choice has called a function, in this delta or before. `embedding` comes where the prompt is embedded.
    """

    index: int
    first: bool
    text: str = ""
    events: list[Event] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    route: RouteReport | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    called: bool = False
    embedding: "array[float] | None" = None

    def extend(self, later: "ChoiceDelta") -> None:
        """Takes the same choice's next delta in."""
        self.text += later.text
        self.events += later.events
        self.tokens += later.tokens
        self.finish_reason, self.stop_reason, self.route = later.finish_reason, later.stop_reason, later.route
        self.called = later.called


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that the engine worked on; those of a stop string that was cut are among them."""

    prompt: int
    completion: int
    cached: int


class Generation:
    """Created by submitting. Takes the lease over once it is: `deltas` gives it back. `parser` makes each choice's.

    Raises InvalidRequestError, OverloadedError, EngineDeadError.
    """

    def __init__(
        self, service: Service, request: Request, lease: Lease, origin: Origin, parser: ParserFactory = PlainText
    ):
        self._service = service
        self._request = request
        self._lease = lease
        sampling = request.sampling
        table = stop_table(sampling.stop)
        self._parsers = [parser() for _ in range(request.num_sequences)]
        self._texts = [SequenceText.of(sampling, service.tokenizer, table, parser.marks) for parser in self._parsers]
        self._begun: set[int] = set()
        self._called: set[int] = set()
        self._stream = service.engine.submit(request)
        self._log = RequestLog(request, lease.adapter, origin, service.sinks)

    @property
    def usage(self) -> Usage:
        return Usage(self._log.prompt_tokens, sum(text.generated for text in self._texts), self._log.cached_tokens)

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """Ends when every choice has its finish reason. Raises EngineDeadError or TuckaError when the engine fails.

        Whoever iterates comes back for the next delta when it has sent this one: the metrics' times are those.
        """
        unfinished = len(self._texts)
        try:
            async for output in self._stream:
                text = self._texts[output.index]
                if text.finished:  # by a stop string: what still comes, at last its "abort", is nobody's
                    continue
                if output.finish is not None and output.finish.error is not None:
                    raise output.finish.error
                delta = text.push(output)
                if text.finished and output.finish is None:  # a stop string: the engine does not know of those
                    self._stream.end(output.index)
                self._log.output(output)
                yield self._choice_delta(output, delta)
                self._log.sent(output, self._is_seen(delta))
                if delta.finish_reason is not None:
                    self._log.finished(output, delta.finish_reason)
                unfinished -= text.finished
                if not unfinished:
                    break
        except (asyncio.CancelledError, GeneratorExit):  # the client left
            raise
        except BaseException as error:
            self._log.error = error
            raise
        finally:
            self._stream.abort()
            self._lease.release()
            self._log.close()

    def _choice_delta(self, output: SequenceOutput, delta: TextDelta) -> ChoiceDelta:
        index, parser = output.index, self._parsers[output.index]
        first = index not in self._begun
        self._begun.add(index)
        events = parser.push(delta.text)
        if delta.finish_reason is not None:
            events += parser.finish()
        if index not in self._called and any(isinstance(event, CallBegun) for event in events):
            self._called.add(index)
        return ChoiceDelta(
            index,
            first,
            delta.text,
            events,
            delta.tokens,
            delta.finish_reason,
            delta.stop_reason,
            output.route,
            output.prompt_logprobs,
            index in self._called,
            output.embedding,
        )

    def _is_seen(self, delta: TextDelta) -> bool:
        """Whether a reader sees something new: not so with half a character, or with a token that has no text."""
        return bool(delta.text or delta.finish_reason or (delta.tokens and self._service.tokenizer is None))
