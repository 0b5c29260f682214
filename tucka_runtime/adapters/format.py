"""An adapter on disk: the official PEFT layout (`adapter_config.json`, `adapter_model.safetensors`), read and written.

Reading trusts nothing: the configuration, the header, the exact set of tensors and their shapes are checked before a
weight is read, and every weight before it is used. Equations and keys: docs/architecture.md and tests/golden/README.md.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tucka_runtime.adapters.config import (
    AdapterConfig,
    LoRAConfig,
    TuckAConfig,
    config_as_dict,
    parse_config,
    printable,
)
from tucka_runtime.adapters.files import (
    CONFIG_NAME,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    open_file,
    open_folder,
    read_config,
    read_training,
    start_digest,
    strict_json,
    write_file,
)
from tucka_runtime.adapters.safefile import Entry, read_header, read_tensors
from tucka_runtime.adapters.targets import is_all_linear, match_targets, pattern_values
from tucka_runtime.errors import BaseModelMismatchError, InvalidAdapterError

__all__ = [
    "Adapter",
    "BaseLayout",
    "LoRAConfig",
    "LoRAModule",
    "TuckAConfig",
    "TuckAModule",
    "match_targets",
    "read_adapter",
    "write_adapter",
]

PREFIX = "base_model.model."

# The maths divides by Euclidean norms in fp32: the square of a norm must be a normal fp32 number.
MIN_NORM, MAX_NORM = 1e-18, 1e18

NAMES_SHOWN = 3  # tensor names in one error message


@dataclass(frozen=True)
class BaseLayout:
    """What an adapter needs to know of a base model.

    linears: dotted module path -> (d_in, d_out) of every linear an adapter may adapt, in the order they are declared,
    which is the order they run in; the head is not among them. parameters: name -> shape of every parameter that
    `modules_to_save` may replace, as the base stores it (Conv1D weights are (in, out)). fingerprint: identity of the
    base's weights.
    """

    linears: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class TuckAModule:
    """One adapted linear, fp32, as stored (not normalised): g (k, p, r, r), c (t, p), u (d_in, r)."""

    g: torch.Tensor
    c: torch.Tensor
    u: torch.Tensor


@dataclass(frozen=True, eq=False)
class LoRAModule:
    """One adapted linear, fp32: a (r, d_in), b (d_out, r); the change is scale · x aᵀ bᵀ."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter.

    modules: by module path, in the base's declaration order. router and ec (k·t, d_in of the router; fp32) are None
    for LoRA. saved: whole replacements of base parameters by name, in the base's layout; a replaced embedding leaves
    a tied head as it was. training: the training.json beside it, if that is a JSON object.
    """

    config: AdapterConfig
    digest: str
    modules: dict[str, TuckAModule | LoRAModule]
    router: str | None
    ec: torch.Tensor | None
    saved: dict[str, torch.Tensor]
    training: dict[str, Any] | None

    @property
    def kind(self) -> str:
        return "tucka" if isinstance(self.config, TuckAConfig) else "lora"


@dataclass(frozen=True)
class _Expected:
    """Shape a tensor must have. `from_base` marks the axes whose size the base decides, not the configuration."""

    shape: tuple[int, ...]
    from_base: tuple[bool, ...]


def read_adapter(folder: Path, base: BaseLayout) -> Adapter:
    """The adapter in `folder`, checked against the base it is to run on.

    Raises InvalidAdapterError (malformed, unsafe, not supported) or BaseModelMismatchError (made for another base).
    """
    with open_folder(folder) as folder_fd:
        config_bytes = read_config(folder_fd)
        config = parse_config(config_bytes)
        training = _parse_training(read_training(folder_fd))
        if training and training.get("base_fingerprint") not in (None, base.fingerprint):
            raise BaseModelMismatchError(
                "the adapter was trained on other base weights: the fingerprint in its training.json differs from "
                "this model's. Load it beside the base it was trained on."
            )
        targets = _find_targets(config, base)
        router = _find_router(config, targets) if isinstance(config, TuckAConfig) else None
        ranks = pattern_values(config.rank_pattern, targets, config.r) if isinstance(config, LoRAConfig) else {}
        expected = _expected_saved(config, targets, base)
        for path in targets:
            expected |= _expected_module(config, path, base.linears[path], ranks.get(path), path == router)
        with open_file(folder_fd, WEIGHTS_NAME, MAX_WEIGHTS_BYTES) as (file, size):
            digest = start_digest(config_bytes, size)
            entries = read_header(file, size, digest)
            _check_names(entries.keys(), expected.keys(), targets, base)
            _check_shapes(entries, expected)
            tensors = {
                name.removeprefix(PREFIX): _checked(name, tensor)
                for name, tensor in read_tensors(file, entries, digest)
            }
    saved = {name: tensor for name, tensor in tensors.items() if name in base.parameters}
    modules: dict[str, TuckAModule | LoRAModule]
    if isinstance(config, LoRAConfig):
        scales = _lora_scales(config, ranks)
        modules = {
            path: LoRAModule(tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"], scales[path])
            for path in targets
        }
        return Adapter(config, digest.hexdigest(), modules, None, None, saved, training)
    ec = tensors[f"{router}.tucka_ec"]
    _check_norm(f"{router}.tucka_ec", ec.view(config.k, -1))
    modules = {}
    for path in targets:
        g, c, u = (tensors[f"{path}.tucka_{part}"] for part in "gcu")
        _check_norm(f"{path}.tucka_g", g.view(config.k, -1))
        _check_norm(f"{path}.tucka_c", c.view(1, -1))
        _check_norm(f"{path}.tucka_u", u.view(1, -1))
        modules[path] = TuckAModule(g, c, u)
    return Adapter(config, digest.hexdigest(), modules, router, ec, saved, training)


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write an adapter in the official layout and return its digest.

    `tensors` go by their names inside the base (`model.layers.0.self_attn.q_proj.tucka_g`, `lm_head.weight`); the
    official prefix is added here. Each file is replaced atomically and the configuration comes last, so a new folder
    that has one is complete. Raises OSError if the disk refuses.
    """
    prefixed = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            raise ValueError(f"{name}: give names without {PREFIX}, it is added here")
        prefixed[PREFIX + name] = tensor.detach().cpu().contiguous()
    weights = save(prefixed, metadata={"format": "pt"})
    config_bytes = json.dumps(config_as_dict(config), indent=2, sort_keys=True).encode()
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder, WEIGHTS_NAME, weights)
    write_file(folder, CONFIG_NAME, config_bytes)
    digest = start_digest(config_bytes, len(weights))
    digest.update(weights)
    return digest.hexdigest()


