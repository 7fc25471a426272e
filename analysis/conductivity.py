"""Ionic conductivity of a run: from diffusion, from the collective charge displacement, from the current, from drift.

With M(t) = ∫ J V dt, the dipole of all charges followed through the cell's faces (e·Å), V volume, T temperature:

    Nernst–Einstein     σ_NE = Σ_s N_s q_s² D_s / (V k_B T)                  ions that move independently
    Einstein–Helfand    σ = (1 / 6 V k_B T) d/dt ⟨|M(t0 + t) − M(t0)|²⟩       E. Helfand, Phys. Rev. 119, 1 (1960)
    Green–Kubo          σ = (1 / 3 V k_B T) ∫₀^∞ ⟨Ṁ(0)·Ṁ(t)⟩ dt              R. Kubo, J. Phys. Soc. Jpn. 12, 570 (1957)
    drift in a field ε  σ = ⟨Ṁ·ε⟩ / (V ε²)

and the Haven ratio σ_NE/σ. What is bound does not conduct: M may be the driver's dipole, Σ q_i r_i with fixed charges
or oxidation numbers, or the integral of Σ Z*_i·v_i with Born charges: all have one and the same σ, as two such M differ
by what stays bounded (L. Ercole, A. Marcolongo, P. Umari, S. Baroni, J. Low Temp. Phys. 185, 79 (2016); F. Grasselli,
S. Baroni, Nat. Phys. 15, 967 (2019)). This holds for whole charges of ions (and of molecules); charges that are not
those that ions carry through the cell, such as fitted partial charges of ions, have a σ of their own. Charges that
change with time are averaged for every atom.

These are formulae of a constant field. At constant displacement M is bound, whatever conducts: axes where D is held, or
where the field changes with time, are left out of the means over axes. Where no charged species diffuses within the
run there is no σ: what charges do within a vibration is no conduction, but has a slope. Ions of a cell that a barostat
moves are followed without its affine motion, in M as in the positions.

The line of Einstein and Helfand and the mean of the running Green–Kubo integral are taken between the same two times.
Errors: origins of time (Helfand) or stretches of the trajectory (Green–Kubo, drift) in eight blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.charges_of import charges_of_beads
from voltpi.analysis.ipi_files import iter_extras
from voltpi.analysis.polarization import polarization_of
from voltpi.analysis.runs import Run
from voltpi.analysis.spectra_series import dipole_series, free_axes, temperature_of
from voltpi.analysis.statistics import linear_fit, plus_minus
from voltpi.analysis.trajectory import Unwrapped, frames_of, unwrapped
from voltpi.analysis.transport import Diffusion, diffusion, movers_of
from voltpi.potential.errors import InputError

__all__ = ["Conductivity", "Estimate", "Helfand", "Moment", "conductivity_of", "green_kubo", "helfand"]

Array = NDArray[np.float64]

_KB = constants.k / constants.e  # eV/K
_SI = constants.e / constants.angstrom * 1e15  # S/m in 1 e/(V Å fs)
_BLOCKS = 8
_LAGS = 200
_VIBRATION = 200.0  # fs: lines begin no earlier unless they are asked to
_NEUTRAL = 1e-3  # e


@dataclass(frozen=True)
class Moment:
    """M [f, a] (e·Å) along the axes in use every ``spacing`` fs, and what it is made of; ``key``: that in one word."""

    key: str
    source: str
    values: Array
    spacing: float


@dataclass(frozen=True)
class Helfand:
    """⟨ΔM²⟩ [l, a] (e²Å²) by axis at ``lags`` [l] fs, and σ (S/m) of the line between ``fitted`` (fs).

    sigma, error : nan where nothing diffuses · sigma_axes : [a], of the axes in use
    """

    moment: Moment
    lags: Array
    squares: Array
    fitted: tuple[float, float]
    sigma: float
    error: float
    sigma_axes: Array


@dataclass(frozen=True)
class Estimate:
    """σ ± error in S/m (nan: none) by one ``method``, and what it was made of."""

    method: str
    source: str
    sigma: float
    error: float

    def numbers(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "method": self.method,
            "source": self.source,
            "sigma_S_per_m": self.sigma,
            "sigma_error_S_per_m": self.error,
        }


def helfand(moment: Moment, scale: float, limits: tuple[float, float]) -> Helfand:
    """σ of Einstein and Helfand between two times (fs); ``scale``: 1/(V k_B T) in 1/(Å³ eV).

    Raises InputError when the limits do not lie in the trajectory or hold fewer than three records.
    """
    f, spacing = len(moment.values), moment.spacing
    first, last = _window(moment, limits)
    lags = np.unique(np.linspace(0, last, min(last, _LAGS) + 1).round().astype(int))
    fit = lags >= first
    if np.count_nonzero(fit) < 3 or f - last < 2 * _BLOCKS:
        raise InputError(
            f"fit from {limits[0] / 1000:g} to {limits[1] / 1000:g} ps: too few of {f} records, {spacing:g} fs apart; "
            "give --fit FROM TO in ps"
        )
    n_axes = moment.values.shape[1]
    squares = np.zeros((len(lags), n_axes))
    blocks = np.zeros((_BLOCKS, len(lags), n_axes))
    for k, lag in enumerate(lags):
        jumps = (moment.values[lag:] - moment.values[: f - lag]) ** 2
        squares[k] = jumps.mean(axis=0)
        # the same origins at every lag, or lines through them would not be straight
        blocks[:, k] = [part.mean(axis=0) for part in np.array_split(jumps[: f - last], _BLOCKS)]
    time = lags * spacing
    axes = np.array([0.5 * scale * linear_fit(time[fit], squares[fit, a]).slope for a in range(n_axes)]) * _SI
    parts = [0.5 * scale / n_axes * linear_fit(time[fit], block[fit].sum(axis=1)).slope * _SI for block in blocks]
    error = float(np.std(parts, ddof=1) / np.sqrt(_BLOCKS))
    return Helfand(moment, time, squares, limits, float(axes.mean()), error, axes)


def green_kubo(
    current: Array, spacing: float, scale: float, limits: tuple[float, float]
) -> tuple[Array, Array, float, float]:
    """Lags (fs), running integral (S/m), its mean between two times (fs) and the error of that mean.

    ``current`` [f, a]: Ṁ (e·Å/fs) along the axes in use every ``spacing`` fs; ``scale``: 1/(V k_B T) in 1/(Å³ eV).
    The correlation function is a mean over origins. Raises InputError as ``helfand``.
    """
    first, last = _window(Moment("current", "current", current, spacing), limits)
    whole = _running(current, spacing, scale, last)
    parts = [_running(part, spacing, scale, last) for part in np.array_split(current, _BLOCKS) if len(part) > last + 1]
    means = [part[first:].mean() for part in parts]
    error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    lags: Array = spacing * np.arange(last + 1, dtype=float)
    return lags, whole, float(whole[first:].mean()), error


def _running(current: Array, spacing: float, scale: float, last: int) -> Array:
    n = len(current)
    size = 1 << (n + last).bit_length()
    spectrum = np.fft.rfft(current, size, axis=0)
    correlation = np.fft.irfft((np.abs(spectrum) ** 2).sum(axis=1), size)[: last + 1] / (n - np.arange(last + 1))
    steps = 0.5 * (correlation[1:] + correlation[:-1])
    return np.concatenate([[0.0], np.cumsum(steps)]) * spacing * scale / current.shape[1] * _SI


def _window(moment: Moment, limits: tuple[float, float]) -> tuple[int, int]:
    first, last = (round(limit / moment.spacing) for limit in limits)
    if not 0 <= first < last < len(moment.values):
        length = (len(moment.values) - 1) * moment.spacing / 1000.0
        raise InputError(
            f"fit from {limits[0] / 1000:g} to {limits[1] / 1000:g} ps: give two times, the later one last, within the "
            f"{length:.4g} ps of the run"
        )
    return first, last


@dataclass(frozen=True)
class Conductivity:
    """Estimates of σ, the best one first, and what they are made of.

    collective: of Einstein and Helfand, one for every M · integral: lags (fs) and the running Green–Kubo integral (S/m)
    diffusion: of every kind of ion, with its ``charges`` (e) · drift: along the field, None without one · axes: [3],
    those that count
    """

    temperature: float
    volume: float
    length: float
    collective: tuple[Helfand, ...]
    kubo: Estimate
    integral: tuple[Array, Array]
    diffusion: tuple[Diffusion, ...]
    charges: tuple[float, ...]
    nernst_einstein: Estimate | None
    drift: Estimate | None
    axes: NDArray[np.bool_]
    notes: tuple[str, ...]

    @property
    def estimates(self) -> list[Estimate]:
        """All of them."""
        helfands = [Estimate("Einstein-Helfand", h.moment.source, h.sigma, h.error) for h in self.collective]
        rest = [self.kubo, self.drift, self.nernst_einstein]
        return [*helfands, *(estimate for estimate in rest if estimate is not None)]

    @property
    def haven(self) -> tuple[float, float]:
        """σ_NE/σ with its error, nan without the two."""
        top, low = self.nernst_einstein, self.collective[0]
        if top is None or not low.sigma > 0.0 or not top.sigma > 0.0:
            return float("nan"), float("nan")
        ratio = top.sigma / low.sigma
        return ratio, float(ratio * np.hypot(top.error / top.sigma, low.error / low.sigma))

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "temperature_K": self.temperature,
            "volume_A3": self.volume,
            "length_ps": self.length / 1000.0,
            "fit_from_ps": self.collective[0].fitted[0] / 1000.0,
            "fit_to_ps": self.collective[0].fitted[1] / 1000.0,
            "estimates": [estimate.numbers() for estimate in self.estimates],
            "sigma_axes_S_per_m": {h.moment.key: self._by_axis(h) for h in self.collective},
            "haven_ratio": self.haven[0],
            "haven_ratio_error": self.haven[1],
            "ions": {d.name: d.numbers() | {"charge_e": q} for d, q in zip(self.diffusion, self.charges, strict=True)},
            "notes": list(self.notes),
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        first = self.collective[0].fitted
        lines = [
            f"{self.length / 1000:.3g} ps at {self.temperature:.5g} K, lines from {first[0] / 1000:.2g} to "
            f"{first[1] / 1000:.2g} ps"
        ]
        for e in self.estimates:
            known = np.isfinite(e.sigma)
            value = f"σ = {plus_minus(e.sigma / 100.0, e.error / 100.0, '.3g')} S/cm" if known else "no σ"
            lines.append(f"{e.method:<16} {value}   {e.source}")
        if np.isfinite(self.haven[0]):
            lines.append(f"Haven ratio      {plus_minus(*self.haven, '.2f')}")
        return [*lines, *self.notes]

    def _by_axis(self, h: Helfand) -> list[float]:
        """σ [3] along x, y, z, nan along axes that do not count."""
        out = np.full(3, np.nan)
        out[self.axes] = h.sigma_axes
        return [float(x) for x in out]

    def table(self) -> tuple[list[str], Array]:
        """Header and rows of the CSV: lags, ⟨|ΔM|²⟩ and ⟨|ΔM|²⟩/(2a V k_B T t) of the first M, then of the others.

        a: the number of axes that count, 3 unless some are at constant displacement.
        """
        base = self.collective[0]
        header, columns = ["lag_fs"], [base.lags]
        for h in self.collective:
            squares = np.interp(base.lags, h.lags, h.squares.sum(axis=1))
            twice = 2 * int(self.axes.sum())
            slope = squares / np.maximum(base.lags, 1e-300) / (twice * self.volume * _KB * self.temperature) * _SI
            header += [f"dM2_{h.moment.key}_e2A2", f"dM2_per_{twice}VkTt_{h.moment.key}_S_per_m"]
            columns += [squares, np.where(base.lags > 0, slope, np.nan)]
        return header, np.column_stack(columns)


def conductivity_of(
    run: Run,
    *,
    skip: float = 0.0,
    charges: str | Path | None = None,
    temperature: float | None = None,
    fit: tuple[float, float] | None = None,
    by: Literal["auto", "element", "molecule"] = "auto",
    hop: float = 3.0,
) -> Conductivity:
    """σ of a run in all the ways that its files allow.

    ``charges``: a file (``voltpi.analysis.charges_of``), beside what the run wrote; ``fit`` (ps): between which times,
    else from 1/100 to 1/20 of the trajectory, but from 0.2 ps (a vibration) at the least, and then to 0.4 ps; ``by``
    and ``hop``: see ``voltpi.analysis.transport``. Every σ is nan where no charged species diffuses,
    unless ``fit`` is given. Raises InputError where no M can be made, where no axis is at a constant field, for a run
    too short, or as ``helfand`` does.
    """
    free, cautions = free_axes(run.applied, str(run.folder), "the conductivity")
    path = unwrapped(run, skip)
    kelvin = temperature_of(run, skip, temperature)
    moments, ion_charges, notes = _moments(run, path, skip, charges)
    length = (len(moments[0].values) - 1) * moments[0].spacing
    first = max(length / 100.0, _VIBRATION)
    limits = (first, max(length / 20.0, 2.0 * first)) if fit is None else (1000.0 * fit[0], 1000.0 * fit[1])
    if fit is None and length <= 2.0 * limits[1]:
        raise InputError(
            f"{run.folder}: {length / 1000:.4g} ps are too short for a conductivity, which is fitted from "
            f"{limits[0] / 1000:g} to {limits[1] / 1000:g} ps; let it run longer, or give --fit FROM TO in ps"
        )
    volume = float(path.volume.mean())
    scale = 1.0 / (volume * _KB * kelvin)
    notes += cautions
    drift, mean_current = _drift(run, moments[0], volume, notes)
    still = []
    for m in moments:
        flow = np.outer(m.spacing * np.arange(len(m.values)), mean_current)
        still.append(Moment(m.key, m.source, (m.values - flow)[:, free], m.spacing))
    collective = tuple(helfand(m, scale, limits) for m in still)
    if run.velocities:
        name = None if charges is None else str(charges)
        series, _, _, source = dipole_series(run, "current", skip=skip, temperature=kelvin, charges=name)
        current, spacing = (series.values - mean_current)[:, free], series.spacing
    else:
        current, spacing = np.diff(still[0].values, axis=0) / still[0].spacing, still[0].spacing
        source = f"differences of M, {still[0].source}"
    lags, running, value, error = green_kubo(current, spacing, scale, limits)
    kubo = Estimate("Green-Kubo", source, value, error)
    done: list[Diffusion] = []
    carried: list[float] = []
    for mover in movers_of(path, by):
        places = _without_flow(mover.positions) if drift is not None else mover.positions
        done.append(diffusion(mover.species.name, places, path.spacing, hop))
        carried.append(
            float("nan") if ion_charges is None else float(ion_charges[mover.species.atoms].sum(axis=1).mean())
        )
    charged = [d for d, q in zip(done, carried, strict=True) if not abs(q) <= _NEUTRAL]
    if charged and all(d.fitted is None for d in charged):
        names = ", ".join(d.name for d in charged)
        needed = f"MSD would have to pass {0.5 * hop**2:.3g} Å² (half of --hop squared) and rise by as much again"
        if fit is None:
            nan = float("nan")
            collective = tuple(
                dataclasses.replace(h, sigma=nan, error=nan, sigma_axes=h.sigma_axes * nan) for h in collective
            )
            kubo, drift = dataclasses.replace(kubo, sigma=nan, error=nan), None
            notes.append(
                f"no conductivity: no charged species ({names}) diffuses in this run, whose {needed}; let it run "
                "longer, or take it for an insulator"
            )
        else:
            notes.append(
                f"no charged species ({names}) diffuses in this run, whose {needed}: what the window of --fit gives is "
                "of vibrations rather than of conduction"
            )
    return Conductivity(
        kelvin,
        volume,
        length,
        collective,
        kubo,
        (lags, running),
        tuple(done),
        tuple(carried),
        _nernst_einstein(done, carried, scale),
        drift,
        free,
        tuple(notes),
    )


def _moments(
    run: Run, path: Unwrapped, skip: float, given: str | Path | None
) -> tuple[list[Moment], Array | None, list[str]]:
    """M of every kind that the files allow, charges [n] (e) of the atoms if known, and what is to be said."""
    moments: list[Moment] = []
    notes: list[str] = []
    if run.extras.get("dipole"):
        moments.append(_dipole_moment(run, path, skip, notes))
    mean: Array | None = None
    places = path.without_drift()
    for source in [None] if given is None else [given, None]:
        try:
            found, title, spread = _mean_charges(run, path, skip, source)
        except InputError:
            if source is not None or not (moments or mean is not None):
                raise
            continue
        if mean is not None and np.allclose(mean, found):
            continue
        key = "charges" if mean is None else "charges-of-the-run"
        mean = found if mean is None else mean
        moments.append(Moment(key, f"{title} and positions", np.einsum("n,fnk->fk", found, places), path.spacing))
        if spread > 1e-6:
            notes.append(f"charges change with time, by {spread:.2g} e (rms): the mean of every atom was taken")
        total = float(found.sum())
        if abs(total) > 1e-3:
            notes.append(f"the charges add up to {total:.3g} e: σ counts the ions' motion against the centre of mass")
    born = run.extras.get("BEC", ())
    if len(born) == 1 and len(run.positions) == 1:
        moments += _born_moment(born[0], path)
    return moments, mean, notes


def _dipole_moment(run: Run, path: Unwrapped, skip: float, notes: list[str]) -> Moment:
    """M of the driver; in a cell that changes without the affine motion of ions, as ``unwrapped`` has it."""
    p = polarization_of(run).after(skip)
    _equally_spaced(p.steps, "dipoles")
    steps, time, values = p.steps, p.time, p.dipole
    if np.ptp(path.volume) > 1e-9 * path.volume.mean():
        cells = {step: np.asarray(beads[0].cell) for step, beads in frames_of(run, skip)}
        both = np.isin(steps, list(cells))
        if np.count_nonzero(both) > 2 and np.ptp(np.diff(steps[both])) == 0:
            steps, time, values = steps[both], time[both], values[both]
            h = np.array([cells[int(step)] for step in steps])
            scaled = np.einsum("fk,fkl->fl", values, np.linalg.inv(h))
            moved = np.einsum("fk,fkl->fl", np.diff(scaled, axis=0), 0.5 * (h[1:] + h[:-1]))
            values = np.concatenate([values[:1], moved]).cumsum(axis=0)
            notes.append("the cell changes: M of the dipole is taken at the frames of positions, without affine motion")
        else:
            notes.append(
                "caution: the cell changes, and M of the dipole holds the affine motion of ions with it; print dipole "
                "and positions with one stride"
            )
    return Moment("dipole", p.source, values, float(np.ptp(time)) / (len(time) - 1))


def _mean_charges(run: Run, path: Unwrapped, skip: float, given: str | Path | None) -> tuple[Array, str, float]:
    """Charges [n] (e) averaged over steps and beads, where they come from, and the rms of their changes."""
    beads = charges_of_beads(run, given)
    n = len(path.first)
    total, squares, count = np.zeros(n), np.zeros(n), 0
    for bead in beads:
        for step in path.steps:
            q = bead.at(int(step), n)
            if q is not None:
                total, squares, count = total + q, squares + q**2, count + 1
            if bead.constant is not None:
                break
    if count == 0:
        raise InputError(f"{run.folder}: charges and positions have no step in common; print both with one stride")
    mean = total / count
    spread = float(np.sqrt(np.maximum(squares / count - mean**2, 0.0).mean()))
    return mean, beads[0].source, spread


def _born_moment(born: Path, path: Unwrapped) -> list[Moment]:
    """∫ Σ Z*·v dt by the trapezoidal rule between the frames for which Born charges were written."""
    place = {int(step): k for k, step in enumerate(path.steps)}
    steps, values = [], list[Array]()
    before: tuple[Array, Array] | None = None
    for step, z in iter_extras(born):
        if step not in place:
            continue
        r = path.positions[place[step]].ravel()
        if z.shape != (r.size, 3):
            raise InputError(f"{born}: Born charges of shape {z.shape}, but {r.size // 3} atoms; give one run's files")
        increment = np.zeros(3) if before is None else (r - before[0]) @ (0.5 * (z + before[1]))
        values.append(increment + (values[-1] if values else 0.0))
        steps.append(step)
        before = r, z
    if len(steps) < 2:
        return []
    _equally_spaced(np.array(steps), "Born charges")
    spacing = path.spacing * (steps[1] - steps[0]) / float(path.steps[1] - path.steps[0])
    return [Moment("born", "Born charges and positions", np.array(values), spacing)]


def _equally_spaced(steps: NDArray[np.int64], what: str) -> None:
    gaps = np.diff(steps)
    if len(gaps) == 0 or np.ptp(gaps) > 0:
        raise InputError(f"{what} are not written at one stride (or once only); print them with one stride")


def _drift(run: Run, moment: Moment, volume: float, notes: list[str]) -> tuple[Estimate | None, Array]:
    """σ of the drift in a static field, and the mean Ṁ [3] (e·Å/fs), zero without a field.

    Along axes at constant displacement there is no field of its own, and no drift.
    """
    if run.applied.changing.any():
        notes.append(
            f"{run.applied}: no σ of drift, which takes a static field; the others are those of a system at rest, "
            "which one that is driven is not"
        )
        return None, np.zeros(3)
    strength = float(np.linalg.norm(run.field))
    if strength == 0.0:
        return None, np.zeros(3)
    edges = np.linspace(0, len(moment.values) - 1, 2 * _BLOCKS + 1).round().astype(int)
    duration = np.diff(edges)[:, None] * moment.spacing
    currents = np.diff(moment.values[edges], axis=0) / duration
    mean = (moment.values[-1] - moment.values[0]) / ((len(moment.values) - 1) * moment.spacing)
    direction = run.field / strength
    factor = _SI / (volume * strength)
    error = float(np.std(currents @ direction, ddof=1) / np.sqrt(len(currents)))
    return Estimate("drift in field", moment.source, float(mean @ direction) * factor, error * factor), mean


def _without_flow(positions: Array) -> Array:
    """Positions [f, n, 3] less the constant velocity with which all of them moved in the field."""
    flow = (positions[-1] - positions[0]).mean(axis=0)
    return positions - np.linspace(0.0, 1.0, len(positions))[:, None, None] * flow


def _nernst_einstein(done: list[Diffusion], charges: list[float], scale: float) -> Estimate | None:
    """Σ N q² D scale; None where charges or a D are not known."""
    if not np.isfinite(charges).all() or any(
        d.fitted is None and abs(q) > 1e-3 for d, q in zip(done, charges, strict=True)
    ):
        return None
    each = [
        (d.n * q**2 * scale * d.d * 10.0 * _SI, d.relative_error)
        for d, q in zip(done, charges, strict=True)
        if d.fitted
    ]
    names = ", ".join(f"{d.name} {q:+.3g} e" for d, q in zip(done, charges, strict=True) if abs(q) > 1e-3)
    sigma = sum(s for s, _ in each)
    error = float(np.sqrt(sum((s * relative) ** 2 for s, relative in each)))
    return Estimate("Nernst-Einstein", names or "no charged particles", float(sigma), error)
