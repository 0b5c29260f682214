"""Kernel tests. What is fused runs twice: on the CPU in Triton's interpreter, and on a GPU (marked `gpu`) as it is. A
test that takes the fixture `ops` runs on every backend by address, the native one (marked `native`) among them.

A test that takes the fixture `device` or `dtype` has both; all it makes lies on that device. tests/conftest.py switches
the interpreter on where there is no GPU; where there is one, the CPU's half is deselected, for Triton then compiles.
"""

import math
from collections.abc import Iterator

import pytest
import torch

from tucka_runtime.kernels.dispatch import backend
from tucka_runtime.kernels.ops import Ops

# torch notes down which functions take a default device when one is first called with such a device: were that after
# `poisoned` has put others in their places, the real ones would make tensors on the CPU for the rest of the process.
with torch.device("cpu"):
    torch.empty(0)


def _use(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    torch.manual_seed(0)
    yield
    torch.set_default_device("cpu")


CPU, GPU = pytest.mark.interpreted, pytest.mark.gpu


@pytest.fixture(params=[pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the test's tensors are made."""
    for _ in _use(request.param):
        yield torch.device(request.param)


@pytest.fixture(
    params=[
        *(pytest.param(("cpu", dtype), marks=CPU) for dtype in (torch.float32, torch.float16)),
        *(pytest.param(("cuda", dtype), marks=GPU) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}".replace("torch.", ""),
)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """What the test's tensors are, on either device. bf16 on a GPU alone: the interpreter is silently wrong."""
    for _ in _use(request.param[0]):
        yield request.param[1]


def _backends(native: tuple[torch.dtype, ...], interpreted: tuple[torch.dtype, ...]) -> list[object]:
    """(backend, device, type of the rows) as parameters: those types on the native backend and in the interpreter."""
    on_gpu = [*interpreted, *([torch.bfloat16] if len(interpreted) > 1 else [])]
    return [
        *(pytest.param(("native", "cpu", t), marks=pytest.mark.native, id=f"native-{str(t)[6:]}") for t in native),
        *(pytest.param(("fused", "cpu", t), marks=CPU, id=f"fused-cpu-{str(t)[6:]}") for t in interpreted),
        *(pytest.param(("fused", "cuda", t), marks=GPU, id=f"fused-cuda-{str(t)[6:]}") for t in on_gpu),
    ]


HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=_backends((torch.float32, *HALF), (torch.float32, torch.float16)))
def any_type(request: pytest.FixtureRequest) -> Iterator[tuple[Ops, torch.dtype]]:
    """Every backend by address, with every type of rows that it computes rightly."""
    name, device, dtype = request.param
    for _ in _use(device):
        yield backend(name), dtype


@pytest.fixture(params=_backends((torch.float32,), (torch.float32,)))
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """Every backend by address, for what is said in fp32."""
    name, device, _ = request.param
    for _ in _use(device):
        yield backend(name)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers are full of NaN (of -1s, or of their type's largest, where they are whole numbers): what a kernel
    forgets to write is seen. What C++ makes is filled by torch itself, as it is for who asks for determinism."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else -1)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, **options: fill(real(*args, **options)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
