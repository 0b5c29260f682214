"""The memory that adapters may take: what is left once the model is loaded, less what a step takes for a moment."""

import contextlib
import weakref
from collections.abc import Iterator

import torch

from tucka_runtime import machine
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.host_cache import moved
from tucka_runtime.engine.turns import Work, once, whole
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
        self._loading = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        left, limit = self._left()
        if kept + passing > left:
            takes, more, room, step = map(_size, (kept, passing, max(left, 0), self.step_bytes))
            raise AdapterCapacityError(
                f"The adapter takes {takes}, and {more} more while it is loaded, but {room} of {limit} are left beside "
                f"the KV cache and the {step} that a step needs. Unload one, or restart with a smaller "
                "--kv-cache-tokens.",
                missing=kept + passing - left,
            )

    def room_to_read(self) -> int:
        """Bytes that an adapter's tensors may take in the host's memory before it is folded."""
        return max(self._left()[0], 0) if self.device.type == "cpu" else machine.memory().available

    def take(self, folded: FoldedAdapter) -> None:
        """Books an adapter, until nobody holds it any more."""
        self._loaded[folded] = folded.num_bytes

    def make(self, work: Work[FoldedAdapter], kept: int, passing: int) -> Work[FoldedAdapter]:
        """Books what comes of some work, which keeps so many bytes and takes so many more meanwhile: on a GPU on a
        stream of its own, beside what runs, where it has to be done whole. Raises AdapterCapacityError."""
        yield
        self.check(kept, passing)
        yield
        try:
            with torch.cuda.stream(self._loading) if self._loading is not None else contextlib.nullcontext():
                folded = yield from work
        except torch.OutOfMemoryError as e:
            raise AdapterCapacityError(
                "The GPU has no memory left for the adapter. Unload one, or restart with a smaller --kv-cache-tokens.",
                missing=kept + passing,
            ) from e
        if self._loading is not None:
            self._loading.synchronize()
            for tensor in folded.tensors():  # memory of one stream, read on another: it is free when both are done
                tensor.record_stream(torch.cuda.default_stream(self.device))
        self.take(folded)
        return folded

    def to_device(self, folded: FoldedAdapter) -> FoldedAdapter:
        """An adapter of the host's memory where it is served: on a CPU it is there. Raises AdapterCapacityError."""
        if self._loading is None:
            return folded
        return whole(self.make(once(lambda: moved(folded, self.device)), folded.num_bytes, 0))

    def to_host(self, folded: FoldedAdapter) -> FoldedAdapter:
        """The way back: the device's memory is free once nobody holds the argument."""
        if self._loading is None:
            return folded
        with torch.cuda.stream(self._loading):
            return moved(folded, torch.device("cpu"))

    def _left(self) -> tuple[int, str]:
        """Bytes that are left for adapters, and in words of what."""
        free, limit = self._free()
        left = free - self.step_bytes
        return left if self.room is None else min(left, self.room - self.taken), limit

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
