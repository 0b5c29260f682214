"""The process that reads adapters (adapters/reader_process.py), as the engine holds it."""

import logging
import mmap
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tucka_runtime.adapters.format import Adapter
from tucka_runtime.adapters.handover import LEAST_BYTES, unpack
from tucka_runtime.channel import Channel, ChannelError
from tucka_runtime.channel_messages import AdapterRead, AdapterSize, AdapterUnread, ReadAdapter, StartReader
from tucka_runtime.children import with_channel
from tucka_runtime.errors import AdapterCapacityError, TuckaError
from tucka_runtime.messages import BaseLayout

logger = logging.getLogger(__name__)

START_SECONDS = 60
READ_SECONDS = 100.0
"""For all of a load but the weights' bytes: most of what an adapter may take for itself, four regular expressions that
are matched for 20 s each."""
END_SECONDS = 5.0


class ProcessEndedError(Exception):
    """The process is not there any more, or not one of this version."""


class AdapterReader:
    """Reads adapters in a process of its own, one at a time, which is started again where it has died or hangs.

    Belongs to one thread at a time; the threads that call it have to live as long as this process
    (`children.end_with_parent`).
    """

    def __init__(self, log_format: str):
        """`log_format` is that of the process's own log lines."""
        self._log_format = log_format
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._started = False
        """Whether it was told the base."""

    @property
    def pid(self) -> int | None:
        """The process's id, while there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the process, if there is none, and does not wait for it: it takes a second or two. Raises OSError."""
        if self._process is not None:
            return
        self._process, ours = with_channel("tucka_runtime.adapters.reader_process")
        self._channel = Channel(ours.detach())
        self._started = False

    def read(self, folder: Path, base: BaseLayout, blob: str | None, room: int) -> Callable[[], Adapter]:
        """What makes `read_adapter`'s adapter, its tensors in shared memory until they go. Every call is for the same
        `base`.

        Making it is left to who turns it into another form, for the thread that does so: it takes a call into torch for
        each tensor, and each of these gives Python's lock away and waits for it where another thread works.

        Raises what `read_adapter` raises, AdapterCapacityError if its tensors take more than `room` bytes, and
        TuckaError where the process hangs, or dies twice.
        """
        question = ReadAdapter(folder, blob, room)
        try:
            return self._read(question, base)
        except ProcessEndedError:
            logger.info("the adapter is read again, by another process")
        try:
            return self._read(question, base)
        except ProcessEndedError as error:
            raise TuckaError(
                "The adapter could not be read: the process that reads it ended. Try again; the server's log says more."
            ) from error

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._give_up()

    def _read(self, question: ReadAdapter, base: BaseLayout) -> Callable[[], Adapter]:
        """Raises ProcessEndedError beside what `read` does."""
        try:
            return self._ask(question, base)
        except TimeoutError:
            self._give_up()
            logger.error("the process that reads adapters did not answer in time, and is killed")
            raise TuckaError(
                "The adapter could not be read in time: the process that reads it does not answer. Try again; if "
                "that fails too, look at the disk that the server's copies of adapters are on (--state-dir)."
            ) from None
        except (EOFError, OSError, ChannelError) as error:
            status = self._give_up()
            logger.error("the process that reads adapters ended with status %s: %r", status, error)
            raise ProcessEndedError from error

    def _ask(self, question: ReadAdapter, base: BaseLayout) -> Callable[[], Adapter]:
        self.start()
        assert self._channel is not None
        self._channel.set_timeout(READ_SECONDS if self._started else START_SECONDS + READ_SECONDS)
        if not self._started:
            self._channel.send(StartReader(base, self._log_format))
            self._started = True
        self._channel.send(question)
        while True:
            match self._channel.receive():
                case AdapterSize(size):
                    self._channel.set_timeout(READ_SECONDS + size / LEAST_BYTES)
                case AdapterRead() as read:
                    file = self._channel.take_file()
                    try:
                        return partial(unpack, read, mmap.mmap(file, 0))
                    finally:
                        os.close(file)
                case AdapterUnread(error, missing):
                    if isinstance(error, AdapterCapacityError):
                        error.missing = missing
                    raise error

    def _give_up(self) -> int | None:
        """Ends what there is of the process. Its status, None where it cannot even be killed."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        if channel is not None:
            channel.close()
        if process is None:
            return None
        process.kill()
        try:
            return process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return None
