"""Sums over Gaussian cores and shells to rounding, for open, slab and periodic boundaries: numpy and scipy alone.

Every atom i has a core of charge Q_0i at r_i and a shell of charge Q_1i at r_i + Δ_i, both of density ∝ exp(−α_i r²).
Two sites interact through k_e erf(a_ij r)/r with 1/a_ij² = 1/α_i + 1/α_j. Whatever is inside one atom in one image is
left out; every image is counted, those of the atom itself too.

    open      the double sum
    periodic  (4π k_e/V) Σ_{k≠0} exp(−k²/4a_ij²) exp(ik·r)/k²; k = 0 is left out, also in charged cells (tin foil)
    slab      (k_e/A) Σ_G f_G(z) exp(iG·ρ), with z along the normal and ρ in the plane,
              f_G = (π/G) [exp(Gz) erfc(G/2a + az) + exp(−Gz) erfc(G/2a − az)],
              f_0 = −2π [z erf(az) + exp(−a²z²)/(a√π)]

(Parry, Surf. Sci. 49, 433 (1975); Kawata and Mikami, Chem. Phys. Lett. 340, 157 (2001)). Gauge of a charged slab: f_0
tends to −2π|z|. That is the potential of a round patch of radius R with the constant 2πR/A of every charge taken off,
and without a background; it depends on differences of z alone, so no energy depends on the origin.

Narrow Gaussians need many wave vectors. With a splitting β, pairs of two atoms with α > β² are summed as
[erf(a_ij r) − erf(βr)]/r in real space and as Gaussians of inverse width β in reciprocal space; every other pair
keeps its a_ij < β in reciprocal space. No sum has a switch, and each ends where its terms have rounded away, so the
answer does not depend on β (β = ∞: no real space at all); the tests assert that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import erf, erfc, erfcx, gamma, gammainc

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

_DECAY = 38.0  # reciprocal terms are carried to exp(−38) = 3e-17
_REACH = 6.1  # real-space terms are carried to erfc(6.1) = 6e-18
_BLOCK = 2_000_000  # numbers in one array
_ROOT_PI = math.sqrt(math.pi)


def site_sums(
    positions: Array,
    cell: Array | None,
    pbc: tuple[bool, bool, bool],
    alpha: Array,
    charges: Array,
    shells: Array,
    k_e: float,
    *,
    beta: float | None = None,
) -> tuple[float, Array, Array]:
    """Energy, potential and its gradient at the cores and shells.

    Parameters
    ----------
    positions : [n, 3], Å
    cell : [3, 3], Å, rows are lattice vectors (those of open directions are not used); None where all is open
    pbc : periodic along each cell vector; none, two or three
    alpha : [n], Å⁻²
    charges : [2, n], e, of cores and shells
    shells : [n, 3], Å, displacement of a shell from its core
    k_e : eV Å/e²
    beta : 1/Å, splitting of the two sums; None for the cheapest, math.inf for reciprocal space alone

    Returns
    -------
    energy (eV, ½ Σ Q φ), potential [2, n] (V) and gradient [2, n, 3] (V/Å); the force on a site is −Q·gradient
    """
    axes = [bool(p) for p in pbc]
    n = len(positions)
    alpha = np.asarray(alpha, dtype=float)
    sites = np.concatenate([positions, positions + shells])
    q = np.asarray(charges, dtype=float).reshape(-1)
    if sum(axes) == 1:
        raise ValueError("pbc has one periodic direction: give none, two or three")
    if cell is None or not any(axes):
        potential, gradient = _open(sites, alpha, q)
    else:
        vectors = _reduced(np.asarray(cell, dtype=float)[axes])
        if beta is None:
            beta = _cheapest_beta(vectors, alpha)
        reciprocal = _periodic if all(axes) else _slab
        potential, gradient = reciprocal(sites, vectors, alpha, q, beta)
        _add_real_space(potential, gradient, sites, vectors, alpha, q, beta)
        _take_out_own(potential, gradient, sites, alpha, q, beta)
    potential, gradient = k_e * potential, k_e * gradient
    return 0.5 * float(q @ potential), potential.reshape(2, n), gradient.reshape(2, n, 3)


def radial_kernel(r2: Array, a: Array | float) -> tuple[Array, Array]:
    """f = erf(a r)/r and g = −f'/r at squared distances ``r2``, so that ∇f = −g d. Finite at r = 0."""
    a = np.broadcast_to(np.asarray(a, dtype=float), r2.shape)
    t = a * a * r2
    far = np.where(t > 1, r2, 1.0)
    r = np.sqrt(far)
    f = erf(a * r) / r
    g = (f - 2 / _ROOT_PI * a * np.exp(-a * a * far)) / far
    near = t <= 1
    if near.any():
        # 2a/√π F_0(t) and 4a³/√π F_1(t), F_m the Boys function γ(m + ½, t)/(2 t^(m + ½))
        small = np.maximum(t[near], 1e-30)
        boys = [
            np.where(small > 1e-20, gammainc(s, small) * gamma(s) / (2 * small**s), 1 / (2 * s)) for s in (0.5, 1.5)
        ]
        f[near] = 2 / _ROOT_PI * a[near] * boys[0]
        g[near] = 4 / _ROOT_PI * a[near] ** 3 * boys[1]
    return f, g


