"""The delta's fused kernels against the reference ones and float64, every fresh buffer full of NaN."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import delta_cases
from tests.support.delta_cases import LIMITS, retiled, surrounded
from tests.support.route_cases import routed
from tucka_runtime.kernels.fused import (
    core,
    expand,
    expand_qkv_rope_kv,
    expand_residual,
    expand_swiglu,
    norm,
    shrink_core,
)
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.reference import core as core_ref
from tucka_runtime.kernels.reference import expand_qkv_rope_kv as qkv_ref
from tucka_runtime.kernels.reference import expand_residual as residual_ref
from tucka_runtime.kernels.reference import expand_swiglu as swiglu_ref
from tucka_runtime.kernels.reference import norm as norm_ref
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan, Slices
from tucka_runtime.kernels.tables.segments import Segments, SitePlan

pytestmark = pytest.mark.usefixtures("poisoned")


def check_delta(case: delta_cases.Case, limit: float, shrink: Callable[..., LowRank] = shrink_core.shrink_core) -> None:
    h_true, delta_true = case.oracle()
    low_rank = shrink(case.x, case.site, case.cores, case.plan)
    own = case.adapted()
    assert delta_cases.relative(low_rank.h[own], h_true[own]) <= limit
    # From exactly the factors' product on: on zeros the delta itself is seen, on y that nothing else is touched.
    delta = expand.expand(torch.zeros_like(case.y), low_rank)
    assert delta_cases.relative(delta, delta_true) <= limit
    y = expand.expand(case.y.clone(), low_rank)
    assert delta_cases.relative(y, case.y.double() + delta_true) <= limit
    untouched = delta_true == 0
    assert torch.equal(y[untouched], case.y[untouched])


@pytest.mark.parametrize("name", delta_cases.MIXES)
def test_every_mix(name: str, dtype: torch.dtype) -> None:
    check_delta(delta_cases.mix(name, dtype=dtype), LIMITS[dtype])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("name", ["half-base", "absent-targets", "odd-ranks"])
def test_sums_over_many_spans(name: str, one_launch: bool) -> None:
    how = shrink_core.Config(block_k=16, span=32, chunks=1, one_launch=one_launch, warps=4, stages=3)
    case = delta_cases.mix(name, d_in=77)
    check_delta(case, 1e-5, lambda *args: shrink_core.run(*args, how))


SHIPPED = {
    (how.block_k, how.span, how.chunks, how.one_launch): how
    for rows in (1, 257, 1025, 5000)
    for d_in in (64, 4096)
    for rank in (8, 64)
    for how in [shrink_core.config(rows, d_in, rank)]
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("how", SHIPPED.values(), ids=[str(key) for key in SHIPPED])
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_every_shipped_shrink_with_nan_around_its_rows(how: shrink_core.Config, tile_rows: int) -> None:
    """x, the factors and the cores lie in larger buffers that are NaN elsewhere: what is masked is never read."""
    case = surrounded("absent-targets", d_in=600 if how.span <= 512 else 72)
    case = dataclasses.replace(case, plan=retiled(case.plan, tile_rows))
    check_delta(case, 1e-5, lambda *args: shrink_core.run(*args, how))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("block_n", [32, 64, 128, 256])
def test_every_expand_block_with_nan_around_its_rows(block_n: int, tile_rows: int) -> None:
    case = surrounded("one-adapter-twice", widths=(136, 40))
    plan = retiled(case.plan, tile_rows)
    h_true, delta_true = case.oracle()
    h = torch.where(case.adapted(), h_true.float(), torch.nan)
    y = expand.run(case.y.clone(), LowRank(h, case.site, plan), block_n)
    assert delta_cases.relative(y - case.y, delta_true) <= 1e-5


@pytest.mark.usefixtures("device")
def test_repeats_agree_bit_for_bit() -> None:
    how = shrink_core.Config(block_k=16, span=32, chunks=1, one_launch=True, warps=4, stages=3)
    case = delta_cases.mix("half-base", d_in=77)
    runs = [shrink_core.run(case.x, case.site, case.cores, case.plan, how).h[case.adapted()] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.usefixtures("device")
def test_a_row_does_not_depend_on_the_others() -> None:
    """Alone or among others, a segment's h is the same bits."""
    case = delta_cases.mix("half-base", d_in=600)
    h = shrink_core.shrink_core(case.x, case.site, case.cores, case.plan).h
    spans = case.plan.segments.spans
    for s, (first, end, a) in enumerate(spans):
        segments = Segments.build([(0, end - first, a)], end - first, 2, case.x.device)
        plan = SitePlan.build(segments, case.site)
        assert case.cores is not None
        alone = shrink_core.shrink_core(case.x[first:end], case.site, case.cores[s : s + 1], plan).h
        own = case.adapted()[first:end]
        assert torch.equal(alone[own], h[first:end][own])


