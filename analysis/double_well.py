"""Electric energy U(D) of a crystal from its internal field ε(D): double wells, barriers, spontaneous polarization.

At constant displacement ∂U/∂D = Vε/4πk_e, with ε = D − 4πk_e P the field inside (M. Stengel, N. A. Spaldin,
D. Vanderbilt, Nat. Phys. 5, 304 (2009)); at a temperature the same holds for the free energy and ⟨ε⟩ (thermodynamic
integration). So from runs at several D, or one in which D rises slowly,

    U(D) − U(D₀) = (4πk_e)⁻¹ ∫ ⟨Vε⟩ dD

along the one axis on which they differ, by a cubic spline through the points (straight lines for fewer than four), or
by a polynomial of a ``degree`` fitted to them, weighted with their errors, where these are large.
Where ε = 0, D = 4πk_e P: a minimum of U with dε/dD > 0 is a stable polarization, P_s, with 1/ε_r = dε/dD, and a maximum
with dε/dD < 0, which no run at constant field could show, the barrier between two. Either curve is linear in the
fields, so that their errors are carried on exactly, and to first order to the places where it vanishes. ``symmetric``
adds U(−D) = U(D), as of a crystal with a centre of inversion at P = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, PPoly, make_interp_spline

from voltpi.analysis.dielectric import FOUR_PI_K_E
from voltpi.analysis.hysteresis import field_series
from voltpi.analysis.polarization import E_PER_A2
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import mean_with_error, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["DoubleWell", "Points", "Stationary", "double_well", "points_of"]

Array = NDArray[np.float64]

_GRID = 400


@dataclass(frozen=True)
class Points:
    """Mean fields at constant D.

    control, field, error [n, 3] V/Å (errors nan where there are none), ε weighted with V/⟨V⟩ · volume [n] Å³
    """

    control: Array
    field: Array
    error: Array
    volume: Array


@dataclass(frozen=True)
class Stationary:
    """Where ε = 0: D (V/Å) with its error, P (e/Å²), dε/dD with its error, U (eV per cell)."""

    displacement: float
    displacement_error: float
    slope: float
    slope_error: float
    energy: float

    @property
    def polarization(self) -> float:
        """e/Å²."""
        return self.displacement / FOUR_PI_K_E

    @property
    def stable(self) -> bool:
        """Whether U has a minimum there."""
        return self.slope > 0.0


@dataclass(frozen=True)
class DoubleWell:
    """ε and U along ``axis`` [3].

    displacement, field, error [n] V/Å: the points · grid [g], grid_field V/Å, grid_energy, grid_error eV per cell, from
    the lowest minimum (or end) · stationary, by D · barrier eV with its error: of the highest maximum between
    minima above the lower of its neighbours, nan: none · volume Å³
    """

    axis: Array
    displacement: Array
    field: Array
    error: Array
    grid: Array
    grid_field: Array
    grid_energy: Array
    grid_error: Array
    stationary: tuple[Stationary, ...]
    barrier: float
    barrier_error: float
    volume: float

    @property
    def spontaneous(self) -> tuple[float, float]:
        """|P_s| (e/Å²) of the minimum farthest out, with its error; nan without one."""
        minima = [s for s in self.stationary if s.stable]
        if not minima:
            return float("nan"), float("nan")
        best = max(minima, key=lambda s: abs(s.displacement))
        return abs(best.polarization), best.displacement_error / FOUR_PI_K_E

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        value, error = self.spontaneous
        return {
            "axis": self.axis.tolist(),
            "displacement_V_per_A": self.displacement.tolist(),
            "field_V_per_A": self.field.tolist(),
            "field_error_V_per_A": self.error.tolist(),
            "volume_A3": self.volume,
            "stationary": [
                {
                    "displacement_V_per_A": s.displacement,
                    "displacement_error_V_per_A": s.displacement_error,
                    "polarization_C_per_m2": s.polarization * E_PER_A2,
                    "kind": "minimum" if s.stable else "maximum",
                    "inverse_permittivity": s.slope,
                    "inverse_permittivity_error": s.slope_error,
                    "energy_eV": s.energy,
                }
                for s in self.stationary
            ],
            "spontaneous_polarization_C_per_m2": value * E_PER_A2,
            "spontaneous_polarization_error_C_per_m2": error * E_PER_A2,
            "barrier_eV_per_cell": self.barrier,
            "barrier_error_eV_per_cell": self.barrier_error,
            "barrier_eV_per_A3": self.barrier / self.volume,
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        lines = []
        for s in self.stationary:
            what = "minimum" if s.stable else "maximum"
            place = plus_minus(s.displacement, s.displacement_error, ".4f")
            slope = plus_minus(s.slope, s.slope_error, ".4f")
            lines.append(
                f"{what} of U  D = {place} V/Å, P = {s.polarization * E_PER_A2:.4f} C/m², dε/dD = 1/ε_r = {slope}, "
                f"U = {s.energy * 1000.0:.3f} meV per cell"
            )
        if not lines:
            lines.append("the field does not vanish between the points: go on to larger |D|")
        if np.isfinite(self.barrier) and not self.barrier > 2.0 * self.barrier_error:
            lines.append(
                "the barrier below is not beyond its error: are both wells within the range of D (or --symmetric), and "
                "the runs long enough?"
            )
        elif len(self.stationary) > 3:
            lines.append("more than two minima: noise of short runs, or --bins too many; trust no barrier")
        if np.isfinite(self.barrier):
            scaled = plus_minus(self.barrier * 1000.0, self.barrier_error * 1000.0, ".3f")
            lines.append(f"barrier       {scaled} meV per cell of {self.volume:.2f} Å³")
            value, error = self.spontaneous
            lines.append(f"spontaneous P {plus_minus(value * E_PER_A2, error * E_PER_A2, '.4f')} C/m²")
        elif lines and self.stationary:
            lines.append("no barrier between two minima")
        return lines

    def table(self) -> tuple[list[str], Array]:
        """Header and one row for every place of the grid."""
        header = ["displacement_V_per_A", "field_V_per_A", "energy_eV", "energy_error_eV"]
        return header, np.column_stack([self.grid, self.grid_field, self.grid_energy, self.grid_error])


def points_of(run: Run, skip: float = 0.0, *, relaxed: bool = False, bins: int = 20) -> Points:
    """⟨ε⟩ of a run at constant D, or of ``bins`` intervals of D where D changes with time.

    ``relaxed``: the last record alone, of a relaxation. Raises InputError where no displacement is held.
    """
    applied = run.applied
    if not applied.held.any():
        raise InputError(f"{run.folder}: has no displacement ({applied}); give runs at constant D")
    series = field_series(run, skip)
    weight = series.volume / series.volume.mean()
    field = series.field * weight[:, None]
    d = np.where(applied.held, series.displacement, series.field)
    if relaxed:
        return Points(d[-1:], series.field[-1:], np.full((1, 3), np.nan), series.volume[-1:])
    if not applied.changing.any():
        groups = [np.arange(len(d))]
        places = applied.control[None]
    else:
        moving = d[:, int(np.ptp(np.where(applied.changing, d, 0.0), axis=0).argmax())]
        edges = np.linspace(moving.min(), moving.max(), bins + 1)
        labels = np.clip(np.searchsorted(edges, moving, side="right") - 1, 0, bins - 1)
        groups = [found for found in (np.flatnonzero(labels == k) for k in range(bins)) if len(found)]
        places = np.array([np.where(applied.held | applied.changing, d[group].mean(axis=0), 0.0) for group in groups])
    means = [[mean_with_error(field[group, k]) for k in range(3)] for group in groups]
    return Points(
        places,
        np.array([[m.value for m in row] for row in means]),
        np.array([[m.error for m in row] for row in means]),
        np.array([series.volume[group].mean() for group in groups]),
    )


def double_well(points: Sequence[Points], *, symmetric: bool = False, degree: int = 0) -> DoubleWell:
    """U(D) through all points; several at one D are averaged. ``degree``: of a polynomial ε(D), 0: the spline.

    Raises InputError for fewer than two different D or than the polynomial has coefficients, or D not on one axis.
    """
    control = np.concatenate([p.control for p in points])
    fields, errors = (np.concatenate([getattr(p, name) for p in points]) for name in ("field", "error"))
    volumes = np.concatenate([p.volume for p in points])
    moved = control - control.mean(axis=0)
    _, sizes, directions = np.linalg.svd(moved, full_matrices=False)
    if len(control) < 2 or sizes[0] < 1e-9:
        raise InputError("U(D) needs two or more different displacements; give more runs")
    if len(sizes) > 1 and sizes[1] > 1e-3 * sizes[0]:
        raise InputError(
            f"the displacements {np.round(control, 4).tolist()} V/Å do not lie on one line; leave some out"
        )
    axis = directions[0] * np.sign(directions[0][np.abs(directions[0]).argmax()])
    d, e, s = control @ axis, fields @ axis, np.sqrt((errors**2 * axis**2).sum(axis=1))
    if symmetric:
        d, e, s, volumes = np.append(d, -d), np.append(e, -e), np.append(s, s), np.append(volumes, volumes)
    d, e, s, volumes = _merged(d, e, s, volumes)
    scale = volumes / FOUR_PI_K_E
    if not 0 <= degree < len(d):
        raise InputError(f"degree is {degree} with {len(d)} points: give one from 1 to {len(d) - 1}, or 0 for a spline")
    basis = _fit(d, s, degree) if degree else _basis(d)
    slopes, integrals = basis.derivative(), basis.antiderivative()
    grid = np.unique(np.append(np.linspace(d[0], d[-1], _GRID), d))
    variance = np.nan_to_num(s) ** 2
    known = bool(np.isfinite(s).all())

    def error_of(weights: Array) -> float:
        return _propagated(weights, d, variance, symmetric) if known else float("nan")

    # rows: what U at a place takes from the field of every point
    weights = (integrals(grid) - integrals(d[0])) * scale
    field = basis(grid) @ e
    roots = _roots(basis, e, d)
    at_roots = (integrals(roots) - integrals(d[0])) * scale if len(roots) else np.zeros((0, len(d)))
    minima = [k for k, x in enumerate(roots) if slopes(x) @ e > 0.0]
    energies = weights @ e
    lowest = min(minima, key=lambda k: float(at_roots[k] @ e)) if minima else None
    zero = at_roots[lowest] if lowest is not None else weights[int(energies.argmin())]
    stationary = []
    for x, weight in zip(roots, at_roots, strict=True):
        slope = float(slopes(x) @ e)
        spread, blur = (error_of(w) for w in (basis(x), slopes(x)))
        stationary.append(Stationary(float(x), spread / abs(slope), slope, blur, float((weight - zero) @ e)))
    barrier, barrier_error = float("nan"), float("nan")
    for k in range(1, len(roots) - 1):
        if k not in minima and k - 1 in minima and k + 1 in minima:
            lower = min((k - 1, k + 1), key=lambda j: float(at_roots[j] @ e))
            difference = at_roots[k] - at_roots[lower]
            height = float(difference @ e)
            if not barrier > height:
                barrier, barrier_error = height, error_of(difference)
    return DoubleWell(
        axis,
        d,
        e,
        s,
        grid,
        field,
        (weights - zero) @ e,
        np.array([error_of(w) for w in weights - zero]),
        tuple(stationary),
        barrier,
        barrier_error,
        float(volumes.mean()),
    )


def _merged(d: Array, e: Array, s: Array, volumes: Array) -> tuple[Array, Array, Array, Array]:
    """By D, with several at one D averaged (weighted where all have errors)."""
    order = np.argsort(d)
    d, e, s, volumes = d[order], e[order], s[order], volumes[order]
    groups = np.split(np.arange(len(d)), np.flatnonzero(np.diff(d) > 1e-6 * np.ptp(d)) + 1)
    rows = []
    for group in groups:
        errors = s[group]
        weight = 1.0 / errors**2 if np.isfinite(errors).all() and errors.min() > 0.0 else np.ones(len(group))
        weight = weight / weight.sum()
        rows.append((d[group].mean(), weight @ e[group], np.sqrt(weight**2 @ errors**2), volumes[group].mean()))
    table = np.array(rows)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def _basis(d: Array) -> PPoly:
    """What every point adds to the interpolant, as one piecewise polynomial with values [n]."""
    if len(d) >= 4:
        return CubicSpline(d, np.eye(len(d)))
    return PPoly.from_spline(make_interp_spline(d, np.eye(len(d)), k=1))


def _fit(d: Array, error: Array, degree: int) -> PPoly:
    """What every point adds to the weighted least-squares polynomial."""
    length = np.ptp(d)
    powers = ((d - d[0]) / length)[:, None] ** np.arange(degree, -1, -1)
    known = np.isfinite(error).all() and error.min() > 0.0
    weights = 1.0 / error if known else np.ones(len(d))
    coefficients = np.linalg.pinv(powers * weights[:, None]) * weights
    scale = length ** -np.arange(degree, -1.0, -1.0)
    return PPoly((coefficients * scale[:, None])[:, None, :], np.array([d[0], d[-1]]))


def _roots(basis: PPoly, e: Array, d: Array) -> Array:
    """Where the interpolant of ``e`` vanishes."""
    found = PPoly(basis.c @ e, basis.x).roots(extrapolate=False)
    found = np.unique(found[np.isfinite(found)])
    return found[np.append(True, np.diff(found) > 1e-9 * np.ptp(d))] if len(found) else found


def _propagated(weights: Array, d: Array, variance: Array, symmetric: bool) -> float:
    """Standard error of a sum over points; with ``symmetric`` those at ±D are one and the same, with opposite signs."""
    if symmetric:
        weights = 0.5 * (weights - weights[::-1])
        half = d > 1e-12
        return float(np.sqrt((2.0 * weights[half]) ** 2 @ variance[half]))
    return float(np.sqrt(weights**2 @ variance))
