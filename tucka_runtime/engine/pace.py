"""How many tokens of prompts fit beside decoding sequences without stalling them, by what steps took. No torch."""

import statistics
from collections import deque

FRESH = 0.3
"""The weight of a new step in the average of a token's seconds: the last six or so count."""

DECODES = 5
"""The median of so many decoding steps is what one takes: a single one that something else held up says nothing."""

AIM = 0.5
"""The part of what a stretch adds that prompts get. Steps scatter, and their p99 is to stay below twice their median:
in bf16 it is 1.7 times that on a model of 512 and 1.96 on one of 1,024 (`tests.chaos.prompts`), with 0.65 it was 2.2.
"""

LEAST = 8
"""Tokens of prompts that a step takes, however slow the machine: a prompt always comes to its end."""

PROBE = 16
"""After so many steps with prompts in them comes one without, which says what decoding takes now: the batch grows."""


class Pace:
    """Learns what a decoding step takes and what a prompt's token adds to it, from the steps themselves.

    `stretch` is how many times as long as a decoding step one with prompts in it may take; 0 sets no limit. Between two
    tokens of a stream lies one step, so this bounds its gaps.
    """

    def __init__(self, stretch: float):
        self.stretch = stretch
        self.token_seconds: float | None = None
        self.mixed = 0
        """Steps since one that only decoded."""
        self._decodes: deque[float] = deque(maxlen=DECODES)

    @property
    def decode_seconds(self) -> float | None:
        """What a decoding step takes; None before there was one."""
        return statistics.median(self._decodes) if self._decodes else None

    def note(self, seconds: float, prompt_tokens: int, decode_tokens: int) -> None:
        """Takes one step into account: what it took, and the rows that it had of either kind."""
        if not prompt_tokens:
            self._decodes.append(seconds)
            self.mixed = 0
        elif not decode_tokens:
            self.token_seconds = _mean(self.token_seconds, seconds / prompt_tokens)
        elif (decode := self.decode_seconds) is not None:
            # A step with prompts is never taken to be free: noise would let a long one in.
            added = max(seconds - decode, 0.1 * seconds)
            self.token_seconds, self.mixed = _mean(self.token_seconds, added / prompt_tokens), self.mixed + 1

    def prompt_tokens(self) -> int | None:
        """The most tokens of prompts that the next step should have beside decoding ones; None for no limit, also
        while nothing is known."""
        decode = self.decode_seconds
        if not self.stretch or decode is None or self.token_seconds is None:
            return None
        if self.mixed >= PROBE:
            return 0
        return max(int(AIM * (self.stretch - 1) * decode / self.token_seconds), LEAST)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + FRESH * (new - old)
