"""Which tensors an adapter must have on a given base, and what it means when it has others.

Names and shapes follow from the configuration and the base alone, so they are known before a weight is read.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from tucka_runtime.adapters.config import AdapterSpec, BankSpec, LoRASpec, TuckASpec
from tucka_runtime.adapters.config_fields import printable
from tucka_runtime.adapters.safefile import Entry
from tucka_runtime.adapters.targets import is_all_linear, match_targets
from tucka_runtime.errors import BaseModelMismatchError, InvalidAdapterError
from tucka_runtime.messages import BaseLayout

PREFIX = "base_model.model."

_ADAPTER_NAME = re.compile(r"\.(lora_([AB]|magnitude_vector)\.\w+\.(weight|bias)|tucka_(g|c|u|ec)\.\w+)$", re.ASCII)
"""How a tensor is called inside a model that PEFT has put an adapter into: with the adapter's name."""

TOKENS = "token_adapter.trainable_tokens_delta"
"""What single rows of an embedding are called within it."""

OWN_BIAS = "base_layer.bias"
"""What the base's own bias of an adapted linear is called within it, where it was trained too."""

TRAINED_BIASES = ("lora_only", "all")
"""Values of `bias` with which PEFT trains and saves those; with "all" the other modules' too, which are not served."""

RESIZED = (
    "Its vocabulary was {} for training: save it with PEFT's save_embedding_layers=True, and where it adapts one of "
    "the embedding and the head, name the other in `modules_to_save`, so that all rows of both are in its file. Or "
    "resize the base in the same way (transformers' resize_token_embeddings to {} rows), save it with the adapter's "
    "tokenizer, and serve that as the base."
)

NAMES_SHOWN = 3  # tensor names in one error message


@dataclass(frozen=True)
class Expected:
    """Shape a tensor must have. `from_base` marks the axes whose size the base decides, not the configuration;
    `vocabulary` is the one of them that has an entry for each token, if there is one."""

    shape: tuple[int, ...]
    from_base: tuple[bool, ...]
    vocabulary: int | None = None


def expected_tensors(
    config: AdapterSpec, targets: list[str], router: str | None, ranks: Mapping[str, int], base: BaseLayout
) -> dict[str, Expected]:
    """Every tensor of the file by its name in it. `ranks` has LoRA's rank of each target."""
    expected = _expected_saved(config, targets, base)
    for path in targets:
        if path == base.embed:
            expected |= _expected_embedding(config, path, ranks[path], base)
        else:
            size = base.linears.get(path) or base.parameters[f"{path}.weight"][::-1]
            expected |= _expected_module(config, path, (size[0], size[1]), ranks.get(path), path == router, base)
    for path, tokens in find_tokens(config, base).items():
        shape = (len(tokens), base.parameters[f"{path}.weight"][1])
        expected[f"{PREFIX}{path}.{TOKENS}"] = Expected(shape, (False, True))
    both = [path for path in targets if f"{PREFIX}{path}.{TOKENS}" in expected]
    both += [path for path in base.tables if {f"{PREFIX}{path}.{TOKENS}", f"{PREFIX}{path}.weight"} <= expected.keys()]
    if both:
        raise InvalidAdapterError(
            f"the adapter changes single rows of {_some(both)} (`trainable_token_indices`) and adapts or replaces the "
            "whole too. Train it with one of them."
        )
    return expected


def find_tokens(config: AdapterSpec, base: BaseLayout) -> dict[str, list[int]]:
    """The rows of the embedding or the head that an adapter brings, by the path of either in its file. Raises
    InvalidAdapterError, BaseModelMismatchError."""
    own = config.trainable_token_indices if isinstance(config, LoRASpec) else None
    if not own:
        return {}
    named = {base.embed: own} if isinstance(own, list) else {}
    for name, tokens in own.items() if isinstance(own, dict) else ():
        paths = [path for path in base.tables if f".{path}".endswith(f".{name}")]
        if not paths or (base.tied and paths == [base.head]):
            raise InvalidAdapterError(
                "the adapter's `trainable_token_indices` name something else than the embedding of tokens or a head of "
                f"its own: here they are {_last_names(base.tables)}{', one table' if base.tied else ''}."
            )
        named |= dict.fromkeys(paths, tokens)
    rows = base.parameters[f"{base.embed}.weight"][0]
    if any(token >= rows for tokens in named.values() for token in tokens):
        raise BaseModelMismatchError(
            f"the adapter's `trainable_token_indices` go past this base's vocabulary of {rows}. "
            + RESIZED.format("grown", f"over {max(max(tokens, default=0) for tokens in named.values())}")
        )
    return named


