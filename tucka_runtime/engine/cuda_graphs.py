"""Decoding steps as CUDA graphs: which there are, and which one runs a batch.

A graph is of a size of batch, of the sites of a layer that have adapters, and of limits that those keep. A batch that
needs more than a decoding step does runs without: prompts, adapters that replace parameters of the base, those that are
being routed inside the model, rotary positions that stretch with the text.
"""

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.engine.batch import Chosen
from tucka_runtime.engine.bucket import Bucket, Shared
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.filtered_choice import FilteredChoice
from tucka_runtime.engine.graph_shape import GraphShape, Needs
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.sequence import Sequence

MOST = 256
"""Graphs at most, of fourteen sizes of batches for each kind of adapters. Unmeasured: `graphs` of
docs/measurements/first-run/engine.py decides."""


def sizes(most: int) -> list[int]:
    """Batch sizes that have a graph: a batch takes the next larger one. Steps of a quarter, at least 4; unmeasured."""
    out, size = [], 1
    while size < most:
        out.append(size)
        size += size if size < 4 else max(4, 1 << (size.bit_length() - 3))
    return [*out, most]


class CudaGraphs:
    """The buckets, made when they are first needed. None is given up while the engine runs: the device may be at work
    on it, and batches of the adapters that it was made for come back."""

    def __init__(
        self,
        model: Decoder,
        caches: list[tuple[Tensor, Tensor]],
        table: SlotTable,
        chosen: Chosen,
        max_seqs: int,
        max_len: int,
        block_size: int,
    ):
        cuda = table.device.type == "cuda"
        self.sizes = sizes(max_seqs)
        self.shared = Shared(
            model,
            caches,
            table,
            chosen,
            max_seqs,
            max_len,
            block_size,
            logits=torch.empty(max_seqs, table.arch.vocab, device=table.device),
            pool=torch.cuda.graph_pool_handle() if cuda else None,
            side=torch.cuda.Stream(table.device) if cuda else None,
            capturing=torch.cuda.Stream(table.device) if cuda else None,
        )
        self.buckets: dict[GraphShape, Bucket] = {}
        self.filtered: dict[int, FilteredChoice] = {}
        """By size of batch."""
        self.missed: dict[GraphShape, None] = {}
        """What batches wanted, in this order, and were served by a bucket of more."""
        self._known: tuple[ActiveSet | None, Needs] = None, Needs()
        """The last active set, and what it needs."""

    def find(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> Bucket | None:
        """The bucket that runs this step: of just its shape, else the smallest of those that can. None where no graph
        can, or where there are too many of them."""
        rotary = self.shared.model.rotary
        stretches = rotary is not None and rotary.stretch_from is not None
        if stretches or len(chunks) > self.sizes[-1]:
            return None
        if not all(c.count == 1 and c.start >= c.seq.num_prompt and c.due for c in chunks):
            return None
        if active is not None and not all(_graphable(c.seq, active) for c in chunks):
            return None
        return self.bucket(len(chunks), active)

    def bucket(self, count: int, active: ActiveSet | None) -> Bucket | None:
        """The same for `count` decoding rows. Only what no bucket can run is captured at once, under requests: what
        one of more sites, rows or ranks can is noted for the next idle moment."""
        shape = self._shape(count, active)
        if shape in self.buckets:
            return self.buckets[shape]
        able = [bucket for own, bucket in self.buckets.items() if own.serves(shape)]
        if able:
            self.missed[shape] = None
            return min(able, key=lambda bucket: bucket.shape.cost)
        return self._add(shape) if len(self.buckets) < MOST else None

    def choose_filtered(self, rows: int, seqs: Rows[Sequence]) -> None:
        """Chooses the tokens of the sequences that a bucket of `rows` ran again, by their filters."""
        if rows not in self.filtered:
            self.filtered[rows] = FilteredChoice(self.shared, rows)
        self.filtered[rows].run(seqs)

    def _shape(self, count: int, active: ActiveSet | None) -> GraphShape:
        """Which sites have adapters, of the four of a layer, and how large those are makes another bucket: a site
        without costs nothing, and one large adapter does not make the batches of small ones slower."""
        if active is not self._known[0]:
            self._known = active, Needs.of(active.folded.values() if active else ())
        size = next(s for s in self.sizes if s >= count)
        return GraphShape(size, *self._known[1])

    def _add(self, shape: GraphShape) -> Bucket:
        self.buckets[shape] = Bucket(self.shared, shape)
        return self.buckets[shape]

    @torch.inference_mode()
    def prepare(self, adapters: Collection[FoldedAdapter]) -> bool:
        """Captures one graph that batches of these adapters will want, of each alone or all together, or that others
        wanted; False once there are all."""
        for shape in [*self._wanted([folded for folded in adapters if _in_graphs(folded)]), *self.missed]:
            self.missed.pop(shape, None)
            if shape not in self.buckets and len(self.buckets) < MOST:
                self._add(shape)
                return True
        return False

    def _wanted(self, adapters: Collection[FoldedAdapter]) -> Iterator[GraphShape]:
        """The largest first: the others fit into the memory that it leaves in the pool."""
        alone = dict.fromkeys(Needs.of([folded]) for folded in adapters)
        if adapters:
            alone[Needs.of(adapters)] = None
        return (GraphShape(size, *own) for own in alone for size in reversed(self.sizes))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures every size without adapters, its choice by filters, and the least and the largest with adapters
        everywhere, which compiles what most of them need, and can run what has not been captured yet."""
        for size in reversed(self.sizes):
            self._add(GraphShape(size))
            self.filtered[size] = FilteredChoice(self.shared, size)
        everywhere = frozenset(range(len(self.shared.table.arch.sites)))
        for size in (self.sizes[-1], self.sizes[0]):
            self._add(GraphShape(size, everywhere))


def _graphable(seq: Sequence, active: ActiveSet) -> bool:
    """Whether a decoding row can be in a graph: its adapter can, and its route is known or found from token ids."""
    if seq.adapter is None:
        return True
    folded = active.folded[seq.adapter]
    inside = folded.routed is not None and folded.routed.router.table is None
    unknown = seq.route is None and (inside or seq.routes_itself)
    return _in_graphs(folded) and not unknown


def _in_graphs(folded: FoldedAdapter) -> bool:
    """Whether an adapter replaces no parameter of the base, and has no cores that begin as the identity: those of a
    graph hold what the last batch left there."""
    return folded.in_deltas and not folded.mixed
