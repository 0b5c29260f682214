"""How a graph is captured, and what all graphs of an engine have in common.

What a step reads lies at fixed places: a bucket's own tables (Fields), and the slots of the loaded adapters
(SlotTable). So adapters, ranks, routes, blocks and lengths change while a captured graph stays good.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.engine.batch import Chosen
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.graph_fields import Fields


@dataclass(frozen=True, eq=False)
class Shared:
    """What all buckets have in common. Logits and the block table are everybody's: the ones are read, and the other is
    written, between one graph and the next."""

    model: Decoder
    caches: list[tuple[Tensor, Tensor]]
    table: SlotTable
    chosen: Chosen
    max_seqs: int
    max_len: int
    block_size: int
    blocks: Fields
    """The block table of whatever batch is next: as long as contexts can be, it would be most of what a graph keeps."""
    logits: Tensor
    pool: "torch.cuda._POOL_HANDLE | None"
    side: torch.cuda.Stream | None
    """Where shrinks run."""
    capturing: torch.cuda.Stream | None
    """Where graphs are captured; None where none can be."""
    _cores: dict[int, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def cores(self, rank: int) -> Tensor:
        """Room for a core of every row and, last, the identity for adapters whose core is constant."""
        if rank not in self._cores:
            shape = (self.max_seqs + 1, self.table.arch.num_linears, rank, rank)
            self._cores[rank] = torch.zeros(shape, dtype=self.table.dtype, device=self.device)
            self._cores[rank][-1] = torch.eye(rank, device=self.device)
        return self._cores[rank]


def rehearse(shared: Shared, step: Callable[[], None]) -> None:
    """A step that leaves no trace: of an empty batch, which writes no keys. The tokens that the last step chose, which
    the next one may start from, are put back."""
    chosen = shared.chosen.tokens
    kept = chosen.clone()
    step()
    chosen.copy_(kept)


def capture(shared: Shared, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """A graph of what `step` launches for an empty batch; None where none can be captured."""
    stream = shared.capturing
    if stream is None:
        return None
    # Once without: kernels are compiled and their counters made. Not on a stream of its own: cuBLAS would keep a
    # workspace for each.
    rehearse(shared, step)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Not torch.cuda.graph, which empties the allocator's cache first: the next steps would fill it again, by calls
        # that wait for the device. Another thread may be loading an adapter: its calls are none of this capture's.
        graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # an error within has spoilt the capture
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
