"""What each name stands for, and where that is: read by everybody, written by adapters.py alone."""

import time
from itertools import chain, islice

from tucka_runtime.adapters.registry import RegistryEntry
from tucka_runtime.errors import ModelNotFoundError
from tucka_runtime.messages import AdapterInfo
from tucka_runtime.server.metrics.metrics import AdapterTiers, Metrics
from tucka_runtime.server.metrics.vllm import Residence
from tucka_runtime.server.service.coming import Tier
from tucka_runtime.server.service.copies import lost
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.residency import Residency

NAMES_SHOWN = 8  # in an error about a name: at most 1 KiB


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

    def get(self, name: str) -> LoadedAdapter:
        """What the name stands for now. Raises ModelNotFoundError, and StorageError where its adapter was lost."""
        if name in self._lost:
            raise lost()
        if name not in self._loaded:
            shown = ", ".join(islice(chain((self._base_name,), self._loaded), NAMES_SHOWN))
            known = shown + (" and others" if len(self._loaded) >= NAMES_SHOWN else "")
            raise ModelNotFoundError(
                f"No base model or adapter of that name is loaded. There are {known}. GET /v1/models lists them all.",
                "model",
            )
        return self._loaded[name]

    def all(self) -> list[LoadedAdapter]:
        return list(self._loaded.values())

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

    def named(self, name: str) -> LoadedAdapter:
        """What the name, or `base:name` as SGLang has it, stands for now. Raises what `get` does."""
        known = name in self._loaded or name in self._lost
        return self.get(name if known else name.removeprefix(f"{self._base_name}:"))

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
