"""The engine's own process, and the channel to it.

The API process's EngineClient starts `python -m tucka_runtime.engine.process` with one end of a socket pair and speaks
pickled tuples over it: nobody else can write there. Messages are ordered, which is what leases rely on: a request sent
before an unload is taken on before it.

    to the engine:    ("submit", Request) ("abort", id, index or None) ("load", call, key, folder, pinned)
                      ("unload", key) ("stop",)
    from the engine:  ("ready", EngineInfo) ("failed", error) ("step", [SequenceOutput], StepStats)
                      ("idle", StepStats) ("ended", [SequenceOutput]) ("rejected", id, error)
                      ("loaded", call, AdapterInfo or error)

The process ends when its channel closes, so it never outlives its parent.
"""

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import ModelLoadError, TuckaError
from tucka_runtime.logs import set_up_logging

if TYPE_CHECKING:
    from tucka_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # without work for so long, the engine checks its books once

NARROW = 512
"""Models whose hidden states are narrower get one thread: more only take the cores from the API process. Two against
one, `python -m tucka_runtime.bench`, base only: d 128 1796 and 2056 tok/s, d 256 1208 and 1136, d 512 588 and 452; with
`tucka loadtest --rate 4` on the embedded default (d 128) a token takes 14.3 and 6.5 ms. On 2 cores."""


def main() -> None:
    """The engine process: `python -m tucka_runtime.engine.process FD`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_up_logging(os.environ.get("TUCKA_LOG_FORMAT", "text"), "engine")
    channel = Connection(int(sys.argv[1]))
    config: EngineConfig = channel.recv()
    from tucka_runtime.engine.engine import Engine

    try:
        engine = Engine(config)
    except ModelLoadError as error:
        channel.send(("failed", error))
        return
    if config.num_threads is None and engine.runner.arch.hidden < NARROW:
        import torch

        torch.set_num_threads(1)
    channel.send(("ready", engine.info))
    gc.collect()
    gc.freeze()  # what was imported and loaded stays: no collection walks it again between two tokens
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(engine, channel)
    os._exit(0)  # a loader thread may still be reading a file; nobody waits for it


def serve(engine: "Engine", channel: Connection) -> None:
    """Steps while there is work, listens in between. Returns when asked to stop; raises EOFError when the parent is
    gone. Any other error is a fault: it ends the process, and the parent starts a new one."""
    inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    loads: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    threading.Thread(target=_load, args=(engine, loads, inbox), daemon=True).start()
    checked = told = False
    while True:
        while True:
            if not engine.busy and not told:
                channel.send(("idle", engine.held()))
            told = not engine.busy
            try:
                message = inbox.get(block=not (engine.busy or engine.prepare()), timeout=IDLE_SECONDS)
            except queue.Empty:
                break
            checked = False
            if not _handle(engine, channel, loads, message):
                return
        if engine.busy:
            outputs, stats = engine.step()
            if stats is not None:
                channel.send(("step", outputs, stats))
        elif not checked:
            engine.check_integrity()
            checked = True


def _handle(
    engine: "Engine", channel: Connection, loads: "queue.SimpleQueue[tuple[Any, ...]]", message: tuple[Any, ...]
) -> bool:
    """One message; False to stop."""
    match message:
        case ("submit", request):
            try:
                engine.add(request)
            except TuckaError as error:
                channel.send(("rejected", request.id, error))
        case ("abort", request_id, index):
            ended = engine.abort(request_id, index)
            if index is not None and ended:
                channel.send(("ended", ended))
        case ("load", *call):
            loads.put(tuple(call))
        case ("prepared", call, folded, info):
            try:
                engine.add_adapter(folded)
                channel.send(("loaded", call, info))
            except TuckaError as error:
                channel.send(("loaded", call, error))
        case ("unprepared", call, error):
            channel.send(("loaded", call, error))
        case ("unload", key):
            engine.unload_adapter(key)
        case ("closed",):
            raise EOFError
        case ("stop",):
            return False
    return True


def _read(channel: Connection, inbox: "queue.SimpleQueue[tuple[Any, ...]]") -> None:
    try:
        while True:
            inbox.put(channel.recv())
    except (EOFError, OSError):
        inbox.put(("closed",))


def _load(
    engine: "Engine", loads: "queue.SimpleQueue[tuple[Any, ...]]", inbox: "queue.SimpleQueue[tuple[Any, ...]]"
) -> None:
    """The thread that reads and folds adapters, so that the step loop only ever adds finished ones."""
    while True:
        call, key, folder, pinned = loads.get()
        try:
            inbox.put(("prepared", call, *engine.prepare_adapter(key, Path(folder), pinned)))
        except TuckaError as error:
            inbox.put(("unprepared", call, error))
        except Exception:
            logger.exception("an adapter could not be loaded")
            inbox.put(("unprepared", call, TuckaError("The adapter could not be loaded: an internal error.")))


if __name__ == "__main__":
    main()
