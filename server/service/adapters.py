"""The names of this server: which generation of which adapter a name stands for right now.

Changes to one name are made one after the other; reading a name never waits. A name switches to a new generation in one
assignment, so a request meets the old or the new one, never a mixture.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from tucka_runtime.adapters.registry import AdapterRegistry, RegistryEntry, check_name
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import (
    AdapterCapacityError,
    AdapterConflictError,
    BaseModelMismatchError,
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    StorageError,
    TuckaError,
)
from tucka_runtime.logs import fields
from tucka_runtime.messages import AdapterInfo, Route
from tucka_runtime.server.http.errors import reason
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.leases import Lease, Leases, LoadedAdapter
from tucka_runtime.server.service.sources import AdapterSources, Found

T = TypeVar("T")

log = logging.getLogger(__name__)

NAMES_SHOWN = 8  # in an error about a name: at most 1 KiB
COPIES = 2  # adapters that are looked for and copied at once: each takes a core while it is hashed


class AdapterNames:
    """Loads, replaces and unloads adapters by name. `base_name` is taken by the base model.

    Disks are waited for in two pools of threads of its own, one for copies and one for the registry's small writes: the
    event loop's pool, which prompts are tokenised in, never is.
    """

    def __init__(
        self,
        engine: EngineClient,
        registry: AdapterRegistry,
        base_name: str,
        metrics: Metrics,
        sources: AdapterSources | None = None,
    ):
        """`sources`: where `load_from` may load from; by default requests' bodies alone."""
        self.sources = sources or AdapterSources(registry)
        self._engine = engine
        self._registry = registry
        self._base_name = base_name
        self._metrics = metrics
        self._leases = Leases(engine)
        self._loaded: dict[str, LoadedAdapter] = {}
        self._lost: dict[str, RegistryEntry] = {}
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._generation = 0
        self._copies = ThreadPoolExecutor(COPIES, "adapter-copies")
        self._books = ThreadPoolExecutor(1, "adapter-books")
        self.ready = False

    @property
    def lost(self) -> int:
        """How many names that were promised (loaded once, and never unloaded) have no adapter: neither their copy nor
        their source could be read when the engine was started anew."""
        return len(self._lost)

    def get(self, name: str) -> LoadedAdapter:
        """What the name stands for now. Raises ModelNotFoundError, and StorageError where its adapter was lost."""
        if name in self._lost:
            raise StorageError(
                "The adapter of that name was lost: neither the server's copy of it nor the folder it was loaded from "
                "can be read any more. Load it again, or unload it.",
                "model",
            )
        if name not in self._loaded:
            names = [self._base_name, *self._loaded]
            known = ", ".join(names[:NAMES_SHOWN]) + (" and others" if len(names) > NAMES_SHOWN else "")
            raise ModelNotFoundError(
                f"No base model or adapter of that name is loaded. There are {known}. GET /v1/models lists them all.",
                "model",
            )
        return self._loaded[name]

    def knows(self, name: str) -> bool:
        """Whether the name stands for something, or was promised to."""
        return name == self._base_name or name in self._loaded or name in self._lost

    def all(self) -> list[LoadedAdapter]:
        return list(self._loaded.values())

    async def load_from(
        self,
        name: str,
        source: AbstractAsyncContextManager[Found],
        inplace: bool,
        pinned: Route | None,
        durable: bool = True,
    ) -> tuple[LoadedAdapter, bool]:
        """`load` of what a source finds. A load that fails is counted by its code and leaves a line in the log."""
        try:
            self.check_name(name)
            async with source as found:
                return await self.load(name, found.folder, inplace, pinned, durable, found.origin)
        except Exception as error:
            self._failed(name, error)
            raise

    async def load(
        self,
        name: str,
        source: Path,
        inplace: bool = False,
        pinned: Route | None = None,
        durable: bool = True,
        origin: str | None = None,
    ) -> tuple[LoadedAdapter, bool]:
        """Loads the adapter in `source`, or finds that the name has this very content already.

        Returns it, and whether anything was loaded. `durable` puts it into the registry, to come back after a restart,
        with its `origin`, by default the folder.
        Raises AdapterConflictError when the name has other content and `inplace` is false, InvalidRequestError for the
        name, and what the registry and the engine raise for the files.
        """
        self.check_name(name)
        async with self._lock(name):
            begin = time.monotonic()
            stored = await self._run(self._copies, self._registry.ingest, source)
            copied = time.monotonic() - begin
            try:
                old = self._loaded.get(name)
                if old is not None and (old.entry.blob, old.pinned) == (stored.blob, pinned):
                    if durable:  # it may have been loaded by a flag, which a restart forgets
                        await self._run(self._books, self._registry.put, old.entry)
                    return old, False
                if old is not None and not inplace:
                    raise AdapterConflictError(
                        "An adapter of that name with other content is loaded. Unload it first, choose another name, "
                        "or load it with `load_inplace: true`.",
                        "name",
                    )
                self._check_engine()
                self._generation += 1
                entry = RegistryEntry(
                    name, stored.digest, stored.blob, self._generation, origin or str(source), pinned, self._fingerprint
                )
                return await self._switch(entry, durable, copied), True
            finally:
                self._registry.release(stored)
                await self._collect()

    def check_name(self, name: str) -> None:
        """Raises InvalidRequestError and AdapterConflictError unless an adapter may have this name."""
        check_name(name)
        if name == self._base_name:
            raise AdapterConflictError("That is the name of the base model. Choose another one.", "name")

    async def unload(self, name: str) -> bool:
        """Forgets the name; its requests go on. Returns whether there are any. Raises ModelNotFoundError, and
        InvalidRequestError for the base."""
        if name == self._base_name:
            raise InvalidRequestError("That is the base model, which cannot be unloaded. Only adapters can be.", "name")
        async with self._lock(name):
            entry = self._lost[name] if name in self._lost else self.get(name).entry
            self._check_engine()
            await self._run(self._books, self._registry.remove, name)
            in_use = name in self._loaded and self._leases.retire(entry.key)
            self._forget(name)
            self._lost.pop(name, None)
            await self._collect()
            log.info(
                "adapter %s is unloaded%s",
                name,
                ": running requests go on" if in_use else "",
                extra=fields(event="adapter_unloaded", adapter=name, digest=entry.digest, generation=entry.generation),
            )
            return in_use

    async def restore(self, base_fingerprint: str) -> None:
        """Loads what the registry remembers, in the generations that it had. What belongs to another base is left out
        and logged; what cannot be loaded is lost (`lost`)."""
        for entry in self._registry.names():
            self._generation = max(self._generation, entry.generation)
            if entry.base_fingerprint == base_fingerprint:
                self._lost[entry.name] = entry  # until it is here: `reload` finds it if the engine dies meanwhile
                with contextlib.suppress(EngineDeadError):
                    await self._bring_back(entry)
            else:
                self._failed(entry.name, BaseModelMismatchError("it was loaded beside another base model."))

    async def reload(self) -> None:
        """Brings every name into a fresh engine process. One that cannot be loaded is lost (`lost`).

        Raises EngineDeadError if that process dies too.
        """
        self.ready = False
        for name in {*self._loaded, *self._lost, *self._locks}:  # also those that were being loaded as the engine died
            async with self._lock(name):
                if name in self._loaded:
                    await self._bring_back(self._loaded[name].entry)
                elif name in self._lost:
                    await self._bring_back(self._lost[name])
        self.ready = True

    def lease(self, name: str) -> Lease:
        """Holds what the name, or `base:name` as SGLang has it, stands for now: it is unloaded only when the lease is
        over. Raises what `get` does."""
        known = name in self._loaded or name in self._lost
        return Lease(self._leases, self.get(name if known else name.removeprefix(f"{self._base_name}:")))

    def close(self) -> None:
        """Waits for no copy that has not begun."""
        self.sources.close()
        for pool in (self._copies, self._books):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _fingerprint(self) -> str:
        return self._engine.info.fingerprint if self._engine.info else ""

    async def _load(self, entry: RegistryEntry) -> AdapterInfo:
        folder = self._registry.folder(entry.blob)
        return await self._engine.load_adapter(entry.key, folder, entry.pinned_route, entry.blob)

    async def _bring_back(self, entry: RegistryEntry) -> None:
        """Loads what a name stands for from the server's copy. Where that is damaged or gone, it is copied once more
        from where it came, if that still has the same content; else the name is lost. Raises EngineDeadError."""
        name = entry.name
        try:
            try:
                info = await self._load(entry)
            except (EngineDeadError, AdapterCapacityError):
                raise
            except TuckaError:
                if not await self._copy_again(entry):
                    raise
                info = await self._load(entry)
        except EngineDeadError:
            raise
        except TuckaError as error:
            self._failed(name, error)
            self._forget(name)
            self._lost[name] = entry
            return
        self._lost.pop(name, None)
        created = self._loaded[name].created if name in self._loaded else int(time.time())
        self._loaded[name] = LoadedAdapter(entry, info, created)
        self._metrics.adapter_loaded(info, info.load_seconds)

    async def _copy_again(self, entry: RegistryEntry) -> bool:
        """Whether the adapter's source gave its copy once more. The copy stays because the name keeps it."""
        at_hand = Path(entry.source).is_absolute()  # an --adapter's may lie below no root
        found = nullcontext(Found(Path(entry.source), entry.source)) if at_hand else self.sources.found(entry.source)
        try:
            async with found as source:
                stored = await self._run(self._copies, self._registry.ingest, source.folder)
        except TuckaError:
            return False
        self._registry.release(stored)
        if stored.blob == entry.blob:
            log.warning("the server's copy of adapter %s was damaged or gone; it is copied again", entry.name)
        return stored.blob == entry.blob

    def _forget(self, name: str) -> None:
        if self._loaded.pop(name, None) is not None:
            self._metrics.adapter_unloaded(name)

    async def _switch(self, entry: RegistryEntry, durable: bool, copied: float) -> LoadedAdapter:
        """The disk first: whoever was told that a name stands for something finds it there after a restart. `copied`:
        seconds that it took to check and copy the files."""
        name, begin = entry.name, time.monotonic()
        info = await self._load(entry)
        waited = max(time.monotonic() - begin - sum(info.load_seconds.values()), 0.0)
        if durable:
            try:
                await self._run(self._books, self._registry.put, entry)
            except TuckaError:
                self._leases.retire(entry.key)
                raise
        old = self._loaded.get(name)
        self._loaded[name] = LoadedAdapter(entry, info, int(time.time()))
        self._lost.pop(name, None)
        self._metrics.adapter_loaded(info, {"copy": copied, **info.load_seconds, "wait": waited})
        if old is not None:
            self._leases.retire(old.key)
        log.info(
            "adapter %s is loaded: %s, digest %s, generation %d",
            name,
            info.kind,
            entry.digest[:12],
            entry.generation,
            extra=fields(event="adapter_loaded", adapter=name, digest=entry.digest, generation=entry.generation),
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
        keep = {adapter.entry.blob for adapter in self._loaded.values()} | {lost.blob for lost in self._lost.values()}
        try:
            await self._run(self._books, self._registry.collect, keep)
        except OSError as error:
            log.error("copies of adapters that no name uses cannot be deleted: %s", error.strerror)

    async def _run(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

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
