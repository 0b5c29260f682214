"""Core: the routed (r, r) matrix between shrink and expand, for all modules of an adapter at once (design §1)."""

import torch
from torch import Tensor


def core(c: Tensor, g: Tensor, group: Tensor, weights: Tensor, modules: Tensor, out: Tensor) -> None:
    """out[modules[m], :r, :r] = Σ_j w_j G[m, group, j] with w_j = Σ_i weights_i C[m, i, j].

    c (M, t, p), g (M, k, p, r, r) fp32, both normalised; group () int64, weights (t,) fp32; modules (M,) int64 rows of
    out (N, R, R), R >= r. M is linear in the p slices, so t experts cost p products.
    """
    m, _, p, r, _ = g.shape
    w = torch.matmul(weights, c)  # (M, p)
    slices = g.index_select(1, group.view(1)).view(m, p, r * r)
    cores = torch.bmm(w.unsqueeze(1), slices).view(m, r, r)
    out[:, :r, :r].index_copy_(0, modules, cores.to(out.dtype))
