"""Private copies of adapters' files, each in a folder under the name of its content. Standard library only.

A copy appears whole or not at all, and is checked against its name before it is taken for what it says.
"""

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from tucka_runtime.adapters.files import (
    CONFIG_NAME,
    MAX_WEIGHTS_BYTES,
    TRAINING_NAME,
    WEIGHTS_NAME,
    blob_name,
    open_file,
    open_folder,
    read_config,
    read_defaults,
    read_exactly,
    read_training,
    start_digest,
)
from tucka_runtime.durable import sync_folder, write_file
from tucka_runtime.errors import InvalidAdapterError

log = logging.getLogger(__name__)

COPY_BYTES = 2**20  # memory taken while an adapter of any size is copied
SMALL_BYTES = 4 * 2**20
"""Weights that are read once more, in 2 ms, before they are written: where their content is here already, as that of an
adapter that is loaded again or under a second name, three files are not written for nothing."""

TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class StoredAdapter:
    """A private copy of an adapter's files. `digest` is `Adapter.digest`, of config and weights.

    The folder's name, the blob, tells apart what differs in training.json alone, which decides scope and base, or in
    its defaults.
    """

    digest: str
    folder: Path

    @property
    def blob(self) -> str:
        return self.folder.name


class Blobs:
    """The copies in `folder`, which may be replaced while this is used. Thread-safe. All methods raise OSError."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._mutex = threading.Lock()
        self._placing = threading.Lock()
        self._held: Counter[str] = Counter()

    def copy(self, source: Path, defaults: bool = False) -> StoredAdapter:
        """Copies the adapter's files out of `source`, with its `defaults` or without; whole content that is here
        already is left as it is, and damaged content is replaced. Stays until `release`. Raises InvalidAdapterError for
        the source."""
        if _is_small(source) and (known := self.find(source, defaults)) is not None:
            return known
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
        try:
            stored = self._stored(*_take(source, partial, defaults))
            self._hold(stored)
            try:
                with self._placing:
                    if not self._intact(stored):
                        self._place(partial, stored.folder)
            except BaseException:
                self.release(stored)
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return stored

    def find(self, source: Path, defaults: bool = False) -> StoredAdapter | None:
        """The whole copy of what `source` has, if it is here: nothing is written. Stays until `release`."""
        stored = self._stored(*_take(source, None, defaults))
        self._hold(stored)
        intact = False
        try:
            intact = self._intact(stored)
        finally:
            if not intact:
                self.release(stored)
        return stored if intact else None

    def release(self, stored: StoredAdapter) -> None:
        """Once for every `copy` and `find`: from now on `collect` and `discard` may delete it."""
        with self._mutex:
            self._held -= Counter([stored.blob])

    def collect(self, keep: Collection[str]) -> None:
        """Deletes the copies that are not in `keep`, but those not yet released."""
        doomed = []
        with self._mutex:
            for folder in self.folder.iterdir() if self.folder.exists() else ():
                if folder.name not in keep and folder.name not in self._held and not folder.name.startswith(TEMPORARY):
                    doomed.append(self._put_aside(folder))
        for folder in doomed:  # gigabytes take a while, and nobody has to wait
            delete(folder)

    def discard(self, blob: str) -> None:
        """Deletes one copy, unless it is not yet released."""
        with self._mutex:
            folder = self.folder / blob
            if self._held[blob] or not folder.exists():
                return
            doomed = self._put_aside(folder)
        delete(doomed)

    def _stored(self, digest: str, blob: str) -> StoredAdapter:
        return StoredAdapter(digest, self.folder / blob)

    def _hold(self, stored: StoredAdapter) -> None:
        with self._mutex:
            self._held[stored.blob] += 1

    def _intact(self, stored: StoredAdapter) -> bool:
        """Whether the copy is there, and has the content that its name says."""
        try:
            return _take(stored.folder, None, True) == (stored.digest, stored.blob)
        except InvalidAdapterError:
            return False

    def _place(self, partial: Path, folder: Path) -> None:
        if folder.exists():
            log.error("a stored copy of an adapter was damaged on disk, and is replaced")
            delete(self._put_aside(folder))
        partial.rename(folder)
        sync_folder(self.folder)

    def _put_aside(self, folder: Path) -> Path:
        """A half-deleted folder must never stand under a digest, so it is renamed first."""
        return folder.rename(self.folder / f"{TEMPORARY}{secrets.token_hex(8)}")


def delete(path: Path) -> None:
    """A file or folder that nobody needs: it is tried again at the next start."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_small(source: Path) -> bool:
    """Whether its weights are, as far as can be seen: `_take` finds out what they are."""
    try:
        return (source / WEIGHTS_NAME).stat().st_size <= SMALL_BYTES
    except OSError:
        return False


def _take(source: Path, target: Path | None, with_defaults: bool) -> tuple[str, str]:
    """Reads an adapter's files, and copies them durably into the folder `target` if there is one. Their digest, and the
    name of the blob they make. Raises InvalidAdapterError for the source, OSError for the target."""
    with open_folder(source) as folder_fd:
        config = read_config(folder_fd)
        training = read_training(folder_fd)
        defaults = read_defaults(folder_fd) if with_defaults else {}
        with open_file(folder_fd, WEIGHTS_NAME, MAX_WEIGHTS_BYTES) as (file, size):
            digest = _take_weights(file, size, config, target and target / WEIGHTS_NAME)
    if target is not None:
        write_file(target, CONFIG_NAME, config)
        if training is not None:
            write_file(target, TRAINING_NAME, training)
        for name, data in defaults.items():
            write_file(target, name, data)
    return digest, blob_name(digest, training, defaults)


def _take_weights(source: BufferedIOBase, size: int, config: bytes | bytearray, target: Path | None) -> str:
    """Reads `size` bytes, and copies them durably; the digest of the adapter they make with `config`."""
    digest = start_digest(config, size)
    with open(target, "xb") if target else contextlib.nullcontext() as copy:
        while size:
            chunk = read_exactly(source, min(size, COPY_BYTES), WEIGHTS_NAME)
            digest.update(chunk)
            if copy is not None:
                copy.write(chunk)
            size -= len(chunk)
        if copy is not None:
            copy.flush()
            os.fsync(copy.fileno())
    return digest.hexdigest()
