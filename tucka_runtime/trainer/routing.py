"""Routing of one adapter while training: from the router module's input to (group, weights), with balancing and counts.

    z = mean over tokens of x          logits = (ec z) as (k, t), each row divided by its L2 norm
    s = sigmoid(logits)                group = argmax over all k·t of s // t          weights = s[group]

(paper, eq. 6-8). `scope` says which tokens share a route:

- "batch": all of the forward's tokens, one route (the paper);
- "request": each row its own route, from its prompt (where labels are given, the tokens before the first whose label is
  not UNLEARNT), kept while the row decodes. This is what the server computes under `"route": "request"`.
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

UNLEARNT = -100
"""The label of a token that is not learnt, as PyTorch's cross-entropy has it."""


@dataclass(frozen=True)
class TrainingRoute:
    """group (*lead) int64 and weights (*lead, t), where lead is (1,) for a batch, (B,) for rows, (B, S) for tokens."""

    group: Tensor
    weights: Tensor


def scores(mean: Tensor, centroids: Tensor, k: int) -> Tensor:
    """Scores (*lead, k, t) of means (*lead, d) against centroids (k·t, d)."""
    z = (mean @ centroids.T).unflatten(-1, (k, -1))
    return torch.sigmoid(z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))


def _record_means(h: Tensor, counted: Tensor | None, records: Tensor) -> Tensor:
    """Means (n, d) of the counted tokens of h (B, S, d), one of each of the n records."""
    weight = (torch.ones_like(records) if counted is None else counted).flatten().to(torch.float32)
    of, count = records.flatten(), int(records.max()) + 1
    sums = h.new_zeros((count, h.shape[-1]), dtype=torch.float32)
    sums = sums.index_add(0, of, h.float().flatten(0, 1) * weight[:, None])
    return sums / weight.new_zeros(count).index_add(0, of, weight).clamp_min(1)[:, None]


