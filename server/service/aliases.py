"""Aliases: names for one of several adapters, and which of them a request gets.

Requests of one user, or of one key, get the same adapter for as long as it is among the targets. Each target draws from
a hash of alias, target and user a number that is exponentially distributed with the target's weight as its rate; the
smallest wins (weighted rendezvous hashing). So a target that comes, goes or gets another weight moves only the share of
users that this is about: from 10 to 20 of 100, ten of them, all to that target.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator

from tucka_runtime.names import Alias


class Aliases:
    """Aliases by name."""

    def __init__(self) -> None:
        self._aliases: dict[str, Alias] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._aliases

    def __iter__(self) -> Iterator[Alias]:
        return iter(self._aliases.values())

    def find(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def set(self, alias: Alias) -> None:
        """A new one, or one in place of its name's last."""
        self._aliases[alias.name] = alias

    def drop(self, name: str) -> None:
        self._aliases.pop(name, None)


def choose(alias: Alias, who: str | None, there: Callable[[str], bool]) -> str | None:
    """The target that answers `who`, or, where that is None, one at random: of those that are `there`; None without
    any."""
    sticky = secrets.token_hex(8) if who is None else who
    draws = [(_draw(alias.name, target, sticky) / weight, target) for target, weight in alias.targets if there(target)]
    return min(draws)[1] if draws else None


def _draw(alias: str, target: str, who: str) -> float:
    """Exponentially distributed over `who`, at a rate of 1: from 64 bits of BLAKE2b of the three, parted by zeros."""
    digest = hashlib.blake2b("\0".join((alias, target, who)).encode("utf-8", "replace"), digest_size=8).digest()
    return -math.log((int.from_bytes(digest) + 1) / (2**64 + 1))
