"""N-methylacetamide as VoltPI reads it, from the file of FIREANN: ``python nma_data.py efield_nma.xyz nma.xyz``.

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
    source, target = sys.argv[1:]
    write(target, [turned(atoms) for atoms in read(source, ":")], format="extxyz")
