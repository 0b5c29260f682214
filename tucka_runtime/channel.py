"""The channel between a process of ours and its child, the API's and the engine's or the engine's and its reader's: a
socket pair with channel_messages.py's messages on it, each as its length, its kind and its fields by name in msgpack.

Nobody else can write there, but the files may have changed since the parent read them (an upgrade under a running
server), and a child that is started then is another version's. So both ends say `PROTOCOL` first.
"""

import hashlib
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec

from tucka_runtime import __version__, channel_messages, errors, messages
from tucka_runtime.channel_messages import FromEngine, FromReader, Start, ToEngine, ToReader
from tucka_runtime.config import EngineConfig
from tucka_runtime.errors import TuckaError

Message = Start | ToEngine | FromEngine | ToReader | FromReader

READ_BYTES = 1 << 16  # at once; a step's message has some 200 bytes for each of its sequences
_HEAD = struct.Struct("!IB")  # the length of what follows, and the message's place in _KINDS
_KINDS = get_args(Message)


def _protocol() -> bytes:
    """The version, and a digest of what the messages and all that they hold are made of; as long for every version."""
    named = {**vars(messages), **vars(channel_messages)}
    layouts: list[Any] = [EngineConfig, *(found for found in named.values() if is_dataclass(found))]
    described = repr([(layout.__qualname__, [(f.name, str(f.type)) for f in fields(layout)]) for layout in layouts])
    return hashlib.sha256(f"{__version__} {described} {_KINDS}".encode()).digest()


PROTOCOL = _protocol()


def _plain(value: Any) -> Any:
    """What msgspec does not know, as what it does."""
    if isinstance(value, TuckaError):
        return type(value).__name__, value.message, value.param
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, array):
        return value.tobytes()
    raise NotImplementedError(f"a {type(value).__name__} cannot cross the channel")


def _typed(wanted: Any, value: Any) -> Any:
    """The way back."""
    if issubclass(wanted, TuckaError):
        name, message, param = value
        return getattr(errors, name)(message, param)
    return array("f", value) if wanted is array else wanted(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoders = [msgspec.msgpack.Decoder(kind, dec_hook=_typed) for kind in _KINDS]


class ChannelError(Exception):
    """What came is no message of ours."""


def frame(message: Message) -> bytearray:
    """A message as it goes through the socket."""
    framed = bytearray(_HEAD.size)
    _encoder.encode_into(message, framed, _HEAD.size)
    _HEAD.pack_into(framed, 0, len(framed) - _HEAD.size, _KINDS.index(type(message)))
    return framed


class Reader:
    """Makes messages of what comes through the socket. It begins with the other end's `PROTOCOL`."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._greeted = False

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are complete with this. Raises ChannelError; after that nothing more may be fed."""
        self._rest += data
        begin = 0
        try:
            if not self._greeted and len(self._rest) >= len(PROTOCOL):
                begin, self._greeted = len(PROTOCOL), True
                if self._rest[:begin] != PROTOCOL:
                    raise ChannelError("the other process was started from other files than this one")
            while self._greeted and len(self._rest) - begin >= _HEAD.size:
                length, kind = _HEAD.unpack_from(self._rest, begin)
                body, end = begin + _HEAD.size, begin + _HEAD.size + length
                if len(self._rest) < end:
                    break
                begin = end
                yield _decode(kind, self._rest[body:end])
        finally:
            del self._rest[:begin]


def _decode(kind: int, body: bytearray) -> Any:
    try:
        return _decoders[kind].decode(body)
    except (msgspec.DecodeError, IndexError) as error:
        raise ChannelError(f"a message cannot be read: {error}") from error


class Channel:
    """An end that waits for what it reads and for what it writes: with a timeout so long, else for ever. Belongs to one
    thread for each direction."""

    def __init__(self, descriptor: int):
        self._socket = socket.socket(fileno=descriptor)
        self._socket.sendall(PROTOCOL)
        self._messages = self._read()
        self._files: deque[int] = deque()

    def send(self, message: Message, file: int | None = None) -> None:
        """Sends a message, and an open file with it. Raises OSError when the other end is gone."""
        data = frame(message)
        sent = socket.send_fds(self._socket, [data], [file]) if file is not None else 0
        self._socket.sendall(memoryview(data)[sent:])

    def receive(self) -> Any:
        """The next message. Raises EOFError or OSError when the other end is gone, TimeoutError, ChannelError: after
        each of these the channel is of no more use."""
        return next(self._messages)

    def take_file(self) -> int:
        """The descriptor of the next file that came with a message: the caller's to close."""
        return self._files.popleft()

    def set_timeout(self, seconds: float) -> None:
        """How long each of the waits from now on may be."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Ends it, with the files that nobody took."""
        self._socket.close()
        while self._files:
            os.close(self._files.popleft())

    def _read(self) -> Iterator[Any]:
        reader = Reader()
        while True:
            data, files, _, _ = socket.recv_fds(self._socket, READ_BYTES, 1)
            self._files += files
            if not data:
                raise EOFError
            yield from reader.feed(data)
