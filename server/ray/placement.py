"""Which replicas a request may go to, the best first: an adapter's own, as long as they have room."""

from collections.abc import Sequence
from functools import lru_cache

from tucka_runtime.affinity import Ring, bound


def ranks(adapter: str, places: Sequence[str], ongoing: Sequence[int], copies: int, spill_at: int) -> list[list[int]]:
    """Positions in `places`, in ranks: within a rank the least loaded is taken, and the next rank if all of it is full.

    `places` are what tells the replicas apart, `ongoing` their requests. An adapter is at home in `copies` of them.
    Where no adapter is named, for the base, all are alike. Below `spill_at` requests no replica is too loaded.
    """
    everybody = list(range(len(places)))
    if not adapter or not places:
        return [rank for rank in (everybody,) if rank]
    most = bound(sum(ongoing), len(places), spill_at)
    order = list(_ring(tuple(places)).order(adapter))
    homes = [at for at in order[:copies] if ongoing[at] < most]
    others = [[at] for at in order[copies:] if ongoing[at] < most]
    return [rank for rank in (homes, *others, everybody) if rank]


@lru_cache(maxsize=4)
def _ring(places: tuple[str, ...]) -> Ring:
    """Its own for every order in which the replicas are given: there is one until a replica comes or goes."""
    return Ring(places)
