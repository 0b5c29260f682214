"""The grammars that answers were held to last: a client sends the same schema with every request."""

import asyncio
from collections.abc import Callable

MOST = 256
MOST_CHARS = 2**16  # of a grammar that is kept: with the texts that they were made of all take 20 MiB at most

Make = Callable[[str], str]


class GrammarCache:
    """Grammars by what they were made of, the one that was asked for last at the end. To make and check one takes 0.1
    to 2 ms, a hostile one 0.2 s."""

    def __init__(self) -> None:
        self._made: dict[tuple[Make, str], str] = {}

    async def get(self, make: Make, text: str) -> str:
        """What `make` makes of a text, in a thread: others are served meanwhile. Raises what it raises."""
        key = make, text
        made = self._made.pop(key, None)
        if made is None:
            made = await asyncio.to_thread(make, text)
        if len(made) <= MOST_CHARS:
            self._made[key] = made
        if len(self._made) > MOST:
            del self._made[next(iter(self._made))]
        return made
