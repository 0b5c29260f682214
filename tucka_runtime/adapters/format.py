"""An adapter on disk: the official PEFT layout (`adapter_config.json`, `adapter_model.safetensors`), read and written.

Reading trusts nothing: the configuration, the header, the exact set of tensors and their shapes are checked before a
weight is read, and every weight before it is used. Equations and keys: docs/architecture.md and tests/golden/README.md.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tucka_runtime.adapters.config import (
    AdapterSpec,
    BankSpec,
    LoRASpec,
    TuckASpec,
    config_as_dict,
    parse_config,
)
from tucka_runtime.adapters.config_fields import MAX_NAME
from tucka_runtime.adapters.files import (
    CONFIG_NAME,
    MAX_WEIGHTS_BYTES,
    TRAINING_NAME,
    WEIGHTS_NAME,
    blob_name,
    open_file,
    open_folder,
    parse_training,
    read_config,
    read_training,
    start_digest,
    weights_blob,
)
from tucka_runtime.adapters.manifest import (
    OWN_BIAS,
    PREFIX,
    TOKENS,
    check_names,
    check_shapes,
    expected_copies,
    expected_tables,
    expected_tensors,
    find_router,
    find_targets,
    find_tokens,
)
from tucka_runtime.adapters.safefile import read_header, read_tensors
from tucka_runtime.adapters.targets import match_targets, pattern_values
from tucka_runtime.adapters.vocabulary import check_whole, own_size
from tucka_runtime.durable import write_file
from tucka_runtime.errors import BaseModelMismatchError, InvalidAdapterError, StorageError
from tucka_runtime.messages import ROUTE_PREFIX_TOKENS, BaseLayout

__all__ = [
    "Adapter",
    "BankModule",
    "BankSpec",
    "BaseLayout",
    "LoRAModule",
    "LoRASpec",
    "TuckAModule",
    "TuckASpec",
    "match_targets",
    "read_adapter",
    "write_adapter",
]

log = logging.getLogger(__name__)

# The maths divides by Euclidean norms in fp32: the square of a norm must be a normal fp32 number.
MIN_NORM, MAX_NORM = 1e-18, 1e18


@dataclass(frozen=True, eq=False)
class TuckAModule:
    """One adapted linear, fp32, as stored (not normalised): g (k, p, r, r), c (t, p), u (d_in, r)."""

    g: torch.Tensor
    c: torch.Tensor
    u: torch.Tensor


@dataclass(frozen=True, eq=False)
class LoRAModule:
    """One adapted linear, fp32: a (r, d_in), b (d_out, r); the change is scale · x aᵀ bᵀ.

    magnitude (d_out,), of a DoRA: the norms that the rows of W + scale · b a are given. bias (d_out,): what b adds, so
    that the change is scale · (x aᵀ bᵀ + bias). own_bias (d_out,): what replaces the base's. None where the adapter has
    none.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    own_bias: torch.Tensor | None = None

    @property
    def changes_base(self) -> bool:
        """Whether something is done to the base's own product."""
        return not (self.magnitude is None and self.bias is None and self.own_bias is None)


@dataclass(frozen=True, eq=False)
class BankModule:
    """One adapted linear of a bank of N members, fp32: u (r, d_in), e (r, d_out), and core (N, r, r), or (N, r) where
    cores are diagonal; member i's change is ((x uᵀ) core[i]) e."""

    u: torch.Tensor
    e: torch.Tensor
    core: torch.Tensor


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter, or a bank of them.

    modules: by module path, in the base's declaration order. router and ec (k·t, d_in of the router; fp32) are None for
    LoRA and banks. Of an adapted embedding d_in is the vocabulary. saved: whole replacements of base parameters by
    name, in the base's layout; a replaced embedding leaves a tied head as it was. tokens: by the path of the embedding
    or the head, the ids (n,) int64, ascending, and the values (n, d) of rows that are replaced. training: the
    training.json beside it, if that is a JSON object. vocab_size: of its own vocabulary, all rows of which are in
    `saved`; None where it has the base's."""

    config: AdapterSpec
    digest: str
    modules: dict[str, TuckAModule | LoRAModule | BankModule]
    router: str | None
    ec: torch.Tensor | None
    saved: dict[str, torch.Tensor]
    training: dict[str, Any] | None
    tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    vocab_size: int | None = None

    @property
    def kind(self) -> str:
        return {TuckASpec: "tucka", LoRASpec: "lora", BankSpec: "bank"}[type(self.config)]

    @property
    def route_prefix_tokens(self) -> int:
        """How many tokens route a prompt under the scope "prefix": what it was trained for, if that is a number."""
        trained = (self.training or {}).get("route_prefix_tokens")
        return trained if type(trained) is int and trained > 0 else ROUTE_PREFIX_TOKENS


