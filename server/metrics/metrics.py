"""Prometheus metrics of one server, kept in the API process: the engine's process only sends its figures along.

Every label takes its values from a closed set: routes, codes, finish reasons, stages, registered names.
docs/operations.md lists every series; a test compares it with this file.
"""

from collections import Counter as Multiset
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from tucka_runtime.errors import AdapterError, EngineDeadError, InvalidRequestError, TuckaError
from tucka_runtime.messages import AdapterInfo, EngineInfo, EngineLoad, FinishReason, StepStats, Timing
from tucka_runtime.server.metrics.adapters import AdapterMetrics
from tucka_runtime.server.metrics.exposition import Family, Histogram, Series, Value
from tucka_runtime.server.metrics.vllm import Load, VLLMMetrics

# Borders are those that objectives are set on: a share below one of them is exact.
TTFT_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
LATENCY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120)
LOAD_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHANGES = (0, 1, 2, 5, 10, 20, 50, 100)
STAGES = ("schedule", "batch", "route", "forward", "sample", "output")


class Metrics:
    """All series. `model_name` is what requests call the base by."""

    def __init__(self, model_name: str = "base", max_adapters: int = 0, block_size: int = 0, vllm: bool = True):
        self._families: dict[str, Family[Any]] = {}
        self._processes = CollectorRegistry()
        self.adapters = AdapterMetrics(model_name)
        self._max_adapters, self._block_size = max_adapters, block_size
        self._in_flight: Multiset[str] = Multiset()  # sequences by model
        self._load: EngineLoad | None = None
        self._active: set[str] = set()  # adapters that had rows in the last step
        self._preemptions = self._restarts = 0
        self._define_requests()
        self._define_engine()
        ProcessCollector(registry=self._processes)
        self._vllm = VLLMMetrics(model_name, self._families) if vllm else None

    def _define_requests(self) -> None:
        self._http_requests = self._counters("http_requests", "HTTP requests answered", "route", "method", "code")
        self._requests = self._counters("requests", "sequences finished, by finish reason", "finish_reason")
        for reason in FinishReason:
            self._requests.labels(str(reason))
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of admitted requests")
        self._cached_tokens = self._counter("cached_prompt_tokens", "prompt tokens whose KV was reused")
        self._generation_tokens = self._counter("generation_tokens", "tokens generated")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "request's first bytes to first token sent", TTFT_SECONDS
        )
        self._inter_token = self._histogram("inter_token_seconds", "between two tokens of a sequence", TOKEN_SECONDS)
        self._latency = self._histogram(
            "request_latency_seconds", "request's first bytes to last token sent", LATENCY_SECONDS
        )
        self._queue = self._histogram("request_queue_seconds", "accepted by the engine to scheduled", TTFT_SECONDS)
        self._prefill = self._histogram("request_prefill_seconds", "scheduled to first token", TTFT_SECONDS)
        self._decode = self._histogram("request_decode_seconds", "first token to last token", LATENCY_SECONDS)
        self._prompt_length = self._histogram("request_prompt_tokens", "prompt tokens of an admitted request", LENGTHS)
        self._answer_length = self._histogram("request_generation_tokens", "tokens generated for a request", LENGTHS)
        self._changes = self._histogram("request_route_changes", "group changes of a sequence's decoding", CHANGES)
        self._running = self._gauge("requests_running", "sequences in the batch")
        self._waiting = self._gauge("requests_waiting", "sequences accepted and not in the batch")

    def _define_engine(self) -> None:
        self._engine_info = self._family(
            "engine_info", "gauge", "1; what is served", ("version", "type", "dtype", "device"), Value
        )
        self._engine_up = self._gauge("engine_up", "1 while the engine process serves")
        self._engine_restarts = self._counter("engine_restarts", "engine processes started after the first")
        self._steps = self._counter("steps", "forward passes")
        stage_seconds = self._counters("step_seconds", "time the engine spent, by stage", "stage")
        self._stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        tokens = self._counters("step_tokens", "tokens the engine computed, by kind", "kind")
        self._prefilled, self._decoded = tokens.labels("prefill"), tokens.labels("decode")
        self._step_duration = self._histogram("step_duration_seconds", "one step, all stages", STEP_SECONDS)
        self._batch_tokens = self._histogram("batch_tokens", "tokens in a step", POWERS)
        self._batch_sequences = self._histogram("batch_sequences", "sequences in a step", POWERS[:10])
        self._batch_adapters = self._histogram("batch_adapters", "adapters in a step", (0, *POWERS[:8]))
        self._kv_used = self._gauge("kv_blocks_used", "KV blocks in use")
        self._kv_total = self._gauge("kv_blocks", "KV blocks there are")
        self._preempted = self._counter("preemptions", "sequences set back to make room")
        self._loaded = self._gauge("adapters_loaded", "adapters loaded")
        self._slots = self._gauge("adapter_slots", "adapters that can be loaded")
        self._load_seconds = self._histograms(
            "load_duration_seconds", "loads of adapters, by stage", LOAD_SECONDS, "stage"
        )
        self._load_failures = self._counters("load_failures", "loads refused or failed, by the error's code", "code")
        errors: list[type[TuckaError]] = [
            *AdapterError.__subclasses__(),
            EngineDeadError,
            InvalidRequestError,
            TuckaError,
        ]
        for error in errors:
            self._load_failures.labels(error.code or error.type)

    def watch_engine(self, pid: Callable[[], int | None]) -> None:
        """Shows memory, CPU time and open files of the engine's process beside this one's."""
        ProcessCollector("tucka_engine", pid=pid, registry=self._processes)  # type: ignore[arg-type]

    def answered(self, route: str, method: str, code: str) -> None:
        """An HTTP request got its answer."""
        self._http_requests.labels(route, method, code).inc()

    # What happens to adapters.

    def adapter_loaded(self, info: AdapterInfo, seconds: dict[str, float]) -> None:
        """A name has got its content, new or again. `seconds` are the load's stages."""
        self.adapters.loaded(info, seconds)
        for stage, value in seconds.items():
            self._load_seconds.labels(stage).observe(value)

    def adapter_refused(self, code: str) -> None:
        """A load failed; `code` is the error class's own, or its type."""
        self._load_failures.labels(code).inc()

    def adapter_unloaded(self, name: str) -> None:
        """Deletes the adapter's series; what its last requests bring is not counted by name."""
        self.adapters.unloaded(name)

    # What happens to requests. `model` is the registered name.

    def admitted(self, model: str, prompt_tokens: int, sequences: int) -> None:
        """A request was taken on; every one of its sequences ends in `finished`."""
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_length.observe(prompt_tokens)
        self._in_flight[model] += sequences
        self.adapters.admitted(model, prompt_tokens)

    def first_token(self, model: str, seconds: float, cached_tokens: int, timing: Timing | None) -> None:
        """A sequence's first token was sent `seconds` after the request's first bytes had come."""
        self._first_token.observe(seconds)
        self._cached_tokens.inc(cached_tokens)
        self.adapters.first_token(model, seconds)
        if timing is not None and timing.scheduled:
            self._queue.observe(timing.scheduled - timing.arrived)
            self._prefill.observe(timing.first_token - timing.scheduled)

    def tokens(self, count: int) -> None:
        """A step brought a sequence so many tokens."""
        self._generation_tokens.inc(count)

    def waited(self, seconds: float, count: int) -> None:
        """A sequence's next `count` tokens were sent `seconds` after the ones before."""
        if count:
            self._inter_token.observe(seconds / count)

    def finished(self, model: str, reason: FinishReason, count: int = 1, route_changes: int | None = None) -> None:
        """`count` sequences ended. `route_changes` None: they had no route."""
        self._requests.labels(str(reason)).inc(count)
        self._in_flight[model] -= count
        if self._in_flight[model] <= 0:
            del self._in_flight[model]
        if route_changes is not None:
            self._changes.observe(route_changes)
        self.adapters.finished(model, reason, count, route_changes or 0)

    def decoded(self, seconds: float) -> None:
        """A sequence's tokens after the first took so long."""
        self._decode.observe(seconds)

    def closed(self, model: str, seconds: float, generated: int, failed: bool) -> None:
        """A request ended, `seconds` after its first bytes had come."""
        self._latency.observe(seconds)
        self._answer_length.observe(generated)
        self.adapters.closed(model, seconds, generated, failed)

    # What the engine tells.

    def on_idle(self, load: EngineLoad | None) -> None:
        """Takes what the engine holds when it has no work. It should be nothing, but it is the engine that says so.
        None: the engine died."""
        self._load, self._active = load, set()

    def on_step(self, stats: StepStats, load: EngineLoad) -> None:
        """Takes the figures of one engine step, and what the engine holds after it."""
        self._load = load
        self._active = {key.name for key in stats.adapters} if load.running else set()
        self._steps.inc()
        duration = 0.0
        for stage, counter in self._stages.items():
            seconds = getattr(stats, stage)
            duration += seconds
            counter.inc(max(seconds, 0.0))
        self._step_duration.observe(duration)
        self._prefilled.inc(stats.prefill_tokens)
        self._decoded.inc(stats.decode_tokens)
        self._batch_tokens.observe(stats.prefill_tokens + stats.decode_tokens)
        self._batch_sequences.observe(stats.sequences)
        self._batch_adapters.observe(len(stats.adapters))
        for key, route in stats.routes:
            self.adapters.routed(key, route)
        # The engine counts from its own start: a smaller number is a new engine's.
        new = load.preemptions - self._preemptions
        self._preempted.inc(new if new >= 0 else load.preemptions)
        self._preemptions = load.preemptions

    def render(self, up: bool = True, restarts: int = 0, info: EngineInfo | None = None, version: str = "") -> bytes:
        """The exposition text. What runs, waits and is used is what the engine said last, whatever is in flight here:
        what it never gave back shows."""
        held = self._load if up else None
        running, waiting, used, blocks = 0, 0, 0, 0
        if held is not None:
            running, waiting, used, blocks = held.running, held.waiting, held.blocks_used, held.blocks_total
        elif info is not None and self._block_size:
            blocks = info.kv_cache_tokens // self._block_size
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_used.set(used)
        self._kv_total.set(blocks)
        self._engine_up.set(up)
        self._engine_restarts.inc(restarts - self._restarts)
        self._restarts = restarts
        self._loaded.set(len(self.adapters))
        self._slots.set(self._max_adapters)
        if info is not None:
            self._engine_info.labels(version, info.model_type, info.dtype, info.device).set(1)
        own = "".join([family.render() for family in self._families.values()])
        parts = [own.encode(), generate_latest(self._processes), *self.adapters.render()]
        if self._vllm is not None:
            active = {name for name in self._active if name in self.adapters} if running else set()
            asked = {name for name in self._in_flight if name in self.adapters}
            load = Load(
                running=running,
                waiting=waiting,
                kv_usage=used / blocks if blocks else 0.0,
                block_size=self._block_size,
                num_blocks=blocks,
                max_adapters=self._max_adapters,
                loaded=self.adapters.names(),
                running_adapters=active,
                waiting_adapters=asked - active,
            )
            parts.append(self._vllm.render(load))
        return b"".join(parts)

    def _family(
        self, name: str, kind: str, help: str, labels: tuple[str, ...], make: Callable[[str, str], Series]
    ) -> Family[Series]:
        family = Family(f"tucka_{name}", kind, help, labels, make)
        self._families[f"tucka_{name}"] = family
        return family

    def _counters(self, name: str, help: str, *labels: str) -> Family[Value]:
        return self._family(f"{name}_total", "counter", help, labels, Value)

    def _counter(self, name: str, help: str) -> Value:
        return self._counters(name, help).labels()

    def _gauge(self, name: str, help: str) -> Value:
        return self._family(name, "gauge", help, (), Value).labels()

    def _histograms(self, name: str, help: str, bounds: tuple[float, ...], *labels: str) -> Family[Histogram]:
        return self._family(name, "histogram", help, labels, lambda name, text: Histogram(name, bounds, text))

    def _histogram(self, name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
        return self._histograms(name, help, bounds).labels()
