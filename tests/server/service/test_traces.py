"""Traces, read with OpenTelemetry's in-memory exporter."""

import asyncio
import gzip
import http.server
import logging
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.fake_engine import FakeEngine, FakeStream
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError, EngineDeadError
from tucka_runtime.messages import Request, SequenceOutput, Timing
from tucka_runtime.server.api.app import create_app
from tucka_runtime.server.http.server import HTTPServer, bind
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.traces import Traces
from tucka_runtime.tokenizer import Tokenizer

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class TimedEngine(FakeEngine):
    """The fake engine, telling times: 1 s in the queue, 2 s of prompt, 3 s of answer."""

    def submit(self, request: Request) -> FakeStream:
        super().submit(request)
        return TimedStream(self, request)


class TimedStream(FakeStream):
    async def _run(self, request: Request) -> AsyncIterator[SequenceOutput]:
        async for output in super()._run(request):
            output.timing = Timing(100.0, 101.0, 103.0, 106.0 if output.finish else 0.0)
            yield output


@pytest.fixture
def spans(tmp_path: Path, tokenizer: Tokenizer):
    """Sends one request to a fresh application, returns its spans by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine, metrics = TimedEngine(), Metrics()

    def send(body: dict[str, object], **headers: str) -> dict[str, ReadableSpan]:
        async def ask() -> None:
            registry = AdapterRegistry(tmp_path / "state")
            names = AdapterNames(engine, registry, "base", metrics)  # type: ignore[arg-type]
            await names.load("fin", GOLDEN / "llama-qv-r8k3t3" / "adapter")
            names.ready = True
            config = ServerConfig()
            service = Service(config, "base", engine, tokenizer, None, names, metrics, Traces(provider))  # type: ignore[arg-type]
            with bind("127.0.0.1", 0) as listener:
                server = HTTPServer(create_app(service), config, listener)
                serving = asyncio.ensure_future(server.serve())
                while not server.started:
                    await asyncio.sleep(0.01)
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
                async with httpx.AsyncClient() as client:
                    await client.post(url, json={"prompt": "hello", "max_tokens": 4} | body, headers=headers)
                server.should_exit = True
                await serving
            registry.close()

        asyncio.run(ask())
        return {span.name: span for span in exporter.get_finished_spans()}

    send.engine = engine  # type: ignore[attr-defined]
    return send


def test_a_request_by_the_genai_conventions(spans) -> None:
    found = spans({"model": "fin", "temperature": 0, "seed": 7, "stream": True}, **{"x-request-id": "mine"})
    root = found["text_completion fin"]
    assert root.attributes is not None
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tucka",
        "gen_ai.request.model": "fin",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "tucka.request.id": "mine",
        "tucka.adapter.name": "fin",
        "tucka.adapter.generation": 1,
        "tucka.route.scope": "batch",
    }
    assert {name: root.attributes[name] for name in wanted} == wanted
    assert root.parent is None and root.status.status_code is StatusCode.UNSET
    assert "prompt" not in " ".join(root.attributes)


def test_queue_prefill_and_decode_lie_below_it(spans) -> None:
    found = spans({"model": "fin"})
    root = found["text_completion fin"]
    assert {span.parent.span_id for name, span in found.items() if span is not root} == {root.context.span_id}
    borders = [(found[name].start_time, found[name].end_time) for name in ("queue", "prefill", "decode")]
    assert borders[0][1] == borders[1][0] and borders[1][1] == borders[2][0]
    assert borders[0][1] - borders[0][0] == pytest.approx(1e9) and borders[1][1] - borders[1][0] == pytest.approx(2e9)
    assert root.end_time > root.start_time > 1.7e18  # nanoseconds since 1970


def test_the_callers_trace_goes_on(spans) -> None:
    found = spans({"model": "base"}, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=b")
    root = found["text_completion base"]
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert root.context.trace_state["a"] == "b"


@pytest.mark.parametrize("bad", ["", "00-zz-xx-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 4000])
def test_a_bad_context_begins_a_new_trace(spans, bad: str) -> None:
    root = spans({"model": "base"}, traceparent=bad)["text_completion base"]
    assert root.parent is None and root.context.trace_id


def test_what_the_caller_does_not_sample_is_not_recorded(spans) -> None:
    assert spans({"model": "base"}, traceparent=f"00-{TRACE}-{PARENT}-00") == {}


def test_a_failure(spans) -> None:
    spans.engine.failure = EngineDeadError("it died")
    spans.engine.fail_after = 2
    root = spans({"model": "fin"})["text_completion fin"]
    assert root.status.status_code is StatusCode.ERROR and root.attributes["error.type"]
    assert root.attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_spans_reach_a_collector() -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        traces = Traces.to(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        traces._tracer.start_span("text_completion fin").end()
        traces.close()
        collector.shutdown()
    assert [path for path, _ in received] == ["/v1/traces"] and b"text_completion fin" in gunzipped(received[0][1])


def gunzipped(body: bytes) -> bytes:
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body


def test_a_collector_that_is_away_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")
    traces = Traces.to(f"http://127.0.0.1:{port}/v1/traces")
    for _ in range(3):
        traces._tracer.start_span("text_completion fin").end()
        traces._provider.force_flush()
    traces.close()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "--otlp-traces-endpoint" in line


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="needs the extra otel"):
        Traces.to("http://127.0.0.1:4318/v1/traces")
