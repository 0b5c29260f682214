"""HTTP connections that cannot be held open for nothing: uvicorn's h11 protocol with deadlines and a bound.

- A request must have arrived whole within `RECEIVE_SECONDS`, plus a second for every `BYTES_PER_SECOND` of it that did.
- A client must take what is written to it: where the kernel's buffer is full it has `SEND_SECONDS` for some of it.
- So many connections may be at work; `RESERVE` more are for probes, metrics and adapter management, and for telling
  others that the server is full. Those that wait for their request make room, the oldest first.
- Nobody but a request's application writes while it is at work: what turns out malformed is told to it, through
  `scope["state"]["fault"]`, which `body.read` raises.

It also notes when a request's first bytes came: `scope["state"]["received"]`, by `time.monotonic()`.
"""

import asyncio
import fcntl
import json
import socket
import struct
import termios
import time
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER, FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle

from tucka_runtime.errors import InvalidRequestError, TuckaError
from tucka_runtime.server.http.errors import RequestTimeoutError, crowded, envelope, retry_after
from tucka_runtime.server.http.framing import Parser

RECEIVE_SECONDS = 8.0
BYTES_PER_SECOND = 64 * 2**10
SEND_SECONDS = 30.0
SEND_BYTES_PER_SECOND = 2**10  # of what is unsent at the least, or it is a trick to stay
LINGER_SECONDS = 2.0  # what a refused client still sends is read for so long: else it would see a reset, not the answer
LEFT_SECONDS = 0.2  # how often a client that has ended its sending is asked whether it is there
RESERVE = 64


