"""How an adapter that was read in one process gets into another: its tensors in shared memory, the rest as a message.

The memory is a file without a name (memfd). It is mapped where the adapter is read and where it is used, so that no
byte of a tensor is copied between the two, and the kernel frees it when the last of both lets go, however it ends.
"""

import math
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tucka_runtime.adapters.config import AdapterSpec, BankSpec, LoRASpec, TuckASpec
from tucka_runtime.adapters.format import Adapter, BankModule, LoRAModule, TuckAModule
from tucka_runtime.channel_messages import AdapterRead, TensorRun

LEAST_BYTES = 4 * 2**20
"""Of weights in a second: a disk that gives less does not answer."""
ALIGNMENT = 64
"""Bytes: where tensors that are written behind begin."""

_KINDS: dict[str, tuple[type[AdapterSpec], Callable[..., TuckAModule | LoRAModule | BankModule]]] = {
    "tucka": (TuckASpec, TuckAModule),
    "lora": (LoRASpec, LoRAModule),
    "bank": (BankSpec, BankModule),
}
_DTYPES = {"float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True, eq=False)
class SharedNumbers:
    """fp32 numbers in memory that can be shared: `file` is the descriptor that stands for it, and is closed by
    `close`."""

    file: int
    numbers: Tensor

    @classmethod
    def allocate(cls, count: int) -> "SharedNumbers":
        """Unwritten ones: the memory is taken as they are written. Raises OSError."""
        file = os.memfd_create("adapter", os.MFD_CLOEXEC)
        try:
            size = count * torch.float32.itemsize
            os.ftruncate(file, size)
            return cls(file, torch.frombuffer(mmap.mmap(file, size), dtype=torch.float32))
        except BaseException:
            os.close(file)
            raise

    def close(self) -> None:
        """The memory itself goes with the last tensor in it, here and elsewhere."""
        os.close(self.file)


def pack(adapter: Adapter, memory: SharedNumbers) -> AdapterRead:
    """What `unpack` makes the same adapter of, beside the file of `memory`: its tensors lie there, and what does not
    (rows of tokens) is written behind. Raises OSError."""
    begin, inside = memory.numbers.data_ptr(), memory.numbers.nbytes
    offsets = {}
    found = {id(tensor): tensor for tensor in _tensors(adapter)}
    for key, tensor in found.items():
        if not 0 <= (offset := tensor.data_ptr() - begin) < inside:
            offset = -(-os.fstat(memory.file).st_size // ALIGNMENT) * ALIGNMENT
            os.pwrite(memory.file, tensor.contiguous().view(torch.uint8).numpy().data, offset)
        offsets[key] = offset
    ordered = sorted(found, key=offsets.__getitem__)
    numbers = {key: number for number, key in enumerate(ordered)}
    runs: list[tuple[int, torch.dtype, list[tuple[int, ...]]]] = []
    end = 0
    for key in ordered:
        tensor = found[key]
        if not runs or runs[-1][1] != tensor.dtype or offsets[key] != end:
            runs.append((offsets[key], tensor.dtype, []))
        runs[-1][2].append(tuple(tensor.shape))
        end = offsets[key] + tensor.nbytes
    return AdapterRead(
        adapter.kind,
        asdict(adapter.config),
        adapter.digest,
        {
            path: tuple(numbers.get(id(value), value) for value in _values(module))
            for path, module in adapter.modules.items()
        },
        adapter.router,
        None if adapter.ec is None else numbers[id(adapter.ec)],
        {name: numbers[id(tensor)] for name, tensor in adapter.saved.items()},
        adapter.training,
        {path: (numbers[id(ids)], numbers[id(rows)]) for path, (ids, rows) in adapter.tokens.items()},
        [TensorRun(offset, str(dtype).removeprefix("torch."), tuple(shapes)) for offset, dtype, shapes in runs],
        adapter.vocab_size,
    )


def unpack(message: AdapterRead, memory: mmap.mmap) -> Adapter:
    """The adapter of a message and of the memory that came with it, which is held until the last of the adapter's
    tensors goes."""
    tensors: list[Tensor] = []
    for run in message.runs:
        sizes = [math.prod(shape) for shape in run.shapes]
        flat = torch.frombuffer(memory, dtype=_DTYPES[run.dtype], count=sum(sizes), offset=run.offset)
        tensors += [part.view(shape) for part, shape in zip(flat.split(sizes), run.shapes, strict=True)]
    config, module = _KINDS[message.kind]
    return Adapter(
        config(**message.config),
        message.digest,
        {
            path: module(*[tensors[value] if type(value) is int else value for value in values])
            for path, values in message.modules.items()
        },
        message.router,
        None if message.ec is None else tensors[message.ec],
        {name: tensors[number] for name, number in message.saved.items()},
        message.training,
        {path: (tensors[ids], tensors[rows]) for path, (ids, rows) in message.tokens.items()},
        message.vocab_size,
    )


def _values(module: TuckAModule | LoRAModule | BankModule) -> list[Any]:
    return [getattr(module, field.name) for field in fields(module)]


def _tensors(adapter: Adapter) -> Iterable[Tensor]:
    for module in adapter.modules.values():
        yield from (value for value in _values(module) if isinstance(value, Tensor))
    if adapter.ec is not None:
        yield adapter.ec
    yield from adapter.saved.values()
    for rows in adapter.tokens.values():
        yield from rows
