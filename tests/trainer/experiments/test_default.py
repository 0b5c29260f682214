"""The shipped default: small enough, and as good as its table says on a few held-out prompts."""

import json
from itertools import islice
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import tucka_runtime
from tucka_runtime.models.weights import fingerprint
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import set_route_scope
from tucka_runtime.trainer.adapter import router_of
from tucka_runtime.trainer.data import encode
from tucka_runtime.trainer.evaluate import evaluate
from tucka_runtime.trainer.experiments.tasks import TASKS

DEFAULT = Path(tucka_runtime.__file__).parent / "default"
TABLE = json.loads((DEFAULT / "table.json").read_text())


def test_sizes():
    assert (DEFAULT / "base/model.safetensors").stat().st_size <= 8_000_000
    kinds = [json.loads((DEFAULT / "adapters" / n / "adapter_config.json").read_text())["peft_type"] for n in TASKS]
    assert sorted(kinds) == ["LORA", "TUCKA", "TUCKA", "TUCKA"]
    for name in TASKS:
        assert (DEFAULT / "adapters" / name / "adapter_model.safetensors").stat().st_size <= 2**20


def test_table_keeps_its_promise():
    for row in TABLE["adapters"].values():
        assert row["base"] <= 0.2
        assert min(row["exact_match"].values()) >= 0.9


@pytest.mark.parametrize("name", list(TASKS))
def test_adapter_is_the_measured_one(name):
    training = json.loads((DEFAULT / "adapters" / name / "training.json").read_text())
    assert training["base_fingerprint"] == fingerprint(DEFAULT / "base")
    tokenizer = Tokenizer.load(DEFAULT / "base")
    assert tokenizer is not None
    base = AutoModelForCausalLM.from_pretrained(DEFAULT / "base")
    records = islice(TASKS[name].records(1, evaluation=True), 48)
    held = [
        encode(
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}], "task": t},
            tokenizer,
            256,
        )
        for p, a, t in records
    ]
    cpu = torch.device("cpu")
    assert evaluate(base, held, 0, cpu).exact <= 0.2
    model = peft.PeftModel.from_pretrained(base, str(DEFAULT / "adapters" / name))
    router = router_of(model)
    for scope in ("request", "decode") if router else ():
        set_route_scope(model, scope)
        assert evaluate(model, held, 0, cpu, router=router).exact >= 0.8  # 48 of the table's 200 prompts
    if router is None:
        assert evaluate(model, held, 0, cpu).exact >= 0.8
