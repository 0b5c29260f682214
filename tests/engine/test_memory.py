"""The memory for adapters: exact bytes, what a step needs is kept from them, and an engine with none left serves."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.support.banks import save_bank
from tests.support.driving import ask, build, prompt, run, save_lora, save_model, save_tucka
from tucka_runtime import machine
from tucka_runtime.adapters.format import Adapter, LoRAModule, LoRASpec, TuckAModule, read_adapter
from tucka_runtime.engine.adapters.fold import locate
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.engine.launched import Launched
from tucka_runtime.engine.memory import AdapterMemory
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.turns import whole
from tucka_runtime.errors import AdapterCapacityError
from tucka_runtime.machine import Memory
from tucka_runtime.messages import AdapterKey, Route
from tucka_runtime.models.weights import read_config


def key(number: int) -> AdapterKey:
    return AdapterKey(f"adapter-{number}", 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bytes_are_known_before_an_adapter_is_folded(tmp_path: Path, kind: str) -> None:
    """TuckA with a table of its router and without, pinned, with parameters of its own; LoRA."""
    save_model(tmp_path / "model", kind)
    engine = build(tmp_path / "model")
    attention, output = (("c_attn",), ("c_proj",)) if kind == "gpt2" else (("q_proj", "v_proj"), ("o_proj",))
    folders = [
        (save_tucka(tmp_path / "early", engine.layout, targets=attention), None),
        (save_tucka(tmp_path / "late", engine.layout, targets=output, r=6), None),
        (save_tucka(tmp_path / "pinned", engine.layout, targets=attention), Route(1, (0.5, 0.625))),
        (save_lora(tmp_path / "plain", engine.layout, targets=output, r=18), None),
    ]
    runner = engine.runner
    for number, (folder, pinned) in enumerate(folders):
        adapter = read_adapter(folder, engine.layout)
        kept, _ = folded_bytes(adapter, runner.arch, runner.dtype, runner.factor_dtype, pinned)
        assert kept == whole(runner.fold(key(number), adapter, pinned)).num_bytes


def test_256_adapters_of_a_llama_3_8b(tmp_path: Path) -> None:
    """All seven linears at r 16 in bf16: 84 MB an adapter, 21.5 GB in all."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path)
    _, arch = read_config(tmp_path)
    modules: dict[str, TuckAModule | LoRAModule] = {}
    for path, at in locate(arch).items():
        site = arch.sites[at.site]
        a, b = torch.empty(16, site.d_in, device="meta"), torch.empty(site.widths[at.target], 16, device="meta")
        modules[path] = LoRAModule(a, b, 1.0)
    spec = LoRASpec(r=16, lora_alpha=16)
    adapter = Adapter(spec, "", modules, router=None, ec=None, saved={}, training=None)
    kept, _ = folded_bytes(adapter, arch, torch.bfloat16, torch.bfloat16, None)
    assert 256 * kept == pytest.approx(21.5e9, rel=2e-3)


def test_what_a_step_takes_is_kept_from_adapters() -> None:
    memory = AdapterMemory(torch.device("cpu"), cache_bytes=1000)
    with memory.measuring():
        torch.ones(16 << 20)  # 64 MiB, gone at once
    assert 64 << 20 <= memory.step_bytes < 256 << 20
    assert memory.room is not None
    free = machine.memory().available
    with pytest.raises(AdapterCapacityError, match="left beside the KV cache"):
        memory.check(free - (32 << 20), 0)
    memory.check(1000, 1000)


@pytest.mark.parametrize("kernels", ["reference", pytest.param("native", marks=pytest.mark.native)])
def test_loads_are_refused_while_the_engine_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Adapters are loaded until one is refused; answers stay what they were, and an unloaded one makes room again."""
    save_model(tmp_path / "model")
    engine = build(tmp_path / "model", kernels=kernels)
    folder = save_lora(tmp_path / "plain", engine.layout, targets=("q_proj", "o_proj"), r=8)
    one = engine.load_adapter(key(0), folder).bytes
    adapter = read_adapter(folder, engine.layout)
    _, most = folded_bytes(adapter, engine.runner.arch, engine.runner.dtype, engine.runner.factor_dtype, None)
    memory = engine.runner.memory
    cache = sum(t.untyped_storage().nbytes() for pair in engine.runner.caches for t in pair)
    monkeypatch.setattr(
        machine, "memory", lambda: Memory(cache + memory.step_bytes + 2 * one + most + one // 2, "its cgroup")
    )
    engine.rehearsal.time_longest_step()
    assert memory.taken == one and memory.room == 3 * one + most + one // 2

    def answer() -> list[int]:
        return run(engine, ask(prompt(5), adapter=key(0)))[0][0].token_ids

    before = answer()
    for number in (1, 2):
        engine.load_adapter(key(number), folder)
    for number in (3, 4):  # one more would be folded in what is left, and leave a step too little
        with pytest.raises(AdapterCapacityError, match=r"its cgroup allows.*--kv-cache-tokens"):
            engine.load_adapter(key(number), folder)
    assert answer() == before
    engine.unload_adapter(key(1))
    engine.load_adapter(key(20), folder)
    assert answer() == before


def test_a_device_that_is_full_prepares_nothing_and_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in an idle moment means not now; it is tried again when other adapters are loaded."""
    save_model(tmp_path / "model")
    engine = build(tmp_path / "model")
    engine.overlap = True
    folder = save_lora(tmp_path / "plain", engine.layout)
    engine.load_adapter(key(0), folder)
    launch, tries = engine.runner.launch, 0

    def full(*_: object) -> Launched:
        nonlocal tries
        tries += 1
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.runner, "launch", full)
    assert not engine.rehearsal.prepare() and not engine.rehearsal.prepare()
    assert tries == 1
    monkeypatch.setattr(engine.runner, "launch", launch)
    run(engine, ask(prompt(5), adapter=key(0)))
    engine.load_adapter(key(1), folder)
    assert engine.rehearsal.prepare()
    assert not engine.rehearsal.prepare()


def test_a_bank_is_prepared_by_one_of_its_members(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    engine = build(tmp_path / "model")
    engine.overlap = True
    engine.load_adapter(key(0), save_bank(tmp_path / "bank", engine.layout, "full"))
    assert engine.rehearsal.prepare() and not engine.rehearsal.prepare()


@pytest.mark.parametrize(("length", "most"), [(128, 512), (2, 64), (1, 16)])
def test_the_longest_step_is_as_long_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, most: int
) -> None:
    """Where a context is shorter than a step may be, several prompts fill it, as far as there is room for them."""
    save_model(tmp_path / "model")
    engine = build(
        tmp_path / "model",
        max_model_len=length,
        max_num_batched_tokens=most,
        kv_cache_tokens=4096,
        max_num_seqs=min(64, most),
    )
    launch, rows = engine.runner.launch, list[int]()

    def counted(chunks: Sequence[ScheduledChunk]) -> Launched:
        rows.append(sum(chunk.count for chunk in chunks))
        return launch(chunks)

    monkeypatch.setattr(engine.runner, "launch", counted)
    engine.rehearsal.time_longest_step()
    assert max(rows) == most and not engine.busy