def _open(sites: Array, alpha: Array, q: Array) -> tuple[Array, Array]:
    n = len(alpha)
    both = np.concatenate([alpha, alpha])
    atom = np.concatenate([np.arange(n)] * 2)
    potential, gradient = np.zeros(2 * n), np.zeros((2 * n, 3))
    for s in _blocks(2 * n, 2 * n):
        d = sites[s, None] - sites[None]
        f, g = radial_kernel((d**2).sum(-1), np.sqrt(both[s, None] * both / (both[s, None] + both)))
        other = atom[s, None] != atom
        potential[s] = (f * other) @ q
        gradient[s] = -np.einsum("st,stx->sx", g * other * q, d)
    return potential, gradient


def _periodic(sites: Array, vectors: Array, alpha: Array, q: Array, beta: float) -> tuple[Array, Array]:
    """Σ_{k≠0}, every image and every own term counted; with what the real-space sum adds at k = 0 taken off.

    Sites that share an α share a form factor; exp(ik·x) is a product over the three axes, so that the sums over the
    last axis are products of matrices.
    """
    both = np.concatenate([alpha, alpha])
    narrow = alpha > beta**2
    volume = abs(np.linalg.det(vectors))
    basis = 2 * math.pi * np.linalg.inv(vectors).T
    k_max = _k_max(alpha, beta)
    reach = [max(1, math.ceil(np.linalg.norm(v) * k_max / (2 * math.pi))) for v in vectors]
    fraction = sites @ basis.T / (2 * math.pi)
    fraction -= np.floor(fraction)
    order = [np.arange(0 if axis == 0 else -m, m + 1) for axis, m in enumerate(reach)]
    phases = [np.exp(2j * math.pi * np.outer(m, s)) for m, s in zip(order, fraction.T, strict=True)]
    rows = np.stack(np.meshgrid(np.arange(reach[0] + 1), np.arange(2 * reach[1] + 1), indexing="ij"), -1).reshape(-1, 2)
    k_rows = order[0][rows[:, 0], None] * basis[0] + order[1][rows[:, 1], None] * basis[1]
    direction = basis[2] / np.linalg.norm(basis[2])
    reached = ((k_rows - np.outer(k_rows @ direction, direction)) ** 2).sum(-1) < k_max**2
    rows, k_rows = rows[reached], k_rows[reached]
    groups = [(a, np.flatnonzero(both == a)) for a in np.unique(alpha)]

    potential, slopes = np.zeros(len(sites)), np.zeros((len(sites), 3))
    last = order[2]
    for block in _blocks(len(rows), max(len(sites), (len(groups) + 4) * len(last))):
        n0, n1 = order[0][rows[block, 0]], order[1][rows[block, 1]]
        k2 = ((k_rows[block, None] + last[:, None] * basis[2]) ** 2).sum(-1)
        zero = (n0 == 0)[:, None] & (n1 == 0)[:, None] & (last == 0)
        weight = np.where(zero, 0, np.where(n0 == 0, 1, 2)[:, None] * 4 * math.pi / (volume * np.where(zero, 1, k2)))
        split = np.exp(-k2 / (8 * beta**2)) if narrow.any() else np.zeros_like(k2)
        row_phase = phases[0][rows[block, 0]] * phases[1][rows[block, 1]]  # [rows, sites]
        wide, narrow_true, narrow_split = (np.zeros(k2.shape, dtype=complex) for _ in range(3))
        for a, members in groups:
            structure = (q[members] * row_phase[:, members]) @ phases[2][:, members].T
            if a > beta**2:
                narrow_true += np.exp(-k2 / (4 * a)) * structure
                narrow_split += split * structure
            else:
                wide += np.exp(-k2 / (4 * a)) * structure
        for a, members in groups:
            true = np.exp(-k2 / (4 * a))
            felt = true * wide + split * narrow_split if a > beta**2 else true * (wide + narrow_true)
            felt = weight * felt.conj()
            here = row_phase[:, members]
            value = here * (felt @ phases[2][:, members])
            along = here * ((felt * last) @ phases[2][:, members])
            potential[members] += value.sum(0).real
            slopes[members] -= np.stack([n0 @ value.imag, n1 @ value.imag, along.imag.sum(0)], axis=-1)
    if narrow.any():
        mine = np.concatenate([narrow, narrow])
        at, inverse = q[mine], 1 / both[mine]
        # ∫ [erf(a r) − erf(βr)]/r = π (1/β² − 1/a²)
        potential[mine] -= math.pi / volume * (at.sum() * (1 / beta**2 - inverse) - (at * inverse).sum())
    return potential, slopes @ basis


