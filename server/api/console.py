"""The console, a page for people: `GET /` in a browser, and its files. They are the same for everybody and open to
everybody: a page has no key before it is there. What it shows it asks for like any client.
"""

import hashlib
from functools import cache
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from tucka_runtime.server.api.door import Endpoint
from tucka_runtime.server.http.errors import NotFoundError

FOLDER = "/console/"
PAGE = "index.html"
_FILES = Path(__file__).parents[1] / "console"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but the page's own files and this server; no script or style within HTML, no HTML made of strings, no frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again each time by its ETag
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serves(scope: Scope) -> bool:
    """Whether the request is for the console."""
    path: str = scope["path"]
    return path.startswith(FOLDER) or (path == "/" and scope["method"] in ("GET", "HEAD") and _wants_page(scope))


def page_or(otherwise: Endpoint) -> Endpoint:
    """An endpoint that answers a browser with the page, and programs as `otherwise` does."""

    async def root(request: Request) -> Response:
        response = _file(PAGE, request) if _wants_page(request.scope) else await otherwise(request)
        response.headers["Vary"] = "Accept"
        return response

    return root


async def file(request: Request) -> Response:
    return _file(request.path_params["name"], request)


def _wants_page(scope: Scope) -> bool:
    """Browsers name text/html when somebody goes to an address; programs name JSON, or anything."""
    return any("text/html" in accepted.lower() for accepted in Headers(scope=scope).getlist("accept"))


def _file(name: str, request: Request) -> Response:
    """Raises NotFoundError."""
    found = _contents().get(name)
    if found is None:
        raise NotFoundError("There is nothing at this path.")
    content, etag = found
    headers = _HEADERS | {"ETag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers | {"Content-Type": _TYPES[Path(name).suffix]})


@cache
def _contents() -> dict[str, tuple[bytes, str]]:
    """All files and their ETags by name: some 40 KiB. An ETag is of the content, since a wheel's files have the time
    that their installer gives them."""
    found = {path.name: path.read_bytes() for path in _FILES.iterdir() if path.suffix in _TYPES}
    return {name: (content, f'"{hashlib.sha256(content).hexdigest()[:32]}"') for name, content in found.items()}
