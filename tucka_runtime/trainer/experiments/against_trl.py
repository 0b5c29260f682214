"""The same LoRA training here and with TRL's SFTTrainer: tokens per second, and the loss that comes of it.

    pip install trl
    python -m tucka_runtime.trainer.experiments.against_trl --steps 30 --rounds 3

Same base, same token ids, rank, alpha, layers, batch size, AdamW, warm-up and cosine; fp32. Every run is a process of
its own with the same threads, and the ways take turns, so that a busy machine is unfair to nobody. Tokens are those of
prompts and completions, never padding; the clock runs over the steps alone. TRL's packing fills rows of --max-length by
its own best fit and so takes more records a step: its loss is not comparable step by step. Ours has the same batches
packed or not, and so the same loss.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

from tucka_runtime.children import python
from tucka_runtime.embedded import FOLDER

WAYS = ("tucka", "tucka packed", "trl", "trl packed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER / "base", help="folder of the base")
    parser.add_argument("--data", type=Path, help="records (default: those of the embedded adapters' tasks)")
    for name, value in (
        ("steps", 30),
        ("batch-size", 16),
        ("r", 8),
        ("max-length", 512),
        ("threads", 1),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # what a child process runs
    args = parser.parse_args()
    if args.way:
        print(json.dumps(_run(args)))
        return 0
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            command = python("-m", __spec__.name, *sys.argv[1:], "--way", way)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'way':<14} {'tok/s':>8} {'of TRL':>7} {'loss, first':>12} {'loss, last':>11}")
    floor = statistics.median(run["speed"] for run in found["trl"])
    for way, runs in found.items():
        speed = statistics.median(run["speed"] for run in runs)
        print(f"{way:<14} {speed:8.0f} {speed / floor:6.2f}x {runs[0]['first']:12.4f} {runs[0]['last']:11.4f}")
    return 0


def _run(args: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(args.threads)
    examples = _examples(args)
    tokens, seconds, losses = (_tucka if args.way.startswith("tucka") else _trl)(args, examples)
    some = max(1, len(losses) // 6)
    return {
        "speed": tokens / seconds, "first": statistics.mean(losses[:some]), "last": statistics.mean(losses[-some:]),
    }  # fmt: skip


def _examples(args: argparse.Namespace) -> list[Any]:
    from tucka_runtime.trainer.base_model import load_tokenizer
    from tucka_runtime.trainer.data import encode, load
    from tucka_runtime.trainer.experiments.tasks import TASKS
    from tucka_runtime.trainer.records import read

    tokenizer = load_tokenizer(args.model)
    if args.data:
        return load(read(args.data), tokenizer, args.max_length)
    found = []
    for task in TASKS.values():
        for prompt, answer, _ in islice(task.records(0, False), args.steps * args.batch_size // len(TASKS) + 1):
            record = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            found.append(encode({"messages": record}, tokenizer, args.max_length))
    return found


def _tucka(args: argparse.Namespace, examples: list[Any]) -> tuple[int, float, list[float]]:
    import torch

    from tucka_runtime.trainer import base_model
    from tucka_runtime.trainer.adapter import AdapterSettings, attach
    from tucka_runtime.trainer.loop import Loop, LoopConfig

    cpu = torch.device("cpu")
    packed = args.way.endswith("packed")
    base = base_model.load_model(args.model, "float32", cpu)
    base_model.prepare(base, packed, False)
    model = attach(base, AdapterSettings(method="lora", r=args.r, alpha=2 * args.r), 0)
    config = LoopConfig(
        steps=args.steps, batch_size=args.batch_size, lr=args.lr, packing=packed
    )  # fmt: skip
    loop = Loop(model, examples, [], config, pad=0, device=cpu)
    tokens = 0

    class Count:
        def step(self, step: Any) -> None:
            nonlocal tokens
            tokens += step.tokens

    loop.progress = Count()  # type: ignore[assignment]
    started = time.monotonic()
    losses = loop.run().loss
    return tokens, time.monotonic() - started, losses


def _trl(args: argparse.Namespace, examples: list[Any]) -> tuple[int, float, list[float]]:
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    warnings.simplefilter("ignore")
    rows = [
        {"input_ids": list(e.ids), "completion_mask": [0] * e.start + [1] * (len(e.ids) - e.start)} for e in examples
    ]
    packed = args.way.endswith("packed")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
            lr_scheduler_type="cosine", warmup_steps=max(1, round(0.05 * args.steps)), max_grad_norm=1.0, seed=0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True, max_length=args.max_length, packing=packed, completion_only_loss=True,
        )  # fmt: skip
        lora = peft.LoraConfig(
            r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM"
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"), args=config,
            train_dataset=Dataset.from_list(rows), peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )  # fmt: skip
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return int(logs[-1]["num_tokens"]), seconds, [entry["loss"] for entry in logs]


if __name__ == "__main__":
    sys.exit(main())