def _parse_training(data: bytes | bytearray | None) -> dict[str, Any] | None:
    try:
        training = strict_json(data) if data else None
    except ValueError:
        return None
    return training if isinstance(training, dict) else None


def _find_targets(config: AdapterConfig, base: BaseLayout) -> list[str]:
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
            "no module of this base model matches the adapter's `target_modules`. It was made for another base."
        )
    return targets


def _find_router(config: TuckAConfig, targets: list[str]) -> str:
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


def _expected_saved(config: AdapterConfig, targets: list[str], base: BaseLayout) -> dict[str, _Expected]:
    """PEFT's matching: every module whose name ends with an entry is replaced, with all that is in it."""
    expected = {}
    for entry in config.modules_to_save or ():
        names = [name for name in base.parameters if any(owner.endswith(entry) for owner in _owners(name))]
        if not names:
            raise BaseModelMismatchError(
                "an entry of the adapter's `modules_to_save` matches no module of this base model. It was made for "
                "another base, or for another task than text generation."
            )
        for name in names:
            shape = base.parameters[name]
            expected[PREFIX + name] = _Expected(tuple(shape), (True,) * len(shape))
    both = [path for path in targets if f"{PREFIX}{path}.weight" in expected]
    if both:
        raise InvalidAdapterError(f"the adapter's `modules_to_save` and `target_modules` both reach {_some(both)}.")
    return expected


