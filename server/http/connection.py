"""HTTP connections that cannot be held open for nothing: uvicorn's h11 protocol with deadlines and a bound.

A request must have arrived whole within `RECEIVE_SECONDS`, plus a second for every `BYTES_PER_SECOND` of it that did.
It also notes when a request's first bytes came: `scope["state"]["received"]`, by `time.monotonic()`.
"""

import asyncio
import json
import time
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from tucka_runtime.errors import InvalidRequestError, OverloadedError, TuckaError
from tucka_runtime.server.http.errors import RETRY_AFTER_SECONDS, HeadersTooLargeError, RequestTimeoutError, envelope

RECEIVE_SECONDS = 8.0
BYTES_PER_SECOND = 64 * 2**10


class Connection(H11Protocol):
    """`max_connections` is set on a subclass by `connection_class`."""

    max_connections = 1024

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._received: float | None = None  # when the first bytes came of a request whose head is not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self.conn.our_state is h11.IDLE:
            self._arm()  # the first bytes of another request
        self._deadline += len(data) / BYTES_PER_SECOND
        if self._received is None and self.conn.their_state is not h11.SEND_BODY:
            self._received = time.monotonic()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a head was complete; its application has not run yet
            self.scope["state"]["received"] = self._received or time.monotonic()
            self._received = None
        if self._received is None and self.conn.their_state is not h11.SEND_BODY and self.conn.trailing_data[0]:
            self._received = time.monotonic()  # the next request has begun in what the last one ended in
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._disarm()

    def on_response_complete(self) -> None:
        self._disarm()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._arm()

    def eof_received(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(InvalidRequestError("The body is shorter than its Content-Length says."))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when what came is not HTTP."""
        if len(self.conn.trailing_data[0]) > HIGH_WATER_LIMIT // 8:
            self._refuse(HeadersTooLargeError("The request line and headers are too long."))
        else:
            self._refuse(InvalidRequestError("This is not a valid HTTP request."))

    def _arm(self) -> None:
        self._deadline = self.loop.time() + RECEIVE_SECONDS
        self._timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_deadline(self) -> None:
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)
            return
        self._timer = None
        if self.flow.read_paused:
            # It is the server that does not read on: the client is not slow.
            self._arm()
        elif self.conn.their_state is h11.SEND_BODY:
            self._refuse(InvalidRequestError("The body stopped arriving, or is shorter than its Content-Length says."))
        elif self.conn.trailing_data[0]:
            self._refuse(RequestTimeoutError("The request line and headers did not arrive in time."))
        else:
            self.transport.close()

    def _make_room(self) -> None:
        """Closes the connection that has waited longest for its request; if all are at work, this one."""
        opened = [c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing()]
        if len(opened) <= self.max_connections:
            return
        oldest = min((c for c in opened if c.conn.our_state is h11.IDLE), key=lambda c: c._deadline)
        if oldest is self:
            self._refuse(OverloadedError("The server has too many connections open. Try again later."))
        else:
            oldest.transport.close()

    def _refuse(self, error: TuckaError) -> None:
        """Answers without the application, as far as the connection still allows, and closes."""
        self._disarm()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(envelope(error)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", uuid.uuid4().hex.encode()),
                (b"connection", b"close"),
            ]
            if error.status in RETRY_AFTER_SECONDS:
                headers.append((b"retry-after", str(RETRY_AFTER_SECONDS[error.status]).encode()))
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_class(max_connections: int) -> type[Connection]:
    return type("Connection", (Connection,), {"max_connections": max_connections})
