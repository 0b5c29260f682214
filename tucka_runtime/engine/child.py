"""The engine's process as its parent holds it. Nothing here blocks the event loop, whatever the process does."""

import asyncio
import contextlib
import logging
import socket
import subprocess
from collections import deque
from collections.abc import Callable

from tucka_runtime.channel import PROTOCOL, READ_BYTES, ChannelError, Reader, frame
from tucka_runtime.channel_messages import FromEngine, Start, ToEngine
from tucka_runtime.children import with_channel

logger = logging.getLogger(__name__)

END_SECONDS = 10  # for a process whose channel has closed, or that was killed; the kernel may have much memory to free


class EngineChild:
    """One engine process and our end of its channel, which the event loop reads and writes itself: a thread between
    the two would cost every step its wake-up. What a process that hangs does not read is kept here, for its socket is
    full after some hundred messages.

    `on_message` is called with every message, and `on_end` once, with the exit status (None: it cannot even be killed),
    when the channel has ended. Is made in the event loop's thread, which has to live as long as the process
    (`children.end_with_parent`). Raises OSError if there can be no process.
    """

    def __init__(
        self,
        on_message: "Callable[[EngineChild, FromEngine], None]",
        on_end: "Callable[[EngineChild, int | None], None]",
    ):
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_end = on_message, on_end
        self._unsent: deque[bytes | bytearray | memoryview] = deque()
        self._ending: asyncio.Task[None] | None = None
        self._reader = Reader()
        self._process, self._socket = with_channel("tucka_runtime.engine.process")
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._put(PROTOCOL)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def unsent(self) -> int:
        """How many messages the process has not taken yet, but for those that the socket holds."""
        return len(self._unsent)

    def send(self, message: Start | ToEngine) -> None:
        """Never waits. To a process that is gone it sends nothing: its end is told by `on_end`."""
        self._put(frame(message))

    def kill(self) -> None:
        """Ends process and channel at once; the channel also where the kernel cannot end the process."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def ended(self, timeout: float) -> bool:
        """Waits for the process's end. Returns whether it has ended within `timeout` seconds."""
        return await asyncio.to_thread(self._wait, timeout)

    def _wait(self, timeout: float) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _put(self, data: bytes | bytearray) -> None:
        if self._ending is not None:
            return
        self._unsent.append(data)
        if len(self._unsent) == 1:
            self._write()
            if self._unsent:
                self._loop.add_writer(self._socket.fileno(), self._write)

    def _write(self) -> None:
        """Writes what the socket takes."""
        try:
            while self._unsent:
                first = self._unsent[0]
                sent = self._socket.send(first)
                if sent < len(first):
                    self._unsent[0] = memoryview(first)[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError:  # `_read` finds out as well
            self._unsent.clear()
        self._loop.remove_writer(self._socket.fileno())

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            for message in self._reader.feed(data):
                self._on_message(self, message)
        except ChannelError as error:
            logger.error("the engine's channel: %s. If the server was upgraded, restart it.", error)
            self.kill()
            data = b""
        if not data:
            self._unsent.clear()
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        if not await self.ended(END_SECONDS):
            self.kill()
            await self.ended(END_SECONDS)
        self._socket.close()
        self._on_end(self, self._process.returncode)
