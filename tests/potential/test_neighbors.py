"""Neighbour lists against ASE's, the skin, and geometries that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list as ase_neighbors

from voltpi.potential.errors import InputError
from voltpi.potential.neighbors import NeighborCache, check_geometry, neighbor_list
from voltpi.potential.systems import Systems

from structures import rattled_salt, water_box, water_dimer


def as_set(i, j, shift):
    return sorted(zip(map(int, i), map(int, j), map(tuple, np.asarray(shift).tolist()), strict=True))


@pytest.mark.parametrize("build", [water_box, water_dimer, rattled_salt])
@pytest.mark.parametrize("pbc", [None, (True, True, False)])
def test_same_pairs_as_ase(build, pbc):
    atoms = build()
    if pbc is not None and atoms.cell.rank == 3:
        atoms.pbc = pbc
    ours = neighbor_list(Systems.from_atoms(atoms), 5.0)
    i, j, shift, vectors = ase_neighbors("ijSD", atoms, 5.0)
    assert as_set(*ours.index, ours.shift) == as_set(i, j, shift)
    assert sorted(ours.vectors.norm(dim=1).tolist()) == pytest.approx(
        sorted(np.linalg.norm(vectors, axis=1)), abs=1e-12
    )


def test_half_lists_hold_every_pair_once():
    system = Systems.from_atoms(water_box())
    full, half = neighbor_list(system, 6.0), neighbor_list(system, 6.0, half=True)
    assert full.index.shape[1] == 2 * half.index.shape[1]


def test_one_atom_sees_its_images():
    pairs = neighbor_list(Systems.from_atoms(Atoms("Ar", cell=[3, 3, 3], pbc=True)), 3.1)
    assert pairs.index.shape[1] == 6


def test_skin_never_changes_the_answer():
    system = Systems.from_atoms(water_box())
    cache = NeighborCache(4.0, skin=0.4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        system = system.replace(
            positions=system.positions + 0.08 * torch.randn(9, 3, generator=generator, dtype=torch.float64)
        )
        ours, fresh = cache(system), neighbor_list(system, 4.0)
        assert as_set(*ours.index, ours.shift) == as_set(*fresh.index, fresh.shift)


def test_batches_do_not_see_each_other():
    pairs = neighbor_list(Systems.from_atoms([water_dimer(), water_dimer()]), 6.0)
    assert ((pairs.index[0] < 6) == (pairs.index[1] < 6)).all()


def test_geometries_that_cannot_be():
    atoms = water_dimer()
    atoms.positions[4] = atoms.positions[0] + [0.1, 0, 0]
    with pytest.raises(InputError, match=r"atoms \d \(\w\) and \d \(\w\) are 0.100 Å apart"):
        check_geometry(Systems.from_atoms(atoms))
    atoms.positions[4, 1] = np.nan
    with pytest.raises(InputError, match=r"position of atom 4 \(H\) is not a finite number"):
        check_geometry(Systems.from_atoms(atoms))
    with pytest.raises(InputError, match="periodic but has no cell"):
        check_geometry(Systems.from_atoms(Atoms("Ar", pbc=True)))
    with pytest.raises(InputError, match="no volume"):
        check_geometry(Systems.from_atoms(Atoms("Ar", cell=[[3, 0, 0], [3, 0, 0], [0, 0, 3]], pbc=True)))
