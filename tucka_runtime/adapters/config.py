"""adapter_config.json: what it may say, checked field by field before anything is believed.

PEFT's configurations vary over its versions. A field that is not served is accepted only while its value is neutral
(null, false or empty), since it then changes nothing; otherwise it is refused by name, never ignored.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from tucka_runtime.adapters.files import CONFIG_NAME, strict_json
from tucka_runtime.errors import InvalidAdapterError

# Limits of what the kernels and the routed core are built for; published adapters stay far below.
MAX_RANK = 512
MAX_GROUPS = 64
MAX_EXPERTS = 64
MAX_CENTROIDS = 256  # k * t
MAX_SLICES = 64
MAX_SCALE = 1e6  # |alpha|: beyond it the delta leaves the range of fp16 whatever the weights
MAX_ENTRIES = 4096  # names in a list: more than a large model has linears
MAX_NAME = 256
MAX_TEXT = 4096  # paths, regular expressions

# Fields through which a configuration makes a loader import code. They may be null or absent, nothing else.
_CODE_FIELDS = ("auto_mapping", "auto_map", "trust_remote_code")

# LoRA fields that say how the weights were found; they change nothing once the weights are there.
_INERT_LORA_FIELDS = (
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "velora_config",
)

# LoRA fields that make it something else than base(x) + scale · x Aᵀ Bᵀ: what that is.
_OTHER_LORA_FIELDS = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens of a text only",
    "arrow_config": "it routes between other adapters",
    "ensure_weight_tying": "embedding and head are replaced each by itself. Set it to false if neither was trained",
    "kasa_config": "it also changes the base",
    "layer_replication": "it runs layers of the base several times",
    "lora_bias": "it adds a bias of its own",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it changes single rows of the embedding. `modules_to_save` replaces all of it",
    "use_bdlora": "its factors are block-diagonal",
    "use_dora": "DoRA also rescales the base's own weights",
    "use_qalora": "its factors act on groups of inputs",
}
_OTHER_LORA_REMEDY = (
    "Train it without, or merge it into its base (PEFT's merge_and_unload, where it can) and serve the result as a base"
)

# Initialisations that also change the base weights: on the plain base such an adapter computes something else.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class TuckASpec:
    """adapter_config.json of `peft_type` TUCKA; names and defaults are the official ones (tests/golden/README.md)."""

    r: int = 8
    k: int = 3
    t: int = 3
    p: int = 2
    alpha: float = 1
    target_modules: list[str] | str = field(default_factory=list)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    router_name: str = ""
    ec_perturb_scale: float = 1
    use_kaiming_init_ec: bool = False
    use_alb: bool = False
    alb_gamma: float = 1e-3
    log_expert_load: int = 0
    dump_input_and_ec: bool = False
    init_weights: bool = True
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


@dataclass(frozen=True)
class LoRASpec:
    """adapter_config.json of `peft_type` LORA: PEFT's fields that are served, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str = field(default_factory=list)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


AdapterSpec = TuckASpec | LoRASpec
C = TypeVar("C", TuckASpec, LoRASpec)


