"""When conversations start: seconds from the start of the run.

One renewal process of unit rate with Gamma(shape b, mean 1) gaps (b = 1: Poisson; squared coefficient of variation
1 / b, as `vllm bench serve --burstiness`) is stretched in time by the rate curve's cumulated rate. So a ramp keeps the
burstiness, and a constant rate R has mean gap 1 / R exactly.
"""

import math
import random
from dataclasses import dataclass

from tucka_runtime.errors import ConfigError


@dataclass(frozen=True)
class RateCurve:
    """Conversations per second over `duration` seconds: `kind` is linear, exp or steps."""

    kind: str
    rates: tuple[float, ...]
    duration: float

    @classmethod
    def parse(cls, text: str, duration: float) -> "RateCurve":
        """`5`, `ramp:1:20`, `exp:1:20`, `steps:1,5,20`."""
        name, _, rest = text.partition(":")
        separators = {"ramp": ":", "exp": ":", "steps": ","}
        try:
            values = [float(v) for v in rest.split(separators[name])] if rest else [float(name)] * 2
        except (ValueError, KeyError):
            values = []
        wrong_count = name in ("ramp", "exp") and len(values) != 2
        if not values or wrong_count or not all(v > 0 and math.isfinite(v) for v in values):
            raise ConfigError("--rate must be a positive number, ramp:FROM:TO, exp:FROM:TO, steps:R1,R2,..., or inf")
        kind = {"exp": "exp", "steps": "steps"}.get(name, "linear")
        return cls("linear" if kind == "exp" and values[0] == values[1] else kind, tuple(values), duration)

    def rate(self, t: float) -> float:
        """The intended rate at time t."""
        share = min(max(t / self.duration, 0.0), 1.0)
        if self.kind == "steps":
            return self.rates[min(int(share * len(self.rates)), len(self.rates) - 1)]
        first, last = self.rates
        return first + (last - first) * share if self.kind == "linear" else first * (last / first) ** share

    def inverse(self, count: float) -> float:
        """The time at which the cumulated rate reaches `count`; beyond the end, infinity."""
        if self.kind == "steps":
            width = self.duration / len(self.rates)
            for i, rate in enumerate(self.rates):
                if count <= rate * width:
                    return i * width + count / rate
                count -= rate * width
            return math.inf
        first, last = self.rates
        if self.kind == "exp":
            growth = math.log(last / first) / self.duration
            grown = 1 + count * growth / first
            t = math.log(grown) / growth if grown > 0 else math.inf
        else:
            slope = (last - first) / self.duration
            below = first * first + 2 * slope * count
            t = 2 * count / (first + math.sqrt(below)) if below >= 0 else math.inf
        return t if t <= self.duration else math.inf


def gaps(rng: random.Random, burstiness: float) -> float:
    """One gap of mean 1."""
    return 1.0 if math.isinf(burstiness) else rng.gammavariate(burstiness, 1 / burstiness)


def open_loop(rate: str, duration: float, burstiness: float, rng: random.Random, limit: int | None) -> list[float]:
    """Start times below `duration`, at most `limit`. The first one follows a gap, as all others do."""
    if rate == "inf":
        return [0.0] * (limit or 0)
    curve = RateCurve.parse(rate, duration)
    times: list[float] = []
    count = 0.0
    while limit is None or len(times) < limit:
        count += gaps(rng, burstiness)
        t = curve.inverse(count)
        if math.isinf(t):
            break
        times.append(t)
    return times
