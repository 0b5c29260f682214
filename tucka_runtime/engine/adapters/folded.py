"""Adapters as they are served: folded factors, and what routed cores are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tucka_runtime.kernels.tables import transfer
from tucka_runtime.kernels.tables.routes import CoreParts
from tucka_runtime.messages import AdapterKey


@dataclass(frozen=True)
class Where:
    """A linear of the decoder: layer, site within it, target within that."""

    layer: int
    site: int
    target: int


@dataclass(frozen=True, eq=False)
class FoldedRouter:
    """Where an adapter is routed: centroids (k·t, d) fp32, and, where the router's input is a function of the token
    alone, their products with every token's input as a table (vocab, k·t) fp32. `prefix_tokens` tokens of a prompt
    route it under the scope "prefix"."""

    at: Where
    t: int
    centroids: Tensor
    table: Tensor | None
    prefix_tokens: int


@dataclass(frozen=True, eq=False)
class TuckACores:
    """What cores are made of: g (M, k, p, r, r) and c (M, t, p) of the M adapted linears, normalised; `linears` (M,)
    int64 are their numbers (Architecture.first_linear), by which a segment's cores are kept."""

    linears: Tensor
    g: Tensor
    c: Tensor
    router: FoldedRouter

    @cached_property
    def parts(self) -> CoreParts:
        return CoreParts(self.c, self.g, self.linears, self.router.table)


@dataclass(frozen=True, eq=False)
class BankCores:
    """The cores of a bank's N members, in the factors' type: cores (N, M, r, r) of the M adapted linears, or (N, M, r)
    where they are diagonal; `linears` (M,) as in TuckACores."""

    linears: Tensor
    cores: Tensor

    @property
    def rank(self) -> int:
        return self.cores.shape[-1]

    def write(self, members: list[int], rows: list[int], out: Tensor) -> None:
        """Puts the cores of members where segments take theirs from: rows of out (C, every linear, R, R)."""
        chosen, place = transfer.place([torch.tensor(members), torch.tensor(rows)], out.device)
        own = self.cores.index_select(0, chosen)
        own = torch.diag_embed(own) if own.dim() == 3 else own
        beside = out.shape[-1] - self.rank
        out[place[:, None], self.linears] = torch.nn.functional.pad(own, [0, beside, 0, beside])


@dataclass(frozen=True, eq=False)
class FoldedTable:
    """What an adapter changes of the embedding or of the head, a table (vocab, d), row by row.

    Of `factors` (U (vocab, r), E (r, d)) a row u gets u E; before that `affine`, (2, d) of an embedding and (2, vocab)
    of a head, fp32, scales and offsets what the base's table gives; `rows`, ids (n,) int64, ascending, and values
    (n, d), replace theirs.
    """

    factors: tuple[Tensor, Tensor] | None = None
    affine: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None

    def embed(self, x: Tensor, ids: Tensor) -> Tensor:
        """Of the base's embeddings x (T, d) of tokens ids (T,), the adapter's."""
        out = x.float()
        if self.affine is not None:
            out = out * self.affine[0] + self.affine[1]
        if self.factors is not None:
            u, e = self.factors
            out = out + (u.index_select(0, ids) @ e).float()
        if self.rows is not None:
            own, values = self.rows
            at = torch.searchsorted(own, ids).clamp(max=len(own) - 1)
            out = torch.where((own[at] == ids)[:, None], values[at].float(), out)
        return out.to(x.dtype)

    def logits(self, out: Tensor, hidden: Tensor) -> Tensor:
        """Of the base's logits out (N, vocab) fp32 of hidden states (N, d), the adapter's."""
        if self.affine is not None:
            out = out * self.affine[0] + self.affine[1]
        if self.factors is not None:
            u, e = self.factors
            out = out + (hidden.to(e.dtype) @ e.T @ u.T).float()
        if self.rows is not None:
            own, values = self.rows
            out = out.index_copy(1, own, (hidden @ values.T).float())
        return out

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        own = [*(self.factors or ()), *(self.rows or ())]
        return own if self.affine is None else [*own, self.affine]


@dataclass(frozen=True, eq=False)
class FoldedAdapter:
    """An adapter in the serving form. `factors` has (U (r, d_in), E (r, d_out)) of each adapted linear, `affine` what
    it changes of the base's own product there, scale and offset (2, d_out) fp32, where it does; `routed` and `bank` are
    None where the core is constant; `saved` replaces parameters of the base by name, and `tables` change its embedding
    or its head, by their paths. `further` are the routed cores of a combination with several (combine.py): at each
    linear their blocks lie behind that of `routed`, in order. `vocab_size` is that of its own vocabulary, whose
    embedding and head are in `saved`; None where it has the base's."""

    key: AdapterKey
    factors: Mapping[Where, tuple[Tensor, Tensor]]
    affine: Mapping[Where, Tensor]
    routed: TuckACores | None
    saved: Mapping[str, Tensor]
    tables: Mapping[str, FoldedTable] = field(default_factory=dict)
    bank: BankCores | None = None
    further: tuple[TuckACores, ...] = ()
    vocab_size: int | None = None

    @property
    def all_routed(self) -> tuple[TuckACores, ...]:
        """All that is routed."""
        return (self.routed, *self.further) if self.routed is not None else ()

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        tensors = [t for pair in self.factors.values() for t in pair]
        tensors += [*self.affine.values(), *self.saved.values()]
        tensors += [t for table in self.tables.values() for t in table.tensors()]
        for routed in self.all_routed:
            tensors += [routed.g, routed.c, routed.linears, routed.router.centroids]
            tensors += [] if routed.router.table is None else [routed.router.table]
        if self.bank is not None:
            tensors += [self.bank.linears, self.bank.cores]
        return tensors

    def is_finite(self) -> bool:
        """Whether no value has overflowed. 0 · inf is NaN: one such factor would reach the rows of other adapters and
        of the base. The device is asked once: a question for each of 450 tensors would wait 450 times for what steps
        have given it to do. Those that `fold` made in one piece are looked at as that."""
        pieces = {id(piece): piece for t in self.tensors() for piece in [t if t._base is None else t._base]}
        return bool(torch.stack([end for t in pieces.values() for end in t.aminmax()]).isfinite().all())

    @property
    def in_deltas(self) -> bool:
        """Whether deltas are all that it brings: no parameters or rows of its own."""
        return not (self.saved or self.tables)

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors on the device."""
        return sum(t.nbytes for t in self.tensors())

    @cached_property
    def max_rank(self) -> int:
        return max((u.shape[0] for u, _ in self.factors.values()), default=0)

    @cached_property
    def core_rank(self) -> int:
        """The side of its cores; 0 where they are constant."""
        return self.max_rank if self.routed else self.bank.rank if self.bank else 0

    @cached_property
    def mixed(self) -> bool:
        """Whether it has linears, or rank rows behind those of its routed cores, whose core is the identity: those of
        the adapters that a routed one was combined with (combine.py)."""
        routed = self.routed
        return routed is not None and (self.max_rank > routed.parts.rank or len(self.factors) > len(routed.linears))

    @cached_property
    def shape(self) -> tuple[object, ...]:
        """Adapters of one shape take the same kernels."""
        parts = self.routed.parts if self.routed else None
        routed = (parts.k, parts.t, parts.rank, parts.table is None) if parts else None
        kinds = frozenset(site for _, site in self.sites)
        return kinds, self.max_rank, routed, self.mixed, self.bank is not None

    @cached_property
    def sites(self) -> frozenset[tuple[int, int]]:
        """(layer, site) of every linear that it adapts."""
        return frozenset((at.layer, at.site) for at in self.factors)
