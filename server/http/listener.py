"""The socket that connections come to."""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from tucka_runtime.logs import OnceAMinute

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """Accepts connections for `protocol` until it is closed, on asyncio's event loop and on uvloop's alike.

    Neither loop's own server would do: asyncio's, without descriptors, fails for every connection that waits, and
    uvloop's then closes connections without a word in any log. Here they wait in the kernel's queue, which is looked at
    once a second, and the log has a line a minute.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]):
        self._socket = listening
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._begun: set[asyncio.Task[object]] = set()
        self._complaint = OnceAMinute()
        self._socket.setblocking(False)
        self._watch()

    def close(self) -> None:
        """Closes the socket. Connections that were accepted go on."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _watch(self) -> None:
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._complain(error)
            self._loop.remove_reader(self._socket)
            self._retry = self._loop.call_later(RETRY_SECONDS, self._watch)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._begun.add(task)  # the loop itself holds a task weakly
        task.add_done_callback(self._begun.discard)

    def _complain(self, error: OSError) -> None:
        if self._complaint.due():
            log.error(
                "new connections cannot be accepted: %s. Lower --max-connections or raise the limit (ulimit -n, "
                "LimitNOFILE=). (said at most once a minute)",
                error.strerror,
            )
