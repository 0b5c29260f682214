"""A request on its way between Serve's actors: what the ingress sends of it, and the answer's messages that come back.

The application is ASGI's, run in the replica's own event loop: what it sends is collected, and taken in batches, for
each that goes from actor to actor costs far more than a message.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tucka_runtime.errors import TuckaError
from tucka_runtime.server.http.errors import anthropic_envelope, envelope, error_response, speaks_anthropic

MOST_UNTAKEN = 256
"""Messages of one answer that wait to be taken; then its application waits."""

_RESPONSES = "/v1/responses"


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request whose body has been read."""

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes

    @classmethod
    def of(cls, request: Request) -> "Forwarded":
        """Of a request with `state.body`."""
        scope = request.scope
        raw_path = scope.get("raw_path") or scope["path"].encode()
        client = scope.get("client")
        return cls(
            scope["method"],
            scope["path"],
            raw_path,
            scope["query_string"],
            tuple((bytes(name), bytes(value)) for name, value in scope["headers"]),
            None if client is None else (client[0], client[1]),
            bytes(request.state.body),
        )

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.raw_path,
            "root_path": "",
            "query_string": self.query,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {"received": time.monotonic()},
        }


class Outbox:
    """What an application has sent and nobody has taken yet. It is the `BodyWriter` of its streams as well."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._closed = False
        self._some = asyncio.Event()
        self._taken = asyncio.Event()

    @property
    def full(self) -> bool:
        return len(self._messages) >= MOST_UNTAKEN

    async def send(self, message: Message) -> None:
        self._put(message)
        if self.full:
            await self.drain()

    def write(self, piece: bytes) -> None:
        self._put({"type": "http.response.body", "body": piece, "more_body": True})

    async def drain(self) -> None:
        self._taken.clear()
        await self._taken.wait()

    def close(self) -> None:
        """Nothing more will be sent, or taken."""
        self._closed = True
        self._some.set()
        self._taken.set()

    async def take(self) -> list[Message]:
        """All that was sent since the last time, once there is some; none when there will be no more."""
        await self._some.wait()
        messages, self._messages = self._messages, []
        if not self._closed:
            self._some.clear()
        self._taken.set()
        return messages

    def _put(self, message: Message) -> None:
        self._messages.append(message)
        self._some.set()


async def answered(app: ASGIApp, request: Forwarded) -> AsyncGenerator[list[Message], None]:
    """The application's answer. Where nobody reads it to its end, the application sees its client leave, and has ended
    before this has. Raises what the application raises."""
    outbox, left = Outbox(), asyncio.Event()
    unread = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    scope = request.scope()
    scope["state"]["writer"] = outbox
    running = asyncio.ensure_future(app(scope, receive, outbox.send))
    running.add_done_callback(lambda _: outbox.close())
    try:
        while messages := await outbox.take():
            yield messages
        await running
    finally:
        left.set()
        outbox.close()
        await asyncio.wait((running,))


class Relayed(Response):
    """A replica's answer, for the client. What the replica says goes through as it is; what it can say no more is said
    for it: an error's status where nothing was sent yet, and within a stream an event as the request's door has it."""

    def __init__(self, answer: AsyncGenerator[list[Message], None]):
        """`answer` raises TuckaError where it cannot go on."""
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None  # held until the body begins: a replica that dies between has said nothing yet
        begun = ended = False
        try:
            async with aclosing(self._answer) as answer:
                async for messages in answer:
                    for message in messages:
                        if message["type"] == "http.response.start":
                            start = message
                            continue
                        if start is not None and not begun:
                            begun = True
                            await send(start)
                        await send(message)
                        ended = not message.get("more_body", False)
        except TuckaError as error:
            if ended:
                return
            if start is None or not begun:
                await error_response(error)(scope, receive, send)
            elif _is_stream(start):
                await send({"type": "http.response.body", "body": _failure(scope, error), "more_body": False})
            else:
                raise  # the connection ends before the answer is as long as it said


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _failure(scope: Scope, error: TuckaError) -> bytes:
    """The last event of a stream that cannot go on."""
    name, data = "", envelope(error)
    if speaks_anthropic(scope["path"]):
        name, data = "error", anthropic_envelope(error, scope["state"]["request_id"])
    elif scope["path"] == _RESPONSES:
        name, data = "error", {**data["error"], "type": "error", **data}
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(data)}\n\n".encode()
