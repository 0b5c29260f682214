"""Who uses which generation of an adapter, so that one that was unloaded or replaced leaves with its last request."""

import contextlib
from collections import Counter
from dataclasses import dataclass

from tucka_runtime.adapters.registry import RegistryEntry
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import EngineDeadError
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route


@dataclass(frozen=True)
class LoadedAdapter:
    """What a name stands for. `created` is in seconds since the epoch."""

    entry: RegistryEntry
    info: AdapterInfo
    created: int

    @property
    def key(self) -> AdapterKey:
        return self.entry.key

    @property
    def digest(self) -> str:
        return self.entry.digest

    @property
    def pinned(self) -> Route | None:
        """The route it was loaded with."""
        return self.entry.pinned_route


class Leases:
    """Counts the uses of generations, and sends those away that no name stands for."""

    def __init__(self, engine: EngineClient):
        self._engine = engine
        self._in_use: Counter[AdapterKey] = Counter()
        self._retiring: set[AdapterKey] = set()

    def hold(self, key: AdapterKey) -> None:
        """One more use, until `release`."""
        self._in_use[key] += 1

    def release(self, key: AdapterKey) -> None:
        """Ends a use. The last one sends away what was unloaded or replaced meanwhile."""
        self._in_use[key] -= 1
        if self._in_use[key] <= 0:
            del self._in_use[key]
            if key in self._retiring:
                self._retiring.discard(key)
                self._send_away(key)

    def retire(self, key: AdapterKey) -> bool:
        """Unloads a generation that no name stands for any more, as soon as nothing uses it; whether something does."""
        if self._in_use[key] > 0:
            self._retiring.add(key)
            return True
        self._send_away(key)
        return False

    def _send_away(self, key: AdapterKey) -> None:
        """An engine that is down has nothing to unload."""
        with contextlib.suppress(EngineDeadError):
            self._engine.unload_adapter(key)


class Lease:
    """One use of an adapter by one request, or of the base (`adapter` None), from when its name is resolved until
    `release`."""

    def __init__(self, leases: Leases | None = None, adapter: LoadedAdapter | None = None):
        self.adapter = adapter
        self._leases = leases
        if leases is not None and adapter is not None:
            leases.hold(adapter.key)

    def release(self) -> None:
        """Ends the lease. It is harmless when it is over already."""
        leases, self._leases = self._leases, None
        if leases is not None and self.adapter is not None:
            leases.release(self.adapter.key)
