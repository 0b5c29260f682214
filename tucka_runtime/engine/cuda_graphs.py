"""Decoding steps as CUDA graphs: one per size of batch, with adapters and without.

What a step reads lies at fixed places: a bucket's own tables, written by one copy per step, and the slots of the loaded
adapters (SlotTable). So adapters, ranks, routes, blocks and lengths change while a captured graph stays good. A
graph does everything from token ids to chosen tokens. Where nothing can be captured (Triton's interpreter) the same
launches run one by one, over the same tables.

A batch that needs more than a decoding step does runs without a graph: prompts, adapters that replace parameters of the
base, those that are being routed inside the model, rotary positions that stretch with the text.
"""

import logging
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import AdapterDelta
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.segment import Routes, Segment, core_rows, route_plan
from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.engine.batch import Chosen, known_ids, segment
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.sampler import draws
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import COLUMNS, RouteLimits, RoutePlan
from tucka_runtime.kernels.tables.segments import Segments, power_of_2
from tucka_runtime.kernels.tables.transfer import pack, view

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def sizes(most: int) -> list[int]:
    """Batch sizes that have a graph: a batch takes the next larger one. Steps of a quarter, at least 4; unmeasured."""
    out, size = [], 1
    while size < most:
        out.append(size)
        size += size if size < 4 else max(4, 1 << (size.bit_length() - 3))
    return [*out, most]


@dataclass(frozen=True)
class Limits:
    """What no loaded adapter exceeds, rounded up to powers of two so that few adapters change it."""

    rank: int = 16
    core_rank: int = 16
    k: int = 4
    t: int = 4

    def fit(self, folded: FoldedAdapter) -> "Limits":
        """The same, or larger where the adapter needs it."""
        parts = folded.routed.parts if folded.routed else None
        return Limits(
            max(self.rank, power_of_2(folded.max_rank)),
            max(self.core_rank, power_of_2(parts.rank if parts else 0)),
            max(self.k, power_of_2(parts.k if parts else 0)),
            max(self.t, power_of_2(parts.t if parts else 0)),
        )


