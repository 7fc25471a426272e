"""Potential at chosen sites from charges as they are: an Ewald sum of its own, to audit what the driver answered.

A charge of density ∝ exp(−α_j r²) seen by a Gaussian probe α_i gives k_e q erf(√α_ij r)/r with 1/α_ij = 1/α_i + 1/α_j.
With a splitting width κ the sum over all images is

    Φ_i = Σ_j k_e q_j [erf(√α_ij r) − erf(κ r)]/r                        short-ranged, summed over images in reach
        + (4π k_e/V) Σ_{k: k∥ ≠ 0} exp(−k²/4κ²)/k² Σ_j q_j cos k·r_ij    waves that vary along the plane
        + planar average of erf(κ r)/r                                  voltpi.analysis.planar, in closed form

In a slab the second line is summed in a cell with a vacuum of its own, long enough for waves that vary along the plane
(they decay as exp(−k∥ z)), and the third line is that of the slab: the sum in two dimensions, also for a net charge.
In a periodic cell the background is uniform and the mean of Φ is 0 for every charge, whatever its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import erf

from voltpi.analysis.planar import planar_potential

__all__ = ["SiteSum", "Sites"]

Array = NDArray[np.float64]

_DIGITS = 16.0  # exp(−16) ≈ 1e-7 of a unit charge's potential
_REACHES = (8.0, 20.0)  # Å, of the first line


@dataclass(frozen=True)
class Sites:
    """Gaussians at ``positions`` [k, 3] (Å) of width ``alpha`` [k] (Å⁻², inf: points)."""

    positions: Array
    alpha: Array


class SiteSum:
    """Sums over the images of one cell.

    ``cell`` [3, 3] (Å, rows) · ``axis``: the cell vector across which profiles are taken · ``periodic``: whether it is
    a period, too (else the slab is open along the normal of the other two) · ``k_e`` eV·Å/e²
    """

    def __init__(self, cell: Array, axis: int, periodic: bool, k_e: float) -> None:
        self.axis, self.periodic, self.k_e = axis, periodic, k_e
        self.cell = np.array(cell, dtype=float)
        across = np.cross(self.cell[(axis + 1) % 3], self.cell[(axis + 2) % 3])
        self.area = float(np.linalg.norm(across))
        self.normal = across / self.area * np.sign(self.cell[axis] @ across or 1.0)
        self.period = float(abs(self.cell[axis] @ self.normal)) if periodic else None

    def potentials(self, targets: Sites, sources: Sites, charges: Array) -> Array:
        """Φ [t] (V) at the targets of all ``charges`` [s] (e); a target that is a source feels itself."""
        cell, kappa, reach = self._split(targets, sources)
        pairs = self._pairs(cell, targets, sources, kappa, reach)
        out = sum(
            np.bincount(i, self.k_e * kernel * charges[j], len(targets.alpha)) for i, j, kernel in pairs
        ) + np.zeros(len(targets.alpha))
        for here, there, weight in self._waves(cell, kappa, targets, sources):
            out += 2.0 * self.k_e * np.real(here.conj() @ (weight * (charges @ there)))
        heights, back = np.unique(np.round(targets.positions @ self.normal, 10), return_inverse=True)
        smooth = np.full(len(charges), kappa**2)
        z = sources.positions @ self.normal
        out += planar_potential(heights, z, charges, smooth, self.area, self.k_e, self.period)[back]
        if self.period is not None:
            means = self._means(kappa, targets, sources)
            out -= self.k_e * np.pi / (self.area * self.period) * (means @ charges)
        return out

    def matrix(self, sites: Sites) -> Array:
        """A [k, k] (V/e): the potential at every site of a unit charge on every other and itself."""
        cell, kappa, reach = self._split(sites, sites)
        n = len(sites.alpha)
        out = np.zeros((n, n))
        for i, j, kernel in self._pairs(cell, sites, sites, kappa, reach):
            np.add.at(out, (i, j), self.k_e * kernel)
        for here, _, weight in self._waves(cell, kappa, sites, sites):
            scaled = here * np.sqrt(2.0 * self.k_e * weight)
            parts = np.concatenate([scaled.real, scaled.imag], axis=1)
            out += parts @ parts.T
        z = sites.positions @ self.normal
        one, smooth = np.ones(1), np.full(1, kappa**2)
        heights, back = np.unique(np.round(z, 10), return_inverse=True)
        planar = [
            planar_potential(heights, np.array([height]), one, smooth, self.area, self.k_e, self.period)
            for height in heights
        ]
        out += np.array(planar)[np.ix_(back, back)]
        if self.period is not None:
            out -= self.k_e * np.pi / (self.area * self.period) * self._means(kappa, sites, sites)
        return out

    def _split(self, targets: Sites, sources: Sites) -> tuple[Array, float, float]:
        """The cell of the waves, κ and the reach of the first line."""
        z = np.concatenate([targets.positions, sources.positions]) @ self.normal
        thickness = max(float(np.ptp(z)), 1.0)
        cell = self.cell.copy()
        if not self.periodic:
            shortest = min(2.0 * np.pi * np.linalg.norm(b) for b in self._in_plane_duals())
            cell[self.axis] = self.normal * (thickness + _DIGITS / shortest)
        volume = abs(float(np.linalg.det(cell)))
        t, s = len(targets.alpha), len(sources.alpha)
        # cost of pairs (100 ns) ~ reach³, of waves (10 ns) ~ reach⁻³
        waves = 10.0 * (s + t) * volume * (2.0 * _DIGITS) ** 3 / 118.0
        near = 100.0 * t * s / (self.area * thickness) * 4.19
        reach = float(np.clip((waves / near) ** (1.0 / 6.0), *_REACHES))
        # wide Gaussians differ from point charges further out
        combined = 1.0 / (1.0 / targets.alpha.min() + 1.0 / sources.alpha.min())
        reach = max(reach, float(np.sqrt(_DIGITS / combined)))
        return cell, float(np.sqrt(_DIGITS)) / reach, reach

    def _in_plane_duals(self) -> list[Array]:
        flat = self.cell.copy()
        flat[self.axis] = self.normal
        dual = np.linalg.inv(flat)
        return [dual[:, d] for d in range(3) if d != self.axis]

    def _pairs(
        self, cell: Array, targets: Sites, sources: Sites, kappa: float, reach: float
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Array]]:
        """Targets, sources and kernels (1/Å) of all pairs of images in reach."""
        inverse = np.linalg.inv(cell)
        margin = reach * np.linalg.norm(inverse, axis=0)
        wrapped = np.array([d != self.axis or self.periodic for d in range(3)])
        here, there = targets.positions @ inverse, sources.positions @ inverse
        here, there = here - np.where(wrapped, np.floor(here), 0.0), there - np.where(wrapped, np.floor(there), 0.0)
        counts = np.where(wrapped, np.ceil(margin).astype(int) + 1, 0)
        shifts = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in counts), indexing="ij"), -1).reshape(-1, 3)
        near: list[Array] = []
        index: list[NDArray[np.int64]] = []
        low, high = here.min(0) - margin, here.max(0) + margin
        for shift in shifts:
            moved = there + shift
            kept = np.flatnonzero(((moved >= low) & (moved <= high)).all(axis=1))
            near.append(moved[kept] @ cell)
            index.append(kept)
        tree, owner = cKDTree(np.concatenate(near)), np.concatenate(index)
        for first in range(0, len(here), 500):
            part = cKDTree(here[first : first + 500] @ cell)
            found = part.sparse_distance_matrix(tree, reach, output_type="ndarray")
            i, j, r = found["i"].astype(np.int64) + first, owner[found["j"]], found["v"]
            width = np.sqrt(1.0 / (1.0 / targets.alpha[i] + 1.0 / sources.alpha[j]))
            with np.errstate(divide="ignore", invalid="ignore"):
                kernel = (erf(width * r) - erf(kappa * r)) / r
            yield i, j, np.where(r < 1e-9, 2.0 / np.sqrt(np.pi) * (width - kappa), kernel)

    def _waves(self, cell: Array, kappa: float, targets: Sites, sources: Sites) -> Iterator[tuple[Array, Array, Array]]:
        """exp(ik·r) of targets [t, m] and sources [s, m] with weights [m] for each half of the k∥ ≠ 0, all k⊥."""
        dual = 2.0 * np.pi * np.linalg.inv(cell).T  # rows
        volume = abs(float(np.linalg.det(cell)))
        largest = 2.0 * kappa * np.sqrt(_DIGITS)
        n = [int(largest * np.linalg.norm(row) / (2.0 * np.pi)) for row in cell]
        u, v, w = (self.axis + 1) % 3, (self.axis + 2) % 3, self.axis
        across = np.arange(-n[w], n[w] + 1)
        phase = {}
        for d in (u, v):
            phase[d] = [np.exp(1j * (x @ dual[d])) for x in (targets.positions, sources.positions)]
        columns = [np.exp(1j * np.outer(x @ dual[w], across)) for x in (targets.positions, sources.positions)]
        for a in range(n[u] + 1):
            for b in range(-n[v] if a else 1, n[v] + 1):
                k = a * dual[u] + b * dual[v] + across[:, None] * dual[w]
                square = (k * k).sum(-1)
                kept = square < largest**2
                if not kept.any():
                    continue
                weight = 4.0 * np.pi / volume * np.exp(-square[kept] / (4.0 * kappa**2)) / square[kept]
                here, there = ((phase[u][i] ** a * phase[v][i] ** b)[:, None] * columns[i][:, kept] for i in range(2))
                yield here, there, weight

    def _means(self, kappa: float, targets: Sites, sources: Sites) -> Array:
        """∫ of the first line's kernel over all space, /π: what its mean over a periodic cell is to be freed of."""
        return 1.0 / kappa**2 - 1.0 / targets.alpha[:, None] - 1.0 / sources.alpha
