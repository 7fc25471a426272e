"""N-methylacetamide as VoltPI reads it: ``python nma_data.py efield_nma_validation.xyz`` (FIREANN) gives ``nma.xyz``,
and for a network without charges ``nma-blind.xyz``: without fields, and without five frames that repeat one in another.

The field label is turned round: the torque on the nuclei is that of −label (−M × field, slope −0.999 by regression over
the frames). The cell, which only holds the molecule, is left out.
"""

from __future__ import annotations

import sys

from ase import Atoms
from ase.io import read, write


def turned(atoms: Atoms) -> Atoms:
    """The same molecule without a cell and with the field that acts."""
    out = atoms.copy()
    out.set_cell(None)
    out.pbc = False
    out.calc = None
    for key in ("REF_energy", "REF_dipole", "REF_polarizability"):
        out.info[key] = atoms.info[key]
    out.info["electric_field"] = -atoms.info["electric_field"]
    out.arrays["REF_forces"] = atoms.arrays["REF_forces"]
    return out


if __name__ == "__main__":
    frames = [turned(atoms) for atoms in read(sys.argv[1], ":")]
    write("nma.xyz", frames, format="extxyz")
    first = {atoms.positions.tobytes(): atoms for atoms in reversed(frames)}
    blind = [atoms for atoms in frames if first[atoms.positions.tobytes()] is atoms]
    for atoms in blind:
        del atoms.info["electric_field"]
    write("nma-blind.xyz", blind, format="extxyz")