def _expected_embedding(config: AdapterSpec, path: str, rank: int, base: BaseLayout) -> dict[str, Expected]:
    assert isinstance(config, LoRASpec)
    if config.lora_bias:
        raise InvalidAdapterError(f"the adapter has `lora_bias` on {_some([path])}, which no embedding has in PEFT.")
    rows, width = base.parameters[f"{path}.weight"]
    expected = {
        f"{PREFIX}{path}.lora_embedding_A": Expected((rank, rows), (False, True), vocabulary=1),
        f"{PREFIX}{path}.lora_embedding_B": Expected((width, rank), (True, False)),
    }
    if config.use_dora:
        expected[f"{PREFIX}{path}.lora_magnitude_vector"] = Expected((width,), (True,))
    return expected


def expected_tables(names: Set[str], base: BaseLayout) -> dict[str, tuple[str | None, Expected]]:
    """The base's own embedding and head among a file's `names`, as PEFT adds them unasked (`save_embedding_layers`): by
    the name in the file, which parameter it stands for. None: for none, since it is beside what `modules_to_save` puts
    into their place, as a copy of that or of the base's own."""
    found: dict[str, tuple[str | None, Expected]] = {}
    for path in base.tables:
        expected = Expected(tuple(base.parameters[f"{path}.weight"]), (True, True), vocabulary=0)
        own = dict.fromkeys(("weight", "base_layer.weight", "token_adapter.base_layer.weight"), f"{path}.weight")
        for part, parameter in (own | {"modules_to_save.weight": None, "original_module.weight": None}).items():
            if (name := f"{PREFIX}{path}.{part}") in names and (parameter or f"{PREFIX}{path}.weight" in names):
                found[name] = parameter, expected
    return found


def expected_copies(names: Set[str], expected: Mapping[str, Expected], base: BaseLayout) -> dict[str, Expected]:
    """The rows of a tied head among a file's `names`, which PEFT saves beside those of the embedding that they are."""
    head, embed = f"{PREFIX}{base.head}.{TOKENS}", f"{PREFIX}{base.embed}.{TOKENS}"
    copied = base.tied and head in names and embed in expected and head not in expected
    return {head: expected[embed]} if copied else {}


def find_targets(config: AdapterSpec, base: BaseLayout) -> list[str]:
    """The linears the adapter adapts, in declaration order; at least one.

    Raises InvalidAdapterError if it reaches something else too, BaseModelMismatchError if it reaches nothing.
    """
    linears = list(base.linears)
    if isinstance(config, BankSpec):
        named = set(config.target_modules)
        if foreign := named - base.linears.keys():
            raise BaseModelMismatchError(
                f"the bank's `target_modules` name {_some(foreign)}, and this base model has no such linear inside its "
                "decoder blocks. It was made for another base."
            )
        return [path for path in linears if path in named]
    if is_all_linear(config):
        targets = match_targets(config, linears)
    else:
        others = {name.rpartition(".")[0] for name in base.parameters} - base.linears.keys()
        matched = match_targets(config, [*linears, *sorted(others)])
        served = {*linears, *(base.tables if isinstance(config, LoRASpec) else ())}
        targets = [path for path in matched if path in served]
        if len(targets) < len(matched):
            raise InvalidAdapterError(
                f"the adapter's `target_modules` reach {_some(set(matched) - set(targets))}. Only the linear layers "
                "inside the decoder blocks can be adapted, by a LoRA the embedding of tokens and the head too; all "
                "else can be replaced whole, through `modules_to_save`."
            )
    if not targets:
        raise BaseModelMismatchError(
            "no module of this base model matches the adapter's `target_modules`. It was made for another base: this "
            f"one's linears are called {_last_names(linears)}."
        )
    return targets