layouts = st.tuples(
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(1, 18), st.integers(0, 2)), max_size=4).map(tuple),
).filter(lambda layout: layout[0] + len(layout[1]) > 0)
ranks = st.lists(st.lists(st.sampled_from([0, 1, 6, 8, 17]), min_size=2, max_size=2), min_size=3, max_size=3).filter(
    lambda table: any(any(row) for row in table)
)


@pytest.mark.usefixtures("device")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts, table=ranks, core_size=st.sampled_from([None, 17]), seed=st.integers(0, 9))
def test_any_layout(layout: delta_cases.Layout, table: list[list[int]], core_size: int | None, seed: int) -> None:
    check_delta(delta_cases.make(table, layout, d_in=24, core_size=core_size, seed=seed), 1e-5)


def test_fixed_number_of_tiles() -> None:
    spans = [(2, 4, 0), (4, 5, 1)]
    segments = Segments.build(spans, 5, 2, torch.get_default_device(), num_tiles=5)
    assert segments.tiles.tolist() == [[0, 2, -1, -1], [2, 4, 0, 0], [4, 5, 1, 1], [0, 0, -1, -1], [0, 0, -1, -1]]
    with pytest.raises(ValueError, match="3 tiles are needed"):
        Segments.build(spans, 5, 2, torch.get_default_device(), num_tiles=2)


@pytest.mark.parametrize("rows", [SMALL := 200, 300])
def test_tiles_cover_every_row_once(rows: int) -> None:
    spans = [(7, 40, 0), (40, 41, 1), (41, rows, 0)]
    segments = Segments.build(spans, rows, 2, torch.get_default_device())
    assert segments.tile_rows == (16 if rows == SMALL else 64)
    seen = [i for first, end, _, _ in segments.tiles.tolist() for i in range(first, end)]
    assert seen == list(range(rows))


# What is fused with the expand. Names of mixes, and None: no adapter in the batch.
SOME = [None, "base-only-but-loaded", "half-base", "absent-targets", "lora-larger-than-core", "one-segment-over-a-tile"]
Parts = tuple[Tensor, LowRank | None]


