"""Which replica gets a request: four policies that routers have, on paper and in front of real servers alike.

A policy knows what a router knows without asking: the adapters' names, and how many of the requests that it sent are
still on their way.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

from tucka_runtime.affinity import Ring, bound


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
    """Every adapter has one replica, however much that has to do."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        super().__init__(replicas, names)
        self._ring = Ring([str(replica) for replica in range(replicas)])

    def _choose(self, adapter: int) -> int:
        return self._ring.home(self.names[adapter] if adapter >= 0 else "")


class Affinity(ConsistentHash):
    """The same, but what would overload a replica spills over to the next, as `tucka serve --ray` does it by default. A
    hot adapter gets as many replicas as it needs, always the same ones first. The base's requests go to the least
    loaded, of several to each in turn."""

    def __init__(self, replicas: int, names: Sequence[str]) -> None:
        super().__init__(replicas, names)
        self._total = 0
        self._last = -1  # that a request of the base went to

    def route(self, adapter: int) -> int:
        replica = super().route(adapter)
        self._total += 1
        return replica

    def ended(self, replica: int) -> None:
        super().ended(replica)
        self._total -= 1

    def _choose(self, adapter: int) -> int:
        if adapter < 0:
            others = len(self.load) - self._last - 1
            self._last = min(range(len(self.load)), key=lambda at: (self.load[at], (at + others) % len(self.load)))
            return self._last
        most = bound(self._total, len(self.load))
        return next(replica for replica in self._ring.order(self.names[adapter]) if self.load[replica] < most)


POLICIES: dict[str, type[Policy]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "consistent-hash": ConsistentHash,
    "affinity": Affinity,
}
