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
    assert run.first[0] == pytest.approx(2.0 + 0.5 + 0.010 + 0.002 + 5 * 0.001 + 0.003)
    assert run.last[0] == pytest.approx(run.first[0] + 3 * 0.010)


def test_the_base_needs_no_slot_and_an_adapter_in_one_no_load() -> None:
    run = served(arriving([(0.0, BASE, 1, 1), (1.0, 0, 1, 1), (2.0, 0, 1, 1)]))
    assert np.subtract(run.first, [0.0, 1.0, 2.0]) == pytest.approx([0.016, 0.516, 0.016])
    assert run.figures((50,)).hit_rate == 0.5


def test_two_requests_share_their_steps() -> None:
    """The second comes into the first one's third step and is taken in when that ends."""
    run = served(arriving([(0.0, 0, 1, 11), (0.525, 0, 3, 3)]), profile=replace(PROFILE, request=0.0))
    alone = 0.5 + 0.010 + 0.002 + 0.001
    both = alone + 2 * 0.010 + 0.012 + 0.002 + 3 * 0.001
    assert run.first == pytest.approx([alone, both])
    # 3 tokens are there when the second comes in, 3 come of steps of two, 5 more alone.
    assert run.last == pytest.approx([both + 2 * 0.012 + 5 * 0.010, both + 2 * 0.012])
    assert run.replicas[0].busy == pytest.approx(run.last[0] - 0.5)


def test_prompts_are_cut_by_the_batch_and_beside_decoding_rows() -> None:
    """100 tokens: alone 64 and 36. Beside a decoding row the 8 that a `Pace` always lets in, as its stretch of 1.8
    allows 8 ms more at most, and a token of 13 ms for the first prompt's one says a token takes as long as a step."""
    alone = served(arriving([(0.0, BASE, 100, 1)]), ReplicaSettings(1, 0, 8, 64, 1.8), replace(PROFILE, request=0.0))
    assert alone.first[0] == pytest.approx(0.012 + 64 * 0.001 + 0.012 + 36 * 0.001)
    beside = served(
        arriving([(0.0, BASE, 1, 100), (0.025, BASE, 100, 1)]), settings(stretch=1.8), replace(PROFILE, request=0.0)
    )
    assert beside.first[1] == pytest.approx(0.013 + 2 * 0.010 + 13 * 0.014 + 100 * 0.001)


def test_a_load_waits_for_the_step_in_flight_and_its_request_for_one_more() -> None:
    """The load is done 5 ms into a step of 10 ms, whose end it waits for; the next one has begun when the request
    comes."""
    profile = replace(PROFILE, load=1.0, load_beside=0.032, request=0.0, prompt_seconds=[0.0, 0.0])
    run = served(arriving([(0.0, BASE, 1, 100), (0.003, 0, 1, 1)]), profile=profile)
    assert run.first[1] == pytest.approx(0.040 + 0.010 + 0.014)


def test_steps_beside_a_load_are_slower() -> None:
    """The one in flight when the load begins is not; then two of 20 ms are, and the rest are not."""
    profile = replace(FLAT, load_beside=0.030, step_beside=2.0)
    run = served(arriving([(0.0, BASE, 1, 10), (0.005, 0, 1, 1)]), profile=profile)
    assert run.first[1] == pytest.approx(0.010 + 2 * 0.020 + 2 * 0.010)
    assert run.last[0] == pytest.approx(0.010 + 2 * 0.020 + 7 * 0.010)


def test_steps_are_slower_while_neighbours_compute() -> None:
    """Two of one machine: the second's ten steps begin in the first's second one, which is done as it was; both then
    take three times as long until the second one's last, which lies in the first's eleventh."""
    profile = replace(FLAT, servers=2, crowded=3.0)
    arrivals = arriving([(0.0, BASE, 1, 20), (0.015, BASE, 1, 10)])
    run = Simulation(arrivals, 2, "round-robin", settings(), profile)
    assert run.run()
    assert run.last[1] == pytest.approx(0.015 + 10 * 0.030)
    assert run.last[0] == pytest.approx(2 * 0.010 + 10 * 0.030 + 8 * 0.010)
    apart = Simulation(arrivals, 2, "round-robin", settings(), replace(profile, servers=1))
    assert apart.run() and apart.last == pytest.approx([0.2, 0.115])


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
    lru = Slots(slots, 0, lambda cached: 0.0, lambda when, event: None)
    for request, adapter in enumerate(random.Random(2).choices(range(300), p, k=60_000)):
        if request == 10_000:
            lru.hits = lru.lookups = 0
        if not lru.want(adapter, request, 0.0):
            lru.done(0.0)
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
    slots = Slots(2, 0, lambda cached: 0.1 if cached else 0.5, lambda when, event: asked.append((when, event)))
    assert slots.want(0, 10, 0.0) == slots.want(1, 11, 0.0) == slots.want(0, 12, 0.2) == slots.loaded(0.2) == []
    assert asked == [(0.5, Event.LOADED)] and slots.reading
    slots.done(0.5)
    assert asked[1:] == [(1.0, Event.LOADED)]
    assert slots.loaded(0.6) == [10, 12]
