"""Steps as CUDA graphs: which there are, and which one runs a batch.

A graph is of a number of rows, with prompts or without, of the sites of a layer that have adapters, and of limits that
those keep. A batch that needs more runs without: many rows of prompts, whose products take longer than all launches;
prompts that are scored, averaged or only routed; drafts; adapters that replace parameters of the base, those that are
being routed inside the model; rotary positions that stretch with the text.
"""

import weakref
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.engine.batch import Chosen
from tucka_runtime.engine.bucket import Bucket
from tucka_runtime.engine.capture import Shared
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.filtered_choice import FilteredChoice
from tucka_runtime.engine.graph_fields import Fields
from tucka_runtime.engine.graph_shape import GraphShape, Needs
from tucka_runtime.engine.prompt_bucket import MOST_PROMPTS, MOST_ROUTED, MOST_ROWS, PromptBucket
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.sequence import Sequence

MOST = 256
"""Graphs at most, of 22 sizes of batches for each kind of adapters. On an H100 17 of a Llama-3-8B take
340 MB: 3,286 less 32 adapters (`graphs` of docs/measurements/first-run/engine.py)."""


def sizes(most: int) -> list[int]:
    """Batch sizes that have a graph: a batch takes the next larger one. Steps of a quarter, at least 4; unmeasured."""
    out, size = [], 1
    while size < most:
        out.append(size)
        size += size if size < 4 else max(4, 1 << (size.bit_length() - 3))
    return [*out, most]


