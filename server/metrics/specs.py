"""The families of series on /metrics, but those of adapters by name (adapters.py) and vLLM's (vllm.py).

Every label takes its values from a closed set: routes, codes, finish reasons, stages, tiers. docs/operations.md lists
every series; a test compares it with this file.
"""

from dataclasses import dataclass

# Borders are those that objectives are set on: a share below one of them is exact.
TTFT_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1)
LATENCY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120)
LOAD_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHANGES = (0, 1, 2, 5, 10, 20, 50, 100)
TIERS = ("resident", "host", "registered")
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
    _counter("drafts", "drafts of what follows that were verified"),
    _counter("draft_tokens", "tokens of those"),
    _counter("accepted_tokens", "tokens of drafts that were right"),
    _histogram("step_duration_seconds", "one step, all stages", STEP_SECONDS),
    _histogram("batch_tokens", "tokens in a step", POWERS),
    _histogram("batch_sequences", "sequences in a step", POWERS[:10]),
    _histogram("batch_adapters", "adapters in a step", (0, *POWERS[:8])),
    _gauge("kv_blocks_used", "KV blocks in use"),
    _gauge("kv_blocks", "KV blocks there are"),
    _counter("preemptions", "sequences set back to make room"),
    _counter("displacements", "sequences set back for another flow's turn"),
    _gauge("adapters_loaded", "adapters that names stand for"),
    _gauge("adapters", "the same by where they are", "tier"),
    _gauge("adapter_host_bytes", "bytes of adapters in the host cache"),
    _gauge("adapters_awaited", "requests that wait for their adapter to get a slot"),
    _gauge("adapters_combined", "combinations of adapters that are resident"),
    _counter("adapter_lookups", "requests that named an adapter, by where it was", "tier"),
    _histogram("adapter_wait_seconds", "a request's wait for its adapter to get a slot", LOAD_SECONDS),
    _histogram("adapter_transition_seconds", "an adapter on its way into its slot", LOAD_SECONDS, "transition"),
    _counter("adapter_evictions", "adapters that had to leave a tier to others", "tier"),
    _gauge("adapters_lost", "adapters that were loaded, not unloaded, and cannot be brought back"),
    _gauge("adapter_slots", "adapters that can be resident"),
    _histogram("load_duration_seconds", "loads of adapters, by stage", LOAD_SECONDS, "stage"),
    _counter("load_failures", "loads refused or failed, by the error's code", "code"),
)
