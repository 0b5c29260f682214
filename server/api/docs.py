"""/docs: Swagger UI over /openapi.json. All of it comes from here: a server's browsers may reach nothing else."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from tucka_runtime.server.api.web_page import PAGE, WebPage

FOLDER = "/docs/"
_OWN = Path(__file__).parents[1] / "docs"
_SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")
# Swagger UI writes style attributes, and has its pictures within its CSS.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _files() -> Iterator[Path]:
    """Ours, and Swagger UI's as fastapi-offline's wheel carries them."""
    yield from _OWN.iterdir()
    for name in _SWAGGER_UI:
        yield Path(str(files("fastapi_offline") / "static" / name))


_PAGE = WebPage(_files, _POLICY)


async def page(request: Request) -> Response:
    return _PAGE.file(PAGE, request)


async def file(request: Request) -> Response:
    return _PAGE.file(request.path_params["name"], request)
