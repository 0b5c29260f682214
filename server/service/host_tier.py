"""What the engine's host cache holds, and what has to leave it."""

from collections import OrderedDict
from collections.abc import Iterator

from tucka_runtime.messages import AdapterKey


class HostTier:
    """Adapters without a slot by the order in which they leave, with the bytes of each; at most `limit` in all."""

    def __init__(self, limit: int):
        self._limit = limit
        self._bytes: OrderedDict[AdapterKey, int] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._bytes

    def __iter__(self) -> Iterator[AdapterKey]:
        return iter(self._bytes)

    def size(self, key: AdapterKey) -> int:
        """The bytes of one that is here."""
        return self._bytes[key]

    def put(self, key: AdapterKey, size: int, used: bool = True) -> None:
        """One more. It leaves last, or, where it was never `used`, first."""
        self._bytes[key] = size
        self._bytes.move_to_end(key, last=used)
        self.bytes += size

    def pop(self, key: AdapterKey) -> int | None:
        """Takes one out. Its bytes; None where it is not here."""
        size = self._bytes.pop(key, None)
        self.bytes -= size or 0
        return size

    def surplus(self) -> AdapterKey | None:
        """The next to leave, while they are more than the limit."""
        return self.first() if self.bytes > self._limit else None

    def first(self) -> AdapterKey | None:
        """The next to leave."""
        return next(iter(self._bytes), None)

    def clear(self) -> None:
        self._bytes.clear()
        self.bytes = 0
