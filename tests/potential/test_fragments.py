"""Which atoms form a molecule, and making it whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from voltpi.potential.errors import InputError
from voltpi.potential.fragments import assign_fragments, percolating, unpaired, whole_positions
from voltpi.potential.systems import Systems

from structures import sodium_and_six_waters, water_box


def test_water_molecules_are_found_however_they_are_wrapped():
    atoms = water_box()
    reference = assign_fragments(Systems.from_atoms(atoms))
    assert reference.fragments.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    shifts = np.random.default_rng(3).integers(-2, 3, size=(9, 3))
    moved = atoms.copy()
    moved.positions += shifts @ atoms.cell.array
    system = assign_fragments(Systems.from_atoms(moved))
    assert system.fragments.tolist() == reference.fragments.tolist()
    # whole molecules: the same shape, each anchored at its own root
    for first in (0, 3, 6):
        here = whole_positions(system)[first : first + 3] - whole_positions(system)[first]
        there = whole_positions(reference)[first : first + 3] - whole_positions(reference)[first]
        assert torch.allclose(here, there, atol=1e-10)


def test_a_long_chain_is_made_whole():
    chain = molecule("trans-butane")
    chain.set_cell([6.0, 6.0, 6.0])
    chain.pbc = True
    wrapped = chain.copy()
    wrapped.wrap()
    system = assign_fragments(Systems.from_atoms(wrapped))
    assert int(system.fragments.max()) == 0
    whole = whole_positions(system).numpy()
    assert np.linalg.norm(whole[:, None] - whole, axis=2) == pytest.approx(chain.get_all_distances(), abs=1e-9)


@pytest.mark.parametrize("gap", [0.4, 0.7])
def test_close_hydrogens_do_not_join_molecules(gap):
    """Two molecules whose hydrogens touch, as path integrals and random packings bring them."""
    x = 1.92 + gap
    atoms = Atoms(
        "OH2OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [x, 0, 0], [x - 0.96, 0, 0], [x + 0.24, 0.93, 0]]
    )
    assert assign_fragments(Systems.from_atoms(atoms)).fragments.tolist() == [0, 0, 0, 1, 1, 1]


def test_hydrogen_molecules_are_molecules():
    """Also where an oxygen is within the search distance of the list but not bonded."""
    atoms = Atoms(
        "H4OH2", [[0, 0, 0], [0.74, 0, 0], [0, 3, 0], [0.74, 3, 0], [2.6, 1, 0], [3.2, 1.7, 0], [3.2, 0.3, 0]]
    )
    assert assign_fragments(Systems.from_atoms(atoms)).fragments.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_ions_keep_their_charge_apart_from_their_shell():
    """Na–O 2.4 Å is 1.04 sums of covalent radii, Na–H no further: neither bonds nor takes a hydrogen's one bond."""
    system = assign_fragments(
        Systems.from_atoms(sodium_and_six_waters(), net_charge=1.0),
        initial_charges=torch.tensor([1.0] + [0.0] * 18, dtype=torch.float64),
    )
    assert system.fragments.tolist() == [0] + [k for k in range(1, 7) for _ in range(3)]
    assert system.fragment_charges.tolist() == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("symbol", ["Li", "Na", "K", "Rb", "Cs", "Ca", "Sr", "Ba"])
def test_metals_of_groups_one_and_two_bond_to_nothing(symbol):
    pair = Atoms([symbol, "O", "H"], [[0, 0, 0], [2.0, 0, 0], [2.97, 0, 0]])
    charges = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    assert assign_fragments(Systems.from_atoms(pair), initial_charges=charges).fragments.tolist() == [0, 1, 1]


_HYDRONIUM = Atoms("OH3", [[0, 0, 0], [0.96, 0, 0.2], [-0.48, 0.83, 0.2], [-0.48, -0.83, 0.2]])
_HYDROXIDE = Atoms("OH", [[9, 0, 0], [9.96, 0, 0]])
_WATER = Atoms("OH2", [[0, 9, 0], [0.96, 9, 0], [-0.24, 9.93, 0]])


def test_ions_without_their_charge_are_refused():
    pair = _HYDRONIUM + _HYDROXIDE + _WATER
    with pytest.raises(InputError, match=r"2 fragments .* H3O of atom 0 \(O\) and HO of atom 4 \(O\): give every ion"):
        assign_fragments(Systems.from_atoms(pair))
    charges = torch.zeros(len(pair), dtype=torch.float64)
    charges[0], charges[4] = 1.0, -1.0
    system = assign_fragments(Systems.from_atoms(pair), initial_charges=charges)
    assert system.fragment_charges.tolist() == [1, -1, 0]
    assert unpaired(system) == []
    # the structures of a batch are told apart, and the user's own fragments are the user's
    both = Systems.from_atoms([_WATER + _HYDRONIUM, _WATER + _HYDROXIDE])
    assert unpaired(assign_fragments(both)) == [1, 3]
    labels = torch.tensor([0] * 4 + [1] * 2 + [2] * 3)
    assert unpaired(assign_fragments(Systems.from_atoms(pair), labels=labels)) == [0, 1]


