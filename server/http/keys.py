"""The door for keys. Decides on the decoded path that the router will see, on the method and on two headers. What is
open beside the probes is for the caller to say."""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tucka_runtime.errors import TuckaError
from tucka_runtime.server.http.access import OPEN, Access, Keys, Meter
from tucka_runtime.server.http.errors import (
    ForbiddenError,
    RoleRequiredError,
    UnauthorizedError,
    error_response,
)
from tucka_runtime.server.http.limits import Admission

PROBES = ("/health", "/ping", "/ready")
METRICS = "/metrics"
_ADMIN_PATHS = (
    "/v1/adapters",
    "/v1/aliases",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)
_ANY_ROLE = ("/", "/version", "/openapi.json", "/docs")


class Auth:
    """Without keys the server is open. With them every path but the probes, and what `is_open` says is, needs one with
    the path's role, whether it exists or not.

    Sets `state.access`, what the request's key may see, and `state.admission`, what it takes of the key's limits until
    it is over, whichever way it ends.
    """

    def __init__(self, app: ASGIApp, keys: Keys, meter: Meter, is_open: Callable[[Scope], bool]):
        self._app = app
        self._keys = keys
        self._meter = meter
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        admission: Admission | None = None
        try:
            access = scope["state"]["access"] = self._check(scope)
            counts = access.limits is not None and takes_limits(scope["method"], scope["path"])
            if counts and access.limits is not None:
                send = _with_limits(send, access.limits.headers)
            admission = scope["state"]["admission"] = access.admit() if counts else Admission()
        except TuckaError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            await error_response(error, headers)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            admission.close()

    def _check(self, scope: Scope) -> Access:
        """What the request's key opens. Raises UnauthorizedError, ForbiddenError."""
        path = scope["path"]
        if self._keys.open or path in PROBES or self._is_open(scope):
            return OPEN
        given = _key(scope)
        access = None if given is None else self._keys.find(given)
        if access is None:
            raise UnauthorizedError(
                "A valid API key is required. Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            )
        scope["state"]["access"] = access  # the log names also who was refused
        role = role_of(path)
        if role is not None and role not in access.roles:
            if access.name is not None:
                self._meter.refused(access.name, "role")
            if role == "admin":
                raise ForbiddenError("This key may not manage adapters. Use one of the server's admin keys.")
            raise RoleRequiredError(f"This key has not the role {role}, which this path asks for. Use one that has.")
        return access


def role_of(path: str) -> str | None:
    """The role that a path asks for: None is any. Paths that do not exist have one too."""
    if path in _ANY_ROLE or path.startswith("/docs/"):
        return None
    if path == METRICS:
        return "metrics"
    return "admin" if _is_admin_path(path) else "infer"


def takes_limits(method: str, path: str) -> bool:
    """Whether a request counts for its key's limits: all that make the server work, on whatever they fail."""
    return method == "POST" and path not in PROBES and role_of(path) == "infer"


def _with_limits(send: Send, headers: Callable[[], list[tuple[bytes, bytes]]]) -> Send:
    """Every answer says what is left of the limits as it begins."""

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *headers()]
        await send(message)

    return send_with_limits


def _key(scope: Scope) -> bytes | None:
    """The key that the request carries; None without one. `Authorization` counts alone where it is sent, else the
    `x-api-key` of Anthropic's clients."""
    headers = dict(reversed(scope["headers"]))  # of several of a name the first
    if (value := headers.get(b"authorization")) is not None:
        kind, _, key = value.partition(b" ")
        return (key.strip() or None) if kind.lower() == b"bearer" else None
    return headers.get(b"x-api-key", b"").strip() or None


def may_use_reserve(path: str) -> bool:
    """Whether requests for this path are served when all connections are taken: what tells how the server is, and what
    could relieve it."""
    return path in PROBES or path == METRICS or _is_admin_path(path)


def _is_admin_path(path: str) -> bool:
    return any(path == admin or path.startswith(admin + "/") for admin in _ADMIN_PATHS)
