"""Polarization against field: the mean induced dipole of a run, and the dielectric constant from several runs.

With tin-foil boundaries the field ε of the settings is the macroscopic field in the sample, so

    P = ⟨M⟩/V = (ε_r − 1) ε_0 ε      and      ε_r = 1 + 4π k_e d⟨M⟩/dε / V,   k_e = e²/4πε_0

(M. Neumann, Mol. Phys. 50, 841 (1983)). Where M contains the shells (the driver's dipole), ε_r is the static constant
with its electronic part; where M is that of charges alone, the electronic part ε_∞ − 1 is missing and is to be added.
A straight line is right for small fields only: p·ε ≪ k_B T, which for water at 300 K means well below 0.05 V/Å.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.ipi_files import read_trajectory
from voltpi.analysis.polarization import Polarization, polarization_of
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import LinearFit, Mean, linear_fit, mean_with_error, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["FieldResponse", "RunSummary", "field_response", "summarize"]

Array = NDArray[np.float64]

K_E = constants.e / (4.0 * np.pi * constants.epsilon_0) / constants.angstrom
"""e²/4πε_0 in eV·Å."""
DEBYE = constants.c * 1e21 * constants.e * constants.angstrom
"""D in 1 e·Å."""


@dataclass(frozen=True)
class RunSummary:
    """What one run says. Dipoles in e·Å, along the field where named so; the drift in eV/atom/ps."""

    run: Run
    polarization: Polarization
    n_atoms: int
    dipole: tuple[Mean, Mean, Mean]
    induced: Mean | None  # M·ε̂ per molecule; None without a field
    temperature: Mean | None
    drift: LinearFit | None

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        p = self.polarization
        per_density = p.density.mean(axis=0)
        out: dict[str, Any] = {
            "run": str(self.run.folder),
            "source": p.source,
            "field_V_per_A": self.run.field.tolist(),
            "n_atoms": self.n_atoms,
            "n_molecules": p.n_molecules,
            "n_records": len(p.time),
            "length_ps": float(np.ptp(p.time)) / 1000.0,
            "volume_A3": float(p.volume.mean()),
            "dipole_eA": [m.value for m in self.dipole],
            "dipole_error_eA": [m.error for m in self.dipole],
            "polarization_C_per_m2": per_density.tolist(),
        }
        if self.induced is not None:
            spacing = float(np.ptp(p.time)) / max(len(p.time) - 1, 1)
            out |= {
                "induced_dipole_per_molecule_eA": self.induced.value,
                "induced_dipole_per_molecule_error_eA": self.induced.error,
                "induced_dipole_per_molecule_D": self.induced.value * DEBYE,
                "induced_dipole_per_molecule_error_D": self.induced.error * DEBYE,
                "autocorrelation_time_fs": self.induced.tau * spacing,
                "independent_samples": self.induced.n_independent,
                "error_is_reliable": self.induced.reliable,
            }
        if self.temperature is not None:
            out |= {"temperature_K": self.temperature.value, "temperature_error_K": self.temperature.error}
        if self.drift is not None:
            out |= {
                "conserved_drift_eV_per_atom_ps": self.drift.slope,
                "conserved_drift_error_eV_per_atom_ps": self.drift.slope_error,
            }
        return out

    def report(self) -> list[str]:
        """Lines for a person."""
        lines = []
        if self.induced is None:
            mean = ", ".join(plus_minus(m.value, m.error, ".3f") for m in self.dipole)
            lines.append(f"mean cell dipole             ({mean}) e·Å{_without_error(self.dipole[0], ' (', ')')}")
        else:
            value, error = self.induced.value, self.induced.error
            note = _without_error(self.induced, ", ")
            if not note and not self.induced.reliable:
                note = ", a guess: fewer than 20 independent samples"
            lines.append(
                f"induced dipole per molecule  {plus_minus(value, error, '.4f')} e·Å along the field "
                f"({plus_minus(value * DEBYE, error * DEBYE, '.3f')} D{note})"
            )
        if self.temperature is not None:
            mean = plus_minus(self.temperature.value, self.temperature.error, ".1f")
            lines.append(f"temperature                  {mean} K{_without_error(self.temperature, ' (', ')')}")
        if self.drift is not None:
            drift = plus_minus(self.drift.slope, self.drift.slope_error, ".1e")
            lines.append(f"drift of conserved quantity  {drift} eV/atom/ps")
        return lines


def _without_error(mean: Mean, before: str, after: str = "") -> str:
    return f"{before}no error from one record{after}" if mean.n == 1 else ""


def summarize(run: Run, skip: float = 0.0, charges: str | Path | None = None) -> RunSummary:
    """Means and drift of one run without its first ``skip`` fs; ``charges``: see ``polarization_of``.

    Raises InputError when the run's files do not hold what is needed, with the tag to add.
    """
    polarization = polarization_of(run, charges).after(skip)
    n_atoms = len(next(read_trajectory(run.positions[0])).atoms)
    components = [mean_with_error(polarization.dipole[:, k]) for k in range(3)]
    induced = None
    strength = float(np.linalg.norm(run.field))
    if strength > 0.0:
        induced = mean_with_error(polarization.dipole @ (run.field / strength) / polarization.n_molecules)
    temperature, drift = None, None
    table = run.table()
    time = table.get("time", "time", "femtosecond")
    kept = time >= time[0] + skip
    if "temperature" in table.columns:
        temperature = mean_with_error(table.get("temperature", "temperature", "kelvin")[kept])
    if "conserved" in table.columns and np.count_nonzero(kept) > 2:
        conserved = table.get("conserved", "energy", "electronvolt")[kept] / n_atoms
        drift = linear_fit(time[kept] / 1000.0, conserved, correlated=True)
    return RunSummary(
        run, polarization, n_atoms, (components[0], components[1], components[2]), induced, temperature, drift
    )


@dataclass(frozen=True)
class FieldResponse:
    """⟨M⟩ along ``axis`` per molecule (e·Å) with errors at ``fields`` (V/Å), the line, and ε_r with its error."""

    axis: Array
    fields: Array
    dipoles: Array
    errors: Array
    line: LinearFit
    permittivity: float
    permittivity_error: float
    with_shells: bool

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "axis": self.axis.tolist(),
            "field_V_per_A": self.fields.tolist(),
            "dipole_per_molecule_eA": self.dipoles.tolist(),
            "dipole_per_molecule_error_eA": self.errors.tolist(),
            "slope_eA_per_V_per_A": self.line.slope,
            "slope_error_eA_per_V_per_A": self.line.slope_error,
            "relative_permittivity": self.permittivity,
            "relative_permittivity_error": self.permittivity_error,
            "contains_electronic_part": self.with_shells,
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        note = "" if self.with_shells else " (nuclei and charges only: add ε∞ − 1)"
        slope = plus_minus(self.line.slope, self.line.slope_error, ".4f")
        unknown = "" if np.isfinite(self.line.slope_error) else " (no error from two points that have none)"
        return [
            f"slope                  {slope} e·Å/(V/Å) per molecule{unknown}",
            f"relative permittivity  {plus_minus(self.permittivity, self.permittivity_error, '.2f')}{note}",
        ]


def field_response(runs: list[RunSummary]) -> FieldResponse:
    """Straight line through ⟨M⟩(ε) of runs whose fields lie on one axis.

    Raises InputError for fewer than two different fields, fields on different axes, or different numbers of molecules.
    """
    for summary in runs:
        applied = summary.run.applied
        if applied.held.any() or applied.changing.any():
            raise InputError(
                f"{summary.run.folder}: {applied} is no constant field; leave it out, or use voltpi analyze dielectric "
                "(constant D) or hysteresis (fields that change)"
            )
    vectors = np.array([summary.run.field for summary in runs])
    strengths = np.linalg.norm(vectors, axis=1)
    if np.ptp(vectors, axis=0).max() == 0.0:
        raise InputError("all runs have the same field: give runs at two or more fields")
    axis = vectors[strengths.argmax()] / strengths.max()
    axis = axis * np.sign(axis[np.abs(axis).argmax()])
    fields = vectors @ axis
    for summary, vector, along in zip(runs, vectors, fields, strict=True):
        if np.linalg.norm(vector - along * axis) > 1e-9:
            raise InputError(
                f"{summary.run.folder}: its field {vector.tolist()} is not along {axis.tolist()}; leave it out"
            )
        if summary.polarization.n_molecules != runs[0].polarization.n_molecules:
            raise InputError(f"{summary.run.folder}: has another number of molecules than the first run; leave it out")
    n = runs[0].polarization.n_molecules
    means = [mean_with_error(summary.polarization.dipole @ axis / n) for summary in runs]
    dipoles, errors = np.array([m.value for m in means]), np.array([m.error for m in means])
    known = bool(np.all(np.isfinite(errors)) and errors.min() > 0.0)
    line = linear_fit(fields, dipoles, errors if known else None)
    volume = np.mean([summary.polarization.volume.mean() for summary in runs])
    scale = float(4.0 * np.pi * K_E * n / volume)
    return FieldResponse(
        axis,
        fields,
        dipoles,
        errors,
        line,
        1.0 + scale * line.slope,
        scale * line.slope_error,
        all("driver" in summary.polarization.source for summary in runs),
    )
