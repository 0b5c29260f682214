"""Core: the routed (r, r) matrix between shrink and expand, for all modules of many segments (docs/architecture.md)."""

import torch
from torch import Tensor


def core(
    c: Tensor, g: Tensor, member: Tensor, groups: Tensor, weights: Tensor, modules: Tensor, rows: Tensor, out: Tensor
) -> None:
    """out[rows[s], modules[m], :r, :r] = Σ_j w_j G[a, m, groups[s], j] with w_j = Σ_i weights[s, i] C[a, m, i, j] and
    a = member[s].

    A adapters of one shape: c (A, M, t, p), g (A, M, k, p, r, r) fp32, both normalised. S segments: member (S,) int64
    of them, groups (S,) int64, weights (S, t) fp32, rows (S,) int64 of out (·, N, R, R), R >= r; modules (M,) int64 of
    its N. M is linear in the p slices, so t experts cost p products.
    """
    m, _, p, r, _ = g.shape[1:]
    count = len(rows)
    w = torch.matmul(weights[:, None, None, :], c.index_select(0, member))  # (S, M, 1, p)
    slices = g[member, :, groups].view(count * m, p, r * r)
    cores = torch.bmm(w.view(count * m, 1, p), slices).view(count, m, r, r)
    out[rows[:, None], modules[None, :], :r, :r] = cores.to(out.dtype)
