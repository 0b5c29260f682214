"""Work of another thread that is done between steps. No torch."""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

Work = Generator[None, None, T]
"""Work in pieces: it yields after each, and returns what came of it."""

SHARE = 0.04
"""Of the steps' time, what work may take: gaps between tokens grow by that much. Each work that waits behind it adds as
much, and so does each PATIENCE that it has lasted, so that neither a queue nor a large adapter takes for ever."""
PATIENCE = 1.0
"""Seconds."""
MOST = 0.5
"""Of the steps' time, what all of that may come to."""
LONG = 1.1
"""Times the usual step: after one that took longer no work is done. Steps with a prompt are the long ones, and what is
done behind them makes the longest gaps longer; behind the short ones it is hidden."""
LATE = 0.1
"""What the last step counts for in what is usual."""


def once(make: Callable[[], T]) -> Work[T]:
    """Work of one piece."""
    yield
    return make()


def whole(work: Work[T]) -> T:
    """What comes of work that nobody has to take turns with. Raises what it raises."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


class Turns:
    """Work of one thread, which the thread of the steps does between them, and the thread itself while there are none.

    Beside a step the work would share Python's lock, which each of a step's calls into torch gives away and waits for
    again, and bring threads of its own for what torch computes, which spin: folding an adapter for 7 ms beside steps of
    3 ms made the p99 between tokens 1.6 times as long, whatever the thread's priority
    (docs/measurements/engine-faults-2026-11-26.md).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stepping = False
        self._work: Work[Any] | None = None
        self._outcome: Future[Any] = Future()
        self._due = 0.0
        """Seconds that the work may take; less than none after a piece that took more."""
        self._begun = 0.0
        self._usual = 0.0
        """Seconds that a step takes of late."""

    def run(self, work: Work[T]) -> T:
        """What comes of some work, in the thread whose work it is. Raises what it raises."""
        outcome: Future[T] = Future()
        with self._changed:
            self._work, self._outcome, self._begun = work, outcome, time.monotonic()
            while self._work is not None:
                if self._stepping:
                    self._changed.wait()
                else:
                    self._advance()
        return outcome.result()

    def between(self, seconds: float, waiting: int = 0) -> None:
        """After a step that took so many seconds, if another may follow: does what is due of the work, behind which so
        much more is `waiting`."""
        usual = self._usual or seconds
        self._usual = usual + LATE * (seconds - usual)
        self._stepping = True  # before the lock, which work under way has until it sees this behind its next piece
        with self._changed:
            if self._work is None:
                self._due = 0.0
                return
            shares = 1 + waiting + (time.monotonic() - self._begun) / PATIENCE
            self._due += min(SHARE * shares, MOST) * seconds
            while seconds <= LONG * usual and self._work is not None and self._due > 0:
                begin = time.monotonic()
                self._advance()
                self._due -= time.monotonic() - begin

    def open(self) -> None:
        """No step follows for now."""
        if not self._stepping:  # nor did one before: the work may be under way, and has the lock
            return
        with self._changed:
            self._stepping = False
            self._changed.notify()

    def _advance(self) -> None:
        """Does a piece of the work, whose end or error is for `run`."""
        assert self._work is not None
        try:
            next(self._work)
            return
        except StopIteration as end:
            self._outcome.set_result(end.value)
        except Exception as error:
            self._outcome.set_exception(error)
        self._work, self._outcome = None, Future()
        self._changed.notify()
