"""The engine's process as its parent holds it. Nothing here blocks the event loop, whatever the process does."""

import asyncio
import contextlib
import os
import queue
import socket
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from tucka_runtime.children import python
from tucka_runtime.messages import FromEngine, Start, ToEngine

END_SECONDS = 10  # for a process whose channel has closed, or that was killed; the kernel may have much memory to free


class EngineChild:
    """One engine process and our end of its channel, which two threads serve: one reads, the other writes, for a
    process that hangs reads nothing and its socket is full after some hundred messages.

    `on_message` is called in the event loop with every message, and `on_end` once, with the exit status (None: it
    cannot even be killed), when the channel has ended. Is made in the event loop's thread, which has to live as long as
    the process (`children.end_with_parent`). Raises OSError if there can be no process.
    """

    def __init__(
        self,
        on_message: "Callable[[EngineChild, FromEngine], None]",
        on_end: "Callable[[EngineChild, int | None], None]",
    ):
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_end = on_message, on_end
        self._unsent: queue.SimpleQueue[Start | ToEngine | None] = queue.SimpleQueue()
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    python("-m", "tucka_runtime.engine.process", str(theirs.fileno()), str(os.getpid())),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            except BaseException:
                self._socket.close()
                raise
        channel = Connection(os.dup(self._socket.fileno()))
        for work in (self._read, self._write):
            threading.Thread(target=work, args=(channel,), name=f"engine-channel{work.__name__}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def unsent(self) -> int:
        """How many messages the process has not taken yet, but for those that the socket holds."""
        return self._unsent.qsize()

    def send(self, message: Start | ToEngine) -> None:
        """Never waits. To a process that is gone it sends nothing: its end is told by `on_end`."""
        self._unsent.put(message)

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

    def _write(self, channel: Connection) -> None:
        with contextlib.suppress(OSError):  # the reading thread finds out as well
            while (message := self._unsent.get()) is not None:
                channel.send(message)

    def _read(self, channel: Connection) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._loop.call_soon_threadsafe(self._on_message, self, channel.recv())
            self._unsent.put(None)
            if not self._wait(END_SECONDS):
                self.kill()
                self._wait(END_SECONDS)
            self._socket.close()
            self._loop.call_soon_threadsafe(self._on_end, self, self._process.returncode)
