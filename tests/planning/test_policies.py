"""Whom each policy chooses."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from tucka_runtime.affinity import SHARE, SPILL_AT
from tucka_runtime.planning.policies import POLICIES, Affinity, ConsistentHash, LeastLoaded
from tucka_runtime.server.ray.placement import ranks

NAMES = tuple(f"adapter-{number}" for number in range(2000))


def test_round_robin_takes_turns() -> None:
    policy = POLICIES["round-robin"](3, NAMES)
    assert [policy.route(adapter) for adapter in (5, 5, 5, 9, -1)] == [0, 1, 2, 0, 1]


@example_settings(deadline=None)
@given(replicas=st.integers(1, 6), steps=st.lists(st.integers(0, 8), max_size=80))
def test_least_loaded_is_that(replicas: int, steps: list[int]) -> None:
    policy, on_their_way = LeastLoaded(replicas, NAMES), []
    for step in steps:
        if step % 3 and on_their_way:
            policy.ended(on_their_way.pop(step % len(on_their_way)))
        else:
            least = min(policy.load)
            on_their_way.append(policy.route(step))
            assert policy.load[on_their_way[-1]] == least + 1
        assert Counter(on_their_way) == {i: load for i, load in enumerate(policy.load) if load}


def test_equally_loaded_replicas_take_turns() -> None:
    policy = LeastLoaded(3, NAMES)
    seen = []
    for _ in range(6):
        seen.append(policy.route(0))
        policy.ended(seen[-1])
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_new_replica_takes_its_share_from_the_others_and_moves_nothing_else() -> None:
    before, after = ConsistentHash(10, NAMES), ConsistentHash(11, NAMES)
    homes = [(before.route(adapter), after.route(adapter)) for adapter in range(len(NAMES))]
    moved = [new for old, new in homes if old != new]
    assert set(moved) == {10}
    assert len(moved) / len(NAMES) == pytest.approx(1 / 11, rel=0.4)
    assert max(before.load) < 1.6 * len(NAMES) / 10


def test_affinity_is_consistent_hashing_where_nobody_is_busy() -> None:
    hashed, affine = ConsistentHash(10, NAMES), Affinity(10, NAMES)
    for adapter in range(len(NAMES)):
        replica = affine.route(adapter)
        assert replica == hashed.route(adapter)
        affine.ended(replica)


def test_affinity_leaves_the_base_to_the_least_loaded() -> None:
    """`placement.ranks` has all replicas alike for it."""
    policy = Affinity(3, NAMES)
    busy = policy.route(7)
    free = [replica for replica in range(3) if replica != busy]
    assert sorted(policy.route(-1) for _ in range(2)) == free
    assert sorted(policy.route(-1) for _ in range(3)) == [0, 1, 2]
    idle = Affinity(3, NAMES)
    for replica in (0, 1, 2, 0):
        assert idle.route(-1) == replica
        idle.ended(replica)


@pytest.mark.parametrize("replicas", [1, 3, 50])
def test_a_hot_adapter_spills_over_to_the_same_replicas_within_the_bound(replicas: int) -> None:
    policy = Affinity(replicas, NAMES)
    order = []
    for count in range(1, 400):
        order.append(policy.route(7))
        assert policy.load[order[-1]] <= max(SHARE * count / replicas + 1, SPILL_AT)
    assert len(set(order)) >= replicas / SHARE - 1
    first = list(dict.fromkeys(order))
    for replica in order:
        policy.ended(replica)
    assert list(dict.fromkeys(policy.route(7) for _ in range(399))) == first
    assert order[:SPILL_AT] == [first[0]] * SPILL_AT


def test_the_router_of_ray_serve_chooses_as_the_paper_does() -> None:
    """Requests come and go; the same loads, the same choice."""
    draw, policy = random.Random(3), Affinity(5, NAMES)
    running: list[int] = []
    for _ in range(3000):
        if len(running) > 60 or (running and draw.random() < 0.3):
            policy.ended(running.pop(draw.randrange(len(running))))
        adapter = min(int(draw.paretovariate(0.7)), len(NAMES)) - 1
        (expected,) = ranks(NAMES[adapter], "01234", policy.load, 1, SPILL_AT)[0]
        running.append(policy.route(adapter))
        assert running[-1] == expected
