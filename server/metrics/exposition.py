"""Counters, gauges and histograms as Prometheus's text format writes them, for one thread.

prometheus-client writes a sample in about 5 us, so that the 300 of a server took 2 ms of every scrape and the 45,000
of 1,000 adapters would take 200 ms. Here a series keeps all of its text but the numbers.
"""

from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from typing import Generic, TypeVar


def label(name: str, value: str) -> str:
    """`name="value"`, escaped."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


def head(name: str, kind: str, help: str) -> str:
    """The lines before a family's series."""
    return f"# HELP {name} {help}\n# TYPE {name} {kind}\n"


class Value:
    """A counter's or gauge's series. `labels` is as in the text, without braces; it may be empty."""

    __slots__ = ("_series", "value")

    def __init__(self, name: str, labels: str = ""):
        self._series = f"{name}{{{labels}}}" if labels else name
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = float(value)

    def render(self) -> str:
        return f"{self._series} {self.value!r}\n"

    def alias(self, name: str, labels: str) -> Callable[[], str]:
        """Writes the same figure under another name."""
        return lambda: f"{name}{{{labels}}} {self.value!r}\n"


class Histogram:
    """`bounds` are upper and inclusive. `labels` as in Value."""

    __slots__ = ("_bounds", "_counts", "_labels", "_name", "_sum", "_template")

    def __init__(self, name: str, bounds: tuple[float, ...], labels: str = ""):
        self._name, self._labels = name, labels
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._template = ""

    def __bool__(self) -> bool:
        """Whether anything was observed."""
        return any(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def render(self) -> str:
        if not self._template:  # most of 1,000 adapters are never asked for
            self._template = self._lines(self._name, self._labels)
        return self._fill(self._template)

    def alias(self, name: str, labels: str) -> Callable[[], str]:
        """Writes the same figures under another name."""
        template = self._lines(name, labels)
        return lambda: self._fill(template)

    def _lines(self, name: str, labels: str) -> str:
        """The text, with places for the numbers."""
        labels = labels.replace("%", "%%")
        before, alone = (f"{labels},", f"{{{labels}}}") if labels else ("", "")
        borders = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        lines = [f'{name}_bucket{{{before}le="{border}"}} %d\n' for border in borders]
        return "".join(lines) + f"{name}_count{alone} %d\n{name}_sum{alone} %.6f\n"

    def _fill(self, template: str) -> str:
        totals = tuple(accumulate(self._counts))
        return template % (*totals, totals[-1], self._sum)


Series = TypeVar("Series", Value, Histogram)


class Family(Generic[Series]):
    """All series of one name, made by `make(name, labels)` when they are first asked for."""

    def __init__(self, name: str, kind: str, help: str, labels: tuple[str, ...], make: Callable[[str, str], Series]):
        self._head = head(name, kind, help)
        self._kind, self._help = kind, help
        self._name, self._labels = name, labels
        self._make: Callable[[str, str], Series] = make
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> Series:
        found = self._series.get(values)
        if found is None:
            pairs = sorted(zip(self._labels, values, strict=True))
            found = self._make(self._name, ",".join(label(name, value) for name, value in pairs))
            self._series[values] = found
        return found

    def render(self) -> str:
        return self._head + "".join([series.render() for series in self._series.values()])

    def alias(self, name: str, labels: str, *own: str) -> Callable[[], str]:
        """Writes the series that exist by now under another name: with `labels`, and their own called `own`."""
        lines = head(name, self._kind, self._help)
        twins: list[Callable[[], str]] = []
        for values, series in self._series.items():
            pairs: list[str] = [label(*pair) for pair in zip(own, values, strict=True)]
            twins.append(series.alias(name, ",".join([labels, *pairs])))
        return lambda: lines + "".join([twin() for twin in twins])
