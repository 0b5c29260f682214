"""How many tokens of prompts fit beside decoding sequences without stalling them, by what steps took. No torch."""

FRESH = 0.3
"""The weight of a new step in the averages: the last six or so count."""

LEAST = 16
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
        self.decode_seconds: float | None = None
        self.token_seconds: float | None = None
        self.mixed = 0
        """Steps since one that only decoded."""

    def note(self, seconds: float, prompt_tokens: int, decode_tokens: int) -> None:
        """Takes one step into account: what it took, and the rows that it had of either kind."""
        if not prompt_tokens:
            self.decode_seconds, self.mixed = _mean(self.decode_seconds, seconds), 0
        elif not decode_tokens:
            self.token_seconds = _mean(self.token_seconds, seconds / prompt_tokens)
        elif self.decode_seconds is not None:
            # A step with prompts is never taken to be free: noise would let a long one in.
            added = max(seconds - self.decode_seconds, 0.1 * seconds)
            self.token_seconds, self.mixed = _mean(self.token_seconds, added / prompt_tokens), self.mixed + 1

    def prompt_tokens(self) -> int | None:
        """The most tokens of prompts that the next step should have beside decoding ones; None for no limit, also
        while nothing is known."""
        if not self.stretch or self.decode_seconds is None or self.token_seconds is None:
            return None
        if self.mixed >= PROBE:
            return 0
        return max(int((self.stretch - 1) * self.decode_seconds / self.token_seconds), LEAST)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + FRESH * (new - old)
