"""Where the factors of every loaded adapter lie, for the kernels that read them through their addresses."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from tucka_runtime.engine.adapters.active import ActiveSet, active_set
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.kernels.tables.segments import DeltaSite, check_affine, check_factor
from tucka_runtime.kernels.tables.transfer import place
from tucka_runtime.messages import AdapterKey
from tucka_runtime.models.architecture import Architecture


class SlotTable:
    """Knows, for the fused kernels, where the factors of every loaded adapter lie. An adapter has a slot while it is
    loaded, and its addresses and ranks stand in that slot's row of every site's table, at fixed places on the device: a
    batch needs nothing but the slots of its rows, and adapters that no row uses cost nothing.
    """

    def __init__(self, arch: Architecture, capacity: int, dtype: torch.dtype, device: torch.device):
        self.arch = arch
        self.capacity = capacity
        self.dtype, self.device = dtype, device
        self.free = list(range(capacity))[::-1]
        self.slot: dict[AdapterKey, int] = {}
        count = arch.num_linears
        self._u, self._e, self._affine = (
            torch.zeros(capacity * count, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._rank = torch.zeros(capacity * count, dtype=torch.int32, device=device)
        self._sites: dict[tuple[int, int], DeltaSite] = {}
        home: list[int] = []
        step: list[int] = []
        for layer in range(arch.num_layers):
            for s, site in enumerate(arch.sites):
                n = len(site.targets)
                begin = arch.first_linear(layer, s) * capacity
                own = slice(begin, begin + n * capacity)
                home += range(begin, begin + n)
                step += [n] * n
                self._sites[layer, s] = DeltaSite.by_address(
                    self._u[own].view(-1, n), self._e[own].view(-1, n), self._affine[own].view(-1, n),
                    self._rank[own].view(-1, n), site.columns, site.d_in, dtype,
                )  # fmt: skip
        self._plain = {at: replace(site, affine_ptr=None) for at, site in self._sites.items()}
        self._home, self._step = place([torch.tensor(home), torch.tensor(step)], device)

    def add(self, folded: FoldedAdapter) -> None:
        """Gives an adapter a slot. Raises ValueError if the kernels cannot read its factors through their addresses."""
        arch = self.arch
        u, e, affine, rank = ([0] * arch.num_linears for _ in range(4))
        for at, (shrink, expand) in folded.factors.items():
            i = arch.first_linear(at.layer, at.site) + at.target
            site = self._sites[at.layer, at.site]
            check_factor(shrink, len(shrink), site.d_in, site.dtype)
            check_factor(expand, len(shrink), arch.sites[at.site].widths[at.target], site.dtype)
            u[i], e[i], rank[i] = shrink.data_ptr(), expand.data_ptr(), len(shrink)
            if (own := folded.affine.get(at)) is not None:
                check_affine(own, arch.sites[at.site].widths[at.target])
                affine[i] = own.data_ptr()
        self.slot[folded.key] = self.free.pop()
        self._write(self.slot[folded.key], u, e, affine, rank)

    def remove(self, key: AdapterKey) -> None:
        slot = self.slot.pop(key)
        self._write(slot, *([0] * self.arch.num_linears for _ in range(4)))
        self.free.append(slot)

    def _write(self, slot: int, u: list[int], e: list[int], affine: list[int], rank: list[int]) -> None:
        at = self._home + slot * self._step
        values = [torch.tensor(u), torch.tensor(e), torch.tensor(affine), torch.tensor(rank, dtype=torch.int32)]
        tables = (self._u, self._e, self._affine, self._rank)
        for table, own in zip(tables, place(values, at.device), strict=True):
            table.index_copy_(0, at, own)

    def sites(self, affine: bool) -> dict[tuple[int, int], DeltaSite]:
        """Every site; with `affine` for batches some of whose adapters change the base's own products too."""
        return self._sites if affine else self._plain

    def active(self, adapters: Sequence[FoldedAdapter]) -> ActiveSet:
        """The adapters of a batch."""
        index = {a.key: self.slot[a.key] for a in adapters}
        own = self.sites(any(a.affine for a in adapters))
        sites = {at: own[at] for at in set().union(*(a.sites for a in adapters))}
        return active_set(adapters, index, self.capacity, sites, self.arch)