def _slab(sites: Array, vectors: Array, alpha: Array, q: Array, beta: float) -> tuple[Array, Array]:
    """Σ_G with G = 0, pair by pair, every image and every own term counted."""
    n = len(alpha)
    normal = np.cross(vectors[0], vectors[1])
    area = float(np.linalg.norm(normal))
    normal /= area
    basis = 2 * math.pi * np.linalg.pinv(vectors).T  # rows are reciprocal vectors, in the plane
    i, j = np.triu_indices(2 * n)
    both = np.concatenate([alpha, alpha])
    a = np.sqrt(both[i] * both[j] / (both[i] + both[j]))
    a[(both[i] > beta**2) & (both[j] > beta**2)] = beta
    narrowest = np.argsort(a)
    i, j, a = i[narrowest], j[narrowest], a[narrowest]
    g_max = 2 * math.sqrt(_DECAY) * a[-1]
    reach = [math.ceil(np.linalg.norm(v) * g_max / (2 * math.pi)) for v in vectors]
    m = np.stack(np.meshgrid(np.arange(reach[0] + 1), np.arange(-reach[1], reach[1] + 1), indexing="ij"), -1)
    m = m.reshape(-1, 2)
    m = m[(m[:, 0] > 0) | (m[:, 1] > 0)]  # half of the plane
    wave = m @ basis
    length = np.linalg.norm(wave, axis=1)
    ascending = np.argsort(length)
    ascending = ascending[length[ascending] < g_max]
    wave, length = wave[ascending], length[ascending]

    potential, gradient = np.zeros(2 * n), np.zeros((2 * n, 3))
    for block in _blocks(len(i), max(1, len(wave))):
        s, t, b = i[block], j[block], a[block]
        d = sites[s] - sites[t]
        z = d @ normal
        value = -2 * math.pi / area * (z * erf(b * z) + np.exp(-((b * z) ** 2)) / (b * _ROOT_PI))
        slope = (-2 * math.pi / area * erf(b * z))[:, None] * normal
        few = int(np.searchsorted(length, 2 * math.sqrt(_DECAY) * b[-1]))
        if few:
            g, b, height = length[:few], b[:, None], np.abs(z)[:, None]
            away = np.exp(-((g / (2 * b)) ** 2) - (b * height) ** 2) * erfcx(g / (2 * b) + b * height)
            back = np.exp(-g * height) * erfc(g / (2 * b) - b * height)
            angle = d @ wave[:few].T
            scale = 2 * math.pi / (area * g)  # G and −G
            value += (scale * np.cos(angle) * (away + back)).sum(1)
            slope -= (scale * np.sin(angle) * (away + back)) @ wave[:few]
            steep = (2 * math.pi / area * np.cos(angle) * (away - back)).sum(1)
            slope += (np.sign(z) * steep)[:, None] * normal
        different = s != t
        np.add.at(potential, s, value * q[t])
        np.add.at(potential, t, np.where(different, value * q[s], 0))
        np.add.at(gradient, s, slope * q[t, None])
        np.add.at(gradient, t, -slope * q[s, None])
    return potential, gradient


