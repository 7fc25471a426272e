"""Molecules and ions: which atoms keep a common net charge, and how to make them whole.

Found once, at the start of a run, from covalent radii (Cordero et al., Dalton Trans. 2008, 2832, as tabulated in ASE);
the bonds then stay, so a hydrogen bond that shortens during a run never moves charge between molecules. A hydrogen
has one bond: to its nearest heavier atom (relative to the radii), or else to a hydrogen; where it has none, a stretched
one.
"""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import complete_cell, minkowski_reduce
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems

__all__ = [
    "BOND_TOLERANCE",
    "IONS",
    "assign_fragments",
    "check_whole",
    "name_fragment",
    "percolating",
    "unpaired",
    "whole_positions",
]

BOND_TOLERANCE = 1.25
"""Two atoms are bonded below this multiple of the sum of their covalent radii (O–H: 1.21 Å)."""
STRETCHED = 1.6
"""The same for a hydrogen without another bond (O–H: 1.55 Å): hot and quantum hydrogens are no atoms of their own."""
IONS = (3, 11, 19, 37, 55, 87, 20, 38, 56, 88)
"""Alkali and alkaline-earth metals bond to nothing.

They are ions wherever molecules keep their charges, and their covalent radii (Na: 1.66 Å) reach the first solvation
shell (Na–O: 2.4 Å). H, Be and Mg (small radii, covalent chemistry) are left out.
"""


def _bonds(systems: Systems) -> tuple[np.ndarray, np.ndarray]:
    """Bonded pairs (both directions) [2, e] and their vectors [e, 3] (Å)."""
    radii = torch.as_tensor(covalent_radii, dtype=torch.float64, device=systems.device)[systems.numbers]
    pairs = neighbor_list(systems, float(2 * BOND_TOLERANCE * radii.max()))
    i, j = pairs.index
    ion = torch.isin(systems.numbers, torch.tensor(IONS, device=systems.device))
    if systems.electrode is not None:  # a metal is bonded to nothing that keeps a charge
        ion = ion | (systems.electrode >= 0)
    length = pairs.vectors.norm(dim=-1) / (radii[i] + radii[j])
    length[ion[i] | ion[j]] = torch.inf
    bonded = length < BOND_TOLERANCE
    lone = (systems.numbers == 1) & ~torch.zeros_like(ion).index_fill(0, i[bonded], True)
    hydrogen = systems.numbers == 1
    stretched = ~bonded & (length < STRETCHED) & (lone[i] | lone[j])
    stretched &= (lone[i] | ~hydrogen[i]) & (lone[j] | ~hydrogen[j])
    # a hydrogen keeps one bond, to a heavier atom where there is one: close contacts of molecules do not join them
    both = hydrogen[i] & hydrogen[j]
    rank = torch.where(bonded, length + 10.0 * both, torch.where(stretched, length + 20.0 - 5.0 * both, torch.inf))
    bonded |= stretched
    first = torch.full_like(radii, torch.inf).scatter_reduce(0, i, rank, "amin")
    for atom in (i, j):
        bonded &= ~hydrogen[atom] | (rank <= first[atom])
    return pairs.index[:, bonded].cpu().numpy(), pairs.vectors[bonded].cpu().numpy()


