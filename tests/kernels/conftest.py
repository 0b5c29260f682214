"""Kernel tests. What is fused runs twice: on the CPU in Triton's interpreter, and on a GPU (marked `gpu`) as it is.

A test that takes the fixture `device` or `dtype` has both; all it makes lies on that device. tests/conftest.py switches
the interpreter on where there is no GPU; where there is one, the CPU's half is deselected, for Triton then compiles.
"""

import math
from collections.abc import Iterator

import pytest
import torch


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


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers are full of NaN (of -1s where they are whole numbers): what a kernel forgets to write is seen."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else -1)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, **options: fill(real(*args, **options)))
