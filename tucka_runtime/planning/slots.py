"""Adapter slots and the host cache of one replica on paper, by the rules of the server's `Residency`."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from enum import IntEnum
from itertools import islice

from tucka_runtime.planning.arrivals import BASE

TURN_SECONDS = 1.0
"""As server/service/residency.py has it: while all slots are held, one adapter in so many seconds gives way."""


class Event(IntEnum):
    """What a replica waits for."""

    STEP = 0
    LOADED = 1
    TURN = 2


Later = Callable[[float, Event], None]
"""Has an event happen at a time."""

LoadSeconds = Callable[[bool], float]
"""What a load takes that begins now: from the host cache, or else from the disk."""


class Slots:
    """Who has a slot, who is on the way into one, and which requests wait for that. Each method returns the requests
    that have their slot now, and hold it until `leave`.

    Loads are one after the other: the engine has one thread for them. One that is `done` waits for the engine's step
    loop, which seats it: `loaded`.
    """

    def __init__(self, size: int, host: int, seconds: LoadSeconds, later: Later) -> None:
        """`host`: adapters that the host cache has room for."""
        self._size, self._host_size = size, host
        self._seconds, self._later = seconds, later
        self._resident: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._since: dict[int, None] = {}  # the same in the order in which they came
        self._giving_way: set[int] = set()
        self._held: Counter[int] = Counter()
        self._host: OrderedDict[int, None] = OrderedDict()
        self._coming: dict[int, list[int]] = {}  # requests that wait, by adapter
        self._queue: deque[int] = deque()  # of those coming, the ones without a slot
        self._loading: deque[tuple[int, bool]] = deque()  # those with one, and whether they were in the host cache
        self._done: deque[int] = deque()
        self._turn_due = False
        self.lookups = self.hits = 0

    def want(self, adapter: int, request: int, now: float) -> list[int]:
        """A request has come."""
        if adapter == BASE:
            return [request]
        self.lookups += 1
        if adapter in self._resident:
            self.hits += 1
            if adapter not in self._giving_way:
                self._take(adapter, 1)
                return [request]
        if adapter not in self._coming:
            self._coming[adapter] = []
            self._queue.append(adapter)
        self._coming[adapter].append(request)
        return self._assign(now)

    def leave(self, adapter: int, now: float) -> list[int]:
        """A request that held its slot has ended."""
        if adapter == BASE:
            return []
        self._held[adapter] -= 1
        if not self._held[adapter]:
            del self._held[adapter]
        return self._assign(now) if self._queue else []

    @property
    def reading(self) -> bool:
        """Whether an adapter comes from the disk now."""
        return bool(self._loading) and not self._loading[0][1]

    def done(self, now: float) -> None:
        """The load that was under way has come to its end."""
        self._done.append(self._loading.popleft()[0])
        if self._loading:
            self._begin(now)

    def loaded(self, now: float) -> list[int]:
        """Whatever is done has its slot now."""
        ready: list[int] = []
        while self._done:
            adapter = self._done.popleft()
            self._resident[adapter] = self._since[adapter] = None
            ready += self._arrived(adapter) + self._assign(now)
        return ready

    def turn(self, now: float) -> list[int]:
        """One more adapter gives way: as soon as its requests end, its slot is another's."""
        self._turn_due = False
        if not self._queue:
            return []
        self._giving_way.update(islice((key for key in self._since if key not in self._giving_way), 1))
        return self._assign(now)

    def _take(self, adapter: int, requests: int) -> None:
        self._held[adapter] += requests
        self._resident.move_to_end(adapter)

    def _arrived(self, adapter: int) -> list[int]:
        requests = self._coming.pop(adapter)
        self._take(adapter, len(requests))
        return requests

    def _assign(self, now: float) -> list[int]:
        """Gives slots to those that wait, the first first."""
        ready: list[int] = []
        while self._queue:
            adapter = self._queue[0]
            if adapter in self._resident:  # it was to give way, and need not any more
                self._giving_way.discard(adapter)
                self._queue.popleft()
                ready += self._arrived(adapter)
            elif len(self._resident) + len(self._loading) + len(self._done) < self._size or self._make_room():
                self._queue.popleft()
                self._load(adapter, now)
            else:
                if not self._turn_due:
                    self._turn_due = True
                    self._later(now + TURN_SECONDS, Event.TURN)
                break
        return ready

    def _make_room(self) -> bool:
        """Evicts the adapter that was used least recently, of those that nobody holds; whether there is one."""
        victim = next((adapter for adapter in self._resident if adapter not in self._held), None)
        if victim is None:
            return False
        del self._resident[victim], self._since[victim]
        self._giving_way.discard(victim)
        self._host[victim] = None
        if len(self._host) > self._host_size:
            self._host.popitem(last=False)
        return True

    def _load(self, adapter: int, now: float) -> None:
        cached = adapter in self._host
        if cached:
            del self._host[adapter]
        self._loading.append((adapter, cached))
        if len(self._loading) == 1:
            self._begin(now)

    def _begin(self, now: float) -> None:
        self._later(now + self._seconds(self._loading[0][1]), Event.LOADED)