def find_router(config: TuckASpec, targets: list[str]) -> str:
    """The target whose input decides the route: the first, which is all that can be served exactly.

    Raises InvalidAdapterError if the adapter names another.
    """
    if not config.router_name or config.router_name == targets[0]:
        return targets[0]
    if config.router_name not in targets:
        raise InvalidAdapterError(
            "the adapter's `router_name` is not one of the modules it adapts. Give a full module name, such as "
            f"`{targets[0]}`, or leave it empty."
        )
    raise InvalidAdapterError(
        "the adapter's router runs after another module it adapts, which would then use the previous forward's route. "
        f"Train it with `router_name` empty, or set to the first adapted module, `{targets[0]}`."
    )


def _expected_saved(config: AdapterSpec, targets: list[str], base: BaseLayout) -> dict[str, Expected]:
    """PEFT's matching: every module whose name ends with an entry is replaced, with all that is in it."""
    expected: dict[str, Expected] = {}
    for entry in set(() if isinstance(config, BankSpec) else config.modules_to_save or ()):
        names = [name for name in base.parameters if any(owner.endswith(entry) for owner in _owners(name))]
        if not names:
            raise BaseModelMismatchError(
                "an entry of the adapter's `modules_to_save` matches no module of this base model. It was made for "
                "another base, or for another task than text generation: this one's are called "
                f"{_last_names(name.rpartition('.')[0] for name in base.parameters)}."
            )
        for name in names:
            shape = base.parameters[name]
            vocabulary = 0 if name.removesuffix(".weight") in base.tables else None
            expected[PREFIX + name] = Expected(tuple(shape), (True,) * len(shape), vocabulary)
    both = [path for path in targets if f"{PREFIX}{path}.weight" in expected]
    if both:
        raise InvalidAdapterError(f"the adapter's `modules_to_save` and `target_modules` both reach {_some(both)}.")
    return expected


def _owners(parameter: str) -> list[str]:
    """The dotted paths of the modules a parameter is in."""
    parts = parameter.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _expected_module(
    config: AdapterSpec, path: str, size: tuple[int, int], rank: int | None, is_router: bool, base: BaseLayout
) -> dict[str, Expected]:
    d_in, d_out = size
    if isinstance(config, BankSpec):
        core = (config.r,) * (1 if config.core == "diagonal" else 2)
        return {
            f"{PREFIX}{path}.bank_u": Expected((config.r, d_in), (False, True)),
            f"{PREFIX}{path}.bank_e": Expected((config.r, d_out), (False, True)),
            f"{PREFIX}{path}.bank_core": Expected((len(config.members), *core), (False,) * (1 + len(core))),
        }
    if isinstance(config, LoRASpec):
        r, vocabulary = config.r if rank is None else rank, 0 if path == base.head else None
        expected = {
            f"{PREFIX}{path}.lora_A.weight": Expected((r, d_in), (False, True)),
            f"{PREFIX}{path}.lora_B.weight": Expected((d_out, r), (True, False), vocabulary),
        }
        if config.use_dora:
            expected[f"{PREFIX}{path}.lora_magnitude_vector"] = Expected((d_out,), (True,), vocabulary)
        if config.lora_bias:
            expected[f"{PREFIX}{path}.lora_B.bias"] = Expected((d_out,), (True,), vocabulary)
        own = base.parameters.get(f"{path}.bias")
        if own is not None and config.bias in TRAINED_BIASES:
            expected[f"{PREFIX}{path}.{OWN_BIAS}"] = Expected((d_out,), (True,))
        return expected
    k, t, p, r = config.k, config.t, config.p, config.r
    expected = {
        f"{PREFIX}{path}.tucka_g": Expected((k, p, r, r), (False, False, False, False)),
        f"{PREFIX}{path}.tucka_c": Expected((t, p), (False, False)),
        f"{PREFIX}{path}.tucka_u": Expected((d_in, r), (True, False)),
    }
    if is_router:
        expected[f"{PREFIX}{path}.tucka_ec"] = Expected((k * t, d_in), (False, True))
    return expected


