"""Neighbour lists against ASE's, the skin, and geometries that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list as ase_neighbors

from voltpi.potential import neighbors
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


def test_skin_never_changes_the_answer(monkeypatch):
    built = []
    monkeypatch.setattr(neighbors, "neighbor_list", lambda *a, **k: built.append(a) or neighbor_list(*a, **k))
    system = Systems.from_atoms(water_box())
    cache = NeighborCache(4.0, skin=0.4)
    generator = torch.Generator().manual_seed(1)
    for step in range(16):
        shake = 0.04 * torch.randn(9, 3, generator=generator, dtype=torch.float64)
        system = system.replace(positions=system.positions + shake)
        if step == 12:  # the cell alone: images come nearer though no atom has moved
            cache(system)
            before = len(built)
            system = system.replace(cell=0.95 * system.cell)
        ours, fresh = cache(system), neighbor_list(system, 4.0)
        assert as_set(*ours.index, ours.shift) == as_set(*fresh.index, fresh.shift)
        assert torch.equal(ours.vectors, neighbors.edge_vectors(system, ours.index, ours.shift))
        assert step != 12 or len(built) == before + 1
    assert 2 < len(built) < 12, "the list must be reused, and built again"


def test_batches_do_not_see_each_other():
    pairs = neighbor_list(Systems.from_atoms([water_dimer(), water_dimer()]), 6.0)
    assert ((pairs.index[0] < 6) == (pairs.index[1] < 6)).all()


def exploded(distance, pbc):
    """One hydrogen far out, along the cell vector that is open."""
    atoms = water_box()
    atoms.set_cell(np.diag([20.0, 20.0, 20.0]))
    atoms.positions[4, 2] += distance
    atoms.pbc = pbc
    return atoms


@pytest.mark.parametrize("pbc", [False, (True, True, False)])
def test_atoms_that_fly_apart_are_refused_before_any_list(monkeypatch, pbc):
    calls = []
    monkeypatch.setattr(neighbors, "neighbor_list", lambda *a, **k: calls.append(a))  # the library would crash
    batch = Systems.from_atoms([water_dimer(), exploded(1e7, pbc)])
    with pytest.raises(
        InputError, match=r"atom 4 \(H\) of structure 1 is 1e\+07 Å from the rest in an open direction.*timestep"
    ):
        check_geometry(batch)
    assert not calls


def test_wide_structures_are_none_that_fly_apart():
    check_geometry(Systems.from_atoms(exploded(5e3, False)))
    check_geometry(Systems.from_atoms(exploded(1e5, True)))  # an atom that has crossed many cells
    away = water_dimer()
    away.positions += 1e7
    together = Systems.from_atoms([water_dimer(), away])
    check_geometry(together)
    assert float(together.positions.max() - together.positions.min()) > 1e6  # a batch is not one structure


def test_inputs_that_are_not_finite():
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match=r"field holds (nan|inf) V/Å"):
            check_geometry(Systems.from_atoms(water_box(), field=[0, bad, 0]))
        with pytest.raises(InputError, match=r"charges.net_charge holds (nan|inf) e"):
            check_geometry(Systems.from_atoms(water_box(), net_charge=bad))


def test_a_structure_without_atoms():
    with pytest.raises(InputError, match="structure 1 has no atoms"):
        Systems.from_atoms([water_dimer(), Atoms()])


def test_dependent_cell_vectors_in_the_periodic_directions():
    cell = [[3, 0, 0], [6, 0, 0], [0, 0, 3]]
    with pytest.raises(InputError, match="no volume"):
        check_geometry(Systems.from_atoms(Atoms("Ar", cell=cell, pbc=(True, True, False))))
    check_geometry(Systems.from_atoms(Atoms("Ar", cell=cell, pbc=(True, False, True))))
    check_geometry(Systems.from_atoms(Atoms("Ar", cell=[[3, 0, 0], [0, 3, 0], [0, 0, 0]], pbc=(True, True, False))))


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
