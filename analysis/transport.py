"""Mean squared displacements and diffusion coefficients.

    MSD(t) = ⟨|r_i(t0 + t) − r_i(t0)|²⟩ over atoms i and all time origins t0,   D = (1/6) dMSD/dt

by fast Fourier transform over origins (P. Calligari et al., Coll. SFN 12, 201 (2011)), atoms followed through the
cell's faces, the motion of the centre of mass taken out (``voltpi.analysis.trajectory``). The slope is that of a
straight line between two limits, and its error that of X. He, Y. Zhu, A. Epstein, Y. Mo, npj Comput. Mater. 4, 18
(2018): with N ions and a distance a between sites

    N_eff = N max_t MSD(t) / a²,   s(D)/D = 3.43 / √N_eff + 0.04

from the effective number of hops, for a fit from where MSD > a²/2 (beyond vibrations and ballistic motion) up to half
of the trajectory. The two numbers were fitted to simulations of solid electrolytes. The scatter of D over x, y and z, a
second estimate where the material is isotropic, stands beside it.

In a cubic periodic cell of edge L, D of a liquid is too small by k_B T ξ / (6π η L), ξ = 2.837297 (B. Dünweg, K.
Kremer, J. Chem. Phys. 99, 6983 (1993); I.-C. Yeh, G. Hummer, J. Phys. Chem. B 108, 15873 (2004)), added when the
viscosity η is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, NDArray
from scipy import constants
from scipy.fft import next_fast_len

from voltpi.analysis.molecules import is_network, molecules_of, whole
from voltpi.analysis.runs import Run
from voltpi.analysis.spectra_series import temperature_of
from voltpi.analysis.statistics import linear_fit
from voltpi.analysis.trajectory import Unwrapped, unwrapped
from voltpi.potential.errors import InputError

__all__ = ["Diffusion", "Mover", "Species", "diffusion_of", "mean_squared_displacement", "movers_of", "species_of"]

Array = NDArray[np.float64]

_CM2_PER_S = 0.1  # in 1 Å²/fs
_YEH_HUMMER = 2.837297
_FEW_HOPS = 40.0  # below them the relative error is above 0.58
_BATCH = 2**24  # numbers in one Fourier transform


def mean_squared_displacement(positions: ArrayLike) -> Array:
    """MSD [f, 3] by direction of each lag, averaged over origins and over particles of ``positions`` [f, n, 3]."""
    r = np.asarray(positions, dtype=float)
    f, n = r.shape[:2]
    if n == 0:
        raise ValueError("a mean squared displacement needs at least one particle")
    size = next_fast_len(2 * f - 1, real=True)
    total = np.zeros((f, 3))
    batch = max(1, _BATCH // (3 * size))
    for start in range(0, n, batch):
        x = r[:, start : start + batch]
        x = x - x.mean(axis=0)  # or squares of large numbers would be subtracted
        spectrum = np.abs(np.fft.rfft(x, size, axis=0)) ** 2
        product = np.fft.irfft(spectrum.sum(axis=1), size, axis=0)[:f]  # Σ_t0 x(t0)·x(t0 + t)
        squares = (x**2).sum(axis=1)
        # Σ_t0 x²(t0) + x²(t0 + t), origins for which both exist
        both = np.cumsum(squares, axis=0)[::-1] + np.cumsum(squares[::-1], axis=0)[::-1]
        total += both - 2.0 * product
    total[0] = 0.0
    return np.maximum(total, 0.0) / (n * np.arange(f, 0, -1)[:, None])


@dataclass(frozen=True)
class Species:
    """Particles of one kind: the ``atoms`` [n, k] of each of them, whose centre of mass moves, and their name."""

    name: str
    atoms: NDArray[np.int64]


def species_of(first: Atoms, by: Literal["auto", "element", "molecule"] = "auto") -> list[Species]:
    """Elements, or molecules by formula; ``auto``: molecules unless bonds run through the whole crystal.

    Dummies (the particle of a potentiostat) are left out. Raises InputError for molecules of a network.
    """
    real = first.numbers > 0
    if by == "auto":
        by = "element" if is_network(first) else "molecule"
    elif by == "molecule" and is_network(first):
        raise InputError("bonds run through the whole crystal, which has no molecules: give --by element")
    if by == "element":
        symbols = np.array(first.symbols)
        return [
            Species(name, np.flatnonzero(real & (symbols == name))[:, None])
            for name in dict.fromkeys(symbols[real].tolist())
        ]
    labels = molecules_of(first)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    kinds: dict[str, list[NDArray[np.int64]]] = {}
    for atoms in members:
        if real[atoms].all():
            kinds.setdefault(first[atoms].get_chemical_formula("hill"), []).append(atoms)
    return [Species(name, np.array(atoms)) for name, atoms in kinds.items()]


@dataclass(frozen=True)
class Mover:
    """A kind of particles and where they are: positions [f, n, 3] Å of their centres of mass."""

    species: Species
    positions: Array


def movers_of(path: Unwrapped, by: Literal["auto", "element", "molecule"] = "auto") -> list[Mover]:
    """Centres of mass of all kinds that move, less the drift of the whole."""
    positions = path.without_drift()
    # molecules are one piece from the first frame on
    together = positions + (whole(path.first) - path.first.positions)
    masses = path.first.get_masses()
    movers = []
    for species in species_of(path.first, by):
        if path.still[species.atoms].all():
            continue
        weights = masses[species.atoms] / masses[species.atoms].sum(axis=1, keepdims=True)
        if species.atoms.shape[1] == 1:
            movers.append(Mover(species, positions[:, species.atoms[:, 0]]))
        else:
            movers.append(Mover(species, np.einsum("fnkd,nk->fnd", together[:, species.atoms], weights)))
    if not movers:
        raise InputError("no atom moves in this run; give a run of dynamics")
    return movers


@dataclass(frozen=True)
class Diffusion:
    """MSD and D of one kind of particles.

    n · lags [l] fs · msd [l, 3] Å² by direction · fitted: from and to, fs, None without a line · d, d_axes: cm²/s, nan
    without · hops: N_eff · relative_error: of the model · correction: what Yeh and Hummer add, cm²/s
    """

    name: str
    n: int
    lags: Array
    msd: Array
    fitted: tuple[float, float] | None
    d: float
    d_axes: Array
    hops: float
    correction: float = 0.0

    @property
    def relative_error(self) -> float:
        """s(D)/D = 3.43/√N_eff + 0.04."""
        return 3.43 / np.sqrt(self.hops) + 0.04 if self.hops > 0 else np.inf

    @property
    def error(self) -> float:
        """Of D, cm²/s."""
        return self.d * self.relative_error

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        known = self.fitted is not None
        return {
            "particles": self.n,
            "D_cm2_per_s": self.d,
            "D_error_cm2_per_s": self.error,
            "D_axes_cm2_per_s": self.d_axes.tolist(),
            "D_error_from_axes_cm2_per_s": float(self.d_axes.std(ddof=1) / np.sqrt(3.0)) if known else None,
            "finite_size_correction_cm2_per_s": self.correction,
            "effective_hops": self.hops,
            "fit_from_ps": self.fitted[0] / 1000.0 if self.fitted else None,
            "fit_to_ps": self.fitted[1] / 1000.0 if self.fitted else None,
            "msd_max_A2": float(self.msd.sum(axis=1).max()),
        }

    def report(self) -> str:
        """A line for a person."""
        if self.fitted is None:
            top = float(self.msd.sum(axis=1).max())
            return f"{self.name:<6} no diffusion to be seen: MSD reaches {top:.2g} Å², less than the line needs"
        few = f" (a guess: {self.hops:.0f} hops)" if self.hops < _FEW_HOPS else f" ({self.hops:.0f} hops)"
        line = f"{self.name:<6} D = ({self.d * 1e5:.3g} ± {self.error * 1e5:.2g})·10⁻⁵ cm²/s{few}"
        if self.correction:
            line += f", {(self.d + self.correction) * 1e5:.3g}·10⁻⁵ cm²/s in an infinite cell"
        return f"{line}, line from {self.fitted[0] / 1000:.2g} to {self.fitted[1] / 1000:.3g} ps"


def diffusion_of(
    run: Run,
    *,
    skip: float = 0.0,
    by: Literal["auto", "element", "molecule"] = "element",
    hop: float = 3.0,
    upper: float = 0.5,
    viscosity: float | None = None,
    temperature: float | None = None,
) -> list[Diffusion]:
    """D of every kind of particles of a run that moves.

    ``hop`` (Å): distance a between sites, also the size of what is left out at the start (a²/2); ``upper``: up to which
    share of the trajectory the line goes; ``viscosity`` (mPa·s): adds the finite-size correction, which takes
    ``temperature`` (K; else as ``temperature_of`` finds it). Raises InputError for numbers without meaning.
    """
    if not hop > 0.0:
        raise InputError(f"hop is {hop:g} Å: give the distance between sites, above zero")
    if not 0.0 < upper <= 1.0:
        raise InputError(f"upper is {upper:g}: give the share of the trajectory that the line goes up to, such as 0.5")
    path = unwrapped(run, skip)
    correction = 0.0
    if viscosity is not None:
        correction = _finite_size(path, viscosity, temperature_of(run, skip, temperature))
    movers = movers_of(path, by)
    return [diffusion(m.species.name, m.positions, path.spacing, hop, upper, correction) for m in movers]


def diffusion(
    name: str, positions: Array, spacing: float, hop: float = 3.0, upper: float = 0.5, correction: float = 0.0
) -> Diffusion:
    """D of particles at ``positions`` [f, n, 3] Å, frames ``spacing`` fs apart; see ``diffusion_of``."""
    axes = mean_squared_displacement(positions)
    msd = axes.sum(axis=1)
    lags: Array = spacing * np.arange(len(msd), dtype=float)
    hops = positions.shape[1] * float(msd.max()) / hop**2
    last = int(upper * (len(msd) - 1))
    beyond = np.flatnonzero(msd[: last + 1] > 0.5 * hop**2)
    first = int(beyond[0]) if len(beyond) else last
    # as in the authors' program, the line must rise by another a²/2
    if last - first < 2 or msd[last] - msd[first] < 0.5 * hop**2:
        return Diffusion(name, positions.shape[1], lags, axes, None, np.nan, np.full(3, np.nan), hops)
    window = slice(first, last + 1)
    slopes = np.array([linear_fit(lags[window], axes[window, k]).slope for k in range(3)])
    d_axes = 0.5 * slopes * _CM2_PER_S
    fitted = (float(lags[first]), float(lags[last]))
    return Diffusion(name, positions.shape[1], lags, axes, fitted, float(d_axes.mean()), d_axes, hops, correction)


def _finite_size(path: Unwrapped, viscosity: float, temperature: float) -> float:
    """cm²/s. Raises InputError for a cell that is not cubic."""
    if not viscosity > 0.0:
        raise InputError(f"viscosity is {viscosity:g}: give it in mPa·s, above zero")
    edges = np.linalg.norm(path.cell, axis=1)
    metric = path.cell @ path.cell.T
    if not np.allclose(metric, np.eye(3) * edges.mean() ** 2, atol=1e-3 * edges.mean() ** 2):
        raise InputError("viscosity: the finite-size correction is known for cubic cells, and this one is not cubic")
    length = edges.mean() * constants.angstrom
    return float(constants.k * temperature * _YEH_HUMMER / (6 * np.pi * viscosity * 1e-3 * length) * 1e4)
