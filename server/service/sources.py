"""Where adapters come from: folders below the roots, sources that the operator named, and the bodies of requests."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tucka_runtime.adapters.archive import MAX_ARCHIVE_BYTES, unpack
from tucka_runtime.adapters.files import CONFIG_NAME, served_files
from tucka_runtime.adapters.readers import reader_of
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.adapters.remote import NoSuchAdapterError, Source, check_folder, fetch
from tucka_runtime.adapters.sources import resolve_source
from tucka_runtime.errors import OverloadedError
from tucka_runtime.server.http.errors import BodyTooLargeError
from tucka_runtime.server.http.multipart import MultipartFiles

T = TypeVar("T")

THREADS = 4  # for looking up folders, and for writing what comes over a network
MAX_UPLOADS = 8  # at once: each may take up to MAX_ARCHIVE_BYTES twice on the disk
PIECE_BYTES = 2**20  # of a body are handed to a thread at once
UPLOADED = "(upload)"


@dataclass(frozen=True)
class Found:
    """An adapter's folder, while it is there, and what the registry notes of where it came from."""

    folder: Path
    origin: str


class AdapterSources:
    """Finds adapters in folders below `roots` and in `named` sources, and takes them out of requests. What does not lie
    in a folder of its own is written below the registry's root first, never into memory. With `defaults` adapters bring
    the files of those."""

    def __init__(
        self,
        registry: AdapterRegistry,
        roots: Sequence[Path] = (),
        named: Iterable[Source] = (),
        defaults: bool = False,
    ):
        self._registry = registry
        self._roots = roots
        self._named = {source.name: source for source in named}
        self.defaults = defaults
        self._uploads = 0
        self._threads = ThreadPoolExecutor(THREADS, "adapter-sources")
        self._downloads = ThreadPoolExecutor(THREADS, "adapter-downloads")

    @asynccontextmanager
    async def found(self, path: str, defaults: bool | None = None) -> AsyncIterator[Found]:
        """The folder that a client calls `path`, while this is entered: one below a root, or `NAME:folder` in a source.
        `defaults` where they are wanted, or not, whatever the server's setting is.

        Raises InvalidAdapterError, NoSuchAdapterError, SourceError, StorageError.
        """
        name, colon, below = path.partition(":")
        if not colon or name not in self._named:
            folder = await self._run(resolve_source, path, self._roots)
            yield Found(folder, str(folder))
            return
        source = self._named[name]
        check_folder(below)
        if source.scheme == "file":
            folder = await self._run(_folder_in, source, below)
            yield Found(folder, str(folder))
            return
        async with self._workspace() as folder:
            with self._registry.refusals():
                files = served_files(self.defaults if defaults is None else defaults)
                await self._run(_fetch, source, below, folder, files, pool=self._downloads)
            yield Found(folder, path)

    @asynccontextmanager
    async def uploaded(self, pieces: AsyncIterator[bytes], boundary: bytes | None) -> AsyncIterator[Found]:
        """The folder of the adapter in a body, while this is entered: a multipart one with this boundary, else a .tar
        or .tar.gz.

        Raises OverloadedError, InvalidAdapterError, InvalidRequestError, BodyTooLargeError, StorageError, and what
        `pieces` raises.
        """
        if self._uploads >= MAX_UPLOADS:
            raise OverloadedError(
                f"{MAX_UPLOADS} adapters are being uploaded, and more are not taken. Try again later."
            )
        self._uploads += 1
        try:
            async with self._workspace() as folder:
                with self._registry.refusals():
                    if boundary is None:
                        folder = await self._unpacked(pieces, folder)
                    else:
                        await self._parted(pieces, boundary, folder)
                yield Found(folder, UPLOADED)
        finally:
            self._uploads -= 1

    def close(self) -> None:
        """Waits for nothing."""
        for pool in (self._threads, self._downloads):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _unpacked(self, pieces: AsyncIterator[bytes], workspace: Path) -> Path:
        archive, folder = workspace / "archive", workspace / "unpacked"
        with archive.open("xb") as file:
            async for piece in _bounded(pieces):
                await self._run(file.write, piece)
        folder.mkdir()
        await self._run(unpack, archive, folder, served_files(self.defaults))
        return folder

    async def _parted(self, pieces: AsyncIterator[bytes], boundary: bytes, folder: Path) -> None:
        with MultipartFiles(boundary, folder, served_files(True)) as files:  # a client does not know the setting
            async for piece in _bounded(pieces):
                await self._run(files.feed, piece)
            files.finish()

    @asynccontextmanager
    async def _workspace(self) -> AsyncIterator[Path]:
        """A folder for what is being written, which goes with the context."""
        folder = await self._run(self._registry.make_workspace)
        try:
            yield folder
        finally:
            await asyncio.shield(self._run(shutil.rmtree, folder, True))

    async def _run(self, function: Callable[..., T], *arguments: object, pool: ThreadPoolExecutor | None = None) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool or self._threads, function, *arguments)


def _fetch(source: Source, below: str, folder: Path, files: dict[str, int]) -> None:
    fetch(reader_of(source), below, folder, files)


def _folder_in(source: Source, below: str) -> Path:
    """Raises NoSuchAdapterError."""
    root = Path(source.location).resolve()
    folder = (root / below).resolve()
    if not folder.is_relative_to(root) or not (folder / CONFIG_NAME).is_file():
        raise NoSuchAdapterError("the source has no such adapter: no adapter_config.json is there.")
    return folder


async def _bounded(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in larger pieces. Raises BodyTooLargeError once they are more than any adapter's."""
    total, waiting = 0, bytearray()
    async for piece in pieces:
        total += len(piece)
        if total > MAX_ARCHIVE_BYTES:
            raise BodyTooLargeError(f"The body is larger than {MAX_ARCHIVE_BYTES} bytes, which no adapter needs.")
        waiting += piece
        if len(waiting) >= PIECE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)
