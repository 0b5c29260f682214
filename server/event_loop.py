"""The event loop that servers run on."""

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger("tucka_runtime.server")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop where it is installed: `python -m tucka_runtime.server.bench_stream` shows what it saves."""
    try:
        import uvloop
    except ImportError:
        log.warning("uvloop is not installed here: asyncio's own event loop serves, which takes more of the processor")
        return asyncio.new_event_loop
    return uvloop.new_event_loop