class Connection(H11Protocol):
    """`max_connections` is set on a subclass by `connection_class`, and `draining` when the server is to stop: each
    connection ends with its next answer, which says so."""

    max_connections = 1024
    draining = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn: Parser = Parser(h11.SERVER, self.config.h11_max_incomplete_event_size or 2**14)
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None  # of the deadline, or of lingering
        self._received: float | None = None  # when the first bytes came of a request whose head is not complete
        self._deaf = False  # what comes is read and thrown away
        self._ended = False  # the client sends nothing more
        self._sending: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._asking: asyncio.TimerHandle | None = None

    @property
    def at_work(self) -> bool:
        """Whether a request's application runs."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # paused is where the kernel takes no more
        self._arm()
        if len(self.connections) > self.max_connections + RESERVE:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        for timer in (self._sending, self._asking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # What comes.

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
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
            self.cycle.transport = _Writer(self, self.transport)  # type: ignore[assignment]
            state = self.scope["state"]
            state["writer"] = _BodyWriter(self.cycle, self.transport, self.flow)
            state["received"] = self._received or time.monotonic()
            state["crowded"] = self._is_crowded()
            if self.draining:
                self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]
            self._received = None
        if self._received is None and self.conn.their_state is not h11.SEND_BODY and self.conn.trailing_data[0]:
            self._received = time.monotonic()  # the next request has begun in what the last one ended in
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) and not self._deaf:
            self._disarm()

    def on_response_complete(self) -> None:
        if self._deaf:
            self.server_state.total_requests += 1
            return
        self._disarm()
        super().on_response_complete()
        if self._ended and not self.at_work:
            self.transport.close()
        elif self.conn.their_state is h11.SEND_BODY or (self.conn.trailing_data[0] and not self.at_work):
            self._arm()  # what waits behind a request at work has come already: that is not the client's slowness

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends nothing more: a request that came whole gets its answer. Returns whether to stay open."""
        self._ended = True
        if not self.at_work:
            return False
        self.cycle.keep_alive = False
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(InvalidRequestError("The body ended before its Content-Length or its last chunk said so."))
        elif self._asking is None:
            self._ask()
        return True

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when what came is not HTTP."""
        self._refuse(self.conn.fault)

    def _should_upgrade(self) -> bool:
        """No: the request is answered as if it had not asked."""
        return False

    # Its ends.

    def shutdown(self) -> None:
        if self.at_work:
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.close()

    def close(self) -> None:
        """Closes when the answer is written; what the client may still be sending is read first."""
        unread = self.conn.their_state not in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED) or self.conn.trailing_data[0]
        if self._ended or not unread or self.transport.is_closing():
            self.transport.close()
            return
        self._disarm()
        self._deaf = True
        try:
            self.transport.write_eof()
        except OSError:  # the client has reset the connection, and nobody has told yet
            self.transport.abort()
            return
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _refuse(self, error: TuckaError) -> None:
        """Ends the request with an error: by its application if that is at work, else from here."""
        self._disarm()
        self._deaf = True
        if self.at_work:
            self.cycle.scope["state"]["fault"] = error
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]
            self.cycle.keep_alive = False
            self.cycle.message_event.set()
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(envelope(error)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", uuid.uuid4().hex.encode()),
                CLOSE_HEADER,
            ]
            if (seconds := retry_after(error)) is not None:
                headers.append((b"retry-after", seconds.encode()))
            response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.close()

    # Deadlines.

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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._count_unsent()
        self._sending = self.loop.call_later(SEND_SECONDS, self._check_sending)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _check_sending(self) -> None:
        """Gives a client up that took next to nothing. Its application sees that it left."""
        unsent = self._count_unsent()
        if self._unsent - unsent < min(SEND_SECONDS * SEND_BYTES_PER_SECOND, self._unsent):
            self.transport.abort()
            return
        self._unsent = unsent
        self._sending = self.loop.call_later(SEND_SECONDS, self._check_sending)

    def _count_unsent(self) -> int:
        """Bytes that the client's side has not acknowledged: those in the kernel, and those it would not take."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])

    def _ask(self) -> None:
        """Watches whether a client that sends nothing more has left altogether.

        Both look the same until something is written: one that has left resets the connection. Where the answer has not
        begun that is `100 Continue`, which every client of HTTP/1.1 passes over.
        """
        if not self.at_work or self.transport.is_closing():
            return
        if self._asking is None and not self.cycle.response_started and self.scope["http_version"] == "1.1":
            again = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(again) or b"")
        elif self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self._asking = self.loop.call_later(LEFT_SECONDS, self._ask)

    # Their number.

    def _is_crowded(self) -> bool:
        """Whether as many others are at work as may be."""
        if len(self.connections) <= self.max_connections:
            return False
        others = (c for c in self.connections if c is not self and isinstance(c, Connection))
        return sum(other.at_work for other in others) >= self.max_connections

    def _make_room(self) -> None:
        """Closes the connection that has waited longest for its request; if all are at work, this one."""
        others = [c for c in self.connections if c is not self and isinstance(c, Connection)]
        opened = [c for c in others if not c.transport.is_closing()]
        if len(opened) < self.max_connections + RESERVE:
            return
        if waiting := [c for c in opened if not c.at_work]:
            min(waiting, key=lambda c: c._deadline).transport.close()
        else:
            self._refuse(crowded())


class _Writer:
    """The transport as uvicorn's request cycle uses it: to close it is to close the connection gently."""

    def __init__(self, connection: Connection, transport: asyncio.Transport):
        self.close = connection.close
        self.write = transport.write
        self.is_closing = transport.is_closing


class _BodyWriter:
    """stream.BodyWriter. ASGI's send has every piece made an event and take h11 from state to state."""

    def __init__(self, cycle: RequestResponseCycle, transport: asyncio.Transport, flow: FlowControl):
        self._cycle, self._transport, self._flow = cycle, transport, flow
        self._chunked = cycle.scope["http_version"] == "1.1"  # as h11 decides: older clients read until the end
        self.drain = flow.drain

    @property
    def full(self) -> bool:
        return self._flow.write_paused and not self._cycle.disconnected

    def write(self, piece: bytes) -> None:
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)


def connection_class(max_connections: int) -> type[Connection]:
    """The protocol of a server whose connections are so many."""
    return type("Connection", (Connection,), {"max_connections": max_connections})