def parse_config(data: bytes | bytearray) -> AdapterSpec:
    """The configuration in the bytes of an adapter_config.json. Raises InvalidAdapterError."""
    try:
        table = strict_json(data.removeprefix(BOM_UTF8))
    except ValueError as error:
        raise _invalid(f"it cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise _invalid("it is not a JSON object")
    peft_type = table.pop("peft_type", None)
    if peft_type not in ("TUCKA", "LORA"):  # first of all: what else its configuration says is for another kind
        kind = f"{peft_type}, " if isinstance(peft_type, str) and re.fullmatch("[A-Z0-9_]{1,32}", peft_type) else ""
        raise _invalid(f"`peft_type` is {kind}not TUCKA or LORA; other kinds of adapters are not supported")
    for name in _CODE_FIELDS:
        if table.pop(name, None) is not None:
            raise _invalid(
                f"`{name}` is set. Adapters bring no code: set it to null (PEFT fills `auto_mapping` in when an "
                "adapter is made without a `task_type`; it is not needed here)"
            )
    if peft_type == "TUCKA":
        return _parse(table, TuckASpec, required=("r", "k", "t", "p", "alpha", "target_modules"))
    for name in _INERT_LORA_FIELDS:
        table.pop(name, None)
    return _parse(table, LoRASpec, required=("r", "lora_alpha", "target_modules"))


def config_as_dict(config: AdapterSpec) -> dict[str, Any]:
    """The fields as they stand in an adapter_config.json."""
    peft_type = "TUCKA" if isinstance(config, TuckASpec) else "LORA"
    return {**asdict(config), "peft_type": peft_type, "auto_mapping": None}


def _parse(table: dict[str, Any], kind: type[C], required: tuple[str, ...]) -> C:
    for name in required:
        if table.get(name) is None:
            raise _invalid(f"`{name}` is missing")
    known = {f.name for f in fields(kind)}
    for name, value in table.items():
        if name not in known and not _neutral(value):
            if kind is LoRASpec and name in _OTHER_LORA_FIELDS:
                why = _OTHER_LORA_FIELDS[name]
                raise _invalid(f"`{name}` is set, which is not served: {why}. {_OTHER_LORA_REMEDY}")
            raise _invalid(f"{printable(name)} is set, and is not supported. An adapter that needs it is not served")
    for name, value in table.items():
        if name in known:
            _CHECKS[name](name, value)
    config = kind(**{name: value for name, value in table.items() if name in known})
    _check_layers(config)
    if isinstance(config, TuckASpec):
        if config.k * config.t > MAX_CENTROIDS:
            raise _invalid(f"`k` times `t` exceeds {MAX_CENTROIDS}")
    elif isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise _invalid(
            "`init_lora_weights` names an initialisation that changed the base weights. Convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which PEFT has for PiSSA, OLoRA, "
            "CorDA and LoRA-GA, or merge it with merge_and_unload and serve the result as a base"
        )
    return config


def _check_layers(config: AdapterSpec) -> None:
    restricted = config.layers_to_transform not in (None, [])
    if isinstance(config.target_modules, str) and (restricted or config.layers_pattern):
        raise _invalid(
            "`layers_to_transform` and `layers_pattern` need `target_modules` to be a list, as in PEFT. With a regular "
            "expression, name the layers in it"
        )
    if config.layers_pattern and not restricted:
        raise _invalid("`layers_pattern` is set without `layers_to_transform`")


def printable(name: str) -> str:
    """A name from an adapter's files as an error message may show it: only if it is short and plain."""
    return f"`{name}`" if re.fullmatch(r"[A-Za-z0-9_.]{1,128}", name) else "a field with an unprintable name"


def _neutral(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _natural(low: int, high: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _invalid(f"`{name}` must be an integer from {low} to {high}")

    return check


def _number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or abs(value) > MAX_SCALE:
        raise _invalid(f"`{name}` must be a number of at most {MAX_SCALE:g}")


def _flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise _invalid(f"`{name}` must be true or false")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _invalid(f"`{name}` must be a string of at most {MAX_TEXT} characters")


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


def _names(name: str, value: Any) -> None:
    if (
        not isinstance(value, list)
        or len(value) > MAX_ENTRIES
        or not all(isinstance(item, str) and 0 < len(item) <= MAX_NAME for item in value)
    ):
        raise _invalid(f"`{name}` must be a list of at most {MAX_ENTRIES} names of 1 to {MAX_NAME} characters")


def _names_or_text(name: str, value: Any) -> None:
    _text(name, value) if isinstance(value, str) else _names(name, value)


def _targets(name: str, value: Any) -> None:
    _names_or_text(name, value)
    if not value:
        raise _invalid(f"`{name}` is empty: the adapter would change nothing")


def _layers(name: str, value: Any) -> None:
    indices = value if isinstance(value, list) else [value]
    if len(indices) > MAX_ENTRIES or not all(type(item) is int and 0 <= item < MAX_ENTRIES for item in indices):
        raise _invalid(f"`{name}` must be a layer index, or a list of them")


def _layers_pattern(name: str, value: Any) -> None:
    _names_or_text(name, value)
    patterns = [value] if isinstance(value, str) else value
    if not all(re.fullmatch(r"[A-Za-z0-9_.]*", item) for item in patterns):
        raise _invalid(
            f"`{name}` must name the list of layers (such as `layers`); regular expressions are not supported"
        )


def _pattern(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """A check of `rank_pattern` or `alpha_pattern`: module names or regular expressions to values."""

    def check_table(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _invalid(f"`{name}` must be an object")
        _names(name, list(value))
        for item in value.values():
            check(name, item)

    return check_table


def _init(name: str, value: Any) -> None:
    if type(value) is not bool:
        _text(name, value)


def _invalid(reason: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"the adapter's {CONFIG_NAME} cannot be used: {reason}.")


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
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
    "router_name": _text,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "use_rslora": _flag,
    "rank_pattern": _pattern(_natural(1, MAX_RANK)),
    "alpha_pattern": _pattern(_number),
    "fan_in_fan_out": _flag,
    "init_lora_weights": _optional(_init),
    "target_modules": _targets,
    "exclude_modules": _optional(_names_or_text),
    "layers_to_transform": _optional(_layers),
    "layers_pattern": _optional(_layers_pattern),
    "modules_to_save": _optional(_names),
    "bias": _text,
    "task_type": _optional(_text),
    "base_model_name_or_path": _optional(_text),
    "revision": _optional(_text),
    "inference_mode": _flag,
}