def _owners(parameter: str) -> list[str]:
    """The dotted paths of the modules a parameter is in."""
    parts = parameter.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _expected_module(
    config: AdapterConfig, path: str, size: tuple[int, int], rank: int | None, is_router: bool
) -> dict[str, _Expected]:
    d_in, d_out = size
    if isinstance(config, LoRAConfig):
        r = config.r if rank is None else rank
        return {
            f"{PREFIX}{path}.lora_A.weight": _Expected((r, d_in), (False, True)),
            f"{PREFIX}{path}.lora_B.weight": _Expected((d_out, r), (True, False)),
        }
    k, t, p, r = config.k, config.t, config.p, config.r
    expected = {
        f"{PREFIX}{path}.tucka_g": _Expected((k, p, r, r), (False, False, False, False)),
        f"{PREFIX}{path}.tucka_c": _Expected((t, p), (False, False)),
        f"{PREFIX}{path}.tucka_u": _Expected((d_in, r), (True, False)),
    }
    if is_router:
        expected[f"{PREFIX}{path}.tucka_ec"] = _Expected((k * t, d_in), (False, True))
    return expected


def _check_names(names: Set[str], expected: Set[str], targets: list[str], base: BaseLayout) -> None:
    extra = sorted(names - expected)
    missing = sorted(expected - names)
    foreign = [name for name in extra if _adapted_path(name) not in (None, *base.linears)]
    if foreign:
        raise BaseModelMismatchError(
            f"the adapter has {len(foreign)} tensors for modules that this base model does not have "
            f"({_some(foreign)}). It was made for another base."
        )
    present = {_adapted_path(name) for name in names}
    absent = [path for path in targets if path not in present]
    if absent:
        raise BaseModelMismatchError(
            f"the adapter has no tensors for {len(absent)} of the {len(targets)} modules of this base model that its "
            f"configuration adapts ({_some(absent)}). It was made for another base, or is incomplete."
        )
    if extra:
        raise InvalidAdapterError(
            f"the adapter has {len(extra)} tensors that its configuration does not account for ({_some(extra)}). Other "
            "kinds of LoRA, trained biases and embeddings saved outside `modules_to_save` are not supported."
        )
    if missing:
        raise InvalidAdapterError(
            f"the adapter lacks {len(missing)} tensors that its configuration calls for ({_some(missing)}). "
            "Save it again."
        )


def _adapted_path(name: str) -> str | None:
    """The module an adapter tensor belongs to; None for other tensors."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.(tucka_\w+|lora_\w+(\.weight)?)", name, re.ASCII)
    return match and match[1]


def _check_shapes(entries: Mapping[str, Entry], expected: Mapping[str, _Expected]) -> None:
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


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32; exact for every stored type but F64. Raises InvalidAdapterError if it is not all finite."""
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise InvalidAdapterError(
            f"the adapter's tensor {name} has values that are NaN, infinite or beyond fp32. Its training diverged; use "
            "an earlier checkpoint."
        )
    return tensor


def _check_norm(name: str, rows: torch.Tensor) -> None:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if not ((norms >= MIN_NORM) & (norms <= MAX_NORM)).all():
        raise InvalidAdapterError(
            f"the adapter's tensor {name} has a block of norm zero, or too far from one to be divided by it. It was "
            "never trained, or its training diverged."
        )


def _lora_scales(config: LoRAConfig, ranks: Mapping[str, int]) -> dict[str, float]:
    alphas = pattern_values(config.alpha_pattern, list(ranks), config.lora_alpha)
    return {path: alphas[path] / (math.sqrt(rank) if config.use_rslora else rank) for path, rank in ranks.items()}


def _some(names: Iterable[str]) -> str:
    """The first few of some names that came from outside, as an error message may show them."""
    shown = [printable(name) for name in itertools.islice(sorted(names), NAMES_SHOWN)]
    return ", ".join(shown)
