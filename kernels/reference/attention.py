"""Causal attention over KV blocks with grouped queries and an optional sliding window; softmax in fp32."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tucka_runtime.kernels.reference.int8 import read
from tucka_runtime.kernels.tables.blocks import AttentionMetadata, Decode


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """ops.Attention: decodes of similar length together, prompts one by one."""
    out = torch.empty_like(q)
    for decode in metadata.decodes:
        out.index_copy_(
            0, decode.rows, _decode(q.index_select(0, decode.rows), k_cache, v_cache, decode, metadata, scale, window)
        )
    for prefill in metadata.prefills:
        own = slice(prefill.first, prefill.end)
        count, length = prefill.end - prefill.first, len(prefill.slots)
        k = read(k_cache, prefill.slots).to(q.dtype).transpose(0, 1).unsqueeze(0)
        v = read(v_cache, prefill.slots).to(q.dtype).transpose(0, 1).unsqueeze(0)
        whole = count == length and (window is None or length <= window)
        mask = None if whole else _causal_mask(count, length, window, q.device)
        y = scaled_dot_product_attention(
            q[own].transpose(0, 1).unsqueeze(0), k, v, mask, is_causal=whole, scale=scale, enable_gqa=True
        )
        out[own] = y[0].transpose(0, 1)
    return out


def _causal_mask(count: int, length: int, window: int | None, device: torch.device) -> Tensor:
    distance = torch.arange(length - count, length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    decode: Decode,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query per sequence, all sequences of the bucket in two batched products over gathered blocks."""
    batch, heads, d = q.shape
    kv_heads = k_cache.shape[1]
    longest = decode.slots.shape[1]
    key = (id(decode), kv_heads)
    if key not in metadata.memo:
        # Gathered head by head, so that both products see contiguous (L, D) matrices.
        by_head = decode.slots[:, None, :] * kv_heads + torch.arange(kv_heads, device=q.device)[:, None]
        metadata.memo[key] = by_head.flatten()
    mask_key = (id(decode), "mask", window)
    if mask_key not in metadata.memo:
        ahead = decode.length[:, None] - 1 - torch.arange(longest, device=q.device)
        hidden = (ahead < 0) if window is None else (ahead < 0) | (ahead >= window)
        metadata.memo[mask_key] = torch.zeros(batch, longest, device=q.device).masked_fill_(hidden, float("-inf"))
    # In fp32 whatever the caches' type: bf16 products round scores and probabilities, which doubles attention's error
    # and breaks the promise to be as near to float64 as transformers (1.3 times its error); it costs next to none.
    k = _by_head(k_cache, decode.slots, metadata.memo[key])
    v = _by_head(v_cache, decode.slots, metadata.memo[key])
    scores = torch.bmm(q.float().reshape(batch * kv_heads, heads // kv_heads, d), k.transpose(1, 2))
    scores = torch.add(metadata.memo[mask_key][:, None, None], scores.view(batch, kv_heads, -1, longest), alpha=scale)
    p = torch.softmax(scores, dim=-1)
    return torch.bmm(p.view(batch * kv_heads, -1, longest), v).view(batch, heads, d).to(q.dtype)


def _by_head(cache: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """(B · KV, L, D) fp32 of slots (B, L); `places` are those of their heads in a cache that is nothing but heads."""
    (batch, longest), (kv_heads, d) = slots.shape, cache.shape[1:]
    if cache.dtype == torch.int8:
        found = read(cache, slots.flatten()).view(batch, longest, kv_heads, d).transpose(1, 2)
    else:
        found = cache.view(-1, d).index_select(0, places).float()
    return found.reshape(batch * kv_heads, longest, d)
