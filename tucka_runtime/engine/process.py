"""The engine's own process, and its end of the channel.

The API process's EngineClient starts `python -m tucka_runtime.engine.process` with one end of a socket pair, and speaks
the pickled messages of messages.py over it: nobody else can write there. The process ends when its channel closes, and
with its parent, so it never outlives it, whatever it is doing.
"""

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from tucka_runtime.children import end_with_parent
from tucka_runtime.engine import environment
from tucka_runtime.errors import ModelLoadError, TuckaError
from tucka_runtime.logs import set_up_logging
from tucka_runtime.messages import (
    Abort,
    AdapterInfo,
    AdapterLoaded,
    AdapterRefused,
    Ended,
    Idle,
    LoadAdapter,
    NotStarted,
    Rejected,
    Start,
    Started,
    StepDone,
    Stop,
    Submit,
    ToEngine,
    UnloadAdapter,
)

if TYPE_CHECKING:
    from tucka_runtime.engine.adapters.folded import FoldedAdapter
    from tucka_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # without work for so long, the engine checks its books once


@dataclass(frozen=True, slots=True)
class _Prepared:
    """From the loader thread to the step loop: an adapter to be added."""

    call: int
    folded: "FoldedAdapter"
    info: AdapterInfo


class _Closed:
    """From the reading thread to the step loop: the parent is gone."""


_Inbox = queue.SimpleQueue[ToEngine | _Prepared | AdapterRefused | _Closed]


def main() -> None:
    """The engine process: `python -m tucka_runtime.engine.process FD PARENT`, the channel and the process it serves."""
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Connection(int(sys.argv[1]))
    start: Start = channel.recv()
    set_up_logging(start.log_format, "engine")
    environment.prepare()
    from tucka_runtime.engine.engine import Engine

    try:
        engine = Engine(start.config)
    except ModelLoadError as error:
        channel.send(NotStarted(error))
        return
    channel.send(Started(engine.info))
    gc.collect()
    gc.freeze()  # what was imported and loaded stays: no collection walks it again between two tokens
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(engine, channel)
    os._exit(0)  # a loader thread may still be reading a file; nobody waits for it


def serve(engine: "Engine", channel: Connection) -> None:
    """Steps while there is work, listens in between. Returns when asked to stop; raises EOFError when the parent is
    gone. Any other error is a fault: it ends the process, and the parent starts a new one."""
    inbox: _Inbox = queue.SimpleQueue()
    loads: queue.SimpleQueue[LoadAdapter] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    threading.Thread(target=_load, args=(engine, loads, inbox), daemon=True).start()
    checked = told = False
    while True:
        while True:
            if not engine.busy and not told:
                channel.send(Idle(engine.load))
            told = not engine.busy
            try:
                message = inbox.get(block=not (engine.busy or engine.prepare()), timeout=IDLE_SECONDS)
            except queue.Empty:
                break
            checked = False
            if isinstance(message, Stop):
                return
            if isinstance(message, LoadAdapter):
                loads.put(message)
            else:
                _handle(engine, channel, message)
        if engine.busy:
            outputs, stats = engine.step()
            if stats is not None:
                channel.send(StepDone(outputs, stats, engine.load))
        elif not checked:
            engine.check_integrity()
            checked = True


def _handle(
    engine: "Engine",
    channel: Connection,
    message: Submit | Abort | UnloadAdapter | _Prepared | AdapterRefused | _Closed,
) -> None:
    match message:
        case Submit(request):
            try:
                engine.add(request)
            except TuckaError as error:
                channel.send(Rejected(request.id, error))
        case Abort(request_id, index):
            ended = engine.abort(request_id, index)
            if index is not None and ended:
                channel.send(Ended(ended))
        case _Prepared(call, folded, info):
            try:
                engine.add_adapter(folded)
                channel.send(AdapterLoaded(call, info))
            except TuckaError as error:
                channel.send(AdapterRefused(call, error))
        case AdapterRefused():
            channel.send(message)
        case UnloadAdapter(key):
            engine.unload_adapter(key)
        case _Closed():
            raise EOFError


def _read(channel: Connection, inbox: _Inbox) -> None:
    """The thread that reads the channel."""
    try:
        while True:
            inbox.put(channel.recv())
    except (EOFError, OSError):
        inbox.put(_Closed())


def _load(engine: "Engine", loads: "queue.SimpleQueue[LoadAdapter]", inbox: _Inbox) -> None:
    """The thread that reads and folds adapters, so that the step loop only ever adds finished ones."""
    while True:
        load = loads.get()
        try:
            inbox.put(_Prepared(load.call, *engine.prepare_adapter(load.key, load.folder, load.pinned, load.blob)))
        except TuckaError as error:
            inbox.put(AdapterRefused(load.call, error))
        except Exception:
            logger.exception("an adapter could not be loaded")
            inbox.put(AdapterRefused(load.call, TuckaError("The adapter could not be loaded: an internal error.")))


if __name__ == "__main__":
    main()
