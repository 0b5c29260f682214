"""The FastAPI application: which path leads where."""

from collections.abc import Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from tucka_runtime.errors import TuckaError
from tucka_runtime.server.api import adapters as admin
from tucka_runtime.server.api import aliases, console, docs, openapi, ops
from tucka_runtime.server.api.anthropic_messages import MESSAGES, count_tokens
from tucka_runtime.server.api.audited import audited
from tucka_runtime.server.api.chat import CHAT
from tucka_runtime.server.api.completions import COMPLETION
from tucka_runtime.server.api.door import Endpoint, generating
from tucka_runtime.server.api.embeddings import embeddings
from tucka_runtime.server.api.models import get_model, list_models
from tucka_runtime.server.api.reading import IGNORED_HEADER, shown
from tucka_runtime.server.api.responses import RESPONSE
from tucka_runtime.server.http.body import read
from tucka_runtime.server.http.errors import MethodNotAllowedError, NotFoundError, error_response, internal_error
from tucka_runtime.server.http.keys import Auth, role_of
from tucka_runtime.server.http.limits import LIMIT_HEADERS
from tucka_runtime.server.http.middleware import Guard, RequestScope
from tucka_runtime.server.service.service import Service


def create_app(service: Service) -> ASGIApp:
    """Request id and log outermost, then the keys, then the routes."""
    config = service.config
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    routes: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v1/completions", generating(COMPLETION)),
        ("POST", "/v1/chat/completions", generating(CHAT)),
        ("POST", "/v1/responses", generating(RESPONSE)),
        ("POST", "/v1/messages", generating(MESSAGES)),
        ("POST", "/v1/messages/count_tokens", count_tokens),
        ("POST", "/v1/embeddings", embeddings),
        ("GET", "/v1/models", list_models),
        ("GET", "/v1/models/{name:path}", get_model),
        ("GET", "/v1/adapters", admin.list_adapters),
        ("POST", "/v1/adapters", admin.post_adapter),
        ("GET", "/v1/adapters/{name:path}", admin.get_adapter),
        ("DELETE", "/v1/adapters/{name:path}", admin.delete_adapter),
        ("PUT", "/v1/adapters/{name:path}", admin.put_adapter),
        ("POST", "/v1/adapters/{name:path}/rollback", admin.roll_back),
        ("GET", "/v1/aliases", aliases.list_aliases),
        ("POST", "/v1/aliases", aliases.post_alias),
        ("GET", "/v1/aliases/{name:path}", aliases.get_alias),
        ("DELETE", "/v1/aliases/{name:path}", aliases.delete_alias),
        ("POST", "/v1/load_lora_adapter", admin.load_lora_adapter),
        ("POST", "/v1/unload_lora_adapter", admin.unload_lora_adapter),
        ("POST", "/load_lora_adapter", admin.load_as_sglang),
        ("POST", "/unload_lora_adapter", admin.unload_as_sglang),
        ("GET", "/", console.page_or(ops.root) if config.console else ops.root),
        ("GET", "/health", ops.health),
        ("GET", "/ping", ops.health),
        ("POST", "/ping", ops.health),
        ("GET", "/ready", ops.ready),
        ("GET", "/version", ops.version),
        ("GET", "/server_info", ops.server_info),
        ("GET", "/get_server_info", ops.server_info),
        ("GET", "/model_info", ops.model_info),
        ("GET", "/get_model_info", ops.model_info),
        ("GET", "/metrics", ops.metrics),
        ("POST", "/tokenize", ops.tokenize),
        ("POST", "/detokenize", ops.detokenize),
        ("GET", "/tokenizer_info", ops.tokenizer_info),
    ]
    if config.console:
        routes.append(("GET", console.FOLDER + "{name}", console.file))
    if config.docs:
        routes += [
            ("GET", "/openapi.json", openapi.openapi),
            ("GET", "/docs", docs.page),
            ("GET", docs.FOLDER + "{name}", docs.file),
        ]
        app.state.openapi = openapi.document([(method, path) for method, path, _ in routes])
    for method, path, endpoint in routes:
        limit = None if endpoint is admin.put_adapter else config.max_body_bytes
        if method != "GET" and role_of(path) == "admin":
            endpoint = audited(f"{method} {path}", endpoint)
        app.router.add_route(path, _with_body(endpoint, limit), methods=[method])
    _add_handlers(app)
    is_open = console.serves if config.console else lambda scope: False
    keyed = Auth(app, service.keys, service.metrics.keys, is_open)
    return RequestScope(_cors(Guard(keyed), config.cors_origin), service.metrics.answered, _templates(app))


def create_metrics_app(service: Service) -> ASGIApp:
    """Figures and probes alone, for everybody who reaches their port."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for path, endpoint in (("/metrics", ops.metrics), ("/health", ops.health), ("/ready", ops.ready)):
        app.router.add_route(path, endpoint, methods=["GET"])
    _add_handlers(app)
    opened = Auth(app, service.keys, service.metrics.keys, lambda scope: True)
    return RequestScope(Guard(opened), service.metrics.answered, _templates(app))


def _add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(TuckaError, _tucka_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


def _cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Outside the keys: a browser's preflight carries none. Cookies are nobody's here, so none are allowed."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "PUT", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", IGNORED_HEADER, "retry-after", *LIMIT_HEADERS),
    )


def _with_body(endpoint: Endpoint, limit: int | None) -> Endpoint:
    """The endpoint, entered when the request has arrived whole; where there is no limit, it reads that itself."""

    async def enter(request: Request) -> Response:
        if limit is not None:
            await read(request, limit)
        response = await endpoint(request)
        if ignored := getattr(request.state, "ignored", None):
            response.headers[IGNORED_HEADER] = shown(ignored)
        return response

    return enter


def _templates(app: FastAPI) -> Callable[[Scope], str | None]:
    """Finds the route's template for log and metrics: the path itself is the client's to choose."""
    routes = [route for route in app.router.routes if isinstance(route, Route)]

    def find(scope: Scope) -> str | None:
        return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), None)

    return find


async def _tucka_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TuckaError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        # Starlette names the methods of the first route alone, of which a path has one for each method.
        routes = [route for route in request.app.router.routes if isinstance(route, Route)]
        own = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        allowed = sorted({method for route in own for method in route.methods or ()})
        return error_response(
            MethodNotAllowedError("This path does not take this method."), {"Allow": ", ".join(allowed)}
        )
    return error_response(NotFoundError("There is nothing at this path."))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Starlette calls it for whatever has no handler, and raises that again: Guard logs it."""
    if isinstance(error, ClientDisconnect):
        raise error
    return error_response(internal_error(request.state.request_id))
