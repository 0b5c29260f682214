"""The flags of `tucka train`: each is also a key of its --config file, and a run can be told in them again."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.base_hub import names_repository
from tucka_runtime.client import KEY_VARIABLES
from tucka_runtime.messages import ROUTE_PREFIX_TOKENS


@dataclass(frozen=True)
class Flag:
    """One setting. `said` is the default in words, where the value itself does not say it; `kind` is the type of a
    value whose default is None; `of_run` is false for what changes nothing of the adapter."""

    name: str
    default: bool | int | float | str | list[str] | None
    help: str
    said: str | None = None
    kind: type = str
    choices: Sequence[str] | None = None
    metavar: str | None = None
    of_run: bool = True

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def type(self) -> type:
        return self.kind if self.default is None or isinstance(self.default, list) else type(self.default)


REQUIRED = "none: it must be given, here or in --config"
FLAGS = (
    Flag(
        "model", None, "the base: its folder, a GGUF file, or org/name of the Hub's cache", "the embedded one", Path,
        metavar="MODEL",
    ),
    Flag(
        "data", None, "records to train on: JSONL, a JSON array, Parquet, gzipped or not, or a folder that datasets' "
        "save_to_disk wrote", REQUIRED, Path, metavar="FILE",
    ),
    Flag("out", None, "folder of the adapter", REQUIRED, Path, metavar="DIR", of_run=False),
    Flag("eval_data", None, "held-out records", "a share of --data", Path, metavar="FILE"),
    Flag("eval_fraction", 0.1, "share of --data that is held out"),
    Flag(
        "max_length", None, "longest record in tokens; longer ones are refused",
        "1024, or the base's context if that is shorter", int,
    ),
    Flag(
        "learn", "all", "which of the assistant's turns are learnt: all or the last, each an example with the prompt "
        "of a request for it; or those that the chat template marks with {% generation %}, a conversation an example",
        choices=("all", "last", "generation"),
    ),
    Flag("strict", False, "refuse records with keys that are not known", "they are ignored"),
    Flag(
        "objective", "sft", "what is learnt: completions (sft); of two answers the better one (dpo), from records "
        "with prompt, chosen and rejected; or which label a text has (classify), from records with text and label: a "
        "classifier for peft, which the server does not serve", choices=("sft", "dpo", "classify"),
    ),
    Flag("beta", 0.1, "DPO's: how dear it is to move away from the base"),
    Flag("method", "tucka", "kind of adapter", choices=("tucka", "lora")),
    Flag("r", 8, "rank"),
    Flag("k", 4, "expert groups"),
    Flag("t", 2, "experts in a group"),
    Flag("p", 2, "slices of the core that a group shares"),
    Flag("alpha", None, "scale of the change; lora_alpha for LoRA", "64; LoRA: twice --r", float),
    Flag("dropout", 0.0, "LoRA's: share of a layer's inputs that are left out of the change in each step"),
    Flag("rslora", False, "LoRA's: divide alpha by the root of the rank, not by the rank", "by the rank"),
    Flag("dora", False, "LoRA's: learn the size of each output apart from its direction (DoRA)", "plain LoRA"),
    Flag("target_modules", ["all-linear"], "layers to adapt, or all-linear", "all-linear", metavar="NAME"),
    Flag("centroids", "data", "set them from the first batch, or draw them", choices=("data", "kaiming")),
    Flag("ec_perturb_scale", 1.0, "noise around the first batch's mean"),
    Flag("balance", 0.0, "step of the load-balancing bias; 0 is off", metavar="GAMMA"),
    Flag("route_batch", "mixed", "which tokens share a route", choices=("batch", "per-sample", "prefix", "mixed")),
    Flag("route_prefix_tokens", ROUTE_PREFIX_TOKENS, "tokens of a prompt that route it, with --route-batch prefix"),
    Flag("epochs", 3.0, "passes over the data, in each of which every record is learnt"),
    Flag("steps", None, "optimiser steps", "what --epochs makes", int),
    Flag("batch_size", 32, "records in a batch"),
    Flag("packing", False, "put several records of a batch into a row, each kept to itself: less padding", "one a row"),
    Flag("group_by_length", False, "make batches of records of similar length: less padding", "of any"),
    Flag("gradient_checkpointing", False, "compute activations twice, not to keep them: less memory", "keep them"),
    Flag("accumulate", 1, "batches in one optimiser step"),
    Flag("lr", 2e-3, "highest learning rate"),
    Flag("warmup", 0.05, "share of the steps in which the learning rate rises"),
    Flag("weight_decay", 0.0, "AdamW's weight decay"),
    Flag("eval_every", None, "steps between evaluations", "ten at most", int, metavar="STEPS"),
    Flag("patience", 0, "stop after so many evaluations without a better loss; 0 is never", metavar="EVALS"),
    Flag(
        "checkpoint_every", None, "write what --resume needs every so many steps; 0 is never", "ten at most", int,
        metavar="STEPS",
    ),
    Flag("resume", False, "continue from the checkpoint in --out", "off", of_run=False),
    Flag("overwrite", False, "replace the adapter or checkpoint in --out", "refuse", of_run=False),
    Flag(
        "dtype", "auto", "type of the base; auto is the stored one, on a CPU float32",
        choices=("auto", "float32", "bfloat16"),
    ),
    Flag(
        "load_in", None, "quantise the base's linears while training, by bitsandbytes (extra quant)", "as stored",
        choices=("4bit", "8bit"),
    ),
    Flag("device", "auto", "auto is a GPU where there is one", choices=("auto", "cpu", "cuda")),
    Flag("num_threads", None, "CPU threads", "the server's rule: all cores; one for models narrower than 512", int),
    Flag("seed", 0, "of initialisation, order and held-out share"),
    Flag(
        "report_to", [], "send each step's figures there too; tensorboard's files go into OUT/runs", "nowhere",
        choices=("tensorboard", "wandb", "trackio"), of_run=False,
    ),
    Flag(
        "publish", None, "load the adapter into this running server afterwards", "no server", metavar="URL",
        of_run=False,
    ),
    Flag("name", None, "name to publish under", "the name of --out", of_run=False),
    Flag("replace", False, "publish in place of other content of that name", "refuse", of_run=False),
    Flag("api_key", None, "key for --publish", " or ".join(KEY_VARIABLES), of_run=False),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; what is not given stays out of the namespace until `complete`. Imports nothing heavy."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these flags (default: none)")
    parser.add_argument(
        "--jobs",
        type=Path,
        metavar="FILE",
        help="YAML file of several adapters to train together: `jobs`, and these "
        "flags for each; `defaults` for all. --out is then the folder of their folders (default: one adapter)",
    )
    parser.add_argument(
        "--sweep", action="append", metavar="FLAG=A,B", help="train an adapter for each value of this flag, together; "
        "with several --sweep for each combination. --out is the folder of their folders (default: one adapter)",
    )  # fmt: skip
    for flag in FLAGS:
        said = flag.said or flag.default
        text = f"{flag.help} (default: {said})".replace("%", "%%")
        if isinstance(flag.default, bool):
            parser.add_argument(flag.option, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(
                flag.option, type=flag.type, default=argparse.SUPPRESS, choices=flag.choices, metavar=flag.metavar,
                nargs="+" if isinstance(flag.default, list) else None, help=text,
            )  # fmt: skip


def of_run(args: argparse.Namespace) -> dict[str, Any]:
    """What makes the adapter, as a --config file would say it. Of paths the names alone: the folders above them are
    nobody's business. A base on the Hub is named in full."""
    return {flag.name: _public(getattr(args, flag.name)) for flag in FLAGS if flag.of_run}


def _public(value: Any) -> Any:
    if not isinstance(value, Path):
        return value
    return str(value) if names_repository(str(value)) else value.name


def command(args: argparse.Namespace, **instead: bool) -> str:
    """The command line of these settings, complete or as given, `instead` replacing some. A key is not shown."""
    words = ["tucka", "train"]
    for option in ("config", "jobs"):
        if file := getattr(args, option, None):
            words += [f"--{option}", str(file)]
    for axis in getattr(args, "sweep", None) or ():
        words += ["--sweep", axis]
    for flag in FLAGS:
        value = instead.get(flag.name, getattr(args, flag.name, flag.default))
        if value == flag.default or flag.name == "api_key":
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [flag.option, *map(str, values)]
    return shlex.join(words)
