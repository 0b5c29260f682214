"""Work that takes turns with steps: its share of their time and no more, all of it where there are none."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from tucka_runtime.engine import turns as module
from tucka_runtime.engine.turns import LATE, MOST, PATIENCE, SHARE, Turns, Work, once, whole

PIECES, PIECE = 40, 0.001
STEP = 0.003
WAIT = 30.0


class Clock:
    """Goes on by what is said."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def work(clock: Clock, done: list[threading.Thread], error: Exception | None = None) -> Work[str]:
    """Notes who does each of PIECES pieces, which take PIECE seconds."""
    for _ in range(PIECES):
        clock.now += PIECE
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

    stepping = turns._stepping
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while stepping and turns._work is None:
        time.sleep(1e-3)
    return thread, outcome


def test_without_steps_the_thread_does_its_work_at_once(clock: Clock) -> None:
    done: list[threading.Thread] = []
    assert Turns().run(work(clock, done)) == "made" == whole(work(clock, [])) == Turns().run(once(lambda: "made"))
    assert done == [threading.current_thread()] * PIECES


@pytest.mark.parametrize(("waiting", "step"), [(0, STEP), (3, STEP), (1000, STEP), (0, 100 * STEP)])
def test_between_steps_the_work_gets_its_share_from_who_steps(clock: Clock, waiting: int, step: float) -> None:
    """More for what waits behind it, and the longer it lasts; a piece that took more is paid for by the steps after."""
    turns, done = Turns(), list[threading.Thread]()
    turns.between(step)
    begin = clock.now
    _, outcome = started(turns, work(clock, done))
    given = 0.0
    while len(done) < PIECES:
        clock.now += step
        share = min(SHARE * (1 + waiting + (clock.now - begin) / PATIENCE), MOST)
        given += share * step
        turns.between(step, waiting)
        assert -1e-9 < PIECE * len(done) - given < PIECE + 1e-9 or len(done) == PIECES
    while not outcome.done():
        turns.between(step)
    assert outcome.result(WAIT) == "made"
    assert done == [threading.current_thread()] * PIECES


def test_nothing_is_done_behind_a_long_step(clock: Clock) -> None:
    """Every third step has a prompt: what it is due is done behind the next one. Where all become as long, that is what
    is usual."""
    turns, done = Turns(), list[threading.Thread]()
    turns.between(STEP)
    begin = clock.now
    _, outcome = started(turns, work(clock, done))
    given = 0.0
    for number in range(120):
        long, before = number % 3 == 2, len(done)
        step = STEP * (1 + long)
        given += SHARE * (1 + (clock.now - begin) / PATIENCE) * step
        turns.between(step)
        assert len(done) == before if long else -1e-9 < PIECE * len(done) - given < PIECE + 1e-9
    before = len(done)
    assert 0 < before < PIECES
    for _ in range(round(3 / LATE)):
        turns.between(2 * STEP)
    assert before < len(done)
    while not outcome.done():
        turns.between(2 * STEP)


def test_the_thread_goes_on_itself_when_no_step_follows(clock: Clock) -> None:
    turns, done = Turns(), list[threading.Thread]()
    turns.between(0.0)
    thread, outcome = started(turns, work(clock, done))
    while not done:
        turns.between(1e-9)
    turns.open()
    assert outcome.result(WAIT) == "made"
    assert done == [threading.current_thread()] + [thread] * (PIECES - 1)


@pytest.mark.parametrize("stepping", [False, True])
def test_an_error_is_raised_where_the_work_was_asked_for(clock: Clock, stepping: bool) -> None:
    turns, error = Turns(), ValueError("too large")
    if stepping:
        turns.between(0.0)
    _, outcome = started(turns, work(clock, [], error))
    while stepping and not outcome.done():
        turns.between(1.0)
    assert outcome.exception(WAIT) is error
    turns.open()
    assert turns.run(work(clock, [])) == "made", "the next work is not touched by it"


def test_a_step_waits_for_one_piece_of_work_that_was_under_way() -> None:
    """The thread does all of it at once while there are no steps: not when one has begun meanwhile."""
    turns, begun, go_on = Turns(), threading.Event(), threading.Event()
    done = 0

    def own() -> Work[str]:
        nonlocal done
        for _ in range(PIECES):
            done += 1
            begun.set()
            assert go_on.wait(WAIT)
            yield
        return "made"

    _, outcome = started(turns, own())
    assert begun.wait(WAIT)
    turns.open()  # an engine that was idle and goes on to be
    stepping = threading.Thread(target=turns.between, args=(0.0,))
    stepping.start()
    while not turns._stepping:
        pass
    go_on.set()
    stepping.join(WAIT)
    assert not stepping.is_alive() and done < PIECES
    turns.open()
    assert outcome.result(WAIT) == "made"
