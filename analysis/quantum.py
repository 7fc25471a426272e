"""Quantum kinetic energy and radius of gyration of the ring polymers, by element.

The centroid virial estimator of the kinetic energy of an atom,

    K = (3/2) k_B T − (1/2P) Σ_b (q_b − q̄) · f_b        f_b = −∂V/∂q_b,  q̄ = Σ_b q_b / P

(M. F. Herman, E. J. Bruskin, B. J. Berne, J. Chem. Phys. 76, 5150 (1982)), and the radius of gyration

    r_g = [ (1/P) Σ_b |q_b − q̄|² ]^½ ,       for a free particle  ⟨r_g²⟩ = ħ²/(4 m k_B T)

averaged over the atoms of an element. i-PI computes both: as properties (``kinetic_cv(H)``, ``r_gyration(H)``) or for
each atom (trajectories ``kinetic_cv``, ``r_gyration``); where it wrote neither they are made from the beads' positions
and forces. A classical atom has (3/2) k_B T and r_g = 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.ipi_files import ByStep, read_forces, read_trajectory, read_vectors
from voltpi.analysis.run_inputs import ensemble_temperature, given_to_drivers
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import Mean, mean_with_error, plus_minus
from voltpi.analysis.trajectory import frames_of, together
from voltpi.potential.errors import InputError

__all__ = ["Quantum", "Series", "Species", "quantum_of"]

Array = NDArray[np.float64]

K_B = constants.k / constants.e
"""eV/K."""


@dataclass(frozen=True)
class Series:
    """``values`` [f] at ``times`` [f] (fs), and where they come from."""

    times: Array
    values: Array
    source: str

    @property
    def mean(self) -> Mean:
        return mean_with_error(self.values)


@dataclass(frozen=True)
class Species:
    """The atoms of one element: kinetic energy (eV) of one atom, its tensor's diagonal [f, 3] (eV), r_g (Å).

    ``free``: root mean square r_g (Å) of a free particle of that mass.
    """

    element: str
    n_atoms: int
    kinetic: Series | None
    components: Array | None
    gyration: Series | None
    free: float

    def numbers(self, classical: float) -> dict[str, Any]:
        """For JSON: meV and Å."""
        out: dict[str, Any] = {"n_atoms": self.n_atoms, "classical_meV": 1e3 * classical}
        if self.kinetic is not None:
            mean = self.kinetic.mean
            out |= {
                "kinetic_energy_meV": 1e3 * mean.value,
                "kinetic_energy_error_meV": 1e3 * mean.error,
                "quantum_excess_meV": 1e3 * (mean.value - classical),
                "n_independent": mean.n_independent,
                "kinetic_energy_from": self.kinetic.source,
            }
        if self.components is not None:
            parts = [mean_with_error(column) for column in self.components.T]
            out |= {
                "kinetic_energy_xyz_meV": [1e3 * part.value for part in parts],
                "kinetic_energy_xyz_error_meV": [1e3 * part.error for part in parts],
            }
        if self.gyration is not None:
            mean = self.gyration.mean
            out |= {
                "radius_of_gyration_A": mean.value,
                "radius_of_gyration_error_A": mean.error,
                "radius_of_gyration_free_A": self.free,
                "radius_of_gyration_from": self.gyration.source,
            }
        return out

    def report(self, classical: float) -> Iterator[str]:
        """Lines for a person."""
        if self.kinetic is not None:
            mean = self.kinetic.mean
            yield (
                f"{self.element}: kinetic energy {plus_minus(1e3 * mean.value, 1e3 * mean.error, '.2f')} meV an atom, "
                f"classical {1e3 * classical:.2f} meV{mean.caution}"
            )
        if self.gyration is not None:
            mean = self.gyration.mean
            yield (
                f"{self.element}: radius of gyration {plus_minus(mean.value, mean.error, '.4f')} Å, free particle "
                f"{self.free:.4f} Å{mean.caution}"
            )


@dataclass(frozen=True)
class Quantum:
    """What a path-integral run at ``temperature`` (K) says about its elements."""

    temperature: float
    species: tuple[Species, ...]

    @property
    def classical(self) -> float:
        """(3/2) k_B T, eV."""
        return 1.5 * K_B * self.temperature

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "temperature_K": self.temperature,
            "elements": {s.element: s.numbers(self.classical) for s in self.species},
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        return [line for s in self.species for line in s.report(self.classical)]


def quantum_of(run: Run, *, temperature: float | None = None, skip: float = 0.0) -> Quantum:
    """Kinetic energies and radii of gyration of a run, without its first ``skip`` fs.

    Raises InputError where the temperature (K), the elements or both quantities cannot be known from its files.
    """
    if temperature is None:
        temperature = ensemble_temperature(run.folder, run.outputs)
    if temperature is None or temperature <= 0.0:
        raise InputError(f"{run.folder}: the temperature is not known; give --temperature KELVIN")
    symbols = _symbols(run)
    elements = list(dict.fromkeys(symbols))
    kinetic = {e: _series(run, "kinetic_cv", "energy", "electronvolt", e, symbols, skip) for e in elements}
    gyration = {e: _series(run, "r_gyration", "length", "angstrom", e, symbols, skip) for e in elements}
    components = {e: _components(run, e, symbols.count(e), skip) for e in elements}
    if not all(kinetic.values()) or not all(gyration.values()):
        made = _from_beads(run, temperature, symbols, skip, not all(kinetic.values()))
        kinetic = {e: kinetic[e] or made.get(("kinetic", e)) for e in elements}
        gyration = {e: gyration[e] or made.get(("gyration", e)) for e in elements}
    if not any(kinetic.values()) and not any(gyration.values()):
        raise InputError(
            f"{run.folder}: no kinetic energies and no beads; add <properties> [step, time{{femtosecond}}, "
            f"kinetic_cv({elements[0]}){{electronvolt}}, r_gyration({elements[0]}){{angstrom}}] to the i-PI input"
        )
    species = []
    for e in elements:
        mass = atomic_masses[atomic_numbers[e]] * constants.atomic_mass
        free = constants.hbar / (2.0 * np.sqrt(mass * constants.k * temperature)) / constants.angstrom
        species.append(Species(e, symbols.count(e), kinetic[e], components[e], gyration[e], float(free)))
    return Quantum(float(temperature), tuple(species))


def _symbols(run: Run) -> list[str]:
    """Elements of the atoms, from positions or the start structure."""
    for path in run.positions[:1]:
        for frame in read_trajectory(path):
            return list(frame.atoms.symbols)
    for paths in run.vectors.values():
        for vectors in read_vectors(paths[0]):
            return vectors.symbols
    from ase.io import read

    for driver in given_to_drivers(run.folder, run.outputs):
        if driver.template is not None and driver.template.is_file():
            return list(read(driver.template).symbols)
    raise InputError(f"{run.folder}: which elements there are is not known; give a trajectory of positions as well")


def _series(
    run: Run, name: str, family: str, unit: str, element: str, symbols: list[str], skip: float
) -> Series | None:
    """A quantity of one atom of an element, from the properties or from a trajectory of all atoms."""
    column = f"{name}({element})"
    alone = len(set(symbols)) == 1
    if run.properties is not None:
        for title in (column, *([name] if alone else [])):
            if title in run.properties.columns:
                values = run.properties.get(title, family, unit)
                times = run.times(run.properties.get("step"))
                late = times >= times[0] + skip
                if not late.any():
                    raise InputError(f"skip is {skip:g} fs but the run is {np.ptp(times):g} fs long: skip less")
                atoms = symbols.count(element) if name == "kinetic_cv" else 1
                return Series(times[late], values[late] / atoms, f"{run.properties.path.name}, {title}")
    for path in run.vectors.get(name, ()):
        steps, rows = [], []
        late_enough = run.after(skip)
        chosen = np.array([s == element for s in symbols])
        for vectors in read_vectors(path):
            if vectors.step is None or not late_enough(vectors.step):
                continue
            own = vectors.in_unit(family, unit)[chosen]
            rows.append(own.sum(1).mean() if name == "kinetic_cv" else np.linalg.norm(own, axis=1).mean())
            steps.append(vectors.step)
        if rows:
            return Series(run.times(steps), np.array(rows), path.name)
    return None


def _components(run: Run, element: str, n_atoms: int, skip: float) -> Array | None:
    """xx, yy and zz of the kinetic energy of one atom [f, 3] (eV), where ``kinetic_tens(H)`` was written."""
    title = f"kinetic_tens({element})"
    if run.properties is None or title not in run.properties.columns:
        return None
    times = run.times(run.properties.get("step"))
    values = run.properties.get(title, "energy", "electronvolt")
    return values[times >= times[0] + skip, :3] / n_atoms


def _from_beads(
    run: Run, temperature: float, symbols: list[str], skip: float, with_kinetic: bool
) -> dict[tuple[str, str], Series]:
    """Both quantities from the positions of the beads, and their forces at the same steps where there are any.

    Raises InputError where steps of the beads differ, or positions and forces have none in common.
    """
    if len(run.positions) < 2:
        return {}
    use_forces = with_kinetic and len(run.forces) == len(run.positions)
    forces = ByStep(lambda: together(run.forces, read_forces))
    steps: dict[str, list[int]] = {"gyration": [], "kinetic": []}
    rows: dict[str, list[Array]] = {"gyration": [], "kinetic": []}
    for step, frames in frames_of(run, skip):
        q = np.array([atoms.positions for atoms in frames])
        inner = q - q.mean(0)
        rows["gyration"].append(np.sqrt(np.square(inner).sum(2).mean(0)))
        steps["gyration"].append(step)
        of_step = forces.at(step) if use_forces else None
        if of_step is not None:
            f = np.array([bead.values for bead in of_step])
            rows["kinetic"].append(1.5 * K_B * temperature - 0.5 * (inner * f).sum(2).mean(0))
            steps["kinetic"].append(step)
    if use_forces and not steps["kinetic"]:
        raise InputError(
            f"{run.forces[0]}: has no step in common with {run.positions[0].name}; print positions and forces with "
            "strides of which one divides the other"
        )
    made = {}
    sources = {"gyration": "positions of the beads", "kinetic": "positions and forces of the beads"}
    for name, source in sources.items():
        if not steps[name]:
            continue
        times, values = run.times(steps[name]), np.array(rows[name])
        for element in dict.fromkeys(symbols):
            own = np.array([s == element for s in symbols])
            made[name, element] = Series(times, values[:, own].mean(1), source)
    return made