def prompt_sizes(most: int) -> list[int]:
    """Rows of the graphs of steps with prompts, for steps of up to `most` rows: by 64, since each row that fills one up
    is multiplied too. Unmeasured."""
    most = min(most, MOST_ROWS)
    return [*range(64, most, 64), most]


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
        max_tokens: int,
        max_len: int,
        block_size: int,
    ):
        cuda = table.device.type == "cuda"
        self.sizes = sizes(max_seqs)
        self.prompt_sizes = prompt_sizes(max_tokens)
        self.shared = Shared(
            model,
            caches,
            table,
            chosen,
            max_seqs,
            max_len,
            block_size,
            blocks=Fields({"table": (torch.int32, (max_seqs * -(-max_len // block_size),))}, table.device),
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
        self._known: tuple[weakref.ref[ActiveSet], Needs] | None = None
        """The last active set, and what it needs. Weak, so that its adapters do not stay in memory for its sake."""

    def find(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> Bucket | None:
        """The bucket that runs this step: of just its shape, else the smallest of those that can. None where no graph
        can, or where there are too many of them."""
        rotary = self.shared.model.rotary
        stretches = rotary is not None and rotary.stretch_from is not None
        if stretches or len(chunks) > self.sizes[-1] or not all(_graphable(c, active) for c in chunks):
            return None
        if all(map(_decodes, chunks)):
            return self.bucket(len(chunks), active)
        return self.prompt_bucket(chunks, active)

    def bucket(self, count: int, active: ActiveSet | None) -> Bucket | None:
        """The same for `count` decoding rows. Only what no bucket can run is captured at once, under requests: what
        one of more sites, rows or ranks can is noted for the next idle moment."""
        shape = self._shape(count, active)
        bucket = self._able(shape)
        if bucket is None and len(self.buckets) < MOST:
            return self._add(shape)
        return bucket

    def prompt_bucket(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> Bucket | None:
        """The same for steps with prompts, of which none is captured under requests: they run without, too."""
        rows = sum(c.count for c in chunks)
        if rows > self.prompt_sizes[-1] or sum(c.count > 1 for c in chunks) > MOST_PROMPTS:
            return None
        if sum(c.seq.route_tokens for c in chunks if _unrouted(c.seq)) > MOST_ROUTED:
            return None
        shape = self._shape(rows, active, prompts=True)
        bucket = self._able(shape)
        if bucket is None:
            self.missed[shape] = None
        return bucket

    def _able(self, shape: GraphShape) -> Bucket | None:
        """The bucket of a shape, else the smallest of those that can run its batches."""
        if shape in self.buckets:
            return self.buckets[shape]
        able = [bucket for own, bucket in self.buckets.items() if own.serves(shape)]
        if not able:
            return None
        self.missed[shape] = None
        return min(able, key=lambda bucket: bucket.shape.cost)

    def choose_filtered(self, rows: int, seqs: Rows[Sequence]) -> None:
        """Chooses the tokens of the sequences that a bucket of `rows` of them ran again, by their filters."""
        if rows not in self.filtered:
            self.filtered[rows] = FilteredChoice(self.shared, rows)
        self.filtered[rows].run(seqs)

    def _shape(self, count: int, active: ActiveSet | None, prompts: bool = False) -> GraphShape:
        """Which sites have adapters, of the four of a layer, and how large those are makes another bucket: a site
        without costs nothing, and one large adapter does not make the batches of small ones slower."""
        if active is None:
            needs = Needs()
        elif (known := self._known) is not None and known[0]() is active:
            needs = known[1]
        else:
            needs = Needs.of(active.folded.values())
            self._known = weakref.ref(active), needs
        size = next(s for s in (self.prompt_sizes if prompts else self.sizes) if s >= count)
        return GraphShape(size, *needs, prompts)

    def _add(self, shape: GraphShape) -> Bucket:
        self.buckets[shape] = (PromptBucket if shape.prompts else Bucket)(self.shared, shape)
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
        """The largest first: the others fit into the memory that it leaves in the pool. Those of prompts last: without
        them a step takes longer, but waits for none."""
        alone = dict.fromkeys(Needs.of([folded]) for folded in adapters)
        if adapters:
            alone[Needs.of(adapters)] = None
        return (
            GraphShape(size, *own, prompts)
            for prompts, sizes in ((False, self.sizes), (True, self.prompt_sizes))
            for own in alone
            for size in reversed(sizes)
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures every size without adapters, its choice by filters, and with adapters everywhere the least and the
        largest, and of those with prompts every other, which compiles what most of them need, and can run what has not
        been captured yet."""
        for size in reversed(self.sizes):
            self._add(GraphShape(size))
            self.filtered[size] = FilteredChoice(self.shared, size)
        everywhere = frozenset(range(len(self.shared.table.arch.sites)))
        for size in (self.sizes[-1], self.sizes[0]):
            self._add(GraphShape(size, everywhere))
        for size in reversed(self.prompt_sizes):
            self._add(GraphShape(size, prompts=True))
        for size in self.prompt_sizes[::-2]:
            self._add(GraphShape(size, everywhere, prompts=True))


def _decodes(chunk: ScheduledChunk) -> bool:
    """Whether a chunk is a row of an answer that brings the next one."""
    seq = chunk.seq
    return chunk.count == 1 and chunk.start >= seq.num_prompt and chunk.due and not _unrouted(seq)


def _unrouted(seq: Sequence) -> bool:
    """Whether a sequence is to have a route of its own and has none yet."""
    return seq.adapter is not None and seq.routes_itself and seq.route is None


def _graphable(chunk: ScheduledChunk, active: ActiveSet | None) -> bool:
    """Whether a chunk can be in a graph: a token of it is all that is asked for, its adapter can be in one, and its
    route is known or found from token ids."""
    seq = chunk.seq
    if chunk.draft or seq.routing or seq.request.pooling is not None or seq.sampling.prompt_logprobs is not None:
        return False
    if seq.adapter is None or active is None:
        return True
    folded = active.folded[seq.adapter]
    inside = folded.routed is not None and folded.routed.router.table is None
    return _in_graphs(folded) and not (inside and seq.route is None)


def _in_graphs(folded: FoldedAdapter) -> bool:
    """Whether an adapter replaces no parameter of the base, and has one router at most: a combination's further ones
    make their blocks of a core one by one (AdapterDelta._route_each)."""
    return folded.in_deltas and not folded.further
