"""The server's copies of adapters, and what the engine makes of them.

Disks are waited for in two pools of threads of its own, one for copies and one for the registry's small writes: the
event loop's pool, which prompts are tokenised in, never is.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tucka_runtime.adapters.blobs import StoredAdapter
from tucka_runtime.adapters.defaults import AdapterDefaults
from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.adapters.files import weights_blob
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.channel_messages import AdapterPart
from tucka_runtime.engine.client import EngineClient
from tucka_runtime.errors import (
    AdapterCapacityError,
    EngineDeadError,
    InvalidRequestError,
    StorageError,
    TuckaError,
)
from tucka_runtime.messages import AdapterInfo
from tucka_runtime.names import Alias
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.leases import Combination
from tucka_runtime.server.service.sources import AdapterSources, Found

T = TypeVar("T")

log = logging.getLogger(__name__)

COPIES = 2  # adapters that are looked for and copied at once: each takes a core while it is hashed


class Copies:
    """The registry, off the event loop, and loads from what it keeps."""

    def __init__(self, engine: EngineClient, registry: AdapterRegistry, metrics: Metrics, sources: AdapterSources):
        self._engine, self._registry, self._metrics, self._sources = engine, registry, metrics, sources
        self._reading = ThreadPoolExecutor(COPIES, "adapter-copies")
        self._books = ThreadPoolExecutor(1, "adapter-books")
        self._unsaved: dict[str, list[str]] = {}  # blobs of the names that the registry does not remember

    async def ingest(self, source: Path, defaults: bool = False) -> StoredAdapter:
        """AdapterRegistry.ingest's."""
        return await self._run(self._reading, self._registry.ingest, source, defaults)

    async def put_back(self, stored: StoredAdapter) -> None:
        """Once for every `ingest`. What no name uses goes."""
        self._registry.release(stored)
        await self.discard(stored.blob)

    async def save(self, entry: RegistryEntry, durable: bool) -> None:
        """A name stands for its copy, also after a restart if it is `durable`. Raises StorageError."""
        if durable:
            await self._run(self._books, self._registry.put, entry)
            self._unsaved.pop(entry.name, None)
        else:
            self._unsaved[entry.name] = entry.blobs

    async def forget(self, name: str) -> None:
        """The name, or alias, stands for nothing any more. Raises StorageError."""
        await self._run(self._books, self._registry.remove, name)
        self._unsaved.pop(name, None)

    async def save_alias(self, alias: Alias) -> None:
        """AdapterRegistry.put_alias's."""
        await self._run(self._books, self._registry.put_alias, alias)

    def aliases(self) -> list[Alias]:
        """Those that the registry remembers."""
        return self._registry.aliases()

    async def discard(self, blob: str) -> None:
        """Deletes a copy, unless a name uses it."""
        await self._run(self._books, self._discard, blob)

    def discard_soon(self, blob: str) -> None:
        """The same, for nobody who waits."""
        self._books.submit(self._discard, blob)

    async def remembered(self) -> list[RegistryEntry]:
        """What names stand for by the registry. Copies that none of them has are deleted."""
        try:
            await self._run(self._books, self._registry.collect)
        except OSError as error:
            log.error("copies of adapters that no name uses cannot be deleted: %s", error.strerror)
        return self._registry.names()

    async def missing(self, entries: Sequence[RegistryEntry]) -> list[RegistryEntry]:
        """Those of which the disk has no copy."""
        return await self._run(self._reading, lambda: [e for e in entries if not self._registry.has(e.blob)])

    async def again(self, entry: RegistryEntry) -> bool:
        """Whether the adapter's source gave its copy once more. It stays because the name keeps it."""
        at_hand = Path(entry.source).is_absolute()  # an --adapter's may lie below no root
        defaults = entry.blob != weights_blob(entry.blob)  # as they were taken, whatever the setting is now
        found = (
            nullcontext(Found(Path(entry.source), entry.source))
            if at_hand
            else self._sources.found(entry.source, defaults)
        )
        try:
            async with found as source:
                stored = await self.ingest(source.folder, defaults)
        except TuckaError:
            return False
        self._registry.release(stored)
        if stored.blob == entry.blob:
            log.warning("the server's copy of adapter %s was damaged or gone; it is copied again", entry.name)
        return stored.blob == entry.blob

    def folder(self, blob: str) -> Path:
        """AdapterRegistry.folder's."""
        return self._registry.folder(blob)

    async def training(self, entry: RegistryEntry) -> Any:
        """The whole of an adapter's training.json; None if it has none."""
        return await self._run(self._reading, self._registry.training, entry.blob)

    async def defaults(self, blob: str) -> AdapterDefaults:
        """AdapterRegistry.defaults'."""
        return await self._run(self._reading, self._registry.defaults, blob)

    async def load(self, entry: RegistryEntry, resident: bool) -> AdapterInfo:
        """Has the engine load a copy: into a slot, or into its host cache. Raises AdapterError, StorageError,
        EngineDeadError."""
        folder = self._registry.folder(entry.blob)
        begin = time.monotonic()
        info = await self._engine.load_adapter(entry.key, folder, entry.pinned_route, entry.blob, resident)
        waited = max(time.monotonic() - begin - sum(info.load_seconds.values()), 0.0)
        seconds = {**info.load_seconds, "wait": waited}
        self._metrics.load_took(seconds)
        return replace(info, training=None, load_seconds=seconds)

    async def load_or_copy_again(self, entry: RegistryEntry, resident: bool) -> AdapterInfo:
        """The same. Where the copy is damaged or gone, it is copied once more from where it came, if that still has the
        same content."""
        try:
            return await self.load(entry, resident)
        except (EngineDeadError, AdapterCapacityError):
            raise
        except TuckaError:
            if not await self.again(entry):
                raise
            return await self.load(entry, resident)

    async def combine(self, combination: Combination, resident: bool) -> AdapterInfo:
        """Has the engine make a combination of its adapters' copies, which are copied once more where need be. Raises
        InvalidRequestError where it cannot be made of them, and what `load` does."""
        parts = tuple(
            [
                AdapterPart(self._registry.folder(one.entry.blob), one.pinned, one.entry.blob, one.member, weight)
                for one, weight in combination.parts
            ]
        )
        try:
            info = await self._engine.combine_adapters(combination.key, parts, resident)
        except (EngineDeadError, AdapterCapacityError, InvalidRequestError):
            raise
        except TuckaError:
            if not all([await self.again(one.entry) for one, _ in combination.parts]):
                raise
            info = await self._engine.combine_adapters(combination.key, parts, resident)
        self._metrics.load_took(info.load_seconds)
        return replace(info, digest=combination.digest)

    def close(self) -> None:
        """Waits for no copy that has not begun."""
        for pool in (self._reading, self._books):
            pool.shutdown(wait=False, cancel_futures=True)

    def _discard(self, blob: str) -> None:
        if any(blob in blobs for blobs in list(self._unsaved.values())):
            return
        try:
            self._registry.discard(blob)
        except OSError as error:
            log.error("a copy of an adapter that no name uses cannot be deleted: %s", error.strerror)

    async def _run(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def lost() -> StorageError:
    """What those are told who ask for an adapter that is nowhere any more."""
    return StorageError(
        "The adapter of that name was lost: neither the server's copy of it nor the folder it was loaded from can be "
        "read any more. Load it again, or unload it.",
        "model",
    )
