"""Records as people have them: read from JSONL, a JSON array, Parquet or a folder that `datasets` saved, and brought
into one of three forms."""

import gzip
import hashlib
import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tucka_runtime.conversations import Message
from tucka_runtime.errors import TuckaError
from tucka_runtime.extras import how_to_install
from tucka_runtime.trainer.chat_records import check_whole, messages_of, tools_of

FORMS = "prompt and completion, messages, conversations (ShareGPT), instruction and output (Alpaca), or text"


class DataError(TuckaError):
    """The training data cannot be used; the message lists line numbers and reasons."""


@dataclass(frozen=True)
class TrainingRecord:
    """One of: a text, a prompt with its completion, or a conversation that ends with the assistant. `ignored` are the
    keys that nothing was made of; `learnt` says of each message whether it is; `tools` are what templates know as such.
    """

    task: str
    ignored: frozenset[str]
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    learnt: tuple[bool, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class DataFile:
    """A file's rows, each with where it stands, as a record or as its JSON text; and the digest of what was read."""

    name: str
    sha256: str
    rows: list[tuple[str, Any]]


def read(path: Path) -> DataFile:
    """A file: gzipped or not, with a byte order mark or not, lines ending in either way, blank ones skipped; or a
    folder that `datasets` saved. It is read once, as a pipe can be. Raises DataError for what cannot be read, and for
    no records."""
    data = _bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if path.is_dir():
        rows = _folder(path)
    else:
        data = _unpacked(path, data)
        rows = _parquet(path, data) if data.startswith(b"PAR1") else _lines(_text(path, data))
    if not rows:
        raise DataError(f"The data file {path} holds no records: one JSON object a line is expected.")
    return DataFile(path.name, sha256, rows)


def digest(path: Path) -> str:
    """The SHA-256 that `read` gives. Raises DataError."""
    return hashlib.sha256(_bytes(path)).hexdigest()


def _bytes(path: Path) -> bytes:
    """What is in the file, or in the folder's files."""
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise DataError(f"The data file {path} cannot be read: {error.strerror}.") from error


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"The data file {path} cannot be read: it is not whole gzip data.") from error


def normalise(record: Any) -> TrainingRecord:
    """Raises ValueError with the reason when the record is of no known form."""
    if not isinstance(record, dict):
        raise ValueError("a record must be a JSON object")
    record = {key: value for key, value in record.items() if value is not None}
    task = record.get("task", "all")
    if not isinstance(task, str):
        raise ValueError("'task' must be a string")
    check_whole(task)
    for key in ("messages", "conversations"):
        if key in record:
            return _conversation(record, key, record[key], task)
    if "instruction" in record and "completion" not in record:
        return _alpaca(record, task)
    if "chosen" in record and "rejected" in record and "completion" not in record:
        raise ValueError("it is a preference pair (chosen and rejected), of which --objective dpo learns")
    if isinstance(record.get("prompt"), list):
        return _continued(record, task)
    if "prompt" in record or "completion" in record:
        prompt, completion = _string(record, "prompt"), _string(record, "completion")
        return TrainingRecord(task, _others(record, "prompt", "completion"), prompt=prompt, completion=completion)
    if "text" in record:
        return TrainingRecord(task, _others(record, "text"), text=_string(record, "text"))
    raise ValueError(f"it has no form that is known: {FORMS}")


def _conversation(record: dict[str, Any], key: str, value: Any, task: str) -> TrainingRecord:
    """Messages with what stands beside them: a system message, and functions that may be called."""
    messages, learnt, ignored = messages_of(value, key)
    if record.get("system"):
        messages = ({"role": "system", "content": _string(record, "system")}, *messages)
        learnt = (False, *learnt)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what is learnt")
    if not any(learnt):
        raise ValueError(f"{key!r} has no message of the assistant behind another one that could be learnt")
    tools = tools_of(record.get("tools") or [])
    return TrainingRecord(
        task, _others(record, key, "system", "tools") | ignored, messages=messages, learnt=learnt, tools=tools
    )


def _alpaca(record: dict[str, Any], task: str) -> TrainingRecord:
    """An instruction, with what came before it: a system message and `history`, pairs of questions and answers."""
    given = record.get("input") or ""
    question = f"{_string(record, 'instruction')}\n\n{_string(record, 'input')}" if given else None
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("'history' must be a list of pairs: what was asked and answered")
    pairs = [*pairs, [question or _string(record, "instruction"), _string(record, "output")]]
    talk = [m for asked, said in pairs for m in (("user", asked), ("assistant", said))]
    messages = [{"role": role, "content": content} for role, content in talk]
    rest = {name: value for name, value in record.items() if name not in ("instruction", "input", "output", "history")}
    return _conversation(rest | {"messages": messages}, "messages", messages, task)


def _continued(record: dict[str, Any], task: str) -> TrainingRecord:
    """TRL's form: a conversation as prompt, and messages that go on it, of which alone is learnt."""
    if not isinstance(record.get("completion"), list):
        raise ValueError("'completion' must be a list of messages, as 'prompt' is one")
    before = [m | {"weight": 0} if isinstance(m, dict) else m for m in record["prompt"]]
    rest = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
    return _conversation(rest | {"messages": ()}, "messages", before + record["completion"], task)


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8. Save the file as UTF-8; nothing was trained.") from error


def _lines(text: str) -> list[tuple[str, Any]]:
    """A JSON array's records, or the lines, which are read one by one so that a bad one does not hide the others."""
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # else its lines, which are no records, say so
            return [(f"record {i}", record) for i, record in enumerate(json.loads(text), 1)]
    return [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parquet(path: Path, data: bytes) -> list[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(_needs(path, "Parquet", "pyarrow")) from error
    try:
        rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError for a text that is not UTF-8
        raise DataError(f"The data file {path} cannot be read as Parquet; nothing was trained.") from error
    return [(f"record {i}", _filled(row)) for i, row in enumerate(rows, 1)]


def _folder(path: Path) -> list[tuple[str, Any]]:
    """The rows of a dataset that `save_to_disk` wrote, of several splits those of `train`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(_needs(path, "a folder", "datasets")) from error
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            f"The data folder {path} cannot be read: it holds no dataset that datasets' save_to_disk wrote. Name the "
            "file itself (JSONL, Parquet); nothing was trained."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(f"{path} has no split train. Name one: {path}/SPLIT, of {', '.join(map(str, found))}.")
        found = found["train"]
    return [(f"record {i}", _filled(row)) for i, row in enumerate(found, 1)]


def _needs(path: Path, what: str, module: str) -> str:
    return f"{path} is {what}, which needs {module}: {how_to_install('data')}. Nothing was trained."


def _filled(value: Any) -> Any:
    """Without what is null: in tables every object has the keys of all."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _string(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key!r} must be a non-empty string")
    check_whole(value)
    return value


def _others(record: dict[str, Any], *used: str) -> frozenset[str]:
    return frozenset(record) - {*used, "task"}
