"""The API process's durable memory of adapters: which names stand for which content, and a private copy of each.

    <root>/lock                      held while a server uses the root
    <root>/registry.json             the names, replaced atomically
    <root>/blobs/<blob>/             one adapter's files; appears whole or not at all

After a crash at any moment the same names come back with the same content. Standard library only.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tucka_runtime.adapters.files import (
    CONFIG_NAME,
    MAX_WEIGHTS_BYTES,
    TRAINING_NAME,
    WEIGHTS_NAME,
    open_file,
    open_folder,
    read_config,
    read_exactly,
    read_training,
    start_digest,
    strict_json,
    sync_folder,
    write_file,
)
from tucka_runtime.errors import ConfigError, InvalidRequestError
from tucka_runtime.messages import Route

COPY_BYTES = 2**20  # memory taken while an adapter of any size is copied

_REGISTRY = "registry.json"
_TEMPORARY = ".tmp-"
_TEMPORARY_ROOT = "tucka-"
_IS_TEMPORARY = b"temporary"


@dataclass(frozen=True)
class StoredAdapter:
    """A private copy of an adapter's files. `digest` is `Adapter.digest`, of config and weights.

    The folder's name, the blob, tells apart what differs in training.json alone: that decides scope and base.
    """

    digest: str
    folder: Path


@dataclass(frozen=True)
class RegistryEntry:
    """What a name stands for. `source` is where it was loaded from, for people to read; it is not opened again."""

    name: str
    digest: str
    blob: str
    generation: int
    source: str
    pinned_route: Route | None
    base_fingerprint: str


class AdapterRegistry:
    """Names and private copies below `root` (None: a temporary folder that goes when this is closed). Thread-safe.

    Raises ConfigError if another process uses the root, or if what is in it cannot be read.
    """

    def __init__(self, root: Path | None):
        self._temporary = root is None
        if root is None:
            _remove_leftovers()
            root = Path(tempfile.mkdtemp(prefix=_TEMPORARY_ROOT))
        self.root = root
        self._blobs = self.root / "blobs"
        try:
            self._blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = open(self.root / "lock", "wb")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise ConfigError(
                f"the state folder cannot be written ({error.strerror}). Give another one, or mend it."
            ) from None
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise ConfigError("the state folder is in use by another server. Give each server its own.") from None
        if self._temporary:  # said only while the lock is held: where it says so and is free, the owner is gone
            self._lock_file.write(_IS_TEMPORARY)
            self._lock_file.flush()
        self._mutex = threading.Lock()
        self._held: Counter[Path] = Counter()
        try:
            self._entries = self._load()
        except ConfigError:
            self._lock_file.close()
            raise
        for leftover in (*self._blobs.glob(f"{_TEMPORARY}*"), *self.root.glob(f".{_REGISTRY}.*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the root; a temporary one is removed."""
        self._lock_file.close()
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)

    def ingest(self, source: Path) -> StoredAdapter:
        """Copy the adapter's files out of `source`; content that is here already is left as it is. Stays until
        `release`.

        Only the three known files are copied. Their content is not judged: `read_adapter` on the copy does that.
        Raises InvalidAdapterError if one is missing, no regular file, or too large; OSError if the disk refuses.
        """
        partial = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._blobs))
        try:
            with open_folder(source) as folder_fd:
                config = read_config(folder_fd)
                training = read_training(folder_fd)
                with open_file(folder_fd, WEIGHTS_NAME, MAX_WEIGHTS_BYTES) as (file, size):
                    digest = _copy_weights(file, size, config, partial / WEIGHTS_NAME)
            write_file(partial, CONFIG_NAME, config)
            if training is not None:
                write_file(partial, TRAINING_NAME, training)
            blob = digest if training is None else f"{digest}-{hashlib.sha256(training).hexdigest()[:16]}"
            folder = self.folder(blob)
            with self._mutex:
                self._held[folder] += 1
                if not folder.exists():
                    partial.rename(folder)
                    sync_folder(self._blobs)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return StoredAdapter(digest, folder)

    def release(self, stored: StoredAdapter) -> None:
        """Once for every `ingest`: from now on `collect` may delete it."""
        with self._mutex:
            self._held -= Counter([stored.folder])

    def folder(self, blob: str) -> Path:
        """Where the content of that name is kept, if it is."""
        return self._blobs / blob

    def put(
        self,
        name: str,
        stored: StoredAdapter,
        generation: int,
        source: str,
        pinned_route: Route | None,
        base_fingerprint: str,
    ) -> None:
        """Let `name` stand for ingested content from now on; durable when this returns. Raises OSError."""
        blob = stored.folder.name
        entry = RegistryEntry(name, stored.digest, blob, generation, source, pinned_route, base_fingerprint)
        with self._mutex:
            if not stored.folder.is_dir():
                raise ValueError("put() before ingest(): the content is not here")
            self._save({**self._entries, name: entry})

    def remove(self, name: str) -> None:
        """Forget a name; durable when this returns. Its content stays until `collect`. Raises OSError."""
        with self._mutex:
            self._save({key: entry for key, entry in self._entries.items() if key != name})

    def names(self) -> list[RegistryEntry]:
        """Every name, in the order they were first put."""
        with self._mutex:
            return list(self._entries.values())

    def collect(self, keep: Collection[str] = ()) -> None:
        """Delete the copies that no name refers to, but those in `keep` and those not yet released."""
        with self._mutex:
            used = {entry.blob for entry in self._entries.values()} | {held.name for held in self._held} | set(keep)
            for folder in self._blobs.iterdir():
                if folder.name not in used and not folder.name.startswith(_TEMPORARY):
                    # out of the way first: a half-deleted folder must never stand under a digest
                    doomed = folder.rename(self._blobs / f"{_TEMPORARY}{folder.name}")
                    shutil.rmtree(doomed)

    def _save(self, entries: dict[str, RegistryEntry]) -> None:
        table = {"version": 1, "adapters": [asdict(entry) for entry in entries.values()]}
        text = json.dumps(table, indent=2, ensure_ascii=False)
        write_file(self.root, _REGISTRY, text.encode("utf-8", "replace"))  # a source may be a path that is no UTF-8
        self._entries = entries

    def _load(self) -> dict[str, RegistryEntry]:
        try:
            table = strict_json((self.root / _REGISTRY).read_bytes())
            entries = [_entry(item) for item in table["adapters"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{_REGISTRY} in the state folder cannot be read. Restore it, or remove it to start without adapters."
            ) from None
        return {entry.name: entry for entry in entries}


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


def check_name(name: str) -> None:
    """Raise InvalidRequestError unless `name` can name an adapter: it goes into logs, headers and URLs as it is."""
    if not re.fullmatch(r"[A-Za-z0-9._:/@-]{1,128}", name) or {"", ".", ".."} & set(name.split("/")):
        raise InvalidRequestError(
            "an adapter's name must be 1 to 128 letters, digits or characters of `. _ : / @ -`, without empty, `.` or "
            "`..` parts between slashes. Choose another name."
        )


def _copy_weights(source: BufferedIOBase, size: int, config: bytes | bytearray, target: Path) -> str:
    """Copy `size` bytes, durably; the digest of the adapter they make with `config`."""
    digest = start_digest(config, size)
    with open(target, "xb") as copy:
        while size:
            chunk = read_exactly(source, min(size, COPY_BYTES), WEIGHTS_NAME)
            digest.update(chunk)
            copy.write(chunk)
            size -= len(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def _entry(item: dict[str, Any]) -> RegistryEntry:
    pinned = item["pinned_route"]
    route = None if pinned is None else Route(pinned["group"], tuple(pinned["weights"]))
    return RegistryEntry(**{"blob": item["digest"], **item, "pinned_route": route})  # the first versions had no blob
