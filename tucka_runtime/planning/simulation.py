"""One fleet under one policy: discrete events, the same ones for the same arrivals."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count

import numpy as np

from tucka_runtime.planning.arrivals import Arrivals
from tucka_runtime.planning.policies import POLICIES
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.replica import PaperReplica, ReplicaSettings, Times
from tucka_runtime.planning.slots import Event


@dataclass(frozen=True)
class Limit:
    """An SLO: of 100 first tokens `percentile` are there within so many seconds."""

    seconds: float
    percentile: float


@dataclass(frozen=True)
class FleetFigures:
    """What came of a fleet, over the requests that count: those behind the warm-up. Seconds; `hit_rate` is the share of
    requests that found their adapter in a slot (None without adapters), `busy` the share of time in which replicas
    computed, the mean and the most of one. Throughput is that of the whole run."""

    policy: str
    replicas: int
    requests: int
    hit_rate: float | None
    first_token: dict[float, float]
    output_tokens_per_second: float
    requests_per_second: float
    busy: float
    most_busy: float


class Simulation:
    """Runs once. `first` and `last` have each request's seconds from the start of the run to its first and its last
    token; NaN before."""

    def __init__(
        self, arrivals: Arrivals, replicas: int, policy: str, settings: ReplicaSettings, profile: Profile
    ) -> None:
        self._arrivals, self._request_seconds = arrivals, profile.request
        self._policy = POLICIES[policy](replicas, arrivals.names)
        self.policy = policy
        times = Times(profile, settings)
        self._events: list[tuple[float, int, int, Event]] = []
        self._order = count()  # events at the same time happen in the order in which they were asked for
        self.replicas = [
            PaperReplica(arrivals, settings, times, partial(self._later, i), self._first, partial(self._last, i))
            for i in range(replicas)
        ]
        for i, replica in enumerate(self.replicas):
            machine = i - i % profile.servers
            replica.neighbours = [
                other for other in self.replicas[machine : machine + profile.servers] if other is not replica
            ]
        self.first = [float("nan")] * len(arrivals)
        self.last = [float("nan")] * len(arrivals)
        self.finished = 0
        self._late = self._skip = 0
        self._limit = float("inf")
        self._before = (0, 0)

    def run(self, note: Callable[[int], object] | None = None, limit: Limit | None = None, skip: int = 0) -> bool:
        """Until every request is answered; `note` is told of so many more that are. With a `limit` it ends as soon as
        that cannot be kept by the requests from number `skip` on: False."""
        total = len(self._arrivals)
        # Of ten at 90% one may, where float arithmetic has 0.9999999999999998.
        most_late = (100 - limit.percentile) * (total - skip) / 100 + 1e-9 if limit else total
        self._limit, self._skip = limit.seconds if limit else float("inf"), skip
        at, adapter = self._arrivals.at, self._arrivals.adapter
        coming, noted = 0, 0
        while coming < total or self._events:
            if coming < total and (not self._events or at[coming] <= self._events[0][0]):
                if coming == skip:
                    self._before = self._looked_up()
                self.replicas[self._policy.route(adapter[coming])].arrive(coming, at[coming])
                coming += 1
                continue
            now, _, replica, event = heappop(self._events)
            self.replicas[replica].happen(event, now)
            if note is not None and self.finished - noted >= 1000:
                note(self.finished - noted)
                noted = self.finished
            if self._late > most_late:
                return False
        if note is not None:
            note(self.finished - noted)
        return True

    def figures(self, percentiles: tuple[float, ...]) -> FleetFigures:
        """Of a run that came to its end."""
        arrivals = self._arrivals
        waits = np.asarray(self.first[self._skip :]) - np.asarray(arrivals.at[self._skip :])
        lookups, hits = (now - then for now, then in zip(self._looked_up(), self._before, strict=True))
        seconds = max(self.last)
        busy = [replica.busy / seconds for replica in self.replicas]
        return FleetFigures(
            policy=self.policy,
            replicas=len(self.replicas),
            requests=len(waits),
            hit_rate=hits / lookups if lookups else None,
            first_token={p: float(np.percentile(waits, p)) for p in percentiles},
            output_tokens_per_second=sum(arrivals.output) / seconds,
            requests_per_second=len(arrivals) / seconds,
            busy=sum(busy) / len(busy),
            most_busy=max(busy),
        )

    def _looked_up(self) -> tuple[int, int]:
        slots = [replica.slots for replica in self.replicas]
        return sum(some.lookups for some in slots), sum(some.hits for some in slots)

    def _later(self, replica: int, when: float, event: Event) -> None:
        heappush(self._events, (when, next(self._order), replica, event))

    def _first(self, request: int, now: float) -> None:
        self.first[request] = now + self._request_seconds
        if request >= self._skip and self.first[request] - self._arrivals.at[request] > self._limit:
            self._late += 1

    def _last(self, replica: int, request: int, now: float) -> None:
        self.last[request] = now + self._request_seconds
        self.finished += 1
        self._policy.ended(replica)
