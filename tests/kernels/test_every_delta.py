"""The delta, and what is fused with it, on every backend by address against float64; fresh buffers full of NaN."""

import pytest
import torch

from tests.support import delta_cases
from tests.support.delta_cases import LIMITS, Parts, check_delta, parts, surrounded
from tests.support.route_cases import routed
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference import core as core_ref
from tucka_runtime.kernels.reference import expand_qkv_rope_kv as qkv_ref
from tucka_runtime.kernels.reference import expand_residual as residual_ref
from tucka_runtime.kernels.reference import expand_swiglu as swiglu_ref
from tucka_runtime.kernels.reference import norm as norm_ref
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.kernels.tables.segments import Segments, SitePlan

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", delta_cases.MIXES)
def test_every_mix(name: str, any_type: tuple[Ops, torch.dtype]) -> None:
    ops, dtype = any_type
    check_delta(delta_cases.mix(name, dtype=dtype), LIMITS[dtype], ops.shrink_core, ops.expand)


def test_factors_and_rows_in_a_sea_of_nan(ops: Ops) -> None:
    """x, the factors and the cores lie in larger buffers that are NaN elsewhere: what is masked is never read."""
    for name in ("absent-targets", "odd-ranks", "one-adapter-twice", "scaled"):
        check_delta(surrounded(name, d_in=77, widths=(136, 40)), 1e-5, ops.shrink_core, ops.expand)


def test_a_row_does_not_depend_on_the_others(ops: Ops) -> None:
    """Alone or among others, a segment's h is the same bits."""
    case = delta_cases.mix("half-base", d_in=600)
    h = ops.shrink_core(case.x, case.site, case.cores, case.plan).h
    spans = case.plan.segments.spans
    for s, (first, end, a) in enumerate(spans):
        segments = Segments.build([(0, end - first, a)], end - first, 2, case.x.device)
        plan = SitePlan.build(segments, case.site)
        assert case.cores is not None
        alone = ops.shrink_core(case.x[first:end], case.site, case.cores[s : s + 1], plan).h
        own = case.adapted()[first:end]
        assert torch.equal(alone[own], h[first:end][own])


# What is fused with the expand. Names of mixes, and None: no adapter in the batch.
SOME = [
    None,
    "base-only-but-loaded",
    "half-base",
    "absent-targets",
    "lora-larger-than-core",
    "one-segment-over-a-tile",
    "scaled",
]


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 8), (3, 1, 34)])
@pytest.mark.parametrize("name", SOME)
def test_expand_qkv_rope_kv(
    name: str | None, heads: int, kv_heads: int, d: int, any_type: tuple[Ops, torch.dtype]
) -> None:
    ops, dtype = any_type
    fused, exact = parts(name, (heads * d, kv_heads * d, kv_heads * d), dtype, ops.shrink_core)
    check_qkv(ops, fused, exact, heads, kv_heads, d, dtype, rope=True, normed=None)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("normed", [None, "shared", "per row"])
def test_expand_qkv_rope_kv_options(rope: bool, normed: str | None, ops: Ops) -> None:
    fused, exact = parts("half-base", (32, 16, 16), torch.float32, ops.shrink_core)
    check_qkv(ops, fused, exact, 4, 2, 8, torch.float32, rope, normed)


def test_expand_qkv_rope_kv_with_one_packed_target(ops: Ops) -> None:
    fused, exact = parts("all-distinct", (64,), torch.float32, ops.shrink_core)
    check_qkv(ops, fused, exact, 4, 2, 8, torch.float32, rope=False, normed=None)


