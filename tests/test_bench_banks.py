"""The script that compares a bank's members with separate adapters, on a small model."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tucka_runtime import LLM
from tucka_runtime.bench import make_model, small
from tucka_runtime.bench_banks import SEPARATE, make_bank, make_lora, measure, show


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model", small(1, 64) | {"vocab_size": 200, "num_key_value_heads": 1}, torch.float32)
    llm = LLM(tmp_path / "model", kv_cache_tokens=2048)
    make_bank(tmp_path / "bank", llm.engine.layout, 4, 9, "diagonal")
    llm.load_adapter("bank", tmp_path / "bank")
    for number in range(SEPARATE):
        make_lora(tmp_path / "lora", llm.engine.layout, 4, number)
        llm.load_adapter(f"lora{number}", tmp_path / "lora")
    asked: set[str] = set()
    generate = llm.generate

    def noted(prompts, sampling, names):
        asked.update(filter(None, names))
        return generate(prompts, sampling, names)

    llm.generate = noted  # type: ignore[method-assign]
    found = measure(llm, 9, Namespace(rounds=1, requests=9, prompt=4, new=2))
    assert list(found) == ["base", "8 LoRAs", "1 members", "8 members", "9 members"]
    assert {f"bank/{i}" for i in range(9)} | {f"lora{i}" for i in range(8)} == asked
    show(found)
    said = capsys.readouterr().out
    assert all(name in said for name in found) and "1.000" in said
