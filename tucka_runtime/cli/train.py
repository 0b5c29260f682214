"""`tucka train`: a JSONL file and a base model in, an adapter out."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tucka_runtime.client import KEY_VARIABLES, Client
from tucka_runtime.embedded import FOLDER
from tucka_runtime.errors import ConfigError, TuckaError

if TYPE_CHECKING:
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.evaluate import Evaluation
    from tucka_runtime.trainer.loop import Loop, LoopConfig

CHECKPOINT = "checkpoint.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tucka train`; imports nothing heavy."""
    a = parser.add_argument
    d = "(default: %(default)s)"
    a("--model", type=Path, metavar="DIR", help="folder of the base model (default: the embedded one)")
    a("--data", type=Path, required=True, metavar="JSONL", help="records: prompt/completion, or chat messages")
    a("--out", type=Path, required=True, metavar="DIR", help="folder of the adapter")
    a("--eval-data", type=Path, metavar="JSONL", help="held-out records (default: a share of --data)")
    a("--eval-fraction", type=float, default=0.1, help=f"share of --data that is held out {d}")
    a("--max-length", type=int, default=1024, help=f"longest record in tokens; longer ones are refused {d}")
    a("--method", choices=("tucka", "lora"), default="tucka", help=f"kind of adapter {d}")
    a("--r", type=int, default=8, help=f"rank {d}")
    a("--k", type=int, default=4, help=f"expert groups {d}")
    a("--t", type=int, default=2, help=f"experts in a group {d}")
    a("--p", type=int, default=2, help=f"slices of the core that a group shares {d}")
    a("--alpha", type=float, help="scale of the change; lora_alpha for LoRA (default: 64; LoRA: twice --r)")
    a(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="layers to adapt, or all-linear (default: all-linear)",
    )
    a(
        "--centroids",
        choices=("data", "kaiming"),
        default="data",
        help=f"set them from the first batch, or draw them {d}",
    )
    a("--ec-perturb-scale", type=float, default=1.0, help=f"noise around the first batch's mean {d}")
    a("--balance", type=float, default=0.0, metavar="GAMMA", help=f"step of the load-balancing bias; 0 is off {d}")
    a(
        "--route-batch",
        choices=("batch", "per-sample", "mixed"),
        default="mixed",
        help=f"which tokens share a route {d}",
    )
    a("--epochs", type=float, default=3.0, help=f"passes over the data {d}")
    a("--steps", type=int, help="optimiser steps (default: what --epochs makes)")
    a("--batch-size", type=int, default=32, help=f"records in a batch {d}")
    a("--accumulate", type=int, default=1, help=f"batches in one optimiser step {d}")
    a("--lr", type=float, default=2e-3, help=f"highest learning rate {d}")
    a("--warmup", type=float, default=0.05, help=f"share of the steps in which the learning rate rises {d}")
    a("--weight-decay", type=float, default=0.0, help=f"AdamW's weight decay {d}")
    a("--eval-every", type=int, default=0, metavar="STEPS", help="steps between evaluations (default: ten in all)")
    a(
        "--patience",
        type=int,
        default=0,
        metavar="EVALS",
        help=f"stop after so many evaluations without a better loss; 0 is never {d}",
    )
    a(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="STEPS",
        help=f"write what --resume needs every so many steps; 0 is never {d}",
    )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out (default: off)")
    earlier.add_argument(
        "--overwrite", action="store_true", help="replace the adapter or checkpoint in --out (default: refuse)"
    )
    a(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help=f"type of the base; auto is the stored one, on a CPU float32 {d}",
    )
    a("--device", choices=("auto", "cpu", "cuda"), default="auto", help=f"auto is a GPU where there is one {d}")
    a("--seed", type=int, default=0, help=f"of initialisation, order and held-out share {d}")
    a("--publish", metavar="URL", help="load the adapter into this running server afterwards (default: no server)")
    a("--name", help="name to publish under (default: the name of --out)")
    a("--api-key", help=f"key for --publish (default: {' or '.join(KEY_VARIABLES)})")


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit status. Errors that a user can mend are printed without a traceback."""
    try:
        _run(args)
    except TuckaError as error:
        print(f"tucka train: {error.message}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"tucka train: {error.filename} cannot be used by this user: permission denied.", file=sys.stderr)
        return 2
    return 0


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError where a training would undo, or continue, what is not meant."""
    if resume and not (out / CHECKPOINT).is_file():
        raise ConfigError(f"--resume: there is no checkpoint in {out}. Start without it.")
    found = [name for name in ("adapter_config.json", CHECKPOINT) if (out / name).exists()]
    if found and not resume and not overwrite:
        go_on = ", or continue from its checkpoint with --resume" if CHECKPOINT in found else ""
        raise ConfigError(
            f"{out} holds an earlier training ({', '.join(found)}). Give another --out, or replace it with "
            f"--overwrite{go_on}."
        )
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be written: {nearest} is no folder, or not one this user may write to.")


