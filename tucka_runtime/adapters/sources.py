"""Where adapters may be loaded from. Standard library only."""

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from tucka_runtime.errors import InvalidAdapterError

MAX_PATH = 4096  # characters; Linux's own limit


def resolve_source(path: str, roots: Sequence[Path]) -> Path:
    """The folder `path` names: absolute and below a root, or relative and looked for below each root in turn.

    What can be refused by its form is refused before the disk is touched; the network never is. Raises
    InvalidAdapterError, with one message for what is absent and for what lies outside.
    """
    if not 0 < len(path) <= MAX_PATH or not path.isprintable():
        raise InvalidAdapterError(f"the adapter's path must be 1 to {MAX_PATH} printable characters.")
    if _names_a_host(path):
        raise InvalidAdapterError(
            "the adapter's path looks like a URL or a network address. Give a folder below an --adapter-root, or the "
            "name of a source that the operator allowed (--adapter-source) and a folder in it, as `NAME:folder`."
        )
    if not roots:
        raise InvalidAdapterError(
            "the server was started without an --adapter-root, so no adapter can be loaded by a request. Start it with "
            "--adapter-root and the folder that they lie in."
        )
    if ".." in path.split("/"):
        raise InvalidAdapterError("the adapter's path has a `..` part. Give the folder's own path.")
    for root in roots:
        real = root.resolve()
        if path.startswith("/") and not any(Path(path).is_relative_to(prefix) for prefix in (root, real)):
            continue
        try:
            folder = (real / path).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
            continue
        if folder.is_relative_to(real) and folder.is_dir():
            return folder
    raise InvalidAdapterError(
        "the adapter's path names no folder below an allowed root. A relative path is looked for below each "
        "--adapter-root, whose own name is not part of it. Move the adapter there, or start the server with another "
        "--adapter-root."
    )


def _names_a_host(path: str) -> bool:
    if "\\" in path or path.startswith("//") or "://" in path:
        return True
    first = path.split("/")[0]
    try:
        ipaddress.ip_address(first.strip("[]"))
    except ValueError:
        return ":" in first or first.startswith("[")
    return True
