"""Service level objectives: limits in milliseconds that a request must meet to count as good."""

import math
from collections.abc import Iterable, Mapping

from tucka_runtime.errors import ConfigError

NAMES = ("ttft", "tpot", "e2el", "itl")


def parse(items: Iterable[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:50"]` to {name: milliseconds}."""
    limits: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in NAMES or not 0 < limits[name] < math.inf:
            raise ConfigError(f"--goodput must be NAME:MS with NAME one of {', '.join(NAMES)}")
    return limits


def met(limits: Mapping[str, float], latencies: Mapping[str, float]) -> bool:
    """Whether every limit holds; `latencies` in milliseconds, by the same names."""
    return all(latencies[name] <= limit for name, limit in limits.items())
