"""Route, norm, sampling and attention of the reference against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.delta_cases import relative
from tests.support.route_cases import LIMIT, SPANS, check_route, check_routes, filtered64, shuffled
from tucka_runtime.kernels.reference import attention, norm, route, sample
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan


@pytest.mark.parametrize(("k", "t"), [(1, 1), (3, 2), (4, 16), (64, 1), (1, 64), (8, 8)])
def test_route(k: int, t: int) -> None:
    d, n, vocab = 24, 7, 50
    centroids, x = torch.randn(k * t, d), torch.randn(n, d)
    logits = centroids.double() @ x.double().mean(0)
    check_route(route.route_hidden(x, centroids, t), logits, t)
    check_route(route.route_hidden(x[:1].half(), centroids, t), centroids.double() @ x[0].half().double(), t)
    check_routes(route.route_ids, [(k, t, n), (2, 3, n + 3), (k, t, 1)], vocab)


def test_lowest_group_wins_a_tie_and_zero_logits_score_a_half() -> None:
    group, weights = route.select(torch.tensor([[1.0, 0, 0, 1, 1, 0]]), 2)
    assert int(group) == 0
    group, weights = route.select(torch.zeros(1, 6), 3)
    assert int(group) == 0 and weights.tolist() == [[0.5, 0.5, 0.5]]
    group, _ = route.select(torch.tensor([[0.0, 0, -1, -1, 3, 4]]), 2)
    assert int(group) == 2


@settings(max_examples=100, deadline=None)
@given(k=st.integers(1, 8), t=st.integers(1, 8), seed=st.integers(0, 1000), scale=st.sampled_from([1e-18, 1.0, 1e15]))
def test_select_at_any_scale(k: int, t: int, seed: int, scale: float) -> None:
    logits = torch.randn(k * t, generator=torch.Generator().manual_seed(seed)) * scale
    check_route(route.select(logits[None], t), logits, t)


@pytest.mark.parametrize("shape", [(5, 33), (3, 4, 16)])
def test_norm(shape: tuple[int, ...]) -> None:
    x, weight, bias, eps = torch.randn(shape) * 3, torch.rand(shape[-1]), torch.randn(shape[-1]), 1e-6
    z = x.double()
    rms = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert relative(norm.rms_norm(x, weight, eps), rms) <= LIMIT
    assert relative(norm.norm(x, weight, None, eps), rms) <= LIMIT
    z = z - z.mean(-1, keepdim=True)
    layer = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()
    assert relative(norm.norm(x, weight, bias, eps), layer) <= LIMIT


def attend64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, scale: float, window: int | None
) -> torch.Tensor:
    """One query of H heads at position length - 1 over its context, head by head."""
    out = []
    group = q.shape[0] // k.shape[1]
    first = 0 if window is None else max(0, length - window)
    for head in range(q.shape[0]):
        keys, values = k[first:length, head // group], v[first:length, head // group]
        p = torch.softmax(keys.double() @ q[head].double() * scale, 0)
        out.append(p @ values.double())
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("name", SPANS)
def test_attention(name: str, window: int | None) -> None:
    spans, block = SPANS[name]
    heads, kv_heads, d, scale = 6, 2, 8, 0.3
    plan, slots_of, total = shuffled(spans, block)
    slots = (max(max(s) for s in slots_of) + 1 + block) // block * block
    k_cache, v_cache = torch.full((slots, kv_heads, d), math.nan), torch.full((slots, kv_heads, d), math.nan)
    used = torch.tensor([slot for own in slots_of for slot in own])
    k_cache[used] = torch.randn(len(used), kv_heads, d)
    v_cache[used] = torch.randn(len(used), kv_heads, d)
    q = torch.randn(total, heads, d)
    got = attention.attention(q, k_cache, v_cache, plan, scale, window)
    row = 0
    for (count, length), own in zip(spans, slots_of, strict=True):
        k, v = k_cache[own], v_cache[own]
        for i in range(count):
            want = attend64(q[row], k, v, length - count + i + 1, scale, window)
            assert relative(got[row], want) <= LIMIT
            row += 1


def test_slot_mapping_are_the_last_of_each_context() -> None:
    plan, slots, _ = shuffled([(1, 5), (3, 9)], 4)
    assert plan.slot_mapping.tolist() == [slots[0][4], *slots[1][6:]]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(50, 1, 0), (1, 1, 0), (5, 1, 0), (50, 0.7, 0), (50, 0.0, 0), (50, 1, 0.2), (9, 0.8, 0.05)],
)
def test_filter(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(3, 50) * 2
    rows = torch.full((3,), top_k), torch.full((3,), float(top_p)), torch.full((3,), float(min_p))
    got = sample.filter_logits(logits, *rows)
    for row, out in zip(logits, got, strict=True):
        stay = filtered64(row, top_k, top_p, min_p)
        assert {i for i in range(50) if out[i] > -math.inf} == stay
        assert torch.equal(out[sorted(stay)], row[sorted(stay)])


def test_uniform_is_open_and_a_function_of_seed_position_and_column_alone() -> None:
    seed, position = torch.tensor([3, 3, -5, 2**40]), torch.tensor([0, 1, 0, 0])
    u = sample.uniform(seed, position, 5000)
    assert (u > 0).all() and (u < 1).all()
    assert torch.equal(sample.uniform(seed[2:3], position[2:3], 100), u[2:3, :100])
    assert (u.mean(1) - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(u) - torch.eye(4)).abs().max() < 0.06


def test_the_largest_random_number_is_under_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set: rounding must not reach 1, whose Gumbel noise is infinite."""
    monkeypatch.setattr(sample, "_mix", lambda x: torch.full_like(x, sample.MASK))
    u = sample.uniform(torch.tensor([0]), torch.tensor([0]), 4)
    assert (u < 1).all() and torch.isfinite(-torch.log(-torch.log(u))).all()


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0]])
    got = sample.sample(logits, torch.zeros(2), torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert got.tolist() == [1, 0]


def test_sampled_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1, 2, -1, -math.inf])
    n = 20000
    got = sample.sample(logits.expand(n, 5), torch.full((n,), 0.8), torch.arange(n), torch.zeros(n, dtype=torch.int64))
    share = torch.bincount(got, minlength=5) / n
    assert (share - torch.softmax(logits / 0.8, 0)).abs().max() < 0.015
    assert share[4] == 0


def test_a_core_that_no_wide_read_reaches_is_refused() -> None:
    """Its slices are read 16 bytes at a time from g's address on."""
    whole = torch.zeros(1, 4, 2, 16, 17)
    adapter = CoreParts(torch.zeros(1, 2, 2), whole[..., 1:], torch.zeros(1, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        RoutePlan.build([adapter], [0], [None], [(0, (0.5, 0.5))], torch.device("cpu"))