class CudaGraphs:
    """The buckets, made when they are first needed."""

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
        self.model, self.caches, self.table, self.chosen = model, caches, table, chosen
        self.max_len, self.block_size = max_len, block_size
        self.sizes = sizes(max_seqs)
        self.device = table.device
        self.limits = Limits()
        self.cores = self._cores(self.limits.core_rank)
        # Everybody's: each is read before the next graph runs.
        self.logits = torch.empty(max_seqs, table.arch.vocab, device=self.device)
        self.buckets: dict[tuple[int, frozenset[int]], Bucket] = {}
        self.fitted: ActiveSet | None = None
        """The last one that `limits` were seen to hold."""
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def fit(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> bool:
        """Whether a graph can run this step."""
        stretches = self.model.rotary is not None and self.model.rotary.stretch_from is not None
        if stretches or len(chunks) > self.sizes[-1]:
            return False
        if not all(c.count == 1 and c.start >= c.seq.num_prompt and c.due for c in chunks):
            return False
        if active is None:
            return True
        return all(_graphable(c.seq, active) for c in chunks)

    def bucket(self, count: int, active: ActiveSet | None) -> "Bucket":
        """The bucket for `count` rows. Which sites have adapters, of the four of a layer, makes another one: a site
        without costs nothing."""
        kinds = frozenset(site for _, site in active.sites) if active else frozenset[int]()
        if active is not None and active is not self.fitted:
            self._grow(active.folded.values())
            self.fitted = active
        size = next(s for s in self.sizes if s >= count)
        if (size, kinds) not in self.buckets:
            self.buckets[size, kinds] = Bucket(self, size, kinds)
        return self.buckets[size, kinds]

    @torch.inference_mode()
    def prepare(self, adapters: Collection[FoldedAdapter]) -> bool:
        """Captures one graph that batches of these adapters will want, of each alone or all together, so that none of
        them waits for it; False once there are all."""
        able = [folded for folded in adapters if not folded.saved]
        self._grow(able)
        alone = {frozenset(site for _, site in folded.sites) for folded in able}
        for kinds in alone | {frozenset[int]().union(*alone)}:
            for size in reversed(self.sizes):
                if (size, kinds) not in self.buckets:
                    self.buckets[size, kinds] = Bucket(self, size, kinds)
                    return True
        return False

    def _grow(self, adapters: Iterable[FoldedAdapter]) -> None:
        limits = self.limits
        for folded in adapters:
            limits = limits.fit(folded)
        if limits != self.limits:
            self.limits, self.cores = limits, self._cores(limits.core_rank)
            self.buckets = {key: bucket for key, bucket in self.buckets.items() if not key[1]}

    def _cores(self, rank: int) -> Tensor:
        """Room for a core of every row and, last, the identity for adapters whose core is constant."""
        shape = (self.sizes[-1] + 1, self.table.arch.num_linears, rank, rank)
        cores = torch.zeros(shape, dtype=self.table.dtype, device=self.device)
        cores[-1] = torch.eye(rank, device=self.device)
        return cores

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures every size without adapters. The largest comes first: the others fit into the memory that it leaves
        in the pool. And the least and the largest with adapters everywhere, which compiles what most of them need."""
        for size in reversed(self.sizes):
            self.bucket(size, None)
        everywhere = frozenset(range(len(self.table.arch.sites)))
        for size in (self.sizes[-1], self.sizes[0]):
            self.buckets[size, everywhere] = Bucket(self, size, everywhere)


def _graphable(seq: Sequence, active: ActiveSet) -> bool:
    """Whether a decoding row can be in a graph: its adapter replaces no parameter of the base, and its route is known
    or found from token ids."""
    if seq.adapter is None:
        return True
    folded = active.folded[seq.adapter]
    inside = folded.routed is not None and folded.routed.router.table is None
    unknown = seq.route is None and (inside or seq.routes_itself)
    return not (folded.saved or unknown)


class Fields:
    """Named tensors in one buffer on the device and one, pinned, on the host; `send` copies the one to the other."""

    def __init__(self, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device):
        places, size = pack([dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes.values()])
        at = dict(zip(shapes, places, strict=True))
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_device = {name: view(self._device, at[name], *own) for name, own in shapes.items()}
        # Two by turns: the host writes the next step's while the last one's may still be on its way.
        self._hosts = [
            torch.zeros(size, dtype=torch.uint8, device=CPU, pin_memory=device.type == "cuda") for _ in range(2)
        ]
        self._views = [{name: view(host, at[name], *own) for name, own in shapes.items()} for host in self._hosts]
        self._turn = 0
        self._last = at[next(reversed(shapes))]
        self._last_itemsize = shapes[next(reversed(shapes))][0].itemsize

    @property
    def on_host(self) -> dict[str, Tensor]:
        """Where the next `send` reads."""
        return self._views[self._turn]

    def send(self, last: int) -> None:
        """One copy of everything; of the last field only the first `last` elements."""
        size = self._last + last * self._last_itemsize
        self._device[:size].copy_(self._hosts[self._turn][:size], non_blocking=True)
        self._turn = 1 - self._turn


class Bucket:
    """One graph: `fill` writes a batch of up to `rows` decoding sequences, `run` runs it; then `logits` (rows, vocab)
    and `tokens` (rows,) are there, what stands beyond the batch meaning nothing."""

    def __init__(self, graphs: CudaGraphs, rows: int, kinds: frozenset[int]):
        self.graphs, self.rows, self.kinds = graphs, rows, kinds
        self.fields = self._make_fields()
        self.ids = torch.zeros(rows, dtype=torch.int64, device=graphs.device)
        self.tokens = graphs.chosen.tokens[:rows]
        self.logits = graphs.logits[:rows]
        self.attention = self._attention()
        self.plan = self._route_plan() if kinds else None
        self.delta = self._adapter_delta() if kinds else AdapterDelta(rows, graphs.model.ops)
        self._routed: list[tuple[int, int]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self.fill([], None)
        self._capture()

    def _make_fields(self) -> Fields:
        """All that varies from step to step."""
        rows, graphs = self.rows, self.graphs
        i64, i32, f32 = torch.int64, torch.int32, torch.float32
        return Fields(
            {
                "known": (i64, (rows,)),
                "source": (i64, (rows,)),
                "positions": (i64, (rows,)),
                "slot_mapping": (i64, (rows,)),
                "seed": (i64, (rows,)),
                "place": (i64, (rows,)),
                "temperature": (f32, (rows,)),
                "seq_lens": (i32, (rows,)),
                "first_block": (i32, (rows,)),
                "tiles": (i32, (rows, 4)),
                "records": (i64, (rows, COLUMNS)),
                "groups": (i64, (rows,)),
                "weights": (f32, (rows, graphs.limits.t)),
                "block_table": (i32, (rows * -(-graphs.max_len // graphs.block_size),)),
            },
            graphs.device,
        )

    def _attention(self) -> AttentionMetadata:
        """Every row a decoding sequence, at the places of the fields."""
        on, graphs, i32 = self.fields.on_device, self.graphs, torch.int32
        return AttentionMetadata(
            spans=(),
            longest=graphs.max_len,
            block_size=graphs.block_size,
            slot_mapping=on["slot_mapping"],
            query_start=torch.arange(self.rows + 1, dtype=i32, device=graphs.device),
            seq_lens=on["seq_lens"],
            block_table=on["block_table"],
            first_block=on["first_block"],
            singles=torch.arange(self.rows, dtype=i32, device=graphs.device),
            tiles=torch.empty(0, 2, dtype=i32, device=graphs.device),
        )

    def _route_plan(self) -> RoutePlan:
        on, limits, table = self.fields.on_device, self.graphs.limits, self.graphs.table
        most = RouteLimits(limits.k, limits.t, table.arch.num_linears, limits.core_rank, self.rows)
        return RoutePlan((), (), (), most, on["records"], on["groups"], on["weights"])

    def _adapter_delta(self) -> AdapterDelta:
        """Every row a segment of its own, at the sites of `kinds`."""
        graphs, rows, table, limits = self.graphs, self.rows, self.graphs.table, self.graphs.limits
        sites = {at: site for at, site in table.sites.items() if at[1] in self.kinds}
        active = ActiveSet({}, {}, table.capacity, sites, table.arch, limits.core_rank, limits.rank)
        tiles = self.fields.on_device["tiles"]
        segments = replace(Segments.build((), rows, table.capacity, CPU, num_tiles=rows), tiles=tiles)
        return AdapterDelta(rows, graphs.model.ops, active, segments, cores=graphs.cores, side=graphs.side)

    def fill(self, chunks: Rows[ScheduledChunk], active: ActiveSet | None) -> list[int | None]:
        """Writes chunks, in row order, to where `run` reads them; returns the segment of each."""
        segments, segment_of, _ = segment(chunks, range(len(chunks)), {})
        blocks = self._fill_rows(chunks)
        if self.plan is not None:
            self._fill_segments(segments, active)
        self.fields.send(blocks)
        return segment_of

    def _fill_rows(self, chunks: Rows[ScheduledChunk]) -> int:
        """What belongs to single rows; returns how many blocks they have together."""
        at = self.fields.on_host
        at["source"].fill_(-1)
        at["slot_mapping"].fill_(-1)
        at["seq_lens"].zero_()
        if not chunks:
            return 0
        seqs = [c.seq for c in chunks]
        spans = [(i, 1, c.start + 1) for i, c in enumerate(chunks)]
        plan = AttentionMetadata.build(spans, [seq.block_table for seq in seqs], self.attention.block_size, CPU)
        temperature, seed, place = draws(seqs)
        own = {
            "known": torch.tensor([known_ids(c)[0] for c in chunks]),
            "source": torch.tensor([self.graphs.chosen.source(seq) for seq in seqs]),
            "positions": torch.tensor([c.start for c in chunks]),
            "slot_mapping": plan.slot_mapping,
            "seq_lens": plan.seq_lens,
            "first_block": plan.first_block,
            "block_table": plan.block_table,
            "temperature": temperature,
            "seed": seed,
            "place": place,
        }
        for name, value in own.items():
            at[name][: len(value)].copy_(value)
        return len(plan.block_table)

    def _fill_segments(self, segments: Rows[Segment], active: ActiveSet | None) -> None:
        """Who uses which adapter, and what of it is to be routed."""
        at, graphs = self.fields.on_host, self.graphs
        rows = core_rows(segments, active, graphs.sizes[-1]) if active else []
        spans = [(s.first, s.end, active.index[s.adapter]) for s in segments] if active else []
        at["tiles"].copy_(Segments.build(spans, self.rows, graphs.table.capacity, CPU, rows, self.rows).tiles)
        at["records"].zero_()
        parts = [routed.parts if active and (routed := active.folded[s.adapter].routed) else None for s in segments]
        self._routed = [(s, part.t) for s, part in enumerate(parts) if part is not None]
        if not self._routed:
            return
        own = [segments[s] for s, _ in self._routed]
        for part in own:
            part.ids = self.ids[part.first : part.end]
        plan = route_plan([p for p in parts if p is not None], [rows[s] for s, _ in self._routed], own, CPU)
        for name in ("records", "groups", "weights"):
            value = getattr(plan, name)
            at[name][tuple(map(slice, value.shape))].copy_(value)

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
        graphs, on, ops = self.graphs, self.fields.on_device, self.graphs.model.ops
        earlier = graphs.chosen.tokens.index_select(0, on["source"].clamp(min=0))
        self.ids.copy_(torch.where(on["source"] >= 0, earlier, on["known"]))
        if self.plan is not None:
            ops.route_ids(self.plan)
            ops.core(self.plan, graphs.cores)
        hidden = graphs.model.forward(self.ids, on["positions"], None, self.attention, graphs.caches, self.delta)
        self.logits.copy_(graphs.model.weights.head(hidden))
        self.tokens.copy_(ops.sample(self.logits, on["temperature"], on["seed"], on["place"]))

    def _rehearse(self) -> None:
        """A step of the empty batch, which leaves no trace: it writes no keys, and the tokens that the last step chose,
        which the next one may start from, are put back."""
        chosen = self.graphs.chosen.tokens
        kept = chosen.clone()
        self._step()
        chosen.copy_(kept)

    def _capture(self) -> None:
        if self.graphs.device.type != "cuda":
            return
        # Once without: kernels are compiled and their counters made. Not on a stream of its own: cuBLAS would keep a
        # workspace for each.
        self._rehearse()
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may be loading an adapter meanwhile: its calls are none of this capture's.
        with torch.cuda.graph(self._graph, pool=self.graphs.pool, capture_error_mode="thread_local"):
            self._step()
        logger.info("captured a graph of %d rows, adapters at %d sites of a layer", self.rows, len(self.kinds))
