"""vLLM's metric names, read as routers read them: a port of the rules by which the endpoint picker of the Gateway API
Inference Extension (llm-d-router's core metrics extractor) turns a scrape into what it schedules by.

The scrapes in tests/golden/scrapes are this server's own; `python -m tests.server.metrics.test_vllm` writes them again.
"""

from dataclasses import dataclass, field

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support import GOLDEN
from tucka_runtime.server.metrics import vllm as vllm_metrics
from tucka_runtime.server.metrics.vllm import GAUGES, Load, Residence, VLLMMetrics

SCRAPES = GOLDEN / "scrapes"
NOW = 1_700_000_000.0
FIN_TAX, LAW = (Residence("fin", 8), Residence("tax", 64)), (Residence("law", 16),)
LOADS = {
    "idle": Load(0, 0, 0.0, 16, 1088, 256, (), (), (), ()),
    "loaded": Load(0, 0, 0.0, 16, 1088, 256, (Residence("fin", 8, True), Residence("org/law.v2", 16)), (), (), ()),
    "busy": Load(3, 2, 0.25, 16, 1088, 4, FIN_TAX, LAW, ("fin", "tax"), ("law",)),
}


@dataclass
class Endpoint:
    """What the picker knows of a server. `loaded_models` None: it does not tell."""

    waiting_queue_size: int = 0
    running_requests_size: int = 0
    kv_cache_usage: float = 0.0
    active_models: set[str] = field(default_factory=set)
    waiting_models: set[str] = field(default_factory=set)
    max_active_models: int = 0
    block_size: int = 0
    num_gpu_blocks: int = 0
    loaded_models: dict[str, tuple[str, bool, int]] | None = None
    gpu_loaded_models: int = 0
    base_model: str = ""


def families(text: str) -> dict[str, Metric]:
    """By name, as Go's parser reads them: a family's lines stand together, and none comes twice."""
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "second TYPE line"
    current, seen = "", set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            current = line.split()[2]
            assert current not in seen
            seen.add(current)
        elif not line.startswith("#"):
            assert line.split("{")[0] == current, "a sample outside of its family"
    return {family.name: family for family in text_string_to_metric_families(text)}


def extract(text: str) -> Endpoint:
    """The extractor. Raises KeyError where it would count an error: a family that must be there and is not."""
    scrape, found = families(text), Endpoint()

    def latest(name: str) -> Sample:
        # By sample timestamp; without timestamps, the first.
        samples = scrape[name].samples
        return max(samples, key=lambda sample: float(sample.timestamp or 0))

    found.waiting_queue_size = int(latest("vllm:num_requests_waiting").value)
    found.running_requests_size = int(latest("vllm:num_requests_running").value)
    found.kv_cache_usage = latest("vllm:kv_cache_usage_perc").value
    cache = latest("vllm:cache_config_info").labels
    found.block_size, found.num_gpu_blocks = int(cache["block_size"]), int(cache["num_gpu_blocks"])
    if (info := scrape.get("vllm:lora_requests_info")) is not None:
        # Each set of adapters is a series of its own; the value is the time it came up, and the greatest is current.
        current = max(info.samples, key=lambda sample: sample.value).labels
        found.active_models = adapters(current["running_lora_adapters"])
        found.waiting_models = adapters(current["waiting_lora_adapters"])
        if current["max_lora"]:
            found.max_active_models = int(current["max_lora"])
    residency(scrape, found)
    if (slots := scrape.get("vllm:max_gpu_lora_adapters")) is not None:
        found.max_active_models = int(max(sample.value for sample in slots.samples))
    return found


def adapters(joined: str) -> set[str]:
    return {name.strip() for name in joined.split(",") if name.strip()}


def residency(scrape: dict[str, Metric], found: Endpoint) -> None:
    """Adapters in the cache. The count's presence alone says that the server tells; 0 is absent; gpu outranks cpu."""
    loaded, count = scrape.get("vllm:lora_adapter_loaded"), scrape.get("vllm:num_gpu_loaded_lora_adapters")
    if loaded is None and count is None:
        return
    found.loaded_models = {}
    for sample in loaded.samples if loaded else ():
        name = sample.labels.get("adapter_name", "")
        if not name or not sample.value:
            continue
        level, pinned = sample.labels["level"], sample.labels["pinned"] == "true"
        rank = int(label) if (label := sample.labels.get("rank", "")).isdigit() else 0
        before = found.loaded_models.get(name, ("cpu", False, 0))
        level = "gpu" if "gpu" in (level, before[0]) else "cpu"
        found.loaded_models[name] = (level, pinned or before[1], rank or before[2])
    levels = [level for level, *_ in found.loaded_models.values()]
    found.gpu_loaded_models = levels.count("gpu")
    if count is not None and count.samples:
        found.gpu_loaded_models = int(max(sample.value for sample in count.samples))
        found.base_model = count.samples[0].labels.get("model_name", "")


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [NOW]
    monkeypatch.setattr(vllm_metrics.time, "time", lambda: clock[0])
    return clock


@pytest.mark.parametrize("name", LOADS)
def test_golden_scrapes(name: str) -> None:
    assert VLLMMetrics("llama").render(LOADS[name]).decode() == (SCRAPES / f"{name}.txt").read_text()


def test_idle() -> None:
    expected = Endpoint(
        max_active_models=256, block_size=16, num_gpu_blocks=1088, loaded_models={}, base_model="llama"
    )  # fmt: skip
    assert extract((SCRAPES / "idle.txt").read_text()) == expected


def test_adapters_that_nobody_asks_for_are_known_to_be_there() -> None:
    found = extract((SCRAPES / "loaded.txt").read_text())
    assert found.loaded_models == {"fin": ("gpu", True, 8), "org/law.v2": ("gpu", False, 16)}
    assert (found.gpu_loaded_models, found.active_models, found.waiting_models) == (2, set(), set())


def test_busy() -> None:
    found = extract((SCRAPES / "busy.txt").read_text())
    assert (found.running_requests_size, found.waiting_queue_size, found.kv_cache_usage) == (3, 2, 0.25)
    assert (found.active_models, found.waiting_models) == ({"fin", "tax"}, {"law"})
    assert found.max_active_models == 4
    assert found.loaded_models == {"fin": ("gpu", False, 8), "tax": ("gpu", False, 64), "law": ("cpu", False, 16)}
    assert found.gpu_loaded_models == 2


def test_the_info_carries_the_time_of_its_last_change(frozen: list[float]) -> None:
    metrics = VLLMMetrics("llama")

    def info(name: str) -> float:
        (sample,) = families(metrics.render(LOADS[name]).decode())["vllm:lora_requests_info"].samples
        return sample.value

    assert info("idle") == NOW
    frozen[0] += 5
    assert info("loaded") == NOW  # nobody runs or waits in either
    assert info("busy") == NOW + 5


def test_all_are_gauges_and_documented_here() -> None:
    scrape = families((SCRAPES / "busy.txt").read_text())
    assert set(scrape) == set(GAUGES)
    assert {family.type for family in scrape.values()} == {"gauge"}


if __name__ == "__main__":
    vllm_metrics.time.time = lambda: NOW
    for name, load in LOADS.items():
        (SCRAPES / f"{name}.txt").write_bytes(VLLMMetrics("llama").render(load))
