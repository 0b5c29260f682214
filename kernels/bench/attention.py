"""Paged attention, decoding and prompts: against torch's own on gathered keys and values (the gathering not timed)."""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from tucka_runtime.kernels.bench.shapes import PAGE, Sweep, pages
from tucka_runtime.kernels.bench.timing import Call, Case


def cases(sweep: Sweep) -> Iterator[Case]:
    """Every number of decoding rows at every context, and every prompt."""
    for rows in sweep.rows:
        for context in sweep.contexts:
            yield _case(sweep, rows, context, decoding=True)
    for rows in sweep.prompts:
        yield _case(sweep, rows, rows, decoding=False)


def _case(sweep: Sweep, rows: int, context: int, decoding: bool) -> Case:
    shape, size = sweep.shape, sweep.dtype.itemsize
    sequences = rows if decoding else 1
    moved = size * (sequences * context * 2 * shape.kv + 2 * rows * shape.q)

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        plan = pages(rows, context, decoding, sweep.device)
        slots = -(-context // PAGE) * PAGE * sequences
        k, v = (torch.randn(slots, shape.kv_heads, shape.head, device=sweep.device).to(sweep.dtype) for _ in "kv")
        q = torch.randn(rows, shape.heads, shape.head, device=sweep.device).to(sweep.dtype)
        scale = shape.head**-0.5
        # (sequences, heads, rows or context, D), contiguous: as good as it gets for torch's kernel.
        q_all = (q[:, :, None] if decoding else q.transpose(0, 1)[None]).contiguous()
        k_all, v_all = (
            c[: sequences * context].view(sequences, context, shape.kv_heads, shape.head).transpose(1, 2).contiguous()
            for c in (k, v)
        )
        return {
            "own": lambda: sweep.ops.attention.attention(q, k, v, plan, scale),
            "torch": lambda: scaled_dot_product_attention(
                q_all, k_all, v_all, is_causal=not decoding, scale=scale, enable_gqa=True
            ),
        }

    label: dict[str, int | str] = {"kind": "decode" if decoding else "prompt", "rows": rows, "context": context}
    return Case("attention", label, moved, make)
