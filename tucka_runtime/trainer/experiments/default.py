"""Remakes the embedded default from nothing: the base, its adapters, and the table that says what they can do.

    python -m tucka_runtime.trainer.experiments.default --out tucka_runtime/default

Everything comes from fixed seeds; one thread a process, so the outcome does not depend on how many cores there are.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tucka_runtime.children import python
from tucka_runtime.trainer.experiments.tasks import TASKS

TRAIN_RECORDS, HELD_RECORDS = 6000, 200
SEED = 0
BASE_STEPS = 1500

# Flags of `tucka train` for each adapter.
TUCKA = "--method tucka --r 16 --k 4 --t 2 --p 2 --alpha 64 --lr 5e-3 --route-batch mixed"
ADAPTERS = {
    "formats": f"{TUCKA} --steps 400",
    "words": f"{TUCKA} --steps 350",
    "triage": f"{TUCKA} --steps 200",
    "sql": "--method lora --r 8 --alpha 16 --lr 3e-3 --steps 250",
}
# 2 % of the training records choose the best step; the table's prompts are seen by nothing but the table.
COMMON = "--batch-size 32 --balance 0.01 --seed 0 --eval-fraction 0.02 --eval-every 50"


def make_base(out: Path, steps: int, log: Any) -> None:
    from tucka_runtime.trainer.experiments.base import build_tokenizer, pretrain, save_base

    tokenizer = build_tokenizer()
    save_base(pretrain(tokenizer, max_steps=steps, seed=SEED, log=log), tokenizer, out)


def measure_base(base: Path) -> dict[str, float]:
    from tucka_runtime.trainer.base_model import load_base
    from tucka_runtime.trainer.experiments.base import build_tokenizer, skill_table

    model, _, _ = load_base(base, "float32", "cpu")
    return skill_table(model, build_tokenizer())


def train_command(
    base: Path, work: Path, out: Path, name: str, steps: int | None, more: Sequence[str] = ()
) -> list[str]:
    """The training of one adapter, with `more` flags, which win over its own."""
    flags = f"{ADAPTERS[name]} {COMMON}".split()
    if steps is not None:
        flags += ["--steps", str(steps)]
    files = ("--model", str(base), "--data", str(work / f"{name}.jsonl"), "--out", str(out / name))
    return python("-m", "tucka_runtime.cli.train", *files, *flags, *more)


def train_all(
    base: Path,
    work: Path,
    out: Path,
    names: list[str],
    jobs: int,
    steps: int | None,
    log: Any,
    more: Sequence[str] = (),
) -> None:
    """Train the adapters, `jobs` at a time."""
    waiting = list(names)
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            command = train_command(base, work, out, name, steps, more)
            log(f"training {name}: tucka train ... {' '.join(command[10:])}")
            running[name] = subprocess.Popen(command, env=environment)
        time.sleep(0.2)
        for name in [n for n, p in running.items() if p.poll() is not None]:
            if running.pop(name).returncode:
                raise SystemExit(f"training {name} failed")


def measure(base: Path, adapter: Path, held: Path) -> dict[str, Any]:
    """Exact match of the base alone and of the adapter under each way of serving it; routes by sub-task."""
    import peft

    from tucka_runtime.trainer.adapter import router_of, trainable_parameters
    from tucka_runtime.trainer.base_model import load_base
    from tucka_runtime.trainer.data import load
    from tucka_runtime.trainer.evaluate import evaluate
    from tucka_runtime.trainer.experiments.together import serving_scopes
    from tucka_runtime.trainer.records import read

    model, tokenizer, device = load_base(base, "float32", "cpu")
    examples = load(read(held), tokenizer, 1024)
    pad = end = tokenizer.ends[0]  # padding is masked: any token does
    row: dict[str, Any] = {"base": evaluate(model, examples, pad, device).exact}
    model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
    row["parameters"] = trainable_parameters(model)
    row["bytes"] = (adapter / "adapter_model.safetensors").stat().st_size
    router = router_of(model)
    if router is None:
        result = evaluate(model, examples, pad, device)
        return row | {"exact_match": {"lora": result.exact}, "by_task": result.by_task}
    exact, result = serving_scopes(model, router, examples, pad, end)
    return row | {"exact_match": exact, "by_task": result.by_task, "groups_by_task": result.groups}


def show(table: dict[str, Any]) -> str:
    """The table as text."""
    lines = ["base, its own skills (exact match): " + ", ".join(f"{k} {v:.2f}" for k, v in table["skills"].items()), ""]
    lines.append(
        f"{'adapter':<10}{'kind':<7}{'params':>9}{'KiB':>6}{'base':>7}  exact match of the adapter on held-out prompts"
    )
    for name, row in table["adapters"].items():
        exact = "  ".join(f"{scope} {value:.3f}" for scope, value in row["exact_match"].items())
        kind = "lora" if "lora" in row["exact_match"] else "tucka"
        lines.append(f"{name:<10}{kind:<7}{row['parameters']:>9,}{row['bytes'] // 1024:>6}{row['base']:>7.3f}  {exact}")
    lines += ["", "routes of whole prompts, by sub-task (how many took group 0, 1, ...)"]
    for name, row in table["adapters"].items():
        for task, counts in row.get("groups_by_task", {}).items():
            lines.append(
                f"{name:<10}{task:<12}{' '.join(f'{c:>5}' for c in counts)}   exact {row['by_task'][task]:.3f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tucka_runtime.trainer.experiments.default", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, adapters/ and table.json")
    parser.add_argument("--keep-base", action="store_true", help="use the base that is in --out already")
    parser.add_argument(
        "--only", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS), help="adapters to train anew"
    )
    parser.add_argument("--jobs", type=int, default=2, help="adapters trained at once")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--steps", type=int, help="steps of every adapter (for a quick trial)")
    parser.add_argument("--figures", type=Path, help="folder that gets each training's picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {text}", flush=True)

    base, adapters, path = args.out / "base", args.out / "adapters", args.out / "table.json"
    if not args.keep_base:
        make_base(base, args.base_steps, log)
    table: dict[str, Any] = {"skills": measure_base(base), "adapters": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ADAPTERS:
            TASKS[name].write(work, SEED, TRAIN_RECORDS, HELD_RECORDS)
        train_all(base, work, work / "out", args.only, args.jobs, args.steps, log)
        for name in args.only:
            (adapters / name).mkdir(parents=True, exist_ok=True)
            for file in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
                shutil.copyfile(work / "out" / name / file, adapters / name / file)
            if args.figures:
                args.figures.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(work / "out" / name / "training.png", args.figures / f"default-{name}.png")
        for name in ADAPTERS:
            if (adapters / name).is_dir():
                log(f"measuring {name}")
                table["adapters"][name] = measure(base, adapters / name, work / f"{name}.held.jsonl")
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(show(table))
    log("done")


if __name__ == "__main__":
    main()
