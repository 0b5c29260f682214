"""What stands between Serve's proxy and the replicas: it reads which adapter a request is for, and hands the answer
on."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from tucka_runtime.errors import EngineDeadError, OverloadedError, TuckaError
from tucka_runtime.names import split_version
from tucka_runtime.server.http.body import read, read_json
from tucka_runtime.server.http.errors import MethodNotAllowedError, error_response
from tucka_runtime.server.http.keys import METRICS, role_of
from tucka_runtime.server.ray.figures import merged
from tucka_runtime.server.ray.relay import Forwarded, Relayed

SCRAPE_SECONDS = 5
CHANGES = ("POST", "PUT", "PATCH", "DELETE")


class Ingress:
    """Takes every request of the application. `replicas` is Serve's handle of the deployment of `Replica`."""

    def __init__(self, replicas: Any, base_names: Sequence[str], max_body_bytes: int):
        self._replicas, self._base_names, self._max_body_bytes = replicas, base_names, max_body_bytes

    async def __call__(self, request: Request) -> Response:
        request.state.request_id = request.headers.get("x-request-id", "")
        try:
            if request.method in CHANGES and role_of(request.scope["path"]) == "admin":
                raise MethodNotAllowedError(
                    "The adapters of this service are declared, for all of its replicas: this one would be of one "
                    "replica alone. Put it where the operator declares them (adapters_file, or a source that names are "
                    "looked up in)."
                )
            await read(request, self._max_body_bytes)
            forwarded = Forwarded.of(request)
            if request.method == "GET" and request.scope["path"] == METRICS:
                return await self._figures(forwarded)
            handle = self._replicas.options(stream=True, multiplexed_model_id=await self._adapter(request))
            return Relayed(_messages(handle.respond.remote(forwarded)))
        except TuckaError as error:
            return error_response(error)

    async def _adapter(self, request: Request) -> str:
        """The adapter whose replicas should have the request; "" for the base, and for what names none. What is wrong
        with a body, the replica says."""
        if request.method != "POST":
            return ""
        try:
            name = (await read_json(request)).get("model")
        except TuckaError:
            return ""
        if not isinstance(name, str) or name in self._base_names:
            return ""
        version = split_version(name)
        return name if version is None else version[0]

    async def _figures(self, forwarded: Forwarded) -> Response:
        """Those of all replicas in one; what the first that refuses says, if the key may not see them."""
        try:
            found = await self._replicas.broadcast("scrape", forwarded).results_async(
                timeout_s=SCRAPE_SECONDS, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            raise _lost(error) from None
        texts: dict[str, str] = {}
        for answer in found:
            if isinstance(answer, BaseException):
                continue  # a replica that has just gone
            name, (start, *parts) = answer
            body = b"".join(part.get("body", b"") for part in parts)
            if start["status"] != 200:
                return Response(body, start["status"], media_type="application/json")
            texts[name] = body.decode()
        return Response(merged(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _messages(call: Any) -> AsyncGenerator[list[Message], None]:
    """What a replica sends, of Serve's DeploymentResponseGenerator. Raises EngineDeadError, OverloadedError."""
    ended = False
    try:
        async for messages in call:
            yield messages
        ended = True
    except (RayError, RayServeException) as error:
        ended = True
        raise _lost(error) from error
    finally:
        if not ended:  # the client has left
            call.cancel()


def _lost(error: Exception) -> TuckaError:
    """What a client is told in the place of a replica that does not answer."""
    if isinstance(error, BackPressureError):
        return OverloadedError("Every replica is busy, and too many requests wait for one. Try again later.")
    lost = EngineDeadError("The replica that worked at this request is gone. Send it again: others are there.")
    lost.retry_after = 1
    return lost
