"""Causal attention over KV blocks with grouped queries and an optional sliding window. Contract: ops.Attention.

Sequences of one row and sequences of several take a kernel each, over the same softmax (attend.py).
"""

import torch
from torch import Tensor

from tucka_runtime.kernels.fused.attention_decode import cut, decode
from tucka_runtime.kernels.fused.attention_prompt import prefill, prompt_blocks
from tucka_runtime.kernels.tables.blocks import AttentionMetadata


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """ops.Attention."""
    out = torch.empty_like(q)
    d, size = q.shape[2], q.element_size()
    how = cut(len(metadata.singles), k_cache.shape[1], d, size, k_cache.dtype == torch.int8)
    decode(q, k_cache, v_cache, out, metadata, scale, window, how)
    prefill(q, k_cache, v_cache, out, metadata, scale, window, *prompt_blocks(d, size))
    return out
