"""What is checked before the first step: what the server would refuse of the result, what would end the run late."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tucka_runtime.adapters.config import parse_config
from tucka_runtime.adapters.files import MAX_WEIGHTS_BYTES
from tucka_runtime.errors import ConfigError, InvalidAdapterError
from tucka_runtime.trainer.adapter import AdapterSettings
from tucka_runtime.trainer.labelled import Labelled, labels_of
from tucka_runtime.trainer.layer import features

HEADS = ("score", "classifier", "pooler")  # what transformers calls a classifier's own modules
LONGEST = 1024  # records by default, in tokens: what fits the memory of most machines


def check_limits(settings: AdapterSettings) -> None:
    """Raises ConfigError where the server would refuse the adapter's configuration."""
    table = settings.peft_config().to_dict()
    text = json.dumps({name: sorted(value) if isinstance(value, set) else value for name, value in table.items()})
    try:
        parse_config(text.encode())
    except InvalidAdapterError as error:
        reason = error.message.rpartition("cannot be used: ")[2]
        raise ConfigError(f"The server would refuse such an adapter: {reason}") from error


def linears(model: Any) -> dict[str, tuple[int, int]]:
    """(input, output) features of every linear that can be adapted, by its full name: all but the head's."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if name.partition(".")[0] in HEADS:
            continue
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            size = features(module)[0]
            found[name] = (size, module.weight.numel() // size)
    return found


def check_targets(settings: AdapterSettings, sizes: dict[str, tuple[int, int]]) -> list[str]:
    """Names of the linears that will be adapted; every entry must reach one. Raises ConfigError."""
    if settings.target_modules == ("all-linear",):
        return list(sizes)
    reached = {
        entry: [name for name in sizes if name == entry or name.endswith(f".{entry}")]
        for entry in settings.target_modules
    }
    if missing := [entry for entry, names in reached.items() if not names]:
        there = sorted({name.rpartition(".")[2] for name in sizes})
        raise ConfigError(
            f"--target-modules: this base has no linear layer {', '.join(missing)}. It has {', '.join(there)}; "
            "all-linear takes all of them."
        )
    return sorted({name for names in reached.values() for name in names})


def check_labels(train: Sequence[Labelled], held: Sequence[Labelled], config: Any) -> tuple[str, ...]:
    """The labels of a classifier, in their order. Raises ConfigError where there is nothing to tell apart, what is held
    out has labels that no training text has, or the base is a classifier of another number of labels already."""
    labels = labels_of([*train, *held])
    if len(labels) < 2:
        raise ConfigError(f"Every text is labelled {labels[0]!r}: a classifier needs texts of two labels or more.")
    if unseen := sorted(set(labels) - set(labels_of(train))):
        raise ConfigError(
            f"No text to train on is labelled {', '.join(map(repr, unseen))}, but texts held out are. Add some, or "
            "hold out others (--seed, --eval-data)."
        )
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if is_classifier and config.num_labels != len(labels):
        raise ConfigError(
            f"The base is a classifier of {config.num_labels} labels already, and the texts have {len(labels)}. Name "
            "the model that it was made of as --model."
        )
    return labels


def context_of(model: Any) -> int | None:
    """The longest text of a model in tokens; None where its configuration names none. RoBERTa and its like begin to
    count positions behind that of padding."""
    context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and (padding := getattr(module, "padding_idx", None)) is not None:
            context = module.num_embeddings - padding - 1
    return context


def longest_record(asked: int | None, context: int | None) -> int:
    """The limit of a record in tokens. Raises ConfigError where the base's context ends before."""
    if asked is not None and asked < 2:
        raise ConfigError("--max-length must be at least 2: a prompt and an end.")
    if context is None:
        return asked or LONGEST
    if asked is not None and asked > context:
        raise ConfigError(f"--max-length {asked} is more than the base's context of {context} tokens.")
    return asked or min(LONGEST, context)


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_disk(folder: Path, parameters: int, checkpoints: bool, beside: int = 0) -> None:
    """Raises ConfigError where what a run writes would not fit, or the adapter is larger than the server takes.

    A checkpoint holds the parameters, the best ones and AdamW's two moments in fp32, and for a moment the new one
    lies beside the old. `beside` are the parameters of other trainings of this run, which go to the same disk.
    """
    weights = 4 * parameters
    if weights > MAX_WEIGHTS_BYTES:
        raise ConfigError(
            f"The adapter would have {weights / 2**30:.1f} GiB, and the server takes {MAX_WEIGHTS_BYTES / 2**30:.0f}. "
            "Lower --r, or name fewer --target-modules."
        )
    needed = (4 * beside + weights) * (9 if checkpoints else 1) + 2**20
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        less = ", or write no checkpoints (--checkpoint-every 0)" if checkpoints else ""
        raise ConfigError(
            f"--out {folder}: {free / 2**20:.0f} MiB are free there, and this training needs {needed / 2**20:.0f}. "
            f"Make room, give another --out{less}."
        )


def warnings(settings: AdapterSettings, targets: list[tuple[int, int]], train: int, held: int) -> list[str]:
    """What is likely not meant, in a sentence each. `targets` are the adapted linears' features."""
    said = []
    narrowest = min(min(size) for size in targets)
    if settings.r > narrowest:
        said.append(f"--r {settings.r} is above the width of the narrowest adapted layer ({narrowest}): more than that "
                    "adds parameters, but no freedom.")  # fmt: skip
    if train == 1:
        said.append("there is a single record to train on: the adapter will repeat it.")
    if not held:
        said.append("nothing is held out: neither the best step nor what the adapter can do will be known.")
    return said
