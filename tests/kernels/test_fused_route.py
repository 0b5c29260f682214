"""Route, sampling and attention, fused, against the reference; every fresh buffer full of NaN."""

import math

import pytest
import torch

from tests.support.delta_cases import LIMITS, relative
from tests.support.route_cases import SPANS, check_route, check_routes, filtered64, routed, shuffled
from tucka_runtime.kernels.fused import attention, route, sample
from tucka_runtime.kernels.reference import attention as attention_ref
from tucka_runtime.kernels.reference import sample as sample_ref
from tucka_runtime.kernels.tables.routes import RoutePlan

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize(("k", "t"), [(1, 1), (3, 2), (4, 16), (64, 1), (1, 64), (5, 3)])
def test_route(k: int, t: int, n: int) -> None:
    d, vocab = 70, 50
    centroids, x = torch.randn(k * t, d), torch.randn(n, d + 3)[:, :d]
    check_route(route.route_hidden(x, centroids, t), centroids.double() @ x.double().mean(0), t)
    check_routes(route.route_ids, [(k, t, n), (2, 3, n + 3), (k, t, 1)], vocab)


@pytest.mark.usefixtures("device")
def test_route_of_half_precision_hidden_states() -> None:
    centroids, x = torch.randn(6, 40), torch.randn(9, 40).half()
    check_route(route.route_hidden(x, centroids, 2), centroids.double() @ x.double().mean(0), 2)


@pytest.mark.usefixtures("device")
def test_lowest_group_wins_a_tie_and_zero_logits_score_a_half() -> None:
    group, weights = route.select(torch.tensor([[1.0, 0, 0, 1, 1, 0]]), 2)
    assert int(group) == 0
    group, weights = route.select(torch.zeros(1, 9), 3)
    assert int(group) == 0 and weights.tolist() == [[0.5, 0.5, 0.5]]
    group, _ = route.select(torch.tensor([[0.0, 0, -1, -1, 3, 4]]), 2)
    assert int(group) == 2


@pytest.mark.usefixtures("device")
def test_route_repeats_bit_for_bit() -> None:
    ids, adapter = torch.randint(0, 50, (700,)), routed(4, 3, 50)
    plans = [RoutePlan.build([adapter], [0], [ids], [None], torch.get_default_device()) for _ in range(3)]
    for plan in plans:
        route.route_ids(plan)
        assert torch.equal(plan.weights, plans[0].weights) and torch.equal(plan.groups, plans[0].groups)


def caches(slots_of: list[list[int]], block: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys and values: random where a sequence has a token, NaN elsewhere."""
    used = torch.tensor([slot for own in slots_of for slot in own])
    size = (int(used.max()) // block + 1) * block
    out = [torch.full((size, kv_heads, d), math.nan, dtype=dtype) for _ in "kv"]
    for cache in out:
        cache[used] = torch.randn(len(used), kv_heads, d).to(dtype)
    return out


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 8), (2, 2, 20)])
def test_attention(name: str, heads: int, kv_heads: int, d: int, window: int | None) -> None:
    spans, block = SPANS[name]
    plan, slots_of, total = shuffled(spans, block)
    k, v = caches(slots_of, block, kv_heads, d, torch.float32)
    q = torch.randn(total, heads, d)
    got = attention.attention(q, k, v, plan, 0.3, window)
    want = attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.3, window)
    assert relative(got, want) <= 1e-5


def test_attention_in_every_type(dtype: torch.dtype) -> None:
    plan, slots_of, total = shuffled(SPANS["mixed"][0], 8)
    k, v = caches(slots_of, 8, 2, 16, dtype)
    q = torch.randn(total, 4, 16).to(dtype)
    got = attention.attention(q, k, v, plan, 0.25)
    assert relative(got, attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.25)) <= LIMITS[dtype]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("split", [16, 32, 64])
def test_decode_over_many_splits(split: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than programs: each takes several; the last of a sequence merges."""
    monkeypatch.setattr(attention, "MAX_PROGRAMS", 6)
    plan, slots_of, total = shuffled([(1, 100), (1, 1), (1, 33)], 16)
    k, v = caches(slots_of, 16, 2, 8, torch.float32)
    q, outs = torch.randn(total, 4, 8), []
    for _ in range(2):
        outs.append(torch.full_like(q, math.nan))
        attention.decode(q, k, v, outs[-1], plan, 0.3, window, split, 16, 64)
    want = attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.3, window)
    assert relative(outs[0], want) <= 1e-5
    assert torch.equal(outs[0], outs[1])


