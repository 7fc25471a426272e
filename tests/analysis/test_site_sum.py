"""The audit's own Coulomb sum against published charges, a brute-force sum, and other views of the same structure."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from voltpi.analysis.site_sum import Sites, SiteSum

from toy_capacitor import gold

K_E = 14.399645
ALPHA = 1.805132**2


def reference(case: str) -> tuple[Sites, Sites, np.ndarray, np.ndarray, np.ndarray]:
    """Electrode atoms, all atoms, charges, cell and which electrode atoms are at high z."""
    atoms, charges, role = gold(case)
    metal = role != "E"
    alpha = np.where(metal, ALPHA, np.inf)
    targets = Sites(atoms.positions[metal], alpha[metal])
    return targets, Sites(atoms.positions, alpha), charges, np.asarray(atoms.cell), role[metal] == "B"


@pytest.mark.parametrize("kind", ["ew2d", "ffield"])
def test_published_charges_make_the_published_potentials(kind: str) -> None:
    targets, sources, charges, cell, high = reference(f"case2_au_ions_dV2_{kind}")
    field = -2.0 / cell[2, 2] if kind == "ffield" else 0.0
    phi = SiteSum(cell, 2, kind == "ffield", K_E).potentials(targets, sources, charges)
    phi -= field * targets.positions[:, 2]
    # every atom of an electrode is at one potential, and the two are 2 V apart
    assert np.ptp(phi[high]) < 1e-6
    assert np.ptp(phi[~high]) < 1e-6
    assert phi[high].mean() - phi[~high].mean() == pytest.approx(2.0, abs=2e-7)
    if kind == "ew2d":
        np.testing.assert_allclose(phi, np.where(high, 1.0, -1.0), atol=2e-6)  # far away is 0 on average


@pytest.mark.parametrize("periodic", [True, False])
def test_matrix_is_the_potential_of_unit_charges(periodic: bool) -> None:
    rng = np.random.default_rng(4)
    cell = np.array([[7.0, 0.4, 0.0], [-1.0, 6.0, 0.0], [0.5, 0.0, 11.0]])
    sites = Sites(rng.uniform(0, 1, (9, 3)) @ cell, rng.choice([0.1, 1.0, 3.0], 9))
    total = SiteSum(cell, 2, periodic, K_E)
    matrix = total.matrix(sites)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9)
    q = rng.normal(size=9)
    np.testing.assert_allclose(matrix @ q, total.potentials(sites, sites, q), atol=1e-9)


def test_slab_against_a_direct_sum_over_images() -> None:
    """Differences of the potential of a neutral slab without dipoles: a plain sum over a disc of images converges."""
    rng = np.random.default_rng(5)
    cell = np.diag([5.0, 6.0, 20.0])
    half = rng.uniform(0, 1, (4, 3)) * [5.0, 6.0, 3.0] + [0, 0, 1.0]
    r = np.concatenate([half, half * [-1, -1, -1]])  # a centre of inversion: no dipole
    q = np.tile([0.7, -0.2, 0.4, -0.9], 2)
    alpha = np.tile([0.5, np.inf, 2.0, 1.0], 2)
    sites, targets = Sites(r, alpha), Sites(r[[0, 2, 3]], alpha[[0, 2, 3]])
    phi = SiteSum(cell, 2, False, K_E).potentials(targets, sites, q)
    images = np.array([[i * 5.0, j * 6.0, 0.0] for i in range(-160, 161) for j in range(-133, 134)])
    distance = np.linalg.norm(images, axis=1)
    weight = np.clip((800.0 - distance) / 200.0, 0.0, 1.0)  # the disc fades out, so that no image is cut
    direct = np.zeros(3)
    for i, (place, a) in enumerate(zip(targets.positions, targets.alpha, strict=True)):
        for j in range(8):
            d = np.linalg.norm(place - r[j] + images, axis=1)
            width = np.sqrt(1 / (1 / a + 1 / alpha[j]))
            with np.errstate(invalid="ignore"):
                kernel = np.where(d < 1e-9, 2 * width / np.sqrt(np.pi), erf(width * d) / d)
            direct[i] += K_E * q[j] * (weight * kernel).sum()
    np.testing.assert_allclose(np.diff(phi), np.diff(direct), atol=2e-5)


@pytest.mark.parametrize("periodic", [True, False])
def test_axes_images_and_larger_cells(periodic: bool) -> None:
    rng = np.random.default_rng(6)
    cell = np.array([[7.0, 0.0, 0.0], [1.5, 6.0, 0.0], [0.0, 0.0, 12.0]])
    r, q = rng.uniform(0, 1, (10, 3)) @ cell, rng.normal(size=10)
    q -= q.mean()
    alpha = rng.choice([0.3, 2.0, np.inf], 10)
    alpha[:3] = 1.0
    phi = SiteSum(cell, 2, periodic, K_E).potentials(Sites(r[:3], alpha[:3]), Sites(r, alpha), q)
    # any image of an atom is as good
    moved = r + rng.integers(-2, 3, (10, 3)) * [1, 1, int(periodic)] @ cell
    again = SiteSum(cell, 2, periodic, K_E).potentials(Sites(moved[:3], alpha[:3]), Sites(moved, alpha), q)
    np.testing.assert_allclose(again, phi, atol=2e-5)
    # twice the cell along a
    double = cell * [[2.0], [1.0], [1.0]]
    twice = Sites(np.concatenate([r, r + cell[0]]), np.tile(alpha, 2))
    again = SiteSum(double, 2, periodic, K_E).potentials(Sites(r[:3], alpha[:3]), twice, np.tile(q, 2))
    np.testing.assert_allclose(again, phi, atol=2e-5)
    # the same structure with its axes permuted
    turn = [2, 0, 1]
    turned = SiteSum(cell[turn][:, turn], 0, periodic, K_E)
    again = turned.potentials(Sites(r[:3][:, turn], alpha[:3]), Sites(r[:, turn], alpha), q)
    np.testing.assert_allclose(again, phi, atol=2e-5)
