"""The fused sum, residual and norm: one launch and two, every block, with NaN wherever nothing may be read."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.support import delta_cases
from tests.support.delta_cases import LIMITS, retiled, surrounded
from tucka_runtime.kernels.fused import expand_residual, norm, shrink_core, tiles
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

    def run(self, one: bool, block_n: int = 64, plan: SitePlan | None = None) -> tuple[Tensor, Tensor]:
        return expand_residual.run(
            self.y,
            LowRank(self.h, self.case.site, plan or self.case.plan),
            self.residual,
            self.weight,
            self.bias,
            EPS,
            one,
            block_n,
        )

    def call(self, plan: SitePlan | None = None) -> tuple[Tensor, Tensor]:
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


def all_zero(device: torch.device) -> bool:
    """Whether every counter of the op is where the next launch expects it."""
    return not any(counter.any() for counter in tiles._counters[("expand_residual", device)])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch(name: str, one: bool, centred: bool, dtype: torch.dtype) -> None:
    made = make(name, 72, dtype, centred)
    kept = made.y.clone(), made.residual.clone()
    made.check(made.run(one))
    assert torch.equal(made.y, kept[0]) and torch.equal(made.residual, kept[1])
    assert not one or all_zero(made.y.device)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("block_n", [32, 64, 128, 256])
def test_every_block(block_n: int, tile_rows: int, centred: bool) -> None:
    """64 columns and 16 rows are shipped; the rest is what a sweep on a device may choose next."""
    made = make("half-base", 264, torch.float32, centred)
    plan = retiled(made.case.plan, tile_rows)
    first, second = (made.run(one, block_n, plan) for one in (True, False))
    made.check(first)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [8, 136, 1024, 1160])
def test_every_width(width: int, centred: bool) -> None:
    """Below a block, within one step of the norm, just as large, and over it; a multiple of 32 bytes or not."""
    for dtype in (torch.float32, torch.float16):
        made = make("half-base", width, dtype, centred)
        first, second = (made.run(one) for one in (True, False))
        made.check(first)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.usefixtures("device")
def test_factors_in_a_sea_of_nan() -> None:
    case = surrounded("absent-targets", widths=(192, 64))
    h_true, delta = case.oracle()
    h = torch.where(case.adapted(), h_true.float(), torch.nan)
    residual, weight = torch.randn_like(case.y), torch.rand(256) + 0.5
    made = Pass(case, h, case.y, residual, weight, None, residual.double() + case.y.double() + delta)
    for one in (True, False):
        made.check(made.run(one))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("one", [True, False])
def test_the_norm_is_of_the_residual_as_it_is_stored(one: bool, centred: bool, dtype: torch.dtype) -> None:
    """Far from zero a 16-bit sum loses most of its digits when it is stored, and the norm must see what is left."""
    made = make("half-base", 136, dtype, centred)
    far = 0.0 if dtype == torch.float32 else 1024.0
    made.residual.add_(far)
    out, total = made.run(one)
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
    want = made.run(True)
    for one in (True, False):
        for mine, true in zip(made.run(one, plan=plan), want, strict=True):
            assert torch.equal(mine, true)
    assert all_zero(made.y.device)


@pytest.mark.usefixtures("device")
def test_repeats_agree_bit_for_bit_and_leave_the_counters_at_zero() -> None:
    passes = [make(name, 200, torch.float32, name == "all-one") for name in ("half-base", "all-one", "all-distinct")]
    first = [made.run(True) for made in passes]
    for _ in range(3):
        for made, want in zip(passes, first, strict=True):
            got = made.run(True)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            assert all_zero(made.y.device)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("one", [True, False])
def test_a_row_does_not_depend_on_the_others(one: bool) -> None:
    made = make("half-base", 200, torch.float32, True)
    out, total = made.run(one)
    case = made.case
    for first, end, adapter in case.plan.segments.spans:
        segments = Segments.build([(0, end - first, adapter)], end - first, 2, case.x.device)
        rows = slice(first, end)
        alone = dataclasses.replace(made, h=made.h[rows], y=made.y[rows], residual=made.residual[rows])
        got = alone.run(True, plan=SitePlan.build(segments, case.site, max_rank=case.plan.max_rank))
        assert torch.equal(got[0], out[rows]) and torch.equal(got[1], total[rows])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("centred", [False, True])
def test_base_rows_are_those_of_a_batch_without_adapters(centred: bool) -> None:
    """Their residual to the bit, their norm up to the order of its sum."""
    made = make("half-base", 200, torch.float32, centred)
    base = made.case.plan.segments.spans[0][0]
    out, total = made.run(True)
    plain, plain_total = norm.add_norm(made.y, made.residual, made.weight, made.bias, EPS)
    assert torch.equal(total[:base], plain_total[:base])
    assert delta_cases.relative(out[:base], plain[:base]) <= 1e-6


def test_one_launch_where_no_tile_holds_much() -> None:
    def chosen(spans: list[tuple[int, int, int]], rows: int, size: int = 2 * 4096) -> bool:
        segments = Segments.build(spans, rows, 32, torch.device("cpu"), num_tiles=rows)
        return expand_residual.one_launch(segments, size)

    assert chosen([], 1) and chosen([], 3) and not chosen([], 4)
    assert chosen([(2 * i, 2 * i + 2, i) for i in range(32)], 64)
    assert not chosen([(8 * i, 8 * i + 8, i) for i in range(8)], 64) and not chosen([(0, 64, 0)], 64)
    assert not chosen([(16, 17, 0)], 17), "the base's rows are a tile as well"
    assert not chosen([(0, 2, 0), (2, 4, 0)], 4), "segments of one adapter share a tile"
    assert chosen([(0, 64, 0)], 64, 1536), "16 rows of GPT-2's are as little"


@pytest.mark.usefixtures("device")
def test_how_many_launches_an_op_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, what one_launch says; in prompts two."""
    seen: list[str] = []
    for module, name in ((expand_residual, "_finish"), (expand_residual, "norm"), (expand_residual, "_launch")):
        real = getattr(module, name)

        class Spy:
            def __init__(self, real: object, name: str) -> None:
                self.real, self.name = real, name

            def __call__(self, *args: object, **options: object) -> object:
                seen.append(self.name)
                return self.real(*args, **options)  # type: ignore[operator]

            def __getitem__(self, grid: object) -> object:
                seen.append(self.name)
                return self.real[grid]  # type: ignore[index]

        monkeypatch.setattr(module, name, Spy(real, name))
    made = make("half-base", 72, torch.float32, False)
    made.check(made.call())
    assert seen == ["_launch"]
    seen.clear()
    monkeypatch.setattr(expand_residual, "TAIL_BYTES", 3 * 4 * 72)
    made.check(made.call())
    assert seen == ["_launch", "_finish"]
    seen.clear()
    made.check(made.call(retiled(made.case.plan, 64)))
    assert seen == ["_launch", "norm"]


@pytest.mark.usefixtures("device")
def test_no_rows() -> None:
    made = make("half-base", 72, torch.float32, False)
    segments = dataclasses.replace(made.case.plan.segments, tiles=torch.zeros(0, 4, dtype=torch.int32))
    plan = dataclasses.replace(made.case.plan, segments=segments)
    none = dataclasses.replace(made, h=made.h[:0], y=made.y[:0], residual=made.residual[:0])
    for one in (True, False):
        assert [tuple(t.shape) for t in none.run(one, plan=plan)] == [(0, 72), (0, 72)]


@pytest.mark.usefixtures("device")
def test_a_block_must_lie_within_a_target() -> None:
    case = delta_cases.make([[4, 4]], (0, ((2, 0),)), widths=(32, 64))
    made = Pass(case, case.y.new_zeros(2, 2, 4), case.y, case.y.clone(), torch.ones(96), None, case.y.double())
    with pytest.raises(ValueError, match="must be multiples of 64"):
        made.run(True)
