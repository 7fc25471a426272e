"""Infrared absorption, Raman scattering and density of states: what the activities of ``spectra`` mean in units.

Infrared (D. A. McQuarrie, Statistical Mechanics (1976), ch. 21; P. L. Silvestrelli, M. Bernasconi, M. Parrinello,
Chem. Phys. Lett. 277, 478 (1997); Q(ω) is the quantum correction, and with the harmonic one this is linear response)

    n(ω) α(ω) = ω (1 − e^{−βħω}) / (6 ε_0 V c ħ) · Q(ω) ∫ dt e^{−iωt} ⟨M(0)·M(t)⟩
              = G_M(ν̃) / (12 ε_0 c² V)  with the harmonic correction,

n the refractive index, α the Napierian absorption coefficient (I = I_0 e^{−αx}). ∫ n α dν̃ over a band is, times the
molar volume, its integrated intensity N_A |∂M/∂Q|² / (12 ε_0 c²) (42.256 km/mol for 1 D²/(Å² amu)). Over all
wavenumbers it is Σ_i |Z*_i|²/(12 ε_0 c² V m_i): a sum rule. The formula is that of a constant macroscopic field
(tin-foil boundaries). At constant displacement M fluctuates with the longitudinal (LO) modes, so that axes where D is
held, or the field changes with time, are left out of the mean over axes.

Raman (D. A. Long, The Raman Effect (2002), ch. 5), polarizability α = ᾱ 1 + b with trace-free b, Placzek:

    isotropic ᾱ'² · anisotropic γ'² = (3/2) Tr b'b' · VV ᾱ'² + (4/45) γ'² · VH γ'²/15,

each an activity G (Å⁴/amu per cm⁻¹); 45 ᾱ'² + 7 γ'² = 45 (VV + VH) is the Raman activity of a mode.
``reduced`` is G. ``susceptibility`` is G/ν̃ ∝ χ''. ``stokes`` is G [n(ν̃) + 1]/ν̃, the Stokes scattering with
n + 1 = 1/(1 − e^{−βħω}), times (ν̃_L − ν̃)⁴/ν̃_L⁴ where the laser's wavelength is given.

Density of states: g(ν̃) = Σ_i G of √m_i r_i, in modes per cm⁻¹; its integral is the number of degrees of freedom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.runs import Run
from voltpi.analysis.spectra import (
    LIGHT,
    Activity,
    Peak,
    Series,
    activity,
    correction,
    find_lines,
    make_plan,
    reduced_energy,
)
from voltpi.analysis.spectra_series import (
    atom_velocities,
    common_axes,
    dipole_series,
    masses_of,
    polarizability_series,
    sampling_cautions,
    spectral_runs,
    temperature_of,
)
from voltpi.potential.errors import InputError

__all__ = ["ABSORPTION", "INTENSITIES", "Spectrum", "density_of_states", "infrared", "raman"]

Array = NDArray[np.float64]

ABSORPTION = constants.e**2 / constants.atomic_mass / (12.0 * constants.epsilon_0 * constants.c**2)
"""1/(12 ε_0 c²) in m³·m⁻¹/m² for (e²/amu): ∫ α V dν̃ = ABSORPTION |∂M/∂Q|² with ν̃ in m⁻¹ and V in m³."""
INTENSITIES = ("reduced", "susceptibility", "stokes")


@dataclass(frozen=True)
class Spectrum:
    """Columns [g] over wavenumbers (cm⁻¹), with standard errors, and the peaks of the first.

    columns, errors : by name, which carries the unit
    extra : numbers that only this kind has · lines : and what to say of them
    """

    activity: Activity
    kind: str
    label: str
    wavenumbers: Array
    columns: dict[str, Array]
    errors: dict[str, Array]
    peaks: list[Peak]
    unit: str
    corrected: str
    runs: tuple[str, ...]
    source: str
    extra: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    def table(self) -> tuple[list[str], Array]:
        """Header and rows."""
        header, columns = ["wavenumber_cm-1"], [self.wavenumbers]
        for name, values in self.columns.items():
            header += [name, f"{name}_error"]
            columns += [values, self.errors[name]]
        return header, np.column_stack(columns)

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        out: dict[str, Any] = {"runs": list(self.runs), "source": self.source, **self.activity.numbers()}
        if self.corrected:
            out["quantum_correction"] = self.corrected
        out |= self.extra
        out["peaks"] = [peak.numbers(self.unit) for peak in self.peaks]
        return out

    def report(self) -> list[str]:
        """Lines for a person."""
        named = f", quantum correction {self.corrected}" if self.corrected else ""
        lines = [f"{self.kind} from {self.source}{named}", *self.lines, *self.activity.report()]
        for peak in sorted(sorted(self.peaks, key=lambda p: -p.height)[:12], key=lambda p: p.place):
            shift = abs(peak.place - peak.corrected)
            behind = f", {peak.corrected:.1f} without the time step's error" if shift >= 0.5 else ""
            lines.append(f"peak {peak.place:8.1f} cm⁻¹  height {peak.height:.4g}  width {peak.width:.0f}{behind}")
        return lines


def infrared(
    paths: Sequence[Path],
    *,
    source: str = "auto",
    charges: str | None = None,
    skip: float = 0.0,
    temperature: float | None = None,
    window: str = "hann",
    quantum: str = "harmonic",
    resolution: float | None = None,
    top: float = 4500.0,
) -> Spectrum:
    """n(ν̃) α(ν̃) in cm⁻¹, and along x, y, z, from one run or several; without axes that are at constant displacement.

    Raises InputError.
    """
    correction(quantum, np.zeros(1), 300.0)
    runs = spectral_runs(paths)
    free, cautions = common_axes(runs, "the infrared spectrum")
    found = [
        dipole_series(run, source, skip=skip, temperature=temperature_of(run, skip, temperature), charges=charges)
        for run in runs
    ]
    volumes = [volume for _, volume, _, _ in found]
    if max(volumes) > 1.02 * min(volumes):
        raise InputError(f"cells of {min(volumes):.0f} and {max(volumes):.0f} Å³: analyse these runs one by one")
    series, molecules = [one for one, _, _, _ in found], found[0][2]
    plan = make_plan(series, window, resolution, top)
    weights = np.vstack([3.0 * free / free.sum(), np.eye(3)[free]])
    a = activity(series, weights, plan)
    volume = float(np.mean(volumes))
    # ∫ α dν̃ with α and ν̃ in cm⁻¹ is 1e-4 of that in m⁻¹
    factor = ABSORPTION / (volume * 1e-30) * 1e-4 * np.array([1.0, *[3.0] * int(free.sum())])[:, None]
    factor = factor * correction(quantum, plan.grid, a.temperature)
    names = ["absorption_cm-1", *(f"absorption_{c}_cm-1" for c, kept in zip("xyz", free, strict=True) if kept)]
    columns = dict(zip(names, factor * a.values, strict=True))
    molar = constants.N_A * volume * 1e-30 * 10.0  # km/mol for 1 cm⁻²
    peaks = find_lines(plan.grid, columns[names[0]], a.time_step)
    integral = float(np.trapezoid(columns[names[0]], plan.grid))
    total = float(a.total[0])
    extra = {
        "volume_A3": volume,
        "axes": [c for c, kept in zip("xyz", free, strict=True) if kept],
        "n_molecules": molecules,
        "integral_cm-2": integral,
        "integral_km_per_mol_of_molecules": integral * molar / molecules,
        "sum_rule_e2_per_amu": total,
        "sum_rule_km_per_mol_of_molecules": constants.N_A * ABSORPTION * total / 1000.0 / molecules,
        "peak_km_per_mol_of_cells": [peak.area * molar for peak in peaks],
    }
    lines = (
        f"integral to {plan.grid[-1]:.0f} cm⁻¹: {extra['integral_km_per_mol_of_molecules']:.1f} km/mol of molecules, "
        f"of {extra['sum_rule_km_per_mol_of_molecules']:.1f} in all (classical)",
    )
    return Spectrum(
        _with_cautions(a, runs, cautions),
        "infrared absorption",
        "absorption n·α (cm⁻¹)",
        plan.grid,
        columns,
        dict(zip(names, factor * a.errors, strict=True)),
        peaks,
        "cm-1",
        quantum,
        tuple(str(run.folder) for run in runs),
        found[0][3],
        extra,
        lines,
    )


def raman(
    paths: Sequence[Path],
    *,
    intensity: str = "reduced",
    laser: float | None = None,
    skip: float = 0.0,
    temperature: float | None = None,
    window: str = "hann",
    quantum: str = "harmonic",
    resolution: float | None = None,
    top: float = 4500.0,
) -> Spectrum:
    """Unpolarized (VV + VH), VV, VH, isotropic and anisotropic Raman spectra from one run or several.

    ``laser``: wavelength in nm, for ``intensity`` stokes. Raises InputError.
    """
    correction(quantum, np.zeros(1), 300.0)
    if intensity not in INTENSITIES:
        raise InputError(f"intensity is {intensity}: give one of {', '.join(INTENSITIES)}")
    if laser is not None and (intensity != "stokes" or not laser > 0.0):
        raise InputError(f"laser is {laser:g} nm with intensity {intensity}: give a wavelength > 0 with stokes only")
    runs = spectral_runs(paths)
    series = [polarizability_series(run, skip=skip, temperature=temperature_of(run, skip, temperature)) for run in runs]
    plan = make_plan(series, window, resolution, top)
    a = activity([_split(one) for one in series], _RAMAN, plan)
    factor = _intensity(intensity, plan.grid, a.temperature, laser) * correction(quantum, plan.grid, a.temperature)
    unit = {"reduced": "A4_per_amu_per_cm-1", "susceptibility": "A4_per_amu", "stokes": "A4_per_amu"}[intensity]
    names = [f"{name}_{unit}" for name in ("unpolarized", "VV", "VH", "isotropic", "anisotropic")]
    columns = dict(zip(names, factor * a.values, strict=True))
    alpha = np.concatenate([one.values for one in series]).mean(axis=0)
    extra = {
        "intensity": intensity,
        "laser_nm": laser,
        "mean_polarizability_A3": float(alpha[[0, 4, 8]].mean()),
        "raman_activity_A4_per_amu": 45.0 * float(a.total[0]),
    }
    what = "unpolarized Raman" + (" activity (Å⁴ amu⁻¹ cm)" if intensity == "reduced" else f", {intensity} (Å⁴/amu)")
    return Spectrum(
        _with_cautions(a, runs),
        f"Raman spectrum ({intensity})",
        what,
        plan.grid,
        columns,
        dict(zip(names, factor * a.errors, strict=True)),
        find_lines(plan.grid[1:], columns[names[0]][1:], a.time_step),
        unit,
        quantum,
        tuple(str(run.folder) for run in runs),
        "the polarizability",
        extra,
        (f"mean polarizability {extra['mean_polarizability_A3']:.4g} Å³",),
    )


# VV + VH, VV, VH, ᾱ, γ² of the channels ᾱ and b (nine components, Tr bb = Σ b_ij²)
_RAMAN = np.array(
    [
        [1.0, *[7.0 / 30.0] * 9],
        [1.0, *[2.0 / 15.0] * 9],
        [0.0, *[1.0 / 10.0] * 9],
        [1.0, *[0.0] * 9],
        [0.0, *[1.5] * 9],
    ]
)


def _split(series: Series) -> Series:
    """ᾱ and the trace-free rest [f, 10] of polarizabilities [f, 9]."""
    mean = series.values[:, [0, 4, 8]].mean(axis=1, keepdims=True)
    rest = series.values - mean * np.eye(3).ravel()
    return dataclasses.replace(series, values=np.hstack([mean, rest]))


def _intensity(name: str, grid: Array, temperature: float, laser: float | None) -> Array:
    if name == "reduced":
        return np.ones_like(grid)
    with np.errstate(divide="ignore"):
        out = 1.0 / grid
        if name == "stokes":
            out = out / -np.expm1(-reduced_energy(grid, temperature))
    out[0] = np.nan  # Rayleigh scattering
    if laser is not None:
        out = out * (1.0 - grid * laser * 1e-7) ** 4
    return out


def density_of_states(
    paths: Sequence[Path],
    *,
    skip: float = 0.0,
    temperature: float | None = None,
    window: str = "hann",
    resolution: float | None = None,
    top: float = 4500.0,
) -> Spectrum:
    """Modes per cm⁻¹, of all atoms and by element, from one run or several of the same atoms. Raises InputError."""
    runs = spectral_runs(paths)
    found = [atom_velocities(run, skip=skip, temperature=temperature_of(run, skip, temperature)) for run in runs]
    numbers = found[0][1]
    for run, (_, other, _) in zip(runs, found, strict=True):
        if not np.array_equal(other, numbers):
            raise InputError(f"{run.folder}: other atoms than in {runs[0].folder}: give runs of the same atoms")
    series = [one for one, _, _ in found]
    plan = make_plan(series, window, resolution, top)
    masses, elements = np.repeat(masses_of(numbers), 3), list(dict.fromkeys(numbers.tolist()))
    weights = np.array([masses, *(masses * np.repeat(numbers == z, 3) for z in elements)])
    a = activity(series, weights, plan)
    names = ["modes_per_cm-1", *(f"modes_{chemical_symbols[z]}_per_cm-1" for z in elements)]
    columns = dict(zip(names, a.values, strict=True))
    modes = float(a.total[0])
    return Spectrum(
        _with_cautions(a, runs),
        "vibrational density of states",
        "modes per cm⁻¹",
        plan.grid,
        columns,
        dict(zip(names, a.errors, strict=True)),
        find_lines(plan.grid, columns[names[0]], a.time_step),
        "per_cm-1",
        "",
        tuple(str(run.folder) for run in runs),
        found[0][2],
        {"n_atoms": len(numbers), "modes": modes, "diffusive_modes_per_cm-1": float(columns[names[0]][0])},
        (f"{modes:.1f} modes by Σ m v²/k_B T, of {3 * len(numbers)} degrees of freedom",),
    )


def _with_cautions(a: Activity, runs: Sequence[Run], others: Sequence[str] = ()) -> Activity:
    more = [*others, *(line for run in runs for line in sampling_cautions(run, 1.0 / (2.0 * LIGHT * a.spacing)))]
    return dataclasses.replace(a, cautions=(*a.cautions, *more))
