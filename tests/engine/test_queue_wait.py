"""How long the queue is said to take, beside how long it takes."""

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.driving import ask, prompt
from tucka_runtime.engine.output_stream import OutputStream
from tucka_runtime.engine.queue_wait import QueueWait, oldest
from tucka_runtime.errors import OverloadedError
from tucka_runtime.messages import AdapterKey, Request, SequenceOutput


def request(adapter: str | None, n: int = 1, tenant: str = "") -> Request:
    return replace(ask(prompt(3), n=n, adapter=AdapterKey(adapter, 1) if adapter else None), tenant=tenant)


def stream(adapter: str | None, n: int = 1, tenant: str = "") -> OutputStream:
    return OutputStream(None, request(adapter, n, tenant))  # type: ignore[arg-type]


def moving(step: float, every: int, steps: int = 400) -> QueueWait:
    """A queue of which a sequence ends every so many steps, each so many seconds long."""
    wait = QueueWait()
    for i in range(steps):
        wait.note(100 + i * step, ended=int(i % every == 0), waiting=5)
    return wait


@settings(deadline=None, derandomize=True)
@given(step=st.floats(0.01, 0.5), every=st.integers(1, 20), ahead=st.integers(1, 200), flows=st.integers(1, 5))
def test_a_steady_queue_takes_what_is_said(step: float, every: int, ahead: int, flows: int) -> None:
    taken = ahead * flows * every * step
    said = moving(step, every).expected(ahead, flows)
    assert 0.45 * taken <= said <= 1.1 * taken, "one more is taken to be about to end: a little is too little"


def test_a_queue_that_becomes_slow_is_said_to_be() -> None:
    wait = moving(0.1, 1)
    assert wait.expected(10) == pytest.approx(1.0, rel=0.2)
    for i in range(300):
        wait.note(141 + i, ended=int(i % 5 == 0), waiting=5)
    assert 35 < wait.expected(10) < 50


def test_time_in_which_nobody_waits_does_not_count() -> None:
    wait = moving(0.1, 1)
    wait.note(141, ended=1, waiting=0)
    assert wait.expected(1000) == 0
    wait.note(900, ended=0, waiting=3)
    assert wait.expected(10) == pytest.approx(1.0, rel=0.2)


def test_before_anything_has_ended_the_wait_is_what_was_seen() -> None:
    wait = QueueWait()
    wait.note(10, ended=0, waiting=3)
    assert wait.expected(5) == 0
    wait.note(12, ended=0, waiting=3)
    assert wait.expected(5) == 10


def test_who_waits_behind_its_own_is_refused_with_the_time_until_it_is_not() -> None:
    wait = moving(0.1, 10)
    loud, other = stream("loud", n=30), stream("other", n=2)
    said = wait.expected(30, 2)
    assert 40 < said < 70
    with pytest.raises(OverloadedError) as refused:
        wait.check(request("loud"), [loud, other], 20)
    assert 0 <= refused.value.retry_after - (said - 20) < 1
    assert pickle.loads(pickle.dumps(refused.value)).retry_after == refused.value.retry_after
    wait.check(request("loud"), [loud, other], 70)
    wait.check(request("loud", tenant="quiet"), [loud, other], 1)
    wait.check(request(None), [loud, other], 1)


def test_the_oldest_are_those_that_have_nothing_yet() -> None:
    first, second = stream("a", n=2), stream("a")
    base = stream(None)
    first.submitted -= 60
    second.submitted -= 5
    first.put(SequenceOutput("r", 0))
    assert first.waiting == 1
    assert oldest([first, second, base]) == {"a": pytest.approx(60, abs=1), None: pytest.approx(0, abs=1)}
    first.put(SequenceOutput("r", 1))
    assert oldest([first, second])["a"] == pytest.approx(5, abs=1)