def _add_real_space(
    potential: Array, gradient: Array, sites: Array, vectors: Array, alpha: Array, q: Array, beta: float
) -> None:
    """[erf(a_ij r) − erf(βr)]/r for pairs of narrow atoms."""
    n = len(alpha)
    narrow = np.flatnonzero(alpha > beta**2)
    if not len(narrow):
        return
    cores, shells = sites[narrow], sites[n:][narrow] - sites[narrow]
    farthest = float(np.linalg.norm(shells, axis=1).max())
    cutoff = _REACH / min(beta, math.sqrt(alpha[narrow].min() / 2)) + 2 * farthest
    for i, j, vector in _pairs(cores, vectors, cutoff):
        ai, aj = alpha[narrow[i]], alpha[narrow[j]]
        a = np.sqrt(ai * aj / (ai + aj))
        for of_i in (0, 1):
            for of_j in (0, 1):
                d = vector + of_i * shells[i] - of_j * shells[j]
                r2 = (d**2).sum(-1)
                (f, g), (f_long, g_long) = radial_kernel(r2, a), radial_kernel(r2, beta)
                at, other = narrow[i] + of_i * n, q[narrow[j] + of_j * n]
                potential += np.bincount(at, (f - f_long) * other, len(potential))
                pull = -((g - g_long) * other)[:, None] * d
                for x in range(3):
                    gradient[:, x] += np.bincount(at, pull[:, x], len(potential))


def _take_out_own(potential: Array, gradient: Array, sites: Array, alpha: Array, q: Array, beta: float) -> None:
    """Takes off what the reciprocal sum counted inside one atom in one image."""
    n = len(alpha)
    a = np.where(alpha > beta**2, beta, np.sqrt(alpha / 2))
    itself, _ = radial_kernel(np.zeros(n), a)
    d = sites[n:] - sites[:n]
    f, g = radial_kernel((d**2).sum(-1), a)
    core, shell = q[:n], q[n:]
    potential -= np.concatenate([itself * core + f * shell, itself * shell + f * core])
    gradient[:n] -= (g * shell)[:, None] * d
    gradient[n:] += (g * core)[:, None] * d