@pytest.mark.usefixtures("device")
def test_a_context_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT", 32)
    spans = [(1, 100), (1, 70)]
    plan, slots_of, total = shuffled(spans, 16)
    k, v = caches(slots_of, 16, 1, 8, torch.float32)
    q = torch.randn(total, 2, 8)
    both = attention.attention(q, k, v, plan, 0.3)
    tables = [[s // 16 for s in own[::16]] for own in slots_of]
    for i, (_, length) in enumerate(spans):
        alone = type(plan).build([(0, 1, length)], [tables[i]], 16, torch.get_default_device())
        assert torch.equal(attention.attention(q[i : i + 1], k, v, alone, 0.3)[0], both[i])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (128, 64), (128, 128)])
def test_every_prefill_block(block_m: int, block_n: int) -> None:
    plan, slots_of, total = shuffled([(40, 40), (1, 9), (130, 150)], 16)
    k, v = caches(slots_of, 16, 1, 8, torch.float32)
    q = torch.randn(total, 3, 8)
    out = torch.full_like(q, math.nan)
    attention.prefill(q, k, v, out, plan, 0.3, None, block_m, block_n)
    attention.decode(q, k, v, out, plan, 0.3, None, 64, block_n, 64)
    assert relative(out, attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.3)) <= 1e-5


@pytest.mark.usefixtures("device")
def test_uniform_is_the_references_bit_for_bit() -> None:
    seed, position = torch.tensor([0, 3, -5, 2**40 + 7, -(2**62)]), torch.tensor([0, 1, 2**20, 7, 5])
    assert torch.equal(sample.uniform(seed, position, 300), sample_ref.uniform(seed, position, 300))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("columns", [5, 300, 5000])
def test_sample_chooses_the_references_tokens(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SPAN", 1024)
    monkeypatch.setattr(sample, "BLOCK", 512)
    rows = 12
    logits = torch.randn(rows, columns) * 3
    logits[:, 1] = -math.inf
    temperature = torch.tensor([0.0, 0.7, 1.0, 2.0] * 3)
    seed, position = torch.arange(rows) * 977 - 4000, torch.arange(rows)
    want = sample_ref.sample(logits, temperature, seed, position)
    assert torch.equal(sample.sample(logits, temperature, seed, position), want)


@pytest.mark.usefixtures("device")
def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [-1, -math.inf, -0.5, -0.5]])
    assert sample.sample(logits, torch.zeros(3), torch.tensor([1, 2, 3]), torch.zeros(3).long()).tolist() == [1, 0, 2]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(70, 1, 0), (1, 1, 0), (5, 1, 0), (70, 0.7, 0), (70, 0.0, 0), (70, 1, 0.2), (9, 0.8, 0.05)],
)
def test_filter(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(2, 70) * 2
    logits[:, 7] = -math.inf
    got = sample.filter_logits(
        logits, torch.full((2,), top_k), torch.full((2,), float(top_p)), torch.full((2,), float(min_p))
    )
    for row, out in zip(logits, got, strict=True):
        stay = filtered64(row, top_k, top_p, min_p)
        assert {i for i in range(70) if out[i] > -math.inf} == stay - {7}
        kept = sorted(stay)
        assert torch.equal(out[kept], row[kept])


@pytest.mark.usefixtures("device")
def test_filter_works_row_by_row_and_keeps_equals() -> None:
    logits = torch.tensor([[1.0, 3, 3, -2, -0.0, 0.0]] * 4)
    top_k, top_p, min_p = torch.tensor([1, 6, 6, 4]), torch.tensor([1.0, 0.5, 1, 1]), torch.tensor([0, 0, 1.0, 0])
    kept = sample.filter_logits(logits, top_k, top_p, min_p) > -math.inf
    assert kept.tolist() == [
        [False, True, True, False, False, False],
        [False, True, True, False, False, False],
        [False, True, True, False, False, False],
        [True, True, True, False, True, True],
    ]
