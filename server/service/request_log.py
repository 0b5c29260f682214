"""What one generation did, step by step: for the metrics as it happens, for its log line and its trace at the end."""

import logging
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HTTPRequest

from tucka_runtime.errors import NonFiniteError
from tucka_runtime.logs import fields
from tucka_runtime.messages import FinishReason, Request, SequenceOutput, Timing
from tucka_runtime.server.http.errors import reason
from tucka_runtime.server.http.limits import Admission
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.leases import Served

if TYPE_CHECKING:
    from tucka_runtime.server.service.traces import Traces

log = logging.getLogger("tucka_runtime.server.requests")

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class Origin:
    """The HTTP request behind a generation. `operation` is the GenAI conventions' name for it, `model` the registered
    name that it was resolved to, `asked` what it called that, an alias maybe; `received` is when its first bytes came
    (`time.monotonic()`); `prompt` is None unless it may be logged. `key` is the name of the key that it came with,
    `admission` what it takes of that key's limits."""

    request_id: str
    operation: str
    model: str
    asked: str
    received: float
    context: dict[str, str]
    prompt: Any = None
    key: str | None = None
    admission: Admission = field(default_factory=Admission)

    @staticmethod
    def of(request: HTTPRequest, operation: str, model: str, asked: str, prompt: Any = None) -> "Origin":
        """Keeps the W3C trace context of the headers."""
        context = {name: value for name in ("traceparent", "tracestate") if (value := request.headers.get(name))}
        state = request.state
        key, admission = state.access.name, state.admission
        return Origin(state.request_id, operation, model, asked, state.received, context, prompt, key, admission)

    @property
    def trace_id(self) -> str | None:
        """The id of the caller's trace, if its header is well-formed."""
        match = _TRACEPARENT.fullmatch(self.context.get("traceparent", ""))
        return match[1] if match else None


@dataclass(frozen=True)
class Sinks:
    """Who is told of requests."""

    metrics: Metrics
    traces: "Traces | None" = None


@dataclass
class SequenceRecord:
    """Times are `time.monotonic()`; 0 is not yet. `first` is when the first text was sent, `last` the
    latest token."""

    first: float = 0.0
    last: float = 0.0
    timing: Timing | None = None
    reason: FinishReason | None = None
    tokens: int = 0
    cached_tokens: int = 0


