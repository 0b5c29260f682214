"""Names that are not registered, looked up in sources: what vLLM's resolvers do.

A request may name an adapter that no name stands for yet. It waits while the sources are asked, in their order, for a
folder of that name, and others go on. What no source has is known for a while, so that a client that asks for it again
and again does not become traffic to a store.
"""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext

from tucka_runtime.adapters.remote import NoSuchAdapterError
from tucka_runtime.errors import (
    AdapterCapacityError,
    AdapterConflictError,
    AdapterError,
    OverloadedError,
    SourceError,
    TuckaError,
)
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.audit import AuditLog, changing

BY = "--adapter-resolve"
FORGET_SECONDS = 30.0  # until what was not found is looked for again
MAX_KNOWN = 10_000  # names without an adapter that are remembered, the latest
MAX_LOOKUPS = 64  # at once

_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class Resolver:
    """Loads names from the sources called `marked`, each with its line in the audit log. The registry forgets them at a
    restart: the source has them."""

    def __init__(self, adapters: AdapterNames, marked: Sequence[str], audit: AuditLog | None):
        self._adapters, self._audit = adapters, audit
        self._marked = marked
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed: OrderedDict[str, tuple[float, TuckaError | None]] = OrderedDict()

    async def look_up(self, name: str) -> None:
        """Loads the adapter of that name if nothing has the name and a source has the adapter. A name that could not be
        a folder's is never asked for.

        Raises what loading it raises, SourceError, and OverloadedError where too many names are looked for.
        """
        if not self._marked or self._adapters.knows(name) or not _NAME.fullmatch(name):
            return
        if self._adapters.member(name) is not None:
            return
        if (found := self._failed.get(name)) is not None and time.monotonic() < found[0]:
            if found[1] is not None:
                raise type(found[1])(found[1].message, "model")
            return
        if (task := self._running.get(name)) is None:
            if len(self._running) >= MAX_LOOKUPS:
                raise OverloadedError("Too many adapters are being looked for in their sources. Try again later.")
            task = self._running[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda done: self._end(name, done))
        await asyncio.shield(task)  # who has asked may leave: the others wait on

    async def _load(self, name: str) -> None:
        error: TuckaError | None = None
        for source in self._marked:
            try:
                async with self._adapters.sources.found(f"{source}:{name}") as found:
                    async with changing(self._audit, "load", name, BY):
                        await self._adapters.load_from(name, nullcontext(found), False, None, durable=False)
                    return
            except NoSuchAdapterError:
                continue
            except AdapterConflictError:
                if self._adapters.knows(name):  # somebody has given it the name meanwhile
                    return
                raise
            except TuckaError as failure:
                error = error or failure
        if error is None or (
            isinstance(error, AdapterError | SourceError) and not isinstance(error, AdapterCapacityError)
        ):
            self._failed[name] = time.monotonic() + FORGET_SECONDS, error
            self._failed.move_to_end(name)
            while len(self._failed) > MAX_KNOWN:
                self._failed.popitem(last=False)
        if error is not None:
            raise type(error)(error.message, "model")

    def _end(self, name: str, task: asyncio.Task[None]) -> None:
        del self._running[name]
        if not task.cancelled():
            task.exception()  # seen, also where everybody who asked has left
