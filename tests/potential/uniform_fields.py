"""Structures in uniform fields and at constant displacement, as the tests of both take them."""

from __future__ import annotations

import math

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, FixedCharges, PQEq
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.systems import Systems

from structures import flat_cell, rattled_salt, water_box

TIGHT = {"accuracy": 1e-9, "tolerance": 1e-11}
NAN = math.nan
FREE = (NAN, NAN, NAN)

# field (V/Å), displacement (V/Å, nan: field)
APPLIED = {
    "field": ((0.05, -0.1, 0.07), None),
    "D": ((0.0, 0.0, 0.0), (0.3, -0.2, 0.15)),
    "D along z": ((0.0, 0.0, 0.0), (NAN, NAN, 0.2)),
    "mixed": ((0.05, 0.0, -0.04), (NAN, 0.25, NAN)),
}


def salt() -> Atoms:
    """Two formula units of NaCl in a skewed cell, off the sites of rock salt: it is polar."""
    atoms = bulk("NaCl", "rocksalt", 5.64, orthorhombic=True)
    atoms.positions += 0.12 * np.random.default_rng(4).normal(size=(4, 3))
    atoms.set_cell(atoms.cell.array @ [[1, 0.05, 0], [-0.03, 1.02, 0.04], [0.06, 0, 0.97]], scale_atoms=True)
    atoms.set_initial_charges([1.0, -1.0, 1.0, -1.0])
    return atoms


def mirrored_salt() -> Atoms:
    """``salt`` in a left-handed cell."""
    atoms = salt()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


KEEP = {"conserve": "fragments"}
MODELS = {
    "shells": (salt, PQEq, {}),
    "frozen": (salt, PQEq, {"response": "frozen"}),
    "no limiter": (rattled_salt, PQEq, {"limiter": "none"}),
    "fragments, shells": (water_box, PQEq, KEEP),
    "fragments, all": (water_box, PQEq, {**KEEP, "response": "all"}),
    "fragments, frozen": (water_box, PQEq, {**KEEP, "response": "frozen"}),
    "flat left-handed cell, all": (flat_cell, PQEq, {**KEEP, "response": "all"}),
    "left-handed cell, shells": (mirrored_salt, PQEq, {}),
    "given charges": (salt, FixedCharges, {"widths": {"Na": 0.7, "Cl": 0.5}}),
}


class Crystal:
    """One of ``MODELS`` under one of ``APPLIED``, to be solved for displaced atoms, other cells and other fields.

    ``origin``: fractional (e), from which M counts.
    """

    def __init__(self, model, applied="field", *, reduced=False, origin=None, **changes):
        build, kind, keywords = MODELS[model]
        self.atoms = build()
        self.model = kind(**{**TIGHT, **keywords, **changes})
        self.field, self.displacement = APPLIED[applied]
        self.field_cell = self.tensor(self.atoms.cell.array @ skew())[None] if reduced else None
        self.origin = None if origin is None else self.tensor(origin)[None]
        self.carried = None
        if kind is FixedCharges:
            self.carried = self.tensor(self.atoms.get_initial_charges())
        elif self.model.carries:
            self.carried = self.model.solve(self.system(field=(0, 0, 0), displacement=None)).charges

    @staticmethod
    def tensor(values):
        return torch.tensor(np.asarray(values, dtype=float))

    def system(self, atoms=None, *, field=None, displacement="own"):
        """With other atoms, field or displacement than its own."""
        atoms = self.atoms if atoms is None else atoms
        displacement = self.displacement if isinstance(displacement, str) else displacement
        system = Systems.from_atoms(atoms, field=self.field if field is None else field)
        if self.model.conserve == "fragments":
            system = assign_fragments(system)
        return system.replace(
            carried=self.carried,
            displacement=None if displacement is None else self.tensor(displacement)[None],
            field_cell=self.field_cell,
            origin=self.origin,
        )

    def solve(self, atoms=None, **changes):
        keywords = {k: changes.pop(k) for k in ("born_charges", "polarizability", "start") if k in changes}
        return self.model.solve(self.system(atoms, **changes), **keywords)

    @property
    def room(self):
        """V/(4πk_e)."""
        return self.atoms.get_volume() / (4 * math.pi * COULOMB_CONSTANT)


def skew():
    """A strain, so that the cell in which reduced fields are given is not the cell at hand."""
    return np.eye(3) + 0.02 * np.random.default_rng(8).normal(size=(3, 3))


def slope(energy, step):
    """dE/dx at 0, by central differences of fourth order."""
    first = (energy(step) - energy(-step)) / (2 * step)
    second = (energy(2 * step) - energy(-2 * step)) / (4 * step)
    return (4 * first - second) / 3
