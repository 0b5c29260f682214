"""A small base, records and `tucka train` on them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tucka_runtime.cli import train as cli
from tucka_runtime.trainer.experiments.base import build_model, build_tokenizer, save_base

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_base() -> Any:
    torch.manual_seed(0)
    return build_model(**SIZES, num_key_value_heads=2)


def records(n: int = 24) -> list[dict[str, str]]:
    """Two sub-tasks that a few steps can learn."""
    return [
        {"prompt": f"{'number' if i % 2 else 'letter'} {i}:", "completion": "1" if i % 2 else "a", "task": "ab"[i % 2]}
        for i in range(n)
    ]


def make_workplace(folder: Path) -> Path:
    """The folder with `base` and `data.jsonl` in it."""
    save_base(small_base(), build_tokenizer(), folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    return folder


def flags_of(folder: Path, *flags: str) -> list[str]:
    required = ["--model", str(folder / "base"), "--data", str(folder / "data.jsonl"), "--out", str(folder / "out")]
    return [*required, "--batch-size", "8", "--r", "4", *flags]


def train(folder: Path, *flags: str, given: Sequence[str] | None = None) -> int:
    """Runs the command in this process, after the flags of `flags_of`, or of `given` instead; returns its exit
    status."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(flags_of(folder, *flags) if given is None else [*given, *flags]))
