"""The int8 KV cache on every backend: what is written, and what attention makes of it, held to float64."""

import math

import pytest
import torch
from torch import Tensor

from tests.support.delta_cases import LIMITS, parts, relative
from tests.support.route_cases import SPANS, shuffled
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference import attention as attention_ref
from tucka_runtime.kernels.reference import expand_qkv_rope_kv as qkv_ref
from tucka_runtime.kernels.reference.backend import OPS as REFERENCE
from tucka_runtime.kernels.reference.int8 import quantize, write
from tucka_runtime.kernels.tables.blocks import AttentionMetadata, int8_cache, scales


def exact(cache: Tensor) -> Tensor:
    """What an int8 cache says, in float64."""
    return cache.double() * scales(cache).double()[..., None]


def fresh(slots: int, kv_heads: int, d: int) -> Tensor:
    cache = int8_cache(slots, kv_heads, d, torch.get_default_device())
    cache.fill_(77)
    scales(cache).fill_(math.nan)
    return cache


def written(slots_of: list[list[int]], block: int, kv_heads: int, d: int) -> list[Tensor]:
    """Keys and values of very different sizes where a sequence has a token, scales that are NaN elsewhere."""
    used = torch.tensor([slot for own in slots_of for slot in own])
    size = (int(used.max()) // block + 1) * block
    out = [fresh(size, kv_heads, d) for _ in "kv"]
    for cache in out:
        write(cache, used, torch.randn(len(used), kv_heads, d) * torch.rand(len(used), kv_heads, 1).exp2())
    return out


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so() -> None:
    steps, scale = quantize(torch.zeros(2, 8))
    assert not steps.any() and scale.isfinite().all()
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(8)
        x[3] = bad
        steps, scale = quantize(x)
        assert not (steps * scale).isfinite().any()


def test_scales_lie_behind_the_heads_and_lines_are_whole() -> None:
    """A GPU reads 16 bytes at once only where every slot begins at a multiple of them."""
    for kv_heads, d in ((8, 128), (2, 64), (3, 20)):
        cache = int8_cache(5, kv_heads, d, torch.device("cpu"))
        write(cache, torch.tensor([4]), torch.ones(1, kv_heads, d))
        assert cache.stride(0) % 16 == 0 and cache.untyped_storage().nbytes() == 5 * cache.stride(0)
        own = torch.as_strided(cache, (kv_heads * 4,), (1,), 4 * cache.stride(0) + kv_heads * d).view(torch.float32)
        assert own.tolist() == pytest.approx([1 / 127] * kv_heads) and not scales(cache)[:4].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "heads", "kv_heads", "d"), [(None, 4, 2, 8), ("half-base", 3, 1, 36)])
def test_what_is_written(
    name: str | None, heads: int, kv_heads: int, d: int, any_type: tuple[Ops, torch.dtype]
) -> None:
    """Each number within half a step of its head's scale, beside what the rows' type costs; no other slot."""
    ops, dtype = any_type
    fused, wide = parts(name, (heads * d, kv_heads * d, kv_heads * d), dtype, ops.shrink_core)
    rows, slots = len(fused[0]), 40
    angle = torch.rand(rows, 1, d // 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    at = torch.randperm(slots)[:rows]
    caches, plain = [fresh(slots, kv_heads, d) for _ in "kv"], [torch.zeros(slots, kv_heads, d).double() for _ in "kv"]
    where = at.clone()
    where[1] = -1
    got = ops.expand_qkv_rope_kv(*fused, cos, sin, None, 1e-5, *caches, where)
    want = qkv_ref.expand_qkv_rope_kv(*wide, cos.double(), sin.double(), None, 1e-5, *plain, at)
    assert relative(got, want) <= LIMITS[dtype]
    kept = torch.ones(slots, dtype=torch.bool)
    kept[where[where >= 0]] = False
    for cache, true in zip(caches, plain, strict=True):
        largest = true.abs().amax(-1, keepdim=True)
        off = (exact(cache) - true).abs() - (0.5001 / 127 + 2 * LIMITS[dtype]) * largest
        assert off[~kept].max() <= 0
        assert (cache[kept] == 77).all() and scales(cache)[kept].isnan().all()


def attend64(q: Tensor, k: Tensor, v: Tensor, plan: AttentionMetadata, scale: float, window: int | None) -> Tensor:
    """From the definition: caches in float64, sequence after sequence."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for i, (first, count, length) in enumerate(plan.spans):
        blocks = plan.block_table[int(plan.first_block[i]) :].long()
        token = torch.arange(length)
        slots = blocks[token // plan.block_size] * plan.block_size + token % plan.block_size
        keys, values = (c[slots].repeat_interleave(group, 1) for c in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[first : first + count].double(), keys) * scale
        ahead = torch.arange(length - count, length)[:, None] - token
        scores.masked_fill_((ahead < 0) | (ahead >= (window or length + 1)), -math.inf)
        out[first : first + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 8), (2, 2, 20)])
def test_attention(name: str, heads: int, kv_heads: int, d: int, window: int | None, ops: Ops) -> None:
    spans, block = SPANS[name]
    plan, slots_of, total = shuffled(spans, block)
    k, v = written(slots_of, block, kv_heads, d)
    q = torch.randn(total, heads, d)
    want = attend64(q, exact(k), exact(v), plan, 0.3, window)
    assert relative(ops.attention(q, k, v, plan, 0.3, window), want) <= 1e-5
    assert relative(REFERENCE.attention(q, k, v, plan, 0.3, window), want) <= 1e-5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("d", [16, 100])
def test_attention_in_every_type(d: int, any_type: tuple[Ops, torch.dtype]) -> None:
    ops, dtype = any_type
    plan, slots_of, total = shuffled(SPANS["mixed"][0], 8)
    k, v = written(slots_of, 8, 2, d)
    q = torch.randn(total, 4, d).to(dtype)
    want = attend64(q, exact(k), exact(v), plan, 0.25, None)
    assert relative(ops.attention(q, k, v, plan, 0.25), want) <= LIMITS[dtype]
    assert relative(attention_ref.attention(q, k, v, plan, 0.25), want) <= LIMITS[dtype]


def test_long_contexts(ops: Ops) -> None:
    """In several splits, merged: the same bits alone as among others."""
    plan, slots_of, total = shuffled([(1, 700), (1, 70), (3, 90)], 16)
    k, v = written(slots_of, 16, 1, 8)
    q = torch.randn(total, 2, 8)
    got = ops.attention(q, k, v, plan, 0.3)
    assert relative(got, attend64(q, exact(k), exact(v), plan, 0.3, None)) <= 1e-5
    table = [s // 16 for s in slots_of[0][::16]]
    alone = AttentionMetadata.build([(0, 1, 700)], [table], 16, torch.get_default_device())
    assert torch.equal(ops.attention(q[:1], k, v, alone, 0.3)[0], got[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_end_as_plain_numbers(bad: float, ops: Ops) -> None:
    """A key or value that is NaN or infinite makes its own sequence's output so, and no other's."""
    plan, slots_of, _ = shuffled([(1, 1), (1, 1)], 4)
    for part in range(2):
        qkv = torch.randn(2, 24)
        qkv[1, 8 + 8 * part + 3] = bad
        caches = [fresh(8, 1, 8) for _ in "kv"]
        where = torch.tensor([own[0] for own in slots_of])
        q = ops.expand_qkv_rope_kv(qkv, None, None, None, None, 1e-5, *caches, where)
        out = ops.attention(q, *caches, plan, 0.3)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()
