"""Statistics of samples: percentiles, intervals, fairness."""

import math
from collections.abc import Sequence

import numpy as np

# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond 30 the normal's 1.96 is within 4%.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t95(degrees: int) -> float:
    return T95[degrees - 1] if degrees <= len(T95) else 1.96


def percentile(values: Sequence[float], p: float) -> float:
    """Linear between closest ranks, numpy's default and so vLLM's."""
    return float(np.percentile(values, p))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95% interval of the mean of independent repeats. One value has no interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(geometric mean, low, high) of paired ratios: the interval is Student's, on logarithms."""
    mean, low, high = mean_interval([math.log(r) for r in ratios])
    return math.exp(mean), math.exp(low), math.exp(high)


def percentile_interval(values: Sequence[float], p: float) -> tuple[float, float]:
    """95% interval of a percentile from order statistics (binomial ranks, normal approximation): it assumes no
    distribution, but independent samples, which requests that queue behind one another are not. Where the sample is
    too small to bound a side, that side is the sample's extreme."""
    ordered = np.sort(values)
    n, q = len(ordered), p / 100
    half = 1.96 * math.sqrt(n * q * (1 - q))
    low, high = max(0, math.floor(n * q - half) - 1), min(n - 1, math.ceil(n * q + half))
    return float(ordered[low]), float(ordered[high])


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index (Jain, Chiu, Hawe 1984): (Σx)² / (n Σx²). 1 is equal shares, 1/n is one gets all.
    None where there is nothing to compare: fewer than two, or nobody gets anything."""
    squares = sum(x * x for x in values)
    return None if len(values) < 2 or squares == 0 else sum(values) ** 2 / (len(values) * squares)


def quantile_curve(values: Sequence[float], points: int = 200) -> list[float]:
    """The empirical distribution at points + 1 equal steps of probability from 0 to 1, for drawing."""
    return [float(v) for v in np.quantile(values, np.linspace(0, 1, points + 1))] if len(values) else []
