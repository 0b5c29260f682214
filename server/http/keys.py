"""API keys. Decides on the decoded path that the router will see, and on two of its headers. What is open beside the
probes is for the caller to say."""

import hashlib
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from tucka_runtime.errors import TuckaError
from tucka_runtime.server.http.errors import ForbiddenError, UnauthorizedError, error_response

PROBES = ("/health", "/ping", "/ready")
_ADMIN_PATHS = (
    "/v1/adapters",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)


class Auth:
    """Without keys the server is open. With them every path but the probes, and what `is_open` says is, needs one,
    whether it exists or not.

    Admin keys are good for everything; where there are none, every API key is. Sets `state.cache_salt`, which keeps
    one key's cached prompts from another's.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: tuple[str, ...],
        admin_keys: tuple[str, ...],
        is_open: Callable[[Scope], bool],
    ):
        self._app = app
        self._is_open = is_open
        self._api_keys = [key.encode() for key in api_keys]
        self._admin_keys = [key.encode() for key in admin_keys or api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["cache_salt"] = self._check(scope)
        except TuckaError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            await error_response(error, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        """The salt of the request's key. Raises UnauthorizedError, ForbiddenError."""
        if not self._api_keys or scope["path"] in PROBES or self._is_open(scope):
            return ""
        given = _key(scope)
        admin = given is not None and _matches(given, self._admin_keys)
        if given is None or (not _matches(given, self._api_keys) and not admin):
            raise UnauthorizedError(
                "A valid API key is required. Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            )
        if not admin and _is_admin_path(scope["path"]):
            raise ForbiddenError("This key may not manage adapters. Use one of the server's admin keys.")
        return hashlib.sha256(given).hexdigest()


def _key(scope: Scope) -> bytes | None:
    """The key that the request carries; None without one. `Authorization` counts alone where it is sent, else the
    `x-api-key` of Anthropic's clients."""
    headers = dict(reversed(scope["headers"]))  # of several of a name the first
    if (value := headers.get(b"authorization")) is not None:
        kind, _, key = value.partition(b" ")
        return (key.strip() or None) if kind.lower() == b"bearer" else None
    return headers.get(b"x-api-key", b"").strip() or None


def _matches(given: bytes, keys: list[bytes]) -> bool:
    """Compares with every key, each in constant time."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given, key)
    return found


def may_use_reserve(path: str) -> bool:
    """Whether requests for this path are served when all connections are taken: what tells how the server is, and what
    could relieve it."""
    return path in PROBES or path == "/metrics" or _is_admin_path(path)


def _is_admin_path(path: str) -> bool:
    return any(path == admin or path.startswith(admin + "/") for admin in _ADMIN_PATHS)
