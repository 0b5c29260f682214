"""The script that prints what routed adapters reuse, on a small model."""

from pathlib import Path

import pytest
import torch

from tucka_runtime import LLM, Route
from tucka_runtime.bench import make_adapter, make_model, small
from tucka_runtime.bench_reuse import EVICTED, copy_blocks, measure, show


@pytest.mark.parametrize("targets", [["q_proj"], ["o_proj"]], ids=["routed by token", "routed inside the model"])
def test_what_is_reused(tmp_path: Path, targets: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Under the scope prefix as much as by a LoRA adapter, within 5 %, where the first prompt is as long as its route
    needs; under the scope request nothing, and nothing of what was evicted. Copied blocks are what they were."""
    make_model(tmp_path / "model", small(1, 64) | {"vocab_size": 200, "num_key_value_heads": 1}, torch.float32)
    llm = LLM(tmp_path / "model", kv_cache_tokens=16384)
    make_adapter(tmp_path / "adapter", llm.engine.layout, targets, 4, seed=0)
    llm.load_adapter("routed", tmp_path / "adapter")
    llm.load_adapter("fixed", tmp_path / "adapter", Route(0, (0.5, 0.5, 0.5)))
    found = measure(llm, 1)
    before = [cache[:112].clone() for pair in llm.engine.runner.caches for cache in pair]
    assert copy_blocks(llm, 100, 1)[0] == sum(cache.nbytes for cache in before)
    after = [cache[:112] for pair in llm.engine.runner.caches for cache in pair]
    assert all(map(torch.equal, before, after))
    show(found)
    said = capsys.readouterr().out
    for what, cases in found.items():
        assert what in said
        request, prefix, lora = (sum(t.prompt - t.computed for t in rounds[0]) for rounds in cases.values())
        if EVICTED in what:
            assert request == prefix == lora == 0
            continue
        assert request == 0 < lora
        if "first prompt" in what:
            assert 0.8 * lora < prefix < lora, "the second turn is computed anew"
        else:
            assert 0.95 * lora <= prefix <= lora