def check_names(names: Set[str], expected: Set[str], targets: list[str], base: BaseLayout) -> None:
    """Raise BaseModelMismatchError for whole modules missing or foreign, InvalidAdapterError for single tensors."""
    extra = sorted(names - expected)
    missing = sorted(expected - names)
    if not names:
        raise InvalidAdapterError(
            "the adapter's weights file has no tensors. DeepSpeed's ZeRO-3 leaves it so where every process holds a "
            "part: save with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint."
        )
    if named := sorted(name for name in extra if _ADAPTER_NAME.search(name)):
        raise InvalidAdapterError(
            f"the adapter's tensors have an adapter's name in theirs ({_some(named)}), as in a model's own state_dict. "
            "Save it with PEFT's save_pretrained, which leaves the name out (`default.` in lora_A.default.weight)."
        )
    foreign = [name for name in extra if adapted_path(name) not in (None, *base.linears, *base.tables)]
    if foreign:
        raise BaseModelMismatchError(
            f"the adapter has {len(foreign)} tensors for modules that this base model does not have "
            f"({_some(foreign)}). It was made for another base."
        )
    present = {adapted_path(name) for name in names}
    absent = [path for path in targets if path not in present]
    if absent:
        raise BaseModelMismatchError(
            f"the adapter has no tensors for {len(absent)} of the {len(targets)} modules of this base model that its "
            f"configuration adapts ({_some(absent)}). It was made for another base, or is incomplete."
        )
    if extra:
        raise InvalidAdapterError(
            f"the adapter has {len(extra)} tensors that its configuration does not account for ({_some(extra)}). "
            + _remedy(extra, base)
        )
    if missing:
        raise InvalidAdapterError(
            f"the adapter lacks {len(missing)} tensors that its configuration calls for ({_some(missing)}). "
            "Save it again."
        )


def _remedy(extra: list[str], base: BaseLayout) -> str:
    """What to do about tensors that the configuration does not account for."""
    if all(name.endswith(".bias") for name in extra):
        return (
            "Of this base's own biases those of adapted linears can be trained, where they have one: with "
            "bias='lora_only'. Name the modules of others in `modules_to_save`."
        )
    if all(name.removeprefix(PREFIX) in base.parameters for name in extra):
        return "They are the base's own. Name the modules that they are in in `modules_to_save`, or leave them out."
    return "It is another kind of LoRA than is served, or its two files do not belong together."


def adapted_path(name: str) -> str | None:
    """The module an adapter tensor belongs to; None for other tensors."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.(tucka_\w+|bank_\w+|lora_\w+(\.weight|\.bias)?)", name, re.ASCII)
    return match and match[1]


def check_shapes(entries: Mapping[str, Entry], expected: Mapping[str, Expected]) -> None:
    """Raise BaseModelMismatchError if a size that the base decides is wrong, InvalidAdapterError if another is."""
    for name, want in expected.items():
        shape = entries[name].shape
        if shape == want.shape:
            continue
        message = f"the adapter's tensor {name} should have shape {want.shape}"
        if len(shape) == len(want.shape) and all(
            free or have == need for have, need, free in zip(shape, want.shape, want.from_base, strict=True)
        ):
            raise BaseModelMismatchError(f"{message} on this base model, and has another. {_other_base(shape, want)}")
        raise InvalidAdapterError(f"{message} by its configuration, and has another. Save it again.")


def _other_base(shape: tuple[int, ...], want: Expected) -> str:
    """What base a tensor of this shape was made for."""
    at = want.vocabulary
    if at is None or any(have != need for i, (have, need) in enumerate(zip(shape, want.shape, strict=True)) if i != at):
        return "It was made for another base."
    return RESIZED.format("grown" if shape[at] > want.shape[at] else "cut", shape[at])


def _last_names(paths: Iterable[str]) -> str:
    """What modules are called inside their layers, each once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _some(names: Iterable[str]) -> str:
    """The first few of some names that came from outside, as an error message may show them."""
    shown = [printable(name) for name in itertools.islice(sorted(names), NAMES_SHOWN)]
    return ", ".join(shown)
