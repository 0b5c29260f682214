"""The base model that adapters are trained on, as transformers loads it. Imports torch and transformers when called."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tucka_runtime.base_files import without_marks
from tucka_runtime.errors import ConfigError
from tucka_runtime.tokenizer import Tokenizer


def load_base(folder: Path, dtype: str, device: str) -> tuple[Any, Tokenizer, Any]:
    """(model, tokenizer, torch device) from a folder. Raises ConfigError when it cannot be used."""
    where = choose_device(device)
    return load_model(folder, dtype, where), load_tokenizer(folder), where


def choose_device(device: str) -> Any:
    """The torch device that a setting names. Raises ConfigError where it is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees none. Use --device cpu.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def load_tokenizer(folder: Path, classify: bool = False) -> Tokenizer:
    """Raises ConfigError or ModelLoadError when the folder's tokenizer cannot be used; labelled texts need no end."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer (tokenizer.json), so texts cannot be trained on.")
    if not tokenizer.ends and not classify:
        raise ConfigError(f"The model in {folder} has no end-of-sequence token, so completions could not end.")
    return tokenizer


def load_skeleton(folder: Path, classify: bool = False) -> Any:
    """The folder's model without its weights, with a language model's head or a classifier's: its modules' names and
    sizes. Raises ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    try:
        with without_marks(folder) as clean, torch.device("meta"):
            return kind.from_config(AutoConfig.from_pretrained(clean, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base model in {folder} cannot be loaded: {error}") from error


def prepare(model: Any, packing: bool, checkpointing: bool) -> None:
    """Readies a model for the loop. Raises ConfigError where it cannot keep records apart that share a row."""
    import torch

    if checkpointing:
        with warnings.catch_warnings():
            # Transformers renames the method, and the older releases know the old name alone.
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not packing:
        return
    size = min(int(model.config.get_text_config().vocab_size), 97)
    ids = torch.arange(24, device=model.device)[None] * 7 % size
    positions = torch.cat([torch.arange(8), torch.arange(16)])[None].to(model.device)
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 8:].float()
        alone = model(input_ids=ids[:, 8:], use_cache=False).logits[0].float()
    if (together - alone).abs().max() > 0.02 * alone.abs().max():
        raise ConfigError("--packing: this model does not keep records apart that share a row. Leave it out.")


def load_model(folder: Path, dtype: str, where: Any, load_in: str | None = None) -> Any:
    """A language model, whose linears are quantised to `load_in` ("4bit" or "8bit") where that is given. Raises
    ConfigError when the folder's model cannot be loaded."""
    from transformers import AutoModelForCausalLM

    return _pretrained(AutoModelForCausalLM, folder, dtype, where, load_in)


def load_classifier(
    folder: Path, dtype: str, where: Any, labels: Sequence[str], load_in: str | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The folder's model with a head over the labels, and the names of the modules that the folder has no weights of,
    which are the head's. Raises ConfigError as `load_model` does."""
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(labels))
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of the head, which is missing as it should be
    model, info = _pretrained(
        AutoModelForSequenceClassification, folder, dtype, where, load_in, num_labels=len(labels), id2label=names,
        label2id={label: i for i, label in names.items()}, output_loading_info=True,
    )  # fmt: skip
    log.setLevel(level)
    missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
    return model, tuple(sorted({_whole(model, name, missing) for name in missing}))


def _whole(model: Any, name: str, missing: set[str]) -> str:
    """The outermost module around `name` of which every weight is missing."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        outer = ".".join(parts[:i])
        within = {n for n, m in model.get_submodule(outer).named_modules(prefix=outer) if m._parameters}
        if within <= missing:
            return outer
    return name


def _pretrained(kind: Any, folder: Path, dtype: str, where: Any, load_in: str | None, **more: Any) -> Any:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if dtype == "auto" and where.type == "cpu":
        dtype = "float32"  # bf16 products are slower than fp32 on most CPUs
    if load_in:
        more |= {"quantization_config": _quantised(load_in, dtype), "device_map": {"": where}}
    try:
        with without_marks(folder) as clean:
            found: Any = kind.from_pretrained(clean, dtype=dtype, local_files_only=True, **more)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base model in {folder} cannot be loaded: {error}") from error
    if load_in:
        for module in (found[0] if isinstance(found, tuple) else found).modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Else the first evaluation packs the weights in a form through which no gradient goes.
                module.support_avx512bf16_for_cpu = False
        return found
    return (found[0].to(where), found[1]) if isinstance(found, tuple) else found.to(where)


def _quantised(load_in: str, dtype: str) -> Any:
    """bitsandbytes' types: 4 bits as NF4 (QLoRA's), whose products are computed in `dtype`, or LLM.int8()."""
    import torch
    from transformers import BitsAndBytesConfig

    # It says of every product that LLM.int8() rounds inputs to fp16 first.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
