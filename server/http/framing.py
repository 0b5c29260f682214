"""Where a request begins and ends on its connection: h11's parser, and what RFC 9112 asks beyond it."""

import re

import h11

from tucka_runtime.errors import InvalidRequestError, TuckaError
from tucka_runtime.server.http.errors import HeadersTooLargeError, UnsupportedCodingError, UnsupportedVersionError

_ABSOLUTE = re.compile(rb"https?://[^/?]*", re.IGNORECASE)


class Parser(h11.Connection):
    """A server's end of a connection. `fault` is what to answer once `next_event` has raised RemoteProtocolError."""

    def __init__(self, our_role: type[h11.CLIENT] | type[h11.SERVER], max_incomplete_event_size: int):
        super().__init__(our_role, max_incomplete_event_size)
        self.fault: TuckaError = InvalidRequestError("This is not a valid HTTP request.")

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """h11's next event, its requests checked."""
        reading_head = self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431 and reading_head:
                self.fault = HeadersTooLargeError("The request line and headers are too long.")
            elif error.error_status_hint == 501:
                self.fault = UnsupportedCodingError("Of transfer codings only `chunked` is supported.")
            raise
        if not isinstance(event, h11.Request):
            return event
        if (fault := _fault(event)) is not None:
            self.fault = fault
            raise h11.RemoteProtocolError(fault.message)
        return _in_origin_form(event)


def _fault(request: h11.Request) -> TuckaError | None:
    """What makes it uncertain where the body ends, or what language the client speaks: nothing of it may be done."""
    if not request.http_version.startswith(b"1."):
        return UnsupportedVersionError("This server speaks HTTP/1.1.")
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return None
    if b"content-length" in names:  # section 6.1: what a proxy before us took it for is not known
        return InvalidRequestError("The request has both Content-Length and Transfer-Encoding. Send one of them.")
    if request.http_version == b"1.0":  # section 6.1: faulty, whatever it says
        return InvalidRequestError("Transfer-Encoding needs HTTP/1.1.")
    return None


def _in_origin_form(request: h11.Request) -> h11.Request:
    """The request with its path alone as its target. Clients that take this server for a proxy send the whole URL,
    which every server has to accept (section 3.2.2)."""
    if (named := _ABSOLUTE.match(request.target)) is None:
        return request
    path = request.target[named.end() :]
    return h11.Request(
        method=request.method,
        target=path if path.startswith(b"/") else b"/" + path,
        headers=list(request.headers),
        http_version=request.http_version,
    )
