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


def sodium_and_six_waters() -> Atoms:
    """Na⁺ and an octahedron of water at 2.4 Å, hydrogens outwards, without a cell."""
    atoms = Atoms("Na", [[0, 0, 0]])
    for axis in range(3):
        for sign in (1, -1):
            out, side = np.roll([sign, 0, 0], axis), np.roll([0, 1, 0], axis)
            oxygen = 2.4 * out
            atoms += Atoms("OH2", [oxygen, oxygen + 0.59 * out + 0.76 * side, oxygen + 0.59 * out - 0.76 * side])
    return atoms


def sodium_in_water() -> Atoms:
    """Na⁺ between the molecules of ``water_box``, 2.8 Å and more from any atom; its charge as an initial charge."""
    atoms = water_box() + Atoms("Na", [[0.6, 3.4, 1.0]])
    atoms.set_initial_charges([0.0] * 9 + [1.0])
    return atoms


def hydroxide_in_water() -> Atoms:
    """``water_box`` without one hydrogen: OH⁻ and two molecules, its charge as initial charges."""
    atoms = water_box()
    del atoms[1]
    atoms.set_initial_charges([-1.2, 0.2] + [0.0] * 6)
    return atoms


def one_atom_cell() -> Atoms:
    """Na in a skewed cell of its own, off the origin."""
    return Atoms("Na", [[0.3, -0.2, 0.5]], cell=[[3.4, 0.2, 0], [-0.3, 3.7, 0.4], [1.2, 0.1, 3.1]], pbc=True)


def flat_cell() -> Atoms:
    """One molecule in a left-handed cell 3.2 Å high and three times as wide."""
    atoms = water_box()[:3]
    atoms.set_cell([[1.0, 10.0, 0.0], [11.0, 0.0, 0.5], [0.0, 0.3, 3.2]])
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
