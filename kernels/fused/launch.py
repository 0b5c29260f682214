"""How kernels are started: compiled once for each kind of arguments, then called directly.

Triton's own way binds and classifies every argument by name on each call: 15 to 20 us of Python a launch, of which a
layer with adapters has fifteen (`python -m tucka_runtime.kernels.bench --host` counts them). Here one pass over the
arguments makes the key of what Triton would compile, and the compiled kernel is started without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """What limits the programs of a device that are resident at once: streaming multiprocessors (SMs), and of each its
    registers, bytes of shared memory, threads and programs."""

    sms: int
    registers: int
    shared: int
    threads: int
    programs: int

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs on all SMs at once of a kernel that takes so many registers a thread, bytes of shared memory and
        warps. A warp gets registers by 256, a program shared memory by 128 and a kilobyte that the driver keeps."""
        warp = -(-registers * 32 // 256) * 256
        own = -(-(shared + 1024) // 128) * 128
        # An SM's registers lie in four parts, and a warp's in one of them.
        by_registers = self.registers // 4 // warp * 4 // warps if warp else self.programs
        return self.sms * min(by_registers, self.shared // own, self.threads // (32 * warps), self.programs)


HOPPER = Device(sms=132, registers=65536, shared=233472, threads=2048, programs=32)
"""An H100 SXM or H200: NVIDIA's tables of compute capability 9.0. What is compiled without a device is compiled for it,
and what Triton's interpreter runs is cut as for it."""


@lru_cache
def device(index: int) -> Device:
    """The limits of a GPU."""
    p = torch.cuda.get_device_properties(index)
    # torch does not tell this one: 32 in compute capabilities 8.0 and 9.0, 16 in 8.6 and 8.7, 24 in 8.9 and 12.0.
    programs = {(8, 6): 16, (8, 7): 16, (8, 9): 24, (12, 0): 24}.get((p.major, p.minor), 32)
    return Device(
        p.multi_processor_count,
        p.regs_per_multiprocessor,  # type: ignore[attr-defined]  # torch's stub lacks it
        p.shared_memory_per_multiprocessor,
        p.max_threads_per_multi_processor,
        programs,
    )


class Starter:
    """What is asked of the device. The bench puts others in its place: one that only compiles, one that counts."""

    def resident(self, compiled: Any) -> int:
        """How many programs of a compiled kernel the device holds at once."""
        compiled._init_handles()
        metadata = compiled.metadata
        own = device(driver.active.get_current_device())
        resident: int = own.resident(compiled.n_regs, metadata.shared, metadata.num_warps)
        return resident

    def start(self, compiled: Any, grid: Grid, args: tuple[object, ...]) -> None:
        """Starts a compiled kernel on the current stream, with all arguments of its signature."""
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        x, y, z = (*grid, 1, 1)[:3]
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


class Counter(Starter):
    """Counts what it starts."""

    def __init__(self) -> None:
        self.count = 0

    def start(self, compiled: Any, grid: Grid, args: tuple[object, ...]) -> None:
        """Starts it too."""
        self.count += 1
        super().start(compiled, grid, args)


starter = Starter()
INTERPRETED = HOPPER.resident(64, 0, 4)
"""Programs that are said to be resident where Triton's interpreter runs one after the other."""

SMALL = 1 << 31
"""What whole numbers of 32 bits are below."""

_compiled: dict[tuple[object, ...], tuple[Any, int, tuple[object, ...]]] = {}


def kinds(args: tuple[Any, ...]) -> list[object]:
    """What of each argument decides what Triton compiles, or more: of a tensor its type and whether it starts at a
    multiple of 16 bytes, of a whole number whether it is 1, a multiple of 16, or needs 64 bits. Most time of a launch
    is spent here, so that what is common comes first."""
    return [
        (value == 1 or 2 if value & 15 else 0)
        if type(value) is int and -SMALL <= value < SMALL
        else value.dtype
        if type(value) is Tensor and not value.data_ptr() & 15
        else _kind(value)
        for value in args
    ]


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype if not value.data_ptr() & 15 else (value.dtype, "not aligned")
    return (type(value), value & 15 == 0) if type(value) is int else type(value)


def launch(kernel: Any, grid: Grid | Callable[[int], Grid], *args: Any, **options: int | None) -> None:
    """kernel[grid](*args, **options); where the grid is a function, of the programs that are resident at once.

    `args` are the kernel's arguments up to its constants, which are among `options` and follow the others in every
    signature here.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid if isinstance(grid, tuple) else grid(INTERPRETED)](*args, **options)
        return
    key: tuple[object, ...] = (
        kernel.fn,
        starter,
        driver.active.get_current_device(),
        *kinds(args),
        *options,
        *options.values(),
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel.warmup(*args, grid=(1,), enable_fp_fusion=True, **options)
        constants: tuple[object, ...] = tuple(options[name] for name in kernel.arg_names[len(args) :])
        found = _compiled[key] = compiled, starter.resident(compiled), constants
    compiled, resident, constants = found
    starter.start(compiled, grid if isinstance(grid, tuple) else grid(resident), (*args, *constants))
