"""Files in a multipart body, written as they arrive. python-multipart takes it apart, as in starlette, whose own form
parser would keep them in the system's temporary folder first."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tucka_runtime.errors import InvalidRequestError


def boundary_of(content_type: str) -> bytes | None:
    """What parts the parts of a body of this type; None where it is no multipart/form-data. Raises InvalidRequestError
    where it names none."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return None
    if not 0 < len(options.get(b"boundary", b"")) <= 70:
        raise InvalidRequestError("The Content-Type has no `boundary` of 1 to 70 characters. Let the client write it.")
    return options[b"boundary"]


class MultipartFiles(AbstractContextManager["MultipartFiles"]):
    """Writes the parts of a body into `folder`, under their own names: the part's `filename`, else its `name`, which
    must be one of `limits`, each at most once and with so many bytes.

    `feed` and `finish` raise InvalidRequestError for the body, and OSError.
    """

    def __init__(self, boundary: bytes, folder: Path, limits: Mapping[str, int]):
        self._folder = folder
        self._limits = limits
        self._left = dict(limits)
        self._seen: set[str] = set()
        self._name = ""
        self._file: BinaryIO | None = None
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": self._write,
                "on_part_end": self._close,
                "on_end": self._end,
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def feed(self, data: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise InvalidRequestError(
                "The body is not what its Content-Type says: its parts cannot be told apart. Let the client write both."
            ) from None

    def finish(self) -> None:
        """The body is over."""
        if not self._ended:
            raise InvalidRequestError("The body ends before its last part does. Send all of it.")

    def _begin(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = (options.get(b"filename") or options.get(b"name") or b"").decode("ascii", "replace")
        if name not in self._limits:
            raise InvalidRequestError(
                f"A part of the body is none of the files of an adapter. Send {', '.join(self._limits)} by these names."
            )
        if name in self._seen:
            raise InvalidRequestError(f"The body has {name} twice. Send every file once.")
        self._seen.add(name)
        self._name = name
        self._file = (self._folder / name).open("xb")

    def _write(self, data: bytes, start: int, end: int) -> None:
        self._left[self._name] -= end - start
        if self._left[self._name] < 0:
            raise InvalidRequestError(f"The part {self._name} is larger than {self._limits[self._name]} bytes.")
        assert self._file is not None
        self._file.write(memoryview(data)[start:end])

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end(self) -> None:
        self._ended = True
