"""The delta's reference kernels against float64: shrink, core, expand, and what is fused with the expand."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import delta_cases
from tests.support.route_cases import routed
from tucka_runtime.kernels.reference.core import core
from tucka_runtime.kernels.reference.expand import expand
from tucka_runtime.kernels.reference.expand_qkv_rope_kv import expand_qkv_rope_kv
from tucka_runtime.kernels.reference.expand_residual import expand_residual
from tucka_runtime.kernels.reference.expand_swiglu import expand_swiglu
from tucka_runtime.kernels.reference.shrink_core import shrink_core
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan

LIMIT = 1e-5


def by_segment(plan: SitePlan) -> SitePlan:
    return dataclasses.replace(plan, dense=False)


def check(case: delta_cases.Case) -> None:
    """Both paths of shrink_core and expand against the oracle, the delta alone and with what it is added to."""
    h_true, delta_true = case.oracle()
    for plan in {id(case.plan): case.plan, 0: by_segment(case.plan)}.values():
        low_rank = shrink_core(case.x, case.site, case.cores, plan)
        assert delta_cases.relative(low_rank.h, h_true) <= LIMIT
        assert not low_rank.h.cpu()[~case.adapted()].any()
        zeros = torch.zeros_like(case.y)
        assert delta_cases.relative(expand(zeros.clone(), low_rank), case.oracle(zeros)[1]) <= LIMIT
        y = expand(case.y.clone(), low_rank)
        assert delta_cases.relative(y, case.y.double() + delta_true) <= LIMIT
        base = case.plan.segments.spans[0][0] if case.plan.segments.spans else len(case.y)
        assert torch.equal(y[:base], case.y[:base])


@pytest.mark.parametrize("name", delta_cases.MIXES)
def test_every_mix(name: str) -> None:
    check(delta_cases.mix(name))


def test_more_rows_than_the_dense_path_takes() -> None:
    case = delta_cases.make([[8, 8], [4, 16]], (3, ((2000, 0), (5, 1))), core_size=16)
    assert case.plan.gather is None
    check(case)


def test_dense_path_is_taken_for_few_rows_of_several_segments() -> None:
    assert delta_cases.mix("half-base").plan.gather is not None
    assert delta_cases.mix("all-one").plan.gather is None


layouts = st.tuples(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=6).map(tuple),
).filter(lambda layout: layout[0] + len(layout[1]) > 0)
ranks = st.lists(st.lists(st.sampled_from([0, 1, 4, 6, 8, 16]), min_size=2, max_size=2), min_size=4, max_size=4).filter(
    lambda table: any(any(row) for row in table)
)


@settings(max_examples=60, deadline=None)
@given(layout=layouts, table=ranks, core_size=st.sampled_from([None, 16]), seed=st.integers(0, 9))
def test_any_layout(layout: delta_cases.Layout, table: list[list[int]], core_size: int | None, seed: int) -> None:
    check(delta_cases.make(table, layout, d_in=24, core_size=core_size, seed=seed))


@pytest.mark.parametrize(
    ("k", "t", "p", "r"), [(1, 1, 1, 4), (3, 2, 2, 8), (4, 16, 3, 6), (64, 1, 1, 4), (1, 64, 2, 4)]
)
def test_core(k: int, t: int, p: int, r: int) -> None:
    """Segments of adapters of two shapes, one adapter twice under different routes."""
    adapters = [routed(k, t, 1, 3, p, r), routed(k, t, 1, 3, p, r), routed(2, 2, 1, 2, 1, r + 1)]
    member, rows = [1, 0, 1, 2], [2, 0, 3, 1]
    known = [
        (k - 1, torch.rand(t).tolist()),
        (0, torch.rand(t).tolist()),
        (0, torch.rand(t).tolist()),
        (1, [0.5, 0.25]),
    ]
    plan = RoutePlan.build([adapters[a] for a in member], rows, [None] * 4, known, torch.get_default_device())
    out = torch.full((5, 5, r + 2, r + 2), 7.0)
    core(plan, out)
    untouched = torch.ones_like(out, dtype=torch.bool)
    for a, row, (group, weights) in zip(member, rows, known, strict=True):
        own, w = adapters[a], torch.tensor(weights, dtype=torch.float64)
        for m, slot in enumerate(own.linears.tolist()):
            want = torch.einsum("i,ij,jab->ab", w, own.c[m].double(), own.g[m, group].double())
            assert delta_cases.relative(out[row, slot, : own.rank, : own.rank], want) <= LIMIT
            untouched[row, slot, : own.rank, : own.rank] = False
    assert (out[untouched] == 7).all()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotation of the pairs (x_i, x_{i+D/2}) as complex numbers."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("name", [None, "half-base", "absent-targets", "all-one", "scaled"])
def test_expand_qkv_rope_kv(name: str | None, normed: bool, rope: bool) -> None:
    heads, kv_heads, d, slots, eps = 4, 2, 8, 30, 1e-5
    widths = (heads * d, kv_heads * d, kv_heads * d)
    if name is None:
        y, delta, low_rank = torch.randn(6, sum(widths)), torch.zeros(6, sum(widths)), None
    else:
        mix = delta_cases.MIXES[name]
        case = mix.make([[*r, r[0]] for r in mix.ranks], widths=widths)
        y, delta = case.y, case.oracle()[1]
        low_rank = shrink_core(case.x, case.site, case.cores, case.plan)
    rows = len(y)
    angle = torch.rand(rows, 1, d // 2) * 6
    norms = (torch.rand(d) + 0.5, torch.rand(d) + 0.5) if normed else None
    k_cache, v_cache = torch.full((slots, kv_heads, d), 7.0), torch.full((slots, kv_heads, d), 7.0)
    write = torch.randperm(slots)[:rows]
    packed = (y.double() + delta).view(rows, -1, d)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (
            z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()
            for z, w in zip((q, k), norms, strict=True)
        )
    if rope:
        q, k = (rotated(z, angle.double().cos(), angle.double().sin()) for z in (q, k))
    cos, sin = (angle.cos(), angle.sin()) if rope else (None, None)
    got = expand_qkv_rope_kv(y.clone(), low_rank, cos, sin, norms, eps, k_cache, v_cache, write)
    assert got.shape == (rows, heads, d) and got.is_contiguous()
    assert delta_cases.relative(got, q) <= LIMIT
    assert delta_cases.relative(k_cache[write], k) <= LIMIT
    assert delta_cases.relative(v_cache[write], v) <= LIMIT
    rest = torch.ones(slots, dtype=torch.bool)
    rest[write] = False
    assert (k_cache[rest] == 7).all() and (v_cache[rest] == 7).all()


@pytest.mark.parametrize("name", [None, "half-base", "absent-targets", "all-one", "scaled"])
def test_expand_swiglu(name: str | None) -> None:
    width = 24
    if name is None:
        y, delta, low_rank = torch.randn(6, 2 * width), torch.zeros(6, 2 * width), None
    else:
        case = delta_cases.mix(name, widths=(width, width))
        y, delta = case.y, case.oracle()[1]
        low_rank = shrink_core(case.x, case.site, case.cores, case.plan)
    gate, up = (y.double() + delta).chunk(2, dim=-1)
    got = expand_swiglu(y.clone(), low_rank)
    assert delta_cases.relative(got, gate * torch.sigmoid(gate) * up) <= LIMIT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [None, "half-base", "absent-targets", "all-one", "scaled"])
def test_expand_residual(name: str | None, bias: bool) -> None:
    width, eps = 64, 1e-5
    if name is None:
        y, delta, low_rank = torch.randn(6, width), torch.zeros(6, width), None
    else:
        mix = delta_cases.MIXES[name]
        case = mix.make([r[:1] for r in mix.ranks], widths=(width,))
        y, delta = case.y, case.oracle()[1]
        low_rank = shrink_core(case.x, case.site, case.cores, case.plan)
    residual, weight, shift = torch.randn_like(y), torch.rand(width) + 0.5, torch.randn(width) if bias else None
    total = residual.double() + y.double() + delta
    z = total - total.mean(-1, keepdim=True) if bias else total
    want = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    kept = residual.clone()
    got, new = expand_residual(y.clone(), low_rank, residual, weight, shift, eps)
    assert delta_cases.relative(new, total) <= LIMIT
    assert delta_cases.relative(got, want + shift.double() if shift is not None else want) <= LIMIT
    assert torch.equal(residual, kept)


def test_factors_that_cannot_be_read_through_their_address_are_refused() -> None:
    good = torch.randn(4, 8)
    for u, e, dtype in [
        (good, torch.randn(5, 16), torch.float32),
        (good, torch.randn(4, 15), torch.float32),
        (torch.randn(4, 9), torch.randn(4, 16), torch.float32),
        (torch.randn(8, 4).T, torch.randn(4, 16), torch.float32),
        (good, None, torch.float32),
        (good, torch.randn(4, 16), torch.float16),
    ]:
        with pytest.raises(ValueError, match="a factor must be"):
            DeltaSite.build([[u]], [[e]], (0, 16), 8, dtype, torch.device("cpu"), pool=False)


def test_negative_slots_are_not_written() -> None:
    caches = [torch.full((4, 1, 8), 7.0) for _ in "kv"]
    slots = torch.full((19,), -1)
    slots[3] = 2
    expand_qkv_rope_kv(torch.randn(19, 32), None, None, None, None, 1e-5, caches[0], caches[1], slots)
    for cache in caches:
        assert (cache[[0, 1, 3]] == 7).all() and not (cache[2] == 7).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_that_are_not_stacked_are_multiplied_in_their_type(dtype: torch.dtype) -> None:
    """As on a GPU, where the reference is what the fused kernels are held to."""
    case = delta_cases.mix("half-base", dtype=dtype)
    own = case.site
    site = DeltaSite.build(own.u, own.e, own.columns, own.d_in, dtype, torch.device("cpu"), pool=False)
    case = dataclasses.replace(case, site=site, plan=SitePlan.build(case.plan.segments, site))
    delta_cases.check_delta(case, delta_cases.LIMITS[dtype], shrink_core, expand)
