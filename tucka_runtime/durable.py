"""Files that are replaced whole. Standard library only."""

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_file(
    folder: Path,
    name: str,
    data: bytes | bytearray,
    mode: int = 0o666,
    prepare: Callable[[int], None] | None = None,
) -> None:
    """Replace `folder/name` by `data`, so that after a crash at any moment one of the two is there whole.

    The new file has `mode` less the umask, from its first byte on. `prepare` is called with its descriptor before it
    gets the name. Raises OSError, and what `prepare` raises.
    """
    temporary = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
    temporary.unlink(missing_ok=True)  # of a process that was killed, and had this one's number
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(data)
            file.flush()
            if prepare is not None:
                prepare(file.fileno())
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