def _run(args: argparse.Namespace) -> None:
    folder = args.model or FOLDER / "base"
    _check(args, folder)
    from tucka_runtime.trainer.adapter import manifest, trainable_parameters, write
    from tucka_runtime.trainer.plot import figure

    started = time.monotonic()
    settings, config = _settings(args)
    job = _prepare(args, folder, settings, config)
    loop = job.loop
    if args.resume:
        loop.resume(args.out / CHECKPOINT)
        print(f"continuing after step {loop.step}")
    loop.progress, close = _bar(loop.config.steps, loop.step)
    try:
        history = loop.run()
    finally:
        close()
    result = loop.evaluate() if loop.held else None
    training = manifest(
        settings, loop.config, history, result, base_name=folder.name, base_fingerprint=job.fingerprint,
        data=_source(args.data, loop), parameters=trainable_parameters(loop.model), router=loop.router,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    write(loop.model, args.out, folder.name, training)
    figure(history, result, args.out / "training.png", f"{args.method} · {args.data.name} · {len(history.loss)} steps")
    if result:
        _tell(result)
    print(f"written to {args.out}")
    if args.publish:
        publish(args.publish, args.name or args.out.resolve().name, args.out, args.api_key)


def _check(args: argparse.Namespace, folder: Path) -> None:
    """Raises ConfigError for what is wrong at first sight: the model takes seconds to load."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: --model must be the folder of a Hugging Face model.")
    for path in filter(None, (args.data, args.eval_data)):
        if not path.exists():
            raise ConfigError(f"The data file {path} does not exist.")
    if not 0 <= args.eval_fraction < 1:
        raise ConfigError("--eval-fraction must be from 0 to below 1")
    _check_out(args.out, args.resume, args.overwrite)


def _settings(args: argparse.Namespace) -> "tuple[AdapterSettings, LoopConfig]":
    """What the flags say of the adapter and of the loop, whose steps are known once the data is read."""
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.loop import LoopConfig

    alpha = args.alpha if args.alpha is not None else 2.0 * args.r if args.method == "lora" else 64.0
    settings = AdapterSettings(
        method=args.method, r=args.r, k=args.k, t=args.t, p=args.p, alpha=alpha,
        target_modules=tuple(args.target_modules), centroids=args.centroids,
        ec_perturb_scale=args.ec_perturb_scale, balance=args.balance,
    )  # fmt: skip
    config = LoopConfig(
        steps=args.steps or 1, batch_size=args.batch_size, accumulate=args.accumulate, lr=args.lr, warmup=args.warmup,
        weight_decay=args.weight_decay, route_batch=args.route_batch, eval_every=args.eval_every or 1,
        patience=args.patience, checkpoint_every=args.checkpoint_every, seed=args.seed,
    )  # fmt: skip
    return settings, config


@dataclass(frozen=True)
class _Job:
    """A loop that is ready to run, and the identity of its base."""

    loop: "Loop"
    fingerprint: str


def _prepare(args: argparse.Namespace, folder: Path, settings: "AdapterSettings", config: "LoopConfig") -> _Job:
    """Reads the data, then the model. Raises ConfigError."""
    from tucka_runtime.models.weights import fingerprint
    from tucka_runtime.trainer import data
    from tucka_runtime.trainer.adapter import attach, router_of, seed_all, trainable_parameters
    from tucka_runtime.trainer.base_model import choose_device, load_model, load_tokenizer
    from tucka_runtime.trainer.loop import Loop

    device, identity, tokenizer = choose_device(args.device), fingerprint(folder), load_tokenizer(folder)
    train = data.load(args.data, tokenizer, args.max_length)
    if args.eval_data:
        held = data.load(args.eval_data, tokenizer, args.max_length)
    else:
        train, held = data.split(train, args.eval_fraction, args.seed)
    per_step = args.batch_size * args.accumulate
    steps = args.steps or max(1, round(args.epochs * len(train) / per_step))
    config = replace(config, steps=steps, eval_every=args.eval_every or max(1, steps // 10))
    model = attach(load_model(folder, args.dtype, device), settings, args.seed)
    seed_all(args.seed)
    print(
        f"{args.method}: {trainable_parameters(model):,} trainable parameters; {len(train)} examples to train on, "
        f"{len(held)} held out; {steps} steps of {per_step}"
    )
    pad = tokenizer.ends[0]  # padding is masked: any token does
    loop = Loop(model, train, held, config, pad=pad, device=device, router=router_of(model), folder=args.out)
    return _Job(loop, identity)


def _source(path: Path, loop: "Loop") -> dict[str, object]:
    from tucka_runtime.trainer.adapter import digest

    counts = {"train": len(loop.train), "held_out": len(loop.held)}
    return {"file": path.name, "sha256": digest(path.read_bytes()), **counts}


def _tell(result: "Evaluation") -> None:
    print(f"held out: loss {result.loss:.4f}, exact match {result.exact:.3f}")
    for task, value in result.by_task.items():
        groups = f"   groups {result.groups[task]}" if result.groups else ""
        print(f"  {task:<16} {value:.3f}{groups}")


def _bar(steps: int, done: int) -> tuple[Callable[[int, float, list[int]], None], Callable[[], None]]:
    from tqdm import tqdm

    bar = tqdm(total=steps, initial=done, unit="step", disable=None, file=sys.stderr)

    def show(step: int, loss: float, load: list[int]) -> None:
        total = max(1, sum(load))
        experts = f" experts {'/'.join(f'{100 * n // total}' for n in load)}%" if load else ""
        bar.update(1)
        bar.set_postfix_str(f"loss {loss:.4f}{experts}", refresh=False)
        if bar.disable and step % max(1, steps // 10) == 0:  # no terminal: ten plain lines instead of a bar
            print(f"step {step}/{steps} loss {loss:.4f}{experts}", file=sys.stderr, flush=True)

    return show, bar.close


def publish(url: str, name: str, folder: Path, api_key: str | None) -> None:
    """Loads the adapter into a running server. Raises ConfigError with the server's answer when it refuses."""
    try:
        Client(url, api_key).post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
    except TuckaError as error:
        raise ConfigError(f"The adapter is in {folder}, but it was not published: {error.message}") from error
    print(f"published as {name!r} at {url}")


def main() -> int:
    """`python -m tucka_runtime.cli.train`: the same command without the server's CLI."""
    parser = argparse.ArgumentParser(prog="tucka train", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
