"""How long a new request will wait, by how fast the queue has moved; and who has waited longest. No torch."""

import math
import time
from collections import Counter
from collections.abc import Iterable

from tucka_runtime.engine.output_stream import OutputStream
from tucka_runtime.errors import OverloadedError
from tucka_runtime.messages import FlowKey, Request

HALF_LIFE = 20.0
"""Seconds after which what was measured counts half."""


class QueueWait:
    """Learns how often a running sequence ends while others wait for its seat.

    Time in which nobody waits tells nothing and does not count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.ended = 0.0
        self._waiting = False
        self._noted = 0.0

    def note(self, now: float, ended: int, waiting: int) -> None:
        """Takes a step's outcome at `now`: how many sequences it ended, and how many wait after it."""
        if self._waiting:
            fade = 0.5 ** ((now - self._noted) / HALF_LIFE)
            self.seconds = self.seconds * fade + now - self._noted
            self.ended = self.ended * fade + ended
        self._waiting, self._noted = waiting > 0, now

    def expected(self, ahead: int, flows: int = 1) -> float:
        """Seconds until `ahead` waiting sequences of a flow have got seats, which `flows` flows take in turns.

        0 while nobody waits. Before the first end it grows with the time that none came: one is taken to be about to.
        """
        return ahead * flows * self.seconds / (self.ended + 1) if self._waiting else 0.0

    def check(self, request: Request, streams: Iterable[OutputStream], limit: int) -> None:
        """Raises OverloadedError if a request would wait for more than `limit` seconds behind what waits of its own
        flow, which takes turns with the others that wait. One whose flow has nothing waiting is never refused."""
        ahead: Counter[FlowKey] = Counter({request.flow: 0})
        for stream in streams:
            if stream.waiting:
                ahead[stream.flow] += stream.waiting
        wait = self.expected(ahead[request.flow], len(ahead))
        if wait > limit:
            raise OverloadedError(
                f"What waits for this model already takes some {wait:.0f} s, and requests may wait {limit} s here "
                "(--max-queue-seconds). Try again later.",
                retry_after=math.ceil(wait - limit),
            )


def oldest(streams: Iterable[OutputStream]) -> dict[str | None, float]:
    """By adapter's name, None for the base, the seconds since its oldest request came of which not every sequence has
    had an output."""
    now = time.monotonic()
    found: dict[str | None, float] = {}
    for stream in streams:
        if stream.waiting:
            _, adapter = stream.flow
            found[adapter] = max(now - stream.submitted, found.get(adapter, 0.0))
    return found
