"""Log lines: plain for people, JSON for machines. Neither can be forged by what a request brings."""

import json
import logging
import re
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

COMPLAINT_SECONDS = 60.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class OnceAMinute:
    """For a complaint that could be made again and again: whether it is time for the next."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._quiet_until:
            return False
        self._quiet_until = now + COMPLAINT_SECONDS
        return True


class StderrHandler(logging.StreamHandler[TextIO]):
    """What cannot be written, as on a full disk, is counted and no traceback: the next line that can be says so."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._lost:
            lost, self._lost = self._lost, 0
            notice = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "args": (lost,)}
            super().emit(logging.makeLogRecord(notice | {"msg": "%d lines of this log could not be written"}))
            if self._lost:
                self._lost = lost + 1  # this one neither
                return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            self._lost += 1
        else:
            super().handleError(record)


class PlainFormatter(logging.Formatter):
    """Control characters become `?`, and a message's own line ends too: only tracebacks have several lines."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub("?", super().formatMessage(record).replace("\n", "?"))

    def formatException(self, info: object) -> str:
        return _CONTROL.sub("?", super().formatException(info))  # type: ignore[arg-type]


class JSONFormatter(logging.Formatter):
    """One object per line: time (UTC), level, process, message, then the fields that `fields` gave."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: nothing in it ends a line or moves a cursor


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` of a log call: what the JSON line has beside the message."""
    return {"fields": values}


def set_up_logging(log_format: str, process: str) -> None:
    """Everything goes to stderr: ours from INFO on, others' warnings. `process` is "server", "engine" or "reader"."""
    handler = StderrHandler()
    if log_format == "json":
        handler.setFormatter(JSONFormatter(process))
        sys.excepthook = lambda kind, error, trace: logging.critical("stopped", exc_info=(kind, error, trace))
    else:
        handler.setFormatter(PlainFormatter("" if process == "server" else f"{process}: "))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tucka_runtime").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
