"""What happens to every request: an id, a limit on its headers, one log line, one metric, and a last resort."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tucka_runtime.errors import EngineDeadError, TuckaError
from tucka_runtime.logs import fields
from tucka_runtime.server.http.errors import (
    HeadersTooLargeError,
    crowded,
    error_response,
    internal_error,
    speaks_anthropic,
)
from tucka_runtime.server.http.keys import PROBES, may_use_reserve

log = logging.getLogger("tucka_runtime.server.access")

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 2**10
SHOWN_PATH = 100  # characters of a path that leads nowhere, in the log
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestScope:
    """The outermost layer, which notes every request when it is over. Every answer gets `x-request-id`: the client's
    own if it is well-formed, else a new one. At Anthropic's doors it has that under their own name too."""

    def __init__(self, app: ASGIApp, count: Callable[[str, str, str], None], route_of: Callable[[Scope], str | None]):
        """`count` is told of every answer's route, method and status code; `route_of` gives the template of the route
        that a request is for, whoever answers it, and None for a path that leads nowhere."""
        self._app = app
        self._count = count
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = state.setdefault("received", time.monotonic())  # the connection knows better
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = [(b"x-request-id", request_id.encode())]
                if speaks_anthropic(scope["path"]):
                    named.append((b"request-id", request_id.encode()))
                message["headers"] = [*message.get("headers", []), *named]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499  # nobody is there to see it; it is for the log
        finally:
            self._note(scope, status, request_id, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        state = scope["state"]
        route, error = self._route_of(scope) or "unmatched", state.get("error")
        key = state["access"].name if "access" in state else None
        path = quote(scope["path"])[:SHOWN_PATH] if route == "unmatched" else None
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._count(route, method, str(status))
        level = logging.DEBUG if route in (*PROBES, "/metrics") else logging.INFO
        log.log(
            level,
            "%s %s%s %d%s %.0f ms %s%s",
            method,
            route,
            f" {path}" if path else "",
            status,
            f" {error}" if error else "",
            seconds * 1000,
            request_id,
            f" {key}" if key else "",
            extra=fields(
                event="http",
                method=method,
                route=route,
                path=path,
                code=status,
                error=error,
                seconds=round(seconds, 6),
                request_id=request_id,
                key=key,
            ),
        )


class Guard:
    """Refuses what is not even looked at, and answers what nobody within did. It stands inside the layer that lets
    pages of other origins read answers: they may read its errors as well."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refusal := _refusal(scope)) is not None:
            await error_response(refusal, {"Connection": "close"})(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:  # by the server's end alone, which waits for no request any longer
            if not begun:
                error = EngineDeadError("The server is stopping. Try again later.")
                await error_response(error)(scope, receive, send)
        except Exception:  # the last resort: no request may take the server down or see a traceback
            request_id = scope["state"]["request_id"]
            log.exception("request %s failed", request_id)
            if not begun:  # an exception within a route has been answered there
                await error_response(internal_error(request_id))(scope, receive, send)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


def _refusal(scope: Scope) -> TuckaError | None:
    """Why a request is not even looked at."""
    headers = scope["headers"]
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        return HeadersTooLargeError(
            f"More than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes of them. Send fewer."
        )
    if scope["state"].get("crowded") and not may_use_reserve(scope["path"]):
        return crowded()
    return None
