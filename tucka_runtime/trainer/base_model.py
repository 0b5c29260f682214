"""The base model that adapters are trained on, as transformers loads it. Imports torch and transformers when called."""

import warnings
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


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises ConfigError or ModelLoadError when the folder's tokenizer cannot be used."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer (tokenizer.json), so texts cannot be trained on.")
    if not tokenizer.ends:
        raise ConfigError(f"The model in {folder} has no end-of-sequence token, so completions could not end.")
    return tokenizer


def load_skeleton(folder: Path) -> Any:
    """The folder's model without its weights: its modules' names and sizes. Raises ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with without_marks(folder) as clean, torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(clean, local_files_only=True))
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


def load_model(folder: Path, dtype: str, where: Any) -> Any:
    """Raises ConfigError when the folder's model cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if dtype == "auto" and where.type == "cpu":
        dtype = "float32"  # bf16 products are slower than fp32 on most CPUs
    try:
        with without_marks(folder) as clean:
            model: Any = AutoModelForCausalLM.from_pretrained(clean, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base model in {folder} cannot be loaded: {error}") from error
    return model.to(where)
