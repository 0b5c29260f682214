"""What is drawn has the distributions that were asked for, and is the same for the same seed."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import arrivals, lengths
from tucka_runtime.loadtest.popularity import Popularity

seeds = st.integers(0, 2**32)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0.5, 200), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]))
def test_gamma_arrivals_have_the_rate_and_the_burstiness(seed, rate, shape):
    n = 4000
    times = arrivals.open_loop(str(rate), math.inf, shape, random.Random(seed), n)
    gaps = np.diff([0.0, *times])
    # mean: standard error is sd / sqrt(n); five of them
    assert abs(gaps.mean() * rate - 1) < 5 / math.sqrt(shape * n)
    # coefficient of variation: 1 / sqrt(shape), the Poisson process has 1
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(shape), rel=0.2)
    assert all(a <= b for a, b in pairwise(times))


def test_metronome():
    assert arrivals.open_loop("4", 1.01, math.inf, random.Random(0), None) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_poisson_counts_have_equal_mean_and_variance(seed):
    times = np.array(arrivals.open_loop("50", 100.0, 1.0, random.Random(seed), None))
    counts = np.histogram(times, bins=200, range=(0, 100))[0]
    assert counts.mean() == pytest.approx(25, abs=5 * 5 / math.sqrt(200))
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.6)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["{a}", "ramp:{a}:{b}", "exp:{a}:{b}", "steps:{a},{b},{a}"]),
    st.floats(0.1, 50),
    st.floats(0.1, 50),
    st.floats(0.0, 0.999),
)
def test_the_rate_curve_inverts_its_own_integral(form, a, b, share):
    curve = arrivals.RateCurve.parse(form.format(a=a, b=b), 20.0)

    def integral(t):
        x = np.linspace(0, t, 2001)
        return float(np.trapezoid([curve.rate(v) for v in x], x))

    count = share * integral(20.0)
    # the trapezoid is wrong by up to a cell's half at a step's edge: 50 · 0.01 / 2, and there are two
    assert integral(curve.inverse(count)) == pytest.approx(count, abs=0.6, rel=1e-3)
    assert curve.inverse(integral(20.0) + 1) == math.inf


def test_a_ramp_sends_what_its_area_says():
    times = arrivals.open_loop("ramp:10:90", 100.0, 1.0, random.Random(1), None)
    assert len(times) == pytest.approx(5000, rel=0.06)
    assert sum(t < 50 for t in times) == pytest.approx(1500, rel=0.1)


def test_all_at_once_and_limits():
    assert arrivals.open_loop("inf", 30.0, 1.0, random.Random(0), 7) == [0.0] * 7
    assert len(arrivals.open_loop("100", math.inf, 1.0, random.Random(0), 12)) == 12


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "x", "ramp:1", "ramp:1:2:3", "steps:", "exp:0:1", "linear:1:2"])
def test_bad_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="--rate"):
        arrivals.RateCurve.parse(rate, 10.0)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0, 2), st.integers(1, 40))
def test_zipf_frequencies(seed, alpha, names):
    n = 5000
    popularity = Popularity(f"zipf:{alpha}", [str(i) for i in range(names)])
    rng = random.Random(seed)
    counts = np.zeros(names)
    for _ in range(n):
        counts[int(popularity.draw(rng))] += 1
    expected = np.arange(1, names + 1) ** -alpha
    expected *= n / expected.sum()
    # five standard deviations of a binomial in each cell
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1)


def test_uniform_and_weighted():
    assert Popularity("uniform", ["a", "b"]).weights == [0.5, 0.5]
    weighted = Popularity("weighted:b=3,a=1", ["a", "b", "c"])
    assert weighted.weights == [0.25, 0.75, 0.0]
    rng = random.Random(0)
    assert {weighted.draw(rng) for _ in range(200)} == {"a", "b"}


@pytest.mark.parametrize(
    "text", ["zipf:-1", "zipf:x", "weighted:", "weighted:a=-1", "weighted:a=0", "other", "uniform:2"]
)
def test_bad_popularities_are_refused(text):
    with pytest.raises(ConfigError, match="--popularity"):
        Popularity(text, ["a"])


def test_a_weight_for_nobody_is_refused():
    with pytest.raises(ConfigError, match="z not in use; there are a"):
        Popularity("weighted:z=1", ["a"])


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 500), st.integers(0, 500))
def test_uniform_lengths_stay_inside(seed, low, width):
    rng = random.Random(seed)
    draws = [lengths.parse(f"uniform:{low}:{low + width}", "--x").draw(rng) for _ in range(50)]
    assert all(low <= d <= low + width for d in draws)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_lengths_have_their_moments(seed):
    rng = random.Random(seed)
    normal = [lengths.parse("normal:200:20", "--x").draw(rng) for _ in range(3000)]
    assert np.mean(normal) == pytest.approx(200, abs=2)
    assert np.std(normal) == pytest.approx(20, rel=0.1)
    lognormal = [lengths.parse("lognormal:200:0.5", "--x").draw(rng) for _ in range(3000)]
    assert np.median(lognormal) == pytest.approx(200, rel=0.06)
    assert np.std(np.log(lognormal)) == pytest.approx(0.5, rel=0.1)
    assert lengths.parse("7", "--x").draw(rng) == 7


@pytest.mark.parametrize("text", ["0", "-3", "uniform:5:1", "uniform:5", "normal:1", "gauss:1:2", "nan", "1:2", "inf"])
def test_bad_lengths_are_refused(text):
    with pytest.raises(ConfigError, match="--x"):
        lengths.parse(text, "--x")
