"""Chooses the kernels once: fused (Triton) on a GPU or in Triton's interpreter when asked, reference elsewhere."""

import logging
import os
from types import ModuleType, SimpleNamespace

import torch

logger = logging.getLogger(__name__)

OPS = (
    "attention",
    "core",
    "expand",
    "expand_qkv_rope_kv",
    "expand_residual",
    "expand_swiglu",
    "norm",
    "route",
    "sample",
    "shrink_core",
)


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, that is on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _modules(kind: str) -> dict[str, ModuleType]:
    import importlib

    return {op: importlib.import_module(f"tucka_runtime.kernels.{kind}.{op}") for op in OPS}


def choose(device: torch.device, fused: bool | None = None) -> SimpleNamespace:
    """The kernels for a device, as a namespace with one module per op: `ops.route.route_ids(…)`; `ops.fused` says
    which.

    `fused` None takes the fused ones on a GPU and the reference on a CPU. True on a CPU needs TRITON_INTERPRET=1.
    Raises RuntimeError where the fused ones were asked for and cannot run: there is no silent way back.
    """
    if fused is None:
        fused = device.type == "cuda"
    if fused and device.type == "cpu" and not interpreted():
        raise RuntimeError("The fused kernels need a GPU, or TRITON_INTERPRET=1 to run them in Triton's interpreter.")
    kind = "fused" if fused else "reference"
    logger.info("kernels: %s on %s", kind, device)
    return SimpleNamespace(fused=fused, **_modules(kind))
