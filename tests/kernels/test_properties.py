"""What holds of any batch and any numbers, on backends by address and of an int8 cache.

It stands apart from what else is tested of them, for a bare device machine has no hypothesis
(docs/measurements/first-run/right.py).
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.delta_cases import Layout, check_delta, make
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference.int8 import quantize

layouts = st.tuples(
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(1, 18), st.integers(0, 2)), max_size=4).map(tuple),
).filter(lambda layout: layout[0] + len(layout[1]) > 0)
ranks = st.lists(st.lists(st.sampled_from([0, 1, 6, 8, 17]), min_size=2, max_size=2), min_size=3, max_size=3).filter(
    lambda table: any(any(row) for row in table)
)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts, table=ranks, core_size=st.sampled_from([None, 17]), seed=st.integers(0, 9))
def test_any_layout(layout: Layout, table: list[list[int]], core_size: int | None, seed: int, ops: Ops) -> None:
    check_delta(make(table, layout, d_in=24, core_size=core_size, seed=seed), 1e-5, ops.shrink_core, ops.expand)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=12))
def test_a_number_comes_back_within_half_a_step(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    steps, scale = quantize(x)
    assert steps.abs().max() <= 127
    assert (steps.double() * scale.double() - x).abs().max() <= max(float(x.abs().max()), 1e-30) / 127 * 0.5001
