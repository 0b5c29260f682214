"""A CUDA graph of one batch bucket: adapters, ranks, cores and lengths change after capture, the graph does not.

Everything that varies lies in tensors of fixed shape at fixed addresses; `Bucket.fill` writes a batch into them.
Without a GPU the same kernels run over the same tensors, without a graph between.
"""

import dataclasses
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tests.support import delta_cases
from tucka_runtime.kernels.fused import (
    attention,
    expand,
    expand_qkv_rope_kv,
    expand_residual,
    expand_swiglu,
    launch,
    shrink_core,
)
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.segments import DeltaSite, Segments, SitePlan

ROWS, ADAPTERS, RANK, D_IN, HEADS, KV_HEADS, HEAD, BLOCK, WIDTH, SLOTS = 10, 4, 24, 40, 4, 2, 16, 16, 4, 1024
WIDTHS = (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
D_OUT = 136

# Rank of each adapter; rows of the base; (rows, adapter) of each segment; rows of each sequence, 1 unless said; context
# of each sequence, 0: only fills up.
BATCHES: list[tuple[list[int], int, tuple[tuple[int, int], ...], list[int], list[int]]] = [
    ([8, 16, 4, 24], 2, ((3, 0), (1, 1), (2, 2), (2, 3)), [1] * 10, [5, 17, 60, 1, 2, 33, 64, 16, 15, 40]),
    ([24, 24, 8, 8], 0, ((10, 1),), [1] * 10, [64] * 10),
    ([4, 4, 4, 4], 10, (), [1] * 10, [1] * 10),
    ([16, 0, 8, 0], 5, ((1, 0), (4, 2)), [1] * 10, [9, 8, 7, 6, 5, 4, 3, 2, 0, 0]),
    ([8, 16, 4, 24], 2, ((3, 0), (5, 3)), [1, 4, 1, 3, 1], [5, 20, 60, 3, 0]),
    ([24, 8, 4, 4], 0, ((8, 0), (2, 1)), [8, 2], [64, 2]),
]


def batch(number: int) -> tuple[delta_cases.Case, delta_cases.Case, AttentionMetadata]:
    """The batch at qkv and at o."""
    ranks, base, parts, counts, lengths = BATCHES[number]
    qkv, out = (
        delta_cases.make(table, (base, parts), d_in, widths, core_size=RANK, seed=number, dtype=torch.float32)
        for table, d_in, widths in (
            ([[r, r, r // 2] for r in ranks], D_IN, WIDTHS),
            ([[r] for r in ranks], WIDTHS[0], (D_OUT,)),
        )
    )
    tables = [[(7 * i + j) % (SLOTS // BLOCK) for j in range(WIDTH)] for i in range(len(counts))]
    first_rows = [0, *accumulate(counts)]
    spans = [(*span, max(length, 1)) for *span, length in zip(first_rows, counts, lengths, strict=False)]
    plan = AttentionMetadata.build(spans, tables, BLOCK, qkv.x.device)
    for i, length in enumerate(lengths):
        if not length:
            plan.seq_lens[i], plan.slot_mapping[first_rows[i]] = 0, -1
    return qkv, out, plan


@dataclasses.dataclass(frozen=True)
class SiteInputs:
    """What a step reads of a site: x is not there at o, where it is what attention returns."""

    y: Tensor
    site: DeltaSite
    plan: SitePlan
    cores: Tensor

    @staticmethod
    def of(case: delta_cases.Case) -> "SiteInputs":
        assert case.cores is not None
        return SiteInputs(case.y, case.site, case.plan, case.cores)

    @staticmethod
    def fixed(case: delta_cases.Case, segments: Segments) -> "SiteInputs":
        site = dataclasses.replace(
            case.site,
            u_ptr=torch.zeros_like(case.site.u_ptr),
            e_ptr=torch.zeros_like(case.site.e_ptr),
            rank=torch.zeros_like(case.site.rank),
        )
        cores = torch.zeros(ROWS, len(case.site.columns) - 1, RANK, RANK)
        return SiteInputs(torch.zeros_like(case.y), site, SitePlan.build(segments, case.site, max_rank=RANK), cores)

    def fill(self, case: delta_cases.Case) -> None:
        self.y.copy_(case.y)
        assert case.cores is not None
        self.cores[: len(case.cores)].copy_(case.cores)
        for name in ("u_ptr", "e_ptr", "rank"):
            getattr(self.site, name).copy_(getattr(case.site, name))


class Bucket:
    """Fixed tensors for any batch of ROWS rows, ADAPTERS adapters and ranks up to RANK; with `prompts` sequences may
    have several rows, and one of no rows, the last, fills up their tables."""

    def __init__(self, prompts: bool) -> None:
        self.prompts = prompts
        qkv, out, metadata = batch(0)
        self.segments = Segments.build([], ROWS, ADAPTERS, qkv.x.device, num_tiles=ROWS)
        self.x = torch.zeros_like(qkv.x)
        self.qkv, self.out = SiteInputs.fixed(qkv, self.segments), SiteInputs.fixed(out, self.segments)
        self.residual = torch.zeros(ROWS, D_OUT)
        self.caches = [torch.zeros(SLOTS, KV_HEADS, HEAD) for _ in "kv"]
        self.metadata = dataclasses.replace(
            metadata, block_table=torch.zeros(ROWS * WIDTH, dtype=torch.int32), longest=WIDTH * BLOCK
        )
        if prompts:
            sizes = {"query_start": ROWS + 2, "seq_lens": ROWS + 1, "first_block": ROWS + 1, "singles": ROWS}
            empty = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
            self.metadata = dataclasses.replace(self.metadata, **empty, tiles=torch.zeros(3, 2, dtype=torch.int32))

    def fill(self, qkv: delta_cases.Case, out: delta_cases.Case, metadata: AttentionMetadata) -> None:
        spans = qkv.plan.segments.spans
        segments = Segments.build(spans, ROWS, ADAPTERS, qkv.x.device, num_tiles=ROWS)
        self.segments.tiles.copy_(segments.tiles)
        self.segments.row_cores.copy_(segments.row_cores)
        self.x.copy_(qkv.x)
        self.qkv.fill(qkv)
        self.out.fill(out)
        names = ["seq_lens", "slot_mapping", "first_block", "block_table"]
        if self.prompts:
            names += ["query_start", "singles", "tiles"]
            self.metadata.seq_lens.zero_()
            self.metadata.query_start.fill_(ROWS)
            self.metadata.singles.fill_(ROWS)
            self.metadata.tiles.copy_(torch.tensor([ROWS, 0]))
        for name in names:
            value = getattr(metadata, name)
            getattr(self.metadata, name)[: len(value)].copy_(value)

    def step(self) -> dict[str, Tensor]:
        return step(self.x, self.qkv, self.out, self.metadata, self.caches, self.residual)


def step(
    x: Tensor, qkv: SiteInputs, out: SiteInputs, metadata: AttentionMetadata, caches: list[Tensor], residual: Tensor
) -> dict[str, Tensor]:
    """Half a layer: what of it is ours."""
    low_rank = shrink_core.shrink_core(x, qkv.site, qkv.cores, qkv.plan)
    q = expand_qkv_rope_kv.expand_qkv_rope_kv(
        qkv.y, low_rank, None, None, None, 1e-5, caches[0], caches[1], metadata.slot_mapping
    )
    attended = attention.attention(q, *caches, metadata, 0.25).flatten(1)
    weight = torch.ones(D_OUT, device=x.device)
    inner = shrink_core.shrink_core(attended, out.site, out.cores, out.plan)
    found = {"q": q, "attended": attended, "out": expand.expand(qkv.y.clone(), low_rank)}
    for name, (normed, total) in {
        "base": expand_residual.expand_residual(out.y, None, residual, weight, None, 1e-5),
        "adapted": expand_residual.expand_residual(out.y, inner, residual, weight, None, 1e-5),
        "centred": expand_residual.expand_residual(out.y, inner, residual, weight, weight, 1e-5),
    }.items():
        found |= {f"{name} normed": normed, f"{name} total": total}
    return found


def check(run: Callable[[], dict[str, Tensor]], bucket: Bucket, number: int) -> None:
    """What `run` makes of the bucket is what fresh tensors of just the right size make, bit for bit."""
    qkv, out, metadata = batch(number)
    keys = [torch.randn(SLOTS, KV_HEADS, HEAD) for _ in "kv"]
    for cache, value in zip(bucket.caches, keys, strict=True):
        cache.copy_(value)
    bucket.residual.normal_()
    bucket.fill(qkv, out, metadata)
    got = run()
    fresh = [value.clone() for value in keys]
    want = step(qkv.x, SiteInputs.of(qkv), SiteInputs.of(out), metadata, fresh, bucket.residual)
    real = metadata.slot_mapping >= 0
    for name, value in got.items():
        assert torch.equal(value[real], want[name][real]), name
    for mine, true in zip(bucket.caches, fresh, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("number", "prompts"), [*((n, False) for n in range(4)), *((n, True) for n in range(len(BATCHES)))]
)
def test_fixed_shapes_change_nothing(number: int, prompts: bool) -> None:
    bucket = Bucket(prompts)
    check(bucket.step, bucket, number)


@pytest.mark.interpreted
def test_programs_that_take_turns_find_what_others_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at the tiles to come is read ahead: one program of qkv has all ten here, and two of the sum five each.
    SwiGLU's, whose site a step above has not, take as many."""
    monkeypatch.setattr(launch, "INTERPRETED", 8)
    bucket = Bucket(True)
    check(bucket.step, bucket, 0)
    ranks, base, parts, *_ = BATCHES[0]
    case = delta_cases.make(
        [[r, r // 2] for r in ranks], (base, parts), D_IN, (200, 200), core_size=RANK, seed=0, dtype=torch.float32
    )
    segments = Segments.build(case.plan.segments.spans, ROWS, ADAPTERS, case.x.device, num_tiles=ROWS)
    found = [
        expand_swiglu.run(case.y, shrink_core.shrink_core(case.x, case.site, case.cores, plan), 64)
        for plan in (case.plan, SitePlan.build(segments, case.site, max_rank=case.plan.max_rank))
    ]
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [False, True])
def test_replay_equals_eager(prompts: bool) -> None:
    """One capture, then every batch by replay alone."""
    torch.set_default_device("cuda")
    try:
        bucket = Bucket(prompts)
        bucket.fill(*batch(0))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            bucket.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = bucket.step()

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return out

        for number in (0, 1, 2, 3, 1, *((4, 5, 4) if prompts else ()), 0):
            check(replay, bucket, number)
    finally:
        torch.set_default_device("cpu")
