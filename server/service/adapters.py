"""The names of this server: which generation of which adapter a name stands for right now.

A name stands for an adapter that was checked and whose copy is on the disk; whether the engine has it as well, is
residency.py's matter. Changes to one name are made one after the other; reading a name never waits. A name switches to
a new generation in one assignment, so a request meets the old or the new one, never a mixture.
"""

import contextlib
import logging
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tucka_runtime.adapters.registry import AdapterRegistry, RegistryEntry, check_name, loggable
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import (
    AdapterCapacityError,
    AdapterConflictError,
    BaseModelMismatchError,
    EngineDeadError,
    InvalidRequestError,
    StorageError,
    TuckaError,
)
from tucka_runtime.logs import fields
from tucka_runtime.messages import AdapterInfo, Route
from tucka_runtime.server.http.access import Sees, everything
from tucka_runtime.server.http.errors import reason
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service import audit
from tucka_runtime.server.service.coming import Tier
from tucka_runtime.server.service.copies import Copies, lost
from tucka_runtime.server.service.leases import Lease, Leases, LoadedAdapter
from tucka_runtime.server.service.name_locks import NameLocks
from tucka_runtime.server.service.names import Names
from tucka_runtime.server.service.residency import Residency
from tucka_runtime.server.service.sources import AdapterSources, Found

log = logging.getLogger(__name__)


