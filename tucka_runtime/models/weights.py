"""Reads a base model's folder: configuration, safetensors (sharded or not), the packed tensors of the decoder.

Missing, unexpected and wrongly shaped tensors are errors: a model that is served has exactly the weights it was saved
with.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tucka_runtime.base_files import read_json
from tucka_runtime.base_gguf import SOURCE
from tucka_runtime.errors import ModelLoadError
from tucka_runtime.kernels.ops import Linear, MakeLinear
from tucka_runtime.models.architecture import Architecture, parameter_shapes
from tucka_runtime.models.families import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class LayerWeights:
    """One layer. `linears` are packed by site; norms are (weight, bias or None)."""

    input_norm: tuple[Tensor, Tensor | None]
    post_norm: tuple[Tensor, Tensor | None]
    head_norms: tuple[Tensor, Tensor] | None
    linears: tuple[Linear, ...]


@dataclass
class Weights:
    """The whole model. `head` is made of `embed` where they are tied."""

    embed: Tensor
    positions: Tensor | None
    layers: list[LayerWeights]
    final_norm: tuple[Tensor, Tensor | None]
    head: Linear


def read_config(folder: Path) -> tuple[Any, Architecture]:
    """The transformers configuration of a folder and the architecture it describes. Runs no code of the folder's."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    try:
        raw = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelLoadError(f"{folder} has no config.json: give the folder of a Hugging Face model.") from None
    except PermissionError as e:
        raise _unreadable(e) from None
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelLoadError(f"{path} is of the type {kind!r}; supported are {', '.join(sorted(FAMILIES))}.")
    try:
        config = CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as e:  # whatever transformers and its validators raise: the file is foreign to both of us
        raise ModelLoadError(f"{path} cannot be read: {e}") from e
    return config, FAMILIES[kind](config)


