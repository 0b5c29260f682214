"""The delta's fused kernels against the reference ones and float64, every fresh buffer full of NaN."""

import dataclasses

import pytest
import torch

from tests.support import delta_cases
from tests.support.delta_cases import check_delta, parts, retiled, surrounded
from tucka_runtime.kernels.fused import (
    expand,
    expand_residual,
    expand_swiglu,
    shrink_core,
)
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.reference import expand_swiglu as swiglu_ref
from tucka_runtime.kernels.tables.segments import Segments

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["half-base", "absent-targets", "odd-ranks"])
def test_sums_over_many_spans(name: str) -> None:
    how = shrink_core.Config(block_k=16, span=32, chunks=1, warps=4, stages=3)
    case = delta_cases.mix(name, d_in=77)
    check_delta(case, 1e-5, lambda *args: shrink_core.run(*args, how), expand.expand)


SHIPPED = {
    (how.block_k, how.span, how.chunks): how
    for rows in (1, 257, 1025, 5000)
    for d_in in (64, 4096)
    for how in [shrink_core.config(rows, d_in)]
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("how", SHIPPED.values(), ids=[str(key) for key in SHIPPED])
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_every_shipped_shrink_with_nan_around_its_rows(how: shrink_core.Config, tile_rows: int) -> None:
    """x, the factors and the cores lie in larger buffers that are NaN elsewhere: what is masked is never read."""
    case = surrounded("absent-targets", d_in=600 if how.span <= 512 else 72)
    case = dataclasses.replace(case, plan=retiled(case.plan, tile_rows))
    check_delta(case, 1e-5, lambda *args: shrink_core.run(*args, how), expand.expand)


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
    how = shrink_core.Config(block_k=16, span=32, chunks=1, warps=4, stages=3)
    case = delta_cases.mix("half-base", d_in=77)
    runs = [shrink_core.run(case.x, case.site, case.cores, case.plan, how).h[case.adapted()] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_segments_of_one_adapter_share_tiles() -> None:
    """Up to 16 rows of a bank's members, whatever their cores; no two adapters, nor the base, have a tile together."""
    spans = [(1, 6, 0), (6, 11, 0), (11, 20, 0), (20, 21, 1), (21, 23, 0)]
    segments = Segments.build(spans, 23, 2, torch.get_default_device(), core_rows=[2, 0, 1, 3, 0])
    assert segments.tiles.tolist() == [[0, 1, -1, -1], [1, 17, 2, 0], [17, 20, 1, 0], [20, 21, 3, 1], [21, 23, 0, 0]]
    assert segments.row_cores.tolist() == [-1, *[2] * 5, *[0] * 5, *[1] * 9, 3, 0, 0]


@pytest.mark.usefixtures("device")
def test_rows_of_several_cores_in_a_tile_have_the_bits_of_tiles_apart() -> None:
    """The NaN of one member's core included, which stays its own."""
    how = shrink_core.Config(block_k=16, span=32, chunks=1, warps=4, stages=3)
    case = delta_cases.mix("members-of-a-bank", d_in=390)  # 13 spans: they are read four at a time
    assert case.cores is not None
    case.cores[1] = torch.nan
    together, apart = (
        shrink_core.run(case.x, case.site, case.cores, plan, how).h for plan in (case.plan, retiled(case.plan, 16))
    )
    first, end, _ = case.plan.segments.spans[1]
    own = case.adapted()
    assert together[first:end][own[first:end]].isnan().all()
    own[first:end] = False
    assert torch.equal(together[own], apart[own]) and not together[own].isnan().any()


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


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("block_n", [32, 128])
def test_other_blocks_of_what_is_fused(block_n: int) -> None:
    """Not shipped, but what a sweep on a device may choose next."""
    fused, exact = parts("half-base", (160, 160), torch.float32, shrink_core.shrink_core)
    want = swiglu_ref.expand_swiglu(*exact)
    assert delta_cases.relative(expand_swiglu.run(*fused, block_n), want) <= 1e-5
    fused, exact = parts("half-base", (160,), torch.float32, shrink_core.shrink_core)
    y, low_rank = fused
    residual = torch.randn_like(y)
    assert low_rank is not None
    got = expand_residual.add(y, low_rank, residual, block_n)
    assert delta_cases.relative(got, residual.double() + exact[0]) <= 1e-5
