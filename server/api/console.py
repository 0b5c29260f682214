"""The console, a page for people: `GET /` in a browser, and its files. They are the same for everybody and open to
everybody: a page has no key before it is there. What it shows it asks for like any client.
"""

from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from tucka_runtime.server.api.door import Endpoint
from tucka_runtime.server.api.web_page import PAGE, WebPage

FOLDER = "/console/"
_FILES = Path(__file__).parents[1] / "console"
# Nothing but the page's own files and this server; no script or style within HTML, no HTML made of strings, no frame.
_PAGE = WebPage(
    _FILES.iterdir,
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
)


def serves(scope: Scope) -> bool:
    """Whether the request is for the console."""
    path: str = scope["path"]
    return path.startswith(FOLDER) or (path == "/" and scope["method"] in ("GET", "HEAD") and _wants_page(scope))


def page_or(otherwise: Endpoint) -> Endpoint:
    """An endpoint that answers a browser with the page, and programs as `otherwise` does."""

    async def root(request: Request) -> Response:
        response = _PAGE.file(PAGE, request) if _wants_page(request.scope) else await otherwise(request)
        response.headers["Vary"] = "Accept"
        return response

    return root


async def file(request: Request) -> Response:
    return _PAGE.file(request.path_params["name"], request)


def _wants_page(scope: Scope) -> bool:
    """Browsers name text/html when somebody goes to an address; programs name JSON, or anything."""
    return any("text/html" in accepted.lower() for accepted in Headers(scope=scope).getlist("accept"))
