"""Random routes, block tables and logits for the kernels, and the float64 oracles they are held to."""

import math
from collections.abc import Callable

import torch

from tests.support.delta_cases import relative
from tucka_runtime.kernels.ops import Attention
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan

LIMIT = 1e-5


def route64(logits: torch.Tensor, t: int) -> tuple[int, torch.Tensor, float]:
    """Group, weights and the margin of the winner over the best score of any other group, in float64."""
    z = logits.double().view(-1, t)
    length = z.norm(dim=1, keepdim=True)
    scores = torch.sigmoid(torch.where(length > 0, z / length, torch.zeros_like(z)))
    best = scores.max(dim=1).values
    group = int(best.argmax())
    rest = torch.cat([best[:group], best[group + 1 :]])
    return group, scores[group], float(best[group] - rest.max()) if len(rest) else math.inf


def check_route(got: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor, t: int) -> None:
    group, weights, margin = route64(logits, t)
    if margin >= 1e-4:
        assert int(got[0]) == group
        assert relative(got[1][0], weights) <= LIMIT
    assert got[0].dtype == torch.int64 and got[0].shape == (1,) and got[1].shape == (1, t)


def routed(k: int, t: int, vocab: int = 1, modules: int = 1, p: int = 1, r: int = 1) -> CoreParts:
    """What a random adapter's routes and cores are made of."""
    slots = torch.arange(modules) * 2 % 5
    return CoreParts(torch.randn(modules, t, p), torch.randn(modules, k, p, r, r), slots, torch.randn(vocab, k * t))


def check_routes(route_ids: Callable[[RoutePlan], None], shapes: list[tuple[int, int, int]], vocab: int) -> None:
    """Segments of any shapes (k, t, tokens) in one go, and one among them whose route is known."""
    known = 3, [0.25, 0.5]
    adapters = [routed(4, 2, vocab), *(routed(k, t, vocab) for k, t, _ in shapes)]
    ids = [None, *(torch.randint(0, vocab, (n,)) for _, _, n in shapes)]
    plan = RoutePlan.build(adapters, range(len(ids)), ids, [known, *[None] * len(shapes)], torch.get_default_device())
    route_ids(plan)
    assert plan.groups[0] == known[0] and plan.weights[0, :2].tolist() == known[1]
    for s, (adapter, own) in enumerate(zip(adapters, ids, strict=True)):
        if own is not None:
            assert adapter.table is not None
            got = plan.groups[s : s + 1], plan.weights[s : s + 1, : adapter.t]
            check_route(got, adapter.table.double()[own].mean(0), adapter.t)


SPANS = {
    "one-decode": ([(1, 1)], 4),
    "decodes-of-two-buckets": ([(1, 3), (1, 300), (1, 17)], 16),
    "whole-prompt": ([(9, 9)], 4),
    "chunk-of-a-prompt": ([(5, 12)], 4),
    "mixed": ([(1, 5), (4, 4), (1, 30), (6, 21), (2, 2)], 8),
}


def shuffled(spans: list[tuple[int, int]], block: int) -> tuple[AttentionMetadata, list[list[int]], int]:
    """A plan for (rows, context) sequences whose blocks are shuffled; the slots of each; the number of rows."""
    need = [-(-length // block) for _, length in spans]
    order = torch.randperm(sum(need), generator=torch.Generator("cpu").manual_seed(1), device="cpu").tolist()
    tables = [[order.pop() for _ in range(n)] for n in need]
    slots = [[t[i // block] * block + i % block for i in range(n)] for t, (_, n) in zip(tables, spans, strict=True)]
    full, row = [], 0
    for count, length in spans:
        full.append((row, count, length))
        row += count
    return AttentionMetadata.build(full, tables, block, torch.get_default_device()), slots, row


def filtered64(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that stay, from the definition, one by one."""
    ids = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    border = float(logits[ids[min(top_k, len(ids)) - 1]])
    ids = [i for i in ids if float(logits[i]) >= border]
    p = torch.softmax(logits[ids].double(), 0)
    kept, before = {ids[0]}, float(p[0])
    for i, mass in zip(ids[1:], p[1:].tolist(), strict=True):
        if before < top_p and mass >= min_p * float(p[0]):
            kept.add(i)
        before += mass
    return kept


def caches(slots_of: list[list[int]], block: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys and values: random where a sequence has a token, NaN elsewhere."""
    used = torch.tensor([slot for own in slots_of for slot in own])
    size = (int(used.max()) // block + 1) * block
    out = [torch.full((size, kv_heads, d), math.nan, dtype=dtype) for _ in "kv"]
    for cache in out:
        cache[used] = torch.randn(len(used), kv_heads, d).to(dtype)
    return out


def check_contexts_alone(attention: Attention) -> None:
    """What a decoding sequence attends to does not depend on what else is in the batch, bit for bit."""
    spans = [(1, 100), (1, 70)]
    plan, slots_of, total = shuffled(spans, 16)
    k, v = caches(slots_of, 16, 1, 8, torch.float32)
    q = torch.randn(total, 2, 8)
    both = attention(q, k, v, plan, 0.3)
    tables = [[s // 16 for s in own[::16]] for own in slots_of]
    for i, (_, length) in enumerate(spans):
        alone = type(plan).build([(0, 1, length)], [tables[i]], 16, torch.get_default_device())
        assert torch.equal(attention(q[i : i + 1], k, v, alone, 0.3)[0], both[i])
