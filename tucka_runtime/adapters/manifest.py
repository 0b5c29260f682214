"""Which tensors an adapter must have on a given base, and what it means when it has others.

Names and shapes follow from the configuration and the base alone, so they are known before a weight is read.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from tucka_runtime.adapters.base_layout import BaseLayout
from tucka_runtime.adapters.config import AdapterSpec, LoRASpec, TuckASpec
from tucka_runtime.adapters.config_fields import printable
from tucka_runtime.adapters.safefile import Entry
from tucka_runtime.adapters.targets import is_all_linear, match_targets
from tucka_runtime.errors import BaseModelMismatchError, InvalidAdapterError

PREFIX = "base_model.model."

_ADAPTER_NAME = re.compile(r"\.(lora_([AB]|magnitude_vector)\.\w+\.(weight|bias)|tucka_(g|c|u|ec)\.\w+)$", re.ASCII)
"""How a tensor is called inside a model that PEFT has put an adapter into: with the adapter's name."""

NAMES_SHOWN = 3  # tensor names in one error message


@dataclass(frozen=True)
class Expected:
    """Shape a tensor must have. `from_base` marks the axes whose size the base decides, not the configuration."""

    shape: tuple[int, ...]
    from_base: tuple[bool, ...]


def expected_tensors(
    config: AdapterSpec, targets: list[str], router: str | None, ranks: Mapping[str, int], base: BaseLayout
) -> dict[str, Expected]:
    """Every tensor of the file by its name in it. `ranks` has LoRA's rank of each target."""
    expected = _expected_saved(config, targets, base)
    for path in targets:
        expected |= _expected_module(config, path, base.linears[path], ranks.get(path), path == router)
    return expected


def find_targets(config: AdapterSpec, base: BaseLayout) -> list[str]:
    """The linears the adapter adapts, in declaration order; at least one.

    Raises InvalidAdapterError if it reaches something else too, BaseModelMismatchError if it reaches nothing.
    """
    linears = list(base.linears)
    if is_all_linear(config):
        targets = match_targets(config, linears)
    else:
        others = {name.rpartition(".")[0] for name in base.parameters} - base.linears.keys()
        matched = match_targets(config, [*linears, *sorted(others)])
        targets = [path for path in matched if path in base.linears]
        if len(targets) < len(matched):
            raise InvalidAdapterError(
                f"the adapter's `target_modules` reach {_some(set(matched) - set(targets))}. Only the linear layers "
                "inside the decoder blocks can be adapted; an embedding, a norm or the head can be replaced whole, "
                "through `modules_to_save`."
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
    for entry in set(config.modules_to_save or ()):
        names = [name for name in base.parameters if any(owner.endswith(entry) for owner in _owners(name))]
        if not names:
            raise BaseModelMismatchError(
                "an entry of the adapter's `modules_to_save` matches no module of this base model. It was made for "
                "another base, or for another task than text generation: this one's are called "
                f"{_last_names(name.rpartition('.')[0] for name in base.parameters)}."
            )
        for name in names:
            shape = base.parameters[name]
            expected[PREFIX + name] = Expected(tuple(shape), (True,) * len(shape))
    both = [path for path in targets if f"{PREFIX}{path}.weight" in expected]
    if both:
        raise InvalidAdapterError(f"the adapter's `modules_to_save` and `target_modules` both reach {_some(both)}.")
    return expected


def _owners(parameter: str) -> list[str]:
    """The dotted paths of the modules a parameter is in."""
    parts = parameter.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _expected_module(
    config: AdapterSpec, path: str, size: tuple[int, int], rank: int | None, is_router: bool
) -> dict[str, Expected]:
    d_in, d_out = size
    if isinstance(config, LoRASpec):
        r = config.r if rank is None else rank
        expected = {
            f"{PREFIX}{path}.lora_A.weight": Expected((r, d_in), (False, True)),
            f"{PREFIX}{path}.lora_B.weight": Expected((d_out, r), (True, False)),
        }
        if config.use_dora:
            expected[f"{PREFIX}{path}.lora_magnitude_vector"] = Expected((d_out,), (True,))
        if config.lora_bias:
            expected[f"{PREFIX}{path}.lora_B.bias"] = Expected((d_out,), (True,))
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
    foreign = [name for name in extra if adapted_path(name) not in (None, *base.linears)]
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
        return "Trained biases are not served. Train it with bias='none', or name whole modules in `modules_to_save`."
    if all(name.removeprefix(PREFIX) in base.parameters for name in extra):
        return (
            "They are the base's own, as PEFT adds them for a new vocabulary. Save it with save_embedding_layers=False "
            "if they were not trained, else train them through `modules_to_save`."
        )
    return "It is another kind of LoRA than is served, or its two files do not belong together."


def adapted_path(name: str) -> str | None:
    """The module an adapter tensor belongs to; None for other tensors."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.(tucka_\w+|lora_\w+(\.weight|\.bias)?)", name, re.ASCII)
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
            raise BaseModelMismatchError(
                f"{message} on this base model, and has another. It was made for another base."
            )
        raise InvalidAdapterError(f"{message} by its configuration, and has another. Save it again.")


def _last_names(paths: Iterable[str]) -> str:
    """What modules are called inside their layers, each once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _some(names: Iterable[str]) -> str:
    """The first few of some names that came from outside, as an error message may show them."""
    shown = [printable(name) for name in itertools.islice(sorted(names), NAMES_SHOWN)]
    return ", ".join(shown)
