"""Makes the start structures: rattled supercells of crystals, and the water that ships with VoltPI.

python make_starts.py OUT [--lipon FILE]

OUT gets nacl.xyz, batio3.xyz, cspbi3.xyz, water.xyz and, from a structure file of Li2PO2N, lipon.xyz.
"""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

RATTLE = 0.05  # Å, standard deviation of every coordinate
STIFF_RATTLE = 0.02  # Å, where bonds are stiff
SEED = 7


def perovskite(a: str, b: str, x: str, edge: float) -> Atoms:
    """The cubic cell of ABX3."""
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Atoms([a, b, x, x, x], scaled_positions=sites, cell=[edge] * 3, pbc=True)


def crystals() -> dict[str, Atoms]:
    """Perfect supercells with measured lattice constants (Å)."""
    return {
        "nacl": bulk("NaCl", "rocksalt", 5.640, cubic=True).repeat(3),
        "batio3": perovskite("Ba", "Ti", "O", 4.00).repeat(3),
        "cspbi3": perovskite("Cs", "Pb", "I", 6.289).repeat(3),
    }


def water() -> Atoms:
    """64 molecules: the start of the use ``water-field``, a liquid at 300 K."""
    with resources.as_file(resources.files("voltpi.inputs") / "water-field" / "start.xyz") as path:
        return read(path)


def main() -> None:
    """Writes extended XYZ, which i-PI reads with mode='ase'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lipon", type=Path, help="a structure file of Li2PO2N, any format that ASE reads")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    starts = crystals()
    if options.lipon is not None:
        starts["lipon"] = read(options.lipon)
    rng = np.random.default_rng(SEED)
    for name, atoms in starts.items():
        scale = STIFF_RATTLE if name == "lipon" else RATTLE
        atoms.positions += rng.normal(scale=scale, size=atoms.positions.shape)
    starts["water"] = water()
    for name, atoms in starts.items():
        bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        write(options.out / f"{name}.xyz", bare, format="extxyz")
        print(f"{name}: {len(bare)} atoms")


if __name__ == "__main__":
    main()
