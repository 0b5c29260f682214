"""What a key may use up: the bucket against its definition, and a request's way through all three limits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tucka_runtime.server.http.errors import RateLimitError
from tucka_runtime.server.http.limits import Admission, Allowance, KeyLimits, TokenBucket, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 150), st.integers(0, 150)), max_size=40)


@given(st.integers(1, 100), STEPS)
def test_no_window_ever_has_more_than_the_bucket_and_what_came_since(per_minute: int, steps: list) -> None:
    """Of who takes only what may be taken: as much as fits the bucket, what the window's time brings, and of a request
    that is larger than the bucket what it is larger by."""
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    taken = []
    for pause, amount, _ in steps:
        clock.now += pause
        if not bucket.wait(amount):
            bucket.take(amount)
            taken.append((clock.now, amount))
    for first in range(len(taken)):
        used = 0
        for at, amount in taken[first:]:
            over = max(amount - per_minute, 0)
            used += amount
            brought = (at - taken[first][0]) * per_minute / 60
            assert used - over <= (per_minute + brought) * (1 + 1e-5) + 1e-6


@given(st.integers(1, 10**6), STEPS)
def test_a_wait_is_as_long_as_it_has_to_be_and_no_longer(per_minute: int, steps: list) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    for pause, amount, _ in steps:
        clock.now += pause
        wait = bucket.wait(amount)
        if wait > 1e-3:
            clock.now += wait * 0.99
            assert bucket.wait(amount)
            clock.now += wait * 0.01
        else:
            clock.now += wait
        assert not bucket.wait(amount)
        bucket.take(amount)


@given(st.integers(1, 100), STEPS)
def test_a_settled_request_counts_what_it_used(per_minute: int, steps: list) -> None:
    """At one moment: whatever was reserved, what is left is what was not used, debts included."""
    limits = KeyLimits(Allowance(tokens_per_minute=per_minute), Clock())
    left = per_minute
    for _, reserved, used in steps:
        request = Admission(limits)
        missing = min(reserved, per_minute) - left
        if missing > 0:
            with pytest.raises(RateLimitError) as refused:
                request.reserve(reserved)
            assert refused.value.retry_after == math.ceil(missing * 60 / per_minute - 1e-6)
        else:
            request.reserve(reserved)
            request.settle(used)
            left -= used
        request.close()
        assert limits.tokens is not None and limits.tokens.level == pytest.approx(left)
        assert limits.running == 0


def test_what_is_refused_counts_for_no_limit() -> None:
    limits = KeyLimits(Allowance(2, 100, 1), Clock())
    refused = []
    limits.refused = refused.append
    first = Admission(limits)
    with pytest.raises(RateLimitError) as at_once:
        Admission(limits)
    assert at_once.value.retry_after is None, "nobody knows when the other one ends"
    first.reserve(80)
    first.settle(60)
    first.close()
    second = Admission(limits)
    with pytest.raises(RateLimitError) as tokens:
        second.reserve(50)
    second.close()
    assert tokens.value.retry_after == 6
    third = Admission(limits)
    third.close()
    with pytest.raises(RateLimitError) as requests:
        Admission(limits)
    assert requests.value.retry_after == 30
    assert refused == ["concurrent", "tokens", "requests"] and limits.running == 0


def test_a_request_that_ends_twice_ends_once() -> None:
    limits = KeyLimits(Allowance(tokens_per_minute=100, concurrent_requests=2), Clock())
    one, other = Admission(limits), Admission(limits)
    one.reserve(50)
    one.settle(20)
    one.settle(0)
    one.close()
    one.close()
    assert limits.running == 1 and limits.tokens is not None and limits.tokens.level == 80
    other.close()
    assert limits.running == 0


def test_another_limit_takes_over_what_was_used() -> None:
    clock = Clock()
    limits = KeyLimits(Allowance(tokens_per_minute=100, concurrent_requests=1), clock)
    running = Admission(limits)
    running.reserve(50)
    limits.set(Allowance(tokens_per_minute=1000, concurrent_requests=1))
    assert limits.tokens is not None and limits.tokens.level == 500 and limits.running == 1
    limits.tokens.take(800)
    limits.set(Allowance(tokens_per_minute=100))
    assert limits.tokens.level == -300, "a debt stays what it is"
    clock.now += 180
    assert limits.tokens.level == 0
    limits.set(Allowance())
    assert limits.tokens is None and limits.headers() == []
    running.close()
    assert limits.running == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0001, "1ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (59.9996, "1m0s"), (60, "1m0s"),
        (86.4, "1m26.4s"), (360, "6m0s"), (3600, "1h0m0s"), (5400.25, "1h30m0.25s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_gos(seconds: float, text: str) -> None:
    assert duration(seconds) == text
