"""What each name stands for, and where that is: read by everybody, written by adapters.py alone."""

import time
from dataclasses import replace
from itertools import chain

from tucka_runtime.adapters.registry import RegistryEntry
from tucka_runtime.errors import ModelNotFoundError
from tucka_runtime.messages import AdapterInfo
from tucka_runtime.server.http.access import Sees, everything
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.metrics.vllm import Residence
from tucka_runtime.server.service.coming import Tier
from tucka_runtime.server.service.copies import lost
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.residency import Residency


class Names:
    """Names and their adapters. `base_name` is taken by the base model."""

    def __init__(self, base_name: str, residency: Residency, metrics: Metrics):
        self._base_name = base_name
        self.residency = residency
        self._metrics = metrics
        self._loaded: dict[str, LoadedAdapter] = {}
        self._lost: dict[str, RegistryEntry] = {}

    @property
    def lost(self) -> int:
        """How many names that were promised (loaded once, and never unloaded) have no adapter: neither their copy nor
        their source could be read when it was wanted."""
        return len(self._lost)

    def get(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """What the name stands for now. Raises ModelNotFoundError, also where it is not seen, and StorageError where
        its adapter was lost."""
        if not sees(name) or (name not in self._loaded and name not in self._lost):
            raise self._unknown(sees)
        if name in self._lost:
            raise lost()
        return self._loaded[name]

    def find(self, name: str) -> LoadedAdapter | None:
        """What the name stands for now, if anything."""
        return self._loaded.get(name)

    def knows(self, name: str) -> bool:
        """Whether the name stands for something, or was promised to."""
        return name == self._base_name or name in self._loaded or name in self._lost

    def _unknown(self, sees: Sees) -> ModelNotFoundError:
        return ModelNotFoundError.among(filter(sees, chain((self._base_name,), self._loaded)))

    def all(self, sees: Sees = everything) -> list[LoadedAdapter]:
        return [adapter for name, adapter in self._loaded.items() if sees(name)]

    @property
    def tiers(self) -> AdapterTiers:
        """Where all of them are."""
        residency = self.residency
        resident = [Residence(key.name, info.r, residency.kept(key)) for key, info in residency.residents()]
        cached = [self._loaded[key.name] for key in residency.host if key.name in self._loaded]
        return AdapterTiers(
            len(self._loaded),
            tuple(resident),
            tuple([Residence(adapter.key.name, adapter.info.r) for adapter in cached]),
            residency.host.bytes,
            residency.awaited,
            residency.awaited_names,
        )

    def tier(self, adapter: LoadedAdapter) -> Tier:
        return self.residency.tier(adapter.key)

    def named(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """What a request gets for the name, or for `base:name` as SGLang has it: an adapter, or `bank/member`. Raises
        what `get` does; a bank by itself is no model."""
        for own in (name, name.removeprefix(f"{self._base_name}:")):
            if (found := self.member(own, sees)) is not None:
                return found
            if sees(own) and (own in self._loaded or own in self._lost):
                found = self.get(own, sees)
                if found.info.members:
                    raise ModelNotFoundError(
                        "This is a bank of adapters. Ask for one of them, as `bank/member`.", "model"
                    )
                return found
        raise self._unknown(sees)

    def member(self, name: str, sees: Sees = everything) -> LoadedAdapter | None:
        """What `bank/member` stands for now, unless an adapter has that very name. Raises StorageError where the bank
        was lost."""
        bank, slash, own = name.rpartition("/")
        if not slash or not sees(name) or name in self._loaded or name in self._lost:
            return None
        if bank in self._lost:
            raise lost()
        found = self._loaded.get(bank)
        if found is None or own not in found.info.members:
            return None
        return replace(found, member=found.info.members.index(own))

    def card(self, name: str, sees: Sees = everything) -> LoadedAdapter:
        """An adapter, a bank, or a member of one. Raises what `get` does."""
        return self.member(name, sees) or self.get(name, sees)

    def _stand(self, entry: RegistryEntry, info: AdapterInfo) -> LoadedAdapter:
        """Lets a name stand for an adapter from now on."""
        self._lost.pop(entry.name, None)
        old = self._loaded.get(entry.name)
        created = old.created if old is not None and old.key == entry.key else int(time.time())
        adapter = self._loaded[entry.name] = LoadedAdapter(entry, info, created)
        return adapter

    def _lose(self, entry: RegistryEntry) -> None:
        """The name has no adapter any more, unless it stands for another by now."""
        adapter = self._loaded.get(entry.name)
        if adapter is None or adapter.key == entry.key:
            self._forget(entry.name)
            self._lost[entry.name] = entry

    def _forget(self, name: str) -> None:
        if self._loaded.pop(name, None) is not None:
            self._metrics.adapter_unloaded(name)
