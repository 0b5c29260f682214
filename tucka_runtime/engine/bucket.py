"""One decoding step as a CUDA graph.

What a step reads lies at fixed places: a bucket's own tables, written by one copy per step, and the slots of the loaded
adapters (SlotTable). So adapters, ranks, routes, blocks and lengths change while a captured graph stays good. A
graph does everything from token ids to chosen tokens. Where nothing can be captured (Triton's interpreter) the same
launches run one by one, over the same tables.
"""

import contextlib
import logging
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import AdapterDelta
from tucka_runtime.engine.adapters.segment import Routes, Segment, core_rows, route_plan, write_members
from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.engine.batch import Chosen, known_ids, segment
from tucka_runtime.engine.decoder import Decoder
from tucka_runtime.engine.graph_shape import GraphShape
from tucka_runtime.engine.sampler import draws
from tucka_runtime.engine.scheduler import ScheduledChunk
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import COLUMNS, RouteLimits, RoutePlan
from tucka_runtime.kernels.tables.segments import Segments
from tucka_runtime.kernels.tables.transfer import pack, view

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Shared:
    """What all buckets have in common. Logits are everybody's: each is read before the next graph runs."""

    model: Decoder
    caches: list[tuple[Tensor, Tensor]]
    table: SlotTable
    chosen: Chosen
    max_seqs: int
    max_len: int
    block_size: int
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

    def __init__(self, shared: Shared, shape: GraphShape):
        self.shared, self.shape, self.rows = shared, shape, shape.rows
        self.cores = shared.cores(shape.limits.core_rank)
        self.fields = self._make_fields()
        self.ids = torch.zeros(self.rows, dtype=torch.int64, device=shared.device)
        self.tokens = shared.chosen.tokens[: self.rows]
        self.logits = shared.logits[: self.rows]
        self.attention = self._attention()
        self.plan = self._route_plan() if shape.kinds else None
        self.delta = self._adapter_delta() if shape.kinds else AdapterDelta(self.rows, shared.model.ops)
        self._routed: list[tuple[int, int]] = []
        self.fill([], None)
        self._graph = capture(shared, self._step)
        if self._graph is not None:
            logger.info("captured a graph of %d rows, adapters at %d sites of a layer", self.rows, len(shape.kinds))

    def _make_fields(self) -> Fields:
        """All that varies from step to step."""
        rows, shared = self.rows, self.shared
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
                "row_cores": (i32, (rows,)),
                "records": (i64, (rows, COLUMNS)),
                "groups": (i64, (rows,)),
                "weights": (f32, (rows, self.shape.limits.t)),
                "block_table": (i32, (rows * -(-shared.max_len // shared.block_size),)),
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
            block_table=on["block_table"],
            first_block=on["first_block"],
            singles=torch.arange(self.rows, dtype=i32, device=shared.device),
            tiles=torch.empty(0, 2, dtype=i32, device=shared.device),
        )

    def _route_plan(self) -> RoutePlan:
        on, limits, table = self.fields.on_device, self.shape.limits, self.shared.table
        most = RouteLimits(limits.k, limits.t, table.arch.num_linears, limits.core_rank, self.rows)
        return RoutePlan((), (), (), most, on["records"], on["groups"], on["weights"])

    def _adapter_delta(self) -> AdapterDelta:
        """Every row a segment of its own, at the sites of `kinds`."""
        shared, rows, table, limits = self.shared, self.rows, self.shared.table, self.shape.limits
        sites = {at: site for at, site in table.sites(self.shape.affine).items() if at[1] in self.shape.kinds}
        active = ActiveSet({}, {}, table.capacity, sites, table.arch, limits.core_rank, limits.rank)
        on = self.fields.on_device
        segments = Segments.build((), rows, table.capacity, CPU, num_tiles=rows)
        segments = replace(segments, tiles=on["tiles"], row_cores=on["row_cores"])
        return AdapterDelta(rows, shared.model.ops, active, segments, cores=self.cores, side=shared.side)

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
            "source": torch.tensor([self.shared.chosen.source(seq) for seq in seqs]),
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
        at, shared = self.fields.on_host, self.shared
        rows = core_rows(segments, active, shared.max_seqs) if active else []
        spans = [(s.first, s.end, active.index[s.adapter]) for s in segments] if active else []
        built = Segments.build(spans, self.rows, shared.table.capacity, CPU, rows, self.rows)
        at["tiles"].copy_(built.tiles)
        at["row_cores"].copy_(built.row_cores)
        at["records"].zero_()
        if active:
            write_members(segments, rows, active, self.cores)
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
        shared, on, ops = self.shared, self.fields.on_device, self.shared.model.ops
        earlier = shared.chosen.tokens.index_select(0, on["source"].clamp(min=0))
        self.ids.copy_(torch.where(on["source"] >= 0, earlier, on["known"]))
        if self.plan is not None:
            ops.route_ids(self.plan)
            ops.core(self.plan, self.cores)
        hidden = shared.model.forward(self.ids, on["positions"], None, self.attention, shared.caches, self.delta)
        self.logits.copy_(shared.model.weights.head(hidden))
        self.tokens.copy_(ops.sample(self.logits, on["temperature"], on["seed"], on["place"]))


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