class AdapterNames(Names):
    """Loads, replaces and unloads adapters by name."""

    def __init__(
        self,
        engine: EngineClient,
        registry: AdapterRegistry,
        base_name: str,
        metrics: Metrics,
        sources: AdapterSources | None = None,
    ):
        """`sources`: where `load_from` may load from; by default requests' bodies alone."""
        super().__init__(base_name, Residency(engine, metrics), metrics)
        self.sources = sources or AdapterSources(registry)
        self._engine = engine
        self._copies = Copies(engine, registry, metrics, self.sources)
        self._leases = Leases(self.residency)
        self._locks = NameLocks()
        self._generation = 0
        self.ready = False

    async def training(self, adapter: LoadedAdapter) -> Any:
        """The whole of the adapter's training.json; None if it has none."""
        return await self._copies.training(adapter.entry)

    async def load_from(
        self,
        name: str,
        source: AbstractAsyncContextManager[Found],
        inplace: bool,
        pinned: Route | None,
        durable: bool = True,
        keep_resident: bool | None = None,
    ) -> tuple[LoadedAdapter, bool]:
        """`load` of what a source finds. A load that fails is counted by its code and leaves a line in the log."""
        try:
            self.check_name(name)
            async with source as found:
                return await self.load(name, found.folder, inplace, pinned, keep_resident, durable, found.origin)
        except Exception as error:
            self._failed(name, error)
            raise

    async def load(
        self,
        name: str,
        source: Path,
        inplace: bool = False,
        pinned: Route | None = None,
        keep_resident: bool | None = None,
        durable: bool = True,
        origin: str | None = None,
    ) -> tuple[LoadedAdapter, bool]:
        """Loads the adapter in `source`, or finds that the name has this very content already.

        Returns it, and whether anything was loaded. `durable` puts it into the registry, to come back after a restart,
        with its `origin`, by default the folder. `keep_resident` gives it a slot for good, or (False) no longer; None
        is false for new content, and changes nothing otherwise.
        Raises AdapterConflictError when the name has other content and `inplace` is false, InvalidRequestError for the
        name, and what the registry and the engine raise for the files.
        """
        self.check_name(name)
        async with self._locks.hold(name):
            begin = time.monotonic()
            stored = await self._copies.ingest(source)
            copied = time.monotonic() - begin
            try:
                old = self._loaded.get(name)
                if old is not None and (old.entry.blob, old.pinned) == (stored.blob, pinned):
                    again = await self._again(old, keep_resident, durable)
                    audit.note_digests(old.digest, old.digest)
                    return again, False
                if old is not None and not inplace:
                    raise AdapterConflictError(
                        "An adapter of that name with other content is loaded. Unload it first, choose another name, "
                        "or load it with `load_inplace: true`.",
                        "name",
                    )
                self._check_engine()
                self._generation += 1
                entry = RegistryEntry(
                    name,
                    stored.digest,
                    stored.blob,
                    self._generation,
                    origin or str(source),
                    pinned,
                    self._fingerprint,
                    keep_resident or False,
                )
                return await self._switch(entry, durable, copied), True
            finally:
                await self._copies.put_back(stored)

    def check_name(self, name: str) -> None:
        """Raises InvalidRequestError and AdapterConflictError unless an adapter may have this name."""
        check_name(name)
        if name == self._base_name:
            raise AdapterConflictError("That is the name of the base model. Choose another one.", "name")

    async def unload(self, name: str, sees: Sees = everything) -> bool:
        """Forgets the name; its requests go on. Returns whether there are any. Raises ModelNotFoundError, and
        InvalidRequestError for the base."""
        audit.note("unload", name)
        if not sees(name):
            raise self._unknown(sees)
        if name == self._base_name:
            raise InvalidRequestError("That is the base model, which cannot be unloaded. Only adapters can be.", "name")
        async with self._locks.hold(name):
            entry = self._lost[name] if name in self._lost else self.get(name).entry
            self._check_engine()
            await self._copies.forget(name)
            self._forget(name)
            self._lost.pop(name, None)
            audit.note_digests(entry.digest, None)
            in_use = await self._retire(entry)
            log.info(
                "adapter %s is unloaded%s",
                name,
                ": running requests go on" if in_use else "",
                extra=fields(event="adapter_unloaded", adapter=name, digest=entry.digest, generation=entry.generation),
            )
            return in_use

    async def restore(self, base_fingerprint: str) -> None:
        """Lets names stand for what the registry remembers, in the generations that they had. What belongs to another
        base is left out and logged; what is not on the disk any more is lost (`lost`).

        Loaded is only what is kept resident, and what has no card yet: the rest comes when it is asked for."""
        for entry in await self._copies.remembered():
            self._generation = max(self._generation, entry.generation)
            if entry.base_fingerprint == base_fingerprint:
                self._lost[entry.name] = entry
            else:
                self._failed(entry.name, BaseModelMismatchError("it was loaded beside another base model."))
        with contextlib.suppress(EngineDeadError):  # `reload` goes on where it has stopped
            await self._find_again()

    async def reload(self) -> None:
        """Prepares for a fresh engine process, which has no adapters: those that are kept resident are loaded, others
        come when they are asked for. What is lost is looked for once more.

        Raises EngineDeadError if that process dies too.
        """
        self.ready = False
        self.residency.reset()
        for entry in await self._copies.missing([adapter.entry for adapter in self._loaded.values()]):
            async with self._locks.hold(entry.name):
                self._lose(entry)
        await self._find_again()
        for adapter in self.all():
            if adapter.entry.keep_resident and self.tier(adapter) is not Tier.RESIDENT:
                async with self._locks.hold(adapter.key.name):
                    await self._load_again(adapter.entry)
        self.ready = True

    def lease(self, name: str, sees: Sees = everything) -> Lease:
        """Holds what is `named` so: it is unloaded only when the lease is over. Where it has no slot, it is sent
        for."""
        adapter = self.named(name, sees)
        return Lease(self._leases, adapter, lambda resident: self._fetch(adapter.entry, resident))

    def close(self) -> None:
        """Waits for no copy that has not begun."""
        self.sources.close()
        self._copies.close()

    @property
    def _fingerprint(self) -> str:
        return self._engine.info.fingerprint if self._engine.info else ""

    async def _fetch(self, entry: RegistryEntry, resident: bool) -> AdapterInfo:
        """Loads what a name stands for. Where neither its copy nor its source can be read, the name is lost. Raises
        EngineDeadError, AdapterCapacityError, StorageError."""
        try:
            return await self._copies.load_or_copy_again(entry, resident)
        except (EngineDeadError, AdapterCapacityError):
            raise
        except TuckaError as error:
            self._failed(entry.name, error)
            self._lose(entry)
            raise lost() from None

    async def _find_again(self) -> None:
        """Whatever is lost and on the disk, or where it came from, is there again. Raises EngineDeadError."""
        gone = {entry.name for entry in await self._copies.missing(list(self._lost.values()))}
        for entry in list(self._lost.values()):
            if entry.name in gone and not await self._copies.again(entry):
                self._failed(entry.name, lost())
                continue
            async with self._locks.hold(entry.name):
                if self._lost.get(entry.name) is not entry:
                    continue
                if entry.info is None or entry.keep_resident:
                    await self._load_again(entry)
                else:
                    self._stand(entry, entry.info)

    async def _load_again(self, entry: RegistryEntry) -> None:
        """What a name stands for, loaded. Where that cannot be, it is lost. Raises EngineDeadError."""
        try:
            info = await self.residency.admit(
                entry.key, lambda resident: self._fetch(entry, resident), entry.keep_resident, entry.key
            )
        except EngineDeadError:
            raise
        except StorageError:
            return  # it is lost, and said so
        except TuckaError as error:
            self._failed(entry.name, error)
            if entry.info is not None:  # no slot can be kept for it: it comes when it is asked for, if there is one
                self._stand(entry, entry.info)
            else:
                self._lose(entry)
            return
        entry = replace(entry, info=info)
        with contextlib.suppress(StorageError):  # it is loaded once more after the next start
            await self._copies.save(entry, durable=True)
        self._stand(entry, info)

    async def _retire(self, entry: RegistryEntry) -> bool:
        """Unloads a generation that no name stands for any more, and deletes its copy, as soon as nothing uses it;
        whether something does."""
        if self._leases.retire(entry.key, lambda: self._copies.discard_soon(entry.blob)):
            return True
        await self._copies.discard(entry.blob)
        return False

    async def _again(self, old: LoadedAdapter, keep_resident: bool | None, durable: bool) -> LoadedAdapter:
        """A load of what the name stands for already. It may have been loaded by a flag, which a restart forgets."""
        keep = old.entry.keep_resident if keep_resident is None else keep_resident
        if keep != old.entry.keep_resident:
            self.residency.keep(old.key, keep)
            if keep:
                lease = self.lease(old.key.name)
                try:
                    await lease.ready()
                except TuckaError:
                    self.residency.keep(old.key, False)
                    raise
                finally:
                    lease.release()
            old = self._loaded[old.key.name] = replace(old, entry=replace(old.entry, keep_resident=keep))
        if durable:
            await self._copies.save(old.entry, durable)
        return old

    async def _switch(self, entry: RegistryEntry, durable: bool, copied: float) -> LoadedAdapter:
        """The disk first: whoever was told that a name stands for something finds it there after a restart. `copied`:
        seconds that it took to check and copy the files."""
        name = entry.name
        old = self._loaded.get(name)
        self._metrics.load_took({"copy": copied})
        info = await self.residency.admit(
            entry.key,
            lambda resident: self._copies.load(entry, resident),
            entry.keep_resident,
            old.key if old else None,
        )
        entry = replace(entry, info=info)
        try:
            await self._copies.save(entry, durable)
        except TuckaError:
            self.residency.forget(entry.key)
            if old is None:
                self._metrics.adapter_unloaded(name)
            raise
        old = self._loaded.get(name)
        adapter = self._stand(entry, info)
        audit.note_digests(old.digest if old is not None else None, entry.digest)
        if old is not None:
            await self._retire(old.entry)
        log.info(
            "adapter %s is loaded: %s, digest %s, generation %d",
            name,
            info.kind,
            entry.digest[:12],
            entry.generation,
            extra=fields(event="adapter_loaded", adapter=name, digest=entry.digest, generation=entry.generation),
        )
        return adapter

    def _failed(self, name: str, error: Exception) -> None:
        name = loggable(name)
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
