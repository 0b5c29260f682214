"""Adapters for the tiny base of conftest.py, as files."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tucka_runtime.messages import BaseLayout

R, K, T, P = 2, 3, 2, 2
PREFIX = "base_model.model."


def tucka_config(**changes: Any) -> dict[str, Any]:
    config = {"peft_type": "TUCKA", "r": R, "k": K, "t": T, "p": P, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    return {**config, "auto_mapping": None, **changes}


def lora_config(**changes: Any) -> dict[str, Any]:
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    return {**config, "auto_mapping": None, **changes}


def tucka_tensors(base: BaseLayout, *targets: str) -> dict[str, torch.Tensor]:
    """What the official code saves for `targets`; the first adapted module is the router."""
    paths = [path for path in base.linears if path.endswith(targets or ("q_proj", "v_proj"))]
    tensors = {f"{PREFIX}{paths[0]}.tucka_ec": torch.randn(K * T, base.linears[paths[0]][0])}
    for path in paths:
        tensors[f"{PREFIX}{path}.tucka_g"] = torch.randn(K, P, R, R)
        tensors[f"{PREFIX}{path}.tucka_c"] = torch.randn(T, P)
        tensors[f"{PREFIX}{path}.tucka_u"] = torch.randn(base.linears[path][0], R)
    return tensors


def lora_tensors(base: BaseLayout, *targets: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for path, (d_in, d_out) in base.linears.items():
        if path.endswith(targets or ("q_proj", "down_proj")):
            tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(R, d_in)
            tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(d_out, R)
    return tensors


def put(folder: Path, config: Any, weights: dict[str, torch.Tensor] | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    data = weights if isinstance(weights, bytes) else save(weights, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
