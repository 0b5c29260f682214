"""Adapters that are declared rather than loaded: by a folder that is watched, and by a file.

The file's format is that of the Gateway API Inference Extension's LoRA syncer (`vLLMLoRAConfig`), whose rules hold:
what `ensureExist` names is loaded, what `ensureNotExist` names is unloaded, what both name is left alone, and so is
what neither names. Both are looked at every POLL_SECONDS: events of a file system are not to be had on network mounts.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tucka_runtime.adapters.files import CONFIG_NAME, served_files
from tucka_runtime.errors import ConfigError, InvalidRequestError, ModelNotFoundError, TuckaError
from tucka_runtime.names import check_name
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.audit import AuditLog, changing
from tucka_runtime.server.service.leases import LoadedAdapter
from tucka_runtime.server.service.sources import Found

log = logging.getLogger(__name__)

WATCH, FILE = "--adapter-watch", "--adapters-file"
"""What declares adapters, as the audit log has it. A restart forgets those of a folder, which has them."""

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0  # until what could not be loaded is tried again, if nothing has changed

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Declaration:
    """What a file asks for: sources by name, and the names that are not to be."""

    wanted: dict[str, str]
    unwanted: set[str]


def read_declaration(path: Path) -> Declaration:
    """Raises ConfigError. A name in both lists is in neither, with a line in the log."""
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
        config = (value or {})["vLLMLoRAConfig"] or {}
        wanted = {item["id"]: item["source"] for item in (config.get("ensureExist") or {}).get("models") or ()}
        unwanted = {item["id"] for item in (config.get("ensureNotExist") or {}).get("models") or ()}
        for name in {*wanted, *unwanted}:
            check_name(name)
        if not all(isinstance(source, str) for source in wanted.values()):
            raise TypeError
    except OSError as error:
        raise ConfigError(f"--adapters-file {path} cannot be read: {error.strerror}.") from None
    except InvalidRequestError as error:
        raise ConfigError(f"--adapters-file {path}: an `id` cannot be a name: {error.message}") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--adapters-file {path} is no vLLMLoRAConfig: a mapping of that name, with `ensureExist` and "
            "`ensureNotExist`, each with `models`, a list of `id` and `source`."
        ) from None
    if both := wanted.keys() & unwanted:
        log.warning(
            "--adapters-file: left alone, being in ensureExist and in ensureNotExist: %s", ", ".join(sorted(both))
        )
    return Declaration({name: wanted[name] for name in wanted if name not in both}, unwanted - both)


@dataclass
class Tries:
    """What has failed, and when it may be tried again."""

    _again: dict[tuple[str, object], float] = field(default_factory=dict)

    def may(self, name: str, what: object) -> bool:
        return time.monotonic() >= self._again.get((name, what), 0.0)

    @contextmanager
    def noted(self, name: str, what: object) -> Iterator[None]:
        """A load that fails while this is entered has been logged, and is not tried again at once."""
        self._again = {key: due for key, due in self._again.items() if due > time.monotonic()}
        try:
            yield
        except TuckaError:
            self._again[name, what] = time.monotonic() + RETRY_SECONDS


class Declared:
    """Keeps the names as `folder` and `file` say, while `run` runs. What that changes has its line in the audit log;
    what fails has not, for it is tried again and again."""

    def __init__(self, adapters: AdapterNames, folder: Path | None, file: Path | None, audit: AuditLog | None = None):
        self._adapters, self._audit = adapters, audit
        self._folder, self._file = folder, file
        self._seen: dict[str, Signature] = {}
        self._loaded: dict[str, Signature] = {}
        self._tries = Tries()
        self._said = ""
        self._text: bytes | None = None
        self._applied: dict[str, tuple[str, int]] = {}
        self._declaration = Declaration({}, set())

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.look()
            except Exception:  # the task's border: without it nothing would be looked at any more, and nobody told
                log.exception("declared adapters could not be looked at")

    async def look(self, first: bool = False) -> None:
        """Does what the folder and the file say now. What cannot be done is in the log, and tried again later."""
        if self._folder is not None:
            await self._look_at_folder(self._folder, first)
        if self._file is not None:
            await self._look_at_file(self._file)

    async def _look_at_folder(self, folder: Path, first: bool) -> None:
        """Loads what has not changed since the last look: a copy that is under way is left alone until it is done."""
        try:
            present = await asyncio.to_thread(_signatures, folder)
        except OSError as error:  # a mount that is gone has not retired its adapters
            self._say(f"--adapter-watch {folder} cannot be read: {error.strerror}; adapters stay as they are")
            return
        for name in self._loaded.keys() - present.keys():
            if await self._unload(name, WATCH):
                del self._loaded[name]
        for name, signature in present.items():
            settled = first or self._seen.get(name) == signature
            if settled and self._loaded.get(name) != signature and self._tries.may(name, signature):
                found = nullcontext(Found(folder / name, str(folder / name)))
                with self._tries.noted(name, signature):
                    await self._load(name, found, WATCH)
                    self._loaded[name] = signature
        self._seen = present

    async def _look_at_file(self, file: Path) -> None:
        try:
            text = await asyncio.to_thread(file.read_bytes)
            if text != self._text:
                self._declaration = await asyncio.to_thread(read_declaration, file)
                self._text = text
        except (ConfigError, OSError) as error:
            why = error.message if isinstance(error, ConfigError) else error.strerror
            self._say(f"--adapters-file: {why} What was declared before goes on to hold.")
        for name, source in self._declaration.wanted.items():
            if not self._stands(name, source) and self._tries.may(name, source):
                with self._tries.noted(name, source):
                    adapter = await self._load(name, self._adapters.sources.found(source), FILE)
                    self._applied[name] = source, adapter.key.generation
        for name in self._declaration.unwanted:
            if self._adapters.knows(name):
                await self._unload(name, FILE)

    def _stands(self, name: str, source: str) -> bool:
        """Whether the name stands for what was loaded from there: by this, or before a restart."""
        if (adapter := self._adapters.find(name)) is None:
            return False
        return self._applied.get(name) == (source, adapter.key.generation) or adapter.entry.source == source

    async def _load(self, name: str, found: AbstractAsyncContextManager[Found], by: str) -> LoadedAdapter:
        async with changing(self._audit, "load", name, by):
            adapter, _ = await self._adapters.load_from(name, found, True, None, durable=by == FILE)
        return adapter

    async def _unload(self, name: str, by: str) -> bool:
        """Whether the name stands for nothing any more: it may have been gone, or be the base."""
        try:
            async with changing(self._audit, "unload", name, by):
                await self._adapters.unload(name)
        except ModelNotFoundError:
            return True
        except TuckaError as error:
            self._say(f"declared adapter {name} is not unloaded: {error.message}")
            return False
        return True

    def _say(self, what: str) -> None:
        """Once, until something else is said."""
        if what != self._said:
            log.error("%s", what)
        self._said = what


def _signatures(folder: Path) -> dict[str, Signature]:
    """By name, what changes with any of its files: of every adapter's folder in `folder` that is not hidden."""
    found = {}
    for path in sorted(folder.iterdir()):
        try:
            check_name(path.name)
            if not path.name.startswith(".") and (path / CONFIG_NAME).is_file():
                files = [(name, (path / name).stat()) for name in served_files(True) if (path / name).exists()]
                found[path.name] = tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in files)
        except (InvalidRequestError, FileNotFoundError):  # it leaves just now
            continue
    return found
