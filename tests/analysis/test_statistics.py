"""Errors of correlated means against a process with known autocorrelation, and lines against their textbook errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from voltpi.analysis.statistics import (
    BlockedMean,
    autocorrelation_time,
    block_averages,
    linear_fit,
    mean_with_error,
)


def ar1(phi: float, n: int, seed: int) -> np.ndarray:
    """x_t = φ x_{t−1} + noise: ρ(t) = φ^t, τ = ½(1 + φ)/(1 − φ), unit variance."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=n) * np.sqrt(1 - phi**2)
    noise[0] = rng.normal()
    return lfilter([1.0], [1.0, -phi], noise)


@pytest.mark.parametrize(("phi", "tau"), [(0.0, 0.5), (0.5, 1.5), (0.9, 9.5), (0.97, 32.8333)])
def test_autocorrelation_time_of_ar1(phi: float, tau: float) -> None:
    found = np.mean([autocorrelation_time(ar1(phi, 40000, seed)) for seed in range(10)])
    assert found == pytest.approx(tau, rel=0.06)


def test_error_of_the_mean_is_the_scatter_of_means() -> None:
    series = [ar1(0.9, 4000, seed) for seed in range(200)]
    scatter = np.std([x.mean() for x in series])
    estimated = np.mean([mean_with_error(x).error for x in series])
    assert estimated == pytest.approx(scatter, rel=0.12)
    assert scatter == pytest.approx(np.sqrt(2 * 9.5 / 4000), rel=0.12)


def test_blocks_rise_to_the_same_error() -> None:
    x = ar1(0.9, 2**17, 3)
    blocks = block_averages(x)
    assert blocks.error[0] == pytest.approx(np.std(x) / np.sqrt(len(x)), rel=1e-4)
    plateau = blocks.error[(blocks.size > 100) & (blocks.size < 2000)].mean()
    assert plateau == pytest.approx(mean_with_error(x).error, rel=0.1)
    assert np.all(np.diff(blocks.uncertainty / blocks.error) > 0)


def test_reliability() -> None:
    assert mean_with_error(ar1(0.9, 4000, 0)).reliable
    assert not mean_with_error(ar1(0.97, 200, 0)).reliable


def test_constant_and_short_series() -> None:
    constant = mean_with_error(np.full(50, 3.25))
    assert (constant.value, constant.error, constant.tau) == (3.25, 0.0, 0.5)
    assert np.isnan(mean_with_error([1.0]).error)
    assert np.isnan(block_averages([1.0]).error[0])
    with pytest.raises(ValueError, match="at least one sample"):
        mean_with_error([])


def test_weighted_line() -> None:
    rng = np.random.default_rng(0)
    x, sigma = np.linspace(-1, 2, 7), np.array([0.1, 0.2, 0.1, 0.3, 0.1, 0.2, 0.1])
    fits = [linear_fit(x, 0.5 + 2.0 * x + sigma * rng.normal(size=7), sigma) for _ in range(2000)]
    slopes, intercepts = [f.slope for f in fits], [f.intercept for f in fits]
    assert np.mean(slopes) == pytest.approx(2.0, abs=4 * fits[0].slope_error / np.sqrt(2000))
    assert np.std(slopes) == pytest.approx(fits[0].slope_error, rel=0.06)
    assert np.std(intercepts) == pytest.approx(fits[0].intercept_error, rel=0.06)


def test_drift_error_knows_of_correlation() -> None:
    t = np.arange(2000.0)
    fits = [linear_fit(t, 1e-3 * t + ar1(0.9, 2000, seed), correlated=True) for seed in range(100)]
    scatter = np.std([f.slope for f in fits])
    assert np.mean([f.slope_error for f in fits]) == pytest.approx(scatter, rel=0.25)
    plain = linear_fit(t, ar1(0.9, 2000, 0)).slope_error
    assert plain < 0.5 * scatter


def test_a_line_needs_two_abscissae() -> None:
    with pytest.raises(ValueError, match="two different"):
        linear_fit([1.0, 1.0], [0.0, 1.0])


@pytest.mark.parametrize("n", [1, 3, 63, 64, 200, 5000])
def test_running_blocks(n: int) -> None:
    x = np.random.default_rng(n).normal(size=(n, 2, 3))
    running = BlockedMean()
    for sample in x:
        running.add(sample)
    assert running.n == n
    np.testing.assert_allclose(running.mean, x.mean(axis=0), atol=1e-12)
    if n == 1:
        assert np.isnan(running.error).all()
    if n == 3:
        np.testing.assert_allclose(running.error, x.std(axis=0, ddof=1) / np.sqrt(3))


def test_running_blocks_know_correlations() -> None:
    scatter, found = [], []
    for seed in range(100):
        running = BlockedMean()
        for value in ar1(0.8, 3000, 100 + seed):
            running.add(value)
        scatter.append(float(running.mean))
        found.append(float(running.error))
    assert np.mean(found) == pytest.approx(np.std(scatter), rel=0.15)
    assert np.std(scatter) == pytest.approx(np.sqrt(2 * 4.5 / 3000), rel=0.2)
