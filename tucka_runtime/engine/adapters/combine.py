"""A weighted list of adapters as one, whose change of every linear is the weighted sum of theirs.

At a linear the factors stand one behind the other, U's row by row and E's likewise, times their weights: the core is
block-diagonal. The identity is the block of a constant core, and is not written down (`FoldedAdapter.mixed`). A bank's
member has its core folded into U. The blocks of routed adapters come first, one of them where the kernels put a core;
where one that does not adapt a linear comes before one that does, it has rows of zeros there, so that each block has
its place in all linears. Each has the route that its own router finds.

What an adapter does to the base's own product, y' = s ⊙ y + o, is linear in s - 1 and o.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tucka_runtime.adapters.config_fields import MAX_RANK
from tucka_runtime.engine.adapters.folded import FoldedAdapter, Where
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import AdapterInfo, AdapterKey

PARAM = "adapters"
"""The field of a request that asks for a combination."""

Factors = dict[Where, tuple[Tensor, Tensor]]
"""(U (r, d_in), E (r, d_out)) of each linear."""


@dataclass(frozen=True, eq=False)
class Weighted:
    """One of a combination's adapters: folded, its factors in fp32; the `member` that is meant where it is a bank."""

    folded: FoldedAdapter
    weight: float
    member: int | None = None

    def factors(self) -> Factors:
        """Those of the adapter, with the weight and a member's core in them."""
        own = dict(self.folded.factors)
        if self.folded.bank is not None:
            assert self.member is not None
            cores = self.folded.bank.cores[self.member]
            own = {
                at: (core.T @ u if core.dim() == 2 else core[:, None] * u, e)
                for (at, (u, e)), core in zip(own.items(), cores, strict=True)  # which have one order
            }
        return {at: (u, e * self.weight) for at, (u, e) in own.items()}


def combine(key: AdapterKey, parts: Sequence[Weighted], dtype: torch.dtype) -> FoldedAdapter:
    """The combination, its factors in `dtype`. Raises InvalidRequestError where the adapters cannot be combined."""
    routed = [part for part in parts if part.folded.routed is not None]
    ordered = routed + [part for part in parts if part.folded.routed is None]
    _check(routed, ordered)
    each = [part.factors() for part in ordered]
    affine: dict[Where, Tensor] = {}
    for part in ordered:
        for at, own in part.folded.affine.items():
            before = affine.setdefault(at, torch.stack([torch.ones_like(own[0]), torch.zeros_like(own[1])]))
            affine[at] = before + part.weight * torch.stack([own[0] - 1, own[1]])
    factors = {}
    for at in dict.fromkeys(at for own in each for at in own):
        pairs = [pair for own in _with_zeros(each[: len(routed)], at) + each[len(routed) :] if (pair := own.get(at))]
        factors[at] = (torch.cat([u for u, _ in pairs]).to(dtype), torch.cat([e for _, e in pairs]).to(dtype))
    if max(len(u) for u, _ in factors.values()) > MAX_RANK:
        raise InvalidRequestError(
            f"The ranks of these adapters add up to more than {MAX_RANK} at one linear. Combine fewer.", PARAM
        )
    first, *further = [part.folded.routed for part in routed] or [None]
    combined = FoldedAdapter(key, factors, affine, first, {}, further=tuple(own for own in further if own is not None))
    if not combined.is_finite():
        raise InvalidRequestError("The changes of these adapters overflow with these weights. Choose smaller.", PARAM)
    return combined


def _with_zeros(routed: Sequence[Factors], at: Where) -> list[Factors]:
    """The factors at a linear of the routed adapters, in order: zeros of those that are not there before one that
    is."""
    last = max((i for i, own in enumerate(routed) if at in own), default=-1)
    found: list[Factors] = []
    for own in routed[: last + 1]:
        if at not in own:
            u, e = routed[last][at]
            rank = len(next(iter(own.values()))[0])
            own = {at: (u.new_zeros(rank, u.shape[1]), e.new_zeros(rank, e.shape[1]))}
        found.append(own)
    return found


def _check(routed: Sequence[Weighted], parts: Sequence[Weighted]) -> None:
    routers = [part.folded.routed.router for part in routed if part.folded.routed is not None]
    if len(routers) > 1 and any(router.table is None for router in routers):
        raise InvalidRequestError(
            "Two of these adapters have a router, one of them inside the model. Several are combined where all of them "
            "are at the first layer's query, key or value and the base has rotary positions. Load one of them with a "
            "pinned route.",
            PARAM,
        )
    if len({router.prefix_tokens for router in routers}) > 1:
        raise InvalidRequestError(
            "These adapters are routed by prefixes of different lengths (`route_prefix_tokens`). Load one of them with "
            "a pinned route.",
            PARAM,
        )
    if not all(part.folded.in_deltas for part in parts):
        raise InvalidRequestError(
            "One of these adapters replaces or adapts the embedding, the head, norms or other parameters of the base: "
            "changes of linears alone can be weighted. Leave that adapter out.",
            PARAM,
        )
    for router in routers:
        at = router.at
        if any(site < (at.layer, at.site) for other in parts for site in other.folded.sites):
            raise InvalidRequestError(
                "One of these adapters changes a linear that comes before the router of another, whose route would not "
                "be its own any more. Load the routed one with a pinned route.",
                PARAM,
            )


def describe_combination(combined: FoldedAdapter, seconds: dict[str, float]) -> AdapterInfo:
    """The card of a combination."""
    return AdapterInfo(
        key=combined.key,
        digest="",
        kind="combination",
        r=combined.max_rank,
        k=None,
        t=None,
        p=None,
        alpha=None,
        target_modules=(),
        num_modules=len(combined.factors),
        router=None,
        scope=None,
        bytes=combined.num_bytes,
        training=None,
        load_seconds=seconds,
    )
