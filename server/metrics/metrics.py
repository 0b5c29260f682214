"""Prometheus metrics of one server, kept in the API process: the engine's process only sends its figures along.

Every label takes its values from a closed set: routes, codes, finish reasons, stages, registered names.
docs/operations.md lists every series; a test compares it with this file.
"""

from collections import Counter as Multiset
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from tucka_runtime.errors import AdapterError, EngineDeadError, InvalidRequestError, StorageError, TuckaError
from tucka_runtime.messages import AdapterInfo, EngineInfo, EngineLoad, FinishReason, StepStats, Timing
from tucka_runtime.server.http.access import OPEN, Access
from tucka_runtime.server.metrics.adapters import AdapterMetrics
from tucka_runtime.server.metrics.exposition import Family, Histogram, Value
from tucka_runtime.server.metrics.keys import KeyMetrics
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


@dataclass(frozen=True)
class Spec:
    """A family of series, without the prefix `tucka_`. With `borders` it is a histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    borders: tuple[float, ...] = ()


def _counter(name: str, help: str, *labels: str) -> Spec:
    return Spec(f"{name}_total", "counter", help, labels)


def _gauge(name: str, help: str, *labels: str) -> Spec:
    return Spec(name, "gauge", help, labels)


def _histogram(name: str, help: str, borders: tuple[float, ...], *labels: str) -> Spec:
    return Spec(name, "histogram", help, labels, borders)


SPECS = (
    _counter("http_requests", "HTTP requests answered", "route", "method", "code"),
    _counter("requests", "sequences finished, by finish reason", "finish_reason"),
    _counter("prompt_tokens", "prompt tokens of admitted requests"),
    _counter("cached_prompt_tokens", "prompt tokens whose KV was reused"),
    _counter("generation_tokens", "tokens generated"),
    _histogram("time_to_first_token_seconds", "request's first bytes to first token sent", TTFT_SECONDS),
    _histogram("inter_token_seconds", "between two tokens of a sequence", TOKEN_SECONDS),
    _histogram("request_latency_seconds", "request's first bytes to last token sent", LATENCY_SECONDS),
    _histogram("request_queue_seconds", "accepted by the engine to scheduled", TTFT_SECONDS),
    _histogram("request_prefill_seconds", "scheduled to first token", TTFT_SECONDS),
    _histogram("request_decode_seconds", "first token to last token", LATENCY_SECONDS),
    _histogram("request_prompt_tokens", "prompt tokens of an admitted request", LENGTHS),
    _histogram("request_generation_tokens", "tokens generated for a request", LENGTHS),
    _histogram("request_route_changes", "group changes of a sequence's decoding", CHANGES),
    _gauge("requests_running", "sequences in the batch"),
    _gauge("requests_waiting", "sequences accepted and not in the batch"),
    _gauge("oldest_waiting_seconds", "age of the oldest request without a first token"),
    _gauge("engine_info", "1; what is served", "version", "type", "dtype", "device", "kernels"),
    _gauge("engine_threads", "CPU threads of the engine"),
    _gauge("engine_up", "1 while the engine process serves"),
    _gauge("engine_silence_seconds", "since the engine's last step, or sign of life without work"),
    _counter("engine_restarts", "engine processes started after the first"),
    _counter("steps", "forward passes"),
    _counter("step_seconds", "time the engine spent, by stage", "stage"),
    _counter("step_tokens", "tokens the engine computed, by kind", "kind"),
    _histogram("step_duration_seconds", "one step, all stages", STEP_SECONDS),
    _histogram("batch_tokens", "tokens in a step", POWERS),
    _histogram("batch_sequences", "sequences in a step", POWERS[:10]),
    _histogram("batch_adapters", "adapters in a step", (0, *POWERS[:8])),
    _gauge("kv_blocks_used", "KV blocks in use"),
    _gauge("kv_blocks", "KV blocks there are"),
    _counter("preemptions", "sequences set back to make room"),
    _counter("displacements", "sequences set back for another flow's turn"),
    _gauge("adapters_loaded", "adapters loaded"),
    _gauge("adapters_lost", "adapters that were loaded, not unloaded, and cannot be brought back"),
    _gauge("adapter_slots", "adapters that can be loaded"),
    _histogram("load_duration_seconds", "loads of adapters, by stage", LOAD_SECONDS, "stage"),
    _counter("load_failures", "loads refused or failed, by the error's code", "code"),
)
LOAD_ERRORS: tuple[type[TuckaError], ...] = (
    *AdapterError.__subclasses__(),
    EngineDeadError,
    InvalidRequestError,
    StorageError,
    TuckaError,
)


class Metrics:
    """All series. `model_name` is what requests call the base by."""

    def __init__(self, model_name: str = "base", max_adapters: int = 0, block_size: int = 0, vllm: bool = True):
        self._values: dict[str, Family[Value]] = {}
        self._histograms: dict[str, Family[Histogram]] = {}
        self._families: dict[str, Family[Any]] = {}  # all of them, in order
        for spec in SPECS:
            self._define(spec)
        self.adapters, self.keys = AdapterMetrics(model_name), KeyMetrics()
        self._max_adapters, self._block_size = max_adapters, block_size
        self._in_flight: Multiset[str] = Multiset()  # sequences by model
        self._load: EngineLoad | None = None
        self._active: set[str] = set()  # adapters that had rows in the last step
        self._set_back = {"preemptions": 0, "displacements": 0}  # what the engine said last
        self._restarts = 0
        self._processes = CollectorRegistry()
        ProcessCollector(registry=self._processes)
        self._vllm = VLLMMetrics(model_name, self._families) if vllm else None
        # What every token and every step is counted in is looked up once.
        self._generated = self._values["generation_tokens_total"].labels()
        self._between_tokens = self._histograms["inter_token_seconds"].labels()
        self._steps = self._values["steps_total"].labels()
        self._stages = [(stage, self._values["step_seconds_total"].labels(stage)) for stage in STAGES]
        self._prefilled, self._decoded = (self._values["step_tokens_total"].labels(of) for of in ("prefill", "decode"))
        self._step_figures = [
            self._histograms[name].labels()
            for name in ("step_duration_seconds", "batch_tokens", "batch_sequences", "batch_adapters")
        ]

    def _define(self, spec: Spec) -> None:
        """Makes a family, and at once the series whose labels are known: a scrape shows them from the beginning."""
        name, borders = f"tucka_{spec.name}", spec.borders
        known: dict[str, Iterable[str]] = {
            "requests_total": map(str, FinishReason),
            "step_seconds_total": STAGES,
            "step_tokens_total": ("prefill", "decode"),
            "load_failures_total": (error.code or error.type for error in LOAD_ERRORS),
        }
        family: Family[Any]
        if borders:
            family = self._histograms[spec.name] = Family(
                name, spec.kind, spec.help, spec.labels, lambda name, labels: Histogram(name, borders, labels)
            )
        else:
            family = self._values[spec.name] = Family(name, spec.kind, spec.help, spec.labels, Value)
        self._families[name] = family
        for label in known.get(spec.name, () if spec.labels else ("",)):
            family.labels(*([label] if spec.labels else []))

    def _inc(self, name: str, amount: float = 1, *labels: str) -> None:
        self._values[f"{name}_total"].labels(*labels).inc(amount)

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._values[name].labels(*labels).set(value)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._histograms[name].labels(*labels).observe(value)

    def watch_engine(self, pid: Callable[[], int | None]) -> None:
        """Shows memory, CPU time and open files of the engine's process beside this one's."""
        ProcessCollector("tucka_engine", pid=pid, registry=self._processes)  # type: ignore[arg-type]

    def answered(self, route: str, method: str, code: str) -> None:
        """An HTTP request got its answer."""
        self._inc("http_requests", 1, route, method, code)

    # What happens to adapters.

    def adapter_loaded(self, info: AdapterInfo, seconds: dict[str, float]) -> None:
        """A name has got its content, new or again. `seconds` are the load's stages."""
        self.adapters.loaded(info, seconds)
        for stage, value in seconds.items():
            self._observe("load_duration_seconds", value, stage)

    def adapter_refused(self, code: str) -> None:
        """A load failed; `code` is the error class's own, or its type."""
        self._inc("load_failures", 1, code)

    def adapter_unloaded(self, name: str) -> None:
        """Deletes the adapter's series; what its last requests bring is not counted by name."""
        self.adapters.unloaded(name)

    # What happens to requests. `model` is the registered name.

    def admitted(self, model: str, prompt_tokens: int, sequences: int) -> None:
        """A request was sent to the engine; every one of its sequences ends in `finished`."""
        self._inc("prompt_tokens", prompt_tokens)
        self._observe("request_prompt_tokens", prompt_tokens)
        self._in_flight[model] += sequences
        self.adapters.admitted(model, prompt_tokens)

    def first_token(self, model: str, seconds: float, cached_tokens: int, timing: Timing | None) -> None:
        """A sequence's first token was sent `seconds` after the request's first bytes had come."""
        self._observe("time_to_first_token_seconds", seconds)
        self._inc("cached_prompt_tokens", cached_tokens)
        self.adapters.first_token(model, seconds)
        if timing is not None and timing.scheduled:
            self._observe("request_queue_seconds", timing.scheduled - timing.arrived)
            self._observe("request_prefill_seconds", timing.first_token - timing.scheduled)

    def tokens(self, count: int) -> None:
        """A step brought a sequence so many tokens."""
        self._generated.inc(count)

    def waited(self, seconds: float, count: int) -> None:
        """A sequence's next `count` tokens were sent `seconds` after the ones before."""
        if count:
            self._between_tokens.observe(seconds / count)

    def finished(self, model: str, reason: FinishReason, count: int = 1, route_changes: int | None = None) -> None:
        """`count` sequences ended. `route_changes` None: they had no route."""
        self._inc("requests", count, str(reason))
        self._in_flight[model] -= count
        if self._in_flight[model] <= 0:
            del self._in_flight[model]
        if route_changes is not None:
            self._observe("request_route_changes", route_changes)
        self.adapters.finished(model, reason, count, route_changes or 0)

    def decoded(self, seconds: float) -> None:
        """A sequence's tokens after the first took so long."""
        self._observe("request_decode_seconds", seconds)

    def closed(self, model: str, seconds: float, generated: int, failed: bool) -> None:
        """A request ended, `seconds` after its first bytes had come."""
        self._observe("request_latency_seconds", seconds)
        self._observe("request_generation_tokens", generated)
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
        for stage, series in self._stages:
            series.inc(max(getattr(stats, stage), 0.0))
        self._prefilled.inc(stats.prefill_tokens)
        self._decoded.inc(stats.decode_tokens)
        tokens = stats.prefill_tokens + stats.decode_tokens
        figures = (stats.seconds, tokens, stats.sequences, len(stats.adapters))
        for histogram, figure in zip(self._step_figures, figures, strict=True):
            histogram.observe(figure)
        for key, route in stats.routes:
            self.adapters.routed(key, route)
        # The engine counts from its own start: a smaller number is a new engine's.
        for name, before in self._set_back.items():
            total: int = getattr(load, name)
            self._inc(name, total - before if total >= before else total)
            self._set_back[name] = total

    def render(
        self,
        up: bool = True,
        restarts: int = 0,
        info: EngineInfo | None = None,
        version: str = "",
        silence: float = 0.0,
        lost: int = 0,
        oldest: Mapping[str | None, float] | None = None,
        access: Access = OPEN,
    ) -> bytes:
        """The exposition text, with the names that `access` sees; vLLM's are for who sees all. What runs, waits and is
        used is what the engine said last, whatever is in flight here: what it never gave back shows. `oldest` is
        EngineClient.waiting's."""
        ages = {self.adapters.base_name if name is None else name: age for name, age in (oldest or {}).items()}
        self._set("oldest_waiting_seconds", max(ages.values(), default=0.0))
        held = self._load if up else None
        running, waiting, used, blocks = 0, 0, 0, 0
        if held is not None:
            running, waiting, used, blocks = held.running, held.waiting, held.blocks_used, held.blocks_total
        elif info is not None and self._block_size:
            blocks = info.kv_cache_tokens // self._block_size
        self._set("requests_running", running)
        self._set("requests_waiting", waiting)
        self._set("kv_blocks_used", used)
        self._set("kv_blocks", blocks)
        self._set("engine_up", up)
        self._set("engine_silence_seconds", silence)
        self._inc("engine_restarts", restarts - self._restarts)
        self._restarts = restarts
        self._set("adapters_loaded", len(self.adapters))
        self._set("adapters_lost", lost)
        self._set("adapter_slots", self._max_adapters)
        if info is not None:
            self._set("engine_info", 1, version, info.model_type, info.dtype, info.device, info.kernels)
            self._set("engine_threads", info.num_threads)
        own = "".join([family.render() for family in self._families.values()])
        adapters = self.adapters.render(ages, None if access.sees_all else access.sees)
        keys = self.keys.render(None if access.sees_all else access.name)
        parts = [own.encode(), generate_latest(self._processes), *adapters, keys]
        if self._vllm is not None and access.sees_all:
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
