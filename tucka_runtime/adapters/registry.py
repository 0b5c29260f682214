"""The API process's durable memory of adapters: which names stand for which content, a private copy of each, and the
names that are aliases of others.

    <root>/lock                      held while a server uses the root
    <root>/registry.json, .log.<n>   the names (journal.py)
    <root>/blobs/<blob>/             one adapter's files; appears whole or not at all

After a crash at any moment the same names come back with the same content. No torch.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tucka_runtime.adapters.blobs import TEMPORARY, Blobs, StoredAdapter, delete
from tucka_runtime.adapters.defaults import AdapterDefaults, parse_defaults
from tucka_runtime.adapters.entry import RegistryEntry, alias_of, entry_of
from tucka_runtime.adapters.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    defaults_digest,
    open_folder,
    parse_training,
    read_defaults,
    read_training,
    weights_blob,
)
from tucka_runtime.adapters.journal import TABLE, Journal
from tucka_runtime.errors import ConfigError, InvalidAdapterError, InvalidRequestError, StorageError
from tucka_runtime.names import Alias

log = logging.getLogger(__name__)

_TEMPORARY_ROOT = "tucka-"
_IS_TEMPORARY = b"temporary"
_VERSION = 3  # 2 knew no aliases


class AdapterRegistry:
    """Names and private copies below `root` (None: a temporary folder that goes when this is closed). Thread-safe.

    Raises ConfigError if another process uses the root, or if what is in it cannot be read. What the disk refuses later
    is a StorageError, and has changed nothing.
    """

    def __init__(self, root: Path | None):
        self._temporary = root is None
        try:
            self.root = _make_temporary_root() if root is None else root
            self._blobs = Blobs(self.root / "blobs")
            self._blobs.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = self._take_lock()
        except OSError as error:
            what = "the temporary folder (TMPDIR)" if root is None else "the state folder"
            raise ConfigError(
                f"{what} cannot be written ({error.strerror}). Make room there or mend it, or give another one with "
                "--state-dir."
            ) from None
        except StorageError:
            raise ConfigError("the state folder is in use by another server. Give each server its own.") from None
        self._mutex = threading.Lock()
        self._journal = Journal(self.root, _VERSION)
        try:
            self._entries, self._aliases = self._load()
        except ConfigError:
            self._lock_file.close()
            raise
        self._named = Counter(blob for entry in self._entries.values() for blob in entry.blobs)
        self._journal.clean()
        for leftover in self._blobs.folder.glob(f"{TEMPORARY}*"):
            delete(leftover)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the root; a temporary one is removed."""
        self._journal.close()
        self._lock_file.close()
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)

    def ingest(self, source: Path, defaults: bool = False) -> StoredAdapter:
        """Copy the adapter's files out of `source`; whole content that is here already is left as it is. Stays until
        `release`.

        Only the three known files are copied, and with `defaults` those of files.DEFAULTS_LIMITS. Their content is not
        judged: `read_adapter` and `parse_defaults` on the copy do that.
        Raises InvalidAdapterError if one is missing, no regular file, or too large; StorageError.
        """
        try:
            with self._mutex:
                self._mend()
            return self._blobs.copy(source, defaults)
        except OSError as error:
            if (stored := self._blobs.find(source, defaults)) is None:  # what is here already needs no room
                raise _refusal(error) from error
            return stored

    def make_workspace(self) -> Path:
        """An empty folder for files that are to be ingested: the caller's to delete, and deleted at the next start.
        Raises StorageError."""
        with self.refusals():
            with self._mutex:
                self._mend()
            return Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self._blobs.folder))

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """What the disk of the root says while this is entered is a StorageError."""
        try:
            yield
        except OSError as error:
            raise _refusal(error) from error

    def release(self, stored: StoredAdapter) -> None:
        """Once for every `ingest`: from now on `collect` and `discard` may delete it."""
        self._blobs.release(stored)

    def folder(self, blob: str) -> Path:
        """Where the content of that name is kept, if it is."""
        return self._blobs.folder / blob

    def has(self, blob: str) -> bool:
        """Whether the content is there, as far as can be seen without reading it."""
        return all((self.folder(blob) / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))

    def training(self, blob: str) -> dict[str, Any] | None:
        """What the copy's training.json has; None where there is none, or none that can be read."""
        try:
            with open_folder(self.folder(blob)) as folder_fd:
                data = read_training(folder_fd)
            return parse_training(data)
        except (InvalidAdapterError, StorageError):
            return None

    def defaults(self, blob: str) -> AdapterDefaults:
        """What the copy's files set for requests. Raises InvalidAdapterError, and StorageError where it is not what its
        name says."""
        with open_folder(self.folder(blob)) as folder_fd:
            files = read_defaults(folder_fd)
        if blob != weights_blob(blob) + (f"+{defaults_digest(files)}" if files else ""):
            raise StorageError("The server's copy of the adapter was damaged on its disk. Load it again.")
        return parse_defaults(files)

    def put(self, entry: RegistryEntry) -> None:
        """Let a name stand for ingested content from now on, with its versions; durable when this returns. Raises
        StorageError."""
        with self._mutex:
            before = self._entries.get(entry.name)
            if before == entry:
                return
            if not self.folder(entry.blob).is_dir():
                raise StorageError("The server's copy of the adapter is gone from its state folder. Load it again.")
            self._change(lambda: self._journal.put(entry.row()))
            self._named.subtract(before.blobs if before is not None else ())
            self._named.update(entry.blobs)
            self._entries[entry.name] = entry

    def put_alias(self, alias: Alias) -> None:
        """A new alias, or one in place of its name's last; durable when this returns. Raises StorageError."""
        with self._mutex:
            self._change(lambda: self._journal.put(alias.row()))
            self._aliases[alias.name] = alias

    def remove(self, name: str) -> None:
        """Forget a name or an alias; durable when this returns. A name's content stays until `collect` or `discard`.
        Raises StorageError."""
        with self._mutex:
            if name in self._entries or name in self._aliases:
                self._change(lambda: self._journal.remove(name))
                self._aliases.pop(name, None)
                if (entry := self._entries.pop(name, None)) is not None:
                    self._named.subtract(entry.blobs)

    def names(self) -> list[RegistryEntry]:
        """Every name, in the order they were first put."""
        with self._mutex:
            return list(self._entries.values())

    def aliases(self) -> list[Alias]:
        """Every alias, in the order they were first put."""
        with self._mutex:
            return list(self._aliases.values())

    def collect(self, keep: Collection[str] = ()) -> None:
        """Delete the copies that no name refers to, but those in `keep` and those not yet released. Raises OSError."""
        self._blobs.collect({blob for entry in self.names() for blob in entry.blobs} | set(keep))

    def discard(self, blob: str) -> None:
        """Delete that copy, unless a name refers to it or it is not yet released. Raises OSError."""
        with self._mutex:
            named = self._named[blob] > 0
        if not named:
            self._blobs.discard(blob)

    def _take_lock(self) -> BufferedWriter:
        """Raises OSError, and StorageError where another server has it."""
        lock_file = open(self.root / "lock", "ab")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._temporary:  # said only while the lock is held: where it says so and is free, the owner is gone
                lock_file.write(_IS_TEMPORARY)
                lock_file.flush()
        except BlockingIOError:
            lock_file.close()
            raise StorageError("The state folder was removed, and another server uses it now.") from None
        except OSError:
            lock_file.close()
            raise
        return lock_file

    def _mend(self) -> None:
        """Puts back what was removed of the root since it was opened (cleaners of temporary folders do that): folders,
        lock and names. Raises OSError, and StorageError where another server has the root by now."""
        if not self._holds_root():
            if self._temporary:  # by now anybody may have made a folder of the old name
                self.root = _make_temporary_root()
                self._blobs.folder = self.root / "blobs"
            self._blobs.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_file = self._take_lock()
            self._lock_file.close()
            self._lock_file = lock_file
            log.error("the folder of adapters' copies was removed while the server ran; it is made again")
        self._blobs.folder.mkdir(mode=0o700, exist_ok=True)
        self._journal.root = self.root
        self._journal.mend()

    def _holds_root(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.root / "lock"), os.fstat(self._lock_file.fileno()))
        except FileNotFoundError:
            return False

    def _change(self, change: Callable[[], None]) -> None:
        try:
            self._mend()
            change()
        except OSError as error:
            raise _refusal(error) from error

    def _load(self) -> tuple[dict[str, RegistryEntry], dict[str, Alias]]:
        try:
            version, rows = self._journal.read()
            if version > _VERSION:
                raise ConfigError(
                    f"{TABLE} in the state folder was written by a newer version of this server (its format is "
                    f"{version}, this one reads {_VERSION}). Start that version, or give another --state-dir."
                )
            entries: dict[str, RegistryEntry] = {}
            aliases: dict[str, Alias] = {}
            for row in rows:
                if (alias := alias_of(row)) is not None:
                    aliases[alias.name] = alias
                else:
                    entry = entry_of(row)
                    entries[entry.name] = entry
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequestError) as error:
            why = f": {error}" if isinstance(error, ValueError) else ""
            raise ConfigError(
                f"{TABLE} in the state folder cannot be read{why}. Restore it, or remove it to start without adapters."
            ) from None
        return entries, aliases


def _make_temporary_root() -> Path:
    """Raises OSError."""
    _remove_leftovers()
    return Path(tempfile.mkdtemp(prefix=_TEMPORARY_ROOT))


def _remove_leftovers() -> None:
    """The temporary roots of servers that were killed: marked as temporary, ours, and locked by nobody."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY_ROOT}*"):
        try:
            if folder.lstat().st_uid != os.geteuid():
                continue
            with open(folder / "lock", "rb") as lock:
                if lock.read() == _IS_TEMPORARY:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # not one of these, or in use
            continue


def _refusal(error: OSError) -> StorageError:
    return StorageError(
        f"The folder of the server's copies of adapters (--state-dir, else a temporary one) cannot be written: "
        f"{error.strerror}. Nothing was changed. Make room there or mend it, then send this again."
    )
