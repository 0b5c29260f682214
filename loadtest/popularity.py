"""Which adapter a conversation goes to."""

import itertools
import random
from collections.abc import Sequence

from tucka_runtime.errors import ConfigError


def check(text: str) -> tuple[str, float, dict[str, float]]:
    """Parses `uniform`, `zipf:ALPHA` or `weighted:NAME=W,...` to (kind, alpha, weights)."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "uniform" and not rest:
            return kind, 0.0, {}
        if kind == "zipf":
            alpha = float(rest or 1)
            if alpha >= 0:
                return kind, alpha, {}
        if kind == "weighted":
            pairs = (item.rsplit("=", 1) for item in rest.split(","))
            weights = {name: float(weight) for name, weight in pairs}
            if all(w >= 0 for w in weights.values()) and sum(weights.values()) > 0:
                return kind, 0.0, weights
    except ValueError:
        pass
    raise ConfigError("--popularity must be uniform, zipf:ALPHA with ALPHA >= 0, or weighted:NAME=W,NAME=W")


class Popularity:
    """Draws names with fixed probabilities. Zipf: the i-th name (from 1) has weight 1 / i^alpha."""

    def __init__(self, text: str, names: Sequence[str]) -> None:
        kind, alpha, given = check(text)
        self.names = list(names)
        if unknown := [name for name in given if name not in names]:
            raise ConfigError(f"--popularity: {', '.join(unknown)} not in use; there are {', '.join(names)}")
        if kind == "weighted":
            weights = [given.get(name, 0.0) for name in names]
        else:
            weights = [rank**-alpha for rank in range(1, len(self.names) + 1)]
        total = sum(weights)
        self.weights = [w / total for w in weights]
        self.cumulated = list(itertools.accumulate(self.weights))

    def draw(self, rng: random.Random) -> str:
        return rng.choices(self.names, cum_weights=self.cumulated)[0]