def fingerprint(folder: Path) -> str:
    """Identity of a base model's weights, as hex.

    SHA-256 over the headers of its safetensors files (names, types, shapes) and 64 pages of 4 KiB spread evenly over
    each: it tells fine-tunes of one model apart in milliseconds. It is a guard against mistakes, not against forgery.
    A base that was made of a GGUF file has the identity of that file, whatever type it was dequantised to. Raises
    ModelLoadError.
    """
    if (folder / SOURCE).is_file():
        return str(read_json(folder / SOURCE)["sha256"])
    digest = hashlib.sha256()
    for path in _files(folder):
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if 8 + length > size:
                raise ModelLoadError(f"{path} is not a readable safetensors file: it is shorter than its header says.")
            header = f.read(min(length, 64 << 20))
            digest.update(len(header).to_bytes(8, "little") + header)
            start = 8 + length
            for i in range(64):
                f.seek(start + max(0, size - start - 4096) * i // 63)
                digest.update(f.read(4096))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each of which can be opened. Raises ModelLoadError."""
    try:
        paths = _named_files(folder)
        for path in paths:
            path.open("rb").close()
    except OSError as e:
        raise _unreadable(e) from None
    return paths


def _unreadable(error: OSError) -> ModelLoadError:
    what = f"{error.filename} cannot be read: {(error.strerror or type(error).__name__).lower()}."
    if isinstance(error, PermissionError):
        what += (
            " Give the user that runs this read access to the folder and every file in it (`chmod -R a+rX` does for "
            "everybody), or run as its owner."
        )
    return ModelLoadError(what)


def _named_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise ModelLoadError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as e:
        raise ModelLoadError(f"{index} is not a safetensors index: {e}") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ModelLoadError(f"{index} names {name!r}, which is not a file beside it.")
    return [folder / name for name in names]


class _Checkpoint:
    """The tensors of a folder by name, read on demand; knows which were not asked for."""

    def __init__(self, folder: Path, arch: Architecture):
        self.where: dict[str, tuple[Any, str]] = {}
        ignored = re.compile(arch.ignored)
        for path in _files(folder):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as e:
                raise ModelLoadError(f"{path} is not a readable safetensors file: {e}") from e
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                name = stored
                if not stored.startswith((arch.prefix, arch.head + ".")):
                    name = arch.prefix + stored
                if name in self.where:
                    raise ModelLoadError(f"{path} holds {stored}, which another file of the folder holds too.")
                if not ignored.fullmatch(name):
                    self.where[name] = (file, stored)
        self.unread = set(self.where)
        self.missing: list[str] = []

    def dtype(self) -> torch.dtype:
        """The commonest type of the stored matrices, fp32 for float64."""
        counts: dict[str, int] = {}
        for file, stored in self.where.values():
            kind = file.get_slice(stored).get_dtype()
            counts[kind] = counts.get(kind, 0) + 1
        kind = STORED.get(max(counts, key=lambda kind: counts[kind]), torch.float32) if counts else torch.float32
        return torch.float32 if kind == torch.float64 else kind

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name not in self.where:
            self.missing.append(name)
            return None
        file, stored = self.where[name]
        part = file.get_slice(stored)
        if tuple(part.get_shape()) != shape:
            raise ModelLoadError(f"Tensor {stored} is {tuple(part.get_shape())}, but config.json implies {shape}.")
        if part.get_dtype() not in STORED:
            raise ModelLoadError(f"Tensor {stored} is stored as {part.get_dtype()}, which is not supported.")
        self.unread.discard(name)
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def check(self) -> None:
        for kind, names in (("lacks", sorted(self.missing)), ("has unexpected", sorted(self.unread))):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ModelLoadError(f"The checkpoint {kind} tensors: {', '.join(names[:5])}{more}.")


def stored_dtype(folder: Path, arch: Architecture) -> torch.dtype:
    """The type that a base is served in where no other is asked for. Raises ModelLoadError."""
    return _Checkpoint(folder, arch).dtype()


def load_weights(
    folder: Path, arch: Architecture, dtype: str, device: torch.device, linear: MakeLinear
) -> tuple[Weights, torch.dtype]:
    """Reads and checks the weights, of which `linear` makes linears; `dtype` "auto" keeps the stored type. Raises
    ModelLoadError."""
    checkpoint = _Checkpoint(folder, arch)
    kind = DTYPES.get(dtype) or checkpoint.dtype()
    shapes = dict(parameter_shapes(arch))

    def read(name: str) -> Tensor:
        value = checkpoint.read(name, shapes[name])
        if value is None:
            return torch.empty(0)
        return value.to(device, kind)

    def norm(path: str) -> tuple[Tensor, Tensor | None]:
        return read(f"{path}.weight"), read(f"{path}.bias") if arch.norm_bias else None

    embed_name, head_name = f"{arch.embed}.weight", f"{arch.head}.weight"
    if arch.tied and head_name in checkpoint.where and embed_name not in checkpoint.where:
        embed_name = head_name
    embed = read(embed_name)
    positions = read(f"{arch.positions}.weight") if arch.positions else None
    layers = []
    for i in range(arch.num_layers):
        linears = []
        for site in arch.sites:
            parts = [read(arch.path(i, f"{target}.weight")) for target in site.targets]
            bias = [read(arch.path(i, f"{target}.bias")) for target in site.targets] if site.bias else None
            packed = torch.cat([p.T if arch.transposed else p for p in parts]).contiguous()
            linears.append(linear(packed, torch.cat(bias) if bias else None))
        norms = [read(arch.path(i, f"{name}.weight")) for name in arch.head_norms or ()]
        layers.append(
            LayerWeights(
                input_norm=norm(arch.path(i, arch.input_norm)),
                post_norm=norm(arch.path(i, arch.post_norm)),
                head_norms=(norms[0], norms[1]) if norms else None,
                linears=tuple(linears),
            )
        )
    final_norm = norm(arch.final_norm)
    head = embed
    if not arch.tied or head_name in checkpoint.where:
        own = read(head_name)
        if not arch.tied or not torch.equal(own, embed):  # as transformers: what is saved twice and differs is not tied
            head = own
    checkpoint.check()
    return Weights(embed, positions, layers, final_norm, linear(head, None)), kind
