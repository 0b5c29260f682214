"""Prometheus metrics of one server, kept in the API process: the engine's process only sends its figures along."""

from collections import Counter as Multiset
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from tucka_runtime.errors import AdapterError, EngineDeadError, InvalidRequestError, StorageError, TuckaError
from tucka_runtime.messages import AdapterInfo, AdapterKey, EngineInfo, EngineLoad, FinishReason, StepStats, Timing
from tucka_runtime.server.http.access import OPEN, Access
from tucka_runtime.server.metrics.adapters import AdapterMetrics
from tucka_runtime.server.metrics.exposition import Family, Histogram, Value
from tucka_runtime.server.metrics.keys import KeyMetrics
from tucka_runtime.server.metrics.specs import SPECS, STAGES, TIERS, Spec
from tucka_runtime.server.metrics.vllm import Load, Residence, VLLMMetrics


@dataclass(frozen=True)
class AdapterTiers:
    """Where adapters are at one moment. `loaded` is how many names stand for one; `awaited` how many requests wait for
    one, and `awaited_names` for which. `combined` is how many combinations have a slot, which no name stands for."""

    loaded: int = 0
    resident: tuple[Residence, ...] = ()
    host: tuple[Residence, ...] = ()
    host_bytes: int = 0
    awaited: int = 0
    awaited_names: frozenset[str] = frozenset()
    combined: int = 0


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
            "adapters": TIERS,
            "adapter_lookups_total": TIERS,
            "adapter_evictions_total": TIERS[:2],
            "adapter_transition_seconds": ("load", "activate"),
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

    @property
    def generated(self) -> float:
        """Tokens that answers have had so far."""
        return self._generated.value

    @property
    def waiting(self) -> int:
        """Sequences that wait before the engine's batch, by what it said last."""
        return 0 if self._load is None else self._load.waiting

    def watch_engine(self, pid: Callable[[], int | None]) -> None:
        """Shows memory, CPU time and open files of the engine's process beside this one's."""
        ProcessCollector("tucka_engine", pid=pid, registry=self._processes)  # type: ignore[arg-type]

    def answered(self, route: str, method: str, code: str) -> None:
        """An HTTP request got its answer."""
        self._inc("http_requests", 1, route, method, code)

    # What happens to adapters.

    def load_took(self, seconds: Mapping[str, float]) -> None:
        """Stages of a load that took so long."""
        for stage, value in seconds.items():
            self._observe("load_duration_seconds", value, stage)

    def adapter_arrived(self, info: AdapterInfo) -> None:
        """An adapter has got its slot."""
        self.adapters.arrived(info)

    def adapter_left(self, key: AdapterKey) -> None:
        """An adapter has lost its slot."""
        self.adapters.left(key)

    def adapter_looked_up(self, tier: str) -> None:
        """A request named an adapter that was there."""
        self._inc("adapter_lookups", 1, tier)

    def adapter_waited(self, seconds: float) -> None:
        """A request waited so long for its adapter's slot."""
        self._observe("adapter_wait_seconds", seconds)

    def adapter_brought(self, transition: str, seconds: float) -> None:
        """The engine took so long to bring an adapter into its slot: from the disk ("load") or from the host cache
        ("activate")."""
        self._observe("adapter_transition_seconds", seconds, transition)

    def adapter_evicted(self, tier: str) -> None:
        """An adapter had to leave a slot, or the host cache, to another."""
        self._inc("adapter_evictions", 1, tier)

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
        if stats.drafts:
            for name in ("drafts", "draft_tokens", "accepted_tokens"):
                self._inc(name, getattr(stats, name))
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
        tiers: AdapterTiers = AdapterTiers(),
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
        resident, cached = len(tiers.resident), len(tiers.host)
        self._set("adapters_loaded", tiers.loaded)
        for tier, count in zip(TIERS, (resident, cached, max(tiers.loaded - resident - cached, 0)), strict=True):
            self._set("adapters", count, tier)
        self._set("adapter_host_bytes", tiers.host_bytes)
        self._set("adapters_awaited", tiers.awaited)
        self._set("adapters_combined", tiers.combined)
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
            asked = {name for name in self._in_flight if name in self.adapters} | tiers.awaited_names
            load = Load(
                running=running,
                waiting=waiting,
                kv_usage=used / blocks if blocks else 0.0,
                block_size=self._block_size,
                num_blocks=blocks,
                max_adapters=self._max_adapters,
                resident=tiers.resident,
                host=tiers.host,
                running_adapters=active,
                waiting_adapters=asked - active,
            )
            parts.append(self._vllm.render(load))
        return b"".join(parts)
