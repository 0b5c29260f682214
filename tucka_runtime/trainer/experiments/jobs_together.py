"""Eight trainings together beside the same ones one after another: seconds, and that the results are the same.

    python -m tucka_runtime.trainer.experiments.jobs_together --steps 30 --rounds 3

`commands`: `tucka train` for each of the jobs beside one `tucka train --jobs`, as a user waits for them: Python's
start, the data, held-out figures and writing included. `steps`: the optimiser steps alone, in one process. The ways
take turns, so that a busy machine is unfair to nobody. `mixed` jobs are four TuckA and four LoRA adapters for all tasks
of the embedded adapters, `sweep` jobs are eight learning rates for one LoRA adapter.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tucka_runtime.children import python
from tucka_runtime.embedded import FOLDER
from tucka_runtime.trainer.experiments.tasks import TASKS

COUNT = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("steps", 30), ("rounds", 3), ("batch-size", 8), ("records", 400)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kinds", nargs="+", choices=("mixed", "sweep"), default=["mixed", "sweep"])
    args = parser.parse_args()
    print(f"{'jobs':<6} {'what':<9} {'one by one':>11} {'together':>9} {'times':>6}  largest difference of a last loss")
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as place:
            _compare(kind, args, Path(place))
    return 0


def _compare(kind: str, args: argparse.Namespace, place: Path) -> None:
    jobs = _jobs(kind, args, place)
    (place / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}, sort_keys=False))
    alone: list[float] = []
    together: list[float] = []
    inside: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(args.rounds):
        alone.append(sum(_command("--config", _config(place, name, job), "--out", place / f"{name}-alone")
                         for name, job in jobs.items()))  # fmt: skip
        together.append(_command("--jobs", place / "jobs.yaml"))
        for way, seconds in inside.items():
            seconds.append(_steps(jobs, way))
    losses = [[_loss(place / f"{name}{end}") for name in jobs] for end in ("", "-alone")]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    for what, a, b in (("commands", alone, together), ("steps", inside["alone"], inside["together"])):
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        said = f"{statistics.median(a):9.1f} s {statistics.median(b):7.1f} s {ratio:5.2f}x"
        print(f"{kind:<6} {what:<9} {said}  {apart:.1e}", flush=True)


def _jobs(kind: str, args: argparse.Namespace, place: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    names = list(TASKS)
    for i in range(COUNT):
        task = names[i % len(names)] if kind == "mixed" else names[0]
        data = place / f"{task}.jsonl"
        rows = islice(TASKS[task].records(0, False), args.records)
        data.write_text("".join(json.dumps({"prompt": f"{p} =>", "completion": f" {a}"}) + "\n" for p, a, _ in rows))
        method = "tucka" if kind == "mixed" and i < COUNT // 2 else "lora"
        found[f"{task}-{i}"] = {
            "data": str(data), "out": str(place / f"{task}-{i}"), "method": method, "batch_size": args.batch_size,
            "lr": 1e-3 if kind == "mixed" else 1e-4 * (i + 1), "steps": args.steps, "overwrite": True,
            "eval_every": args.steps, "checkpoint_every": 0, "eval_fraction": 0.1,
        }  # fmt: skip
    return found


def _config(place: Path, name: str, job: dict[str, Any]) -> Path:
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def _command(*flags: Any) -> float:
    started = time.monotonic()
    done = subprocess.run(
        python("-m", "tucka_runtime.cli.train", *map(str, flags)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - started


def _loss(folder: Path) -> float:
    loss: float = json.loads((folder / "training.json").read_text())["final_loss"]
    return loss


def _steps(jobs: dict[str, dict[str, Any]], way: str) -> float:
    """Seconds of the optimiser steps alone, with the threads that the command takes."""
    import torch

    from tucka_runtime import machine
    from tucka_runtime.trainer.adapter import AdapterSettings, attach, router_of, seed_all
    from tucka_runtime.trainer.base_model import load_model, load_tokenizer
    from tucka_runtime.trainer.data import load
    from tucka_runtime.trainer.jobs import Job, Together
    from tucka_runtime.trainer.loop import Loop, LoopConfig
    from tucka_runtime.trainer.records import read
    from tucka_runtime.trainer.shared import clone

    cpu, folder = torch.device("cpu"), FOLDER / "base"
    base, tokenizer = load_model(folder, "float32", cpu), load_tokenizer(folder)
    loops = {}
    for name, job in jobs.items():
        alpha = 64.0 if job["method"] == "tucka" else 16.0
        model = attach(clone(base), AdapterSettings(method=job["method"], alpha=alpha), 0)
        seed_all(0)
        examples = load(read(Path(job["data"])), tokenizer, 512)
        config = LoopConfig(steps=job["steps"], batch_size=job["batch_size"], lr=job["lr"], route_batch="mixed")
        loops[name] = Loop(model, examples, [], config, pad=0, device=cpu, router=router_of(model))
    cores = machine.cores().count
    torch.set_num_threads(cores if way == "together" else machine.threads(base.config.hidden_size, cores))
    started = time.monotonic()
    if way == "together":
        Together(base, [Job(name, loop) for name, loop in loops.items()], lambda job: None).run()
    else:
        for loop in loops.values():
            loop.run()
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
