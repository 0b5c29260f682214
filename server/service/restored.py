"""Names that come back: after a restart of the server or of its engine, and where a copy was damaged or gone."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from tucka_runtime.adapters.blobs import StoredAdapter
from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import (
    AdapterCapacityError,
    BaseModelMismatchError,
    EngineDeadError,
    InvalidRequestError,
    StorageError,
    TuckaError,
)
from tucka_runtime.logs import fields
from tucka_runtime.messages import AdapterInfo
from tucka_runtime.names import loggable
from tucka_runtime.server.http.errors import reason
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.combinations import Combinations
from tucka_runtime.server.service.coming import Tier
from tucka_runtime.server.service.copies import Copies, lost
from tucka_runtime.server.service.defaults import Defaults, OwnDefaults
from tucka_runtime.server.service.leases import Combination, Lease, Leases, Served
from tucka_runtime.server.service.name_locks import NameLocks
from tucka_runtime.server.service.names import Names
from tucka_runtime.server.service.residency import Residency
from tucka_runtime.server.service.sources import AdapterSources

log = logging.getLogger(__name__)


class RestoredNames(Names):
    """Names whose adapters are leased, and brought again."""

    def __init__(
        self,
        engine: EngineClient,
        registry: AdapterRegistry,
        base_name: str,
        metrics: Metrics,
        sources: AdapterSources | None = None,
        versions: int = 1,
        other_base_names: Sequence[str] = (),
        own_defaults: OwnDefaults | None = None,
    ):
        """`sources`: where `load_from` may load from; by default requests' bodies alone. `versions`: how many of a
        name's contents are kept, with the one that it stands for. `own_defaults`: adapters may bring some."""
        super().__init__((base_name, *other_base_names), Residency(engine, metrics), metrics)
        self.sources = sources or AdapterSources(registry)
        self._num_versions = versions
        self._own_defaults = own_defaults
        self._engine = engine
        self._copies = Copies(engine, registry, metrics, self.sources)
        self._leases = Leases(self.residency)
        self._locks = NameLocks()
        self._generation = 0
        self.combinations = Combinations(engine.config.adapter_slots, self._next_generation, self._leases)
        self.ready = False

    async def restore(self, base_fingerprint: str) -> None:
        """Lets names and their versions stand for what the registry remembers, in the generations that they had. What
        belongs to another base is left out and logged; what is not on the disk any more is lost (`lost`).

        Loaded is only what is kept resident, and what has no card yet: the rest comes when it is asked for."""
        for entry in await self._copies.remembered():
            self._generation = max(self._generation, entry.generation)
            if entry.base_fingerprint != base_fingerprint:
                self._failed(entry.name, BaseModelMismatchError("it was loaded beside another base model."))
                continue
            entry = await self._trimmed(entry)
            self._lost |= {known.name: known for known in (entry, *entry.versions)}
        for alias in self._copies.aliases():
            self.aliases.set(alias)
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
            async with self._locks.hold(entry.owner):
                adapter = self._loaded.get(entry.name)
                if adapter is not None and adapter.key == entry.key:
                    self._lose(entry)
        await self._find_again()
        for adapter in self.all():
            if adapter.entry.keep_resident and self.tier(adapter) is not Tier.RESIDENT:
                async with self._locks.hold(adapter.key.name):
                    if self._loaded.get(adapter.key.name) is adapter:  # it may have been unloaded meanwhile
                        await self._load_again(adapter.entry)
        self.ready = True

    def lease(self, adapter: Served) -> Lease:
        """Holds an adapter: it is unloaded only when the lease is over. Where it has no slot, it is sent for."""
        if isinstance(adapter, Combination):
            return Lease(self._leases, adapter, lambda resident: self._combine(adapter, resident))
        return Lease(self._leases, adapter, lambda resident: self._fetch(adapter.entry, resident))

    def sets(self, entry: RegistryEntry) -> tuple[str, ...]:
        """What an adapter's files set for its requests, by name."""
        return entry.defaults if self._own_defaults is not None else ()

    async def defaults(self, adapter: Served | None) -> Defaults | None:
        """What an adapter brings for requests to it; None where that is nothing. A combination brings nothing: of
        several that differ none would be right. Raises StorageError where neither its copy nor its source can be
        read."""
        own = self._own_defaults
        if own is None or adapter is None or isinstance(adapter, Combination) or not adapter.entry.defaults:
            return None
        entry = adapter.entry
        if (known := own.known(entry.blob)) is not None:
            return known
        try:
            found = await self._copies.defaults(entry.blob)
        except TuckaError:
            if not await self._copies.again(entry):
                raise lost() from None
            found = await self._copies.defaults(entry.blob)
        if "tokenizer" not in entry.defaults:  # it adds nothing: it need not be read again
            found = replace(found, tokenizer=None)
        return await own.make(self._copies.folder(entry.blob), found, adapter.vocab_size)

    async def stop_rendering(self) -> None:
        """Ends the processes that render adapters' templates."""
        if self._own_defaults is not None:
            await self._own_defaults.stop()

    def close(self) -> None:
        """Waits for no copy that has not begun."""
        self.sources.close()
        self._copies.close()

    async def _checked_defaults(self, stored: StoredAdapter) -> tuple[str, ...]:
        """What a copy's files set for requests. Raises InvalidAdapterError, StorageError."""
        if self._own_defaults is None:
            return ()
        found = await self._copies.defaults(stored.blob)
        names = await self._own_defaults.check(found, stored.folder)
        if found.ignored:
            log.warning(
                "an adapter's generation_config.json has fields without effect here: %s", ", ".join(found.ignored)
            )
        return names

    def _next_generation(self) -> int:
        self._generation += 1
        return self._generation

    @property
    def _fingerprint(self) -> str:
        return self._engine.info.fingerprint if self._engine.info else ""

    async def _trimmed(self, entry: RegistryEntry) -> RegistryEntry:
        """The entry with as many versions as are kept now, of the same base; copies of others go."""
        same = [version for version in entry.versions if version.base_fingerprint == entry.base_fingerprint]
        less = entry.after(same, self._num_versions)
        if less != entry:
            with contextlib.suppress(StorageError):  # it is trimmed again after the next start
                await self._copies.save(less, durable=True)
                for blob in set(entry.blobs) - set(less.blobs):
                    await self._copies.discard(blob)
        return less

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

    async def _combine(self, combination: Combination, resident: bool) -> AdapterInfo:
        """Has the engine make a combination. Raises InvalidRequestError where that cannot be, and what `_fetch`
        does."""
        try:
            return await self._copies.combine(combination, resident)
        except InvalidRequestError as error:
            self.combinations.refuse(combination, error)
            raise
        except (EngineDeadError, AdapterCapacityError):
            raise
        except TuckaError:
            raise lost() from None

    async def _find_again(self) -> None:
        """Whatever is lost and on the disk, or where it came from, is there again. Raises EngineDeadError."""
        gone = {entry.name for entry in await self._copies.missing(list(self._lost.values()))}
        for entry in list(self._lost.values()):
            if entry.name in gone and not await self._copies.again(entry):
                self._failed(entry.name, lost())
                continue
            async with self._locks.hold(entry.owner):
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
        if entry.version_of is None:
            with contextlib.suppress(StorageError):  # it is loaded once more after the next start
                await self._copies.save(entry, durable=True)
        self._stand(entry, info)

    async def _retire(self, entry: RegistryEntry) -> bool:
        """Unloads a generation that no name stands for any more, and deletes its copy, as soon as nothing uses it;
        whether something does."""
        self.combinations.forget(entry.key)
        if self._leases.retire(entry.key, lambda: self._copies.discard_soon(entry.blob)):
            return True
        await self._copies.discard(entry.blob)
        return False

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
