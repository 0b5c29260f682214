"""The engine as the API process sees it: its process is started, spoken to, and started again when it dies or hangs;
then every stream in flight raises EngineDeadError.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from tucka_runtime.channel_messages import (
    Abort,
    AdapterLoaded,
    AdapterPart,
    AdapterRefused,
    CombineAdapters,
    EvictAdapter,
    FromEngine,
    Idle,
    LoadAdapter,
    NotStarted,
    Rejected,
    SequencesAborted,
    Start,
    Started,
    StepDone,
    Stop,
    Submit,
    ToEngine,
    UnloadAdapter,
)
from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.child import END_SECONDS, EngineChild
from tucka_runtime.engine.output_stream import OutputStream
from tucka_runtime.engine.queue_wait import QueueWait, oldest
from tucka_runtime.errors import AdapterCapacityError, EngineDeadError, InvalidRequestError, OverloadedError, TuckaError
from tucka_runtime.messages import (
    AdapterInfo,
    AdapterKey,
    EngineInfo,
    EngineLoad,
    Request,
    Route,
    SequenceOutput,
    StepStats,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_RESTART_DELAY, LONGEST_RESTART_DELAY = 0.5, 30.0  # seconds; doubled with every failure in a row
BURST = 256  # messages beyond a full queue's that may wait for the writing thread
AGAIN = "It is being restarted; try again in a moment."
WATCH_SECONDS = 0.5  # between two looks at when the engine last spoke


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
        self._wait = QueueWait()
        self._calls: dict[int, asyncio.Future[AdapterInfo]] = {}
        self._numbers = itertools.count()
        self._child: EngineChild | None = None  # None while there is none that can be spoken to
        self._last: EngineChild | None = None  # the last one there was
        self._heard = time.monotonic()
        self._longest_step = 0.0
        self._watching: asyncio.Task[None] | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._stopping = False
        self._restart: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """Sequences that have not finished."""
        return sum(stream.unfinished for stream in self._streams.values())

    @property
    def waiting(self) -> dict[str | None, float]:
        """By adapter's name (None: the base) the seconds that its oldest request has waited for its first output."""
        return oldest(self._streams.values())

    @property
    def pid(self) -> int | None:
        return self._last.pid if self._last else None

    @property
    def silence(self) -> float:
        """Seconds since the engine's last sign of life: the outcome of a step, or once a second without work."""
        return max(time.monotonic() - self._heard, 0.0)

    async def start(self) -> EngineInfo:
        """Starts the process and waits for the model. Raises ModelLoadError, or EngineDeadError if it dies of else."""
        info = await self._spawn()
        self._open()
        return info

    def _open(self) -> None:
        """Takes requests from now on. Raises EngineDeadError if the process has died since it said it was ready."""
        if self._child is None:
            raise EngineDeadError("The engine stopped as soon as it had started; see its log above.")
        self.ready = True

    async def _spawn(self) -> EngineInfo:
        if self._last is not None:
            await self._last.ended(END_SECONDS)  # what it held may be needed
        self._child = self._last = child = EngineChild(self._receive, self._died)
        self._heard = time.monotonic()
        self._started = asyncio.get_running_loop().create_future()
        child.send(Start(self.config, self._log_format))
        limit = self.config.engine_start_timeout
        try:
            async with asyncio.timeout(limit):
                self.info = await self._started
        except TimeoutError:
            child.kill()
            raise EngineDeadError(
                f"The engine did not load the model within {limit} s (--engine-start-timeout). Give it longer, or see "
                "what holds it up: its log is above."
            ) from None
        self._watching = asyncio.get_running_loop().create_task(self._watch(child))
        return self.info

    async def _watch(self, child: EngineChild) -> None:
        """Notices when the process hangs: one that lives speaks with every step, and once a second without work."""
        while child is self._child:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            # Time in which this process itself stood still, so that it could hear nothing, does not count.
            self._heard = min(self._heard + (now - before - WATCH_SECONDS), now)
            if child is self._child and self.silence > self.config.engine_timeout + self._longest_step:
                why = f"The engine did not answer for {self.silence:.0f} s."
                logger.error(
                    "%s It is killed. Its longest step took %.1f s (--engine-timeout)", why, self._longest_step
                )
                child.kill()
                self._lost(why)

    def _receive(self, child: EngineChild, message: FromEngine) -> None:
        if child is not self._child:
            return  # it was given up before
        self._heard = time.monotonic()
        match message:
            case StepDone(outputs, stats, load):
                self._longest_step = max(self._longest_step, stats.seconds)
                self._wait.note(self._heard, sum(out.finish is not None for out in outputs), load.waiting)
                for output in outputs:
                    self._deliver(output.request_id, output)
                if self.on_step is not None:
                    self.on_step(stats, load)
            case Idle(load):
                self._wait.note(self._heard, 0, load.waiting)
                if self.on_idle is not None:
                    self.on_idle(load)
            case SequencesAborted(outputs):
                for output in outputs:
                    self._deliver(output.request_id, output)
            case Rejected(request_id, error):
                self._deliver(request_id, error)
            case AdapterLoaded(call, info):
                _settle(self._calls.pop(call), info)
            case AdapterRefused(call, error, missing):
                if isinstance(error, AdapterCapacityError):
                    error.missing = missing
                _settle(self._calls.pop(call), error)
            case Started(started, longest_step):
                self._longest_step = max(self._longest_step, longest_step)
                _settle(self._started, started)
            case NotStarted(error):
                _settle(self._started, error)

    def _deliver(self, request_id: str, item: SequenceOutput | TuckaError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(item)
            if not stream.unfinished:
                del self._streams[request_id]

    def _died(self, child: EngineChild, status: int | None) -> None:
        if child is not self._child:
            return  # it was given up before
        if self.ready:
            logger.error("the engine process ended with status %s", status)
        self._lost("The engine stopped.")

    def _lost(self, why: str) -> None:
        """Ends all that waits for the process, and has another one started if it served."""
        served, self.ready = self.ready, False
        self._wait = QueueWait()
        self._child = None
        if self.on_idle is not None:
            self.on_idle(None)
        error = EngineDeadError(f"{why} {AGAIN}")
        for request_id in list(self._streams):
            self._deliver(request_id, error)
        for future in self._calls.values():
            _settle(future, error)
        self._calls.clear()
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineDeadError("The engine stopped while it was starting; see its log above."))
        elif served and not self._stopping:  # else `start` failed, or `_revive` is at work and finds out
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
            except Exception as error:  # the task's border: without it the server would never be ready again
                if self._child is not None:  # it came back, and what has to be in it did not
                    self._child.kill()
                logger.error("the engine did not come back: %s", error, exc_info=not isinstance(error, TuckaError))
                delay = min(2 * delay, LONGEST_RESTART_DELAY)
                continue
            logger.info("the engine is back")
            return

    def submit(self, request: Request) -> OutputStream:
        """Sends a request. Raises InvalidRequestError if it alone is more than the queue takes, OverloadedError if the
        queue is full or takes too long, EngineDeadError while there is no engine."""
        room = self.config.max_num_seqs + self.config.max_queue
        if request.num_sequences > room:
            raise InvalidRequestError(
                f"The request asks for {request.num_sequences} answers (prompts x n); this server takes at most {room} "
                "at once (--max-num-seqs plus --max-queue). Ask for fewer.",
                "n",
            )
        if self._child is None or not self.ready:
            raise EngineDeadError(f"The engine is not running. {AGAIN}")
        # Clients that leave make room in the queue, but not among what an engine that hangs has not read.
        if self.in_flight + request.num_sequences > room or self._child.unsent >= room + BURST:
            soon = math.ceil(self._wait.expected(request.num_sequences, 1))
            raise OverloadedError("The queue is full. Try again later.", retry_after=soon)
        if self.config.max_queue_seconds is not None:
            self._wait.check(request, self._streams.values(), self.config.max_queue_seconds)
        self._send(Submit(request))
        stream = self._streams[request.id] = OutputStream(self, request)
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
        self,
        key: AdapterKey,
        folder: Path,
        pinned: Route | None = None,
        blob: str | None = None,
        resident: bool = True,
    ) -> AdapterInfo:
        """Loads the adapter in `folder`, whose content must be `blob`: into a slot, from the host cache if that has it,
        or else into the host cache. Raises AdapterError, StorageError if the content is another, EngineDeadError."""
        return await self._call(lambda call: LoadAdapter(call, key, folder, pinned, blob, resident))

    async def combine_adapters(
        self, key: AdapterKey, parts: tuple[AdapterPart, ...], resident: bool = True
    ) -> AdapterInfo:
        """The same of several adapters as one. Raises InvalidRequestError too, where they cannot be combined."""
        return await self._call(lambda call: CombineAdapters(call, key, parts, resident))

    async def _call(self, message: Callable[[int], LoadAdapter | CombineAdapters]) -> AdapterInfo:
        call = next(self._numbers)
        self._send(message(call))
        self._calls[call] = asyncio.get_running_loop().create_future()
        return await self._calls[call]

    def evict_adapter(self, key: AdapterKey) -> None:
        """Frees the slot of an adapter that no request in flight uses, for the host cache."""
        if self._child is not None:
            self._send(EvictAdapter(key))

    def unload_adapter(self, key: AdapterKey) -> None:
        """Requests that were submitted before go on, and the last one's end frees the memory, the host cache's too."""
        if self._child is not None:
            self._send(UnloadAdapter(key))

    def _send(self, message: ToEngine) -> None:
        """Never waits. Where the process is about to be found dead, the streams and calls end with an error."""
        if self._child is None:
            raise EngineDeadError(f"The engine is not running. {AGAIN}")
        self._child.send(message)

    async def stop(self, timeout: float) -> None:
        """Ends the process: politely, after `timeout` seconds by force."""
        self._stopping, self.ready = True, False
        if self._restart is not None:
            self._restart.cancel()
        if self._child is not None:
            self._send(Stop())
        if self._last is not None and not await self._last.ended(timeout):
            self._last.kill()
            if not await self._last.ended(END_SECONDS):
                logger.error("the engine process %d could not be ended", self._last.pid)


def _settle(future: "asyncio.Future[T] | None", result: "T | TuckaError") -> None:
    """Hands a result to who waits for it, if it is still waited for."""
    if future is None or future.done():
        return
    if isinstance(result, TuckaError):
        future.set_exception(result)
    else:
        future.set_result(result)
