"""`tucka adapters inspect`, `verify` and `export`: what an adapter's folder holds, without a server."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tucka_runtime.adapters.base_layout import base_layout
from tucka_runtime.adapters.config import AdapterSpec, BankSpec, LoRASpec, TuckASpec, parse_config
from tucka_runtime.adapters.defaults import parse_defaults
from tucka_runtime.adapters.files import (
    MAX_WEIGHTS_BYTES,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    open_file,
    open_folder,
    read_config,
    read_defaults,
    read_training,
    start_digest,
    strict_json,
)
from tucka_runtime.adapters.format import Adapter, read_adapter, write_adapter
from tucka_runtime.adapters.manifest import PREFIX, adapted_path
from tucka_runtime.adapters.safefile import read_header, read_tensors
from tucka_runtime.engine.adapters.fold import fold, locate
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.engine.adapters.verify import KEY, LIMITS, verify
from tucka_runtime.engine.turns import whole
from tucka_runtime.errors import AdapterError, ConfigError, InvalidAdapterError
from tucka_runtime.kernels import dispatch
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference.linear import linear
from tucka_runtime.messages import BaseLayout, Route
from tucka_runtime.models.architecture import Architecture
from tucka_runtime.models.weights import fingerprint, load_weights, stored_dtype
from tucka_runtime.models.weights import read_config as read_base

CPU = torch.device("cpu")
MAX_LINE = 500
NEUTRAL = 0.5
"""The weight of an expert whose logit is 0: what a router gives that prefers none."""


def inspect_adapter(folder: Path, model: Path | None) -> int:
    """Prints what the folder holds; 1 if it is of no use on the base `model`, where one is given."""
    with open_folder(folder) as folder_fd:
        config_bytes, training_bytes = read_config(folder_fd), read_training(folder_fd)
        defaults = list(_defaults(folder_fd))
        config = parse_config(config_bytes)
        with open_file(folder_fd, WEIGHTS_NAME, MAX_WEIGHTS_BYTES) as (file, size):
            digest = start_digest(config_bytes, size)
            entries = read_header(file, size, digest)
            weights: dict[str, Tensor] = {}
            for name, entry in entries.items():
                numbers = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
                weights |= read_tensors(file, {name: entry}, numbers, digest)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    own = {name: tensor for name, tensor in tensors.items() if adapted_path(PREFIX + name)}
    parameters, stored = (sum(f(t) for t in tensors.values()) for f in (Tensor.numel, lambda t: t.nbytes))
    types = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    rows = [
        ("kind", _kind(config)),
        ("digest", digest.hexdigest()),
        *_shape(config),
        ("modules", f"{len({adapted_path(PREFIX + name) for name in own})}"),
        *((f"  {name}", text) for name, text in _modules(own)),
        ("replaced", ", ".join(sorted(tensors.keys() - own.keys())) or "nothing"),
        ("parameters", f"{parameters:,} in {len(tensors)} tensors"),
        ("on disk", f"{stored:,} bytes, {types}"),
        ("trained on", config.base_model_name_or_path or "not said"),
        *_training(training_bytes),
        *(("defaults", text) for text in defaults),
        *(("norms", text) for text in _norms(own)),
    ]
    status = 0
    if model is not None:
        more, status = _on_base(folder, model)
        rows += more
    width = max(len(name) for name, _ in rows)
    print("\n".join(_plain(f"{name:{width}}  {text}") for name, text in rows))
    return status


def verify_adapter(folder: Path, model: Path, dtype: str) -> int:
    """Prints the error of each kind of module against the definition; 1 if any is over the limit."""
    arch, layout, _ = open_base(model)
    adapter = read_adapter(folder, layout)
    ops = dispatch.choose(CPU, "auto")
    weights, kind = load_weights(model, arch, dtype, CPU, ops.linear)
    factors = factors_dtype(ops, kind)
    limit = max(LIMITS[factors], LIMITS[kind])  # a base in a half type rounds results, whatever the factors are in
    worst: dict[str, float] = {}
    with torch.inference_mode():
        for finding in verify(adapter, arch, weights, ops, factors):
            is_module = finding.what in adapter.modules or finding.what in adapter.tokens
            what = finding.what.rpartition(".")[2] if is_module else finding.what
            worst[what] = max(worst.get(what, 0.0), finding.error)
    for what, error in worst.items():
        print(f"{what}  {error:.1e}{'' if error <= limit else '  over the limit'}")
    right = all(error <= limit for error in worst.values())
    print(
        f"{len(adapter.modules)} modules, {ops.name} kernels, factors in {str(factors).removeprefix('torch.')}: "
        f"{'all' if right else 'not all'} within {limit:.0e} of the definition in float64"
    )
    return 0 if right else 1


def export_adapter(folder: Path, target: Path, model: Path, route: str) -> int:
    """Writes the plain LoRA that a TuckA adapter is under one route."""
    if (target / "adapter_config.json").exists():
        raise ConfigError("There is an adapter in the target folder. Name a new one.")
    arch, layout, _ = open_base(model)
    adapter = read_adapter(folder, layout)
    if not isinstance(adapter.config, TuckASpec):
        raise ConfigError(f"The adapter is a {_kind(adapter.config)}. Only TuckA adapters have routes to be under.")
    pinned = parse_route(route, adapter.config)
    weights, _ = load_weights(model, arch, "float32", CPU, linear)
    folded = whole(fold(KEY, adapter, arch, weights, dispatch.backend("reference"), torch.float32, pinned))
    where = locate(arch)
    tensors: dict[str, Tensor] = dict(adapter.saved)
    for path in adapter.modules:
        u, e = folded.factors[where[path]]
        tensors |= {f"{path}.lora_A.weight": u, f"{path}.lora_B.weight": e.T.contiguous()}
    same = {f.name for f in fields(LoRASpec)} & {f.name for f in fields(TuckASpec)}
    kept: dict[str, Any] = {name: getattr(adapter.config, name) for name in same}
    config = LoRASpec(**kept, lora_alpha=adapter.config.r, fan_in_fan_out=arch.transposed)
    digest = write_adapter(target, config, tensors, {"base_fingerprint": layout.fingerprint})
    print(f"a LoRA of rank {config.r} on {len(adapter.modules)} modules, digest {digest[:12]}: group {pinned.group}, "
          f"weights {', '.join(f'{w:g}' for w in pinned.weights)}")  # fmt: skip
    return 0


def parse_route(text: str, config: TuckASpec) -> Route:
    """`group=N`, its experts at the weight of a logit of 0, or a pinned route as POST /v1/adapters takes it. Raises
    ConfigError."""
    wrong = ConfigError(
        f"--route must be group=N with N from 0 to {config.k - 1}, or a pinned route such as "
        f'{{"group": 0, "weights": [0.5, 0.6]}} with {config.t} weights from 0 to 1.'
    )
    name, _, number = text.partition("=")
    if name == "group" and number.isascii() and number.isdecimal() and float(number) < config.k:
        return Route(int(number), (NEUTRAL,) * config.t)
    try:
        table = strict_json(text.encode())
    except ValueError:
        raise wrong from None
    if not isinstance(table, dict) or table.keys() != {"group", "weights"}:
        raise wrong
    group, weights = table["group"], table["weights"]
    if type(group) is not int or not 0 <= group < config.k or not isinstance(weights, list):
        raise wrong
    if len(weights) != config.t or not all(type(w) in (int, float) and 0 <= w <= 1 for w in weights):
        raise wrong
    return Route(group, tuple(map(float, weights)))


def _plain(line: str) -> str:
    """What the folder says as a terminal may have it: without control characters, and not endless."""
    shown = "".join(c if c.isprintable() else "?" for c in line[:MAX_LINE])
    return shown + "..." * (len(line) > MAX_LINE)


def open_base(model: Path) -> tuple[Architecture, BaseLayout, torch.dtype]:
    """The base's architecture, what adapters are checked against, and its type."""
    _, arch = read_base(model)
    return arch, base_layout(arch, fingerprint(model), str(model)), stored_dtype(model, arch)


