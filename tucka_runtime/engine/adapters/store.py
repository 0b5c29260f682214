"""The adapters that the engine holds: folded for serving, leased by the sequences that use them."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.errors import AdapterCapacityError, AdapterConflictError, InvalidRequestError, ModelNotFoundError
from tucka_runtime.messages import AdapterKey
from tucka_runtime.models.architecture import Architecture

ACTIVE_SETS = 4  # stacked sets kept for batches that come back, as when two groups of adapters take turns


@dataclass
class _Loaded:
    folded: FoldedAdapter
    leases: int = 0
    unloading: bool = False


class AdapterStore:
    """Adapters by (name, generation). A sequence leases its adapter; an unloaded one goes when its last lease does."""

    def __init__(self, arch: Architecture, device: torch.device, dtype: torch.dtype, capacity: int, by_address: bool):
        """`by_address`: the adapters' places are kept in a SlotTable, for kernels that read them there; else the
        factors of each batch's adapters are stacked."""
        self.arch = arch
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self.table = SlotTable(arch, capacity, dtype, device) if by_address else None
        self.loaded: dict[AdapterKey, _Loaded] = {}
        self.active: OrderedDict[frozenset[AdapterKey], ActiveSet] = OrderedDict()

    def __getitem__(self, key: AdapterKey) -> FoldedAdapter:
        """Raises KeyError if the adapter is not loaded."""
        return self.loaded[key].folded

    def serving(self) -> list[FoldedAdapter]:
        """The adapters that new requests may name."""
        return [entry.folded for entry in self.loaded.values() if not entry.unloading]

    def vocab_size(self, key: AdapterKey | None) -> int:
        """That of an adapter, or of the base."""
        entry = self.loaded.get(key) if key is not None else None
        return (entry.folded.vocab_size if entry is not None else None) or self.arch.vocab

    def leases(self) -> dict[AdapterKey, int]:
        """How many sequences hold each adapter that any holds."""
        return {key: entry.leases for key, entry in self.loaded.items() if entry.leases}

    def check_room(self) -> None:
        """Raises AdapterCapacityError if no further adapter fits: whoever loads has made room before."""
        if len(self.loaded) >= self.capacity:
            raise AdapterCapacityError(
                f"All {self.capacity} adapter slots are taken, also by what was unloaded and still answers requests. "
                "Unload one, or raise --adapter-slots."
            )

    def add(self, folded: FoldedAdapter) -> None:
        """Raises AdapterCapacityError, AdapterConflictError."""
        self.check_room()
        if folded.key in self.loaded:
            raise AdapterConflictError("This generation of the adapter is loaded already.")
        if self.table is not None:
            self.table.add(folded)
        self.loaded[folded.key] = _Loaded(folded)

    def lease(self, key: AdapterKey, member: int | None = None) -> FoldedAdapter:
        """An adapter, or a bank of which a `member` is asked for. Raises ModelNotFoundError for one that is not loaded,
        or is being unloaded, and InvalidRequestError for a bank without that member, or a member of what is none."""
        entry = self.loaded.get(key)
        if entry is None or entry.unloading:
            raise ModelNotFoundError("The adapter was unloaded before the request reached the engine.", "model")
        bank = entry.folded.bank
        if (member is None) != (bank is None) or (bank and not 0 <= (member or 0) < len(bank.cores)):
            raise InvalidRequestError("The adapter is a bank without that member, or no bank.", "model")
        entry.leases += 1
        return entry.folded

    def release(self, key: AdapterKey) -> None:
        entry = self.loaded[key]
        entry.leases -= 1
        if entry.unloading and not entry.leases:
            self._drop(key)

    def evict(self, key: AdapterKey) -> FoldedAdapter | None:
        """Frees the slot of an adapter that nothing leases, and returns it. One that is leased is unloaded instead, and
        one that is unknown is nothing to do: None."""
        entry = self.loaded.get(key)
        self.unload(key)
        return entry.folded if entry is not None and not entry.leases else None

    def unload(self, key: AdapterKey) -> None:
        """Ends leasing; the memory comes back with the last lease's end. An unknown key is nothing to do."""
        if (entry := self.loaded.get(key)) is not None:
            entry.unloading = True
            if not entry.leases:
                self._drop(key)

    def _drop(self, key: AdapterKey) -> None:
        del self.loaded[key]
        if self.table is not None:
            self.table.remove(key)
        for members in [m for m in self.active if key in m]:
            del self.active[members]

    def activate(self, keys: Iterable[AdapterKey]) -> ActiveSet:
        """The adapters of one batch.

        A set that has them all, and at most as many others, is reused, so that a finished request does not cost a
        rebuild.
        """
        wanted = frozenset(keys)
        for members, active in reversed(self.active.items()):
            if wanted <= members and len(members) <= 2 * len(wanted):
                self.active.move_to_end(members)
                return active
        adapters = [self.loaded[key].folded for key in sorted(wanted, key=lambda k: (k.name, k.generation))]
        if self.table is not None:
            active = self.table.active(adapters)
        else:
            active = ActiveSet.stack(adapters, self.arch, self.dtype, self.device)
        self.active[wanted] = active
        if len(self.active) > ACTIVE_SETS:
            self.active.popitem(last=False)
        return active
