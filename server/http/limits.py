"""What one API key may use up: requests and tokens a minute, requests at once.

A minute's amount is a bucket that fills evenly. There is no window, hence no moment at which twice the limit passes,
and nobody who reached a limit waits longer than what is missing takes to come.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from tucka_runtime.server.http.errors import RateLimitError

UNBOUNDED_ANSWER = 1024
"""What an answer reserves that only the context bounds: few fill it, and a reservation of all of it would let a key
have one request at a time. What it uses beyond is taken at its end."""

LIMIT_HEADERS = tuple(
    f"x-ratelimit-{kind}-{of}" for of in ("requests", "tokens") for kind in ("limit", "remaining", "reset")
)
_LEAST = 1e-6  # of a bucket: less is what floats lose


class TokenBucket:
    """Holds up to `per_minute`, and gets as much within a minute. Below 0 it is in debt."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self._clock = clock
        self._level: float = per_minute
        self._at = clock()

    @property
    def level(self) -> float:
        """What is in it now."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self.per_minute / 60, self.per_minute)
        self._at = now
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until so much may be taken if nobody else takes any; 0: now. What is more than it ever holds may be
        taken from a full one."""
        missing = min(amount, self.per_minute) - self.level
        return 0.0 if missing <= _LEAST * self.per_minute else missing * 60 / self.per_minute

    def take(self, amount: float) -> None:
        """Takes it, also into debt; less than 0 is given back."""
        self._level = min(self.level - amount, self.per_minute)

    def resize(self, per_minute: int) -> None:
        """Another limit from now on. It stays as full as it was; a debt stays what it is."""
        level = self.level
        self._level = level * per_minute / self.per_minute if level > 0 else level
        self.per_minute = per_minute

    @property
    def full_in(self) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.level) * 60 / self.per_minute


@dataclass(frozen=True)
class Allowance:
    """The limits of a key; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


class KeyLimits:
    """One key's limits, and what is left of them. `refused` is told which limit refused a request: "requests",
    "tokens", "concurrent"."""

    def __init__(self, allowance: Allowance, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.refused: Callable[[str], None] = lambda limit: None
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.running = 0
        self.set(allowance)

    def set(self, allowance: Allowance) -> None:
        """Other limits from now on; what runs and what was used count on."""
        self.concurrent = allowance.concurrent_requests
        self.requests = self._bucket(self.requests, allowance.requests_per_minute)
        self.tokens = self._bucket(self.tokens, allowance.tokens_per_minute)

    def _bucket(self, bucket: TokenBucket | None, per_minute: int | None) -> TokenBucket | None:
        if bucket is None or per_minute is None:
            return None if per_minute is None else TokenBucket(per_minute, self._clock)
        bucket.resize(per_minute)
        return bucket

    def refuse(self, limit: str, message: str, wait: float | None = None) -> RateLimitError:
        """The error for who is over the limit. `wait` None: nobody knows how long."""
        self.refused(limit)
        seconds = None if wait is None else max(math.ceil(wait), 1)
        again = "when one of them has ended" if seconds is None else f"in {seconds} s"
        return RateLimitError(f"{message} Try again {again}.", retry_after=seconds)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left, as OpenAI's API says it; of limits that there are."""
        found = []
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                left = max(math.floor(bucket.level + _LEAST * bucket.per_minute), 0)
                values = {"limit": str(bucket.per_minute), "remaining": str(left), "reset": duration(bucket.full_in)}
                found += [(f"x-ratelimit-{kind}-{name}".encode(), value.encode()) for kind, value in values.items()]
        return found


class Admission:
    """One request of a key, from when it is let in until `close`, which may come more than once. Without `limits`
    nothing is counted.

    Raises RateLimitError where a limit of requests is reached. A request that is refused by a limit counts for none.
    """

    def __init__(self, limits: KeyLimits | None = None):
        self._limits = limits
        self._tokens: TokenBucket | None = None
        self._reserved = 0
        if limits is None:
            return
        if limits.concurrent is not None and limits.running >= limits.concurrent:
            raise limits.refuse("concurrent", f"This key may have {limits.concurrent} requests at once, and has them.")
        if limits.requests is not None:
            if wait := limits.requests.wait(1):
                most = limits.requests.per_minute
                raise limits.refuse("requests", f"This key's limit of {most} requests a minute is reached.", wait)
            limits.requests.take(1)
        limits.running += 1

    def reserve(self, tokens: int) -> None:
        """Takes what a request may need, all at once or nothing, so that requests at the same time do not each see the
        same tokens as free. Raises RateLimitError."""
        limits = self._limits
        if limits is None or limits.tokens is None:
            return
        bucket = limits.tokens
        if wait := bucket.wait(tokens):
            if limits.requests is not None:
                limits.requests.take(-1)
            raise limits.refuse(
                "tokens",
                f"This key's limit of {bucket.per_minute} tokens a minute does not leave the {tokens} that this "
                "request may need: its prompt, and what its answers may have. Ask for shorter ones, or wait.",
                wait,
            )
        bucket.take(tokens)
        self._tokens, self._reserved = bucket, tokens

    def settle(self, tokens: int) -> None:
        """Gives back what was reserved and not used, or takes what was used beyond. Once; what comes later counts
        nothing."""
        bucket, self._tokens = self._tokens, None
        if bucket is not None:
            bucket.take(tokens - self._reserved)

    def close(self) -> None:
        """The request is over. What it never settled, it has not used."""
        self.settle(0)
        limits, self._limits = self._limits, None
        if limits is not None:
            limits.running -= 1


def duration(seconds: float) -> str:
    """As OpenAI's headers have it, which is Go's: 12ms, 1.5s, 6m0s, 1h0m0s."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s" if rest % 1000 else f"{rest // 1000}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text
