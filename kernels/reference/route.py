"""Route: which expert group a segment takes and with which weights (paper, eq. 6-8; design §1)."""

import torch
from torch import Tensor


def select(logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Group and weights from router logits.

    logits (k·t,) fp32, group-major. Each group's t logits are divided by their L2 norm, score = sigmoid; the group that
    holds the best score wins (lowest index on a tie) and its t scores are the weights, not normalised.
    Returns group () int64 and weights (t,) fp32. A group of zero logits scores 0.5 throughout.
    """
    z = logits.view(-1, t)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    scores = torch.sigmoid(z / norm.clamp_min(torch.finfo(torch.float32).tiny))
    group = torch.argmax(scores.view(-1)) // t
    return group, scores.index_select(0, group.view(1)).view(t)


def route_ids(ids: Tensor, table: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Route of a segment from its token ids alone: exact where the router's input is a function of the token.

    ids (n,) int64; table (vocab, k·t) fp32 = router input of each token times the centroids. Logits are linear in the
    mean, so the mean of table rows is the logits of the mean.
    """
    return select(table.index_select(0, ids).mean(dim=0), t)


def route_hidden(x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Route of a segment from its router inputs. x (n, d); centroids (k·t, d) fp32."""
    return select(centroids @ x.float().mean(dim=0), t)
