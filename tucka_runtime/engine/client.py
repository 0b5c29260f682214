"""The engine as the API process sees it: its process is started, spoken to, and started again when it dies; then every
stream in flight raises EngineDeadError.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from tucka_runtime.children import python
from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import EngineDeadError, InvalidRequestError, OverloadedError, TuckaError
from tucka_runtime.messages import (
    Abort,
    AdapterInfo,
    AdapterKey,
    AdapterLoaded,
    AdapterRefused,
    Ended,
    EngineInfo,
    EngineLoad,
    FromEngine,
    Idle,
    LoadAdapter,
    NotStarted,
    Rejected,
    Request,
    Route,
    SequenceOutput,
    Start,
    Started,
    StepDone,
    StepStats,
    Stop,
    Submit,
    ToEngine,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_RESTART_DELAY, LONGEST_RESTART_DELAY = 0.5, 30.0  # seconds; doubled with every failure in a row


class OutputStream(AsyncIterator[SequenceOutput]):
    """The outputs of one request, sequences interleaved; ends when each has had its finish reason.

    Raises EngineDeadError if the engine dies, and the engine's error if it refused the request.
    """

    def __init__(self, client: "EngineClient", request: Request):
        self._client = client
        self._queue: asyncio.Queue[SequenceOutput | TuckaError | None] = asyncio.Queue()  # None: aborted
        self.request_id = request.id
        self.unfinished = request.num_sequences

    async def __anext__(self) -> SequenceOutput:
        if not self.unfinished and self._queue.empty():
            raise StopAsyncIteration
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, TuckaError):
            raise item
        return item

    def put(self, item: SequenceOutput | TuckaError) -> None:
        if isinstance(item, TuckaError) or item.finish is not None:
            self.unfinished = 0 if isinstance(item, TuckaError) else self.unfinished - 1
        self._queue.put_nowait(item)

    def end(self, index: int) -> None:
        """Ends one sequence in the engine, whose last output then says "abort"; the others go on."""
        self._client.end(self, index)

    def abort(self) -> None:
        """Ends what is left of the request in the engine; the stream is over, also for who waits on it. Harmless when
        it already is."""
        self._client.forget(self)
        if self.unfinished:
            self.unfinished = 0
            self._queue.put_nowait(None)


class EngineClient:
    """The engine as the API process sees it. All methods belong to one event loop.

    `on_step` is called with every step's figures, `on_idle` with what the engine holds whenever it has run out of work,
    and with None when it died. `on_restart` is called after a restart, before `ready` is true again: it brings the
    adapters back.
    """

    def __init__(self, config: EngineConfig, log_format: str = "text"):
        """`log_format` is that of the engine process's own log lines."""
        self.config = config
        self._log_format = log_format
        self.info: EngineInfo | None = None
        self.ready = False
        self.restarts = 0
        self.on_step: Callable[[StepStats, EngineLoad], None] | None = None
        self.on_idle: Callable[[EngineLoad | None], None] | None = None
        self.on_restart: Callable[[], Awaitable[None]] | None = None
        self._streams: dict[str, OutputStream] = {}
        self._calls: dict[int, asyncio.Future[AdapterInfo]] = {}
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._stopping = False
        self._restart: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """Sequences that have not finished."""
        return sum(stream.unfinished for stream in self._streams.values())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> EngineInfo:
        """Starts the process and waits for the model. Raises ModelLoadError, or EngineDeadError if it dies of else."""
        info = await self._spawn()
        self._open()
        return info

    def _open(self) -> None:
        """Takes requests from now on. Raises EngineDeadError if the process has died since it said it was ready."""
        if self._channel is None:
            raise EngineDeadError("The engine stopped as soon as it had started; see its log above.")
        self.ready = True

    async def _spawn(self) -> EngineInfo:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                python("-m", "tucka_runtime.engine.process", str(theirs.fileno()), str(os.getpid())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._channel = Connection(ours.detach())
        self._channel.send(Start(self.config, self._log_format))
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        threading.Thread(
            target=self._listen, args=(self._channel, self._process, loop), name="engine-channel", daemon=True
        ).start()
        self.info = await self._started
        return self.info

    def _listen(self, channel: Connection, process: "subprocess.Popen[bytes]", loop: asyncio.AbstractEventLoop) -> None:
        """The thread that reads the channel until it ends."""
        try:
            while True:
                loop.call_soon_threadsafe(self._receive, channel.recv())
        except (EOFError, OSError):
            process.wait()
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._died, channel)
        except RuntimeError:  # the loop is gone: the server has stopped
            pass

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepDone(outputs, stats, load):
                for output in outputs:
                    self._deliver(output.request_id, output)
                if self.on_step is not None:
                    self.on_step(stats, load)
            case Idle(load):
                if self.on_idle is not None:
                    self.on_idle(load)
            case Ended(outputs):
                for output in outputs:
                    self._deliver(output.request_id, output)
            case Rejected(request_id, error):
                self._deliver(request_id, error)
            case AdapterLoaded(call, info):
                _settle(self._calls.pop(call), info)
            case AdapterRefused(call, error):
                _settle(self._calls.pop(call), error)
            case Started(started):
                _settle(self._started, started)
            case NotStarted(error):
                _settle(self._started, error)

    def _deliver(self, request_id: str, item: SequenceOutput | TuckaError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(item)
            if not stream.unfinished:
                del self._streams[request_id]

    def _died(self, channel: Connection) -> None:
        if channel is not self._channel:
            return
        served, self.ready = self.ready, False
        channel.close()
        self._channel = None
        if self.on_idle is not None:
            self.on_idle(None)
        error = EngineDeadError("The engine stopped. It is being restarted; try again in a moment.")
        for request_id in list(self._streams):
            self._deliver(request_id, error)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineDeadError("The engine stopped while it was starting; see its log above."))
        elif served and not self._stopping:  # else `start` failed, or `_revive` is at work and finds out
            logger.error("the engine process ended with status %s", self._process and self._process.returncode)
            self._restart = asyncio.get_running_loop().create_task(self._revive())

    async def _revive(self) -> None:
        delay = FIRST_RESTART_DELAY
        while not self._stopping:
            await asyncio.sleep(delay)
            self.restarts += 1
            try:
                await self._spawn()
                if self.on_restart is not None:
                    await self.on_restart()
                self._open()
            except (TuckaError, OSError) as error:
                logger.error("the engine did not come back: %s", error)
                delay = min(2 * delay, LONGEST_RESTART_DELAY)
                continue
            logger.info("the engine is back")
            return

    def submit(self, request: Request) -> OutputStream:
        """Sends a request. Raises InvalidRequestError if it alone is more than the queue takes, OverloadedError if the
        queue is full, EngineDeadError while there is no engine."""
        room = self.config.max_num_seqs + self.config.max_queue
        if request.num_sequences > room:
            raise InvalidRequestError(
                f"The request asks for {request.num_sequences} answers (prompts x n); this server takes at most {room} "
                "at once (--max-num-seqs plus --max-queue). Ask for fewer.",
                "n",
            )
        if not self.ready:
            raise EngineDeadError("The engine is not running. It is being restarted; try again in a moment.")
        if self.in_flight + request.num_sequences > room:
            raise OverloadedError("The queue is full. Try again later.")
        stream = OutputStream(self, request)
        self._streams[request.id] = stream
        self._send(Submit(request))
        return stream

    def forget(self, stream: OutputStream) -> None:
        """OutputStream.abort's half."""
        if self._streams.pop(stream.request_id, None) is not None:
            self._send(Abort(stream.request_id))

    def end(self, stream: OutputStream, index: int) -> None:
        """OutputStream.end's half."""
        if stream.request_id in self._streams:
            self._send(Abort(stream.request_id, index))

    async def load_adapter(
        self, key: AdapterKey, folder: Path, pinned: Route | None = None, blob: str | None = None
    ) -> AdapterInfo:
        """Loads the adapter in `folder`, whose content must be `blob`, beside what runs. Raises AdapterError,
        StorageError if the content is another, or EngineDeadError."""
        call = next(self._numbers)
        self._send(LoadAdapter(call, key, folder, pinned, blob))
        self._calls[call] = asyncio.get_running_loop().create_future()
        return await self._calls[call]

    def unload_adapter(self, key: AdapterKey) -> None:
        """Requests that were submitted before go on, and the last one's end frees the memory."""
        if self._channel is not None:
            self._send(UnloadAdapter(key))

    def _send(self, message: ToEngine) -> None:
        """The reader thread finds out if the process is gone: then its streams end with an error."""
        if self._channel is None:
            raise EngineDeadError("The engine is not running. It is being restarted; try again in a moment.")
        with contextlib.suppress(OSError):
            self._channel.send(message)

    async def stop(self, timeout: float) -> None:
        """Ends the process: politely, after `timeout` seconds by force."""
        self._stopping, self.ready = True, False
        if self._restart is not None:
            self._restart.cancel()
        process = self._process
        if process is None:
            return
        if self._channel is not None:
            self._send(Stop())
        try:
            await asyncio.to_thread(process.wait, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)


def _settle(future: "asyncio.Future[T] | None", result: "T | TuckaError") -> None:
    """Hands a result to who waits for it, if it is still waited for."""
    if future is None or future.done():
        return
    if isinstance(result, TuckaError):
        future.set_exception(result)
    else:
        future.set_result(result)
