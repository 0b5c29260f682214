"""adapter_config.json: what it may say, checked field by field before anything is believed.

PEFT's configurations vary over its versions. A field that is not served is accepted only while its value is neutral
(null, false or empty), since it then changes nothing; otherwise it is refused by name, never ignored.
"""

import logging
import re
from codecs import BOM_UTF8
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from tucka_runtime.adapters.config_fields import CHECKS, MAX_CENTROIDS, invalid, optional, printable, text
from tucka_runtime.adapters.files import strict_json

log = logging.getLogger(__name__)

# Fields through which a configuration makes a loader import code. They may be null or absent, nothing else.
_CODE_FIELDS = ("auto_map", "trust_remote_code")

# What PEFT writes where an adapter is made without a `task_type`: the base's class and its module, by name.
_MAPPING_FIELDS = {"base_model_class", "parent_library"}

# LoRA fields that say how the weights were found; they change nothing once the weights are there.
_INERT_LORA_FIELDS = (
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
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
    "target_parameters": "it adapts parameters that are no linear layers",
    "use_bdlora": "its factors are block-diagonal",
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
    lora_bias: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str = field(default_factory=list)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


@dataclass(frozen=True)
class BankSpec:
    """adapter_config.json of `peft_type` TUCKA_BANK, which `tucka compress` writes: many adapters, the `members`, over
    one basis of rank `r`. `target_modules` are whole names of linears; `core` is "full" or "diagonal"."""

    r: int = 8
    core: str = "full"
    members: list[str] = field(default_factory=list)
    target_modules: list[str] = field(default_factory=list)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


PeftSpec = TuckASpec | LoRASpec
"""What `peft` knows, whose rules for naming modules hold."""

AdapterSpec = PeftSpec | BankSpec
PEFT_TYPES: dict[type[AdapterSpec], str] = {TuckASpec: "TUCKA", LoRASpec: "LORA", BankSpec: "TUCKA_BANK"}
C = TypeVar("C", TuckASpec, LoRASpec, BankSpec)


def parse_config(data: bytes | bytearray) -> AdapterSpec:
    """The configuration in the bytes of an adapter_config.json. Raises InvalidAdapterError."""
    try:
        table = strict_json(data.removeprefix(BOM_UTF8))
    except ValueError as error:
        raise invalid(f"it cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise invalid("it is not a JSON object")
    peft_type = table.pop("peft_type", None)
    if peft_type not in PEFT_TYPES.values():  # first of all: what else its configuration says is for another kind
        kind = f"{peft_type}, " if isinstance(peft_type, str) and re.fullmatch("[A-Z0-9_]{1,32}", peft_type) else ""
        raise invalid(f"`peft_type` is {kind}not TUCKA, LORA or TUCKA_BANK; other kinds of adapters are not supported")
    for name in _CODE_FIELDS:
        if table.pop(name, None) is not None:
            raise invalid(f"`{name}` is set. Adapters bring no code: set it to null")
    _ignore_mapping(table.pop("auto_mapping", None))
    table.pop("peft_version", None)  # who wrote it changes nothing
    if peft_type == "TUCKA":
        return _parse(table, TuckASpec, required=("r", "k", "t", "p", "alpha", "target_modules"))
    if peft_type == "TUCKA_BANK":
        return _parse(table, BankSpec, required=("r", "core", "members", "target_modules"))
    for name in _INERT_LORA_FIELDS:
        table.pop(name, None)
    return _parse(table, LoRASpec, required=("r", "lora_alpha", "target_modules"))


def _ignore_mapping(value: Any) -> None:
    """`auto_mapping` tells PEFT what class to import for the base, which is there already: it is said, nothing else."""
    if value is None:
        return
    if not isinstance(value, dict) or not value.keys() <= _MAPPING_FIELDS:
        raise invalid(
            "`auto_mapping` is not what PEFT writes, the names of the base's class and of its module. Set it to null"
        )
    for name in value.values():
        optional(text)("auto_mapping", name)
    log.warning(
        "an adapter that is being loaded has an `auto_mapping`, which is ignored: nothing is imported for adapters. "
        "PEFT writes it where an adapter is made without a `task_type`"
    )


def config_as_dict(config: AdapterSpec) -> dict[str, Any]:
    """The fields as they stand in an adapter_config.json."""
    return {**asdict(config), "peft_type": PEFT_TYPES[type(config)], "auto_mapping": None}


def _parse(table: dict[str, Any], kind: type[C], required: tuple[str, ...]) -> C:
    for name in required:
        if table.get(name) is None:
            raise invalid(f"`{name}` is missing")
    known = {f.name for f in fields(kind)}
    for name, value in table.items():
        if name not in known and not _neutral(value):
            if kind is LoRASpec and name in _OTHER_LORA_FIELDS:
                why = _OTHER_LORA_FIELDS[name]
                raise invalid(f"`{name}` is set, which is not served: {why}. {_OTHER_LORA_REMEDY}")
            raise invalid(f"{printable(name)} is set, and is not supported. An adapter that needs it is not served")
    for name, value in table.items():
        if name in known:
            CHECKS[name](name, value)
    config = kind(**{name: value for name, value in table.items() if name in known})
    if isinstance(config, BankSpec):
        if not isinstance(config.target_modules, list):
            raise invalid("`target_modules` of a bank must be a list of whole names of linears")
        return config
    _check_layers(config)
    if isinstance(config, TuckASpec):
        if config.k * config.t > MAX_CENTROIDS:
            raise invalid(f"`k` times `t` exceeds {MAX_CENTROIDS}")
        return config
    if config.use_dora and config.lora_bias:
        raise invalid(
            "`use_dora` and `lora_bias` are both set, which PEFT has no meaning for. Train it with one of them"
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise invalid(
            "`init_lora_weights` names an initialisation that changed the base weights. Convert the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which PEFT has for PiSSA, OLoRA, "
            "CorDA and LoRA-GA, or merge it with merge_and_unload and serve the result as a base"
        )
    return config


def _check_layers(config: PeftSpec) -> None:
    restricted = config.layers_to_transform not in (None, [])
    if isinstance(config.target_modules, str) and (restricted or config.layers_pattern):
        raise invalid(
            "`layers_to_transform` and `layers_pattern` need `target_modules` to be a list, as in PEFT. With a regular "
            "expression, name the layers in it"
        )
    if config.layers_pattern and not restricted:
        raise invalid("`layers_pattern` is set without `layers_to_transform`")


def _neutral(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})