def _pairs(points: Array, vectors: Array, cutoff: float) -> Iterator[tuple[Array, Array, Array]]:
    """(i, j, x_i − x_j of the image) of all pairs within the cutoff, both ways; blocks of i."""
    basis = np.linalg.pinv(vectors).T
    shift = np.floor(points @ basis.T) @ vectors
    inside = points - shift
    # an image m steps away is at least (|m| − 1) heights away
    reach = [math.floor(cutoff * np.linalg.norm(b)) + 1 for b in basis]
    cells = np.array(list(itertools.product(*(range(-m, m + 1) for m in reach)))) @ vectors
    home = len(cells) // 2
    middle, radius = inside.mean(0), np.linalg.norm(inside - inside.mean(0), axis=1).max()
    near = np.flatnonzero(np.linalg.norm(cells, axis=1) <= cutoff + 2 * radius)
    images = (cells[near, None] + inside).reshape(-1, 3)
    image_cell, image_atom = np.repeat(near, len(points)), np.tile(np.arange(len(points)), len(near))
    close = np.linalg.norm(images - middle, axis=1) <= cutoff + radius
    images, image_cell, image_atom = images[close], image_cell[close], image_atom[close]
    tree = cKDTree(images)
    for block in _blocks(len(points), 30_000):
        found = tree.query_ball_point(inside[block], cutoff)
        i = np.repeat(np.arange(block.start, block.stop), [len(f) for f in found])
        k = np.concatenate([np.asarray(f, dtype=int) for f in found])
        other = (image_atom[k] != i) | (image_cell[k] != home)
        i, k = i[other], k[other]
        yield i, image_atom[k], inside[i] - images[k]


def _reduced(vectors: Array) -> Array:
    """A basis of the same lattice with short vectors."""
    vectors = vectors.copy()
    changed = True
    while changed:
        changed = False
        for i in range(len(vectors)):
            others = np.delete(vectors, i, axis=0)
            nearest = np.round(np.linalg.lstsq(others.T, vectors[i], rcond=None)[0])
            for step in itertools.product((0, 1, -1), repeat=len(others)):
                trial = vectors[i] - (nearest + np.array(step)) @ others
                if trial @ trial < (1 - 1e-9) * (vectors[i] @ vectors[i]):
                    vectors[i], changed = trial, True
    return vectors


def _k_max(alpha: Array, beta: float) -> float:
    """Where exp(−k²/4a²) of the sharpest pair in reciprocal space has decayed."""
    narrow, wide = alpha[alpha > beta**2], alpha[alpha <= beta**2]
    sharpest = [beta**2] if len(narrow) else []
    if len(wide):
        sharpest.append(wide.max() / 2)
        if len(narrow):
            sharpest.append(wide.max() * narrow.max() / (wide.max() + narrow.max()))
    return 2 * math.sqrt(_DECAY * max(sharpest))


def _cheapest_beta(vectors: Array, alpha: Array) -> float:
    """β with the least work, as multiplications: of the sums as they are written, give or take a factor of two."""
    n, extent = len(alpha), math.sqrt(np.linalg.det(vectors @ vectors.T))
    volume = len(vectors) == 3

    def work(beta: float) -> float:
        k_max = _k_max(alpha, beta)
        if volume:
            n_k = extent * k_max**3 / (6 * math.pi**2) + 100
            cost = n_k * (12 * n + 30 * len(np.unique(alpha)))
        else:
            n_k = extent * k_max**2 / (8 * math.pi) + 1
            cost = n_k * 2 * n**2 * 150
        narrow = alpha[alpha > beta**2]
        if len(narrow):
            cutoff = _REACH / min(beta, math.sqrt(narrow.min() / 2))
            images = 4 / 3 * math.pi * cutoff**3 if volume else math.pi * cutoff**2
            cost += len(narrow) * (len(narrow) * images / extent) * 4 * 300
        return cost

    largest = math.sqrt(alpha.max())
    choices = [math.inf, *np.geomspace(0.1 * largest, 0.99 * largest, 24)]
    return min(choices, key=work)


def _blocks(total: int, width: int) -> Iterator[slice]:
    """Slices of ``range(total)``, each with so many rows of ``width`` that an array stays small."""
    step = max(1, _BLOCK // width)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
