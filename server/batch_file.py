"""A batch's two files: OpenAI's lines of requests, and the lines of answers, which say by themselves what is done.

An answer's `id` is `batch_req_<line of IN>_<beginning of the line's SHA-256>`. So a run that was killed is gone on with
from its output alone, and an output that belongs to another input is found out.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError, InvalidRequestError
from tucka_runtime.server.http.answers import encode_json
from tucka_runtime.server.http.body import parse_json

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Item:
    """One line of the input: a request, or what is wrong with the line (`code`, `message`)."""

    id: str
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    code: str | None = None
    message: str | None = None


def read_items(path: Path) -> Iterator[Item]:
    """The lines that are not empty, whatever ends them. Raises ConfigError where the file cannot be read."""
    first: dict[str, int] = {}  # line of each custom_id
    _check_regular(path)
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = (raw.removeprefix(BOM) if number == 1 else raw).strip()
                if line:
                    yield _item(line, number, first)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _check_regular(path: Path) -> None:
    """Both files are read more than once; a device may never end."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file.")


def _item(line: bytes, number: int, first: dict[str, int]) -> Item:
    id = f"batch_req_{number}_{hashlib.sha256(line).hexdigest()[:16]}"
    try:
        value = parse_json(line)
    except InvalidRequestError as error:
        return Item(id, None, code="invalid_json_line", message=f"Line {number} cannot be read. {error.message}")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        message = f"Line {number}: `custom_id` must be a string that is not empty."
        return Item(id, None, code="missing_custom_id", message=message)
    code, message = _fault(value)
    if first.setdefault(custom_id, number) != number:
        code, message = "duplicate_custom_id", f"line {first[custom_id]} has the same `custom_id`. Give each its own."
    if code is not None:
        return Item(id, custom_id, code=code, message=f"Line {number}: {message}")
    return Item(id, custom_id, value["url"], encode_json(value["body"]))


def _fault(value: dict[str, Any]) -> tuple[str | None, str]:
    """What is wrong with a request as such. Its body is the route's affair."""
    if value.get("method", "POST") != "POST":
        return "invalid_method", "`method` must be POST."
    if value.get("url") not in URLS:
        return "invalid_url", f"`url` must be one of {', '.join(URLS)}."
    if not isinstance(value.get("body"), dict):
        return "invalid_body", "`body` must be an object: what is sent to the route."
    if value["body"].get("stream"):
        return "invalid_body", "`stream`: a file has no streams. Leave it out."
    return None, ""


class AnswerFile:
    """The file of answers. A line is there whole or not at all: what a killed run left of its last one is cut off.

    Raises ConfigError for a file that cannot be written, that another run is writing, or that this command has not.
    """

    def __init__(self, path: Path):
        self._path = path
        _check_regular(path)
        try:
            self._file: BufferedRandom = path.open("r+b" if path.exists() else "w+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path} is being written by another run.") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
        self.done = self._read()

    def _read(self) -> set[str]:
        """The ids of the answers that are there; leaves the file at the end of the last one."""
        done, end = set(), 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                id = json.loads(line)["id"]
                if not id.startswith("batch_req_"):
                    raise ValueError(id)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(
                    f"{self._path}: line {number} is not one that this command writes. Give another file, or remove it."
                ) from None
            done.add(id)
            end += len(line)
        self._file.seek(end)
        self._file.truncate()
        return done

    def write(self, answer: dict[str, Any]) -> None:
        """Raises ConfigError where the disk refuses."""
        try:
            self._file.write(encode_json(answer) + b"\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"{self._path} cannot be written: {error.strerror}. The same command goes on where this one ended."
            ) from None

    def close(self) -> None:
        """Every answer has been written by now, or its failure said: what a full disk left of one is dropped."""
        with contextlib.suppress(OSError):
            self._file.close()


def answer(item: Item, response: dict[str, Any] | None) -> dict[str, Any]:
    """A line of the output. What the server refused is a response too; `error` is for lines that never came there."""
    error = None if item.code is None else {"code": item.code, "message": item.message}
    return {"id": item.id, "custom_id": item.custom_id, "response": response, "error": error}