def test_beryllium_and_magnesium_do_bond():
    for symbol in ("Be", "Mg"):
        assert assign_fragments(Systems.from_atoms(Atoms([symbol, "C"], [[0, 0, 0], [2.0, 0, 0]]))).fragments.max() == 0


def test_own_labels_and_charges():
    atoms = Atoms("NaOHCl", [[0, 0, 0], [5, 0, 0], [5.97, 0, 0], [0, 9, 0]])
    system = assign_fragments(
        Systems.from_atoms(atoms),
        labels=torch.tensor([7, 3, 3, 7]),
        initial_charges=torch.tensor([1.0, -1.2, 0.2, 0.0], dtype=torch.float64),
    )
    assert system.fragment_charges[system.fragments].tolist() == pytest.approx([1, -1, -1, 1])


def test_charges_that_do_not_add_up_are_refused():
    with pytest.raises(InputError, match=r"charges.net_charge is 1 e but the 3 fragments .* carry 0 e together"):
        assign_fragments(Systems.from_atoms(water_box(), net_charge=1.0))


def test_one_fragment_takes_the_net_charge():
    system = assign_fragments(Systems.from_atoms(molecule("OH"), net_charge=-1.0))
    assert system.fragment_charges.tolist() == [-1.0]


def test_percolation():
    assert percolating(assign_fragments(Systems.from_atoms(bulk("Cu", cubic=True)))).tolist() == [[True] * 3]
    chain = Atoms("C2", [[0, 0, 0], [1.3, 0, 0]], cell=[2.6, 9, 9], pbc=True)
    assert percolating(assign_fragments(Systems.from_atoms(chain))).tolist() == [[True, False, False]]
    assert percolating(assign_fragments(Systems.from_atoms(water_box()))).tolist() == [[False] * 3]


def test_split_and_join_keep_fragments_and_parents():
    one = assign_fragments(Systems.from_atoms(water_box()))
    two = Systems.join([one, one])
    assert two.fragments.tolist() == [*one.fragments.tolist(), *(one.fragments + 3).tolist()]
    assert torch.allclose(whole_positions(two)[9:], whole_positions(one))
    back = two.split()[1]
    assert back.fragments.tolist() == one.fragments.tolist()
    assert back.parents.tolist() == one.parents.tolist()
    with pytest.raises(ValueError, match="only some have fragments"):
        Systems.join([one, Systems.from_atoms(water_box())])


@pytest.mark.parametrize("cell", [[[10, 0, 0], [95, 10, 0], [0, 0, 10]], [[10, 0, 0], [0, 10, 0], [0, 0, 0]]])
def test_whole_molecules_in_skewed_cells_and_slabs_stay_as_they_are(cell):
    atoms = Atoms("OH2", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]], cell=cell, pbc=[True, True, cell[2][2] > 0])
    system = assign_fragments(Systems.from_atoms(atoms))
    assert torch.equal(whole_positions(system), system.positions)
    moved = system.replace(
        positions=system.positions + torch.tensor(np.array([[0, 0, 0], cell[1], cell[0]]), dtype=torch.float64)
    )
    assert torch.allclose(whole_positions(moved), system.positions, atol=1e-9)


def test_a_stretched_hydrogen_stays_with_its_molecule() -> None:
    """Beyond the usual length it would be a neutral atom; near a second molecule it keeps to the nearer one."""
    atoms = Atoms("OH2OH2", [[0, 0, 0], [1.45, 0, 0], [-0.3, 0.9, 0], [3.3, 0, 0], [3.6, 0.9, 0], [3.6, -0.9, 0]])
    assigned = assign_fragments(Systems.from_atoms(atoms))
    assert assigned.fragments.tolist() == [0, 0, 0, 1, 1, 1]
    atoms.positions[1, 0] = 1.6  # 1.65 of the radii: a radical, which nothing says
    with pytest.raises(InputError, match="odd number of electrons"):
        assign_fragments(Systems.from_atoms(atoms))


def test_warm_hydrogen_molecules_are_molecules() -> None:
    atoms = Atoms("H2OH2", [[0, 0, 0], [0.85, 0, 0], [2.3, 0, 0], [2.6, 0.9, 0], [2.6, -0.9, 0]])
    assert assign_fragments(Systems.from_atoms(atoms)).fragments.tolist() == [0, 0, 1, 1, 1]