def check_qkv(
    ops: Ops,
    fused: Parts,
    exact: Parts,
    heads: int,
    kv_heads: int,
    d: int,
    dtype: torch.dtype,
    rope: bool,
    normed: str | None,
) -> None:
    rows, slots = len(fused[0]), 40
    angle = torch.rand(rows, 1, d // 2) * 6
    cos, sin = (angle.cos().to(dtype), angle.sin().to(dtype)) if rope else (None, None)
    norms = None
    if normed:
        norms = tuple((torch.rand((rows, 1, d) if normed == "per row" else (d,)) + 0.5).to(dtype) for _ in "qk")
    write = torch.randperm(slots)[:rows]
    caches = [torch.full((slots, kv_heads, d), 7.0, dtype=dtype) for _ in "kv"]
    got = ops.expand_qkv_rope_kv(*fused, cos, sin, norms, 1e-5, *caches, write)
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


def test_negative_slots_are_not_written(ops: Ops) -> None:
    fused, _ = parts(None, (16, 8, 8), torch.float32, ops.shrink_core)
    caches = [torch.full((4, 1, 8), 7.0) for _ in "kv"]
    slots = torch.full((19,), -1)
    slots[3] = 2
    ops.expand_qkv_rope_kv(*fused, None, None, None, 1e-5, *caches, slots)
    for cache in caches:
        assert (cache[[0, 1, 3]] == 7).all() and not (cache[2] == 7).any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_expand_swiglu(name: str | None, packed: bool, any_type: tuple[Ops, torch.dtype]) -> None:
    ops, dtype = any_type
    fused, exact = parts(name, (152,) if packed else (76, 76), dtype, ops.shrink_core)
    got = ops.expand_swiglu(*fused)
    assert delta_cases.relative(got, swiglu_ref.expand_swiglu(*exact)) <= LIMITS[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_expand_residual(name: str | None, bias: bool, any_type: tuple[Ops, torch.dtype]) -> None:
    ops, dtype = any_type
    fused, exact = parts(name, (72,), dtype, ops.shrink_core)
    residual, weight = torch.randn_like(fused[0]), (torch.rand(72) + 0.5).to(dtype)
    shift = torch.randn(72).to(dtype) if bias else None
    kept = residual.clone()
    got = ops.expand_residual(*fused, residual, weight, shift, 1e-5)
    wide = None if shift is None else shift.double()
    want = residual_ref.expand_residual(*exact, residual.double(), weight.double(), wide, 1e-5)
    for mine, true in zip(got, want, strict=True):
        assert delta_cases.relative(mine, true) <= LIMITS[dtype]
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("shape", [(5, 33), (3, 4, 16), (1, 600), (0, 8)])
def test_norm(shape: tuple[int, ...], any_type: tuple[Ops, torch.dtype]) -> None:
    ops, dtype = any_type
    x, weight, bias = ((torch.randn(s) * 2).to(dtype) for s in (shape, shape[-1:], shape[-1:]))
    wide = x.double(), weight.double()
    for got, want in (
        (ops.norm(x, weight, None, 1e-6), norm_ref.rms_norm(*wide, 1e-6)),
        (ops.norm(x, weight, bias, 1e-6), norm_ref.norm(*wide, bias.double(), 1e-6)),
    ):
        assert got.shape == shape and delta_cases.relative(got, want) <= LIMITS[dtype]


def test_norm_of_a_slice(ops: Ops) -> None:
    x, weight = torch.randn(6, 5, 16)[:, 1:3], torch.rand(16)
    assert delta_cases.relative(ops.norm(x, weight, None, 1e-6), norm_ref.norm(x, weight, None, 1e-6)) <= 1e-5


@pytest.mark.parametrize(
    ("k", "t", "p", "r"), [(1, 1, 1, 4), (3, 2, 2, 8), (4, 16, 3, 6), (64, 1, 1, 4), (2, 3, 2, 40)]
)
def test_core(k: int, t: int, p: int, r: int, ops: Ops) -> None:
    adapters = [routed(k, t, 1, 3, p, r), routed(k, t, 1, 3, p, r), routed(2, 2, 1, 2, 1, r + 1)]
    known = [(k - 1, torch.rand(t).tolist()), (0, torch.rand(t).tolist()), (1, [0.5, 0.25])]
    plan = RoutePlan.build(adapters, [2, 0, 3], [None] * 3, known, torch.get_default_device())
    got, want = (torch.full((4, 5, r + 2, r + 2), 7.0) for _ in range(2))
    ops.core(plan, got)
    core_ref.core(plan, want)
    assert delta_cases.relative(got, want) <= 1e-5
    assert torch.equal(got == 7, want == 7)
