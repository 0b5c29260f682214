"""Which backend: fused (Triton) on a GPU; on a CPU native (C++) where it is built, else the reference. Chosen once, and
said in the log."""

import importlib
import logging
import os

import torch

from tucka_runtime.kernels.native import library
from tucka_runtime.kernels.ops import Ops

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "fused", "native")


BUILD = "with a C++ compiler, run `python -m tucka_runtime.kernels.native.build`"
"""What makes the native kernels."""


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run on this device."""


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, that is on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend(name: str) -> Ops:
    """One of BACKENDS, whether it can run here or not."""
    ops: Ops = importlib.import_module(f"tucka_runtime.kernels.{name}.backend").OPS
    return ops


def best(device: torch.device) -> str:
    """The name of the backend that `auto` takes."""
    if device.type == "cuda":
        return "fused"
    return "native" if library.load() else "reference"


def choose(device: torch.device, name: str = "auto") -> Ops:
    """The backend for a device: `auto` takes the best that can run there.

    Raises BackendUnavailableError where one was asked for that cannot run: there is no silent way back.
    """
    if name == "auto":
        name = best(device)
    if name == "fused" and device.type == "cpu" and not interpreted():
        raise BackendUnavailableError(
            "The fused kernels need a GPU, or TRITON_INTERPRET=1 to run them in Triton's interpreter. "
            "Leave --kernels at auto to take what this machine has."
        )
    if name == "native" and device.type != "cpu":
        raise BackendUnavailableError("The native kernels run on a CPU: take --device cpu, or leave --kernels at auto.")
    if name == "native" and not library.load():
        raise BackendUnavailableError(
            f"The native kernels are not built for this machine and this version of torch: {BUILD}, or leave --kernels "
            "at auto."
        )
    logger.info("kernels: %s on %s", describe(name), device)
    return backend(name)


def describe(name: str) -> str:
    """A backend's name, for the native one with the instructions that it was built for, for the reference with how to
    have better."""
    if name == "native":
        return f"native ({library.load()})"
    if name == "reference" and not library.load():
        return f"reference (native ones are not built: {BUILD})"
    return name
