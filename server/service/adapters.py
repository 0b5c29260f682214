"""The names of this server: which generation of which adapter a name stands for right now.

Changes to one name are made one after the other; reading a name never waits. A name switches to a new generation in one
assignment, so a request meets the old or the new one, never a mixture.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tucka_runtime.adapters.registry import AdapterRegistry, StoredAdapter, check_name
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import (
    AdapterConflictError,
    BaseModelMismatchError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    TuckaError,
)
from tucka_runtime.logs import fields
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route
from tucka_runtime.server.http.errors import reason
from tucka_runtime.server.metrics.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedAdapter:
    """What a name stands for. `created` is in seconds since the epoch, `pinned` the route it was loaded with."""

    key: AdapterKey
    digest: str
    folder: Path
    pinned: Route | None
    info: AdapterInfo
    created: int
    source: str


class Lease:
    """One use of an adapter by one request, or of the base (`adapter` None), from when its name is resolved until
    `release`."""

    def __init__(self, names: "AdapterNames | None" = None, adapter: LoadedAdapter | None = None):
        self.adapter = adapter
        self._names = names
        if names is not None and adapter is not None:
            names.hold(adapter.key)

    def release(self) -> None:
        """Ends the lease. It is harmless when it is over already."""
        names, self._names = self._names, None
        if names is not None and self.adapter is not None:
            names.release(self.adapter.key)


class AdapterNames:
    """Loads, replaces and unloads adapters by name. `base_name` is taken by the base model."""

    def __init__(self, engine: EngineClient, registry: AdapterRegistry, base_name: str, metrics: Metrics):
        self._engine = engine
        self._registry = registry
        self._base_name = base_name
        self._metrics = metrics
        self._loaded: dict[str, LoadedAdapter] = {}
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._generation = 0
        self._in_use: Counter[AdapterKey] = Counter()
        self._retiring: set[AdapterKey] = set()
        self.ready = False

    def get(self, name: str) -> LoadedAdapter:
        """What the name stands for now. Raises ModelNotFoundError."""
        if name not in self._loaded:
            raise ModelNotFoundError(
                "No base model or adapter of that name is loaded. GET /v1/models lists those that are.", "model"
            )
        return self._loaded[name]

    def all(self) -> list[LoadedAdapter]:
        return list(self._loaded.values())

    async def load(
        self, name: str, source: Path, inplace: bool = False, pinned: Route | None = None, durable: bool = True
    ) -> tuple[LoadedAdapter, bool]:
        """Loads the adapter in `source`, or finds that the name has this very content already.

        Returns it, and whether anything was loaded. `durable` puts it into the registry, to come back after a restart.
        Raises AdapterConflictError when the name has other content and `inplace` is false, InvalidRequestError for the
        name, and what the registry and the engine raise for the files.
        """
        check_name(name)
        if name == self._base_name:
            raise AdapterConflictError("That is the name of the base model. Choose another one.", "name")
        async with self._lock(name):
            begin = time.monotonic()
            stored = await asyncio.to_thread(self._registry.ingest, source)
            copied = time.monotonic() - begin
            try:
                old = self._loaded.get(name)
                if old is not None and (old.folder, old.pinned) == (stored.folder, pinned):
                    return old, False
                if old is not None and not inplace:
                    raise AdapterConflictError(
                        "An adapter of that name with other content is loaded. Unload it first, choose another name, "
                        "or load it with `load_inplace: true`.",
                        "name",
                    )
                self._check_engine()
                return await self._switch(name, stored, pinned, str(source), durable, copied), True
            finally:
                self._registry.release(stored)
                await self._collect()

    @contextmanager
    def noting_failure(self, name: str) -> Iterator[None]:
        """A load that fails in here is counted by its code and leaves a line in the log."""
        try:
            yield
        except Exception as error:
            self._failed(name, error)
            raise

    async def unload(self, name: str) -> bool:
        """Forgets the name; its requests go on. Returns whether there are any. Raises ModelNotFoundError, and
        InvalidRequestError for the base."""
        if name == self._base_name:
            raise InvalidRequestError("That is the base model, which cannot be unloaded. Only adapters can be.", "name")
        async with self._lock(name):
            old = self.get(name)
            self._check_engine()
            del self._loaded[name]
            self._metrics.adapter_unloaded(name)
            in_use = self._retire(old.key)
            await asyncio.to_thread(self._registry.remove, name)
            await self._collect()
            log.info(
                "adapter %s is unloaded%s",
                name,
                ": running requests go on" if in_use else "",
                extra=fields(event="adapter_unloaded", adapter=name, digest=old.digest, generation=old.key.generation),
            )
            return in_use

    async def restore(self, base_fingerprint: str) -> None:
        """Loads what the registry remembers. What does not fit this base or cannot be loaded is left out and logged."""
        for entry in self._registry.names():
            if entry.base_fingerprint != base_fingerprint:
                self._failed(entry.name, BaseModelMismatchError("it was loaded beside another base model."))
                continue
            self._generation = max(self._generation, entry.generation)
            try:
                await self._switch(
                    entry.name,
                    StoredAdapter(entry.digest, self._registry.folder(entry.blob)),
                    entry.pinned_route,
                    entry.source,
                    durable=True,
                )
            except TuckaError as error:
                self._failed(entry.name, error)

    async def reload(self) -> None:
        """Brings every name into a fresh engine process. One that cannot be loaded is dropped, and logged.

        Raises EngineDeadError if that process dies too.
        """
        self.ready = False
        for name in {*self._loaded, *self._locks}:  # also those whose load was nearly done when the engine died
            async with self._lock(name):
                old = self._loaded.get(name)
                if old is None:
                    continue
                try:
                    info = await self._engine.load_adapter(old.key, old.folder, old.pinned)
                    self._loaded[name] = replace(old, info=info)
                    self._metrics.adapter_loaded(info, info.load_seconds)
                except EngineDeadError:
                    raise
                except TuckaError as error:
                    self._failed(name, error)
                    del self._loaded[name]
                    self._metrics.adapter_unloaded(name)
        self.ready = True

    def lease(self, name: str) -> "Lease":
        """Holds what the name stands for now: it is unloaded only when the lease is over. Raises ModelNotFoundError."""
        return Lease(self, self.get(name))

    def hold(self, key: AdapterKey) -> None:
        """Lease's half."""
        self._in_use[key] += 1

    def release(self, key: AdapterKey) -> None:
        """Lease's other half. The last one sends away what was unloaded or replaced meanwhile."""
        self._in_use[key] -= 1
        if self._in_use[key] <= 0:
            del self._in_use[key]
            if key in self._retiring:
                self._retiring.discard(key)
                self._send_away(key)

    def _retire(self, key: AdapterKey) -> bool:
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

    async def _switch(
        self,
        name: str,
        stored: StoredAdapter,
        pinned: Route | None,
        source: str,
        durable: bool,
        copied: float = 0.0,
    ) -> LoadedAdapter:
        """`copied`: seconds that it took to check and copy the files."""
        self._generation += 1
        key = AdapterKey(name, self._generation)
        fingerprint = self._engine.info.fingerprint if self._engine.info else ""
        begin = time.monotonic()
        info = await self._engine.load_adapter(key, stored.folder, pinned)
        waited = max(time.monotonic() - begin - sum(info.load_seconds.values()), 0.0)
        if durable:
            try:
                await asyncio.to_thread(self._registry.put, name, stored, key.generation, source, pinned, fingerprint)
            except OSError:
                self._retire(key)
                raise
        old = self._loaded.get(name)
        self._loaded[name] = LoadedAdapter(key, stored.digest, stored.folder, pinned, info, int(time.time()), source)
        self._metrics.adapter_loaded(info, {"copy": copied, **info.load_seconds, "wait": waited})
        if old is not None:
            self._retire(old.key)
        log.info(
            "adapter %s is loaded: %s, digest %s, generation %d",
            name,
            info.kind,
            stored.digest[:12],
            key.generation,
            extra=fields(event="adapter_loaded", adapter=name, digest=stored.digest, generation=key.generation),
        )
        return self._loaded[name]

    def _failed(self, name: str, error: Exception) -> None:
        try:
            check_name(name)
        except InvalidRequestError:
            name = "?"  # the client's own text stays out of the log
        self._metrics.adapter_refused(reason(error))
        log.warning(
            "adapter %s is not loaded, %s: %s",
            name,
            reason(error),
            error.message if isinstance(error, TuckaError) else "an error inside the server",
            extra=fields(event="adapter_refused", adapter=name, error=reason(error)),
        )

    def _check_engine(self) -> None:
        """A change made while `reload` brings the names into a new process would be lost."""
        if not self._engine.ready:
            raise EngineDeadError("The engine is restarting. Try again later.")

    async def _collect(self) -> None:
        try:
            await asyncio.to_thread(self._registry.collect, {a.folder.name for a in self._loaded.values()})
        except OSError as error:
            log.error("copies of adapters that no name uses cannot be deleted: %s", error.strerror)

    @asynccontextmanager
    async def _lock(self, name: str) -> AsyncIterator[None]:
        """One change at a time per name; a lock exists only while someone holds or awaits it."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[name]
            if users == 1:
                del self._locks[name]
            else:
                self._locks[name] = (lock, users - 1)
