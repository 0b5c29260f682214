"""Which backend: fused (Triton) on a GPU, the reference elsewhere. Chosen once, and said in the log."""

import importlib
import logging
import os

import torch

from tucka_runtime.kernels.ops import Ops

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "fused")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run on this device."""


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, that is on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend(name: str) -> Ops:
    """One of BACKENDS, whether it can run here or not."""
    ops: Ops = importlib.import_module(f"tucka_runtime.kernels.{name}.backend").OPS
    return ops


def choose(device: torch.device, name: str = "auto") -> Ops:
    """The backend for a device: `auto` takes the fused one on a GPU and the reference on a CPU.

    Raises BackendUnavailableError where the fused one was asked for and cannot run: there is no silent way back.
    """
    if name == "auto":
        name = "fused" if device.type == "cuda" else "reference"
    if name == "fused" and device.type == "cpu" and not interpreted():
        raise BackendUnavailableError(
            "The fused kernels need a GPU, or TRITON_INTERPRET=1 to run them in Triton's interpreter. "
            "Leave --kernels at auto to take what this machine has."
        )
    logger.info("kernels: %s on %s", name, device)
    return backend(name)
