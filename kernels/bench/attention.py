"""Attention, decoding and prompts: against torch's own on gathered keys and values (the gathering not timed)."""

from collections.abc import Iterator
from itertools import product

import torch
from torch.nn.functional import scaled_dot_product_attention

from tucka_runtime.kernels.bench.shapes import BLOCK, Measurement, blocks
from tucka_runtime.kernels.bench.timing import Call, Case
from tucka_runtime.kernels.tables.blocks import AttentionMetadata


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every number of decoding rows at every context, and every prompt."""
    for rows in sweep.rows:
        for context in sweep.contexts:
            yield _case(sweep, rows, context, decoding=True)
    for rows in sweep.prompts:
        yield _case(sweep, rows, rows, decoding=False)


def _case(sweep: Measurement, rows: int, context: int, decoding: bool) -> Case:
    shape, size = sweep.shape, sweep.dtype.itemsize
    sequences = rows if decoding else 1
    moved = size * (sequences * context * 2 * shape.kv + 2 * rows * shape.q)

    def make(seed: int) -> dict[str, Call]:
        q, k, v, plan = _tensors(sweep, rows, context, decoding, seed)
        scale = shape.head**-0.5
        # (sequences, heads, rows or context, D), contiguous: as good as it gets for torch's kernel.
        q_all = (q[:, :, None] if decoding else q.transpose(0, 1)[None]).contiguous()
        k_all, v_all = (
            c[: sequences * context].view(sequences, context, shape.kv_heads, shape.head).transpose(1, 2).contiguous()
            for c in (k, v)
        )
        return {
            "own": lambda: sweep.ops.attention(q, k, v, plan, scale),
            "torch": lambda: scaled_dot_product_attention(
                q_all, k_all, v_all, is_causal=not decoding, scale=scale, enable_gqa=True
            ),
        }

    label: dict[str, int | str] = {"kind": "decode" if decoding else "prompt", "rows": rows, "context": context}
    return Case("attention", label, moved, make)


def variants(sweep: Measurement) -> Iterator[Case]:
    """Blocks of a prompt, on a GPU alone: what `fused.attention_prompt.prompt_blocks` should say."""
    for rows in sweep.prompts:
        for block_m, block_n in product((64, 128), (32, 64, 128)):
            yield _prompt_variant(sweep, rows, block_m, block_n, None)
        yield _prompt_variant(sweep, rows, 128, 32, 128)


def _prompt_variant(sweep: Measurement, rows: int, block_m: int, block_n: int, registers: int | None) -> Case:
    from tucka_runtime.kernels.fused.attention_prompt import prefill

    case = _case(sweep, rows, rows, decoding=False)

    def make(seed: int) -> dict[str, Call]:
        q, k, v, plan = _tensors(sweep, rows, rows, False, seed)
        out, scale = torch.empty_like(q), sweep.shape.head**-0.5
        return {"own": lambda: prefill(q, k, v, out, plan, scale, None, block_m, block_n, registers)}

    label = {**case.shape, "block_m": block_m, "block_n": block_n, "registers": registers or "any"}
    return Case(case.op, label, case.moved, make)


def _tensors(
    sweep: Measurement, rows: int, context: int, decoding: bool, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata]:
    """q (T, H, D), caches (slots, KV, D) and the blocks of `rows` sequences, or of one."""
    torch.manual_seed(seed)
    shape = sweep.shape
    slots = -(-context // BLOCK) * BLOCK * (rows if decoding else 1)
    k, v = (torch.randn(slots, shape.kv_heads, shape.head, device=sweep.device).to(sweep.dtype) for _ in "kv")
    q = torch.randn(rows, shape.heads, shape.head, device=sweep.device).to(sweep.dtype)
    return q, k, v, blocks(rows, context, decoding, sweep.device)
