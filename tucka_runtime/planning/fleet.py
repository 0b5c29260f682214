"""The smallest fleet that keeps an SLO."""

import math
from collections.abc import Callable

from tucka_runtime.planning.arrivals import Arrivals
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.replica import ReplicaSettings
from tucka_runtime.planning.simulation import Limit, Simulation

MOST = 10_000
"""Replicas of the largest fleet that is tried."""

Try = Callable[[int], bool]


def smallest(holds: Try, guess: int) -> int | None:
    """The least number of replicas that `holds`, if more are never worse; None if MOST do not. A number is tried once.

    From `guess` on they grow or shrink by half until one holds and one does not, then the gap is halved."""
    fails, good = 0, MOST + 1
    number = min(max(guess, 1), MOST)
    while good - fails > 1:
        if holds(number):
            good = number
        else:
            fails = number
        if good > MOST:
            number = min(math.ceil(number * 1.5), MOST)
        elif not fails:
            number = good // 2 or 1
        else:
            number = (fails + good) // 2
    return good if good <= MOST else None


def smallest_fleet(
    arrivals: Arrivals,
    policy: str,
    settings: ReplicaSettings,
    profile: Profile,
    limit: Limit,
    skip: int,
    guess: int,
    note: Callable[[int], object],
) -> int | None:
    """The fewest replicas with which the requests from number `skip` on keep the limit; None if MOST do not. `note` is
    told of so many more requests that are answered."""

    def holds(replicas: int) -> bool:
        return Simulation(arrivals, replicas, policy, settings, profile).run(note, limit, skip)

    return smallest(holds, guess)
