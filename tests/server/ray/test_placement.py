"""Which replica an adapter's requests go to: the same one, until that has more than its share."""

import pickle
import random
from collections import Counter

from tucka_runtime.affinity import Ring
from tucka_runtime.server.ray.placement import ranks

ADAPTERS = [f"adapter{i}" for i in range(1000)]


def home(adapter: str, places: list[str]) -> str:
    return places[ranks(adapter, places, [0] * len(places), 1, 8)[0][0]]


def test_adapters_are_spread_and_stay_where_they_are() -> None:
    four, five = ["0", "1", "2", "3"], ["0", "1", "2", "3", "4"]
    counts = Counter(home(name, four) for name in ADAPTERS)
    assert all(180 < count < 320 for count in counts.values()), counts
    moved = [name for name in ADAPTERS if home(name, four) != home(name, five)]
    assert {home(name, five) for name in moved} == {"4"} and 140 < len(moved) < 260
    assert [home(name, four) for name in ADAPTERS] == [home(name, four[::-1]) for name in ADAPTERS]


def test_names_that_were_asked_for_are_not_kept() -> None:
    """They are what clients send."""
    ring = Ring(["0", "1"])
    size = len(pickle.dumps(ring))
    assert {ring.home(name) for name in ADAPTERS} == {0, 1}
    assert len(pickle.dumps(ring)) == size


def test_the_base_may_go_anywhere() -> None:
    assert ranks("", ["0", "1", "2"], [5, 0, 3], 1, 8) == [[0, 1, 2]]


def test_copies_are_alike() -> None:
    first, *rest = ranks("law", ["0", "1", "2"], [0, 0, 0], 2, 8)
    assert len(first) == 2 and rest == [[({0, 1, 2} - set(first)).pop()], [0, 1, 2]]
    assert ranks("law", ["0", "1"], [0, 0], 5, 8) == [ranks("law", ["0", "1"], [0, 0], 2, 8)[0], [0, 1]]


def test_a_replica_with_more_than_its_share_takes_no_more() -> None:
    places = ["0", "1"]
    (own,) = ranks("law", places, [0, 0], 1, 8)[0]
    busy = [0, 0]
    busy[own] = 7
    assert ranks("law", places, busy, 1, 8)[0] == [own]
    busy[own] = 8
    assert ranks("law", places, busy, 1, 8) == [[1 - own], [0, 1]]
    busy[1 - own] = 8  # both have the same: it has not more than its share
    assert ranks("law", places, busy, 1, 8)[0] == [own]


def test_a_hot_adapter_alone_uses_all_replicas() -> None:
    """Under Serve's own routing one replica has all of them until it is full (ray issue 65691)."""
    places, ongoing = ["0", "1", "2"], [0, 0, 0]
    for _ in range(90):
        ongoing[ranks("law", places, ongoing, 1, 8)[0][0]] += 1
    assert max(ongoing) <= 1.25 * 30 + 1 and min(ongoing) >= 14, ongoing


def test_under_mixed_load_few_requests_leave_home() -> None:
    """On the whole: how many do depends on where the hottest of 40 names happen to be at home."""
    draw, places = random.Random(1), ["0", "1"]
    weights = [1 / (rank + 1) for rank in range(40)]
    at_home = 0
    for group in range(10):
        running: list[int] = []
        for _ in range(500):
            if len(running) >= 16:
                running.pop(draw.randrange(len(running)))
            (name,) = draw.choices(ADAPTERS[40 * group : 40 * (group + 1)], weights)
            to = ranks(name, places, [running.count(0), running.count(1)], 1, 12)[0][0]
            at_home += places[to] == home(name, places)
            running.append(to)
    assert at_home / 5000 > 0.95


def test_no_replica_at_all() -> None:
    assert ranks("law", [], [], 1, 8) == []