FINITE_PART = 2**22
"""Numbers whose check for finite values is one call: it takes memory for each of them."""


def _allocate(count: int) -> torch.Tensor:
    """So many fp32 numbers, in the memory of this process."""
    return torch.empty(count)


def read_adapter(
    folder: Path, base: BaseLayout, blob: str | None = None, allocate: Callable[[int], torch.Tensor] = _allocate
) -> Adapter:
    """The adapter in `folder`, checked against the base it is to run on and, where its `blob` is given, against that.

    It is the one way in which adapters are read: by the server in a process of its own (reader_process.py), whose
    `allocate` makes the memory for all weights one that the engine sees too, and elsewhere where it is called.

    Raises InvalidAdapterError (malformed, unsafe, not supported), BaseModelMismatchError (made for another base) or
    StorageError (not the content that `blob` names: the copy was damaged).
    """
    with open_folder(folder) as folder_fd:
        config_bytes = read_config(folder_fd)
        config = parse_config(config_bytes)
        training_bytes = read_training(folder_fd)
        training = parse_training(training_bytes)
        if training and training.get("base_fingerprint") not in (None, base.fingerprint):
            raise BaseModelMismatchError(
                "the adapter was trained on other base weights: the fingerprint in its training.json differs from "
                "this model's. Load it beside the base it was trained on."
            )
        if not (training and training.get("base_fingerprint")):
            _warn_of_another_base(config, base)
        targets = find_targets(config, base)
        router = find_router(config, targets) if isinstance(config, TuckASpec) else None
        ranks = pattern_values(config.rank_pattern, targets, config.r) if isinstance(config, LoRASpec) else {}
        with open_file(folder_fd, WEIGHTS_NAME, MAX_WEIGHTS_BYTES) as (file, size):
            digest = start_digest(config_bytes, size)
            entries = read_header(file, size, digest)
            vocab_size = None if isinstance(config, BankSpec) else own_size(entries, base)
            base = base if vocab_size is None else base.resized(vocab_size)
            expected = expected_tensors(config, targets, router, ranks, base)
            unasked_for = {} if isinstance(config, BankSpec) else expected_tables(entries.keys(), base)
            tables = {name: found for name, found in unasked_for.items() if name not in expected}
            expected |= {name: shape for name, (_, shape) in tables.items()}
            expected |= expected_copies(entries.keys(), expected, base)
            check_names(entries.keys(), expected.keys(), targets, base)
            check_shapes(entries, expected)
            # fp32, into which every stored type goes exactly but F64.
            numbers = allocate(sum(math.prod(entry.shape) for entry in entries.values()))
            stored = read_tensors(file, entries, numbers, digest)
    _check_finite(numbers, stored)
    if blob is not None and blob_name(digest.hexdigest(), training_bytes) != weights_blob(blob):
        raise StorageError(
            "The server's copy of the adapter was damaged on its disk. Check the disk, and load it again."
        )
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    saved = {name: tensor for name, tensor in tensors.items() if name in base.parameters}
    unasked = {own: tensors[name.removeprefix(PREFIX)] for name, (own, _) in tables.items() if own is not None}
    if base.tied and unasked:  # PEFT writes them into the one table that both are
        one = next(iter(unasked.values()))
        unasked = {f"{path}.weight": one for path in base.tables}
    saved = unasked | saved
    if vocab_size is not None:
        check_whole(saved.keys(), base)
    modules: dict[str, TuckAModule | LoRAModule | BankModule]
    if isinstance(config, BankSpec):
        modules = {
            path: BankModule(*(tensors[f"{path}.bank_{part}"] for part in ("u", "e", "core"))) for path in targets
        }
        return Adapter(config, digest.hexdigest(), modules, None, None, {}, training)
    if isinstance(config, LoRASpec):
        scales = _lora_scales(config, ranks)
        modules = {
            path: LoRAModule(
                tensors[f"{path}.lora_embedding_A" if path == base.embed else f"{path}.lora_A.weight"],
                tensors[f"{path}.lora_embedding_B" if path == base.embed else f"{path}.lora_B.weight"],
                scales[path],
                tensors.get(f"{path}.lora_magnitude_vector"),
                tensors.get(f"{path}.lora_B.bias"),
                tensors.get(f"{path}.{OWN_BIAS}"),
            )
            for path in targets
        }
        tokens = {}
        for path, ids in find_tokens(config, base).items():
            own, order = torch.tensor(ids).sort()
            tokens[path] = own, tensors[f"{path}.{TOKENS}"][order]
        if base.tied and base.embed in tokens:
            tokens[base.head] = tokens[base.embed]
        return Adapter(config, digest.hexdigest(), modules, None, None, saved, training, tokens, vocab_size)
    ec = tensors[f"{router}.tucka_ec"]
    blocks = {f"{router}.tucka_ec": ec.view(config.k, -1)}
    modules = {}
    for path in targets:
        g, c, u = (tensors[f"{path}.tucka_{part}"] for part in "gcu")
        blocks |= {
            f"{path}.tucka_g": g.view(config.k, -1),
            f"{path}.tucka_c": c.view(1, -1),
            f"{path}.tucka_u": u.view(1, -1),
        }
        modules[path] = TuckAModule(g, c, u)
    _check_norms(blocks)
    return Adapter(config, digest.hexdigest(), modules, router, ec, saved, training, vocab_size=vocab_size)


