"""Electrostatics of the planar average: charge density, field and potential along one direction, without grid error.

A charge q of density ∝ exp(−α r²) at height z_i, averaged over the area A, is a sheet smeared by a Gaussian, so that
all is known in closed form (d = z − z_i, t = √α d; a point is the limit α → ∞):

    charge below z    ½ q (1 + erf t)
    field             E(z) = 2π k_e (q/A) erf t
    potential         φ(z) = −2π k_e (q/A) F_α(d),    F_α(d) = d erf t + exp(−t²)/√(πα)

between open half-spaces (*slab*: periodic in two directions; E is antisymmetric far from the charges, which also holds
for a slab with a net charge). With period L along the direction (*periodic*: tin-foil, neutralised by a uniform
background, ⟨E⟩ = ⟨φ⟩ = 0),

    φ(z) = −2π k_e (q/A) [ |d| − d²/L − L/6 − 1/(2αL) + Σ_n (F_α(d + nL) − |d + nL|) ],   |d| ≤ L/2

These are the k∥ = 0 terms of the sums in two dimensions (A. Grzybowski, E. Gwóźdź, A. Bródka, Phys. Rev. B 61, 6706
(2000)) and of the Ewald sum. A profile takes E and φ at its lower edge from there and goes on bin by bin,

    E_{k+1} = E_k + 4π k_e c_k/A,      φ_{k+1} = φ_k − h E_k − 4π k_e m_k/A

with c_k the charge in bin k and m_k = ∫ρ(z)(z_{k+1} − z)dz over it, both in closed form: the values at bin edges are
exact for any bin width h and charges beyond the profile's ends are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.special import erf

__all__ = [
    "Grid",
    "PlanarProfile",
    "bin_moments",
    "planar_field",
    "planar_potential",
    "planar_profile",
    "smeared_potential",
]

Array = NDArray[np.float64]

_REACH = 5.6  # erfc(5.6) < 3e-15
_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(48)


@dataclass(frozen=True)
class Grid:
    """``n`` bins of width ``h`` (Å) from ``start`` (Å); with ``periodic`` they fill the period."""

    start: float
    h: float
    n: int
    periodic: bool

    @property
    def length(self) -> float:
        """Å."""
        return self.h * self.n

    @property
    def edges(self) -> Array:
        """[n + 1], Å."""
        return self.start + self.h * np.arange(self.n + 1, dtype=np.float64)


@dataclass(frozen=True)
class PlanarProfile:
    """charge [n] in every bin (e/Å²) · field [n + 1] (V/Å) and potential [n + 1] (V) at bin edges."""

    charge: Array
    field: Array
    potential: Array


def bin_moments(grid: Grid, z: Array, charges: Array, alpha: Array) -> tuple[Array, Array]:
    """Charge c [n] (e) in every bin and its moment m [n] (e·Å) about the bin's upper edge.

    ``z`` [k] Å, ``charges`` [k] e, ``alpha`` [k] Å⁻² (inf: points). Charge beyond the ends of an open grid is left out.
    """
    c, m = np.zeros(grid.n), np.zeros(grid.n)
    first = np.floor((z - grid.start) / grid.h).astype(np.int64)
    for value in np.unique(alpha):
        own = alpha == value
        if np.isinf(value):
            index = first[own, None]
            above = grid.start + grid.h * (index + 1) - z[own, None]
            share, moment = np.ones_like(above), above
        else:
            w = int(np.ceil(_REACH / (np.sqrt(value) * grid.h)))
            index = first[own, None] + np.arange(-w, w + 1)
            # at the edges of the bins: half the charge below, less ½, and its integral
            edge = first[own, None] + np.arange(-w, w + 2)
            t = np.sqrt(value) * (grid.start + grid.h * edge - z[own, None])
            below = 0.5 * erf(t)
            integral = 0.5 * (t * 2.0 * below + np.exp(-t * t) / np.sqrt(np.pi)) / np.sqrt(value)
            share = np.diff(below, axis=1)
            moment = np.diff(integral, axis=1) - grid.h * below[:, :-1]
        if grid.periodic:
            index = index % grid.n
        inside = (index >= 0) & (index < grid.n)
        q = np.broadcast_to(charges[own, None], index.shape)[inside]
        c += np.bincount(index[inside], q * share[inside], grid.n)
        m += np.bincount(index[inside], q * moment[inside], grid.n)
    return c, m


def planar_potential(
    at: Array, z: Array, charges: Array, alpha: Array, area: float, k_e: float, period: float | None = None
) -> Array:
    """φ [p] (V) at heights ``at`` [p] of charges [k] at heights ``z`` [k]; ``period`` (Å) None: slab."""
    d = at[:, None] - z
    if period is None:
        shape = _smeared_distance(d, alpha)
    else:
        d = d - period * np.rint(d / period)
        shape = np.abs(d) - d * d / period - period / 6.0 - 0.5 / (alpha * period)
        for n in _images(alpha, period):
            shape += _smeared_distance(d + n * period, alpha) - np.abs(d + n * period)
    return -2.0 * np.pi * k_e / area * (shape @ charges)


def planar_field(
    at: Array, z: Array, charges: Array, alpha: Array, area: float, k_e: float, period: float | None = None
) -> Array:
    """E [p] (V/Å); as ``planar_potential``. Just below a point charge that is at the same height."""
    d = at[:, None] - z
    if period is None:
        shape = _smeared_sign(d, alpha)
    else:
        d = d - period * np.rint(d / period)
        shape = _sign(d) - 2.0 * d / period
        for n in _images(alpha, period):
            shape += _smeared_sign(d + n * period, alpha) - _sign(d + n * period)
    return 2.0 * np.pi * k_e / area * (shape @ charges)


def planar_profile(
    grid: Grid, z: Array, charges: Array, alpha: Array, area: float, k_e: float, applied: float = 0.0
) -> PlanarProfile:
    """The profile of charges [k] at heights ``z`` [k] in a uniform field ``applied`` (V/Å), whose φ is 0 at z = 0.

    Periodic grids are of the period's length, and there ⟨E⟩ = ``applied``.
    """
    c, m = bin_moments(grid, z, charges, alpha)
    period = grid.length if grid.periodic else None
    bottom = np.array([grid.start])
    field = planar_field(bottom, z, charges, alpha, area, k_e, period)[0]
    potential = planar_potential(bottom, z, charges, alpha, area, k_e, period)[0]
    felt, moment = c, m
    if grid.periodic:
        background = charges.sum() / grid.length
        felt, moment = c - background * grid.h, m - 0.5 * background * grid.h**2
    factor = 4.0 * np.pi * k_e / area
    fields = field + factor * np.concatenate([[0.0], np.cumsum(felt)])
    steps = grid.h * fields[:-1] + factor * moment
    potentials = potential - np.concatenate([[0.0], np.cumsum(steps)])
    return PlanarProfile(c / area, fields + applied, potentials - applied * grid.edges)


def smeared_potential(grid: Grid, profile: PlanarProfile, at: Array, alpha: Array, applied: float = 0.0) -> Array:
    """φ [p] (V) of a profile as Gaussians of widths ``alpha`` [p] at heights ``at`` [p] see it.

    Between bin edges the cubic with the exact φ and E there; good where charges are Gaussians no narrower than a bin.
    """
    z = at[:, None] + _NODES / np.sqrt(alpha)[:, None]
    edges = grid.edges
    bare = CubicHermiteSpline(edges, profile.potential + applied * edges, applied - profile.field)
    inside = grid.start + (z - grid.start) % grid.length if grid.periodic else np.clip(z, edges[0], edges[-1])
    values = bare(inside)
    if not grid.periodic:  # beyond the charges the field stays what it is at the end
        values += np.where(z < edges[0], applied - profile.field[0], applied - profile.field[-1]) * (z - inside)
    return values @ _WEIGHTS / np.sqrt(np.pi) - applied * at


def _smeared_distance(d: Array, alpha: Array) -> Array:
    """|d| as a Gaussian sees it, F_α(d)."""
    root = np.sqrt(alpha)
    with np.errstate(invalid="ignore"):  # a point at d = 0
        t = np.where(d == 0.0, 0.0, root * d)
    return d * erf(t) + np.exp(-t * t) / (np.sqrt(np.pi) * root)


def _smeared_sign(d: Array, alpha: Array) -> Array:
    points = np.isinf(alpha)
    return np.where(points, _sign(d), erf(np.where(points, 1.0, np.sqrt(alpha)) * d))


def _sign(d: Array) -> Array:
    return np.where(d > 0.0, 1.0, -1.0)


def _images(alpha: Array, period: float) -> range:
    """Images whose smearing reaches into the cell."""
    reach = _REACH / np.sqrt(alpha.min()) if len(alpha) else 0.0
    n = int(np.ceil(reach / period + 0.5)) if np.isfinite(reach) else 0
    return range(-n, n + 1)
