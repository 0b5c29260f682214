"""Records as people have them: read from JSONL, a JSON array or Parquet, and brought into one of three forms."""

import gzip
import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.errors import TuckaError

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""Roles by the names that messages give them; the last two are ShareGPT's."""

FORMS = "prompt and completion, messages, conversations (ShareGPT), instruction and output (Alpaca), or text"


class DataError(TuckaError):
    """The training data cannot be used; the message lists line numbers and reasons."""


@dataclass(frozen=True)
class TrainingRecord:
    """One of: a text, a prompt with its completion, or a conversation that ends with the assistant. `ignored` are the
    keys that nothing was made of."""

    task: str
    ignored: frozenset[str]
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()


def read(path: Path) -> list[tuple[str, Any]]:
    """(where, record or its JSON text) of a file: gzipped or not, with a byte order mark or not, lines ending in either
    way, blank ones skipped. Raises DataError for what cannot be read, and for no records."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is not whole gzip data"
        raise DataError(f"The data file {path} cannot be read: {reason}.") from error
    if data.startswith(b"PAR1"):
        found = _parquet(path)
    else:
        found = _lines(_text(data))
    if not found:
        raise DataError(f"The data file {path} holds no records: one JSON object a line is expected.")
    return found


def normalise(record: Any) -> TrainingRecord:
    """Raises ValueError with the reason when the record is of no known form."""
    if not isinstance(record, dict):
        raise ValueError("a record must be a JSON object")
    record = {key: value for key, value in record.items() if value is not None}  # Parquet has every column in each
    task = record.get("task", "all")
    if not isinstance(task, str):
        raise ValueError("'task' must be a string")
    check_whole(task)
    for key in ("messages", "conversations"):
        if key in record:
            return TrainingRecord(task, _others(record, key), messages=_messages(record[key], key))
    if "instruction" in record:
        given = record.get("input") or ""
        question = f"{_string(record, 'instruction')}\n\n{_string(record, 'input')}" if given else None
        asked = {"role": "user", "content": question or _string(record, "instruction")}
        answer = {"role": "assistant", "content": _string(record, "output")}
        return TrainingRecord(task, _others(record, "instruction", "input", "output"), messages=(asked, answer))
    if "prompt" in record or "completion" in record:
        prompt, completion = _string(record, "prompt"), _string(record, "completion")
        return TrainingRecord(task, _others(record, "prompt", "completion"), prompt=prompt, completion=completion)
    if "text" in record:
        return TrainingRecord(task, _others(record, "text"), text=_string(record, "text"))
    raise ValueError(f"it has no form that is known: {FORMS}")


def check_whole(text: str) -> None:
    """Raises ValueError for half a surrogate pair."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("a text holds half a surrogate pair: a character was cut in two where the file was written")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"line {line}: not UTF-8. Save the file as UTF-8; nothing was trained.") from error


def _lines(text: str) -> list[tuple[str, Any]]:
    """A JSON array's records, or the lines, which are read one by one so that a bad one does not hide the others."""
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # else its lines, which are no records, say so
            return [(f"record {i}", record) for i, record in enumerate(json.loads(text), 1)]
    return [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parquet(path: Path) -> list[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow. Nothing was trained.") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"The data file {path} cannot be read as Parquet; nothing was trained.") from error
    return [(f"record {i}", row) for i, row in enumerate(rows, 1)]


def _string(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key!r} must be a non-empty string")
    check_whole(value)
    return value


def _others(record: dict[str, Any], *used: str) -> frozenset[str]:
    return frozenset(record) - {*used, "task"}


def _messages(messages: Any, key: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{key!r} must be a list of at least two messages")
    found = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} must be an object")
        if message.get("tool_calls") or message.get("role") == "tool":
            raise ValueError(f"message {i} is of a tool call, which cannot be learnt here")
        role, content = (
            message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {i} must be an object with 'role' and 'content'; a role other than "
                             f"{', '.join(ROLES)} is not known")  # fmt: skip
        if not isinstance(content, str) or not content:
            raise ValueError(f"message {i} must be an object with a non-empty string as 'content'")
        check_whole(content)
        found.append({"role": ROLES[role], "content": content})
    if found[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what is learnt")
    return tuple(found)