class RequestLog:
    """Begins when the request has been sent to the engine, which may still reject it; ends with `close`, whatever
    happens in between. What is refused before (429, 503, every 400) has none.

    Of each output the generation tells, in this order: `output` when it came, `sent` when the client has it, `finished`
    where it was the sequence's last. The metrics hear of each at once, trace and log line of all at the end.
    """

    def __init__(self, request: Request, adapter: Served | None, origin: Origin, sinks: Sinks):
        self.request, self.adapter, self.origin = request, adapter, origin
        self.model = origin.model
        self.sequences = [SequenceRecord() for _ in range(request.num_sequences)]
        self.prompt_tokens = sum(map(len, request.prompts))
        self.ended = 0.0
        self.error: BaseException | None = None
        self.trace_id: str | None = None
        self._metrics, self._traces = sinks.metrics, sinks.traces
        self._metrics.admitted(self.model, self.prompt_tokens, len(self.sequences))
        self._metrics.keys.admitted(origin.key)

    def output(self, output: SequenceOutput) -> None:
        """One step's output for one sequence."""
        sequence = self.sequences[output.index]
        sequence.timing = output.timing or sequence.timing
        sequence.tokens += len(output.token_ids)
        if not sequence.last:
            # A prompt counts once, whatever the number of its answers, as in prompt_tokens.
            sequence.cached_tokens = output.cached_tokens if output.index % self.request.n == 0 else 0
        self._metrics.tokens(len(output.token_ids))

    def sent(self, output: SequenceOutput, shown: bool, now: float) -> None:
        """What this output brought has been written to the client, or is kept for a whole answer. `shown`: there was
        something to see in it. `now` is `time.monotonic()`."""
        sequence = self.sequences[output.index]
        if shown and not sequence.first:
            sequence.first = now
            self._metrics.first_token(self.model, now - self.origin.received, sequence.cached_tokens, sequence.timing)
        if sequence.last:
            self._metrics.waited(now - sequence.last, len(output.token_ids))
        sequence.last = now

    def finished(self, output: SequenceOutput, reason: FinishReason) -> None:
        """The sequence of this output is complete."""
        sequence = self.sequences[output.index]
        sequence.reason = reason
        self._metrics.decoded(sequence.last - sequence.first)
        self._metrics.finished(self.model, reason, 1, output.route.changes if output.route else None)

    @property
    def generated(self) -> int:
        return sum(sequence.tokens for sequence in self.sequences)

    @property
    def cached_tokens(self) -> int:
        return sum(sequence.cached_tokens for sequence in self.sequences)

    @property
    def outcome(self) -> str:
        """ "ok", "error", or "abort" where the client left."""
        if self.error is not None:
            return "error"
        return "ok" if all(s.reason not in (None, FinishReason.ABORT) for s in self.sequences) else "abort"

    def close(self) -> None:
        """Ends the log: what did not finish counts as an error where there was one, else as aborted."""
        self.ended = time.monotonic()
        if unfinished := [sequence for sequence in self.sequences if sequence.reason is None]:
            reason = FinishReason.ABORT if self.error is None else FinishReason.ERROR
            for sequence in unfinished:
                sequence.reason = reason
            self._metrics.finished(self.model, reason, len(unfinished))
        if isinstance(self.error, NonFiniteError):
            self._metrics.adapters.overflowed(self.model)
        # A request that the engine refused, or never came to, took nothing; one that its client left took what it had.
        prompt = 0 if self.error is not None and not self.generated else self.prompt_tokens
        self.origin.admission.settle(prompt + self.generated)
        self._metrics.keys.used(self.origin.key, prompt, self.generated)
        self._metrics.closed(self.model, self.ended - self.origin.received, self.generated, self.error is not None)
        self.trace_id = self._traces.record(self) if self._traces is not None else self.origin.trace_id
        self._log()

    def _log(self) -> None:
        first = min((s.first for s in self.sequences if s.first), default=0.0)
        timings = [s.timing for s in self.sequences if s.timing is not None and s.timing.scheduled]
        reasons = [str(s.reason) for s in self.sequences]
        seconds: dict[str, float | None] = {
            "queue_seconds": max((t.scheduled - t.arrived for t in timings), default=None),
            "prefill_seconds": max((t.first_token - t.scheduled for t in timings if t.first_token), default=None),
            "first_token_seconds": first - self.origin.received if first else None,
            "decode_seconds": max((s.last - s.first for s in self.sequences if s.first), default=None),
            "seconds": self.ended - self.origin.received,
        }
        log.info(
            "%s: %d prompt tokens, %d generated, %s, %.0f ms, %s%s",
            self.model,
            self.prompt_tokens,
            self.generated,
            self.outcome if self.outcome != "ok" else ",".join(sorted(set(reasons))),
            1000 * (self.ended - self.origin.received),
            self.origin.request_id,
            f" {self.origin.key}" if self.origin.key else "",
            extra=fields(
                event="request",
                request_id=self.origin.request_id,
                id=self.request.id,
                key=self.origin.key,
                operation=self.origin.operation,
                model=self.model,
                asked=self.origin.asked,
                adapter=self.adapter.model if self.adapter else None,
                digest=self.adapter.digest if self.adapter else None,
                generation=self.adapter.key.generation if self.adapter else None,
                route_scope=self.request.route_scope and str(self.request.route_scope),
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                generation_tokens=self.generated,
                sequences=len(self.sequences),
                outcome=self.outcome,
                error=reason(self.error) if self.error is not None else None,
                finish_reasons=reasons,
                trace_id=self.trace_id,
                **{name: value if value is None else round(value, 6) for name, value in seconds.items()},
                **({} if self.origin.prompt is None else {"prompt": self.origin.prompt}),
            ),
        )
