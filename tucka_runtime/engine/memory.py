"""The memory that adapters may take: what is left once the model is loaded, less what a step takes for a moment."""

import contextlib
import weakref
from collections.abc import Iterator

import torch

from tucka_runtime import machine
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.errors import AdapterCapacityError

SPARE = 1.25
"""What is kept free for a step, over what the longest one of the base took: adapters of a batch make low-rank halves
and cores beside it, a hundredth of its activations each."""


class AdapterMemory:
    """A book of the memory for adapters, on the device that they live on. It is opened by `measuring` a longest step:
    before that only what is free at the moment counts.

    What no adapter may take is never free by chance alone: a step's activations, which torch keeps between steps on a
    GPU and gives back on a CPU, and the pages of a KV cache on a CPU that nobody has written to yet.
    """

    def __init__(self, device: torch.device, cache_bytes: int):
        self.device = device
        self.unwritten = cache_bytes if device.type == "cpu" else 0
        self.step_bytes = 0
        """What a step takes for a moment."""
        self.room: int | None = None
        """Bytes that all adapters together may take, once it is known."""
        self._loaded: weakref.WeakKeyDictionary[FoldedAdapter, int] = weakref.WeakKeyDictionary()

    @property
    def taken(self) -> int:
        """Bytes of all adapters that are still there, those that are unloaded and answer requests among them."""
        return sum(self._loaded.values())

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Takes what runs meanwhile for the longest step that there will be, and opens the book after it."""
        before = self._start()
        yield
        self.step_bytes = int(max(self._most() - before, 0) * SPARE)
        free, _ = self._free()
        self.room = free + self.taken - self.unwritten - self.step_bytes

    def check(self, kept: int, passing: int) -> None:
        """Raises AdapterCapacityError if an adapter that keeps so many bytes, and takes so many more while it is
        folded, would leave a step without the memory that it needs."""
        free, limit = self._free()
        left = free - self.step_bytes
        if self.room is not None:
            left = min(left, self.room - self.taken)
        if kept + passing > left:
            takes, more, room, step = map(_size, (kept, passing, max(left, 0), self.step_bytes))
            raise AdapterCapacityError(
                f"The adapter takes {takes}, and {more} more while it is loaded, but {room} of {limit} are left beside "
                f"the KV cache and the {step} that a step needs. Unload one, or restart with a smaller "
                "--kv-cache-tokens."
            )

    def take(self, folded: FoldedAdapter) -> None:
        """Books an adapter, until nobody holds it any more."""
        self._loaded[folded] = folded.num_bytes

    def _free(self) -> tuple[int, str]:
        """Bytes that can be allocated now, and in words of what."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return free + kept, "the GPU's memory"
        memory = machine.memory()
        return memory.available, f"the memory that {memory.limited_by} allows"

    def _start(self) -> int:
        """Forgets the most bytes that were in use at once; returns those that are."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        machine.forget_peak()
        return machine.resident().now

    def _most(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else machine.resident().most


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
