"""Route, sampling and attention, fused, against the reference; every fresh buffer full of NaN."""

import math

import pytest
import torch

from tests.support.delta_cases import relative
from tests.support.route_cases import caches, check_contexts_alone, shuffled
from tucka_runtime.kernels.fused import attention, attention_decode, attention_prompt, sample
from tucka_runtime.kernels.reference import attention as attention_ref
from tucka_runtime.kernels.reference import sample as sample_ref

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("split", "fan"), [(16, 2), (32, 16), (64, 2)])
def test_decode_over_many_splits(split: int, fan: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than programs: each takes several; the last of some neighbours merges those, and the last of a
    sequence what they made: up to ten of them, of which eight are read at once."""
    monkeypatch.setattr(attention_decode, "FAN", fan)
    plan, slots_of, total = shuffled([(1, 310), (1, 1), (1, 33), (1, 95)], 16)
    k, v = caches(slots_of, 16, 2, 8, torch.float32)
    q, outs = torch.randn(total, 4, 8), []
    for _ in range(2):
        outs.append(torch.full_like(q, math.nan))
        attention_decode.decode(q, k, v, outs[-1], plan, 0.3, window, attention_decode.Cut(split, 16, 5), 6)
    want = attention_ref.attention(q.double(), k.double(), v.double(), plan, 0.3, window)
    assert relative(outs[0], want) <= 1e-5
    assert torch.equal(outs[0], outs[1])


@pytest.mark.usefixtures("device")
def test_parts_start_at_multiples_of_16_bytes_for_any_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their alignment, and with it what is compiled, would change with the number of sequences."""
    seen: list[object] = []
    monkeypatch.setattr(attention_decode, "launch", lambda _, __, *args, **___: seen.extend(args))
    for lengths in ([40], [40, 50, 60]):
        plan, slots_of, total = shuffled([(1, length) for length in lengths], 16)
        k, v = caches(slots_of, 16, 3, 8, torch.float32)
        q = torch.randn(total, 3, 8)
        attention_decode.decode(q, k, v, torch.empty_like(q), plan, 0.3, None, attention_decode.Cut(64, 16, 5))
    tensors = [value for value in seen if isinstance(value, torch.Tensor)]
    assert tensors
    assert not any(value.data_ptr() % 16 for value in tensors)


@pytest.mark.usefixtures("device")
def test_a_context_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where contexts are cut the same way: a graph is always for as many sequences."""
    monkeypatch.setattr(attention, "cut", lambda *_: attention_decode.Cut(32, 16, 5))
    check_contexts_alone(attention.attention)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (128, 64), (128, 128)])
def test_every_prefill_block(block_m: int, block_n: int) -> None:
    plan, slots_of, total = shuffled([(40, 40), (1, 9), (130, 150)], 16)
    k, v = caches(slots_of, 16, 1, 8, torch.float32)
    q = torch.randn(total, 3, 8)
    out = torch.full_like(q, math.nan)
    attention_prompt.prefill(q, k, v, out, plan, 0.3, None, block_m, block_n)
    attention_decode.decode(q, k, v, out, plan, 0.3, None, attention_decode.Cut(64, block_n, 5), 64)
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
