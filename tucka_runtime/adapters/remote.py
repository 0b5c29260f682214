"""Adapters' files from sources that the operator named: object stores, HTTPS servers, the Hugging Face Hub.

A source is `NAME=URI`; what a client may ask of it is a folder below that URI. Its size is known, and within the
limits, before a file is fetched; one whose connection breaks goes on where it was, and what has arrived is held against
what the source says of it. Credentials come from the environment, and no text of a store or of its library goes into an
error: those may hold them.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tucka_runtime.adapters.files import CONFIG_NAME, FILE_LIMITS, OPTIONAL
from tucka_runtime.errors import ConfigError, InvalidAdapterError, SourceError, TuckaError
from tucka_runtime.extras import EXTRAS, how_to_install, installed

T = TypeVar("T")

ATTEMPTS = 5  # at one file, of connections that break
PAUSE_SECONDS = 0.5  # after the first that broke, then twice as long each time

_SOURCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})=(file|s3|gs|https|hf):([^\s]*)")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+=-]*")


@dataclass(frozen=True)
class Source:
    """A place that adapters may come from. `location` is the URI without its scheme and its slashes."""

    name: str
    scheme: str
    location: str

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Of `NAME=URI`. Raises ConfigError, also where the extra that it needs is not installed."""
        found = _SOURCE.fullmatch(text)
        if found is None:
            raise ConfigError(
                "--adapter-source takes NAME=URI: a name of letters, digits, `-` and `_`, and an address that begins "
                "with file:, s3:, gs:, https: or hf:."
            )
        name, scheme, location = found.groups()
        location = location if scheme == "file" else location.strip("/")
        if scheme == "file" and not os.path.isdir(location := re.sub("^//(?=/)", "", location)):
            raise ConfigError(f"--adapter-source {name}: {location} is no folder that can be read here.")
        if "@" in location.split("/")[0] and scheme != "hf":
            raise ConfigError(f"--adapter-source {name}: leave the credentials out. They come from the environment.")
        if scheme not in ("file", "hf") and not location:
            raise ConfigError(f"--adapter-source {name}: the address names no bucket or host.")
        if scheme in EXTRAS and not installed(scheme):
            raise ConfigError(f"--adapter-source {name}: {scheme}: needs more. To get it, {how_to_install(scheme)}.")
        return cls(name, scheme, location)


@dataclass(frozen=True)
class RemoteFile:
    """What a source says of a file. `version` changes with its content; `digests` are hex, by hashlib's names."""

    size: int
    version: str
    digests: Mapping[str, str]


class SourceReader(Protocol):
    """One source, while one adapter is fetched. Whatever its library raises is for `fetch` to translate."""

    def look(self, path: str) -> RemoteFile:
        """Raises FileNotFoundError, PermissionError, OSError and what the library raises."""

    def read(self, path: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes from `start` on. Raises the same, and ChangedError where it is another version by now."""


class ChangedError(Exception):
    """The file is not the one that was looked at."""


class NoSuchAdapterError(InvalidAdapterError):
    """The source has nothing of that name."""


def check_folder(folder: str) -> None:
    """Raises InvalidAdapterError unless `folder` can name one below a source: it becomes part of an address."""
    if len(folder) > 512 or not all(map(_PART.fullmatch, folder.split("/") if folder else ())):
        raise InvalidAdapterError(
            "the folder below a source must be up to 512 letters, digits or characters of `. _ @ + = -`, in parts "
            "between slashes that begin with a letter, a digit or `_`."
        )


def fetch(reader: SourceReader, folder: str, target: Path, files: Mapping[str, int] = FILE_LIMITS) -> None:
    """Writes `files` with their limits, which an adapter may have, from `folder` of a source into the folder `target`.

    Raises NoSuchAdapterError, InvalidAdapterError, SourceError, and OSError where `target` cannot be written.
    """
    for name, limit in files.items():
        path = f"{folder}/{name}" if folder else name
        try:
            file = _asked(reader.look, path)
        except FileNotFoundError:
            if name in OPTIONAL:
                continue
            if name == CONFIG_NAME:
                raise NoSuchAdapterError("the source has no such adapter: no adapter_config.json is there.") from None
            raise InvalidAdapterError(f"the adapter has no {name} at its source.") from None
        if file.size > limit:
            raise InvalidAdapterError(f"the adapter's {name} is larger than {limit} bytes.")
        _download(reader, path, file, target / name)


def _download(reader: SourceReader, path: str, file: RemoteFile, target: Path) -> None:
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            _append(reader, path, file, target)
            break
        except (ChangedError, FileNotFoundError):
            raise SourceError(
                f"The adapter's {target.name} was replaced while it was fetched. Load it again."
            ) from None
        except SourceError:
            if attempt == ATTEMPTS - 1:
                raise
    for kind, digest in file.digests.items():
        with target.open("rb") as copy:
            if hashlib.file_digest(copy, kind).hexdigest() != digest:
                raise SourceError(f"What arrived of the adapter's {target.name} is not what its source has. Try again.")


def _append(reader: SourceReader, path: str, file: RemoteFile, target: Path) -> None:
    """Goes on where `target` ends. Raises SourceError where less arrives than there is, ChangedError where more
    does."""
    with target.open("ab") as output:
        start = output.tell()
        pieces = _asked(reader.read, path, file, start)
        while (piece := _asked(next, pieces, None)) is not None:
            if (start := start + len(piece)) > file.size:
                raise ChangedError
            output.write(piece)
    if start != file.size:
        raise SourceError("The source ended its answer too early.")


def _asked(function: Callable[..., T], *arguments: object) -> T:
    """What a source's library answers. What it raises becomes a SourceError that says its kind alone."""
    try:
        return function(*arguments)
    except (FileNotFoundError, ChangedError, TuckaError):
        raise
    except PermissionError:
        raise SourceError("The source refuses the server's credentials, which its environment holds.") from None
    except Exception as error:  # a store's library raises what it will
        raise SourceError(f"The source cannot be read ({type(error).__name__}). Try again later.") from None
