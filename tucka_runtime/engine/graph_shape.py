"""What a graph of a step was captured for, and which batches it can run."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.kernels.tables.segments import power_of_2


class Limits(NamedTuple):
    """What no adapter of a batch exceeds, rounded up to powers of two so that few adapters make others."""

    rank: int = 16
    core_rank: int = 16
    k: int = 4
    t: int = 4

    @staticmethod
    def of(adapters: Iterable[FoldedAdapter]) -> "Limits":
        """The least that hold for all of them."""
        limits = Limits()
        for folded in adapters:
            parts = folded.routed.parts if folded.routed else None
            limits = Limits(
                max(limits.rank, power_of_2(folded.max_rank)),
                max(limits.core_rank, power_of_2(folded.core_rank)),
                max(limits.k, power_of_2(parts.k if parts else 0)),
                max(limits.t, power_of_2(parts.t if parts else 0)),
            )
        return limits


class Needs(NamedTuple):
    """What a batch of some adapters wants of a graph, whatever its rows."""

    kinds: frozenset[int] = frozenset()
    limits: Limits = Limits()
    affine: bool = False

    @staticmethod
    def of(adapters: Collection[FoldedAdapter]) -> "Needs":
        kinds = frozenset(site for folded in adapters for _, site in folded.sites)
        return Needs(kinds, Limits.of(adapters), any(folded.affine for folded in adapters))


@dataclass(frozen=True)
class GraphShape:
    """What a graph was captured for: rows, the sites of a layer with adapters, the limits of those, whether any of
    them changes the base's own products, and whether rows may be those of prompts."""

    rows: int
    kinds: frozenset[int] = frozenset()
    limits: Limits = Limits()  # noqa: RUF009 (it cannot be changed)
    affine: bool = False
    prompts: bool = False

    def serves(self, other: "GraphShape") -> bool:
        """Whether a graph of this shape can run a batch of the other. One with prompts could run a decoding batch, but
        has many times as many rows."""
        within = all(mine >= theirs for mine, theirs in zip(self.limits, other.limits, strict=True))
        alike = self.prompts == other.prompts and self.affine >= other.affine
        return alike and self.rows >= other.rows and self.kinds >= other.kinds and within

    @property
    def cost(self) -> tuple[object, ...]:
        """The order in which those that can are taken: rows are what costs most, then sites, then ranks."""
        return self.rows, len(self.kinds), self.limits, self.affine
