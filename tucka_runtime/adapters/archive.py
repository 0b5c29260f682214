"""Adapters in a tar that nobody vouches for. Standard library only.

The files that an adapter has are written under their own names into a folder that is given; nothing that an archive
says decides where anything is written. tarfile only takes the headers apart: it reads through a file that bounds what
it may ask for, since it takes extended headers whole, of whatever size they claim to have.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from tucka_runtime.adapters.files import FILE_LIMITS, MAX_WEIGHTS_BYTES
from tucka_runtime.errors import InvalidAdapterError

MAX_MEMBERS = 1000  # a training's folder with its checkpoints has some hundred
MAX_ARCHIVE_BYTES = (
    MAX_WEIGHTS_BYTES + 64 * 2**20
)  # unpacked, or as it is sent: room for a tokenizer beside the weights
MAX_RATIO = 100  # of unpacked to packed; trained weights have less than 2, and half of a new LoRA is zeros
FREE_BYTES = 64 * 2**20  # are unpacked at any ratio
READ_BYTES = 128 * 2**10  # the most that is read at once, as buffers of Python 3.14 do; long names take 4 KiB

_GZIP = b"\x1f\x8b"


def unpack(archive: Path, folder: Path, files: Mapping[str, int] = FILE_LIMITS) -> None:
    """Writes `files` with their limits, which an adapter may have, out of a .tar or .tar.gz into `folder`. They may lie
    in a folder of the archive, all in the same one; other files are passed over.

    Raises InvalidAdapterError for what is hostile, damaged or ambiguous, OSError where the folder cannot be written.
    """
    found: dict[str, str] = {}
    with archive.open("rb") as packed, _whatever_is_broken():
        for tar, member in _members(packed, os.path.getsize(archive)):
            parent, _, name = _checked(member).rpartition("/")
            if name not in files:
                continue
            if name in found:
                where = "twice" if found[name] == parent else "in two folders"
                raise _refused(f"it has {name} {where}", "Pack the files of one adapter, without checkpoints.")
            found[name] = parent
            _extract(tar, member, folder / name, files[name])
    if len(set(found.values())) > 1:
        raise _refused("the adapter's files lie in several of its folders", "Pack the files of one adapter.")


def _members(packed: IO[bytes], size: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every entry, in the order of the archive: one is to be read before the next is asked for."""
    is_gzip = packed.read(len(_GZIP)) == _GZIP
    packed.seek(0)
    source = _Bounded(gzip.GzipFile(fileobj=packed) if is_gzip else packed, size, is_gzip)
    with tarfile.open(fileobj=cast(IO[bytes], source), mode="r:") as tar:
        for _ in range(MAX_MEMBERS):
            if (member := tar.next()) is None:
                return
            yield tar, member
    raise _refused(f"it has {MAX_MEMBERS} entries or more", "Pack the adapter's files alone.")


def _checked(member: tarfile.TarInfo) -> str:
    """The entry's path without `./`. Raises InvalidAdapterError unless it is a plain file or folder within the
    archive."""
    path = member.name.removeprefix("./")
    if path.startswith("/"):
        raise _refused("an entry has an absolute path", "Pack with paths relative to the folder: tar -C FOLDER -c .")
    if ".." in path.split("/"):
        raise _refused("an entry's path has a `..` part", "Pack with paths within the folder: tar -C FOLDER -c .")
    if member.issym() or member.islnk():
        raise _refused("it holds a link, which is never followed", "Pack the files themselves: tar -h follows links.")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _refused("it holds an entry that is neither a plain file nor a folder", "Pack the adapter's files alone.")
    return path


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, limit: int) -> None:
    name = target.name
    data = tar.extractfile(member) if member.isreg() else None
    if data is None:
        raise _refused(f"its {name} is a folder", "Pack the adapter's files alone.")
    if not 0 <= member.size <= limit:
        raise _refused(f"its {name} is larger than {limit} bytes", "Larger ones are not served.")
    left = member.size
    with data, target.open("xb") as file:
        while left:
            chunk = data.read(min(left, READ_BYTES))
            if not chunk:
                raise _refused(f"it ends within {name}", "Send all of it.")
            file.write(chunk)
            left -= len(chunk)


@contextmanager
def _whatever_is_broken() -> Iterator[None]:
    """What tarfile, gzip and zlib say of a broken archive becomes an InvalidAdapterError. The last four are what
    tarfile lets through of numbers, texts and chains of headers that are made to break it."""
    try:
        yield
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        ValueError,
        OverflowError,
        IndexError,
        RecursionError,
    ):
        raise _refused("it is damaged, or neither a .tar nor a .tar.gz", "Pack it again, and send all of it.") from None


class _Bounded:
    """A file for tarfile, of which no more is asked at once than READ_BYTES, and in all than MAX_ARCHIVE_BYTES. Of a
    packed one, of `size` bytes as it came, no more than MAX_RATIO times that."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, size: int, is_packed: bool):
        self._file = file
        most = max(size * MAX_RATIO, FREE_BYTES) if is_packed else size
        self._most = min(most, MAX_ARCHIVE_BYTES)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= READ_BYTES:
            raise _refused(f"a header of it is larger than {READ_BYTES} bytes", "Pack the adapter's files alone.")
        self._check(self._file.tell())
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, position: int) -> None:
        if position > self._most:
            raise _refused(
                "it unpacks to far more than an adapter has, or says that it is longer than it is",
                "Pack the adapter's files alone, and send all of it.",
            )


def _refused(what: str, remedy: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"the archive cannot be used: {what}. {remedy}")
