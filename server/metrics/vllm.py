"""vLLM's names for what routers and dashboards in the field read: those of the Gateway API Inference Extension's
model-server protocol (its endpoint picker reads them as tests/server/metrics/test_vllm.py does), of its adapter
residency, and of vLLM's Grafana dashboards. They are the whole server's; no series is an adapter's but those of the
residency.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tucka_runtime.server.metrics.exposition import Family, head, label

GAUGES = {
    "vllm:num_requests_running": "sequences in the batch",
    "vllm:num_requests_waiting": "sequences accepted and not in the batch",
    "vllm:kv_cache_usage_perc": "share of the KV blocks in use, 0 to 1",
    "vllm:cache_config_info": "1; size and number of the KV blocks",
    "vllm:lora_requests_info": "when this changed last; adapters of running and of waiting requests",
    "vllm:max_gpu_lora_adapters": "adapters that can have a slot at once",
    "vllm:num_gpu_loaded_lora_adapters": "adapters that have a slot",
    "vllm:num_cpu_loaded_lora_adapters": "adapters that have a slot or are in the host cache",
    "vllm:lora_adapter_loaded": "1 while the adapter has a slot (gpu) or is in the host cache (cpu)",
}

# Ours that are vLLM's under another name, with what it calls their labels. Histograms keep our borders.
ALIASES: dict[str, tuple[str, ...]] = {
    "vllm:prompt_tokens_total": ("tucka_prompt_tokens_total",),
    "vllm:generation_tokens_total": ("tucka_generation_tokens_total",),
    "vllm:request_success_total": ("tucka_requests_total", "finished_reason"),
    "vllm:num_preemptions_total": ("tucka_preemptions_total",),
    "vllm:spec_decode_num_drafts_total": ("tucka_drafts_total",),
    "vllm:spec_decode_num_draft_tokens_total": ("tucka_draft_tokens_total",),
    "vllm:spec_decode_num_accepted_tokens_total": ("tucka_accepted_tokens_total",),
    "vllm:lora_adapter_load_seconds": ("tucka_adapter_transition_seconds", "transition"),
    "vllm:time_to_first_token_seconds": ("tucka_time_to_first_token_seconds",),
    "vllm:inter_token_latency_seconds": ("tucka_inter_token_seconds",),
    "vllm:time_per_output_token_seconds": ("tucka_inter_token_seconds",),  # the same, as vLLM called it before
    "vllm:e2e_request_latency_seconds": ("tucka_request_latency_seconds",),
    "vllm:request_queue_time_seconds": ("tucka_request_queue_seconds",),
    "vllm:request_prefill_time_seconds": ("tucka_request_prefill_seconds",),
    "vllm:request_decode_time_seconds": ("tucka_request_decode_seconds",),
    "vllm:request_prompt_tokens": ("tucka_request_prompt_tokens",),
    "vllm:request_generation_tokens": ("tucka_request_generation_tokens",),
}


@dataclass(frozen=True)
class Residence:
    """An adapter that has a slot or is in the host cache. `kept`: it always has one."""

    name: str
    rank: int
    kept: bool = False


@dataclass(frozen=True)
class Load:
    """The server at one moment. Adapters are named as requests name them; `kv_usage` is a share."""

    running: int
    waiting: int
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int
    resident: tuple[Residence, ...]
    host: tuple[Residence, ...]
    running_adapters: Collection[str]
    waiting_adapters: Collection[str]


class VLLMMetrics:
    """`families` are our own by name, with all of their series: those of ALIASES are shown again."""

    def __init__(self, model_name: str, families: Mapping[str, Family[Any]] | None = None):
        self._labels = label("model_name", model_name) + ',engine="0"'
        self._aliases: list[Callable[[], str]] = []
        if families is not None:
            self._aliases = [families[own].alias(name, self._labels, *names) for name, (own, *names) in ALIASES.items()]
        self._adapters: tuple[str, str] | None = None
        self._changed = 0.0
        self._loaded: tuple[object, str] = (((), ()), "")  # who is where, and the series that say so

    def render(self, load: Load) -> bytes:
        """The exposition text. One series of vllm:lora_requests_info exists at a time: readers take the latest."""
        adapters = (",".join(sorted(load.running_adapters)), ",".join(sorted(load.waiting_adapters)))
        if adapters != self._adapters:
            self._adapters, self._changed = adapters, time.time()
        labels = self._labels
        states = f'running_lora_adapters="{adapters[0]}",waiting_lora_adapters="{adapters[1]}"'
        info = f'max_lora="{load.max_adapters}",{states}'
        samples: dict[str, tuple[str, object]] = {
            "vllm:num_requests_running": (labels, load.running),
            "vllm:num_requests_waiting": (labels, load.waiting),
            "vllm:kv_cache_usage_perc": (labels, f"{load.kv_usage:.6f}"),
            "vllm:cache_config_info": (
                f'{labels},block_size="{load.block_size}",num_gpu_blocks="{load.num_blocks}"',
                1,
            ),
            "vllm:lora_requests_info": (info, f"{self._changed:.3f}"),
            "vllm:max_gpu_lora_adapters": (labels, load.max_adapters),
            "vllm:num_gpu_loaded_lora_adapters": (labels, len(load.resident)),
            "vllm:num_cpu_loaded_lora_adapters": (labels, len(load.resident) + len(load.host)),
        }
        if (load.resident, load.host) != self._loaded[0]:
            placed = [*((one, "gpu") for one in load.resident), *((one, "cpu") for one in load.host)]
            self._loaded = (load.resident, load.host), "".join([_loaded(labels, *one) for one in placed])
        parts = []
        for name, help in GAUGES.items():
            parts.append(head(name, "gauge", help))
            if name in samples:
                parts.append("{}{{{}}} {}\n".format(name, *samples[name]))
        return "".join([*parts, self._loaded[1], *[alias() for alias in self._aliases]]).encode()


def _loaded(labels: str, one: Residence, level: str) -> str:
    """The series of an adapter's residency."""
    own = f'adapter_name="{one.name}",level="{level}",pinned="{str(one.kept).lower()}",rank="{one.rank}"'
    return f"vllm:lora_adapter_loaded{{{labels},{own}}} 1\n"
