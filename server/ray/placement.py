"""Which replicas a request may go to, the best first: an adapter's own, as long as they have room.

Every router comes to the same without asking anybody: an adapter's replicas are the first of a rendezvous hash (Thaler
and Ravishankar, 1998), so that of n + 1 replicas a new one takes 1 / (n + 1) of the adapters, and no other moves. What
keeps a hot adapter from being pinned to one replica is a bound on every replica's load (consistent hashing with bounded
loads, Mirrokni, Thorup and Zadimoghaddam, 2018): one that has more than BOUND times its share of what is going on takes
no more, and the next in the adapter's own order does, so that it is always the same one that has it too.
"""

import hashlib
from collections.abc import Sequence

BOUND = 1.25


def ranks(adapter: str, places: Sequence[str], ongoing: Sequence[int], copies: int, spill_at: int) -> list[list[int]]:
    """Positions in `places`, in ranks: within a rank the least loaded is taken, and the next rank if all of it is full.

    `places` are what tells the replicas apart, `ongoing` their requests. An adapter is at home in `copies` of them.
    Where no adapter is named, for the base, all are alike. Below `spill_at` requests no replica is too loaded.
    """
    everybody = list(range(len(places)))
    if not adapter:
        return [everybody]
    order = sorted(everybody, key=lambda at: _score(adapter, places[at]), reverse=True)
    limit = max(spill_at, BOUND * (sum(ongoing) + 1) / max(len(places), 1))
    homes = [at for at in order[:copies] if ongoing[at] + 1 <= limit]
    others = [[at] for at in order[copies:] if ongoing[at] + 1 <= limit]
    return [rank for rank in (homes, *others, everybody) if rank]


def _score(adapter: str, place: str) -> bytes:
    return hashlib.blake2b(f"{adapter}\0{place}".encode(), digest_size=8).digest()
