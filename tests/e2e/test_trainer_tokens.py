"""What was trained on a base of SentencePiece's kind is what its answers say, to the first character."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from tests.support.tokenizer_families import as_transformers
from tucka_runtime import LLM, SamplingParams
from tucka_runtime.cli import train
from tucka_runtime.trainer.experiments.base import build_model, save_base

SIZES = {
    "vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("family", ["metaspace first", "prepend (Llama 2)"])
def test_answers_are_the_completions_that_were_trained(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    save_base(build_model(**SIZES), as_transformers(family, before="<s>"), tmp_path / "base")
    records = [(f"date {i}", "5 March 2024" if i % 2 else "yes") for i in range(8)]
    with (tmp_path / "data.jsonl").open("w") as lines:
        for prompt, answer in records:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    paths = [("--model", "base"), ("--data", "data.jsonl"), ("--eval-data", "data.jsonl"), ("--out", "adapter")]
    flags = [part for flag, name in paths for part in (flag, str(tmp_path / name))]
    more = ("--method", "lora", "--steps", "40", "--batch-size", "8", "--r", "8", "--lr", "2e-2")
    assert train.run(parser.parse_args([*flags, *more])) == 0
    measured = json.loads((tmp_path / "adapter" / "training.json").read_text())["eval"]["exact_match"]

    llm = LLM(tmp_path / "base", adapters={"own": tmp_path / "adapter"}, device="cpu", kv_cache_tokens=4096)
    asked = [[{"role": "user", "content": prompt}] for prompt, _ in records]
    said = llm.chat(asked, SamplingParams(temperature=0, max_tokens=40), adapter="own")
    right = [output.outputs[0].text == answer for output, (_, answer) in zip(said, records, strict=True)]
    assert sum(right) / len(right) == measured >= 0.5
