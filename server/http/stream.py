"""Answers to clients that may leave: server-sent events, and waiting that ends when the client does."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

HEARTBEAT = b": still here\n\n"
"""A comment of server-sent events: readers pass over it."""


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


class BodyWriter(Protocol):
    """A response's body as its connection takes it, one piece after another, without the way through ASGI's messages:
    `scope["state"]["writer"]`, for responses that have begun and that have no Content-Length."""

    full: bool
    """Whether the client's side takes no more for now; `drain` waits until it does, or until it has left."""

    def write(self, piece: bytes) -> None: ...

    async def drain(self) -> None: ...


async def with_silences(items: AsyncGenerator[T, None], seconds: float) -> AsyncGenerator[T | None, None]:
    """The items as they come, and None whenever none has come for so many seconds."""
    while True:
        coming = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait((coming,), timeout=seconds))[0]:
                yield None
            item = coming.result()
        except StopAsyncIteration:
            return
        finally:  # also where nobody waits any more
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        yield item


class EventStream(Response):
    """Frames of server-sent events, one write for each.

    `first` is the frame already awaited, so that a failure before it still had a status code of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: AsyncGenerator[bytes, None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send(send, scope["state"]["writer"]))

    async def _send(self, send: Send, writer: BodyWriter) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._frames) as frames:
            writer.write(self._first)
            async for frame in frames:
                if writer.full:
                    await writer.drain()
                writer.write(frame)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
