"""What the engine tells of itself, its adapters and its steps. Standard library only: it crosses the process border."""

from dataclasses import dataclass, field
from typing import Any

from tucka_runtime.sequence import AdapterKey, Route


@dataclass(frozen=True)
class EngineInfo:
    """The model as it is served. `fingerprint` is weights.fingerprint's."""

    model_type: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    kv_cache_tokens: int
    fingerprint: str
    max_num_batched_tokens: int


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter. `kind` is "tucka" or "lora". `scope` is what it is served with unless the request says so:
    "pinned" where its route is fixed, which no request changes; what its manifest says it was trained for ("route");
    or None. `bytes` are those of its tensors on the device; `training` is its manifest; `load_seconds` what each stage
    of loading it took."""

    key: AdapterKey
    digest: str
    kind: str
    r: int
    k: int | None
    t: int | None
    p: int | None
    alpha: float
    target_modules: tuple[str, ...]
    num_modules: int
    router: str | None
    scope: str | None
    bytes: int
    training: dict[str, Any] | None
    load_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step in figures. `schedule` to `output` are seconds on the host: choosing the work, packing the batch, routes
    and cores, the layers, choosing tokens, booking them. `routes` has every routed segment's adapter and route;
    `preemptions` counts since the start; `sequences` and `active` are those of this step, the latter their adapters."""

    schedule: float
    batch: float
    route: float
    forward: float
    sample: float
    output: float
    prefill_tokens: int
    decode_tokens: int
    adapters: int
    routes: tuple[tuple[AdapterKey, Route], ...]
    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    preemptions: int
    sequences: int = 0
    active: tuple[AdapterKey, ...] = ()
