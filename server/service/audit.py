"""The audit log (`--audit-log`): one JSON line for every change of adapters or keys that somebody asked this server
for, done or refused, and who it was. It never holds a key.

A line is on the disk (fsync) before the change is answered. Where it cannot be written (a full disk) the change that
was just made stands: its line goes to the server's own log, waits here, and is the first to be written when there is
room. Until then nothing more is changed. Answering requests does not depend on it.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from tucka_runtime.errors import ConfigError, StorageError
from tucka_runtime.logs import fields
from tucka_runtime.names import loggable
from tucka_runtime.server.http.errors import reason

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass
class AuditedChange:
    """What a request changes. `action` is its route until who makes the change knows better; the digests are those of
    what the name stood for before and stands for after."""

    action: str
    adapter: str | None = None
    before: str | None = None
    after: str | None = None


_current: ContextVar[AuditedChange | None] = ContextVar("change", default=None)


@contextmanager
def watched(action: str) -> Iterator[AuditedChange]:
    """What is noted within is noted in this change."""
    change = AuditedChange(action)
    token = _current.set(change)
    try:
        yield change
    finally:
        _current.reset(token)


def note(action: str, adapter: str) -> None:
    """Says what the change under way is to do with which name, before it may fail; nothing where nobody watches."""
    if (change := _current.get()) is not None:
        change.action, change.adapter = action, loggable(adapter)


def note_digests(before: str | None, after: str | None) -> None:
    """Says what the change under way has done."""
    if (change := _current.get()) is not None:
        change.before, change.after = before, after


@asynccontextmanager
async def changing(audit: "AuditLog | None", action: str, name: str, by: str) -> AsyncIterator[None]:
    """What the server itself does to a name because of a setting, `by` which it is. What fails has no line, for it is
    tried again and again. Raises StorageError where a line cannot be written."""
    if audit is None:
        yield
        return
    async with audit.change(action, None, None, refusals=False, by=by):
        note(action, name)
        yield


class AuditLog:
    """The file, only ever appended to. Raises ConfigError where it cannot be opened."""

    def __init__(self, path: str):
        self._path = path
        self._writing = ThreadPoolExecutor(1, "audit-log")  # one: lines stay in their order
        self._waiting: list[bytes] = []
        self._file = -1
        try:
            self._open()
        except OSError as error:
            raise ConfigError(f"--audit-log {path} cannot be opened: {error.strerror}.") from None

    async def check(self) -> None:
        """Raises StorageError while there are lines that cannot be written."""
        if self._waiting and not await self._run(self._flush):
            raise StorageError(
                "The server's audit log cannot be written, so nothing is changed. Make room on its disk."
            )

    @asynccontextmanager
    async def change(
        self, action: str, key: str | None, request_id: str | None, refusals: bool = True, **more: object
    ) -> AsyncIterator[None]:
        """What is changed within gets its line, also, with `refusals`, where it fails. Raises StorageError, before
        anything is done, while there are lines that cannot be written."""
        await self.check()
        result = "ok"
        with watched(action) as change:
            try:
                yield
            except BaseException as error:
                result = reason(error)
                raise
            finally:
                if refusals or result == "ok":
                    await self.write(key, request_id, change, result, **more)

    async def write(
        self, key: str | None, request_id: str | None, change: AuditedChange, result: str, **more: object
    ) -> None:
        """Appends a line; `result` is "ok" or the code of the error that was answered."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": key,
            "request_id": request_id,
            "action": change.action,
            "adapter": change.adapter,
            "digest_before": change.before,
            "digest_after": change.after,
            "result": result,
            **more,
        }
        self._waiting.append(json.dumps(entry).encode() + b"\n")
        if not await self._run(self._flush):
            log.error(
                "the audit log %s cannot be written: nothing more is changed until it can. The line was %s",
                self._path,
                json.dumps(entry),
                extra=fields(event="audit_log_failed", entry=entry),
            )

    async def reopen(self) -> None:
        """Goes on in the file that has the name now: the old one may have been moved away."""
        try:
            await self._run(self._open)
        except OSError as error:
            log.error("the audit log %s cannot be opened again, the old one is kept: %s", self._path, error.strerror)

    def close(self) -> None:
        self._writing.shutdown()
        os.close(self._file)

    def _open(self) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = file

    def _flush(self) -> bool:
        """Writes what waits; whether all of it is on the disk. A line that was cut off when the disk was full, or the
        machine went down, is ended first, and comes again whole."""
        try:
            while self._waiting:
                size = os.fstat(self._file).st_size
                torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
                line = b"\n" * torn + self._waiting[0]
                if os.write(self._file, line) < len(line):
                    return False
                os.fsync(self._file)
                del self._waiting[0]
        except OSError:
            return False
        return True

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writing, function)
