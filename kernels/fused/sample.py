"""Choice of the next token: Gumbel-max with a counter-based random number. Contract: ops.Sample, FilterLogits.

The random numbers are the reference's bit for bit, so both choose the same tokens. Filters need no sort: each kept set
is everything from some value on, and that value is found by bisection of its bit pattern, exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import cdiv
from tucka_runtime.kernels.tables.segments import power_of_2

BLOCK = 4096
"""Logits per step. Unmeasured."""
SPAN = 16384
"""Logits per program of `sample`: a vocabulary of 128k makes eight per row. Unmeasured."""


def uniform(seed: Tensor, position: Tensor, columns: int) -> Tensor:
    """(B, columns) fp32 in (0, 1): the reference's, bit for bit."""
    out = torch.empty(seed.shape[0], columns, dtype=torch.float32, device=seed.device)
    block = min(BLOCK, power_of_2(columns))
    if out.numel():
        launch(_uniform, (seed.shape[0], cdiv(columns, block)), seed, position, out, columns, BLOCK=block)
    return out


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """ops.FilterLogits. Equal logits stay or go together."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    rows, vocab = logits.shape
    if rows:
        launch(
            _filter, (rows,), logits, top_k, top_p, min_p, out, vocab, BLOCK=min(BLOCK, power_of_2(vocab)), num_warps=8
        )
    return out


def sample(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """ops.Sample."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    spans = cdiv(vocab, SPAN)
    best = torch.empty(rows, spans, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, spans, dtype=torch.int64, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = min(BLOCK, power_of_2(vocab))
        launch(
            _best,
            (rows, spans),
            logits,
            temperature,
            seed,
            position,
            best,
            where,
            vocab,
            SPAN=SPAN,
            BLOCK=block,
            num_warps=8,
        )
        launch(_choose, (rows,), best, where, out, spans, BLOCK=power_of_2(spans), num_warps=1)
    return out


@triton.jit
def _mix(x):
    """The reference's 32-bit hash; x uint32, whose products wrap by themselves."""
    x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x735A2D97, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def _random(seed, position, columns):
    """fp32 in (0, 1) of each column; seed and position int64 scalars."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    row = _mix(low ^ _mix(high ^ _mix(position.to(tl.uint32))))
    bits = _mix(row ^ _mix(columns.to(tl.uint32))) >> 9
    return (bits.to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _uniform(seed, position, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = _random(tl.load(seed + row), tl.load(position + row), i)
    tl.store(out + row.to(tl.int64) * columns + i, u, mask=i < columns)


@triton.jit
def _best(logits, temperature, seed, position, best, where, vocab, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """The best of one span of one row, and where: the lowest of equals."""
    row, span = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    hot = heat > 0
    divisor = tl.where(hot, heat, 1.0)
    s, p = tl.load(seed + row), tl.load(position + row)
    top = tl.full((), float("-inf"), tl.float32)
    index = span * SPAN
    for begin in range(span * SPAN, tl.minimum(span * SPAN + SPAN, vocab), BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * vocab + i, mask=i < vocab, other=float("-inf"))
        x = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + divisor)
        if hot:
            x += -tl.log(-tl.log(_random(s, p, i)))
        here = tl.max(x, 0)
        at = tl.min(tl.where((x == here) & (i < vocab), i, vocab), 0)
        if here > top:
            top = here
            index = at
    tl.store(best + row * tl.num_programs(1) + span, top)
    tl.store(where + row * tl.num_programs(1) + span, index.to(tl.int64))


@triton.jit
def _choose(best, where, out, spans, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    x = tl.load(best + row * spans + i, mask=i < spans, other=float("-inf"))
    first = tl.min(tl.where((x == tl.max(x, 0)) & (i < spans), i, BLOCK), 0)
    tl.store(out + row, tl.load(where + row * spans + first))


@triton.jit
def _key(x):
    """int64 in the order of the fp32: the bits, and for negative numbers their complement below zero. -0 equals 0."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _above(logits, key, top, floor, vocab, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many logits lie above `key`, or (MASS) the sum of their exp(x - top) where they are at least `floor`."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocab, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < vocab, other=float("-inf"))
        k = _key(x)
        counted = (k > key) & (i < vocab)
        if MASS:
            acc += tl.where(counted & (k >= floor), tl.exp(x - top), 0.0)
        else:
            acc += counted.to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def _filter(logits, top_k, top_p, min_p, out, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    out += row.to(tl.int64) * vocab
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    top = tl.full((), float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(logits + i, mask=i < vocab, other=float("-inf")), 0))
    ceiling = _key(top)
    floor = _key(tl.full((), float("-inf"), tl.float32))
    if k < vocab:
        # The least key with fewer than k above it is the k-th largest logit's.
        low, high = floor, ceiling
        while low < high:
            middle = low + ((high - low) >> 1)
            if _above(logits, middle, top, floor, vocab, False, BLOCK) < k:
                high = middle
            else:
                low = middle + 1
        floor = low
    if p < 1.0:
        # The least key whose better tokens have less than p of the mass.
        wanted = p * _above(logits, floor - 1, top, floor, vocab, True, BLOCK)
        low, high = floor, ceiling
        while low < high:
            middle = low + ((high - low) >> 1)
            if _above(logits, middle, top, floor, vocab, True, BLOCK) < wanted:
                high = middle
            else:
                low = middle + 1
        floor = low
    least = tl.load(min_p + row)
    for begin in range(0, vocab, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < vocab, other=float("-inf"))
        kept = (_key(x) >= floor) & (tl.exp(x - top) >= least)
        tl.store(out + i, tl.where(kept | (x == top), x, float("-inf")), mask=i < vocab)
