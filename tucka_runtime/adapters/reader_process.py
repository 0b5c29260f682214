"""The process that reads adapters for the engine: `python -m tucka_runtime.adapters.reader_process FD PARENT`.

Reading and checking files is Python, and in a thread of the engine's process it would hold Python's lock: each of a
step's calls into torch gives that away and would have to wait for it (docs/measurements/engine-faults-2026-11-26.md).
The engine's end is engine/adapters/reader.py. Ends with its parent.
"""

import contextlib
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tucka_runtime.adapters.format import read_adapter
from tucka_runtime.adapters.handover import LEAST_BYTES, SharedNumbers, pack
from tucka_runtime.channel import Channel
from tucka_runtime.channel_messages import AdapterSize, AdapterUnread, ReadAdapter, StartReader
from tucka_runtime.children import end_with_parent
from tucka_runtime.errors import AdapterCapacityError, TuckaError
from tucka_runtime.logs import set_up_logging
from tucka_runtime.messages import BaseLayout

log = logging.getLogger(__name__)

OWN_BYTES = 2**30
"""What the process may take for itself while it reads, over what it has when it starts: a header of a mebibyte as
Python's objects, and pieces of the weights. The tensors are shared memory: the engine says how much of it there is."""

NICENESS = 19
"""Steps and requests come first where all cores are busy, and a batch process never interrupts one."""
WORK_SECONDS, REST_SECONDS = 0.001, 0.0001
"""Whom Linux has let run on a core it takes off there at a tick, every 4 ms, whatever the niceness; a thread of the
engine's that wants that core waits as long. One that rests gives its core away at once, and goes on where one is idle
(docs/measurements/engine-faults-2026-11-26.md)."""


def main() -> None:
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; it ends with the engine
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: time.sleep(REST_SECONDS))
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(NICENESS)
    torch.set_num_threads(1)
    channel = Channel(int(sys.argv[1]))
    try:
        start: StartReader = channel.receive()
        set_up_logging(start.log_format, "reader")
        _limit_memory()
        while True:
            question = channel.receive()
            with _giving_way():
                _answer(channel, question, start.base)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """Rests for REST_SECONDS after every WORK_SECONDS, behind the call into torch that may be under way."""
    signal.setitimer(signal.ITIMER_REAL, WORK_SECONDS, WORK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text().split()
    limit = int(status[status.index("VmData:") + 1]) * 1024 + OWN_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _answer(channel: Channel, question: ReadAdapter, base: BaseLayout) -> None:
    memory: SharedNumbers | None = None

    def allocate(count: int) -> Tensor:
        nonlocal memory
        size = count * torch.float32.itemsize
        if size > question.room:
            raise AdapterCapacityError(
                f"The adapter's tensors take {size / 1e6:.1f} MB while it is loaded, but {question.room / 1e6:.1f} MB "
                "are left beside the KV cache and what a step needs. Unload one, or restart with a smaller "
                "--kv-cache-tokens.",
                missing=size - question.room,
            )
        if size > LEAST_BYTES:
            channel.send(AdapterSize(size))
        memory = SharedNumbers.allocate(count)
        return memory.numbers

    try:
        adapter = read_adapter(question.folder, base, question.blob, allocate)
        assert memory is not None
        channel.send(pack(adapter, memory), memory.file)
    except AdapterCapacityError as error:
        channel.send(AdapterUnread(error, error.missing))
    except TuckaError as error:
        channel.send(AdapterUnread(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception:
        log.exception("an adapter could not be read")
        channel.send(AdapterUnread(TuckaError("The adapter could not be loaded: an internal error.")))
    finally:
        if memory is not None:
            memory.close()


if __name__ == "__main__":
    main()
