"""Every setting of the server, stated once: name, default, help. The CLI, the environment (`TUCKA_<FIELD>`) and
`--config file.yaml` all read these fields.
"""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from tucka_runtime.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8")
DEVICES = ("auto", "cpu", "cuda")
KERNELS = ("auto", "reference", "fused", "native")
SPECULATIONS = ("none", "ngram")
ROUTE_SCOPES = ("batch", "request", "prefix")
CALL_FORMATS = ("auto", "hermes", "llama3_json", "mistral", "json")
LOG_FORMATS = ("text", "json")


def _setting(default: Any, help: str, **extra: Any) -> Any:
    if isinstance(default, list | dict):
        raise TypeError("use a tuple: the configuration is frozen")
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs to know."""

    model: str | None = _setting(
        None,
        "folder of the base model, a GGUF file, or org/name as on the Hugging Face Hub, of its cache (default: the "
        "embedded one)",
        metavar="MODEL",
    )
    dtype: str = _setting("auto", "type of the weights; auto takes the one they are stored in", choices=DTYPES)
    device: str = _setting("auto", "where to run; auto takes the GPU if there is one", choices=DEVICES)
    kernels: str = _setting(
        "auto",
        "which kernels; auto takes the fused ones on a GPU, and on a CPU the native ones if they are built",
        choices=KERNELS,
    )
    max_model_len: int | None = _setting(None, "longest prompt plus answer in tokens (default: the model's own)")
    max_num_seqs: int = _setting(64, "most sequences in one batch")
    max_num_batched_tokens: int = _setting(2048, "most tokens in one forward pass; longer prompts go in chunks")
    decode_stretch: float = _setting(
        1.8,
        "how many times as long as without them prompts may make a decoding step; 0: they take all the tokens above",
    )
    speculate: str = _setting(
        "none",
        "ngram: draft what follows from earlier places of the same text, and verify several tokens in one forward pass",
        choices=SPECULATIONS,
    )
    speculate_tokens: int = _setting(5, "longest draft")
    speculate_min_ngram: int = _setting(2, "fewest last tokens that have to stand at the earlier place")
    speculate_max_ngram: int = _setting(4, "most of them that are looked for: the longest that are found are taken")
    max_queue: int = _setting(1024, "most sequences waiting; more are refused with 429")
    max_queue_seconds: int | None = _setting(
        None, "longest wait that a request may expect; where it would be longer it is refused with 429 (default: any)"
    )
    block_size: int = _setting(16, "tokens in one KV block")
    kv_cache_tokens: int | None = _setting(None, "tokens the KV cache holds (default: what memory allows)")
    kv_cache_dtype: str = _setting(
        "auto",
        "type of the KV cache; auto takes the weights', int8 holds some twice as many tokens, rounded",
        choices=KV_CACHE_DTYPES,
    )
    adapter_slots: int = _setting(
        256, "adapters that are ready for a batch at once; others come when they are asked for, in place of those"
    )
    adapter_host_bytes: int = _setting(
        2 * 2**30, "memory for adapters without a slot, which come back from there without being read and folded again"
    )
    adapter_wait_timeout: int = _setting(
        60, "seconds that a request waits for its adapter to get a slot, before it is refused with 503"
    )
    num_threads: int | None = _setting(
        None, "CPU threads for the engine (default: all cores; one for models narrower than 512)"
    )
    engine_timeout: int = _setting(
        30,
        "seconds without a sign of life, beyond the longest step seen, until a hanging engine is killed and restarted",
    )
    engine_start_timeout: int = _setting(600, "seconds that the engine may take to load the model")
    seed: int = _setting(
        0, "seed of the generator that requests without a seed draw theirs from: runs repeat, requests differ"
    )

    def __post_init__(self) -> None:
        _check_values(self)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_queue",
            "block_size",
            "adapter_slots",
            "adapter_wait_timeout",
            "engine_timeout",
            "engine_start_timeout",
            "speculate_tokens",
            "speculate_min_ngram",
        ):
            _check_at_least(self, name, 1)
        if self.decode_stretch and self.decode_stretch <= 1:
            raise ConfigError(f"decode_stretch must be over 1, or 0 for no limit, not {self.decode_stretch}.")
        _check_at_least(self, "speculate_max_ngram", self.speculate_min_ngram)
        _check_at_least(self, "adapter_host_bytes", 0)
        for name in ("max_model_len", "max_queue_seconds", "kv_cache_tokens", "num_threads"):
            if getattr(self, name) is not None:
                _check_at_least(self, name, 1)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs ({self.max_num_seqs}) exceeds max_num_batched_tokens ({self.max_num_batched_tokens}): "
                "every running sequence needs a token in each step. Lower the first or raise the second."
            )


@dataclass(frozen=True)
class ServerConfig:
    """What the API process needs to know."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on; 0 takes a free one")
    metrics_port: int | None = _setting(
        None, "port that answers /metrics, /health and /ready without a key, nothing else; 0 takes a free one"
    )
    served_model_name: tuple[str, ...] = _setting(
        (),
        "name of the base model in requests; repeatable, the first is that in metrics (default: its folder's name)",
        metavar="NAME",
    )
    download: bool = _setting(False, "fetch a --model org/name that is not in the cache from the Hugging Face Hub")
    adapter: tuple[str, ...] = _setting((), "adapter to load at start; repeatable", metavar="NAME=PATH")
    adapter_resident: tuple[str, ...] = _setting(
        (), "an --adapter of this name keeps its slot, whatever else is asked for; repeatable", metavar="NAME"
    )
    adapter_root: tuple[str, ...] = _setting(
        (), "folder below which adapters may be loaded over HTTP; repeatable (default: none may)", metavar="DIR"
    )
    adapter_source: tuple[str, ...] = _setting(
        (),
        "place that adapters may be loaded from as NAME:FOLDER; file:, s3:, gs:, https: or hf:; repeatable",
        metavar="NAME=URI",
    )
    adapter_resolve: tuple[str, ...] = _setting(
        (),
        "source in which a model that is not registered is looked for by its name; repeatable, in order",
        metavar="NAME",
    )
    adapter_watch: str | None = _setting(
        None,
        "folder whose adapters are loaded as they appear, by their folders' names, and unloaded as they leave",
        metavar="DIR",
    )
    adapters_file: str | None = _setting(
        None,
        "YAML file of adapters that are to be loaded and not to be (vLLMLoRAConfig), kept to while it changes",
        metavar="FILE",
    )
    adapter_versions: int = _setting(
        1, "newest contents of a name that are kept, with the one that it stands for: to ask for, and to roll back to"
    )
    adapter_defaults: bool = _setting(
        False,
        "use the chat template, the generation defaults and the added tokens in an adapter's folder for requests to "
        "it; templates are rendered where the base's is",
    )
    state_dir: str | None = _setting(
        None,
        "folder that keeps adapters loaded over HTTP across restarts (default: they are forgotten), and what is made "
        "of a GGUF file (default: the user's cache keeps it)",
        metavar="DIR",
    )
    route: str = _setting("batch", "route scope of requests that do not choose", choices=ROUTE_SCOPES)
    api_key: tuple[str, ...] = _setting((), "key that requests must carry; repeatable (default: open)", secret=True)
    admin_key: tuple[str, ...] = _setting(
        (), "key that adapter management must carry; repeatable (default: same as --api-key)", secret=True
    )
    api_key_file: str | None = _setting(
        None,
        "file of hashed keys with roles, adapters and limits, which `tucka keys` writes; read again on SIGHUP",
        metavar="FILE",
    )
    insecure: bool = _setting(False, "serve without keys on an address that others reach")
    audit_log: str | None = _setting(
        None, "append a line to this file for every change of adapters or keys that is asked for", metavar="FILE"
    )
    tool_call_parser: str = _setting(
        "auto", "format of calls of functions in answers; auto: the one of the chat template", choices=CALL_FORMATS
    )
    reasoning_parser: str = _setting(
        "auto",
        "what tells thoughts from answers: think is <think>...</think>; auto: that, if the chat template knows it",
        choices=("auto", "think", "none"),
    )
    strict: bool = _setting(False, "refuse fields that are unknown or without effect, instead of naming them")
    cors_origin: tuple[str, ...] = _setting(
        (),
        "origin whose pages may call the server from a browser, or *; repeatable (default: none)",
        metavar="ORIGIN",
    )
    docs: bool = _setting(True, "answer /openapi.json and /docs")
    console: bool = _setting(True, "answer GET / in a browser with a page to ask models and manage adapters")
    max_body_bytes: int = _setting(16 * 2**20, "largest request body")
    max_logprobs: int = _setting(20, "most alternatives a request may ask log-probabilities of")
    max_n: int = _setting(64, "most sequences (prompts x n) in one request")
    max_connections: int = _setting(1024, "most connections with a request at work; 64 more are for probes and admins")
    keep_alive_timeout: int = _setting(
        75, "seconds that an idle connection is kept: longer than a load balancer in front keeps it, which is often 60"
    )
    drain_delay: int = _setting(
        0, "seconds that a server told to stop goes on taking requests: until nobody sends any to what is not ready"
    )
    shutdown_timeout: int = _setting(30, "seconds that running requests get to finish when the server stops")
    sse_heartbeat: float = _setting(
        0.0, "seconds of silence after which a stream gets a comment, which keeps proxies from cutting it; 0: never"
    )
    vllm_metrics: bool = _setting(True, "show vLLM's metric names as well, which routers and dashboards read")
    log_format: str = _setting("text", "how log lines look", choices=LOG_FORMATS)
    log_prompts: bool = _setting(False, "put every request's prompt into its log line")
    otlp_traces_endpoint: str | None = _setting(
        None, "send a trace of every request there, as OTLP over HTTP; needs the extra otel", metavar="URL"
    )

    def __post_init__(self) -> None:
        _check_values(self)
        for name in ("adapter_versions", "max_body_bytes", "max_n", "max_connections", "keep_alive_timeout"):
            _check_at_least(self, name, 1)
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 0 <= port <= 65535:
                raise ConfigError(f"{name} must be between 0 and 65535; 0 takes a free one")
        if self.metrics_port and self.metrics_port == self.port:
            raise ConfigError("metrics_port is port itself: without a key it needs one of its own")
        for name in ("max_logprobs", "drain_delay", "shutdown_timeout", "sse_heartbeat"):
            _check_at_least(self, name, 0)
        for name in ("api_key", "admin_key"):
            if not all(key.strip() for key in getattr(self, name)):
                raise ConfigError(f"{name} holds an empty key, which anybody could send. Give a key, or leave it out.")
        if self.admin_key and not self.api_key and self.api_key_file is None:
            raise ConfigError("admin_key is set but api_key is not: inference would be open. Set both, or neither.")
        for origin in self.cors_origin:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError("cors_origin must be an origin, as https://app.example.org (no path), or *")
        if self.otlp_traces_endpoint is not None and not re.match(r"https?://[^/\s]", self.otlp_traces_endpoint):
            raise ConfigError("otlp_traces_endpoint must be a whole URL, as http://127.0.0.1:4318/v1/traces")


def _check_values(config: Any) -> None:
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{f.name} must be one of {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name} must be a finite number, not {value}.")


def _check_at_least(config: Any, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise ConfigError(f"{name} must be at least {least}")
