"""Who uses which generation of an adapter, so that one that was unloaded or replaced leaves with its last request."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route, RouteScope
from tucka_runtime.names import combined_name
from tucka_runtime.server.service.coming import Load
from tucka_runtime.server.service.residency import Residency


@dataclass(frozen=True)
class LoadedAdapter:
    """What a name stands for. `info` is without `training`, which may be long, and without the seconds of a load;
    `created` is in seconds since the epoch. `member` says which one of a bank is meant."""

    entry: RegistryEntry
    info: AdapterInfo
    created: int
    member: int | None = None

    @property
    def key(self) -> AdapterKey:
        return self.entry.key

    @property
    def model(self) -> str:
        """How requests call it."""
        return self.key.name if self.member is None else f"{self.key.name}/{self.info.members[self.member]}"

    @property
    def members(self) -> "list[LoadedAdapter]":
        """What requests may ask for: itself, or, of a bank, all of its members."""
        if self.member is not None or not self.info.members:
            return [self]
        return [replace(self, member=i) for i in range(len(self.info.members))]

    @property
    def digest(self) -> str:
        return self.entry.digest

    @property
    def keys(self) -> tuple[AdapterKey, ...]:
        """The generations that a request needs to stay."""
        return (self.key,)

    @property
    def routed(self) -> "tuple[LoadedAdapter, ...]":
        """What has a route: itself, if it is a TuckA adapter."""
        return (self,) if self.info.kind == "tucka" else ()

    @property
    def pinned(self) -> Route | None:
        """The route it was loaded with."""
        return self.entry.pinned_route

    @property
    def vocab_size(self) -> int | None:
        """That of its own vocabulary, None where it has the base's."""
        return self.info.vocab_size


@dataclass(frozen=True)
class Combination:
    """Several adapters as one, made for requests that ask for them with weights (`parts`). It has a key of its own, and
    a name, in metrics, that says no weights."""

    key: AdapterKey
    parts: tuple[tuple[LoadedAdapter, float], ...]

    pinned: ClassVar[None] = None
    member: ClassVar[None] = None
    vocab_size: ClassVar[None] = None

    @property
    def model(self) -> str:
        """How the log calls it."""
        return combined_name(f"{adapter.model}*{weight:g}" for adapter, weight in self.parts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it is made of: digests, pinned routes, members and weights."""
        made_of = [(one.digest, one.pinned, one.member, weight) for one, weight in self.parts]
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    @property
    def keys(self) -> tuple[AdapterKey, ...]:
        """Its own, and those of its adapters: from their copies it is made again if it has to leave the engine."""
        return (self.key, *(adapter.key for adapter, _ in self.parts))

    @property
    def routed(self) -> tuple[LoadedAdapter, ...]:
        """Those of its adapters that have a route which is not pinned."""
        return tuple([one for one, _ in self.parts if one.routed and one.info.scope != RouteScope.PINNED])

    def split(self, route: Route) -> list[tuple[LoadedAdapter, Route]]:
        """The routes of those, of the one that the engine has for all."""
        own = route.split([(one.info.k or 1, one.info.t or 1) for one in self.routed])
        return list(zip(self.routed, own, strict=True))


Served = LoadedAdapter | Combination
"""What a request may get."""


class Leases:
    """Counts the uses of generations, and sends those away that no name stands for."""

    def __init__(self, residency: Residency):
        self.residency = residency
        self._in_use: Counter[AdapterKey] = Counter()
        self._retiring: dict[AdapterKey, Callable[[], None]] = {}

    def hold(self, key: AdapterKey) -> None:
        """One more use, until `release`."""
        self._in_use[key] += 1

    def release(self, key: AdapterKey) -> None:
        """Ends a use. The last one sends away what was unloaded or replaced meanwhile."""
        self._in_use[key] -= 1
        if self._in_use[key] <= 0:
            del self._in_use[key]
            if (then := self._retiring.pop(key, None)) is not None:
                self.residency.forget(key)
                then()

    def held(self, key: AdapterKey) -> bool:
        """Whether something uses it, or waits to."""
        return key in self._in_use

    def retire(self, key: AdapterKey, then: Callable[[], None] = lambda: None) -> bool:
        """Unloads a generation that no name stands for any more. If something uses it, only as soon as nothing does,
        and calls `then`; whether it is so."""
        if self._in_use[key] > 0:
            self._retiring[key] = then
            return True
        self.residency.forget(key)
        return False


class Lease:
    """One use of an adapter by one request, or of the base (`adapter` None), from when its name is resolved until
    `release`. An adapter that is not resident is sent for at once; `ready` waits for it."""

    def __init__(self, leases: Leases | None = None, adapter: Served | None = None, load: Load | None = None):
        self.adapter = adapter
        self._leases = leases
        self._hold = None
        if leases is not None and adapter is not None and load is not None:
            for key in adapter.keys:
                leases.hold(key)
            self._hold = leases.residency.want(adapter.key, load)

    @property
    def waits(self) -> bool:
        """Whether the adapter has no slot yet."""
        return self._hold is not None and self._hold.coming is not None

    async def ready(self) -> None:
        """Returns once requests may be sent to the engine. Raises AdapterCapacityError if no slot gets free in time, or
        what loading the adapter raised."""
        if self._leases is not None and self._hold is not None:
            await self._leases.residency.ready(self._hold)

    def release(self) -> None:
        """Ends the lease. It is harmless when it is over already."""
        leases, self._leases = self._leases, None
        if leases is not None and self.adapter is not None and self._hold is not None:
            leases.residency.leave(self._hold)
            for key in self.adapter.keys:
                leases.release(key)
