"""From the host to the device: several tensors in one copy that nobody waits for."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGN = 16  # bytes: kernels read tables and factors by as much at once

T = TypeVar("T")


def place(parts: Sequence[T], device: torch.device) -> list[T]:
    """The same tensors and dataclasses, the tensors in them on `device`. On a CPU they are there already.

    Elsewhere they are packed into one pinned buffer and copied at once. The copy is queued on the current stream; the
    buffer is torch's to keep until it has run.
    """
    if device.type == "cpu":
        return list(parts)
    tensors = [t for part in parts for t in _tensors(part)]
    places, size = pack([t.nbytes for t in tensors])
    host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    for t, at in zip(tensors, places, strict=True):
        view(host, at, t.dtype, t.shape).copy_(t)
    moved = host.to(device, non_blocking=True)
    fresh = iter([view(moved, at, t.dtype, t.shape) for t, at in zip(tensors, places, strict=True)])
    return [_replace(part, fresh) for part in parts]


def pack(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of so many bytes begin in one buffer, each aligned, and the buffer's size."""
    places = list(accumulate((-(-size // ALIGN) * ALIGN for size in sizes), initial=0))
    return places[:-1], places[-1]


def view(buffer: Tensor, at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor that lies in a buffer of bytes."""
    count = dtype.itemsize
    for n in shape:
        count *= n
    return buffer[at : at + count].view(dtype).view(tuple(shape))


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    else:
        yield from (v for f in dataclasses.fields(part) if isinstance(v := getattr(part, f.name), Tensor))


def _replace(part: Any, fresh: Iterator[Tensor]) -> Any:
    if isinstance(part, Tensor):
        return next(fresh)
    names = [f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), Tensor)]
    return dataclasses.replace(part, **{name: next(fresh) for name in names})
