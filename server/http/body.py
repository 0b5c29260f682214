"""A request's body as strict JSON: limited while it is read, and nothing in it that would bite later."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from math import isinf
from typing import Any

from starlette.requests import ClientDisconnect, Request

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.http.errors import BodyTooLargeError, UnsupportedMediaTypeError

MAX_DEPTH = 64
MAX_ITEMS = 1_000_000  # by commas and opening brackets, those within strings included
MAX_DIGITS = 20  # of an integer: 2^64 has 20
_TOO_LONG = 10**MAX_DIGITS
_LONG = 16  # items of a list that are looked at together where they are all integers
_PARSE_ASIDE_BYTES = 64 * 2**10  # larger bodies are parsed off the event loop
_GZIP = b"\x1f\x8b"


async def read(request: Request, limit: int) -> None:
    """Leaves the body in `state.body`. Every request but an upload is read to its end before anything is done: what
    turns out malformed or cut off there has done nothing.

    Raises InvalidRequestError, BodyTooLargeError, UnsupportedMediaTypeError, ClientDisconnect.
    """
    _check_encoding(request)
    request.state.body = await _read(request, limit)


def pieces(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives, for what is too large to be read whole first: where it ends is known when it has ended.

    Raises UnsupportedMediaTypeError, and, as it is iterated, InvalidRequestError, ClientDisconnect.
    """
    _check_encoding(request)
    return _chunks(request)


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a body that has been read. Raises InvalidRequestError, UnsupportedMediaTypeError."""
    raw: bytearray = request.state.body
    if len(raw) <= _PARSE_ASIDE_BYTES:
        return parse_json(raw)
    return await asyncio.to_thread(parse_json, raw)


def parse_json(raw: bytes | bytearray) -> dict[str, Any]:
    """Strict: no duplicate keys, no NaN or Infinity, no lone surrogates, limited depth, digits and items."""
    if not raw:
        raise InvalidRequestError("The body is empty. Send a JSON object.")
    if raw.startswith(_GZIP):
        raise _compressed()
    if raw.count(b",") + raw.count(b"[") > MAX_ITEMS:
        raise InvalidRequestError(
            f"The body has more than {MAX_ITEMS} commas and brackets, too many to be read. Send fewer or shorter lists."
        )
    try:
        text = raw.decode("utf-8-sig")  # a byte order mark says nothing, but some editors and shells write one
    except UnicodeDecodeError:
        raise InvalidRequestError("The body is not valid UTF-8. Encode the JSON as UTF-8.") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    except ValueError:  # Python's own limit of an integer's digits
        raise _too_many_digits() from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    _check(value)
    return value


def _check_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _compressed()


async def _read(request: Request, limit: int) -> bytearray:
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limit and "expect" in request.headers:
        raise _too_large(limit)
    body = bytearray()
    total = 0
    async for chunk in _chunks(request):
        total += len(chunk)
        if total <= limit:
            body += chunk
        elif total > 2 * limit:
            raise _too_large(limit)
        else:
            # Dropped but read on: a client that is still sending would see a reset instead of the answer.
            body.clear()
    if total > limit:
        raise _too_large(limit)
    return body


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """Raises InvalidRequestError for what the connection finds malformed or cut off, ClientDisconnect."""
    more = True
    while more:
        message = await request.receive()
        if fault := request.scope["state"].get("fault"):  # the connection's: what came is malformed, or stopped coming
            raise fault
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _check(root: Any) -> None:
    """Refuses depth beyond MAX_DEPTH, strings that are not Unicode text and numbers that are too large. The parser
    could be told to hand over every number, which takes ten times as long as to parse it."""
    level = [root]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for container in level:
            if isinstance(container, dict):
                for key in container:
                    if not key.isascii():
                        _check_string(key)
                items: Collection[Any] = container.values()
            else:
                items = container
            if len(items) >= _LONG and set(map(type, items)) == {int}:  # token ids
                _check_integer(max(items))
                _check_integer(min(items))
            else:
                _check_items(items, deeper)
        level = deeper
        if not level:
            return
    raise _too_deep()


def _check_items(items: Collection[Any], deeper: list[Any]) -> None:
    """Notes the containers among them in `deeper`."""
    for item in items:
        kind = type(item)
        if kind is str:
            if not item.isascii():
                _check_string(item)
        elif kind is dict or kind is list:
            deeper.append(item)
        elif kind is int:
            _check_integer(item)
        elif kind is float and isinf(item):
            raise InvalidRequestError("A number is too large for a 64-bit float.")


def _check_string(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "A string holds a lone surrogate (\\ud800 to \\udfff), which is not a character. Send whole pairs."
        ) from None


def _check_integer(value: int) -> None:
    if not -_TOO_LONG < value < _TOO_LONG:
        raise _too_many_digits()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidRequestError("An object names the same key twice. Send every key once.")
    return value


def _refuse_constant(name: str) -> None:
    raise InvalidRequestError("NaN and Infinity are not JSON. Send finite numbers.")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _too_many_digits() -> InvalidRequestError:
    return InvalidRequestError(f"An integer has more than {MAX_DIGITS} digits.")


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"The JSON is nested deeper than {MAX_DEPTH} levels.")


def _compressed() -> UnsupportedMediaTypeError:
    return UnsupportedMediaTypeError("The body is compressed. Send it as it is, without Content-Encoding.")


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit} bytes, which is this server's --max-body-bytes.")