def _spanning_trees(n: int, bonds: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots and parents [n] of a breadth-first forest over the allowed bonds; the lowest index is the root."""
    neighbours: list[list[int]] = [[] for _ in range(n)]
    for i, j in bonds[:, allowed].T:
        neighbours[i].append(int(j))
    root, parent = np.full(n, -1), np.arange(n)
    for start in range(n):
        if root[start] >= 0:
            continue
        root[start] = start
        queue = [start]
        for atom in queue:
            for other in sorted(neighbours[atom]):
                if root[other] < 0:
                    root[other], parent[other] = start, atom
                    queue.append(other)
    return root, parent


def assign_fragments(
    systems: Systems, *, labels: Tensor | None = None, initial_charges: Tensor | None = None
) -> Systems:
    """The same structures with fragments, their charges and their bond trees filled in.

    Parameters
    ----------
    labels : [n] integers, the user's own fragments; None: covalent connectivity
    initial_charges : [n] e; a fragment keeps the sum of its atoms' (None: fragments are neutral, and a structure that
        is one fragment takes the net charge)

    Raises
    ------
    InputError : the fragments' charges do not add up to the net charge of a structure without electrodes, or neither
        labels nor charges say that two fragments are ions which have an odd number of electrons when neutral
    """
    n = systems.n_atoms
    bonds, _ = _bonds(systems)
    batch = systems.batch.cpu().numpy()
    if labels is None:
        allowed = np.ones(bonds.shape[1], dtype=bool)
        root, parent = _spanning_trees(n, bonds, allowed)
        own = root
    else:
        own = labels.cpu().numpy().copy()
        if systems.electrode is not None:  # whatever the labels say, an atom of an electrode is on its own
            metal = (systems.electrode >= 0).cpu().numpy()
            own[metal] = own.max(initial=0) + 1 + np.arange(metal.sum())
        same = own[bonds[0]] == own[bonds[1]]
        root, parent = _spanning_trees(n, bonds, same)
        first: dict[tuple[int, int], int] = {}
        for atom in range(n):  # parts of a fragment without a bond between them hang on its first atom
            anchor = first.setdefault((int(batch[atom]), int(own[atom])), atom)
            if parent[atom] == atom and atom != anchor:
                parent[atom] = anchor
    _, fragments = np.unique(np.stack([batch, own]), axis=1, return_inverse=True)
    fragments = fragments.reshape(-1)
    count = int(fragments.max()) + 1
    charges = np.zeros(count)
    if initial_charges is not None:
        np.add.at(charges, fragments, initial_charges.cpu().numpy())
    system_of = np.zeros(count, dtype=int)
    system_of[fragments] = batch
    net = systems.net_charge.cpu().numpy()
    for b in range(systems.n_systems):
        members = np.nonzero(system_of == b)[0]
        if initial_charges is None and len(members) == 1:
            charges[members] = net[b]
        # electrodes take up what the fragments leave
        if systems.electrode is None and abs(charges[members].sum() - net[b]) > 1e-6:
            raise InputError(
                f"charges.net_charge is {net[b]:g} e but the {len(members)} fragments of the structure carry "
                f"{charges[members].sum():g} e together: give every ion its charge as initial_charges in the structure "
                "file, or set charges.net_charge to their sum"
            )
    device = systems.device
    assigned = systems.replace(
        fragments=torch.as_tensor(fragments, dtype=torch.int64, device=device),
        fragment_charges=torch.as_tensor(charges, dtype=torch.float64, device=device),
        parents=torch.as_tensor(parent, dtype=torch.int64, device=device),
    )
    if labels is None and initial_charges is None:
        _refuse_ions(assigned, torch.as_tensor(system_of, device=device))
    return assigned


def unpaired(systems: Systems) -> list[int]:
    """The fragments that have an odd number of electrons: radicals, or ions without their charge.

    Those of electrodes and with charges that are not whole numbers are left out.
    """
    if systems.fragments is None or systems.fragment_charges is None:
        return []
    charges = systems.fragment_charges
    electrons = torch.zeros_like(charges).index_add(0, systems.fragments, systems.numbers.to(charges.dtype)) - charges
    odd = (torch.remainder(electrons, 2) - 1).abs() < 1e-6
    if systems.electrode is not None:
        odd[systems.fragments[systems.electrode >= 0]] = False
    return odd.nonzero()[:, 0].tolist()


def name_fragment(systems: Systems, fragment: int) -> str:
    """A fragment for a message: ``H3O of atom 6 (O)``."""
    assert systems.fragments is not None
    own = (systems.fragments == fragment).nonzero()[:, 0]
    formula = Atoms(numbers=systems.numbers[own].cpu().numpy()).get_chemical_formula()
    return f"{formula} of {systems.name(int(own[0]))}"


def _refuse_ions(systems: Systems, system_of: Tensor) -> None:
    """Raises InputError where two neutral fragments of one structure have an odd number of electrons."""
    odd = torch.tensor(unpaired(systems), dtype=torch.int64, device=systems.device)
    for b in range(systems.n_systems if len(odd) else 0):
        own = odd[system_of[odd] == b]
        if len(own) > 1:
            first, second = (name_fragment(systems, int(k)) for k in own[:2])
            raise InputError(
                f"{len(own)} fragments would be neutral with an odd number of electrons, such as {first} and {second}: "
                "give every ion its charge as initial_charges in the structure file; for radicals, and where these "
                "are not the molecules, name the fragments in charges.fragments"
            )


def _nearest_images(step: Tensor, cell: Tensor, pbc: Tensor) -> Tensor:
    """Integers [n, 3] to add, in lattice vectors, so that steps [n, 3] (Å) become the shortest.

    Rounding is done in the Minkowski-reduced cell: in a skewed one the smallest fraction is not the nearest image.
    """
    if not bool(pbc.any()):
        return torch.zeros_like(step)
    full = complete_cell(cell.detach().cpu().numpy())
    reduced, operation = minkowski_reduce(full, pbc.cpu().numpy())
    inverse = torch.as_tensor(np.linalg.inv(reduced), dtype=step.dtype, device=step.device)
    back = torch.as_tensor(np.asarray(operation), dtype=step.dtype, device=step.device)
    periodic = torch.as_tensor(pbc, device=step.device)
    return -(torch.round(step.detach() @ inverse) * periodic) @ back


def check_whole(systems: Systems) -> None:
    """Refuses fragments that are not one bonded piece, for their dipole would depend on where the cell is cut.

    Raises InputError that names the two atoms; a link may stretch to twice the sum of the covalent radii.
    """
    if systems.parents is None:
        return
    whole = whole_positions(systems)
    radii = torch.as_tensor(covalent_radii, dtype=torch.float64, device=systems.device)[systems.numbers]
    length = (whole - whole[systems.parents]).norm(dim=-1)
    apart = (length > 2 * (radii + radii[systems.parents])).nonzero()[:, 0]
    if apart.numel():
        atom, parent = int(apart[0]), int(systems.parents[apart[0]])
        raise InputError(
            f"{systems.name(parent, atom)} belong to one fragment but are {float(length[atom]):.2f} Å apart: its "
            "dipole is not well defined in a cell; use charges.response shells, or fragments that stay bonded"
        )


def whole_positions(systems: Systems) -> Tensor:
    """Positions [n, 3] (Å) with every fragment made whole around its root; unchanged where there are no fragments.

    Each atom is put at the image nearest to its parent, so the answer is continuous however atoms were wrapped, and
    exact under strain (the images are integers).
    """
    if systems.parents is None:
        return systems.positions
    parents = systems.parents
    step = systems.positions - systems.positions[parents]
    cells = systems.cell[systems.batch]
    image = torch.zeros_like(step)
    for b in range(systems.n_systems):
        atoms = systems.batch == b
        image[atoms] = _nearest_images(step[atoms], systems.cell[b], systems.pbc[b])
    ancestor = parents
    for _ in range(64):  # pointer doubling: sums the images along the path to the root
        up = image[ancestor]
        if bool((ancestor == parents[ancestor]).all()) and not bool(up.any()):
            break
        image = image + up
        ancestor = ancestor[ancestor]
    return systems.positions + torch.einsum("na,nab->nb", image, cells)


def percolating(systems: Systems) -> Tensor:
    """[b, 3] bool: some fragment is bonded to its own image along this cell direction.

    Charge could then flow across the cell.
    """
    out = torch.zeros(systems.n_systems, 3, dtype=torch.bool, device=systems.device)
    if systems.fragments is None or systems.parents is None:
        return out
    bonds, vectors = _bonds(systems)
    if bonds.shape[1] == 0:
        return out
    i, j = torch.as_tensor(bonds, device=systems.device)
    same = systems.fragments[i] == systems.fragments[j]
    i, j = i[same], j[same]
    whole = whole_positions(systems)
    gap = torch.as_tensor(vectors, device=systems.device)[same] - (whole[j] - whole[i])
    for b in range(systems.n_systems):
        own = systems.batch[i] == b
        if bool(systems.pbc[b].any()) and bool(own.any()):
            rows = systems.cell[b] * systems.pbc[b][:, None]
            full = torch.as_tensor(complete_cell(rows.detach().cpu().numpy()), device=systems.device)
            images = torch.linalg.solve(full.T, gap[own].T).T
            out[b] = (images.abs() > 0.5).any(0) & systems.pbc[b]
    return out
