"""The values that single fields of an adapter_config.json may have, and how a refusal names what it refuses."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tucka_runtime.adapters.files import CONFIG_NAME
from tucka_runtime.errors import InvalidAdapterError

# Limits of what the kernels and the routed core are built for; published adapters stay far below.
MAX_RANK = 512
MAX_GROUPS = 64
MAX_EXPERTS = 64
MAX_CENTROIDS = 256  # k * t
MAX_SLICES = 64
MAX_SCALE = 1e6  # |alpha|: beyond it the delta leaves the range of fp16 whatever the weights
MAX_ENTRIES = 4096  # names in a list: more than a large model has linears
MAX_TOKENS = 65536  # rows of the embedding that an adapter brings by itself
MAX_NAME = 256
MAX_MEMBER = 64  # characters of a name in a bank, which requests write behind the bank's own
MAX_TEXT = 4096  # paths, regular expressions


def printable(name: str) -> str:
    """A name from an adapter's files as an error message may show it: only if it is short and plain."""
    return f"`{name}`" if re.fullmatch(r"[A-Za-z0-9_.]{1,128}", name) else "a field with an unprintable name"


def invalid(reason: str) -> InvalidAdapterError:
    """The error for a configuration that cannot be used."""
    return InvalidAdapterError(f"the adapter's {CONFIG_NAME} cannot be used: {reason}.")


def _natural(low: int, high: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise invalid(f"`{name}` must be an integer from {low} to {high}")

    return check


def _number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or abs(value) > MAX_SCALE:
        raise invalid(f"`{name}` must be a number of at most {MAX_SCALE:g}")


def _flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise invalid(f"`{name}` must be true or false")


def text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise invalid(f"`{name}` must be a string of at most {MAX_TEXT} characters")


def optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


def _names(name: str, value: Any) -> None:
    if (
        not isinstance(value, list)
        or len(value) > MAX_ENTRIES
        or not all(isinstance(item, str) and 0 < len(item) <= MAX_NAME for item in value)
    ):
        raise invalid(f"`{name}` must be a list of at most {MAX_ENTRIES} names of 1 to {MAX_NAME} characters")


def _names_or_text(name: str, value: Any) -> None:
    text(name, value) if isinstance(value, str) else _names(name, value)


def _targets(name: str, value: Any) -> None:
    _names_or_text(name, value)
    if not value:
        raise invalid(f"`{name}` is empty: the adapter would change nothing")


def _layers(name: str, value: Any) -> None:
    indices = value if isinstance(value, list) else [value]
    if len(indices) > MAX_ENTRIES or not all(type(item) is int and 0 <= item < MAX_ENTRIES for item in indices):
        raise invalid(f"`{name}` must be a layer index, or a list of them")


def _layers_pattern(name: str, value: Any) -> None:
    _names_or_text(name, value)
    patterns = [value] if isinstance(value, str) else value
    if not all(re.fullmatch(r"[A-Za-z0-9_.]*", item) for item in patterns):
        raise invalid(
            f"`{name}` must name the list of layers (such as `layers`); regular expressions are not supported"
        )


def _pattern(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """A check of `rank_pattern` or `alpha_pattern`: module names or regular expressions to values."""

    def check_table(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise invalid(f"`{name}` must be an object")
        _names(name, list(value))
        for item in value.values():
            check(name, item)

    return check_table


def _tokens(name: str, value: Any) -> None:
    """A check of `trainable_token_indices`: token ids, or those of each table by its name."""
    if isinstance(value, dict):
        _names(name, list(value))
    for ids in value.values() if isinstance(value, dict) else [value]:
        if (
            not isinstance(ids, list)
            or not 0 < len(ids) <= MAX_TOKENS
            or not all(type(token) is int and token >= 0 for token in ids)
            or len(set(ids)) < len(ids)
        ):
            raise invalid(f"`{name}` must be a list of 1 to {MAX_TOKENS} different token ids, or an object of those")


def _members(name: str, value: Any) -> None:
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= MAX_ENTRIES
        or not all(isinstance(item, str) and is_member(item) for item in value)
        or len(set(value)) < len(value)
    ):
        raise invalid(
            f"`{name}` must be a list of 1 to {MAX_ENTRIES} different names of 1 to {MAX_MEMBER} letters, digits or "
            "characters of `. _ @ -`"
        )


def is_member(name: str) -> bool:
    """Whether an adapter in a bank may be called so: it goes into logs and URLs as it is."""
    return bool(re.fullmatch(rf"[A-Za-z0-9._@-]{{1,{MAX_MEMBER}}}", name)) and name not in (".", "..")


def _core(name: str, value: Any) -> None:
    if value not in ("full", "diagonal"):
        raise invalid(f"`{name}` must be `full` or `diagonal`")


def _init(name: str, value: Any) -> None:
    if type(value) is not bool:
        text(name, value)


CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "r": _natural(1, MAX_RANK),
    "k": _natural(1, MAX_GROUPS),
    "t": _natural(1, MAX_EXPERTS),
    "p": _natural(1, MAX_SLICES),
    "alpha": _number,
    "ec_perturb_scale": _number,
    "use_kaiming_init_ec": _flag,
    "use_alb": _flag,
    "alb_gamma": _number,
    "log_expert_load": _number,
    "dump_input_and_ec": _flag,
    "init_weights": _flag,
    "router_name": text,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "lora_bias": _flag,
    "use_dora": _flag,
    "use_rslora": _flag,
    "rank_pattern": _pattern(_natural(1, MAX_RANK)),
    "alpha_pattern": _pattern(_number),
    "fan_in_fan_out": _flag,
    "init_lora_weights": optional(_init),
    "target_modules": _targets,
    "exclude_modules": optional(_names_or_text),
    "layers_to_transform": optional(_layers),
    "layers_pattern": optional(_layers_pattern),
    "modules_to_save": optional(_names),
    "trainable_token_indices": optional(_tokens),
    "bias": text,
    "task_type": optional(text),
    "base_model_name_or_path": optional(text),
    "revision": optional(text),
    "inference_mode": _flag,
    "core": _core,
    "members": _members,
}
