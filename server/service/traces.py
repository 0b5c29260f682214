"""OpenTelemetry traces: one span per generation with the GenAI conventions' attributes, and below it, for each of its
sequences, what it waited for (queue), its prompt (prefill) and its answer (decode).

Needs the extra `otel`. Spans are made when a generation is over, from recorded times: tracing costs nothing before.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tucka_runtime import __version__
from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.extras import how_to_install
from tucka_runtime.logs import OnceAMinute
from tucka_runtime.server.service.request_log import RequestLog, SequenceRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)


class Traces:
    """`provider` decides what is sampled and where spans go."""

    def __init__(self, provider: "TracerProvider"):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("tucka_runtime", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @staticmethod
    def to(endpoint: str) -> "Traces":
        """Sends to an OTLP/HTTP endpoint (its full URL, `.../v1/traces`). The OTEL_* environment variables set sampling
        and resource. Raises ConfigError without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
        except ImportError:
            raise ConfigError(f"--otlp-traces-endpoint needs the extra otel: {how_to_install('otel')}.") from None
        provider = TracerProvider(resource=Resource.create({"service.version": __version__}))

        class Exporter(OTLPSpanExporter):
            complaint = OnceAMinute()

            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                result = super().export(spans)
                if result is not SpanExportResult.SUCCESS and self.complaint.due():
                    log.warning(
                        "traces do not reach --otlp-traces-endpoint and are dropped: is a collector listening there? "
                        "(said at most once a minute)"
                    )
                return result

        for name in ("opentelemetry.exporter", "urllib3"):  # they warn of every attempt
            logging.getLogger(name).setLevel(logging.CRITICAL)
        provider.add_span_processor(BatchSpanProcessor(Exporter(endpoint)))
        return Traces(provider)

    def record(self, record: RequestLog) -> str:
        """Makes the spans of a closed record, below the caller's if it sent its context. Returns the trace's id."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context

        epoch = time.time_ns() - time.monotonic_ns()  # spans are in nanoseconds since 1970
        span = self._tracer.start_span(
            f"{record.origin.operation} {record.model}",
            self._propagator.extract(record.origin.context),
            SpanKind.SERVER,
            _attributes(record),
            start_time=epoch + _nanoseconds(record.origin.received),
        )
        if record.error is not None:
            error = record.error
            span.set_attribute("error.type", (isinstance(error, TuckaError) and error.code) or type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
        below = set_span_in_context(span)
        for index, sequence in enumerate(record.sequences):
            for name, begin, end in _phases(sequence):
                attributes = {"tucka.sequence.index": index}
                child = self._tracer.start_span(name, below, SpanKind.INTERNAL, attributes, start_time=epoch + begin)
                child.end(epoch + end)
        span.end(epoch + _nanoseconds(record.ended))
        return format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _attributes(record: RequestLog) -> dict[str, Any]:
    sampling = record.request.sampling
    attributes = {
        "gen_ai.operation.name": record.origin.operation,
        "gen_ai.provider.name": "tucka",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.request.id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": len(record.sequences),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.generated,
        "gen_ai.response.finish_reasons": [str(sequence.reason) for sequence in record.sequences],
        "tucka.request.id": record.origin.request_id,
        "tucka.cached_tokens": record.cached_tokens,
    }
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if record.adapter is not None:
        attributes |= {
            "tucka.adapter.name": record.adapter.model,
            "tucka.adapter.digest": record.adapter.digest,
            "tucka.adapter.generation": record.adapter.key.generation,
        }
    if record.request.route_scope is not None:
        attributes["tucka.route.scope"] = str(record.request.route_scope)
    return attributes


def _phases(sequence: SequenceRecord) -> list[tuple[str, int, int]]:
    """(name, begin, end) of what the sequence got to."""
    timing = sequence.timing
    if timing is None or not timing.scheduled:
        return []
    borders = [("queue", timing.arrived, timing.scheduled)]
    if timing.first_token:
        borders.append(("prefill", timing.scheduled, timing.first_token))
        borders.append(("decode", timing.first_token, max(timing.finished, sequence.last, timing.first_token)))
    return [(name, _nanoseconds(begin), _nanoseconds(end)) for name, begin, end in borders]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
