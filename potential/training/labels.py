"""How the labels of a file are called and in which units they are; every label is read, checked and converted here.

Inside, everything is in eV, Å, e, V/Å, with stress in ASE's sign (tension positive) and polarizability in Å³.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import Bohr, Debye, GPa, Hartree, Rydberg, kcal, kJ, mol

from voltpi.potential.errors import InputError

__all__ = ["AUTO", "KINDS", "Source", "Units", "checked", "detect", "label"]

AUTO = "auto"

_E2_PER_EV = 14.399645478  # Å, e²/(4π ε0): Å³ of a polarizability of 1 e·Å/(V/Å)
_ENERGY = {"eV": 1.0, "meV": 1e-3, "hartree": Hartree, "rydberg": Rydberg, "kcal/mol": kcal / mol, "kJ/mol": kJ / mol}
_LENGTH = {"A": 1.0, "bohr": Bohr, "nm": 10.0}
_PER_VOLUME = {f"{e}/{x}^3": ue / ux**3 for e, ue in _ENERGY.items() for x, ux in _LENGTH.items()}
FACTORS: dict[str, dict[str, float]] = {
    "length": _LENGTH,
    "energy": _ENERGY,
    "forces": {f"{e}/{x}": ue / ux for e, ue in _ENERGY.items() for x, ux in _LENGTH.items()},
    "stress": {**_PER_VOLUME, "GPa": GPa, "kbar": 0.1 * GPa, "bar": 1e-4 * GPa},
    "field": {"V/A": 1.0, "V/nm": 0.1, "hartree/e/bohr": Hartree / Bohr},
    "dipole": {"e*A": 1.0, "debye": Debye, "e*bohr": Bohr},
    "polarizability": {"A^3": 1.0, "bohr^3": Bohr**3, "e*A/(V/A)": _E2_PER_EV},
}
"""What one of each unit is in eV, Å, e, V/Å (stress eV/Å³, polarizability Å³)."""


@dataclass(frozen=True)
class Units:
    """Units of the labels of a file; ``Å`` and ``A``, ``·`` and ``*`` are the same.

    Raises InputError for a unit that is not known.
    """

    length: str = "A"
    energy: str = "eV"
    forces: str = "eV/A"
    stress: str = "eV/A^3"
    field: str = "V/A"
    dipole: str = "e*A"
    polarizability: str = "A^3"

    def __post_init__(self) -> None:
        for unit in fields(self):
            given = getattr(self, unit.name)
            plain = given.replace("Å", "A").replace("·", "*").replace("³", "^3").replace(" ", "")
            known = {name.lower(): name for name in FACTORS[unit.name]}
            if plain.lower() not in known:
                raise InputError(f"units.{unit.name} is '{given}': choose one of {', '.join(known.values())}")
            object.__setattr__(self, unit.name, known[plain.lower()])

    def factor(self, quantity: str) -> float:
        """What a label of ``quantity`` is multiplied by; 1 for what has one unit only (charges, Born charges)."""
        name = "energy" if quantity == "virial" else quantity
        return FACTORS[name][getattr(self, name)] if name in FACTORS else 1.0


@dataclass(frozen=True)
class Source:
    """One file of labelled structures, and how its labels are called.

    Attributes
    ----------
    path : extended XYZ, ASE database, or anything else ASE reads
    name : data set; files of one level of theory share a name, and so their reference energies
    energy_key, forces_key : labels, in ``info``/``arrays`` or among the results of an ASE calculator
    stress_key, virial_key : stress [3, 3] or Voigt (ASE's sign), or virial (−stress × volume), or None; frames without
        one, or without a volume, are trained on without it
    field_key : uniform field in ``info`` ([3]), or None for no field
    charge_key : net charge in ``info`` (e), or None for neutral
    dipole_key, polarizability_key, born_charges_key : [3], [3, 3] and per atom [3, 3] (e; index order atom, dipole
        direction, displacement direction), compared with the charges' answer, or None
    group_key : text in ``info`` by which errors are told apart, or None
    units : of all labels
    weight : of the data set in the loss
    reduce : cut frames that repeat themselves down to their primitive cell (``reduce_translations``)
    extensive : further names in ``info`` that scale with the size of the cell
    frames : ASE index of the frames to take

    Any key may be ``auto``: see :func:`detect`.
    """

    path: str | Path
    name: str
    energy_key: str = "REF_energy"
    forces_key: str = "REF_forces"
    stress_key: str | None = None
    virial_key: str | None = None
    field_key: str | None = None
    charge_key: str | None = None
    dipole_key: str | None = None
    polarizability_key: str | None = None
    born_charges_key: str | None = None
    group_key: str | None = None
    units: Units = field(default_factory=Units)
    weight: float = 1.0
    reduce: bool = False
    extensive: tuple[str, ...] = ()
    frames: str = ":"

    def key(self, kind: str) -> str | None:
        """Name of the label of one of :data:`KINDS`."""
        return getattr(self, f"{kind}_key")


_STEMS: dict[str, tuple[str, ...]] = {
    "energy": ("energy", "total_energy", "E"),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "virial": ("virial", "virials"),
    "field": ("electric_field", "efield", "external_field"),
    "charge": ("total_charge", "net_charge", "charge"),
    "dipole": ("dipole",),
    "polarizability": ("polarizability",),
    "born_charges": ("born_charges", "born_effective_charges", "bec"),
    "group": ("config_type",),
}
KINDS = tuple(_STEMS)
_REQUIRED = ("energy", "forces")


def _candidates(kind: str) -> list[str]:
    stems = _STEMS[kind]
    named = [f"{prefix}{stem}" for prefix in ("REF_", "ref_", "DFT_", "dft_") for stem in stems]
    return [*named, *(f"{stem}_{suffix}" for suffix in ("ref", "REF", "dft", "DFT") for stem in stems), *stems]


def detect(source: Source, frames: Sequence[Atoms]) -> Source:
    """``source`` with every key that is ``auto`` replaced by the label that most frames have, or None.

    Names with REF_, ref_, DFT_ or dft_ before, or _ref, _REF, _dft or _DFT after them go before bare ones; upper and
    lower case count. A stress goes before a virial. Raises InputError where there is no energy or no forces.
    """
    found: dict[str, str | None] = {}
    for kind in KINDS:
        if source.key(kind) != AUTO:
            continue
        counts = {name: sum(label(atoms, name) is not None for atoms in frames) for name in _candidates(kind)}
        best = max(counts, key=lambda name: counts[name])
        found[f"{kind}_key"] = best if counts[best] else None
        if not counts[best] and kind in _REQUIRED:
            raise InputError(
                f"{source.path}, frame 0: no label looks like {kind} (the frame has {_known(frames[0])}): name it in "
                f"labels.{kind}"
            )
    if found.get("stress_key", source.stress_key) is not None and "virial_key" in found:
        found["virial_key"] = None
    return replace(source, **found)  # type: ignore[arg-type]


def label(atoms: Atoms, key: str) -> object | None:
    """A label by name: per-atom arrays, then info, then the results that ASE keeps in a calculator."""
    results = {} if atoms.calc is None else atoms.calc.results
    for place in (atoms.arrays, atoms.info, results):
        if key in place:
            return place[key]
    return None


def _known(atoms: Atoms) -> str:
    return ", ".join(sorted(set(atoms.arrays) | set(atoms.info) | set(atoms.calc.results if atoms.calc else ())))


def checked(source: Source, frame: int, atoms: Atoms, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A label in eV, Å, e, V/Å. Raises InputError that names file, frame and label where it is not that."""
    key = source.key(kind)
    assert key is not None
    value = label(atoms, key)
    where = f"{source.path}, frame {frame}: {kind} label '{key}'"
    if value is None:
        raise InputError(f"{where} is missing: name one of {_known(atoms)}, or remove the frame")
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{where} is {value!r}, not numbers: correct or remove the frame") from None
    array = _shaped(array, shape)
    if array.shape != shape:
        raise InputError(f"{where} has shape {list(array.shape)}, expected {list(shape)}: correct or remove the frame")
    if not np.isfinite(array).all():
        bad = "" if not shape else f" at index {np.argwhere(~np.isfinite(array))[0].tolist()}"
        raise InputError(f"{where} is not finite{bad}: correct or remove the frame")
    return array * source.units.factor(kind)


def _shaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Voigt stresses [6], flattened tensors [9] and [n, 9], and vectors [1, 3] in the shape they stand for."""
    if shape == (3, 3) and array.shape == (6,):
        return voigt_6_to_full_3x3_stress(array)
    alike = array.size == int(np.prod(shape))
    flattened = len(shape) >= 2 and shape[-2:] == (3, 3) and array.shape[-1:] == (9,)
    wrapped = array.ndim == len(shape) + 1 and array.shape[:1] == (1,)
    return array.reshape(shape) if alike and (flattened or wrapped) else array
