"""What `tucka train` does before the first step: it checks, reads the data, makes the adapter."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka_runtime.bases import find_base
from tucka_runtime.errors import ConfigError
from tucka_runtime.extras import how_to_install, installed
from tucka_runtime.terminal import say

if TYPE_CHECKING:
    from tucka_runtime.trainer.adapter import AdapterSettings
    from tucka_runtime.trainer.evaluate import HeldOut
    from tucka_runtime.trainer.loop import Loop, LoopConfig
    from tucka_runtime.trainer.publish import Publication


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for what is wrong at first sight: libraries and the model take seconds to load."""
    folder, _ = _found(args.model, args.dtype)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} has no config.json: --model must be the folder of a Hugging Face model, its name there, or a "
            "GGUF file."
        )
    for path in filter(None, (args.data, args.eval_data)):
        if not path.exists():
            raise ConfigError(f"The data file {path} does not exist.")
    if args.objective != "sft" and args.learn == "generation":
        raise ConfigError("--learn generation is for completions: of a pair the last turn alone is learnt.")
    if args.objective == "classify" and args.publish:
        raise ConfigError(
            "--publish: the server answers with texts, and serves no classifiers. Leave it out, and use the adapter "
            "with peft, as its README.md says."
        )
    if args.load_in and not installed("quant"):
        raise ConfigError(f"--load-in quantises by bitsandbytes, which is not installed: {how_to_install('quant')}.")
    if not 0 <= args.eval_fraction < 1:
        raise ConfigError("--eval-fraction must be from 0 to below 1")
    if not 0 < args.epochs < math.inf:
        raise ConfigError("--epochs must be above 0")
    for name in ("num_threads", "steps", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")


def check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError where a training would undo, or continue, what is not meant."""
    from tucka_runtime.trainer.card import CARD_NAME
    from tucka_runtime.trainer.loop import CHECKPOINT
    from tucka_runtime.trainer.preflight import nearest_folder

    if resume and not (out / CHECKPOINT).is_file():
        raise ConfigError(f"--resume: there is no checkpoint in {out}. Start without it.")
    found = [name for name in ("adapter_config.json", CHECKPOINT, CARD_NAME) if (out / name).exists()]
    if found and not resume and not overwrite:
        go_on = ", or continue from its checkpoint with --resume" if CHECKPOINT in found else ""
        raise ConfigError(
            f"{out} holds what a training would replace ({', '.join(found)}). Give another --out, or replace it with "
            f"--overwrite{go_on}."
        )
    nearest = nearest_folder(out)
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
        dora=args.dora, task="SEQ_CLS" if args.objective == "classify" else "CAUSAL_LM",
    )  # fmt: skip
    check_limits(settings)
    config = LoopConfig(
        steps=args.steps or 1, batch_size=args.batch_size, accumulate=args.accumulate, lr=args.lr, warmup=args.warmup,
        weight_decay=args.weight_decay, route_batch=args.route_batch,
        route_prefix_tokens=args.route_prefix_tokens, eval_every=args.eval_every or 1,
        patience=args.patience, checkpoint_every=args.checkpoint_every or 0, seed=args.seed,
        packing=args.packing, group_by_length=args.group_by_length, gradient_checkpointing=args.gradient_checkpointing,
        objective=args.objective, beta=args.beta,
    )  # fmt: skip
    return settings, config


@cache
def _found(model: Path | None, dtype: str) -> tuple[Path, str]:
    """The folder and the name of the base model, which is the embedded one where none is named. A GGUF file is looked
    through once for all checks of a command, and all of its jobs. Raises ConfigError."""
    folder, name = find_base(model, dtype, say=lambda line: say(line, sys.stderr))
    return folder, name or folder.absolute().name


@dataclass
class Base:
    """What is known of the base before its weights are read, and what trainings of one run share: records that were
    read, and what the base alone scores. `head` are the modules of a classifier that its folder has no weights of, once
    these are read."""

    folder: Path
    name: str
    device: Any
    config: Any
    context: int | None
    sizes: dict[str, tuple[int, int]]
    fingerprint: str
    tokenizer: Any
    head: tuple[str, ...] = ()
    _records: dict[tuple[Any, ...], tuple[list[Any], str]] = field(default_factory=dict)
    _scores: "dict[tuple[Any, ...], HeldOut | None]" = field(default_factory=dict)

    def records(self, path: Path, longest: int, args: argparse.Namespace) -> tuple[list[Any], str]:
        """The examples of a file, or its pairs, or its labelled texts; and its SHA-256. Raises DataError."""
        from tucka_runtime.trainer import data, labelled, pairs
        from tucka_runtime.trainer.records import read

        key = (path, longest, args.objective, args.learn, args.strict)
        if key not in self._records:
            file, tell = read(path), partial(say, stream=sys.stderr)
            if args.objective == "sft":
                found: list[Any] = list(data.load(file, self.tokenizer, longest, args.learn, args.strict, tell))
            else:
                load = pairs.load if args.objective == "dpo" else labelled.load
                found = list(load(file, self.tokenizer, longest, args.strict, tell))
            self._records[key] = found, file.sha256
        found, sha256 = self._records[key]
        return list(found), sha256

    def score(self, loop: "Loop") -> "HeldOut | None":
        """Held-out figures of the base alone; None where these say nothing."""
        key = tuple(loop.held)
        if key not in self._scores:
            self._scores[key] = loop.evaluate_base()
        return self._scores[key]


@dataclass
class Plan:
    """One training that has passed all checks which need no weights, and what is likely not meant by it. `data` says
    which records it is of, as training.json has it."""

    args: argparse.Namespace
    base: Base
    settings: "AdapterSettings"
    config: "LoopConfig"
    train: list[Any]
    held: list[Any]
    data: dict[str, Any]
    publication: "Publication | None"
    warnings: list[str]


def open_base(args: argparse.Namespace) -> Base:
    """Raises ConfigError where the base cannot be used."""
    from tucka_runtime.models.weights import fingerprint
    from tucka_runtime.trainer import preflight
    from tucka_runtime.trainer.base_model import choose_device, load_skeleton, load_tokenizer

    classify = args.objective == "classify"
    folder, name = _found(args.model, args.dtype)
    device, skeleton = choose_device(args.device), load_skeleton(folder, classify)
    sizes = preflight.linears(skeleton)
    context, tokenizer = preflight.context_of(skeleton), load_tokenizer(folder, classify)
    return Base(folder, name, device, skeleton.config, context, sizes, fingerprint(folder), tokenizer)


def check_settings(args: argparse.Namespace) -> "tuple[AdapterSettings, LoopConfig, Publication | None]":
    """What the flags say, and the server that waits for the result. Raises ConfigError."""
    from tucka_runtime.trainer import tracking
    from tucka_runtime.trainer.publish import Publication

    tracking.check(args.report_to)
    settings, config = _settings(args)
    publication = None
    if args.publish:
        name = args.name or args.out.resolve().name
        publication = Publication(args.publish, name, args.out, args.api_key, args.replace)
        publication.check()
    return settings, config, publication


def plan(
    args: argparse.Namespace, base: Base, checked: "tuple[AdapterSettings, LoopConfig, Publication | None]"
) -> Plan:
    """Reads the data. Raises ConfigError or DataError."""
    from tucka_runtime.trainer import data, preflight
    from tucka_runtime.trainer.progress import tenth

    settings, config, publication = checked
    targets = preflight.check_targets(settings, base.sizes)
    longest = preflight.longest_record(args.max_length, base.context)
    train, sha256 = base.records(args.data, longest, args)
    if args.eval_data:
        held, _ = base.records(args.eval_data, longest, args)
    else:
        train, held = data.split(train, args.eval_fraction, args.seed)
    by_task = args.route_batch == "batch"
    per_epoch = len(data.epoch(train, args.batch_size, args.seed, 0, by_task)) / args.accumulate
    # Rounded up, for no record to be left out of the last pass, but for what the product is off by in floating point.
    steps = args.steps or math.ceil(args.epochs * per_epoch - 1e-9)
    labels = preflight.check_labels(train, held, base.config) if args.objective == "classify" else ()
    config = replace(
        config, labels=labels, steps=steps, eval_every=args.eval_every or tenth(steps),
        checkpoint_every=tenth(steps) if args.checkpoint_every is None else args.checkpoint_every,
    )  # fmt: skip
    warnings = preflight.warnings(settings, [base.sizes[name] for name in targets], len(train), len(held))
    source = {"file": args.data.name, "sha256": sha256, "train": len(train), "held_out": len(held)}
    return Plan(args, base, settings, config, train, held, source, publication, warnings)


def load(
    base: Base, args: argparse.Namespace, packing: bool, together: bool = False, labels: Sequence[str] = ()
) -> Any:
    """The base's weights, and the threads that it gets: where several train together, each product has rows enough for
    all cores. A classifier has a head over the `labels`. Raises ConfigError."""
    import torch

    from tucka_runtime import machine
    from tucka_runtime.trainer.adapter import seed_all
    from tucka_runtime.trainer.base_model import load_classifier, load_model, prepare

    hidden = base.config.get_text_config().hidden_size
    most = torch.get_num_threads()
    torch.set_num_threads(
        args.num_threads or (min(most, machine.cores().count) if together else machine.threads(hidden, most))
    )
    if labels:
        seed_all(args.seed)  # the head is drawn
        model, base.head = load_classifier(base.folder, args.dtype, base.device, labels, args.load_in)
    else:
        model = load_model(base.folder, args.dtype, base.device, args.load_in)
    prepare(model, packing, args.gradient_checkpointing)
    return model


def build(planned: Plan, model: Any, beside: int = 0) -> "Loop":
    """The loop, with a fresh adapter on `model`, and torch's generator as the seed says; `beside` parameters of other
    trainings go to the same disk. Raises ConfigError."""
    from tucka_runtime.trainer import preflight
    from tucka_runtime.trainer.adapter import attach, router_of, seed_all, trainable_parameters
    from tucka_runtime.trainer.loop import Loop

    args, config, tokenizer = planned.args, planned.config, planned.base.tokenizer
    planned.settings = replace(planned.settings, head=planned.base.head)
    pad = model.config.get_text_config().pad_token_id
    if pad is None or config.objective != "classify":
        pad = tokenizer.ends[0] if tokenizer.ends else 0  # masked: any token does
    if config.objective == "classify":  # by which such models find a text's last token
        model.config.get_text_config().pad_token_id = pad
    adapted = attach(model, planned.settings, args.seed)
    parameters = trainable_parameters(adapted)
    preflight.check_disk(args.out, parameters, config.checkpoint_every > 0, beside)
    seed_all(args.seed)
    return Loop(
        adapted, planned.train, planned.held, config, pad=pad,
        device=planned.base.device, router=router_of(adapted), folder=args.out, base=planned.base.fingerprint,
    )  # fmt: skip


def summary(loop: "Loop", method: str) -> str:
    """What is about to be trained."""
    from tucka_runtime.trainer.adapter import trainable_parameters

    per_step = loop.config.batch_size * loop.config.accumulate
    train, held = f"{len(loop.train)} {loop.objective.records}", len(loop.held)
    return (
        f"{method}: {trainable_parameters(loop.model):,} trainable parameters; {train} to train on, {held} held out; "
        f"{loop.config.steps} steps of {per_step}"
    )
