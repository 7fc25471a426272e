"""Small structures that the tests of the potential share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk

_REFERENCE = Path(__file__).parent / "data" / "pqeq_structures.json"


def water_box() -> Atoms:
    """Three water molecules in a small triclinic cell (smaller than any cutoff)."""
    positions = [
        [0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0],
        [3, 0.2, 0], [3.5, 0.9, 0.2], [3.3, -0.7, 0.4],
        [0.3, 1, 3.0], [1.1, 1.2, 3.4], [-0.5, 1.2, 3.2],
    ]  # fmt: skip
    atoms = Atoms("OH2OH2OH2", positions, cell=[[6.5, 0, 0], [0.5, 6, 0], [0.2, -0.4, 5.5]], pbc=True)
    atoms.positions += np.random.default_rng(0).normal(0, 0.02, atoms.positions.shape)
    return atoms


def water_dimer() -> Atoms:
    """Two molecules without a cell."""
    atoms = water_box()[:6]
    atoms.set_cell(None)
    atoms.pbc = False
    return atoms


def rattled_salt() -> Atoms:
    """Rock salt with Li and O substitutions in a strained cell: wide and narrow Gaussians together."""
    atoms = bulk("NaCl", "rocksalt", 5.64, cubic=True)
    atoms.rattle(0.05, seed=2)
    strain = np.eye(3) + 0.03 * np.random.default_rng(1).normal(size=(3, 3))
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.symbols[0], atoms.symbols[1] = "Li", "O"
    return atoms


def reference_structures() -> dict[str, tuple[Atoms, float]]:
    """name -> (structure, net charge) of the comparison with the published ReaxNet code."""
    stored = json.loads(_REFERENCE.read_text())["structures"]
    return {
        name: (Atoms(s["symbols"].split("."), s["positions"], cell=s["cell"], pbc=True), s["net_charge"])
        for name, s in stored.items()
    }
