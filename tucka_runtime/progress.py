"""How far many requests have come: a bar on stderr."""

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(total: int | None, unit: str, shown: bool, what: str | None = None) -> "tqdm[None]":
    """A bar for `total` of a unit, None where nobody knows how many; before it stands `what` they are."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=not shown, file=sys.stderr, desc=what)


class AnswerProgress:
    """Of `total` answers those that are done, and tokens per second. It counts whether it is shown or not."""

    def __init__(self, total: int, shown: bool):
        self._bar = bar(total, "answer", shown)
        self._begin = time.monotonic()
        self.tokens = 0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-9)

    def note(self, tokens: int, done: bool) -> None:
        """More tokens; `done` says that an answer has ended with them."""
        self.tokens += tokens
        if done:
            if not self._bar.disable:
                self._bar.set_postfix_str(f"{self.tokens / self.seconds:.0f} tok/s", refresh=False)
            self._bar.update()

    def __enter__(self) -> "AnswerProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
