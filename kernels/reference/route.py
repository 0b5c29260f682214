"""Route: which expert group a segment takes and with which weights (docs/architecture.md)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def select(logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Groups and weights from router logits.

    logits (S, k·t) fp32, group-major. Each group's t logits are divided by their L2 norm, score = sigmoid; the group
    that holds the best score wins (lowest index on a tie) and its t scores are the weights, not normalised.
    Returns groups (S,) int64 and weights (S, t) fp32. A group of zero logits scores 0.5 throughout.
    """
    z = logits.view(logits.shape[0], -1, t)
    norm = torch.linalg.vector_norm(z, dim=2, keepdim=True)
    scores = torch.sigmoid(z / norm.clamp_min(torch.finfo(torch.float32).tiny))
    groups = torch.argmax(scores.flatten(1), dim=1) // t
    return groups, scores.gather(1, groups[:, None, None].expand(-1, 1, t)).squeeze(1)


def route_ids(ids: Sequence[Tensor], tables: Sequence[Tensor], t: int) -> tuple[Tensor, Tensor]:
    """Routes of S segments from their token ids alone: exact where the router's input is a function of the token.

    ids: S tensors (n_s,) int64; tables: S tensors (vocab, k·t) fp32, router input of each token times the centroids,
    all of the same k and t. Logits are linear in the mean, so the mean of table rows is the logits of the mean.
    """
    means = [table.index_select(0, own).mean(dim=0) for own, table in zip(ids, tables, strict=True)]
    return select(torch.stack(means), t)


def route_hidden(x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Route of one segment from its router inputs. x (n, d); centroids (k·t, d) fp32. Returns (1,) and (1, t)."""
    return select((centroids @ x.float().mean(dim=0))[None], t)