def factors_dtype(ops: Ops, kind: torch.dtype) -> torch.dtype:
    return torch.float32 if ops.fp32_factors else kind


def _kind(config: AdapterSpec) -> str:
    if isinstance(config, TuckASpec):
        return "TuckA"
    if isinstance(config, BankSpec):
        return f"bank of {len(config.members):,}, {config.core} cores"
    return "LoRA" + " (DoRA)" * config.use_dora + " with biases" * (config.lora_bias or config.bias != "none")


def _shape(config: AdapterSpec) -> Iterator[tuple[str, str]]:
    if isinstance(config, TuckASpec):
        yield "rank", str(config.r)
        yield "experts", f"{config.k} groups of {config.t}, {config.p} slices each"
        yield "scale", f"alpha {config.alpha:g}"
        yield "router", config.router_name or "the first adapted module"
        return
    if isinstance(config, BankSpec):
        yield "rank", str(config.r)
        yield "members", ", ".join(config.members)
        return
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    yield "rank", str(config.r) + "".join(f", {name}: {r}" for name, r in config.rank_pattern.items())
    yield "scale", f"{scale:g}" + "".join(f", {name}: alpha {a:g}" for name, a in config.alpha_pattern.items())


def _modules(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Each kind of module: how many there are, and their tensors' shapes."""
    paths: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path = adapted_path(PREFIX + name) or name
        paths.setdefault(path, {})[name.removeprefix(f"{path}.")] = tensor
    kinds = Counter(
        (path.rpartition(".")[2], ", ".join(f"{part} {tuple(t.shape)}" for part, t in sorted(own.items())))
        for path, own in paths.items()
    )
    for (name, shapes), count in kinds.items():
        yield name, f"{count} x {shapes}"


def _training(data: bytes | bytearray | None) -> Iterator[tuple[str, str]]:
    if data is None:
        return
    try:
        table = strict_json(data)
    except ValueError:
        yield "training.json", "cannot be read, and is not used"
        return
    if isinstance(table, dict):
        for name in ("route", "route_prefix_tokens", "base_fingerprint"):
            if table.get(name) is not None:
                yield name, json.dumps(table[name])


def _defaults(folder_fd: int) -> Iterator[str]:
    """What a server with --adapter-defaults takes from the folder."""
    try:
        found = parse_defaults(read_defaults(folder_fd))
    except InvalidAdapterError as error:
        yield f"refused with --adapter-defaults: {error.message}"
        return
    if found.template is not None:
        yield f"a chat template of {len(found.template):,} characters"
    if found.eos_token is not None:
        yield f"eos_token {json.dumps(found.eos_token)}"
    if found.tokenizer is not None:
        yield f"the added tokens of {TOKENIZER_NAME}"
    for name in found.names:
        if hasattr(found.generation, name):
            yield f"{name} {json.dumps(getattr(found.generation, name))}"
    if found.ignored:
        yield f"without effect: {', '.join(found.ignored)}"


def _norms(tensors: dict[str, Tensor]) -> Iterator[str]:
    """The least and the largest Frobenius norm of each kind of tensor."""
    norms: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        part = name.removeprefix(f"{adapted_path(PREFIX + name)}.")
        norms.setdefault(part, []).append(float(torch.linalg.vector_norm(tensor.double())))
    for part, own in sorted(norms.items()):
        yield f"{part}: {min(own):.3g} to {max(own):.3g}"


def _on_base(folder: Path, model: Path) -> tuple[list[tuple[str, str]], int]:
    """Whether it can be served on a base, and what it takes there."""
    arch, layout, kind = open_base(model)
    try:
        adapter: Adapter = read_adapter(folder, layout)
    except AdapterError as error:
        return [("on this base", f"not served: {error.message}")], 1
    factors = factors_dtype(dispatch.choose(CPU, "auto"), kind)
    resident, _ = folded_bytes(adapter, arch, kind, factors, None)
    rows = [
        ("on this base", "served"),
        ("resident", f"{resident:,} bytes, factors in {str(factors).removeprefix('torch.')}"),
    ]
    return rows + ([("router", adapter.router)] if adapter.router else []), 0
