"""Work that a field in time does, against the energy that the atoms take up (i-PI's driven dynamics).

The Hamiltonian of the driven run is H(t) = H₀ − ε(t)·M, with H₀ = kinetic + potential energy at zero driven field (with
the springs of a ring polymer; a static field of the driver is part of it) and M the dipole at zero driven field. So

    dH₀/dt = ε·Ṁ = Σ_i ε·Z*_i v_i      and      W(t) = ∫₀ᵗ ε·Ṁ dt' = [ε·M]₀ᵗ − ∫₀ᵗ (∂ε/∂t)·M dt'

The last form needs M alone, sampled finely enough for the product with ∂ε/∂t, which is slow; it is integrated by cubic
splines. i-PI's ``conserved`` leaves the work out: it is H₀ minus the heat from the thermostat, so its change is the
energy that the field brought, with a thermostat and without.

What the time step dt adds: velocity Verlet follows not H₀ but, up to dt⁴, its shadow energy

    H̃ = H₀ − dt²/12 (K̈ − B) − dt²/24 B,     B = Σ_i |F_i|²/m_i,  K̈ the second derivative of the kinetic energy,

and it is H̃ that changes by W where the field is off (E. Hairer, C. Lubich, G. Wanner, Geometric Numerical Integration,
2nd ed. (2006), ch. IX; R. D. Engle, R. D. Skeel, M. Drees, J. Comput. Phys. 206, 432 (2005)). Where a run without
thermostat and beads wrote forces before and after its pulse, H̃ is taken there.

In a weak field the absorption coefficient α and refractive index n follow from the energy per volume and ∫ε² dt:
n α = W/(V c ε₀ ∫ε² dt), their mean over the spectrum of the pulse. The susceptibility at the field's frequency is a
ratio of transforms, χ(ω) = ∫ M e^{iωt} dt / (V ε₀ ∫ ε e^{iωt} dt), over a whole pulse that leaves nothing ringing, or
over whole periods of a plane wave. It is that of the nuclei, as M lacks what a driven field induces in charges and
shells at once (χ∞ of the driver's ``polarizability`` adds to it), and holds the noise of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ipi.utils.units import Elements
from numpy.typing import NDArray
from scipy import constants
from scipy.interpolate import CubicSpline

from voltpi.analysis.driven_field import DrivenField, driven_field_of
from voltpi.analysis.ipi_files import Properties, convert, read_forces
from voltpi.analysis.polarization import Polarization, polarization_of
from voltpi.analysis.run_inputs import simulations
from voltpi.analysis.runs import Run
from voltpi.potential.errors import InputError

__all__ = ["Absorption", "absorption_of", "work_of_field"]

Array = NDArray[np.float64]

_EPSILON_0 = constants.epsilon_0 * constants.angstrom / constants.e  # e/(V Å)
_OFF = 1e-3  # of the envelope's top: below it the field no longer counts in the shadow energy
# n α in cm⁻¹ from eV/Å³ and (V/Å)² fs
_PER_CM = constants.e / (constants.c * constants.epsilon_0) / (constants.angstrom * 1e-15) * 1e-2


@dataclass(frozen=True)
class Shadow:
    """From H̃ before and after the pulse: ``absorbed`` eV, and the ``spread`` of H̃ − W over these frames, eV."""

    absorbed: float
    spread: float
    n_before: int
    n_after: int


@dataclass(frozen=True)
class Absorption:
    """What the field did to one run.

    steps [f] · time [f] fs · field [f, 3] V/Å · dipole [f, 3] e·Å · work [f] eV · absorbed [f] eV, the change of i-PI's
    conserved quantity · matter [f] eV, the change of H₀ or None · volume Å³ · fluence ∫ε² dt in (V/Å)² fs ·
    work_error eV, of the integration · shadow, where it can be taken
    """

    driving: DrivenField
    steps: NDArray[np.int64]
    time: Array
    field: Array
    dipole: Array
    work: Array
    absorbed: Array
    matter: Array | None
    volume: float
    fluence: float
    work_error: float
    shadow: Shadow | None

    @property
    def difference(self) -> float:
        """(absorbed − work) at the end, relative to the largest work on the way."""
        return float(self.absorbed[-1] - self.work[-1]) / float(np.abs(self.work).max())

    @property
    def susceptibility(self) -> complex | None:
        """χ of the nuclei at the field's frequency, along it.

        None without a frequency, a whole period of a wave, or a whole pulse after which M has come back to a tenth of
        its largest change (what rings on, or drifts, has no transform).
        """
        field, omega = self.driving, self.driving.frequency
        if not omega:
            return None
        along = np.array(field.amplitude) / field.strength
        kept = slice(None)
        if field.is_pulse:
            change = np.abs((self.dipole - self.dipole[0]) @ along)
            if max(*field.envelope(self.time[[0, -1]]) / _OFF, 10.0 * change[-1] / change.max()) > 1.0:
                return None
        else:
            spacing = self.time[1] - self.time[0]
            periods = int(np.ptp(self.time) * omega / (2.0 * np.pi))
            if not periods:
                return None
            kept = slice(-1 - round(periods * 2.0 * np.pi / omega / spacing), None)
        time = self.time[kept]
        wave = np.exp(1j * omega * time)
        moved = np.trapezoid((self.dipole[kept] - self.dipole[kept][0]) @ along * wave, time)
        driving = np.trapezoid(self.field[kept] @ along * wave, time)
        return complex(moved / driving) / self.volume / _EPSILON_0

    @property
    def n_alpha(self) -> float:
        """Refractive index times absorption coefficient, cm⁻¹; nan where the run ends within the pulse."""
        if self.driving.is_pulse and self.time[-1] < self.driving.peak + 2.0 * self.driving.sigma:
            return float("nan")
        return float(self.work[-1]) / self.volume / self.fluence * _PER_CM

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        end = float(self.work[-1])
        out: dict[str, Any] = {
            "amplitude_V_per_A": list(self.driving.amplitude),
            "wavenumber_per_cm": self.driving.wavenumber,
            "phase_rad": self.driving.phase,
            "peak_fs": self.driving.peak if self.driving.is_pulse else None,
            "sigma_fs": self.driving.sigma if self.driving.is_pulse else None,
            "length_fs": float(np.ptp(self.time)),
            "work_eV": end,
            "work_integration_error_eV": self.work_error,
            "energy_absorbed_eV": float(self.absorbed[-1]),
            "difference_relative": self.difference,
            "volume_A3": self.volume,
            "fluence_V2_fs_per_A2": self.fluence,
            "n_alpha_per_cm": self.n_alpha,
        }
        chi = self.susceptibility
        if chi is not None:
            out |= {"susceptibility_real": chi.real, "susceptibility_imaginary": chi.imag}
        if self.matter is not None:
            out["kinetic_and_potential_change_eV"] = float(self.matter[-1])
            out["heat_to_thermostat_eV"] = float(self.absorbed[-1] - self.matter[-1])
        if self.shadow is not None:
            s = self.shadow
            out |= {
                "shadow_energy_absorbed_eV": s.absorbed,
                "shadow_difference_relative": (s.absorbed - end) / end,
                "shadow_spread_eV": s.spread,
            }
        return out

    def report(self) -> list[str]:
        """Lines for a person."""
        end = float(self.work[-1])
        lines = [
            f"field: {self.driving.words()}",
            f"work of the field: {end:.6g} eV in {np.ptp(self.time):g} fs (integrated to {self.work_error:.1g} eV)",
            f"energy absorbed: {self.absorbed[-1]:.6g} eV, the change of the conserved quantity, which leaves the work "
            f"out; differs from the work by {abs(self.difference):.1e} of its largest value",
        ]
        if self.matter is not None and abs(self.absorbed[-1] - self.matter[-1]) > 1e-9 * abs(end):
            lines.append(
                f"of it, kinetic and potential energy: {self.matter[-1]:.6g} eV, and heat to the thermostat: "
                f"{self.absorbed[-1] - self.matter[-1]:.6g} eV"
            )
        if self.shadow is not None:
            s = self.shadow
            lines.append(
                f"with the time step's part taken out (shadow energy, {s.n_before} frames before and {s.n_after} after "
                f"the pulse): absorbed {s.absorbed:.6g} eV, which differs from the work by "
                f"{abs(s.absorbed - end) / abs(end):.1e}"
            )
        if np.isfinite(self.n_alpha):
            lines.append(f"absorption (refractive index times coefficient): {self.n_alpha:.4g} cm⁻¹")
        else:
            lines.append("the run ends within the pulse: no absorption coefficient")
        chi = self.susceptibility
        if chi is not None:
            lines.append(
                f"susceptibility of the nuclei at {self.driving.wavenumber:.4g} cm⁻¹: {chi.real:.4g} {chi.imag:+.4g} i"
            )
        return lines

    def table(self) -> tuple[list[str], Array]:
        """Header and rows of the CSV."""
        header = ["step", "time_fs", *(f"field_{c}_V_per_A" for c in "xyz"), *(f"M{c}_eA" for c in "xyz")]
        columns = [self.steps, self.time, self.field, self.dipole, self.work, self.absorbed]
        header += ["work_eV", "absorbed_eV"]
        if self.matter is not None:
            header.append("kinetic_and_potential_eV")
            columns.append(self.matter)
        return header, np.column_stack(columns)


def work_of_field(field: DrivenField, time: Array, dipole: Array) -> Array:
    """W [f] (eV) from the first record on, of a field on a dipole [f, 3] (e·Å) at times [f] (fs), four or more."""
    coupling = (field(time) * dipole).sum(1)
    spline = CubicSpline(time, (field.rate(time) * dipole).sum(1))
    inner = spline.antiderivative()(time)
    return np.asarray(coupling - coupling[0] - (inner - inner[0]))


def absorption_of(run: Run, *, skip: float = 0.0) -> Absorption:
    """Work and energy of a driven run, from ``skip`` fs on.

    Raises InputError for a run that was not driven, one without dipoles, or fewer than eight steps at which both the
    dipole and the energies were written.
    """
    field = driven_field_of(run.folder, run.outputs)
    table = run.table()
    conserved = table.get("conserved", "energy", "electronvolt")
    p = polarization_of(run).after(skip)
    steps, of_dipoles, of_rows = np.intersect1d(p.steps, table.get("step").astype(int), return_indices=True)
    if len(steps) < 8:
        raise InputError(
            f"{run.folder}: dipoles and energies have {len(steps)} steps in common, fewer than 8; print both with the "
            "same stride, every few steps"
        )
    if not field.strength:
        raise InputError(f"{run.folder}: the amplitude of the driving field is 0, which does no work; set <amp>")
    work = work_of_field(field, p.time, p.dipole)
    coarse = work_of_field(field, p.time[::2], p.dipole[::2])
    error = float(np.abs(coarse - work[::2]).max()) / 15.0  # of fourth order
    zero = work[of_dipoles[0]]
    matter = _matter(table)
    shadow = _shadow(run, field, table, p, work) if matter is not None else None
    squares = (field(p.time) ** 2).sum(1)
    return Absorption(
        driving=field,
        steps=steps,
        time=p.time[of_dipoles],
        field=field(p.time[of_dipoles]),
        dipole=p.dipole[of_dipoles],
        work=work[of_dipoles] - zero,
        absorbed=conserved[of_rows] - conserved[of_rows[0]],
        matter=None if matter is None else matter[of_rows] - matter[of_rows[0]],
        volume=float(p.volume.mean()),
        fluence=float(np.trapezoid(squares, p.time)),
        work_error=error,
        shadow=shadow,
    )


def _matter(table: Properties) -> Array | None:
    """H₀ (eV) along a run, or None without its parts."""
    if not {"potential", "kinetic_md"} <= set(table.columns):
        return None
    h0 = table.get("potential", "energy", "electronvolt") + table.get("kinetic_md", "energy", "electronvolt")
    if "spring" in table.columns:
        h0 = h0 + table.get("spring", "energy", "electronvolt")
    return h0


def _shadow(run: Run, field: DrivenField, table: Properties, p: Polarization, work: Array) -> Shadow | None:
    """H̃ before and after a pulse; None where there is none, or the run has a thermostat, beads or rows too rare."""
    conserved = table.get("conserved", "energy", "electronvolt")
    kinetic = table.get("kinetic_md", "energy", "electronvolt")
    h0 = _matter(table)
    assert h0 is not None
    rows = {int(step): i for i, step in enumerate(table.get("step"))}
    time = table.get("time", "time", "femtosecond")
    without_thermostat = np.ptp(h0 - conserved) < 1e-6 * max(float(np.ptp(h0)), 1e-6)
    free = not any(
        root.find(f".//{tag}") is not None
        for _, root in simulations(run.folder, [path.name for path in run.outputs])
        for tag in ("fixatoms", "fixatoms_dof", "masses")
    )
    if not (field.is_pulse and without_thermostat and free and len(run.forces) == 1):
        return None
    place = {int(step): i for i, step in enumerate(p.steps)}
    before: list[float] = []
    after: list[float] = []
    for frame in read_forces(run.forces[0]):
        i = rows.get(-1 if frame.step is None else frame.step)
        if i is None or frame.step not in place or not {frame.step - 1, frame.step + 1} <= set(rows):
            continue
        if field.envelope(time[i]) > _OFF:
            continue
        dt = time[i + 1] - time[i]
        masses = [float(convert(Elements.mass(symbol), "mass", "atomic_unit", "dalton")) for symbol in frame.symbols]
        b = float(((frame.values**2).sum(1) / masses).sum()) * _EV_PER_FS2
        curvature = (kinetic[i + 1] - 2.0 * kinetic[i] + kinetic[i - 1]) / dt**2
        h = h0[i] - dt**2 / 12.0 * (curvature - b) - dt**2 / 24.0 * b
        (before if time[i] < field.peak else after).append(h - float(work[place[frame.step]]))
    if not before or not after:
        return None
    return Shadow(
        absorbed=float(work[-1] - work[0] + np.mean(after) - np.mean(before)),
        spread=float(max(np.std(before), np.std(after))),
        n_before=len(before),
        n_after=len(after),
    )


_EV_PER_FS2 = constants.e / constants.atomic_mass / constants.angstrom**2 * 1e-30
"""eV/fs² in one (eV/Å)²/amu."""