def write_adapter(
    folder: Path, config: AdapterSpec, tensors: Mapping[str, torch.Tensor], training: Mapping[str, Any] | None = None
) -> str:
    """Write an adapter in the official layout, with a training.json of `training` if there is one, and return its
    digest.

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
    if training is not None:
        write_file(folder, TRAINING_NAME, json.dumps(training).encode())
    write_file(folder, WEIGHTS_NAME, weights)
    write_file(folder, CONFIG_NAME, config_bytes)
    digest = start_digest(config_bytes, len(weights))
    digest.update(weights)
    return digest.hexdigest()


def _warn_of_another_base(config: AdapterSpec, base: BaseLayout) -> None:
    """A name proves nothing, since a base may be called otherwise on every machine: nobody is refused for it."""
    theirs, ours = _model_name(config.base_model_name_or_path or ""), _model_name(base.name)
    if theirs and ours and theirs.lower() != ours.lower():
        log.warning(
            "an adapter that is being loaded says that it was trained on %r, and this base is %r: if they are not the "
            "same weights, its answers are wrong", theirs[:MAX_NAME], ours,
        )  # fmt: skip


def _model_name(path: str) -> str:
    """The last part of a model's path or Hub name; of a snapshot in the Hub's cache, the model's."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else ""


def _check_finite(numbers: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InvalidAdapterError for the first of the tensors that is not all finite. `numbers` are those of all."""
    if _finite(numbers):
        return
    name = next(name for name, tensor in tensors.items() if not _finite(tensor.view(-1)))
    raise InvalidAdapterError(
        f"the adapter's tensor {name} has values that are NaN, infinite or beyond fp32. Its training diverged; use an "
        "earlier checkpoint."
    )


def _finite(numbers: torch.Tensor) -> bool:
    return all(part.isfinite().all() for part in numbers.split(FINITE_PART))


def _check_norms(blocks: Mapping[str, torch.Tensor]) -> None:
    """Raises InvalidAdapterError if a row (of n, width) has a norm that it cannot be divided by."""
    by_width: dict[int, list[torch.Tensor]] = {}
    for rows in blocks.values():
        by_width.setdefault(rows.shape[1], []).append(rows)
    if not all(_normal(torch.cat(same)) for same in by_width.values()):
        name = next(name for name, rows in blocks.items() if not _normal(rows))
        raise InvalidAdapterError(
            f"the adapter's tensor {name} has a block of norm zero, or too far from one to be divided by it. It was "
            "never trained, or its training diverged."
        )


def _normal(rows: torch.Tensor) -> bool:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return bool(((norms >= MIN_NORM) & (norms <= MAX_NORM)).all())


def _lora_scales(config: LoRASpec, ranks: Mapping[str, int]) -> dict[str, float]:
    alphas = pattern_values(config.alpha_pattern, list(ranks), config.lora_alpha)
    return {path: alphas[path] / (math.sqrt(rank) if config.use_rslora else rank) for path, rank in ranks.items()}
