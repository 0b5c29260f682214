"""The fused sum, residual and norm: every block, with NaN wherever nothing may be read."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.support import delta_cases
from tests.support.delta_cases import LIMITS, retiled, surrounded
from tucka_runtime.kernels.fused import expand_residual, norm, shrink_core
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.reference import norm as norm_ref
from tucka_runtime.kernels.tables.segments import Segments, SitePlan

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 1e-5
BATCHES = ["base-only-but-loaded", "all-one", "half-base", "absent-targets", "one-segment-over-a-tile", "odd-ranks"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One call's tensors, each cut out of a larger one that is NaN, and the float64 sum that it must arrive at."""

    case: delta_cases.Case
    h: Tensor
    y: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor | None
    total: Tensor

    def run(self, plan: SitePlan | None = None) -> tuple[Tensor, Tensor]:
        low_rank = LowRank(self.h, self.case.site, plan or self.case.plan)
        return expand_residual.expand_residual(self.y, low_rank, self.residual, self.weight, self.bias, EPS)

    def check(self, got: tuple[Tensor, Tensor]) -> None:
        """The residual against float64, and the norm against that of the residual as it was stored."""
        limit = LIMITS[self.y.dtype]
        out, total = got
        assert delta_cases.relative(total, self.total) <= limit
        bias = None if self.bias is None else self.bias.double()
        assert delta_cases.relative(out, norm_ref.norm(total.double(), self.weight.double(), bias, EPS)) <= limit


def inside_nan(t: Tensor) -> Tensor:
    """The same values with NaN on both sides of every row."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 96), math.nan, dtype=t.dtype)
    wide[..., 32 : 32 + t.shape[-1]] = t
    return wide[..., 32 : 32 + t.shape[-1]]


def make(name: str, width: int, dtype: torch.dtype, centred: bool) -> Pass:
    """A batch out of delta_cases.MIXES at a site of one target."""
    mix = delta_cases.MIXES[name]
    case = mix.make([row[:1] for row in mix.ranks], widths=(width,), dtype=dtype)
    h = shrink_core.shrink_core(case.x, case.site, case.cores, case.plan).h
    residual = torch.randn(case.y.shape).to(dtype)
    weight, bias = (torch.rand(width) + 0.5).to(dtype), torch.randn(width).to(dtype)
    total = residual.double() + case.y.double() + case.oracle()[1]
    y, residual, weight, bias = (inside_nan(t) for t in (case.y, residual, weight, bias))
    return Pass(case, h, y, residual, weight, bias if centred else None, total)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch(name: str, centred: bool, dtype: torch.dtype) -> None:
    made = make(name, 72, dtype, centred)
    kept = made.y.clone(), made.residual.clone()
    made.check(made.run())
    assert torch.equal(made.y, kept[0]) and torch.equal(made.residual, kept[1])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("block_n", [32, 64, 128, 256])
def test_every_block(block_n: int, tile_rows: int, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 columns and 16 rows are shipped; the rest is what a sweep on a device may choose next."""
    monkeypatch.setattr(expand_residual, "BLOCK_N", block_n)
    made = make("half-base", 264, torch.float32, centred)
    made.check(made.run(retiled(made.case.plan, tile_rows)))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [8, 136, 1024, 1160])
def test_every_width(width: int, centred: bool) -> None:
    """Below a block and over it; a power of two or not, a multiple of 32 bytes or not."""
    for dtype in (torch.float32, torch.float16):
        made = make("half-base", width, dtype, centred)
        made.check(made.run())


@pytest.mark.usefixtures("device")
def test_factors_in_a_sea_of_nan() -> None:
    case = surrounded("absent-targets", widths=(192, 64))
    h_true, delta = case.oracle()
    h = torch.where(case.adapted(), h_true.float(), torch.nan)
    residual, weight = torch.randn_like(case.y), torch.rand(256) + 0.5
    made = Pass(case, h, case.y, residual, weight, None, residual.double() + case.y.double() + delta)
    made.check(made.run())


@pytest.mark.parametrize("centred", [False, True])
def test_the_norm_is_of_the_residual_as_it_is_stored(centred: bool, dtype: torch.dtype) -> None:
    """Far from zero a 16-bit sum loses most of its digits when it is stored, and the norm must see what is left."""
    made = make("half-base", 136, dtype, centred)
    far = 0.0 if dtype == torch.float32 else 1024.0
    made.residual.add_(far)
    out, total = made.run()
    bias = None if made.bias is None else made.bias.double()
    want = norm_ref.norm(total.double(), made.weight.double(), bias, EPS)
    assert delta_cases.relative(out, want) <= LIMITS[dtype]
    if far and centred:
        exact = norm_ref.norm(made.total + far, made.weight.double(), bias, EPS)
        assert delta_cases.relative(out, exact) > 10 * LIMITS[dtype]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("empty", ["first", "between", "last"])
def test_empty_tiles_do_nothing(empty: str) -> None:
    made = make("one-segment-over-a-tile", 72, torch.float32, False)
    segments = made.case.plan.segments
    none = torch.tensor([[0, 0, -1, -1]], dtype=torch.int32)
    head = {"first": 0, "between": 1, "last": 2}[empty]
    tiles = torch.cat([segments.tiles[:head], none.expand(3, 4), segments.tiles[head:]])
    plan = dataclasses.replace(made.case.plan, segments=dataclasses.replace(segments, tiles=tiles))
    for mine, true in zip(made.run(plan), made.run(), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.usefixtures("device")
def test_a_row_does_not_depend_on_the_others() -> None:
    made = make("half-base", 200, torch.float32, True)
    out, total = made.run()
    case = made.case
    for first, end, adapter in case.plan.segments.spans:
        segments = Segments.build([(0, end - first, adapter)], end - first, 2, case.x.device)
        rows = slice(first, end)
        alone = dataclasses.replace(made, h=made.h[rows], y=made.y[rows], residual=made.residual[rows])
        got = alone.run(SitePlan.build(segments, case.site, max_rank=case.plan.max_rank))
        assert torch.equal(got[0], out[rows]) and torch.equal(got[1], total[rows])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("centred", [False, True])
def test_base_rows_are_those_of_a_batch_without_adapters(centred: bool) -> None:
    """To the bit."""
    made = make("half-base", 200, torch.float32, centred)
    base = made.case.plan.segments.spans[0][0]
    out, total = made.run()
    plain, plain_total = norm.add_norm(made.y, made.residual, made.weight, made.bias, EPS)
    assert torch.equal(total[:base], plain_total[:base]) and torch.equal(out[:base], plain[:base])


@pytest.mark.usefixtures("device")
def test_no_rows() -> None:
    made = make("half-base", 72, torch.float32, False)
    segments = dataclasses.replace(made.case.plan.segments, tiles=torch.zeros(0, 4, dtype=torch.int32))
    plan = dataclasses.replace(made.case.plan, segments=segments)
    none = dataclasses.replace(made, h=made.h[:0], y=made.y[:0], residual=made.residual[:0])
    assert [tuple(t.shape) for t in none.run(plan)] == [(0, 72), (0, 72)]


@pytest.mark.usefixtures("device")
def test_a_block_must_lie_within_a_target() -> None:
    case = delta_cases.make([[4, 4]], (0, ((2, 0),)), widths=(32, 64))
    made = Pass(case, case.y.new_zeros(2, 2, 4), case.y, case.y.clone(), torch.ones(96), None, case.y.double())
    with pytest.raises(ValueError, match="must be multiples of 64"):
        made.run()
