"""A replica on paper against what a hand and a formula compute."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.support.plans import FLAT, PROFILE, arriving, settings
from tucka_runtime.planning.arrivals import BASE, Arrivals
from tucka_runtime.planning.profile import Profile
from tucka_runtime.planning.replica import ReplicaSettings
from tucka_runtime.planning.simulation import Simulation
from tucka_runtime.planning.slots import Event, Slots


def served(arrivals: Arrivals, fleet: ReplicaSettings | None = None, profile: Profile = PROFILE) -> Simulation:
    simulation = Simulation(arrivals, 1, "round-robin", fleet or settings(), profile)
    assert simulation.run()
    return simulation


def test_one_request_alone() -> None:
    """Load, a step with the prompt, three that decode."""
    run = served(arriving([(2.0, 0, 5, 4)]))
    assert run.first[0] == pytest.approx(2.0 + 0.5 + 0.010 + 4 * 0.001 + 0.003)
    assert run.last[0] == pytest.approx(run.first[0] + 3 * 0.010)


def test_the_base_needs_no_slot_and_an_adapter_in_one_no_load() -> None:
    run = served(arriving([(0.0, BASE, 1, 1), (1.0, 0, 1, 1), (2.0, 0, 1, 1)]))
    assert np.subtract(run.first, [0.0, 1.0, 2.0]) == pytest.approx([0.013, 0.513, 0.013])
    assert run.figures((50,)).hit_rate == 0.5


def test_two_requests_share_their_steps() -> None:
    """The second comes into the first one's third step and is taken in when that ends; they have their own adapters."""
    run = served(arriving([(0.0, BASE, 1, 11), (0.025, 0, 3, 3)]), profile=replace(PROFILE, load=0.0, request=0.0))
    both = 0.030 + 0.014 + 2 * 0.001
    assert run.first == pytest.approx([0.010, both])
    # 3 tokens are there when the second comes in, 3 come of steps of two, 5 more alone.
    assert run.last == pytest.approx([both + 2 * 0.014 + 5 * 0.010, both + 2 * 0.014])
    assert run.replicas[0].busy == pytest.approx(run.last[0])


def test_prompts_are_cut_beside_decoding_rows_and_by_the_batch() -> None:
    """100 tokens: alone 64 and 36; beside a decoding row the 16 at least that always fit, as its stretch allows 8."""
    alone = served(arriving([(0.0, BASE, 100, 1)]), ReplicaSettings(1, 0, 8, 64, 1.8), replace(PROFILE, request=0.0))
    assert alone.first[0] == pytest.approx(0.010 + 63 * 0.001 + 0.010 + 35 * 0.001)
    beside = served(
        arriving([(0.0, BASE, 1, 100), (0.005, BASE, 100, 1)]), settings(stretch=1.8), replace(PROFILE, request=0.0)
    )
    assert beside.first[1] == pytest.approx(0.010 + 7 * 0.012 + (6 * 15 + 3) * 0.001)


def test_no_seat_is_waited_for() -> None:
    run = served(arriving([(0.0, BASE, 1, 10), (0.0, BASE, 1, 1)]), settings(max_num_seqs=1), FLAT)
    assert run.first == pytest.approx([0.010, 0.110])


def test_a_queue_waits_as_long_as_the_formula_says() -> None:
    """M/D/1: one seat, every request takes one step of 10 ms, Poisson arrivals at 70% of what it serves. The mean
    wait is ρD/(2(1 - ρ)), here 11.7 ms (Pollaczek-Khinchine)."""
    rng, now, requests = random.Random(1), 0.0, []
    for _ in range(40_000):
        now += rng.expovariate(70)
        requests.append((now, BASE, 1, 1))
    run = served(arriving(requests), settings(max_num_seqs=1), FLAT)
    waits = np.subtract(run.first, [at for at, *_ in requests]) - 0.010
    assert waits.mean() == pytest.approx(0.7 * 0.010 / (2 * 0.3), rel=0.05)
    assert run.replicas[0].busy / max(run.last) == pytest.approx(0.7, rel=0.02)


@pytest.mark.parametrize(("zipf", "slots"), [(0.8, 30), (1.2, 10)])
def test_hits_are_those_of_the_che_approximation(zipf: float, slots: int) -> None:
    """An LRU of C places, independent requests with probabilities p: an adapter is there with 1 - exp(-p T), T such
    that these sum up to C (Che, Tung, Wang 2002; a few per mille off)."""
    p = np.arange(1, 301) ** -zipf
    p /= p.sum()
    low, high = 0.0, 1e7
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-p * middle)).sum() < slots else (low, middle)
    expected = float((p * (1 - np.exp(-p * low))).sum())
    lru = Slots(slots, 0, 0.0, 0.0, lambda when, event: None)
    for request, adapter in enumerate(random.Random(2).choices(range(300), p, k=60_000)):
        if request == 10_000:
            lru.hits = lru.lookups = 0
        if not lru.want(adapter, request, 0.0):
            assert lru.loaded(0.0) == [request]
        lru.leave(adapter, 0.0)
    assert lru.hits / lru.lookups == pytest.approx(expected, abs=0.01)


def test_who_waits_for_long_gets_the_turn_of_one_that_is_always_busy() -> None:
    """One slot, held without a pause: after a second its adapter gives way, also to its own later requests."""
    busy = [(0.1 * number, 0, 1, 50) for number in range(30)]
    run = served(arriving(sorted([*busy, (1.02, 1, 1, 1)])), settings(slots=1), FLAT)
    waited = run.first[11] - 1.02
    # 0.2 s after its request the turn comes; the last of the running requests then ends, and the load takes 0.5 s.
    assert 1.0 + 0.5 < waited < 1.0 + 0.5 + 0.7


def test_loads_come_one_after_the_other_and_from_the_host_cache_faster() -> None:
    run = served(arriving([(0.0, 0, 1, 1), (0.0, 1, 1, 1), (5.0, 2, 1, 1), (9.0, 0, 1, 1)]), settings(slots=2), FLAT)
    assert np.subtract(run.first, [0, 0, 5, 9]) == pytest.approx([0.51, 1.01, 0.51, 0.11])


def test_an_event_is_asked_for_once_a_load() -> None:
    asked: list[tuple[float, Event]] = []
    slots = Slots(2, 0, 0.5, 0.1, lambda when, event: asked.append((when, event)))
    assert slots.want(0, 10, 0.0) == slots.want(1, 11, 0.0) == slots.want(0, 12, 0.2) == []
    assert asked == [(0.5, Event.LOADED)]
    assert slots.loaded(0.5) == [10, 12]
    assert asked[1:] == [(1.0, Event.LOADED)]
