"""Base linears of every backend against float64: shapes that fill no panel and no tile, one row and many."""

import pytest
import torch

from tests.support.delta_cases import LIMITS, relative
from tucka_runtime.kernels.native.linear import PanelLinear
from tucka_runtime.kernels.ops import Ops

SHAPES = [(1003, 520), (7, 33), (96, 1100), (256, 64)]


@pytest.mark.parametrize("rows", [1, 5, 8, 13, 230])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_float64s(
    any_type: tuple[Ops, torch.dtype], shape: tuple[int, int], rows: int, biased: bool
) -> None:
    ops, dtype = any_type
    weight = torch.randn(shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if biased else None
    x = torch.randn(rows, 2 * shape[1]).to(dtype)[:, : shape[1]]
    want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    made = ops.linear(weight, bias)
    got = made(x)
    assert got.dtype == dtype and got.shape == want.shape and made.shape == weight.shape
    assert relative(got, want) <= LIMITS[dtype]
    assert torch.equal(made.wide(x), got.float()) and torch.equal(made.dense(), weight)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_in_panels_is_the_same_in_any_batch_on_any_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = PanelLinear(torch.randn(1003, 520).to(dtype), torch.randn(1003).to(dtype))
    x = torch.randn(230, 520).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = made(x)
        torch.set_num_threads(1)
        for rows in (1, 2, 6, 7, 100):
            assert torch.equal(made(x[-rows:]), whole[-rows:])
    finally:
        torch.set_num_threads(before)
    assert made(x[:0]).shape == (0, 1003)


@pytest.mark.native
def test_numbers_that_are_not_finite_stay_in_their_row_and_column() -> None:
    weight = torch.ones(20, 30).bfloat16()
    weight[3, 7] = float("inf")
    x = torch.ones(9, 30).bfloat16()
    x[4, 2] = float("nan")
    y = PanelLinear(weight, None)(x)
    assert y[4].isnan().all() and not y[torch.arange(9) != 4].isnan().any()
    assert y[:4, 3].isinf().all() and y[:4, torch.arange(20) != 3].eq(30).all()
