"""vLLM's names for what routers and dashboards in the field read: those of the Gateway API Inference Extension's
model-server protocol (its endpoint picker reads them as tests/test_vllm_metrics.py does) and of its adapter residency.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass

from tucka_runtime.exposition import head, label

GAUGES = {
    "vllm:num_requests_running": "sequences in the batch",
    "vllm:num_requests_waiting": "sequences accepted and not in the batch",
    "vllm:kv_cache_usage_perc": "share of the KV pages in use, 0 to 1",
    "vllm:cache_config_info": "1; size and number of the KV pages",
    "vllm:lora_requests_info": "when this changed last; adapters of running and of waiting requests",
    "vllm:max_gpu_lora_adapters": "adapters that can be loaded",
    "vllm:num_gpu_loaded_lora_adapters": "adapters loaded",
    "vllm:num_cpu_loaded_lora_adapters": "adapters loaded: there is no other tier",
    "vllm:lora_adapter_loaded": "1 while the adapter is loaded",
}


@dataclass(frozen=True)
class Load:
    """The server at one moment. Adapters are named as requests name them; `kv_usage` is a share."""

    running: int
    waiting: int
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int
    loaded: list[str]
    running_adapters: Collection[str]
    waiting_adapters: Collection[str]


class VLLMMetrics:
    """Adapters stay loaded until they are unloaded by name, so all are in level "gpu" and pinned."""

    def __init__(self, model_name: str):
        self._labels = label("model_name", model_name) + ',engine="0"'
        self._adapters: tuple[str, str] | None = None
        self._changed = 0.0
        self._loaded: tuple[list[str], str] = ([], "")  # names, and the series that say so

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
            "vllm:num_gpu_loaded_lora_adapters": (labels, len(load.loaded)),
            "vllm:num_cpu_loaded_lora_adapters": (labels, len(load.loaded)),
        }
        if load.loaded != self._loaded[0]:
            series = f'vllm:lora_adapter_loaded{{{labels},adapter_name="%s",level="gpu",pinned="true"}} 1\n'
            self._loaded = (load.loaded, "".join([series.replace("%s", name) for name in load.loaded]))
        parts = []
        for name, help in GAUGES.items():
            parts.append(head(name, "gauge", help))
            if name in samples:
                parts.append("{}{{{}}} {}\n".format(name, *samples[name]))
        return "".join([*parts, self._loaded[1]]).encode()
