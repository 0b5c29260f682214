"""uvicorn as this server runs it: its socket, its settings, its connections, and how it ends."""

import asyncio
import contextlib
import ipaddress
import logging
import resource
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from tucka_runtime.config import ServerConfig
from tucka_runtime.errors import ConfigError
from tucka_runtime.logs import OnceAMinute
from tucka_runtime.server.http.connection import RESERVE, Connection, connection_class
from tucka_runtime.server.http.listener import Listener
from tucka_runtime.server.http.middleware import MAX_HEADER_BYTES

log = logging.getLogger(__name__)

OTHER_FILES = 256  # open files of the process that are no connections: adapters' files, pipes, libraries
BACKLOG = 1024  # connections that the kernel keeps until they are accepted


class HTTPServer(uvicorn.Server):
    """Serves `app` on `listener`. Signals are somebody else's: uvicorn's own handlers would end the process with the
    signal's status."""

    def __init__(self, app: ASGIApp, config: ServerConfig, listener: socket.socket):
        self._connections = connections = connection_class(config.max_connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=connections,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
                timeout_keep_alive=config.keep_alive_timeout,
            )
        )
        self._socket = listener
        logging.getLogger("uvicorn.error").addFilter(_Seldom("Invalid HTTP request received."))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._socket.listen(BACKLOG)
        self._listener = Listener(self._socket, self._connection)

    def _connection(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._listener.close()
        await super().shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def drain(self) -> None:
        """Goes on serving, but ends every connection with the answer to its next request, so that clients turn to
        another server: a proxy would go on using those that it has."""
        self._connections.draining = True

    def drop_connections(self) -> None:
        """Ends what has not ended by itself."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.transport.abort()


class _Seldom(logging.Filter):
    """Lets one message of a library pass once a minute: anybody can cause it with every packet."""

    def __init__(self, message: str):
        super().__init__()
        self._message = message
        self._complaint = OnceAMinute()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != self._message or self._complaint.due()


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """The port is taken at once, but connections are accepted only when somebody listens. Raises ConfigError, which
    names the flag that the port came from."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio turns Nagle's algorithm off on every connection; it held events back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --host or {flag}."
        ) from None
    return listener


def check_open(config: ServerConfig, listener: socket.socket) -> None:
    """Raises ConfigError where others than this machine's users could reach a server that has no keys."""
    host = listener.getsockname()[0]
    has_keys = config.api_key or config.api_key_file is not None
    if not has_keys and not config.insecure and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        listener.close()
        raise ConfigError(
            f"On --host {config.host} everybody who reaches this machine could use the server and manage its "
            "adapters: it has no keys. Make one (`tucka keys add NAME --file keys.json`, then --api-key-file "
            "keys.json), or give --api-key; or listen on 127.0.0.1; or, where something else keeps strangers out, say "
            "--insecure."
        )


def allow_open_files(max_connections: int) -> None:
    """Raises the limit of open files to what so many connections need. Raises ConfigError where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + RESERVE + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(
            f"--max-connections {max_connections} needs {wanted} open files, and this process may have {hard}. Raise "
            f"that limit (ulimit -n {wanted}; LimitNOFILE= in systemd; --ulimit nofile={wanted} for a container), or "
            f"choose --max-connections {max(hard - RESERVE - OTHER_FILES, 1)} or fewer."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