def parts(name: str | None, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[Parts, Parts]:
    """y and the low-rank half of a mix for the fused op, and the same in float64 for the reference."""
    if name is None:
        y = torch.randn(19, sum(widths)).to(dtype)
        return (y, None), (y.double(), None)
    table, layout, core_size, lora = delta_cases.MIXES[name]
    shaped = [[row[min(j, 1)] for j in range(len(widths))] for row in table]
    case = delta_cases.make(shaped, layout, widths=widths, core_size=core_size, lora=lora, dtype=dtype)
    low_rank = shrink_core.shrink_core(case.x, case.site, case.cores, case.plan)
    _, delta = case.oracle()
    return (case.y, low_rank), (case.y.double() + delta, None)


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 8), (3, 1, 34)])
@pytest.mark.parametrize("name", SOME)
def test_expand_qkv_rope_kv(name: str | None, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    fused, exact = parts(name, (heads * d, kv_heads * d, kv_heads * d), dtype)
    check_qkv(fused, exact, heads, kv_heads, d, dtype, rope=True, normed=None)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("normed", [None, "shared", "per row"])
def test_expand_qkv_rope_kv_options(rope: bool, normed: str | None) -> None:
    fused, exact = parts("half-base", (32, 16, 16), torch.float32)
    check_qkv(fused, exact, 4, 2, 8, torch.float32, rope, normed)


@pytest.mark.usefixtures("device")
def test_expand_qkv_rope_kv_with_one_packed_target() -> None:
    fused, exact = parts("all-distinct", (64,), torch.float32)
    check_qkv(fused, exact, 4, 2, 8, torch.float32, rope=False, normed=None)


def check_qkv(
    fused: Parts, exact: Parts, heads: int, kv_heads: int, d: int, dtype: torch.dtype, rope: bool, normed: str | None
) -> None:
    rows, slots = len(fused[0]), 40
    angle = torch.rand(rows, 1, d // 2) * 6
    cos, sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if rope else (None, None)
    norms = None
    if normed:
        norms = tuple((torch.rand((rows, 1, d) if normed == "per row" else (d,)) + 0.5).to(dtype) for _ in "qk")
    write = torch.randperm(slots)[:rows]
    caches = [torch.full((slots, kv_heads, d), 7.0, dtype=dtype) for _ in "kv"]
    got = expand_qkv_rope_kv.expand_qkv_rope_kv(*fused, cos, sin, norms, 1e-5, *caches, write)
    wide = [torch.full((slots, kv_heads, d), 7.0, dtype=torch.float64) for _ in "kv"]
    cos64, sin64 = (cos.double(), sin.double()) if cos is not None and sin is not None else (None, None)
    norms64 = tuple(w.double() for w in norms) if norms else None
    want = qkv_ref.expand_qkv_rope_kv(*exact, cos64, sin64, norms64, 1e-5, *wide, write)
    assert delta_cases.relative(got, want) <= LIMITS[dtype]
    for mine, true in zip(caches, wide, strict=True):
        assert delta_cases.relative(mine, true) <= LIMITS[dtype]
        rest = torch.ones(slots, dtype=torch.bool)
        rest[write] = False
        assert (mine[rest] == 7).all()


@pytest.mark.usefixtures("device")
def test_negative_slots_are_not_written() -> None:
    fused, _ = parts(None, (16, 8, 8), torch.float32)
    caches = [torch.full((4, 1, 8), 7.0) for _ in "kv"]
    slots = torch.full((19,), -1)
    slots[3] = 2
    expand_qkv_rope_kv.expand_qkv_rope_kv(*fused, None, None, None, 1e-5, *caches, slots)
    for cache in caches:
        assert (cache[[0, 1, 3]] == 7).all() and not (cache[2] == 7).any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_expand_swiglu(name: str | None, packed: bool, dtype: torch.dtype) -> None:
    fused, exact = parts(name, (152,) if packed else (76, 76), dtype)
    got = expand_swiglu.expand_swiglu(*fused)
    assert delta_cases.relative(got, swiglu_ref.expand_swiglu(*exact)) <= LIMITS[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_expand_residual(name: str | None, bias: bool, dtype: torch.dtype) -> None:
    fused, exact = parts(name, (72,), dtype)
    residual, weight = torch.randn_like(fused[0]), (torch.rand(72) + 0.5).to(dtype)
    shift = torch.randn(72).to(dtype) if bias else None
    kept = residual.clone()
    got = expand_residual.expand_residual(*fused, residual, weight, shift, 1e-5)
    wide = None if shift is None else shift.double()
    want = residual_ref.expand_residual(*exact, residual.double(), weight.double(), wide, 1e-5)
    for mine, true in zip(got, want, strict=True):
        assert delta_cases.relative(mine, true) <= LIMITS[dtype]
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("shape", [(5, 33), (3, 4, 16), (1, 600), (0, 8)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = ((torch.randn(s) * 2).to(dtype) for s in (shape, shape[-1:], shape[-1:]))
    wide = x.double(), weight.double()
    for got, want in (
        (norm.rms_norm(x, weight, 1e-6), norm_ref.rms_norm(*wide, 1e-6)),
        (norm.norm(x, weight, bias, 1e-6), norm_ref.norm(*wide, bias.double(), 1e-6)),
    ):
        assert got.shape == shape and delta_cases.relative(got, want) <= LIMITS[dtype]


@pytest.mark.usefixtures("device")
def test_norm_of_a_slice() -> None:
    x, weight = torch.randn(6, 5, 16)[:, 1:3], torch.rand(16)
    assert delta_cases.relative(norm.norm(x, weight, None, 1e-6), norm_ref.norm(x, weight, None, 1e-6)) <= 1e-5


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("k", "t", "p", "r"), [(1, 1, 1, 4), (3, 2, 2, 8), (4, 16, 3, 6), (64, 1, 1, 4), (2, 3, 2, 40)]
)
def test_core(k: int, t: int, p: int, r: int) -> None:
    adapters = [routed(k, t, 1, 3, p, r), routed(k, t, 1, 3, p, r), routed(2, 2, 1, 2, 1, r + 1)]
    known = [(k - 1, torch.rand(t).tolist()), (0, torch.rand(t).tolist()), (1, [0.5, 0.25])]
    plan = RoutePlan.build(adapters, [2, 0, 3], [None] * 3, known, torch.get_default_device())
    got, want = (torch.full((4, 5, r + 2, r + 2), 7.0) for _ in range(2))
    core.core(plan, got)
    core_ref.core(plan, want)
    assert delta_cases.relative(got, want) <= 1e-5
    assert torch.equal(got == 7, want == 7)


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("p", [1, 3])
def test_cores_combined_by_the_shrink(one_launch: bool, p: int, dtype: torch.dtype) -> None:
    """Segments of other adapters (their p as well) in another order, a LoRA among them, and the same h either way."""
    table = [[8, 8], [6, 6], [24, 24], [20, 20]]
    case = delta_cases.make(table, (2, ((1, 2), (3, 0), (18, 1), (2, 3), (1, 0))), d_in=77, core_size=24, dtype=dtype)
    routes = [(2, 24, p), (0, 8, 2), (1, 6, p), None, (0, 8, 2)]  # group, rank, p; None: the LoRA
    device = torch.get_default_device()
    own = [s for s, route in enumerate(routes) if route]
    adapters = [
        CoreParts(torch.randn(2, 3, p) / 3, torch.randn(2, 4, p, r, r) / r**0.5, torch.tensor([1, 2]), None)
        for _, r, p in filter(None, routes)
    ]
    known = [(group, torch.rand(3).tolist()) for group, _, _ in filter(None, routes)]
    plan = RoutePlan.build(adapters, own, [None] * len(own), known, device)
    cores = torch.full((len(routes), 4, 24, 24), torch.nan, dtype=dtype)  # of which the site has numbers 1 and 2
    cores[3] = torch.eye(24)
    core_ref.core(plan, cores)
    slices = Slices.empty(len(routes), 4, max(p, 2), device)
    core.slices(plan, slices)
    how = shrink_core.Config(block_k=16, span=32, chunks=1, one_launch=one_launch, warps=4, stages=3)
    case = dataclasses.replace(case, cores=cores[:, 1:3])
    check_delta(case, LIMITS[dtype], lambda x, site, _, plan: shrink_core.run(x, site, slices.of(1, 3), plan, how))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block_n", [32, 128])
def test_other_blocks_of_what_is_fused(block_n: int) -> None:
    """Not shipped, but what a sweep on a device may choose next."""
    fused, exact = parts("half-base", (160, 160), torch.float32)
    want = swiglu_ref.expand_swiglu(*exact)
    assert delta_cases.relative(expand_swiglu.run(*fused, block_n), want) <= 1e-5
    fused, exact = parts("half-base", (160,), torch.float32)
    y, low_rank = fused
    residual = torch.randn_like(y)
    assert low_rank is not None
    got = expand_residual.add(y, low_rank, residual, block_n)
    assert delta_cases.relative(got, residual.double() + exact[0]) <= 1e-5


@pytest.mark.usefixtures("device")
def test_one_launch_and_two_agree_bit_for_bit() -> None:
    case = delta_cases.mix("absent-targets", d_in=77)
    first, second = (
        shrink_core.run(case.x, case.site, case.cores, case.plan, how).h[case.adapted()]
        for how in (shrink_core.Config(16, 32, 1, one, 4, 3) for one in (True, False))
    )
    assert torch.equal(first, second)
