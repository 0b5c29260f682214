"""Route, sampling and attention on every backend by address, against the reference; fresh buffers full of NaN."""

import math

import pytest
import torch

from tests.support.delta_cases import LIMITS, relative
from tests.support.route_cases import (
    SPANS,
    caches,
    check_contexts_alone,
    check_route,
    check_routes,
    filtered64,
    routed,
    shuffled,
)
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference import attention as attention_ref
from tucka_runtime.kernels.reference import sample as sample_ref
from tucka_runtime.kernels.tables.routes import RoutePlan

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize(("k", "t"), [(1, 1), (3, 2), (4, 16), (64, 1), (1, 64), (5, 3)])
def test_route(k: int, t: int, n: int, ops: Ops) -> None:
    d, vocab = 70, 50
    centroids, x = torch.randn(k * t, d), torch.randn(n, d + 3)[:, :d]
    check_route(ops.route_hidden(x, centroids, t), centroids.double() @ x.double().mean(0), t)
    check_routes(ops.route_ids, [(k, t, n), (2, 3, n + 3), (k, t, 1)], vocab)


def test_route_of_half_precision_hidden_states(ops: Ops) -> None:
    centroids, x = torch.randn(6, 40), torch.randn(9, 40).half()
    check_route(ops.route_hidden(x, centroids, 2), centroids.double() @ x.double().mean(0), 2)


def test_lowest_group_wins_a_tie_and_zero_logits_score_a_half(ops: Ops) -> None:
    group, weights = ops.select(torch.tensor([[1.0, 0, 0, 1, 1, 0]]), 2)
    assert int(group) == 0
    group, weights = ops.select(torch.zeros(1, 9), 3)
    assert int(group) == 0 and weights.tolist() == [[0.5, 0.5, 0.5]]
    group, _ = ops.select(torch.tensor([[0.0, 0, -1, -1, 3, 4]]), 2)
    assert int(group) == 2


def test_route_repeats_bit_for_bit(ops: Ops) -> None:
    ids, adapter = torch.randint(0, 50, (700,)), routed(4, 3, 50)
    plans = [RoutePlan.build([adapter], [0], [ids], [None], torch.get_default_device()) for _ in range(3)]
    for plan in plans:
        ops.route_ids(plan)
        assert torch.equal(plan.weights, plans[0].weights) and torch.equal(plan.groups, plans[0].groups)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 8), (2, 2, 20)])
def test_attention(name: str, heads: int, kv_heads: int, d: int, window: int | None, ops: Ops) -> None:
    spans, block = SPANS[name]
    plan, slots_of, total = shuffled(spans, block)
    k, v = caches(slots_of, block, kv_heads, d, torch.float32)
    q = torch.randn(total, heads, d)
    got = ops.attention(q, k, v, plan, 0.3, window)
    want = attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.3, window)
    assert relative(got, want) <= 1e-5


def test_attention_in_every_type(any_type: tuple[Ops, torch.dtype]) -> None:
    ops, dtype = any_type
    plan, slots_of, total = shuffled(SPANS["mixed"][0], 8)
    k, v = caches(slots_of, 8, 2, 16, dtype)
    q = torch.randn(total, 4, 16).to(dtype)
    got = ops.attention(q, k, v, plan, 0.25)
    assert relative(got, attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.25)) <= LIMITS[dtype]


def test_a_context_does_not_depend_on_the_others(ops: Ops) -> None:
    check_contexts_alone(ops.attention)


@pytest.mark.parametrize("columns", [5, 300, 5000])
def test_sample_chooses_the_references_tokens(columns: int, ops: Ops) -> None:
    rows = 12
    logits = torch.randn(rows, columns) * 3
    logits[:, 1] = -math.inf
    temperature = torch.tensor([0.0, 0.7, 1.0, 2.0] * 3)
    seed, position = torch.arange(rows) * 977 - 4000, torch.arange(rows)
    want = sample_ref.sample(logits, temperature, seed, position)
    assert torch.equal(ops.sample(logits, temperature, seed, position), want)


def test_rows_of_finite_logits(ops: Ops) -> None:
    logits = torch.randn(5, 1003) * 100
    logits[1, 1002], logits[2, 0], logits[3, 500] = math.inf, -math.inf, math.nan
    assert ops.finite_rows(logits).tolist() == [True, False, False, False, True]


def test_greedy_takes_the_lowest_of_equals(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [-1, -math.inf, -0.5, -0.5]])
    assert ops.sample(logits, torch.zeros(3), torch.tensor([1, 2, 3]), torch.zeros(3).long()).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(70, 1, 0), (1, 1, 0), (5, 1, 0), (70, 0.7, 0), (70, 0.0, 0), (70, 1, 0.2), (9, 0.8, 0.05)],
)
def test_filter(top_k: int, top_p: float, min_p: float, ops: Ops) -> None:
    logits = torch.randn(2, 70) * 2
    logits[:, 7] = -math.inf
    got = ops.filter_logits(
        logits, torch.full((2,), top_k), torch.full((2,), float(top_p)), torch.full((2,), float(min_p))
    )
    for row, out in zip(logits, got, strict=True):
        stay = filtered64(row, top_k, top_p, min_p)
        assert {i for i in range(70) if out[i] > -math.inf} == stay - {7}
        kept = sorted(stay)
        assert torch.equal(out[kept], row[kept])


def test_filter_works_row_by_row_and_keeps_equals(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 3, 3, -2, -0.0, 0.0]] * 4)
    top_k, top_p, min_p = torch.tensor([1, 6, 6, 4]), torch.tensor([1.0, 0.5, 1, 1]), torch.tensor([0, 0, 1.0, 0])
    kept = ops.filter_logits(logits, top_k, top_p, min_p) > -math.inf
    assert kept.tolist() == [
        [False, True, True, False, False, False],
        [False, True, True, False, False, False],
        [False, True, True, False, False, False],
        [True, True, True, False, True, True],
    ]
