"""Which replica gets a request: four policies that routers have, on paper and in front of real servers alike.

A policy knows what a router knows without asking: the adapters' names, and how many of the requests that it sent are
still on their way.
"""

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from itertools import count

POINTS = 64
"""Places of a replica on the ring. Of 100 replicas the one with most of it then has 1.29 times the mean, of 1,000 1.41
times."""

SPILL = 1.25
"""How many times the mean load a replica may have before its adapters spill over."""

UNTROUBLED = 4
"""With fewer requests than this a replica never spills over: they share its steps, which costs less than a load. On
paper 20 replicas with 16 slots each, 1,000 adapters by Zipf's law and 100 requests a second, steps of 3 to 9 ms: 55% of
requests find their adapter in a slot with 1 here, 71% with 2, 76% with 4, 78% with 8, and the 99th percentile of first
tokens is 43 to 45 ms with all of them."""


class Policy(ABC):
    """Chooses for one fleet. `load` has each replica's requests on their way."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        self.load = [0] * replicas
        self.names = names

    def route(self, adapter: int) -> int:
        """The replica for one more request of an adapter (its position in `names`, -1 for the base), which counts as
        on its way until `ended`."""
        replica = self._choose(adapter)
        self.load[replica] += 1
        return replica

    def ended(self, replica: int) -> None:
        """A request of the replica is answered."""
        self.load[replica] -= 1

    @abstractmethod
    def _choose(self, adapter: int) -> int: ...


class RoundRobin(Policy):
    """One after the other."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        super().__init__(replicas, names)
        self._next = -1

    def _choose(self, adapter: int) -> int:
        self._next = (self._next + 1) % len(self.load)
        return self._next


class LeastLoaded(Policy):
    """The replica with the fewest requests on their way; of several the one that has had so few the longest."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        super().__init__(replicas, names)
        self._order = count()
        # (load, when it became so, replica). An entry is out of date unless `_current` has its second number.
        self._heap = [(0, next(self._order), replica) for replica in range(replicas)]
        self._current = [number for _, number, _ in self._heap]

    def route(self, adapter: int) -> int:
        replica = super().route(adapter)
        self._changed(replica)
        return replica

    def ended(self, replica: int) -> None:
        super().ended(replica)
        self._changed(replica)

    def _changed(self, replica: int) -> None:
        self._current[replica] = number = next(self._order)
        heappush(self._heap, (self.load[replica], number, replica))

    def _choose(self, adapter: int) -> int:
        while self._heap[0][1] != self._current[self._heap[0][2]]:
            heappop(self._heap)
        return self._heap[0][2]


class ConsistentHash(Policy):
    """Every adapter has one replica: the owner of the first point of a ring of hashes behind its own (Karger et al.,
    "Consistent Hashing and Random Trees", STOC 1997)."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        super().__init__(replicas, names)
        ring = sorted((_hash(f"{replica}/{point}"), replica) for replica in range(replicas) for point in range(POINTS))
        self._places = [place for place, _ in ring]
        self._owners = [replica for _, replica in ring]
        self._starts: dict[int, int] = {}

    def _start(self, adapter: int) -> int:
        """Where on the ring an adapter's own replica is."""
        start = self._starts.get(adapter)
        if start is None:
            name = self.names[adapter] if adapter >= 0 else ""
            start = self._starts[adapter] = bisect(self._places, _hash(name)) % len(self._places)
        return start

    def _choose(self, adapter: int) -> int:
        return self._owners[self._start(adapter)]


class Affinity(ConsistentHash):
    """The same, but what would overload a replica spills over to the next on the ring: consistent hashing with bounded
    loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018). A hot adapter gets as many replicas as it needs, always the
    same ones first."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        super().__init__(replicas, names)
        self._total = 0

    def route(self, adapter: int) -> int:
        replica = super().route(adapter)
        self._total += 1
        return replica

    def ended(self, replica: int) -> None:
        super().ended(replica)
        self._total -= 1

    def _choose(self, adapter: int) -> int:
        """Some replica is below the bound, which exceeds the mean: the walk ends."""
        bound = max(SPILL * (self._total + 1) / len(self.load), UNTROUBLED)
        owners, load = self._owners, self.load
        place = self._start(adapter)
        while load[owners[place]] >= bound:
            place = (place + 1) % len(owners)
        return owners[place]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


POLICIES: dict[str, type[Policy]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "consistent-hash": ConsistentHash,
    "affinity": Affinity,
}
