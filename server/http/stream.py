"""Answers to clients that may leave: server-sent events, and waiting that ends when the client does."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tucka_runtime.errors import TuckaError
from tucka_runtime.server.http.errors import envelope, internal_error, reason

log = logging.getLogger(__name__)

T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: then raises ClientDisconnect.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """`data: {...}` per chunk, then `data: [DONE]`. An error ends it with a chunk `{"error": ...}` and no [DONE].

    `first` is the chunk already awaited, so that a failure before it still had a status code of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send(send, scope["state"]))

    async def _send(self, send: Send, state: dict[str, Any]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b"data: [DONE]\n\n"
        try:
            async with aclosing(self._chunks) as chunks:
                await send(_body(_event(self._first)))
                async for chunk in chunks:
                    await send(_body(_event(chunk)))
        except TuckaError as error:
            state["error"] = reason(error)
            last = _event(envelope(error))
        except Exception as error:  # the headers are out: the client must learn of it here, the log has the rest
            state["error"] = reason(error)
            log.exception("request %s failed while streaming", state["request_id"])
            last = _event(envelope(internal_error(state["request_id"])))
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