def packed_records(positions: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """What rows that hold several records say of them, as transformers tells them apart: by positions (B, S) that begin
    anew. (records, mask, prompt) as Forward has them; None where each row is one record.

    Records that have no label are padding, where labels (B, S) are given; they are counted as of record 0 and masked.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if not begins[:, 1:].any():
        return None
    of = begins.flatten().cumsum(0) - 1
    if labels is None:
        return of.view(positions.shape), torch.ones_like(begins), None
    learnt = (labels != UNLEARNT).flatten().long()
    counts = learnt.new_zeros(int(of.max()) + 1).index_add(0, of, learnt)
    real = counts > 0
    prompt = learnt.cumsum(0) == (counts.cumsum(0) - counts)[of]
    number = (real.cumsum(0) - 1).clamp_min(0)
    mask = real[of]
    records = torch.where(mask, number[of], 0)
    return records.view(positions.shape), mask.view(positions.shape), (prompt & mask).view(positions.shape)


def centroid_spread(centroids: Tensor) -> float:
    """Mean distance of the centroids (k·t, d) from their mean, relative to that mean's length."""
    center = centroids.float().mean(dim=0)
    return float((centroids.float() - center).norm(dim=1).mean() / center.norm().clamp_min(1e-12))


@dataclass
class Forward:
    """What routing knows of one forward of the model; gradient checkpointing needs it again in the backward.

    mask, prompt (B, S) bool or None (all tokens). records (B, S) int64: which record a token is of, where rows hold
    several, else None. decoding: the cache holds earlier tokens. bias: the balancing bias as it was when the forward
    began. once: only the first of the router module's calls routes. calls: how many there were,
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
    records: Tensor | None = None


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

    def begin(
        self,
        mask: Tensor | None,
        prompt: Tensor | None,
        decoding: bool,
        records: Tensor | None = None,
        encoded: int | None = None,
    ) -> None:
        """A forward of the whole model starts; the arguments are Forward's. `encoded`: the rows of what an encoder made
        before, if one did. Its route is this forward's, and a row's that of all its beams; where the rows do not come
        out even they are not those that were routed, and there is none."""
        route = self.route
        fresh = encoded is not None and route is not None and encoded % len(route.group) == 0
        if fresh and encoded and route is not None and len(route.group) not in (1, encoded):
            beams = encoded // len(route.group)
            route = TrainingRoute(route.group.repeat_interleave(beams, 0), route.weights.repeat_interleave(beams, 0))
        self.current = Forward(mask, prompt, decoding, self.bias, route, once=True, fresh=fresh, records=records)

    def end(self) -> None:
        """The forward is over. Parts of the model that are called by themselves route at every call."""
        self.current.each, self.current.calls = self.current.calls, 0
        self.current = Forward(None, None, False, self.bias, self.route, fresh=self.current.fresh)

    def compute(self, x: Tensor, centroids: nn.Parameter, config: Any, training: bool) -> None:
        """Set the route from the router module's input x (B, S, d) or (B, d), initialising centroids that are zero."""
        now = self.current
        index = now.calls % now.each if now.each else now.calls
        now.calls += 1
        if now.once and index:  # DeBERTa's query projection sees the relative positions too
            return
        if now.decoding and self.scope in ("request", "prefix") and now.route is not None:
            now.fresh = True
            return
        h = x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        if not centroids.detach().any():
            self._initialise(self._mean(h.detach(), now.mask, rows=False)[0], centroids, config.ec_perturb_scale)
        with torch.autocast(h.device.type, enabled=False):  # as in serving, routes are fp32
            s = scores(self._means(h), centroids.to(torch.float32), self.k)
        best = s.detach().amax(dim=-1)
        if training and self.gamma is not None:
            best = best + now.bias.to(best.device) * self.bias_scale
        group = best.argmax(dim=-1)
        weights = s.gather(-2, group[..., None, None].expand(*group.shape, 1, self.t)).squeeze(-2)
        if not now.fresh:
            counted = group if group.ndim == 1 or now.mask is None else group[now.mask]
            self._record(counted, training)
        if now.records is not None and group.ndim == 1 and self.scope != "batch":
            group, weights = group[now.records], weights[now.records]
        now.route = TrainingRoute(group, weights)
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
            counted = counted & (self._place(counted) <= self.prefix_tokens)
        records = self.current.records
        rows = self._mean(h, counted, rows=True) if records is None else _record_means(h, counted, records)
        if self.scope in ("request", "prefix"):
            return rows
        if prompt is None:  # no labels: a prefill is all prompt, a decode step stands for itself
            return h.float() if self.current.decoding else rows
        return torch.where(prompt[..., None], rows[:, None] if records is None else rows[records], h.float())

    def _place(self, counted: Tensor) -> Tensor:
        """The how-manieth of its row's, or its record's, counted tokens each token (B, S) is, from 1."""
        records = self.current.records
        if records is None:
            return counted.cumsum(1)
        place, of = counted.flatten().cumsum(0), records.flatten()
        own = torch.zeros(int(of.max()) + 1, dtype=place.dtype, device=place.device)
        own = own.index_add(0, of, counted.flatten().to(place.dtype))
        return (place - (own.cumsum(0) - own)[of]).view(counted.shape)

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
        """Counts the groups that were chosen, those of padding left out, and moves the balancing bias."""
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
            share = load.float() / load.sum().clamp_min(1)
            self.bias = self.bias + self.gamma * torch.sign(share.mean() - share)

    def groups(self, rows: int) -> list[int]:
        """The group that each of a forward's rows was given first, once it has been routed."""
        assert self.route is not None
        group = self.route.group
        found: list[int] = (group[:, 0] if group.ndim == 2 else group.expand(rows)).tolist()
        return found

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
        self.bias = state["bias"].cpu().clone()  # a checkpoint may have been read onto the device
        self.counts = torch.tensor(state["counts"])
        self.forwards, self.changes, self._last_group = state["forwards"], state["changes"], state["last_group"]
