"""Work that takes turns with steps: its share of their time and no more, all of it where there are none."""

import threading
import time
from concurrent.futures import Future

import pytest

from tucka_runtime.engine.turns import MOST, SHARE, Turns, Work, whole

PIECES = 7
PATIENCE = 30.0


def work(done: list[threading.Thread], error: Exception | None = None, seconds: float = 0.0) -> Work[str]:
    """Notes who does each of PIECES pieces, which take so many seconds at least."""
    for _ in range(PIECES):
        time.sleep(seconds)
        done.append(threading.current_thread())
        yield
    if error is not None:
        raise error
    return "made"


def started(turns: Turns, own: Work[str]) -> tuple[threading.Thread, Future[str]]:
    """A thread that has some work done, and what comes of it."""
    outcome: Future[str] = Future()

    def run() -> None:
        try:
            outcome.set_result(turns.run(own))
        except Exception as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def test_without_steps_the_thread_does_its_work_at_once() -> None:
    done: list[threading.Thread] = []
    assert Turns().run(work(done)) == "made" == whole(work([]))
    assert done == [threading.current_thread()] * PIECES


@pytest.mark.parametrize(("waiting", "share"), [(0, SHARE), (3, 4 * SHARE), (1000, MOST)])
def test_between_steps_the_work_gets_its_share_from_who_steps(waiting: int, share: float) -> None:
    """Pieces of a millisecond at least, after steps of one: all but the last are paid for before the next is done."""
    turns, done = Turns(), list[threading.Thread]()
    turns.between(0.0)
    _, outcome = started(turns, work(done, seconds=0.001))
    steps = 0
    while not outcome.done():
        steps += bool(done)
        turns.between(0.001, waiting)
    assert outcome.result(PATIENCE) == "made"
    assert done == [threading.current_thread()] * PIECES
    assert steps >= (PIECES - 1) / share - 1


def test_a_long_step_is_followed_by_more_than_a_piece() -> None:
    turns, done = Turns(), list[threading.Thread]()
    turns.between(0.0)
    _, outcome = started(turns, work(done))
    while not done:
        turns.between(1000 * PATIENCE)
    assert len(done) == PIECES and outcome.result(PATIENCE) == "made"


def test_the_thread_goes_on_itself_when_no_step_follows() -> None:
    turns, done = Turns(), list[threading.Thread]()
    turns.between(0.0)
    thread, outcome = started(turns, work(done, seconds=0.001))
    while not done:
        turns.between(1e-9)
    turns.open()
    assert outcome.result(PATIENCE) == "made"
    assert done == [threading.current_thread()] + [thread] * (PIECES - 1)


@pytest.mark.parametrize("stepping", [False, True])
def test_an_error_is_raised_where_the_work_was_asked_for(stepping: bool) -> None:
    turns, error = Turns(), ValueError("too large")
    if stepping:
        turns.between(0.0)
    _, outcome = started(turns, work([], error))
    while stepping and not outcome.done():
        turns.between(1.0)
    assert outcome.exception(PATIENCE) is error
    turns.open()
    assert turns.run(work([])) == "made", "the next work is not touched by it"
