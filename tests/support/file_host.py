"""An HTTPS server of this machine for files, with a certificate that trustme makes, and faults on demand."""

import hashlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme


class FileHost(ThreadingHTTPServer):
    """`files` by path, each with its SHA-256 as ETag; `asked` are the requests. `cut` ends an answer after so many
    bytes, once for each file; `redirect` sends everybody elsewhere; `headers` are added to what is answered of files
    that are here and that are not; `token` is wanted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.cut: int | None = None
        self.cut_already: set[str] = set()
        self.redirect: str | None = None
        self.headers: dict[str, str] = {}
        self.token: str | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left, or trusts nobody."""


class _Handler(BaseHTTPRequestHandler):
    server: FileHost

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        host = self.server
        host.asked.append((self.command, self.path))
        data = host.files.get(self.path)
        if host.redirect is not None:
            self._head(302, {"Location": host.redirect + self.path})
        elif host.token is not None and self.headers["Authorization"] != f"Bearer {host.token}":
            self._head(401, {})
        elif data is None:
            self._head(404, host.headers)
        else:
            start = int((self.headers["Range"] or "bytes=0-")[6:-1])
            length = {"Content-Length": str(len(data) - start), "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            self._head(206 if start else 200, length | host.headers)
            if self.command == "GET":
                end = len(data)
                if host.cut is not None and self.path not in host.cut_already:
                    host.cut_already.add(self.path)
                    end = start + host.cut
                self.wfile.write(data[start:end])

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def file_host(authority: trustme.CA | None) -> Iterator[FileHost]:
    """Without an authority it speaks plain HTTP."""
    with FileHost() as host:
        if authority is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            authority.issue_cert("127.0.0.1").configure_cert(context)
            host.socket = context.wrap_socket(host.socket, server_side=True)
        thread = threading.Thread(target=host.serve_forever, daemon=True)
        thread.start()
        yield host
        host.shutdown()
        thread.join()
