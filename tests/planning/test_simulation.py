"""Whatever arrives at whatever fleet: every request is answered once, and the same arrivals give the same figures."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from tests.support.plans import PROFILE, arriving, settings
from tucka_runtime.planning.arrivals import BASE
from tucka_runtime.planning.fleet import MOST, smallest, smallest_fleet
from tucka_runtime.planning.policies import POLICIES
from tucka_runtime.planning.simulation import Limit, Simulation

REQUESTS = st.lists(
    st.tuples(st.floats(0, 3), st.integers(BASE, 7), st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=40
)


@example_settings(max_examples=80, deadline=None)
@given(
    requests=REQUESTS,
    replicas=st.integers(1, 4),
    policy=st.sampled_from(list(POLICIES)),
    slots=st.integers(1, 4),
    host=st.integers(0, 3),
    seats=st.integers(1, 6),
    stretch=st.sampled_from([0.0, 1.8]),
)
def test_every_request_is_answered_once(
    requests: list[tuple[float, int, int, int]],
    replicas: int,
    policy: str,
    slots: int,
    host: int,
    seats: int,
    stretch: float,
) -> None:
    arrivals = arriving(sorted(requests))
    ended: Counter[int] = Counter()

    class Watched(Simulation):
        def _last(self, replica: int, request: int, now: float) -> None:
            super()._last(replica, request, now)
            ended[request] += 1
            own = [(some.slots._resident, some.slots._loading) for some in self.replicas]
            assert all(len(resident) + len(loading) <= slots for resident, loading in own)

    run = Watched(arrivals, replicas, policy, settings(slots, host, seats, stretch), PROFILE)
    counted: list[int] = []
    assert run.run(counted.append)
    assert ended == Counter(range(len(arrivals))) and sum(counted) == run.finished == len(arrivals)
    for request, (at, _, prompt, output) in enumerate(sorted(requests)):
        least = 0.012 + prompt * 0.001 + 0.003
        assert run.first[request] >= at + least - 1e-9
        assert run.last[request] >= run.first[request] + (output - 1) * 0.010 - 1e-9
    assert not any(run._policy.load) and not any(replica.slots._held for replica in run.replicas)
    again = Simulation(arrivals, replicas, policy, settings(slots, host, seats, stretch), PROFILE)
    assert again.run() and (again.first, again.last) == (run.first, run.last)
    assert again.figures((50, 99)) == run.figures((50, 99))


def test_what_comes_first_is_left_out_of_the_figures() -> None:
    arrivals = arriving([(0.0, 0, 1, 1), (5.0, 0, 1, 1), (10.0, 0, 1, 1)])
    run = Simulation(arrivals, 1, "round-robin", settings(), PROFILE)
    run.run(skip=1)
    figures = run.figures((100,))
    assert figures.hit_rate == 1.0 and figures.requests == 2
    assert math.isclose(figures.first_token[100], 0.016)


def test_an_slo_that_cannot_be_kept_any_more_ends_the_run() -> None:
    """Two of four first tokens come late; 50% may, 25% may not."""
    arrivals = arriving([(0.0, 0, 1, 1), (5.0, 0, 1, 1), (10.0, 1, 1, 1), (15.0, 1, 1, 1)])
    for percentile, keeps, answered in ((50, True, 4), (75, False, 3)):
        run = Simulation(arrivals, 1, "round-robin", settings(), PROFILE)
        assert run.run(limit=Limit(0.1, percentile)) is keeps
        assert run.finished == answered


def test_as_many_may_be_late_as_the_percentile_leaves() -> None:
    """One of ten at 90%, which is no whole number in float arithmetic."""
    arrivals = arriving([(5.0 * number, 0, 1, 1) for number in range(10)])
    run = Simulation(arrivals, 1, "round-robin", settings(), PROFILE)
    assert run.run(limit=Limit(0.1, 90))


@given(need=st.integers(1, 2 * MOST), guess=st.integers(0, 2 * MOST))
def test_the_smallest_number_that_holds_is_found(need: int, guess: int) -> None:
    tried: list[int] = []

    def holds(number: int) -> bool:
        tried.append(number)
        return number >= need

    assert smallest(holds, guess) == (need if need <= MOST else None)
    assert len(set(tried)) == len(tried) < 50


def test_the_smallest_fleet_holds_and_one_less_does_not() -> None:
    """Bursts of eight at once, one seat in each replica: who is fifth in the queue of one comes too late."""
    arrivals = arriving([(float(second), BASE, 1, 10) for second in range(1, 20) for _ in range(8)])
    limit, fleet = Limit(0.35, 99), settings(max_num_seqs=1)
    noted: list[int] = []
    found = smallest_fleet(arrivals, "least-loaded", fleet, PROFILE, limit, 0, 1, noted.append)
    assert found == 2  # four in each: the last waits three times 100 ms
    assert noted
