"""Planar averages against numerical integrals, Fourier sums and the parallel-plate capacitor."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from voltpi.analysis.planar import (
    Grid,
    bin_moments,
    planar_potential,
    planar_profile,
    smeared_potential,
)

K_E = 14.3996454784255
AREA = 37.0


def some_charges(seed: int = 0, neutral: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z, q = rng.uniform(-6.0, 6.0, 12), rng.normal(size=12)
    alpha = rng.choice([0.15, 0.9, 3.3], 12)
    return z, q - q.mean() * neutral, alpha


def density(x: float, z: np.ndarray, q: np.ndarray, alpha: np.ndarray) -> float:
    return float((q * np.sqrt(alpha / np.pi) * np.exp(-alpha * (x - z) ** 2)).sum() / AREA)


@pytest.mark.parametrize("neutral", [True, False])
def test_slab_against_numerical_integrals(neutral: bool) -> None:
    z, q, alpha = some_charges(neutral=neutral)
    # the grid ends inside the charges: what is beyond counts all the same
    grid = Grid(-7.0, 0.37, 30, False)
    profile = planar_profile(grid, z, q, alpha, AREA, K_E)
    options = {"limit": 400, "epsabs": 1e-12, "epsrel": 1e-11}
    for k in (0, 11, 25, 30):
        x = grid.edges[k]
        breaks = [(-25.0, x), (x, 25.0)]
        charge = [quad(density, *part, args=(z, q, alpha), **options)[0] for part in breaks]
        assert profile.field[k] == pytest.approx(2 * np.pi * K_E * (charge[0] - charge[1]), abs=1e-7)
        moment = sum(quad(lambda y, x=x: abs(x - y) * density(y, z, q, alpha), *part, **options)[0] for part in breaks)
        assert profile.potential[k] == pytest.approx(-2 * np.pi * K_E * moment, abs=1e-7)
    binned = quad(density, grid.edges[11], grid.edges[12], args=(z, q, alpha), **options)[0]
    assert profile.charge[11] == pytest.approx(binned, abs=1e-12)


@pytest.mark.parametrize("neutral", [True, False])
def test_periodic_against_a_fourier_sum(neutral: bool) -> None:
    z, q, alpha = some_charges(1, neutral)
    grid = Grid(-6.5, 13.0 / 41, 41, True)
    applied = 0.03
    profile = planar_profile(grid, z, q, alpha, AREA, K_E, applied)
    k = 2 * np.pi / 13.0 * np.arange(1, 40)
    amplitude = 8 * np.pi * K_E / (AREA * 13.0) * q * np.exp(-(k[:, None] ** 2) / (4 * alpha)) / k[:, None] ** 2
    phase = k[:, None] * (grid.edges[:, None, None] - z)
    np.testing.assert_allclose(
        profile.potential, (amplitude * np.cos(phase)).sum((1, 2)) - applied * grid.edges, atol=1e-9
    )
    np.testing.assert_allclose(profile.field, (k[:, None] * amplitude * np.sin(phase)).sum((1, 2)) + applied, atol=1e-9)
    assert profile.charge.sum() * AREA == pytest.approx(q.sum(), abs=1e-12)


def test_values_at_edges_do_not_depend_on_the_bins() -> None:
    z, q, alpha = some_charges(2)
    alpha = np.where(np.arange(12) < 5, np.inf, alpha)
    coarse = planar_profile(Grid(-9.0, 3.0, 6, False), z, q, alpha, AREA, K_E)
    fine = planar_profile(Grid(-9.0, 0.01, 1800, False), z, q, alpha, AREA, K_E)
    np.testing.assert_allclose(coarse.potential, fine.potential[::300], atol=1e-10)
    np.testing.assert_allclose(coarse.field, fine.field[::300], atol=1e-11)


@pytest.mark.parametrize("alpha", [np.inf, 2.0])
def test_parallel_plates(alpha: float) -> None:
    """Two sheets of charge density ±σ at a distance d: field 4π k_e σ between them, drop 4π k_e σ d (σ/ε0 · d)."""
    sigma, d = 0.01, 12.0
    z, q = np.array([3.0, 3.0 + d]), sigma * AREA * np.array([-1.0, 1.0])
    grid = Grid(-3.0, 0.1, 240, False)
    profile = planar_profile(grid, z, q, np.full(2, alpha), AREA, K_E)
    assert profile.potential[-1] - profile.potential[0] == pytest.approx(4 * np.pi * K_E * sigma * d, rel=1e-12)
    assert profile.field[120] == pytest.approx(-4 * np.pi * K_E * sigma, rel=1e-12)
    assert profile.field[[0, -1]] == pytest.approx([0.0, 0.0], abs=1e-14)
    # the same with the field that shorts them in a period: the drop is that of the jump, without charge between images
    period = Grid(-3.0, 0.1, 240, True)
    jump = 4 * np.pi * K_E * sigma * d
    shorted = planar_profile(period, z, q, np.full(2, alpha), AREA, K_E, -jump / period.length)
    np.testing.assert_allclose(np.diff(shorted.potential), np.diff(profile.potential), atol=1e-12)


def test_points_at_edges_are_counted_once() -> None:
    grid = Grid(0.0, 0.5, 8, True)
    z, q, alpha = np.array([0.0, 2.0]), np.array([1.0, -1.0]), np.full(2, np.inf)
    c, m = bin_moments(grid, z, q, alpha)
    assert c.tolist() == [1, 0, 0, 0, -1, 0, 0, 0]
    assert m.tolist() == [0.5, 0, 0, 0, -0.5, 0, 0, 0]
    profile = planar_profile(grid, z, q, alpha, AREA, K_E)
    half = 2 * np.pi * K_E / AREA
    np.testing.assert_allclose(profile.field, half * np.array([-1, 1, 1, 1, 1, -1, -1, -1, -1]), atol=1e-12)
    assert profile.potential[0] == pytest.approx(profile.potential[-1], abs=1e-12)


@pytest.mark.parametrize("periodic", [True, False])
def test_potential_seen_by_gaussians(periodic: bool) -> None:
    z, q, alpha = some_charges(3)
    grid = Grid(-6.5, 0.1, 130, True) if periodic else Grid(-9.5, 0.1, 190, False)
    period = 13.0 if periodic else None
    profile = planar_profile(grid, z, q, alpha, AREA, K_E, 0.02)
    at, width = np.array([-6.4, 0.3, 6.0]), np.array([3.2, 0.4, 3.2])
    seen = smeared_potential(grid, profile, at, width, 0.02)
    exact = [
        planar_potential(at[i : i + 1], z, q, 1 / (1 / width[i] + 1 / alpha), AREA, K_E, period)[0] for i in range(3)
    ]
    np.testing.assert_allclose(seen, exact - 0.02 * at, atol=1e-5)
