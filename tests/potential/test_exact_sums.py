"""The exact sums against a Madelung constant, sums written by hand, direct lattice sums and their own derivatives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import erf, erfc, j0

from brute_force import K_E, BruteForce
from exact_sums import radial_kernel, site_sums

NACL_MADELUNG = 1.74756459463318219064  # Borwein et al., Lattice Sums Then and Now (2013)
CELLS = {
    "cubic": np.diag([6.0, 6.0, 6.0]),
    "triclinic": np.array([[6.0, 0.0, 0.0], [4.5, 2.6, 0.0], [4.2, 1.3, 2.9]]),
    "left-handed, long": np.array([[0.2, 2.5, 0.0], [2.4, 0.1, 0.0], [0.0, 0.3, 25.0]]),
    "flat": np.array([[14.0, 0.0, 0.0], [1.0, 13.0, 0.0], [0.1, 0.2, 1.1]]),
}
WIDE_AND_NARROW = np.array([1.7, 0.03, 0.5, 18.0, 0.1, 4.0])
SLAB, PERIODIC, OPEN = (True, True, False), (True, True, True), (False, False, False)


def sites(alpha, cell, net=None, seed=0):
    """Positions, charges [2, n] with any net charge or the one given, shells."""
    rng = np.random.default_rng(seed)
    n = len(alpha)
    q = rng.normal(0, 0.5, n)
    if net is not None:
        q += (net - q.sum()) / n
    return rng.random((n, 3)) @ cell, np.stack([q + 1, -np.ones(n)]), rng.normal(0, 0.03, (n, 3))


@pytest.mark.parametrize("a", [0.1, 1.0, 4.0])
def test_radial_kernel(a):
    r = np.geomspace(0.05, 40, 300)
    f, g = radial_kernel(r**2, a)
    assert np.allclose(f, erf(a * r) / r, rtol=1e-13)
    h = 1e-4 * r
    slope = (erf(a * (r + h)) / (r + h) - erf(a * (r - h)) / (r - h)) / (2 * h)
    assert np.allclose(g, -slope / r, rtol=1e-6, atol=1e-9 * a**3)
    at_zero = radial_kernel(np.array([0.0, 1e-24, 1e-12]), a)
    assert np.allclose(at_zero[0], 2 * a / math.sqrt(math.pi), rtol=1e-10)
    assert np.allclose(at_zero[1], 4 * a**3 / (3 * math.sqrt(math.pi)), rtol=1e-10)


def test_madelung_constant_of_rock_salt():
    d = 2.82
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    q = (-1.0) ** corners.sum(1)
    # almost points: erfc(a d) = 1e-34 for α = 20
    charges = np.stack([0.3 * q, 0.7 * q])
    energy, potential, gradient = site_sums(
        d * corners, 2 * d * np.eye(3), PERIODIC, np.full(8, 20.0), charges, np.zeros((8, 3)), K_E
    )
    assert energy == pytest.approx(-8 * K_E * NACL_MADELUNG / (2 * d), rel=1e-13)
    assert potential == pytest.approx(np.tile(-K_E * NACL_MADELUNG / d * q, (2, 1)), rel=1e-13)
    assert np.abs(gradient).max() < 1e-12


def test_open_sum_by_hand():
    alpha = np.array([1.7, 0.03, 0.5])
    r, q, shells = sites(alpha, CELLS["cubic"])
    energy, potential, gradient = site_sums(r, None, OPEN, alpha, q, shells, K_E)
    place = [r, r + shells]
    expected, total = np.zeros((2, 3)), 0.0
    for i, j in itertools.permutations(range(3), 2):
        a = math.sqrt(1 / (1 / alpha[i] + 1 / alpha[j]))
        for s, t in itertools.product((0, 1), repeat=2):
            distance = math.dist(place[s][i], place[t][j])
            expected[s, i] += K_E * q[t, j] * math.erf(a * distance) / distance
            total += 0.5 * K_E * q[s, i] * q[t, j] * math.erf(a * distance) / distance
    assert potential == pytest.approx(expected, rel=1e-13)
    assert energy == pytest.approx(total, rel=1e-13)
    assert np.abs((q[..., None] * gradient).sum((0, 1))).max() < 1e-13


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("boundary", [PERIODIC, SLAB, (True, False, True)], ids=["periodic", "slab", "slab xz"])
def test_does_not_depend_on_the_splitting(name, boundary):
    r, q, shells = sites(WIDE_AND_NARROW, CELLS[name])
    answers = [
        site_sums(r, CELLS[name], boundary, WIDE_AND_NARROW, q, shells, K_E, beta=beta)
        for beta in (math.inf, 2.5, 1.1, 0.5, 0.25, None)
    ]
    for energy, potential, gradient in answers[1:]:
        assert energy == pytest.approx(answers[0][0], rel=1e-12)
        assert np.abs(potential - answers[0][1]).max() < 1e-12 * np.abs(potential).max()
        assert np.abs(gradient - answers[0][2]).max() < 1e-12 * np.abs(gradient).max()


@pytest.mark.parametrize("name", CELLS)
def test_agrees_with_the_brute_force_model(name):
    alpha = np.array([1.7, 0.03, 0.5])
    r, q, shells = sites(alpha, CELLS[name])
    radius = np.sqrt(0.5 * 0.462770 / alpha)
    zero = np.zeros(3)
    model = BruteForce(r, CELLS[name], zero, zero, -q[1], radius, zero, zero, "none")
    energy, g_q, g_shell, forces = model(q.sum(0), shells)
    ours, potential, gradient = site_sums(r, CELLS[name], PERIODIC, alpha, q, shells, K_E)
    assert ours == pytest.approx(energy, rel=1e-11)
    assert potential[0] == pytest.approx(g_q, rel=1e-11)
    assert np.abs(q[1][:, None] * gradient[1] - g_shell).max() < 1e-12 * np.abs(gradient).max()
    assert np.abs(-(q[..., None] * gradient).sum(0) - forces).max() < 1e-12 * np.abs(gradient).max()


@pytest.mark.parametrize("boundary", [OPEN, SLAB, PERIODIC], ids=["open", "slab", "periodic"])
def test_potential_and_force_are_derivatives_of_the_energy(boundary):
    cell = CELLS["triclinic"]
    r, q, shells = sites(WIDE_AND_NARROW, cell)

    def energy(dr=0.0, dshells=0.0, dq=0.0):
        return site_sums(r + dr, cell, boundary, WIDE_AND_NARROW, q + dq, shells + dshells, K_E)[0]

    _, potential, gradient = site_sums(r, cell, boundary, WIDE_AND_NARROW, q, shells, K_E)
    h, scale = 1e-4, np.abs(gradient).max()
    for i, x in itertools.product(range(len(r)), range(3)):
        step = np.zeros_like(r)
        step[i, x] = h
        atom = (energy(dr=step) - energy(dr=-step)) / (2 * h)
        shell = (energy(dshells=step) - energy(dshells=-step)) / (2 * h)
        assert atom == pytest.approx((q[:, i] * gradient[:, i, x]).sum(), abs=1e-7 * scale)
        assert shell == pytest.approx(q[1, i] * gradient[1, i, x], abs=1e-7 * scale)
    for s, i in itertools.product(range(2), range(len(r))):
        step = np.zeros_like(q)
        step[s, i] = 0.5  # the energy is quadratic in the charges
        assert energy(dq=step) - energy(dq=-step) == pytest.approx(potential[s, i], rel=1e-11)


@pytest.mark.parametrize("boundary", [SLAB, PERIODIC], ids=["slab", "periodic"])
def test_depends_on_the_lattice_alone(boundary):
    cell = CELLS["triclinic"]
    r, q, shells = sites(WIDE_AND_NARROW, cell)
    reference = site_sums(r, cell, boundary, WIDE_AND_NARROW, q, shells, K_E)
    other = np.array([[1, 3, 0], [0, 1, 0], [0, 0, 1]]) @ cell
    if boundary == PERIODIC:
        other = np.array([[1, 0, 0], [0, 1, 0], [2, -5, 1]]) @ other
    rng = np.random.default_rng(1)
    moved = r + rng.integers(-3, 4, r.shape) * np.array(boundary) @ cell + [0.7, -11.3, 2.9]
    again = site_sums(moved, other, boundary, WIDE_AND_NARROW, q, shells, K_E)
    doubled = site_sums(
        np.concatenate([r, r + cell[0]]), cell * [[2], [1], [1]], boundary, np.tile(WIDE_AND_NARROW, 2),
        np.tile(q, (1, 2)), np.tile(shells, (2, 1)), K_E,
    )  # fmt: skip
    # a charged slab too: its energy does not depend on the origin, and is twice that of half the cell
    assert again[0] == pytest.approx(reference[0], rel=1e-12)
    assert doubled[0] == pytest.approx(2 * reference[0], rel=1e-12)
    for answer in (again, doubled):
        assert np.abs(answer[1][:, :6] - reference[1]).max() < 1e-12 * np.abs(reference[1]).max()
        assert np.abs(answer[2][:, :6] - reference[2]).max() < 1e-12 * np.abs(reference[2]).max()


@pytest.mark.parametrize("z", [0.0, 0.4, -1.3, 6.0])
@pytest.mark.parametrize("a", [0.3, 1.2])
def test_two_dimensional_transform_of_the_kernel(a, z):
    """∫ exp(iG·ρ) erf(ar)/r over the plane, as (2π/G) exp(−G|z|) less the transform of erfc(ar)/r, by quadrature."""
    for g in (0.5, 2.0):
        short = quad(
            lambda r, g=g: 2 * math.pi * j0(g * math.sqrt(max(0.0, r * r - z * z))) * erfc(a * r),
            abs(z), abs(z) + 7 / a, epsabs=1e-13, epsrel=1e-12, limit=500,
        )[0]  # fmt: skip
        numeric = 2 * math.pi / g * math.exp(-g * abs(z)) - short
        closed = math.exp(g * z) * erfc(g / (2 * a) + a * z) + math.exp(-g * z) * erfc(g / (2 * a) - a * z)
        assert math.pi / g * closed == pytest.approx(numeric, abs=1e-10)


@pytest.mark.parametrize(
    "cell",
    [np.diag([5.0, 5.0, 1.0]), np.array([[3.0, 4.0, 1.0], [-4.5, 2.0, 0.5], [0.0, 0.0, 0.0]])],
    ids=["square", "oblique, tilted"],
)
def test_slab_is_the_limit_of_a_direct_lattice_sum(cell):
    """A growing patch of whole cells.

    Around a neutral cell an image at distance T counts as T⁻³, so a patch of M cells to each side is off by a series
    in odd powers of 1/(M + ½), which five patches eliminate.
    """
    alpha = np.array([1.7, 0.2, 0.5, 1.0])
    r, q, shells = sites(alpha, np.diag([4.0, 4.0, 4.0]), net=0.0)
    place = np.stack([r, r + shells])
    a = np.sqrt(alpha[:, None] * alpha / (alpha[:, None] + alpha))
    own = np.eye(4, dtype=bool)
    d = place[:, :, None, None] - place[None, None]  # [site, atom, site, atom, 3]

    def ring(m):
        """The images exactly m cells away."""
        steps = np.array([s for s in itertools.product(range(-m, m + 1), repeat=2) if max(np.abs(s)) == m])
        potential = np.zeros((2, 4))
        for shift in steps @ cell[:2]:
            distance = np.linalg.norm(d - shift, axis=-1)
            hidden = own[None, :, None, :] & (m == 0)
            distance = np.where(hidden, 1.0, distance)
            potential += np.einsum("siuj,uj->si", np.where(hidden, 0, erf(a[:, None] * distance) / distance), q)
        return K_E * potential

    sizes = [12, 16, 20, 24, 30]
    sums = np.cumsum([ring(m) for m in range(sizes[-1] + 1)], axis=0)[sizes]
    powers = np.array([[1.0, *((m + 0.5) ** -p for p in (1, 3, 5, 7))] for m in sizes])
    limit = np.linalg.solve(powers, sums.reshape(len(sizes), -1))[0].reshape(2, 4)
    _, potential, _ = site_sums(r, cell, SLAB, alpha, q, shells, K_E)
    assert np.abs(sums[-1] - potential).max() > 1e-3  # without the extrapolation
    assert potential == pytest.approx(limit, abs=2e-8)


@pytest.mark.parametrize("net", [0.0, 1.0], ids=["neutral", "charged"])
def test_slab_is_the_periodic_sum_with_vacuum_and_its_correction(net):
    """Yeh and Berkowitz, J. Chem. Phys. 111, 3155 (1999), pair by pair, so that it holds for charged slabs too.

    The waves along the normal sum to (2π/V) (z² − L|z| + L²/6) for two charges; the slab has −(2π/V) L|z|. A Gaussian
    pair has z² + 1/2a² for z².
    """
    alpha = WIDE_AND_NARROW
    plane = np.array([[3.0, 2.0, 0.0], [-1.0, 3.5, 0.0], [0.0, 0.0, 4.0]])
    r, q, shells = sites(alpha, plane, net=net)
    exact = site_sums(r, plane, SLAB, alpha, q, shells, K_E)
    z = np.stack([r, r + shells])[..., 2]
    spread = 0.5 * (1 / alpha[:, None] + 1 / alpha)  # 1/2a² of every pair of atoms
    errors = []
    for length in (15.0, 50.0):
        cell = plane.copy()
        cell[2] = [0.7, 0.1, length]  # a tilt changes nothing: images along it are far away
        volume = abs(np.linalg.det(cell))
        _, potential, gradient = site_sums(r, cell, PERIODIC, alpha, q, shells, K_E)
        apart = z[:, :, None, None] - z[None, None]
        pair = apart**2 + spread[:, None, :] + length**2 / 6
        potential = potential - 2 * math.pi * K_E / volume * np.einsum("siuj,uj->si", pair, q)
        gradient[..., 2] -= 4 * math.pi * K_E / volume * np.einsum("siuj,uj->si", apart, q)
        energy = 0.5 * (q * potential).sum()
        errors.append(
            max(
                abs(energy - exact[0]) / abs(exact[0]),
                np.abs(potential - exact[1]).max() / np.abs(exact[1]).max(),
                np.abs(gradient - exact[2]).max() / np.abs(exact[2]).max(),
            )
        )
    assert errors[0] > 1e-9
    assert errors[1] < 2e-12


def test_two_charged_sheets_make_a_plate_capacitor():
    """Far apart, E = 2πk_e σ² A d and the field between the sheets is 4πk_e σ, whatever the lattice of the charges."""
    cell, d, alpha = np.diag([2.0, 2.0, 1.0]), 24.0, np.array([0.5, 0.5])
    r = np.array([[0.0, 0.0, 0.0], [0.3, 0.9, d]])
    probe_r, probe_alpha = np.concatenate([r, [[1.0, 0.4, d / 2]]]), np.append(alpha, 1.0)
    q = np.array([[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    energies = [
        site_sums(r + np.outer([0, 1], [0, 0, x]), cell, SLAB, alpha, q[:, :2], np.zeros((2, 3)), K_E)[0]
        for x in (0, 1)
    ]
    sigma = 0.5 / 4.0
    assert energies[1] - energies[0] == pytest.approx(2 * math.pi * K_E * sigma**2 * 4.0, rel=1e-12)
    _, _, gradient = site_sums(probe_r, cell, SLAB, probe_alpha, q, np.zeros((3, 3)), K_E)
    # the waves of the lattice have died away to exp(−2π/2 · 12), the overlap of the Gaussians to erfc(0.58 · 12)
    assert gradient[0, 2] == pytest.approx([0, 0, -4 * math.pi * K_E * sigma], abs=1e-12)


def test_one_periodic_direction_is_refused():
    with pytest.raises(ValueError, match="one periodic direction"):
        site_sums(np.zeros((1, 3)), np.eye(3), (True, False, False), np.ones(1), np.ones((2, 1)), np.zeros((1, 3)), K_E)
