"""The pages for people: their files, as a browser gets them."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.server.http.errors import NotFoundError

PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again each time by its ETag
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class WebPage:
    """A page and its files, which are read when the first of them is asked for, and kept. `policy` is its
    Content-Security-Policy. An ETag is of the content, since a wheel's files have the time that their installer gives
    them."""

    def __init__(self, files: Callable[[], Iterable[Path]], policy: str):
        self._files = files
        self._headers = _HEADERS | {"Content-Security-Policy": policy}
        self._contents: dict[str, tuple[bytes, str]] | None = None

    def file(self, name: str, request: Request) -> Response:
        """Raises NotFoundError."""
        if self._contents is None:
            found = {path.name: path.read_bytes() for path in self._files() if path.suffix in _TYPES}
            self._contents = {name: (content, _etag(content)) for name, content in found.items()}
        if name not in self._contents:
            raise NotFoundError("There is nothing at this path.")
        content, etag = self._contents[name]
        headers = self._headers | {"ETag": etag}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"Content-Type": _TYPES[Path(name).suffix]})


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'
