"""Are the labels in the units they are said to be in? Three tests that need nothing but the data.

1. Distances: the nearest neighbour of an atom is at 0.6 to 1.6 times the sum of covalent radii (positions in bohr or nm
   are not).
2. Forces: along a bond of length r, ½(F_j − F_i)·r̂ falls with r, and the slope is the stiffness of the bond. From
   O–H (48 eV/Å²) to metals (1 to 2 eV/Å²) stiffness goes as 45 r^−3.5 eV/Å² (r in Å) within a factor of three to four;
   Hartree/bohr for eV/Å is a factor of 51, kcal/mol/Å one of 23. A slope of the wrong sign means gradients.
3. Energies: a pair potential (any sum of radial functions for each pair of elements) is fitted to the *forces*; its
   energies then have to go up and down with the energy labels of frames of one composition by the same amount, whatever
   the pair potential misses. Hartree is a factor of 27, an energy per atom one of the number of atoms.

Each test has an opinion only where the data show a trend: enough bonds or frames, and a correlation well above chance.
Factors below ``TOLERANCE`` (eV/bohr for eV/Å: 1.9) are not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from voltpi.potential.errors import InputError
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.labels import FACTORS

__all__ = ["UnitReport", "check_units", "measure_units"]

TOLERANCE = 7.0
"""Ratios between its inverse and itself are not taken for a unit."""
_STIFFNESS, _POWER = 45.0, 3.5
_FRAMES, _ATOMS = 64, 5000
_BONDS = 30
_SHELL = 1.25
_FUNCTIONS, _REACH = 8, 5.0
_NOBLE = [atomic_numbers[s] for s in ("He", "Ne", "Ar", "Kr", "Xe", "Rn")]


@dataclass(frozen=True)
class UnitReport:
    """What was measured; None where the data show no trend.

    distance : median over atoms of nearest-neighbour distance / sum of covalent radii
    stiffness : slope of the clearest bond over the usual one; ``bond`` its name, ``slope`` in eV/Å² as labelled
    energy : change of energy labels over that of the pair potential fitted to forces
    atoms : mean number of atoms in a frame
    """

    distance: float | None = None
    bond: str = ""
    slope: float | None = None
    stiffness: float | None = None
    energy: float | None = None
    atoms: float = 0.0


def check_units(samples: Sequence[Sample]) -> UnitReport:
    """Measures the units of samples with bare labels (nothing subtracted) of one file.

    Raises InputError with the likely unit where positions, forces or energies are off by more than ``TOLERANCE`` (for
    positions: outside 0.6 to 1.6), or forces or energies have the wrong sign.
    """
    report = measure_units(samples)
    where = samples[0].path
    skip = "; if the labels are right all the same, set data.check_units: false"
    if report.distance is not None and not 0.6 < report.distance < 1.6:
        unit = min(
            FACTORS["length"], key=lambda u: abs(math.log(report.distance or 1.0) + math.log(FACTORS["length"][u]))
        )
        raise InputError(
            f"{where}: nearest neighbours are at {report.distance:.2g} times the sum of covalent radii, as where "
            f"positions in {unit} are read as Å: set units.length to {unit}{skip}"
        )
    if report.stiffness is not None and report.slope is not None:
        bond = f"bonds {report.bond} have a stiffness of {report.slope:.3g} eV/Å², usual would be about "
        bond += f"{report.slope / report.stiffness:.2g}"
        if report.stiffness < 0:
            raise InputError(f"{where}: {bond}, as where forces are gradients: change the sign of the forces{skip}")
        if not 1 / TOLERANCE < report.stiffness < TOLERANCE:
            unit = _nearest("forces", report.stiffness)
            raise InputError(f"{where}: {bond}, as where forces are in {unit}: set units.forces to {unit}{skip}")
    if report.energy is not None:
        scale = f"energy labels change by {report.energy:.3g} times what the forces imply"
        if report.energy < 0:
            raise InputError(f"{where}: {scale}: change the sign of the energies or of the forces{skip}")
        if not 1 / TOLERANCE < report.energy < TOLERANCE:
            unit = _nearest("energy", report.energy)
            if abs(math.log(report.energy * report.atoms)) < abs(math.log(report.energy * FACTORS["energy"][unit])):
                raise InputError(f"{where}: {scale}, as where they are per atom: give energies of whole frames{skip}")
            raise InputError(f"{where}: {scale}, as where they are in {unit}: set units.energy to {unit}{skip}")
    return report


def _nearest(quantity: str, ratio: float) -> str:
    """The unit in which labels come out ``ratio`` times too large; common ones go before odd combinations."""
    common = {"eV/A", "hartree/bohr", "rydberg/bohr", "kcal/mol/A", "kJ/mol/A", "kJ/mol/nm", "meV/A"}
    units = {u: f for u, f in FACTORS[quantity].items() if quantity != "forces" or u in common}
    return min(units, key=lambda u: abs(math.log(ratio * units[u])))


def measure_units(samples: Sequence[Sample]) -> UnitReport:
    """The three measurements on up to 64 frames spread over ``samples``."""
    chosen = _spread([s for s in samples if s.systems.n_atoms > 1 and s.edge_index.shape[1]])
    if not chosen:
        return UnitReport()
    bond, slope, stiffness = _stiffness(chosen)
    return UnitReport(
        distance=_distance(chosen),
        bond=bond,
        slope=slope,
        stiffness=stiffness,
        energy=_energy(chosen),
        atoms=float(np.mean([s.systems.n_atoms for s in chosen])),
    )


def _spread(samples: list[Sample]) -> list[Sample]:
    step = max(1, math.ceil(len(samples) / _FRAMES))
    chosen: list[Sample] = []
    atoms = 0
    for sample in samples[::step]:
        if chosen and atoms + sample.systems.n_atoms > _ATOMS:
            break
        chosen.append(sample)
        atoms += sample.systems.n_atoms
    return chosen


def _pairs(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """i, j, r [e], r̂ [e, 3] and r over the sum of covalent radii [e] of all pairs, both ways."""
    i, j = sample.edge_index.numpy()
    vectors = sample.vectors.numpy()
    r = np.linalg.norm(vectors, axis=1)
    numbers = sample.systems.numbers.numpy()
    return i, j, r, vectors / r[:, None], r / (covalent_radii[numbers[i]] + covalent_radii[numbers[j]])


def _distance(samples: Sequence[Sample]) -> float | None:
    nearest: list[np.ndarray] = []
    for sample in samples:
        i, _, _, _, ratio = _pairs(sample)
        closest = np.full(sample.systems.n_atoms, np.inf)
        np.minimum.at(closest, i, ratio)
        # an atom without neighbours within the cutoff says that it has none nearby, a noble gas says nothing
        nearest.append(closest[~np.isin(sample.systems.numbers.numpy(), _NOBLE)])
    values = np.concatenate(nearest)
    middle = float(np.median(values)) if len(values) else math.inf
    return middle if math.isfinite(middle) else None


def _stiffness(samples: Sequence[Sample]) -> tuple[str, float | None, float | None]:
    """Name, slope and slope over the usual one of the bond with the clearest trend."""
    bonds: dict[tuple[int, int], list[np.ndarray]] = {}
    for sample in samples:
        i, j, r, unit, ratio = _pairs(sample)
        numbers, forces = sample.systems.numbers.numpy(), sample.forces.numpy()
        pull = 0.5 * np.einsum("ec,ec->e", forces[j] - forces[i], unit)
        closest = np.full(len(numbers), np.inf)
        np.minimum.at(closest, i, ratio)
        # of an atom's own first shell: large ions behind another one (Ti-Ti across O) are no bonds
        bonded = (ratio < 1.3) & (ratio < _SHELL * np.minimum(closest[i], closest[j])) & (i < j)
        for a, b in {tuple(sorted(pair)) for pair in zip(numbers[i[bonded]], numbers[j[bonded]], strict=True)}:
            these = bonded & (np.minimum(numbers[i], numbers[j]) == a) & (np.maximum(numbers[i], numbers[j]) == b)
            bonds.setdefault((int(a), int(b)), []).append(np.stack([r[these], pull[these]]))
    best: tuple[float, str, float, float] | None = None
    for (a, b), parts in bonds.items():
        r, pull = np.concatenate(parts, axis=1)
        if len(r) < _BONDS or np.std(r) < 1e-3 or np.std(pull) == 0:
            continue
        correlation = float(np.corrcoef(r, pull)[0, 1])
        slope = -correlation * float(np.std(pull) / np.std(r))
        usual = _STIFFNESS * float(np.mean(r)) ** -_POWER
        if abs(correlation) > max(0.25, 5 / math.sqrt(len(r))) and (best is None or abs(correlation) > best[0]):
            best = abs(correlation), f"{chemical_symbols[a]}-{chemical_symbols[b]}", slope, slope / usual
    return ("", None, None) if best is None else best[1:]


def _energy(samples: Sequence[Sample]) -> float | None:
    """σ of the labels over σ of the fitted pair potential within one composition, with the sign of the correlation."""
    species = np.unique(np.concatenate([s.systems.numbers.numpy() for s in samples]))
    kinds = len(species) * (len(species) + 1) // 2
    if kinds * _FUNCTIONS > 1000:
        return None
    width = kinds * _FUNCTIONS
    normal, right, square = 1e-9 * np.eye(width), np.zeros(width), 0.0
    energies = np.zeros((len(samples), width))
    for k, sample in enumerate(samples):
        matrix, energies[k] = _pair_functions(sample, species, kinds)
        forces = sample.forces.numpy().reshape(-1)
        normal += matrix.T @ matrix
        right += matrix.T @ forces
        square += float(forces @ forces)
    normal += 1e-6 * np.trace(normal) / width * np.eye(width)
    weights = np.linalg.solve(normal, right)
    explained = float(2 * weights @ right - weights @ normal @ weights)
    composition = np.array([[(s.systems.numbers.numpy() == z).sum() for z in species] for s in samples], dtype=float)
    both = np.stack([energies @ weights, [s.energy for s in samples]], axis=1)
    # per atom, and relative to what the composition explains
    both, composition = (x / composition.sum(1, keepdims=True) for x in (both, composition))
    both -= composition @ np.linalg.lstsq(composition, both, rcond=1e-8)[0]
    free = len(samples) - int(np.linalg.matrix_rank(composition, tol=1e-8))
    spread = both.std(0)
    if free < 8 or spread.min() <= 1e-12 or explained < 0.3 * square:
        return None
    correlation = float(np.corrcoef(both.T)[0, 1])
    if abs(correlation) < max(0.6, 2.5 / math.sqrt(free)):
        return None
    return math.copysign(float(spread[1] / spread[0]), correlation)


def _pair_functions(sample: Sample, species: np.ndarray, kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Forces [3n, k] and energies [k] of each radial function of each pair of elements."""
    i, j, r, unit, _ = _pairs(sample)
    near = r < _REACH
    i, j, r, unit = i[near], j[near], r[near], unit[near]
    index = np.searchsorted(species, sample.systems.numbers.numpy())
    low, high = np.minimum(index[i], index[j]), np.maximum(index[i], index[j])
    kind = high * (high + 1) // 2 + low
    # 1/r^k, smooth to zero with its slope at the reach
    powers = np.arange(1, _FUNCTIONS + 1)
    switch, dswitch = (1 - (r / _REACH) ** 2) ** 2, -4 * r / _REACH**2 * (1 - (r / _REACH) ** 2)
    radial = r[:, None] ** -powers
    value = radial * switch[:, None]
    slope = -powers * radial / r[:, None] * switch[:, None] + radial * dswitch[:, None]
    n = sample.systems.n_atoms
    energies = np.zeros((kinds, _FUNCTIONS))
    np.add.at(energies, kind, 0.5 * value)
    forces = np.zeros((n, kinds, 3, _FUNCTIONS))
    # each pair comes both ways: half of φ'(r) r̂ from each, on both ends
    np.add.at(forces, (i, kind), unit[:, :, None] * slope[:, None, :])
    return forces.transpose(0, 2, 1, 3).reshape(3 * n, kinds * _FUNCTIONS), energies.reshape(-1)
