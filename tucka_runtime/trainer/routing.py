"""Routing of one adapter while training: from the router module's input to (group, weights), with balancing and counts.

    z = mean over tokens of x          logits = (ec z) as (k, t), each row divided by its L2 norm
    s = sigmoid(logits)                group = argmax over all k·t of s // t          weights = s[group]

(paper, eq. 6-8). `scope` says which tokens share a route:

- "batch": all of the forward's tokens, one route (the paper);
- "request": each row its own route, from its prompt (tokens whose label is -100 where labels are given), kept while
  the row decodes. This is what the server computes under `"route": "request"`.
- "decode": each row's prompt as under "request", and each later token by itself: what the server's `batch` scope
  computes for a request that is alone in it.

Padding never counts: the mask is the model's `attention_mask` argument.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCOPES = ("batch", "request", "decode")


@dataclass(frozen=True)
class Route:
    """group (*lead) int64 and weights (*lead, t), where lead is (1,) for a batch, (B,) for rows, (B, S) for tokens."""

    group: Tensor
    weights: Tensor


def scores(mean: Tensor, centroids: Tensor, k: int) -> Tensor:
    """Scores (*lead, k, t) of means (*lead, d) against centroids (k·t, d)."""
    z = (mean @ centroids.T).unflatten(-1, (k, -1))
    return torch.sigmoid(z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))


def centroid_spread(centroids: Tensor) -> float:
    """Mean distance of the centroids (k·t, d) from their mean, relative to that mean's length."""
    center = centroids.float().mean(dim=0)
    return float((centroids.float() - center).norm(dim=1).mean() / center.norm().clamp_min(1e-12))


class Router:
    """Route and statistics of one adapter; the centroids themselves are a parameter of the router module."""

    def __init__(self, k: int, t: int, gamma: float | None):
        self.k, self.t, self.gamma = k, t, gamma
        self.module = ""  # the router module's name, known once the adapter is injected
        self.scope = "batch"
        self.route: Route | None = None
        self.fresh = False  # has this forward computed its route?
        self.bias = torch.zeros(k)  # balancing: added for the choice of the group only, and only in training
        self.bias_scale = 1.0
        self.reset_statistics()
        self._last_group: int | None
        self._mask: Tensor | None = None
        self._prompt: Tensor | None = None
        self._decoding = False

    def begin(self, mask: Tensor | None, prompt: Tensor | None, decoding: bool) -> None:
        """A forward starts. mask, prompt (B, S) bool or None (all tokens); decoding: the cache holds earlier tokens."""
        self._mask, self._prompt, self._decoding, self.fresh = mask, prompt, decoding, False

    def compute(self, x: Tensor, centroids: nn.Parameter, config: Any, training: bool) -> None:
        """Set the route from the router module's input x (B, S, d) or (B, d), initialising centroids that hold NaN."""
        if self._decoding and self.scope == "request" and self.route is not None:
            self.fresh = True
            return
        h = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        if torch.isnan(centroids.detach()[0, 0]):
            self._initialise(self._mean(h, self._mask, rows=False)[0], centroids, config.ec_perturb_scale)
        s = scores(self._means(h), centroids.to(torch.float32), self.k)
        best = s.detach().amax(dim=-1)
        if training and self.gamma is not None:
            best = best + self.bias.to(best.device) * self.bias_scale
        group = best.argmax(dim=-1)
        weights = s.gather(-2, group[..., None, None].expand(*group.shape, 1, self.t)).squeeze(-2)
        self.route = Route(group, weights)
        if not self.fresh:
            self._record(group, training)
        self.fresh = True

    def _means(self, h: Tensor) -> Tensor:
        if self.scope == "batch":
            return self._mean(h, self._mask, rows=False)
        prompt = self._prompt
        if prompt is not None and self._mask is not None:
            prompt = prompt & self._mask
        rows = self._mean(h, self._mask if prompt is None else prompt, rows=True)
        if self.scope == "request":
            return rows
        if prompt is None:  # no labels: a prefill is all prompt, a decode step stands for itself
            return h.float() if self._decoding else rows
        return torch.where(prompt[..., None], rows[:, None], h.float())

    @staticmethod
    def _mean(h: Tensor, mask: Tensor | None, rows: bool) -> Tensor:
        """Mean of h (B, S, d) over the tokens in mask (B, S): (B, d) for each row, else (1, d) over all."""
        h = h.float()
        dims = (1,) if rows else (0, 1)
        if mask is None:
            mean = h.mean(dim=dims)
        else:
            m = mask.to(h.dtype)[..., None]
            mean = (h * m).sum(dim=dims) / m.sum(dim=dims).clamp_min(1)
        return mean if rows else mean[None]

    def _initialise(self, mean: Tensor, centroids: nn.Parameter, scale: float) -> None:
        """Data-aware: ec[0] = m and ec[i] = m + U(-scale, scale), m the first batch's mean (paper, §3.4)."""
        m = mean.detach()
        noise = torch.rand(centroids.shape[0] - 1, centroids.shape[1]).to(m) - 0.5
        with torch.no_grad():
            centroids[:1] = m
            centroids[1:] = m + noise * 2 * scale

    def _record(self, group: Tensor, training: bool) -> None:
        flat = group.detach().flatten()
        load = torch.bincount(flat, minlength=self.k).cpu()
        self.counts += load
        self.forwards += 1
        if group.numel() == 1:
            if self._last_group is not None:
                self.changes += int(self._last_group != int(flat[0]))
            self._last_group = int(flat[0])
        if training and self.gamma is not None:
            # Auxiliary-loss-free balancing: a group with less than its share gains, one with more loses.
            share = load.float() / load.sum()
            self.bias += self.gamma * torch.sign(share.mean() - share)

    def reset_statistics(self) -> None:
        self.counts = torch.zeros(self.k, dtype=torch.int64)
        self.forwards = self.changes = 0
        self._last_group = None

    def statistics(self) -> dict[str, Any]:
        """Selections of each group, forwards, and how often one forward's group differs from the one before."""
        return {"counts": self.counts.tolist(), "forwards": self.forwards, "changes": self.changes}

    def state_dict(self) -> dict[str, Any]:
        return {"bias": self.bias.clone(), "last_group": self._last_group, **self.statistics()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bias = state["bias"].clone()
        self.counts = torch.tensor(state["counts"])
        self.forwards, self.changes, self._last_group = state["forwards"], state["changes"], state["last_group"]
