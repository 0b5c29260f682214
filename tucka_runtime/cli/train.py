"""`tucka train`: records and a base model in, an adapter out."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tucka_runtime.cli.train_flags import add_arguments, command, complete, of_run
from tucka_runtime.embedded import FOLDER
from tucka_runtime.errors import ConfigError, TuckaError

if TYPE_CHECKING:
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.evaluate import Evaluation
    from tucka_runtime.trainer.loop import Loop, LoopConfig

__all__ = ["add_arguments", "main", "run"]


def run(given: argparse.Namespace) -> int:
    """Train; returns the exit status. Errors that a user can mend are printed without a traceback."""
    try:
        return _run(complete(given))
    except TuckaError as error:
        print(f"tucka train: {error.message}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"tucka train: {error.filename} cannot be used by this user: permission denied.", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    folder = args.model or FOLDER / "base"
    _check(args, folder)
    _check_out(args.out, args.resume, args.overwrite)
    from tucka_runtime.trainer import tracking
    from tucka_runtime.trainer.publish import Publication

    started = time.monotonic()
    tracking.check(args.report_to)
    settings, config = _settings(args)
    publication = None
    if args.publish:
        name = args.name or args.out.resolve().name
        publication = Publication(args.publish, name, args.out, args.api_key, args.replace)
        publication.check()
    job = _prepare(args, folder, settings, config)
    if not _train(args, job):
        return 130
    _write(args, folder, settings, job, time.monotonic() - started)
    if publication:
        publication.publish()
        print(f"published as {publication.name!r} at {publication.url}")
    return 0


def _check(args: argparse.Namespace, folder: Path) -> None:
    """Raises ConfigError for what is wrong at first sight: libraries and the model take seconds to load."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: --model must be the folder of a Hugging Face model.")
    for path in filter(None, (args.data, args.eval_data)):
        if not path.exists():
            raise ConfigError(f"The data file {path} does not exist.")
    if not 0 <= args.eval_fraction < 1:
        raise ConfigError("--eval-fraction must be from 0 to below 1")
    for name in ("num_threads", "steps", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError where a training would undo, or continue, what is not meant."""
    from tucka_runtime.trainer.loop import CHECKPOINT

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


def _settings(args: argparse.Namespace) -> "tuple[AdapterSettings, LoopConfig]":
    """What the flags say of the adapter and of the loop, whose steps are known once the data is read."""
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.loop import LoopConfig
    from tucka_runtime.trainer.preflight import check_limits

    alpha = args.alpha if args.alpha is not None else 2.0 * args.r if args.method == "lora" else 64.0
    settings = AdapterSettings(
        method=args.method, r=args.r, k=args.k, t=args.t, p=args.p, alpha=alpha,
        target_modules=tuple(args.target_modules), centroids=args.centroids,
        ec_perturb_scale=args.ec_perturb_scale, balance=args.balance, dropout=args.dropout, rslora=args.rslora,
    )  # fmt: skip
    check_limits(settings)
    config = LoopConfig(
        steps=args.steps or 1, batch_size=args.batch_size, accumulate=args.accumulate, lr=args.lr, warmup=args.warmup,
        weight_decay=args.weight_decay, route_batch=args.route_batch,
        route_prefix_tokens=args.route_prefix_tokens, eval_every=args.eval_every or 1,
        patience=args.patience, checkpoint_every=args.checkpoint_every or 0, seed=args.seed,
        packing=args.packing, group_by_length=args.group_by_length, gradient_checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    return settings, config


@dataclass(frozen=True)
class _Job:
    """A loop that is ready to run, the identity of its base, and what is likely not meant."""

    loop: "Loop"
    tokenizer: Any
    fingerprint: str
    warnings: list[str]


def _prepare(args: argparse.Namespace, folder: Path, settings: "AdapterSettings", config: "LoopConfig") -> _Job:
    """Reads the data, then the model. Raises ConfigError."""
    import torch

    from tucka_runtime import machine
    from tucka_runtime.models.weights import fingerprint
    from tucka_runtime.trainer import data, preflight
    from tucka_runtime.trainer.adapter import attach, router_of, seed_all, trainable_parameters
    from tucka_runtime.trainer.base_model import choose_device, load_model, load_skeleton, load_tokenizer, prepare
    from tucka_runtime.trainer.loop import Loop

    device, skeleton = choose_device(args.device), load_skeleton(folder)
    sizes = preflight.linears(skeleton)
    targets = preflight.check_targets(settings, sizes)
    longest = preflight.longest_record(args.max_length, skeleton.config)
    identity, tokenizer = fingerprint(folder), load_tokenizer(folder)
    tell = partial(print, file=sys.stderr)
    train = data.load(args.data, tokenizer, longest, args.learn, args.strict, tell)
    if args.eval_data:
        held = data.load(args.eval_data, tokenizer, longest, args.learn, args.strict, tell)
    else:
        train, held = data.split(train, args.eval_fraction, args.seed)
    per_step = args.batch_size * args.accumulate
    steps = args.steps or max(1, round(args.epochs * len(train) / per_step))
    tenth = max(1, steps // 10)
    checkpoint_every = tenth if args.checkpoint_every is None else args.checkpoint_every
    config = replace(
        config, steps=steps, eval_every=args.eval_every or tenth, checkpoint_every=checkpoint_every
    )  # fmt: skip
    hidden = skeleton.config.get_text_config().hidden_size
    torch.set_num_threads(args.num_threads or machine.threads(hidden, torch.get_num_threads()))
    base = load_model(folder, args.dtype, device)
    prepare(base, args.packing, args.gradient_checkpointing)
    model = attach(base, settings, args.seed)
    preflight.check_disk(args.out, trainable_parameters(model), checkpoint_every > 0)
    seed_all(args.seed)
    print(
        f"{args.method}: {trainable_parameters(model):,} trainable parameters; {len(train)} examples to train on, "
        f"{len(held)} held out; {steps} steps of {per_step}"
    )
    pad = tokenizer.ends[0]  # padding is masked: any token does
    loop = Loop(model, train, held, config, pad=pad, device=device, router=router_of(model), folder=args.out)
    warnings = preflight.warnings(settings, [sizes[name] for name in targets], len(train), len(held))
    return _Job(loop, tokenizer, identity, warnings)


def _train(args: argparse.Namespace, job: _Job) -> bool:
    """Whether the training came to its end; where it was stopped, a checkpoint is kept and it is said how to go on."""
    from tucka_runtime.trainer import tracking
    from tucka_runtime.trainer.adapter import keep
    from tucka_runtime.trainer.loop import CHECKPOINT, ROUTES
    from tucka_runtime.trainer.progress import TrainingProgress, collapsed

    loop = job.loop
    if args.resume:
        loop.resume(args.out)
        print(f"continuing after step {loop.step}")
    turn = 1 if loop.router is None else len(ROUTES[loop.config.route_batch])
    trackers = tracking.start(args.report_to, args.out, of_run(args))
    loop.progress = TrainingProgress(loop.config.steps, loop.step, turn, trackers)
    for text in job.warnings:
        loop.progress.warn(text)
    try:
        with _stopping(loop):
            loop.run()
    finally:
        loop.progress.close()
    if loop.finished:
        if said := collapsed(loop.history.load, turn):
            job.warnings.append(said)
            loop.progress.warn(said)
        return True
    where = keep(loop.save, args.out)
    move = "" if where == args.out else f" Move {where / CHECKPOINT} into {args.out} first."
    print(
        f"stopped after step {loop.step} of {loop.config.steps}; the checkpoint is in {where}.{move} To go on:\n"
        f"{command(args, resume=True, overwrite=False)}"
    )
    return False


@contextmanager
def _stopping(loop: "Loop") -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) lets the step that is running end, the second ends everything at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        loop.stopping = True
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        print("\nstopping after this step; once more ends at once, without a checkpoint", file=sys.stderr, flush=True)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(args: argparse.Namespace, folder: Path, settings: "AdapterSettings", job: _Job, seconds: float) -> None:
    """Measures what was trained and writes it. Raises ConfigError where no place takes it, or another than --out."""
    from tucka_runtime.trainer.adapter import keep, manifest, trainable_parameters, write
    from tucka_runtime.trainer.card import CARD_NAME, card
    from tucka_runtime.trainer.decode import predictions
    from tucka_runtime.trainer.loop import CHECKPOINT
    from tucka_runtime.trainer.plot import figure

    loop = job.loop
    result, alone = (loop.evaluate(), loop.evaluate_base()) if loop.held else (None, None)
    training = manifest(
        settings, loop.config, loop.history, result, alone, base_name=folder.name, base_fingerprint=job.fingerprint,
        data=_source(args.data, loop), parameters=trainable_parameters(loop.model), router=loop.router, seconds=seconds,
        flags=of_run(args), warnings=job.warnings,
    )  # fmt: skip
    if result and alone:
        _tell(result, alone)
    where = keep(lambda place: write(loop.model, place, folder.name, training), args.out)
    if where != args.out:
        raise ConfigError(f"{args.out} could not be written (is the disk full?): the adapter is in {where} instead.")
    (args.out / CHECKPOINT).unlink(missing_ok=True)  # what it was for is done
    try:
        name = args.name or args.out.resolve().name
        (args.out / CARD_NAME).write_text(card(name, training), "utf-8")
        if loop.held:  # one at a time where a route is a batch's: nobody else is known to be served
            rows = predictions(loop.model, loop.held, job.tokenizer, loop.pad, 1 if args.route_batch == "batch" else 16)
            (args.out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        title = f"{args.method} · {args.data.name} · {len(loop.history.loss)} steps"
        figure(loop.history, result, args.out / "training.png", title)
    except OSError as error:
        print(f"warning: card, predictions and picture were not all written: {error.strerror}.", file=sys.stderr)
    print(f"written to {args.out}")


def _source(path: Path, loop: "Loop") -> dict[str, Any]:
    from tucka_runtime.trainer.adapter import digest

    counts = {"train": len(loop.train), "held_out": len(loop.held)}
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {"file": path.name, "sha256": digest(b"".join(file.read_bytes() for file in files)), **counts}


def _tell(result: "Evaluation", alone: "Evaluation") -> None:
    print(
        f"held out: loss {result.loss:.4f}, exact match {result.exact:.3f} "
        f"(base: loss {alone.loss:.4f}, exact match {alone.exact:.3f})"
    )
    for task, value in result.by_task.items():
        groups = f"   groups {result.groups[task]}" if result.groups else ""
        print(f"  {task:<16} {value:.3f}{groups}")


def main() -> int:
    """`python -m tucka_runtime.cli.train`: the same command without the server's CLI."""
    parser = argparse.ArgumentParser(prog="tucka train", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
