"""Routing of one adapter while training: from the router module's input to (group, weights), with balancing and counts.

    z = mean over tokens of x          logits = (ec z) as (k, t), each row divided by its L2 norm
    s = sigmoid(logits)                group = argmax over all k·t of s // t          weights = s[group]

(paper, eq. 6-8). `scope` says which tokens share a route:

- "batch": all of the forward's tokens, one route (the paper);
- "request": each row its own route, from its prompt (where labels are given, the tokens before the first whose label is
  not -100), kept while the row decodes. This is what the server computes under `"route": "request"`.
- "prefix": the same from the first `prefix_tokens` tokens of its prompt, as under `"route": "prefix"`;
- "decode": each row's prompt as under "request", and each later token by itself: what the server's `batch` scope
  computes for a request that is alone in it.

Padding never counts: the mask is the model's `attention_mask` argument.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tucka_runtime.messages import ROUTE_PREFIX_TOKENS

SCOPES = ("batch", "request", "prefix", "decode")


@dataclass(frozen=True)
class TrainingRoute:
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


@dataclass
class Forward:
    """What routing knows of one forward of the model; gradient checkpointing needs it again in the backward.

    mask, prompt (B, S) bool or None (all tokens). decoding: the cache holds earlier tokens. bias: the balancing bias as
    it was when the forward began. once: only the first of the router module's calls routes. calls: how many there were,
    and each: how many a whole forward makes, known when it is over. fresh: there is a route. learns: the centroids are
    trained.
    """

    mask: Tensor | None
    prompt: Tensor | None
    decoding: bool
    bias: Tensor
    route: TrainingRoute | None = None
    once: bool = False
    calls: int = 0
    each: int = 0
    fresh: bool = False
    learns: bool = False


class TrainingRouter:
    """TrainingRoute and statistics of one adapter; the centroids themselves are a parameter of the router module."""

    def __init__(self, k: int, t: int, gamma: float | None):
        self.k, self.t, self.gamma = k, t, gamma
        self.module = ""  # the router module's name, known once the adapter is injected
        self.scope = "batch"
        self.prefix_tokens = ROUTE_PREFIX_TOKENS
        self.bias = torch.zeros(k)  # balancing: added for the choice of the group only, and only in training
        self.bias_scale = 1.0
        self.reset_statistics()
        self._last_group: int | None
        self.current = Forward(None, None, False, self.bias)

    @property
    def route(self) -> TrainingRoute | None:
        """The last route that was computed."""
        return self.current.route

    def begin(self, mask: Tensor | None, prompt: Tensor | None, decoding: bool) -> None:
        """A forward of the whole model starts; the arguments are Forward's."""
        self.current = Forward(mask, prompt, decoding, self.bias, self.route, once=True)

    def end(self) -> None:
        """The forward is over. Parts of the model that are called by themselves route at every call."""
        self.current.each, self.current.calls = self.current.calls, 0
        self.current = Forward(None, None, False, self.bias, self.route, fresh=self.current.fresh)

    def compute(self, x: Tensor, centroids: nn.Parameter, config: Any, training: bool) -> None:
        """Set the route from the router module's input x (B, S, d) or (B, d), initialising centroids that hold NaN."""
        now = self.current
        index = now.calls % now.each if now.each else now.calls
        now.calls += 1
        if now.once and index:  # DeBERTa's query projection sees the relative positions too
            return
        if now.decoding and self.scope in ("request", "prefix") and now.route is not None:
            now.fresh = True
            return
        h = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        if torch.isnan(centroids.detach()[0, 0]):
            self._initialise(self._mean(h.detach(), now.mask, rows=False)[0], centroids, config.ec_perturb_scale)
        with torch.autocast(h.device.type, enabled=False):  # as in serving, routes are fp32
            s = scores(self._means(h), centroids.to(torch.float32), self.k)
        best = s.detach().amax(dim=-1)
        if training and self.gamma is not None:
            best = best + now.bias.to(best.device) * self.bias_scale
        group = best.argmax(dim=-1)
        weights = s.gather(-2, group[..., None, None].expand(*group.shape, 1, self.t)).squeeze(-2)
        now.route = TrainingRoute(group, weights)
        if not now.fresh:
            self._record(group, training)
        now.fresh, now.learns = True, centroids.requires_grad

    def _means(self, h: Tensor) -> Tensor:
        mask, prompt = self.current.mask, self.current.prompt
        if self.scope == "batch":
            return self._mean(h, mask, rows=False)
        if prompt is not None and mask is not None:
            prompt = prompt & mask
        counted = mask if prompt is None else prompt
        if self.scope == "prefix":
            counted = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if counted is None else counted
            counted = counted & (counted.cumsum(1) <= self.prefix_tokens)
        rows = self._mean(h, counted, rows=True)
        if self.scope in ("request", "prefix"):
            return rows
        if prompt is None:  # no labels: a prefill is all prompt, a decode step stands for itself
            return h.float() if self.current.decoding else rows
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
        """Data-aware: ec[0] = m and ec[i] = m + U(-scale, scale), m the first batch's mean (paper, §3.4).

        The random generator is left as it was: a recomputation, which does not come here, must draw the same dropout.
        """
        with torch.random.fork_rng(devices=[]):
            noise = torch.rand(centroids.shape[0] - 1, centroids.shape[1]).to(mean) - 0.5
        with torch.no_grad():
            centroids[:1] = mean
            centroids[1:] = mean + noise * 2 * scale

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
            self.bias = self.bias + self.gamma * torch.sign(share.mean() - share)

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
