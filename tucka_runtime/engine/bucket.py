"""One decoding step as a CUDA graph.

A graph does everything from token ids to chosen tokens, over what `Bucket.fill` has written. Where nothing can be
captured (Triton's interpreter) the same launches run one by one, over the same tables.
"""

import logging
from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import AdapterDelta
from tucka_runtime.engine.adapters.segment import (
    Routes,
    Segment,
    core_rows,
    route_plan,
    write_identities,
    write_members,
)
from tucka_runtime.engine.batch import known_ids, segment
from tucka_runtime.engine.capture import Shared, capture
from tucka_runtime.engine.graph_fields import CPU, Fields, Shapes
from tucka_runtime.engine.graph_shape import GraphShape
from tucka_runtime.engine.sampler import draws
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import COLUMNS, RouteLimits, RoutePlan
from tucka_runtime.kernels.tables.segments import Segments

logger = logging.getLogger(__name__)


class Bucket:
    """One graph: `fill` writes a batch of up to `rows` decoding sequences, `run` runs it; then `logits` (seqs, vocab)
    and `tokens` (seqs,) of those that are due are there, what stands beyond the batch meaning nothing."""

    def __init__(self, shared: Shared, shape: GraphShape):
        self.shared, self.shape, self.rows = shared, shape, shape.rows
        self.seqs = self._most_seqs()
        self.cores = shared.cores(shape.limits.core_rank)
        self.fields = self._make_fields()
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=shared.device)
        self.tokens = shared.chosen.tokens[: self.seqs]
        self.logits = shared.logits[: self.seqs]
        self.due: list[int] = []
        """The chunks of the last batch that bring a token, in the order of `tokens`."""
        self.attention = self._attention()
        self.plan = self._route_plan() if shape.kinds else None
        self.delta = self._adapter_delta() if shape.kinds else AdapterDelta(self.rows, shared.model.ops)
        self._routed: list[tuple[int, int]] = []
        self.fill([], None)
        self._graph = capture(shared, self._step)
        if self._graph is not None:
            logger.info("captured a graph of %d rows, adapters at %d sites of a layer", self.rows, len(shape.kinds))

    def _most_seqs(self) -> int:
        """Sequences that there is room for."""
        return self.rows

    def _num_tiles(self) -> int:
        """Tiles that suffice for any membership."""
        return self.rows

    def _own_shapes(self) -> Shapes:
        """Fields beside those that all buckets have."""
        return {}

    def _make_fields(self) -> Fields:
        """All that varies from step to step."""
        rows, seqs, shared = self.rows, self.seqs, self.shared
        i64, i32, f32 = torch.int64, torch.int32, torch.float32
        return Fields(
            self._own_shapes()
            | {
                "known": (i64, (rows,)),
                "source": (i64, (rows,)),
                "positions": (i64, (rows,)),
                "slot_mapping": (i64, (rows,)),
                "seed": (i64, (seqs,)),
                "place": (i64, (seqs,)),
                "temperature": (f32, (seqs,)),
                "seq_lens": (i32, (seqs + 1,)),  # the last is nobody's
                "first_block": (i32, (seqs + 1,)),
                "tiles": (i32, (self._num_tiles(), 4)),
                "row_cores": (i32, (rows,)),
                "records": (i64, (seqs, COLUMNS)),
                "groups": (i64, (seqs,)),
                "weights": (f32, (seqs, self.shape.limits.t)),
            },
            shared.device,
        )

    def _attention(self) -> AttentionMetadata:
        """Every row a decoding sequence, at the places of the fields."""
        on, shared, i32 = self.fields.on_device, self.shared, torch.int32
        return AttentionMetadata(
            spans=(),
            longest=shared.max_len,
            block_size=shared.block_size,
            slot_mapping=on["slot_mapping"],
            query_start=torch.arange(self.rows + 1, dtype=i32, device=shared.device),
            seq_lens=on["seq_lens"],
            block_table=shared.blocks.on_device["table"],
            first_block=on["first_block"],
            singles=torch.arange(self.rows, dtype=i32, device=shared.device),
            tiles=torch.empty(0, 2, dtype=i32, device=shared.device),
        )

    def _route_plan(self) -> RoutePlan:
        on, limits, table = self.fields.on_device, self.shape.limits, self.shared.table
        most = RouteLimits(limits.k, limits.t, table.arch.num_linears, limits.core_rank, self._most_routed())
        return RoutePlan((), (), (), most, on["records"], on["groups"], on["weights"])

    def _most_routed(self) -> int:
        """Tokens that one segment is routed by, at most."""
        return self.rows

    def _adapter_delta(self) -> AdapterDelta:
        """Any segments, at the sites of `kinds`."""
        shared, rows, table, limits = self.shared, self.rows, self.shared.table, self.shape.limits
        sites = {at: site for at, site in table.sites(self.shape.affine).items() if at[1] in self.shape.kinds}
        active = ActiveSet({}, {}, table.capacity, sites, table.arch, limits.core_rank, limits.rank, True)
        on = self.fields.on_device
        segments = Segments.build((), rows, table.capacity, CPU, num_tiles=self._num_tiles())
        segments = replace(segments, tiles=on["tiles"], row_cores=on["row_cores"])
        return AdapterDelta(rows, shared.model.ops, active, segments, cores=self.cores, side=shared.side)

    def fill(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> list[int | None]:
        """Writes chunks, in row order, to where `run` reads them; returns the segment of each."""
        self.due = [i for i, chunk in enumerate(chunks) if chunk.due]
        first_rows = [0, *accumulate(chunk.count for chunk in chunks)]
        segments, segment_of, _ = segment(chunks, first_rows[:-1], {})
        self._fill_rows(chunks, first_rows)
        if self.plan is not None:
            self._fill_segments(segments, active)
        self.fields.send()
        return segment_of

    def _fill_rows(self, chunks: Rows[ScheduledChunk], first_rows: Rows[int]) -> None:
        """What belongs to single rows and sequences. The first row of each chunk, and the row behind the last one, are
        `first_rows`. An empty batch leaves the shared block table alone, which another graph may be reading."""
        at = self.fields.on_host
        at["source"].fill_(-1)
        at["slot_mapping"].fill_(-1)
        at["seq_lens"].zero_()
        if not chunks:
            return
        seqs, last = [c.seq for c in chunks], [row - 1 for row in first_rows[1:]]
        spans = [(first, c.count, c.start + c.count) for first, c in zip(first_rows[:-1], chunks, strict=True)]
        plan = AttentionMetadata.build(spans, [seq.block_table for seq in seqs], self.attention.block_size, CPU)
        temperature, seed, place = draws([seqs[i] for i in self.due])
        own = {
            "known": torch.tensor([token for c in chunks for token in known_ids(c)]),
            "positions": torch.tensor([p for c in chunks for p in range(c.start, c.start + c.count)]),
            "slot_mapping": plan.slot_mapping,
            "seq_lens": plan.seq_lens,
            "first_block": plan.first_block,
            "temperature": temperature,
            "seed": seed,
            "place": place,
        }
        for name, value in own.items():
            at[name][: len(value)].copy_(value)
        at["source"][torch.tensor(last)] = torch.tensor([self.shared.chosen.source(seq) for seq in seqs])
        self._fill_own(plan, last)
        blocks = self.shared.blocks
        blocks.on_host["table"][: len(plan.block_table)].copy_(plan.block_table)
        blocks.send(plan.block_table.nbytes)

    def _fill_own(self, plan: AttentionMetadata, last_rows: Rows[int]) -> None:
        """The fields of `_own_shapes` that belong to sequences."""

    def _fill_segments(self, segments: Rows[Segment], active: ActiveSet | None) -> None:
        """Who uses which adapter, and what of it is to be routed."""
        at, shared = self.fields.on_host, self.shared
        rows = core_rows(segments, active, shared.max_seqs) if active else []
        spans = [(s.first, s.end, active.index[s.adapter]) for s in segments] if active else []
        built = Segments.build(spans, self.rows, shared.table.capacity, CPU, rows, self._num_tiles())
        at["tiles"].copy_(built.tiles)
        at["row_cores"].copy_(built.row_cores)
        at["records"].zero_()
        if active:
            write_identities(segments, rows, active, self.cores)
            write_members(segments, rows, active, self.cores)
        parts = [routed.parts if active and (routed := active.folded[s.adapter].routed) else None for s in segments]
        self._routed = [(s, part.t) for s, part in enumerate(parts) if part is not None]
        if not self._routed:
            return
        own = [segments[s] for s, _ in self._routed]
        self._place_ids(own)
        plan = route_plan([p for p in parts if p is not None], [rows[s] for s, _ in self._routed], own, CPU)
        for name in ("records", "groups", "weights"):
            value = getattr(plan, name)
            at[name][tuple(map(slice, value.shape))].copy_(value)

    def _place_ids(self, segments: Rows[Segment]) -> None:
        """Says where the tokens that route segments will lie."""
        for part in segments:
            part.ids = self.ids[part.first : part.end]

    def routes(self) -> list[Routes]:
        """The routes of this step's segments, on the device."""
        if not self._routed or self.plan is None:
            return []
        n = len(self._routed)
        own, experts = (list(column) for column in zip(*self._routed, strict=True))
        return [Routes(own, experts, self.plan.groups[:n], self.plan.weights[:n])]

    def run(self) -> None:
        """One step over what `fill` wrote."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        shared, on, ops = self.shared, self.fields.on_device, self.shared.model.ops
        earlier = shared.chosen.tokens.index_select(0, on["source"].clamp(min=0))
        self.ids.copy_(torch.where(on["source"] >= 0, earlier, on["known"]))
        if self.plan is not None:
            ops.route_ids(self.plan)
            ops.core(self.plan, self.cores)
        hidden = shared.model.forward(self.ids, on["positions"], None, self.attention, shared.caches, self.delta)
        self.logits.copy_(shared.model.weights.head(self._predicting(hidden)))
        self.tokens.copy_(ops.sample(self.logits, on["temperature"], on["seed"], on["place"]))

    def _predicting(self, hidden: Tensor) -> Tensor:
        """The hidden states (seqs, d) of the rows that predict a token."""
        return hidden
