"""One request in the engine: submitted, its outputs turned into text per choice, aborted when nobody waits any more."""

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tucka_runtime.errors import TuckaError
from tucka_runtime.messages import FinishReason, Request, RouteReport, SequenceOutput, TokenLogprob
from tucka_runtime.server.service.events import CallBegun, Event, ParserFactory, PlainText, Reasoning, ReasoningEnded
from tucka_runtime.server.service.leases import Lease
from tucka_runtime.server.service.request_log import Origin, RequestLog
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.stops import stop_table
from tucka_runtime.server.service.text import SequenceText, Token
from tucka_runtime.tokenizer import Tokenizer


class Usage(NamedTuple):
    """Tokens that the engine worked on so far; those of a stop string that was cut are among them. `reasoning` are
    those of the completion up to the end of its thought."""

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


NOTHING_USED = Usage(0)


@dataclass(slots=True)
class ChoiceDelta:
    """What became final of one choice in one step, or in all of them.

    `first` marks a choice's first; `text` is what the model wrote, `events` what its parser makes of it; `tokens` are
    those whose text is in `text` (or that have none); `prompt_logprobs` come with the first where the prompt is scored.
    `called`: the choice has called a function, in this delta or before. `embedding` comes where the prompt is embedded.
    `usage` is the request's up to here: the reader may get several steps' deltas at once.
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
    usage: Usage = NOTHING_USED

    def extend(self, later: "ChoiceDelta") -> None:
        """Takes the same choice's next delta in."""
        self.text += later.text
        self.events += later.events
        self.tokens += later.tokens
        self.finish_reason, self.stop_reason, self.route = later.finish_reason, later.stop_reason, later.route
        self.called, self.usage = later.called, later.usage


class Taken(NamedTuple):
    """An output whose delta the reader has got: whether a client sees something new in it, and how its choice ended."""

    output: SequenceOutput
    shown: bool
    ends: FinishReason | None


class Generation:
    """Created by submitting. Takes the lease over once it is: `steps` gives it back. `tokenizer` is the adapter's, or
    the base's; `parser` makes each choice's.

    Raises InvalidRequestError, OverloadedError, EngineDeadError.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        lease: Lease,
        origin: Origin,
        tokenizer: Tokenizer | None,
        parser: ParserFactory = PlainText,
    ):
        self._tokenizer = tokenizer
        self._request = request
        self._lease = lease
        sampling = request.sampling
        table = stop_table(sampling.stop)
        self._parsers = [parser() for _ in range(request.num_sequences)]
        self._texts = [SequenceText.of(sampling, tokenizer, table, parser.marks) for parser in self._parsers]
        self._begun: set[int] = set()
        self._called: set[int] = set()
        self._thought: dict[int, int] = {}  # tokens of a choice's thought, by its index
        self._stream = service.engine.submit(request)
        self._log = RequestLog(request, lease.adapter, origin, service.sinks)
        self.usage = Usage(self._log.prompt_tokens)

    async def steps(self) -> AsyncGenerator[list[ChoiceDelta], None]:
        """The deltas of one step at a time, or of several that came while the reader was busy. Ends when every choice
        has its finish reason. Raises EngineDeadError or TuckaError when the engine fails.

        Whoever iterates comes back for the next ones when it has sent these: the metrics' times are those.
        """
        unfinished = len(self._texts)
        error: TuckaError | None = None
        try:
            async for outputs in self._stream:
                deltas: list[ChoiceDelta] = []
                taken: list[Taken] = []
                for output in outputs:
                    if output.finish is not None and (error := output.finish.error) is not None:
                        break
                    if not self._texts[output.index].finished:
                        delta = self._take(output)
                        deltas.append(delta)
                        taken.append(Taken(output, self._shows(delta), delta.finish_reason))
                    # Else it ended with a stop string: what still comes, at last its "abort", is nobody's.
                if taken:
                    yield deltas  # the reader's from now on: it may join them
                    self._sent(taken)
                if error is not None:
                    raise error
                unfinished -= sum(each.ends is not None for each in taken)
                if not unfinished:
                    break
        except (asyncio.CancelledError, GeneratorExit):  # the client left
            raise
        except BaseException as failure:
            self._log.error = failure
            raise
        finally:
            self._stream.abort()
            self._lease.release()
            self._log.close()

    def _take(self, output: SequenceOutput) -> ChoiceDelta:
        """What an output brings its choice."""
        index, parser = output.index, self._parsers[output.index]
        text = self._texts[index]
        before = text.generated
        delta = text.push(output)
        if text.finished and output.finish is None:  # a stop string: the engine does not know of those
            self._stream.end(index)
        self._log.output(output)
        first = index not in self._begun
        if first:
            self._begun.add(index)
        events = parser.push(delta.text)
        if delta.finish_reason is not None:
            events += parser.finish()
        reasoning = self.usage.reasoning
        for event in events:
            if type(event) is CallBegun:
                self._called.add(index)
            elif type(event) is Reasoning or type(event) is ReasoningEnded:
                reasoning += text.generated - self._thought.get(index, 0)
                self._thought[index] = text.generated
        done = self.usage.completion + text.generated - before
        self.usage = Usage(self.usage.prompt, done, self._log.cached_tokens if first else self.usage.cached, reasoning)
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
            self.usage,
        )

    def _shows(self, delta: ChoiceDelta) -> bool:
        """Whether a client sees something new in it: not in half a character, nor in a token that has no text."""
        tokens_alone = self._tokenizer is None
        return bool(delta.text or delta.finish_reason or (tokens_alone and delta.tokens))

    def _sent(self, taken: Sequence[Taken]) -> None:
        """Books what the reader has done with."""
        now = time.monotonic()
        for output, shown, ends in taken:
            self._log.sent(output, shown, now)
            if ends is not None:
                self._log.finished(output, ends)
