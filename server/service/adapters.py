"""Changes of the server's names: which generation of which adapter a name stands for right now, and before.

A name stands for an adapter that was checked and whose copy is on the disk; whether the engine has it as well, is
residency.py's matter. Changes to one name are made one after the other; reading a name never waits. A name switches to
a new generation in one assignment, so a request meets the old or the new one, never a mixture.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.errors import AdapterConflictError, InvalidRequestError, ModelNotFoundError, TuckaError
from tucka_runtime.logs import fields
from tucka_runtime.messages import Route
from tucka_runtime.names import Alias, check_name, split_version
from tucka_runtime.server.http.access import Sees, everything
from tucka_runtime.server.service import audit
from tucka_runtime.server.service.coming import Tier
from tucka_runtime.server.service.copies import lost
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.restored import RestoredNames
from tucka_runtime.server.service.sources import Found

log = logging.getLogger(__name__)


class AdapterNames(RestoredNames):
    """Loads, replaces, rolls back and unloads adapters by name, and gives names aliases."""

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
        async with self._locks.hold(name):
            self.check_name(name)
            begin = time.monotonic()
            stored = await self._copies.ingest(source, self._own_defaults is not None)
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
                defaults = await self._checked_defaults(stored)
                self._metrics.load_took({"copy": copied})
                entry = RegistryEntry(
                    name,
                    stored.digest,
                    stored.blob,
                    self._next_generation(),
                    origin or str(source),
                    pinned,
                    self._fingerprint,
                    keep_resident or False,
                    defaults=defaults,
                )
                return await self._switch(entry, durable), True
            finally:
                await self._copies.put_back(stored)

    def check_name(self, name: str) -> None:
        """Raises InvalidRequestError and AdapterConflictError unless an adapter may have this name."""
        check_name(name)
        if name in self.base_names:
            raise AdapterConflictError("That is the name of the base model. Choose another one.", "name")
        if name in self.aliases:
            raise AdapterConflictError("That is the name of an alias. Choose another one, or delete the alias.", "name")
        if split_version(name) is not None:
            raise InvalidRequestError(
                "A name that ends in @ and 12 or more hexadecimal digits is a version's. Choose another one.", "name"
            )

    async def rollback(self, name: str, to: str | None = None, sees: Sees = everything) -> LoadedAdapter:
        """Lets the name stand again for content that it stood for before: the last, or the one whose digest begins with
        `to`. It comes back after a restart. A name that stands for that content already is left as it is.

        Raises ModelNotFoundError for the name, and where there is no such version; StorageError, and what the engine
        raises, where its copy cannot be loaded.
        """
        audit.note("rollback", name)
        if not sees(name):
            raise self._unknown(sees)
        async with self._locks.hold(name):
            entry = self._lost[name] if name in self._lost else self.get(name).entry
            self._check_owner(name, entry)
            if to is not None and entry.digest.startswith(to) and name in self._loaded:
                audit.note_digests(entry.digest, entry.digest)
                return self._loaded[name]
            version = next((v for v in entry.versions if to is None or v.digest.startswith(to)), None)
            if version is None:
                kept = ", ".join(version.name for version in entry.versions)
                raise ModelNotFoundError(
                    "No such earlier content of that name is kept. "
                    + (f"There are {kept}." if kept else "There is none: --adapter-versions says how many are kept."),
                    "to",
                )
            try:
                if version.name in self._lost:
                    raise lost()
                self._check_engine()
                generation, keep = self._next_generation(), entry.keep_resident
                again = replace(
                    version, name=name, generation=generation, keep_resident=keep, info=None, version_of=None
                )
                return await self._switch(again, durable=True)
            except TuckaError as error:
                self._failed(name, error)
                raise

    async def put_alias(self, name: str, targets: Mapping[str, int], sees: Sees = everything) -> tuple[Alias, bool]:
        """Gives an alias, or one that there is other targets (names with their weights); durable when this returns.
        Returns it, and whether it is new.

        Raises AdapterConflictError where the name is an adapter's or the base's, InvalidRequestError for it or for the
        targets, ModelNotFoundError for a target that is not there, and StorageError.
        """
        audit.note("alias", name)
        alias = Alias(name, tuple(targets.items()))
        async with self._locks.hold(name):
            new = name not in self.aliases
            if new:
                self.check_name(name)
            if name in self._loaded or name in self._lost:
                raise AdapterConflictError("That is the name of an adapter. Choose another one.", "name")
            for target in targets:
                if target in self.aliases and sees(target):
                    raise InvalidRequestError("An alias stands for adapters, not for another alias.", "targets")
                if target in self.base_names and sees(target):
                    raise InvalidRequestError("An alias stands for adapters, not for the base model.", "targets")
                self.model(target, sees)
            await self._copies.save_alias(alias)
            self.aliases.set(alias)
            log.info("alias %s is set", name, extra=fields(event="alias_set", adapter=name))
            return alias, new

    async def remove_alias(self, name: str, sees: Sees = everything) -> None:
        """Forgets an alias; requests that it has resolved go on. Raises ModelNotFoundError, StorageError."""
        audit.note("unalias", name)
        async with self._locks.hold(name):
            self.alias_of(name, sees)
            await self._copies.forget(name)
            self.aliases.drop(name)
            log.info("alias %s is removed", name, extra=fields(event="alias_removed", adapter=name))

    async def unload(self, name: str, sees: Sees = everything) -> bool:
        """Forgets the name and its versions; their requests go on. Returns whether there are any. Raises
        ModelNotFoundError, and InvalidRequestError for the base, an alias and a version."""
        audit.note("unload", name)
        if not sees(name):
            raise self._unknown(sees)
        if name in self.base_names:
            raise InvalidRequestError("That is the base model, which cannot be unloaded. Only adapters can be.", "name")
        async with self._locks.hold(name):
            if name in self.aliases:
                raise InvalidRequestError("That is an alias. DELETE /v1/aliases/{name} removes it.", "name")
            entry = self._lost[name] if name in self._lost else self.get(name).entry
            self._check_owner(name, entry)
            self._check_engine()
            await self._copies.forget(name)
            audit.note_digests(entry.digest, None)
            in_use = any([await self._drop(known) for known in (entry, *entry.versions)])
            log.info(
                "adapter %s is unloaded%s",
                name,
                ": running requests go on" if in_use else "",
                extra=fields(event="adapter_unloaded", adapter=name, digest=entry.digest, generation=entry.generation),
            )
            return in_use

    async def _again(self, old: LoadedAdapter, keep_resident: bool | None, durable: bool) -> LoadedAdapter:
        """A load of what the name stands for already. It may have been loaded by a flag, which a restart forgets."""
        keep = old.entry.keep_resident if keep_resident is None else keep_resident
        if keep != old.entry.keep_resident:
            self.residency.keep(old.key, keep)
            if keep:
                lease = self.lease(old)
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

    def _check_owner(self, name: str, entry: RegistryEntry) -> None:
        """A version of what the name stands for now is called by the name's own entry."""
        if entry.version_of is not None or split_version(name) is not None:
            raise InvalidRequestError("That is a version of a name, which goes with the name. Give the name.", "name")

    async def _drop(self, entry: RegistryEntry) -> bool:
        """What the entry's name stood for goes; whether requests use it."""
        self._forget(entry.name)
        self._lost.pop(entry.name, None)
        return await self._retire(entry)

    async def _switch(self, entry: RegistryEntry, durable: bool) -> LoadedAdapter:
        """The disk first: whoever was told that a name stands for something finds it there after a restart."""
        name = entry.name
        old = self._loaded.get(name)
        info = await self.residency.admit(
            entry.key,
            lambda resident: self._copies.load(entry, resident),
            entry.keep_resident,
            old.key if old else None,
        )
        old = self._loaded.get(name)  # it may have been lost meanwhile
        before = old.entry if old is not None else self._lost.get(name)
        versions = before.versions if before is not None else ()
        earlier = versions if old is None else (old.entry, *versions)
        entry = replace(entry, info=info).after(earlier, self._num_versions)
        try:
            await self._copies.save(entry, durable)
        except TuckaError:
            self.residency.forget(entry.key)
            if old is None:
                self._metrics.adapter_unloaded(name)
            elif self.residency.tier(old.key) is Tier.RESIDENT:
                self._metrics.adapter_arrived(old.info)  # the name's row said the new one's for a moment
            raise
        old = self._loaded.get(name)
        adapter = self._stand(entry, info)
        audit.note_digests(old.digest if old is not None else None, entry.digest)
        await self._change_versions(old, versions, entry.versions)
        if before is not None:
            await self._retire(before)
        log.info(
            "adapter %s is loaded: %s, digest %s, generation %d",
            name,
            info.kind,
            entry.digest[:12],
            entry.generation,
            extra=fields(event="adapter_loaded", adapter=name, digest=entry.digest, generation=entry.generation),
        )
        return adapter

    async def _change_versions(
        self, old: LoadedAdapter | None, before: Sequence[RegistryEntry], after: Sequence[RegistryEntry]
    ) -> None:
        """Those that are kept no longer go; what the name stood for until now may be kept from now on."""
        kept = {version.key for version in before} & {version.key for version in after}
        gone = [version for version in before if version.key not in kept]
        for version in gone:
            self._forget(version.name)
            self._lost.pop(version.name, None)
        for version in after:
            if version.key not in kept and version.info is not None:
                self._stand(version, version.info, old.created if old is not None else None)
        for version in gone:
            await self._retire(version)
