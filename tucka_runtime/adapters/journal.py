"""A table on disk that survives crashes, and in which one change costs the same however many rows there are.

    <root>/registry.json      all rows as they were once, replaced atomically, and the number of the log that goes on
    <root>/registry.log.<n>   the changes since then, a line of JSON each, appended and synced one by one

A log belongs to one process: the first change after a start writes the table anew. So what a crash left at a log's end
is never written behind. After a crash at any moment the rows are those of before or after the change. Standard library
only.
"""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tucka_runtime.adapters.blobs import delete
from tucka_runtime.adapters.files import strict_json
from tucka_runtime.durable import write_file

TABLE = "registry.json"
LOG = "registry.log."
LEAST_LINES = 1000  # a log's before the table is written anew: with more rows it is as many lines as rows

JournalRow = dict[str, Any]


class Journal:
    """The rows below `root`, by their "name". Where the disk refuses, methods raise OSError and change nothing."""

    def __init__(self, root: Path, version: int):
        self.root = root
        self._version = version
        self._rows: dict[str, str] = {}  # as JSON
        self._number = 0
        self._log: IO[bytes] | None = None  # None: the next change writes the table
        self._lines = 0

    def read(self) -> tuple[int, list[JournalRow]]:
        """The format's version and all rows, in the order in which their names first came; version 0 where there is
        nothing. Raises ValueError, KeyError or TypeError for what this class did not write."""
        try:
            table = strict_json((self.root / TABLE).read_bytes())
        except FileNotFoundError:
            return 0, []
        version, number = (table.get(key, at_first) for key, at_first in (("version", 1), ("log", 0)))
        if type(version) is not int or type(number) is not int:
            raise ValueError("its `version` or `log` is no number")
        if version > self._version:
            return version, []
        self._number = number
        rows: dict[str, JournalRow] = {}
        for row in table["adapters"]:
            if rows.setdefault(row["name"], row) is not row:
                raise ValueError("it has a name twice")
        for change in self._changes():
            if "put" in change:
                rows[change["put"]["name"]] = change["put"]
            else:
                rows.pop(change["remove"], None)
        self._rows = {name: _line(row) for name, row in rows.items()}
        return version, list(rows.values())

    def put(self, row: JournalRow) -> None:
        """A new row, or one in place of its name's last."""
        text = _line(row)
        self._change(f'{{"put": {text}}}', {row["name"]: text})

    def remove(self, name: str) -> None:
        """The name's row goes."""
        self._change(_line({"remove": name}), {name: None})

    def mend(self) -> None:
        """Writes what is gone of the files once more."""
        files = (self.root / TABLE, *([self._path(self._number)] if self._log is not None else []))
        if (self._rows or self._log is not None) and not all(file.exists() for file in files):
            self._write(self._rows)

    def _change(self, line: str, changed: Mapping[str, str | None]) -> None:
        if self._log is None or self._lines >= max(LEAST_LINES, len(self._rows)):
            rows = {name: row for name, row in {**self._rows, **changed}.items() if row is not None}
            self._write(rows)
            self._rows = rows
            return
        self._append(f"{line}\n".encode("utf-8", "replace"))
        for name, row in changed.items():
            if row is not None:
                self._rows[name] = row
            else:
                self._rows.pop(name, None)

    def _append(self, line: bytes) -> None:
        assert self._log is not None
        end = self._log.tell()
        try:
            if self._log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._log.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # nobody was told of the change: it must not come up after a restart
                os.ftruncate(self._log.fileno(), end)
            self.close()
            raise
        self._lines += 1

    def _write(self, rows: Mapping[str, str]) -> None:
        """Writes the table anew. Changes go on in another log, of which nothing is there yet."""
        number = self._number + 1
        text = f'{{"version": {self._version}, "log": {number}, "adapters": [\n' + ",\n".join(rows.values()) + "\n]}\n"
        log = open(self._path(number), "wb", buffering=0)  # noqa: SIM115 (until the next table)
        try:
            # It makes the names in the folder durable, the log's among them. A source may be a path that is no UTF-8.
            write_file(self.root, TABLE, text.encode("utf-8", "replace"))
        except OSError:
            log.close()
            raise
        self.close()
        self._log, self._number, self._lines = log, number, 0
        self.clean()

    def clean(self) -> None:
        """Deletes what nobody reads: half-written tables, and logs that no table goes on in."""
        own = self._path(self._number)
        for leftover in (*self.root.glob(f".{TABLE}.*"), *self.root.glob(f"{LOG}*")):
            if leftover != own:
                delete(leftover)

    def close(self) -> None:
        """What was changed is on the disk without it."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _changes(self) -> list[JournalRow]:
        """What the log has. A crash may have cut its last line off."""
        try:
            lines = self._path(self._number).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        changes = []
        for at, line in enumerate(lines[:-1]):
            try:
                changes.append(strict_json(line))
            except ValueError:
                if at < len(lines) - 2:
                    raise
        return changes

    def _path(self, number: int) -> Path:
        return self.root / f"{LOG}{number}"


def _line(row: JournalRow) -> str:
    return json.dumps(row, ensure_ascii=False)
