"""The engine's own process, and its end of the channel.

The API process's EngineClient starts `python -m tucka_runtime.engine.process` with one end of a socket pair, and speaks
the messages of channel_messages.py over it (channel.py). The process ends when its channel closes, and with its parent,
so it never outlives it, whatever it is doing.
"""

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tucka_runtime.channel_messages import (
    Abort,
    AdapterLoaded,
    AdapterRefused,
    CombineAdapters,
    EvictAdapter,
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
from tucka_runtime.children import end_with_parent
from tucka_runtime.engine import environment
from tucka_runtime.errors import AdapterCapacityError, ModelLoadError, TuckaError
from tucka_runtime.logs import set_up_logging
from tucka_runtime.messages import AdapterInfo

if TYPE_CHECKING:
    from tucka_runtime.channel import Channel
    from tucka_runtime.engine.adapters.folded import FoldedAdapter
    from tucka_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between two signs of life without work; after the first such wait the engine checks its books


@dataclass(frozen=True, slots=True)
class _Prepared:
    """From the loader thread to the step loop: an adapter to be added."""

    call: int
    folded: "FoldedAdapter"
    info: AdapterInfo


@dataclass(frozen=True, slots=True)
class _Evicted:
    """From the step loop to the loader thread: an adapter that has lost its slot."""

    folded: "FoldedAdapter"


class _Closed:
    """From the reading thread to the step loop: the parent is gone."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """From another thread to the step loop: it has ended, by a fault."""

    error: Exception


_Message = ToEngine | _Prepared | AdapterLoaded | AdapterRefused | _Closed | _Failed
_Inbox = queue.SimpleQueue[_Message]
"""All that the step loop learns from others, in order. Nobody else works on the engine, and after the start nobody else
writes to the channel: the loader's answers come here too, to be sent on."""
_Loads = queue.SimpleQueue[LoadAdapter | CombineAdapters | UnloadAdapter | _Evicted]
"""What the loader thread does, in order: so an adapter that lost its slot is in the host cache when it is wanted again,
and the memory of one that was pushed out is free when the one that did so is read."""


def main() -> None:
    """The engine process: `python -m tucka_runtime.engine.process FD PARENT`, the channel and the process it serves."""
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from tucka_runtime.channel import (  # with msgspec, which the engine does without where it is used offline
        Channel,
        ChannelError,
    )

    channel = Channel(int(sys.argv[1]))
    try:
        start: Start = channel.receive()
    except (ChannelError, EOFError) as error:
        sys.exit(f"the engine's process cannot start: {error or 'its parent is gone'}")
    set_up_logging(start.log_format, "engine")
    environment.prepare()
    from tucka_runtime.engine.adapters.reader import AdapterReader

    reader = AdapterReader(start.log_format)
    with contextlib.suppress(OSError):  # the first load finds out
        reader.start()  # it is there when the model is
    from torch import OutOfMemoryError

    from tucka_runtime.engine.engine import Engine

    try:
        engine = Engine(start.config)
        engine.reader = reader
        longest_step = engine.rehearsal.time_longest_step()
    except ModelLoadError as error:
        channel.send(NotStarted(error))
        return
    except OutOfMemoryError:
        channel.send(
            NotStarted(
                ModelLoadError(
                    "The GPU's memory does not hold the model, its KV cache and what a step needs. Lower "
                    "--kv-cache-tokens, --max-num-batched-tokens or --max-num-seqs."
                )
            )
        )
        return
    channel.send(Started(engine.info, longest_step))
    gc.collect()
    gc.freeze()  # what was imported and loaded stays: no collection walks it again between two tokens
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(engine, channel)
    os._exit(0)  # a loader thread may still be reading a file; nobody waits for it


def serve(engine: "Engine", channel: "Channel") -> None:
    """Steps while there is work, listens in between. Returns when asked to stop; raises EOFError when the parent is
    gone. Any other error is a fault: it ends the process, and the parent starts a new one."""
    inbox: _Inbox = queue.SimpleQueue()
    loads: _Loads = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    threading.Thread(target=_load, args=(engine, loads, inbox), daemon=True).start()
    while True:
        for message in _received(engine, channel, inbox):
            if isinstance(message, Stop):
                return
            match message:
                case LoadAdapter() | CombineAdapters():
                    loads.put(message)
                case EvictAdapter(key):
                    if (folded := engine.evict_adapter(key)) is not None:
                        loads.put(_Evicted(folded))
                        del folded  # the loader's alone: on a GPU its memory is to be free once it is copied
                case UnloadAdapter(key):
                    engine.unload_adapter(key)
                    loads.put(message)
                case _:
                    _handle(engine, channel, message)
        if engine.busy:
            outputs, stats = engine.step()
            if stats is not None:
                channel.send(StepDone(outputs, stats, engine.load))
                engine.turns.between(stats.seconds, loads.qsize())


def _received(engine: "Engine", channel: "Channel", inbox: _Inbox) -> Iterator[_Message]:
    """All that has come; an engine without work waits for the first."""
    if not engine.busy:
        engine.turns.open()
        yield _idle(engine, channel, inbox)
    with contextlib.suppress(queue.Empty):
        while True:
            yield inbox.get_nowait()


def _idle(engine: "Engine", channel: "Channel", inbox: _Inbox) -> _Message:
    """Waits for the next message. Until it comes, prepares what loaded adapters will need, says once a second that the
    process lives, and checks the books once."""
    checked = False
    while True:
        channel.send(Idle(engine.load))
        preparing = engine.rehearsal.prepare()
        try:
            return inbox.get(block=not preparing, timeout=IDLE_SECONDS)
        except queue.Empty:
            if not preparing and not checked:
                engine.check_integrity()
                checked = True


def _handle(
    engine: "Engine",
    channel: "Channel",
    message: Submit | Abort | _Prepared | AdapterLoaded | AdapterRefused | _Closed | _Failed,
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
                channel.send(SequencesAborted(ended))
        case _Prepared(call, folded, info):
            try:
                engine.add_adapter(folded)
                channel.send(AdapterLoaded(call, info))
            except TuckaError as error:
                channel.send(AdapterRefused(call, error))
        case AdapterLoaded() | AdapterRefused():
            channel.send(message)
        case _Closed():
            raise EOFError
        case _Failed(error):
            raise error


def _read(channel: "Channel", inbox: _Inbox) -> None:
    """The thread that reads the channel."""
    try:
        while True:
            inbox.put(channel.receive())
    except (EOFError, OSError):
        inbox.put(_Closed())
    except Exception as error:  # the thread's border: a process that reads nothing any more has to end
        inbox.put(_Failed(error))


def _load(engine: "Engine", loads: _Loads, inbox: _Inbox) -> None:
    """The thread that reads and folds adapters, so that the step loop only ever adds finished ones. It folds in turns
    with the steps. The host cache is its own."""
    try:
        _load_each(engine, loads, inbox)
    except Exception as error:  # the thread's border: loads would wait for ever
        inbox.put(_Failed(error))


def _load_each(engine: "Engine", loads: _Loads, inbox: _Inbox) -> None:
    while True:
        match task := loads.get():
            case LoadAdapter() | CombineAdapters():
                inbox.put(_loaded(engine, task))
            case UnloadAdapter(key):
                engine.host.drop(key)
            case _Evicted(folded):
                engine.cache_adapter(folded)
                del folded
        del task  # while the thread waits it holds no adapter


def _loaded(engine: "Engine", load: LoadAdapter | CombineAdapters) -> _Prepared | AdapterLoaded | AdapterRefused:
    """The outcome of a load: for the step loop, or for the API's process."""
    try:
        if load.resident and (found := engine.activate_adapter(load.key)) is not None:
            return _Prepared(load.call, *found)
        if isinstance(load, CombineAdapters):
            folded, info = engine.combine_adapters(load.key, load.parts, load.resident)
        else:
            folded, info = engine.prepare_adapter(load.key, load.folder, load.pinned, load.blob, load.resident)
        engine.host.note(info)
        if load.resident:
            return _Prepared(load.call, folded, info)
        engine.cache_adapter(folded)
        return AdapterLoaded(load.call, info)
    except AdapterCapacityError as error:
        return AdapterRefused(load.call, error, error.missing)
    except TuckaError as error:
        return AdapterRefused(load.call, error)
    except Exception:
        logger.exception("an adapter could not be loaded")
        return AdapterRefused(load.call, TuckaError("The adapter could not be loaded: an internal error."))


if __name__ == "__main__":
    main()
