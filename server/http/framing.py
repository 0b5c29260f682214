"""Where a request begins and ends on its connection: h11's parser, and what RFC 9112 asks beyond it."""

import h11

from tucka_runtime.errors import InvalidRequestError, TuckaError
from tucka_runtime.server.http.errors import HeadersTooLargeError, UnsupportedCodingError, UnsupportedVersionError


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
        if isinstance(event, h11.Request) and (fault := _fault(event)) is not None:
            self.fault = fault
            raise h11.RemoteProtocolError(fault.message)
        return event


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
