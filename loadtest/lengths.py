"""Distributions of token and turn counts."""

import math
import random
from dataclasses import dataclass

from tucka_runtime.errors import ConfigError

COUNTS = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}  # numbers that each kind takes


@dataclass(frozen=True)
class Lengths:
    """Draws whole numbers of at least 1."""

    kind: str
    a: float
    b: float = 0.0

    def draw(self, rng: random.Random) -> int:
        if self.kind == "uniform":
            value: float = rng.randint(int(self.a), int(self.b))
        elif self.kind == "normal":
            value = rng.gauss(self.a, self.b)
        elif self.kind == "lognormal":
            value = self.a * math.exp(rng.gauss(0.0, self.b))
        else:
            value = self.a
        return max(1, round(value))


def parse(text: str, flag: str) -> Lengths:
    """`128`, `uniform:LOW:HIGH` (both included), `normal:MEAN:STD`, `lognormal:MEDIAN:SIGMA` (of the logarithm)."""
    kind, *rest = text.split(":")
    try:
        if not rest:
            kind, rest = "fixed", [kind]
        numbers = [float(r) for r in rest]
        known = COUNTS.get(kind) == len(numbers)
        ordered = kind != "uniform" or numbers == sorted(numbers)
        if known and ordered and numbers[0] >= 1 and all(0 <= n < 1e7 for n in numbers):
            return Lengths(kind, *numbers)
    except ValueError:
        pass
    raise ConfigError(f"{flag} must be a number, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEDIAN:SIGMA")
