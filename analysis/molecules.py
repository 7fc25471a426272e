"""Molecules by covalent connectivity, and what it takes to make them whole."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

__all__ = ["Tree", "assembled", "bond_tree", "is_network", "molecules_of", "whole"]

# The rule and the numbers of voltpi.potential.fragments, which needs torch and so cannot be imported here: the
# molecules counted are those that the potential held neutral. A test compares the two.
BOND_TOLERANCE = 1.25
STRETCHED = 1.6
_IONS = (3, 11, 19, 37, 55, 87, 20, 38, 56, 88)


def _bonds(atoms: Atoms) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Bonded pairs (i, j), in both directions, with the images of j.

    Bonded is what is closer than ``BOND_TOLERANCE`` times the sum of covalent radii. A hydrogen keeps one bond: to its
    nearest heavier atom (relative to the radii), or else to a hydrogen; one without a bond has a stretched one, up to
    ``STRETCHED`` of the radii. Ions bond to nothing.
    """
    numbers = atoms.numbers
    radii = covalent_radii[numbers]
    i, j, shift, distance = neighbor_list("ijSd", atoms, (STRETCHED * radii).tolist())
    hydrogen = numbers == 1
    length = distance / (radii[i] + radii[j])
    free = ~(np.isin(numbers[i], _IONS) | np.isin(numbers[j], _IONS))
    bonded = free & (length < BOND_TOLERANCE)
    lone = hydrogen.copy()
    lone[i[bonded]] = False
    stretched = free & ~bonded & (lone[i] | lone[j])
    stretched &= (lone[i] | ~hydrogen[i]) & (lone[j] | ~hydrogen[j])
    free = bonded | stretched
    both = hydrogen[i] & hydrogen[j]
    rank = length + np.where(stretched, 20.0 - 5.0 * both, 10.0 * both)
    best = np.full(len(atoms), np.inf)
    np.minimum.at(best, i[free], rank[free])
    # both directions of a pair stay, though their distances may differ in the last digit
    kept = free & (~hydrogen[i] | (rank <= best[i] + 1e-9)) & (~hydrogen[j] | (rank <= best[j] + 1e-9))
    return i[kept], j[kept], shift[kept]


def molecules_of(atoms: Atoms) -> NDArray[np.int64]:
    """Label [n] of the molecule each atom belongs to, 0 … n_molecules − 1."""
    i, j, _ = _bonds(atoms)
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=(len(atoms), len(atoms)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def whole(atoms: Atoms) -> NDArray[np.float64]:
    """Positions [n, 3] with each molecule in one piece around its first atom (an infinite network stays cut)."""
    return atoms.positions + _images(atoms, *_bonds(atoms)) @ np.asarray(atoms.cell)


def is_network(atoms: Atoms) -> bool:
    """Whether bonds lead from an atom to its own image, as in a covalent or oxide crystal."""
    i, j, shift = _bonds(atoms)
    images = _images(atoms, i, j, shift)
    return bool((images[j] != images[i] + shift).any())


def _images(atoms: Atoms, i: NDArray[np.int64], j: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """The image [n, 3] of each atom that lies beside its molecule's first atom, along a tree of bonds."""
    n = len(atoms)
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)).tocsr()
    image = {(a, b): s for a, b, s in zip(i.tolist(), j.tolist(), shift, strict=True)}
    images = np.zeros((n, 3), dtype=int)
    seen = np.zeros(n, dtype=bool)
    for start in range(n):
        if seen[start]:
            continue
        order, parents = breadth_first_order(graph, start, directed=False)
        seen[order] = True
        for atom in order[1:].tolist():
            parent = int(parents[atom])
            images[atom] = images[parent] + image[parent, atom]
    return images


Tree = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Atoms and what they are bonded to, which comes in an earlier pair or in none: one pair for every depth."""


def bond_tree(atoms: Atoms) -> Tree:
    """A tree of bonds for every molecule, from its first atom outwards."""
    i, j, _ = _bonds(atoms)
    n = len(atoms)
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=(n, n)).tocsr()
    depth = np.full(n, -1)
    parent = np.zeros(n, dtype=np.int64)
    for start in range(n):
        if depth[start] >= 0:
            continue
        order, parents = breadth_first_order(graph, start, directed=False)
        depth[start] = 0
        for atom in order[1:].tolist():
            parent[atom] = parents[atom]
            depth[atom] = depth[parents[atom]] + 1
    levels = [np.flatnonzero(depth == level) for level in range(1, int(depth.max(initial=0)) + 1)]
    return [(level, parent[level]) for level in levels]


def assembled(atoms: Atoms, tree: Tree) -> NDArray[np.float64]:
    """Positions [n, 3] with every atom at the image nearest to what it is bonded to in ``tree``.

    As ``whole``, but with the bonds of another frame, and fast.
    """
    r = atoms.positions.copy()
    for children, parents in tree:
        r[children] = r[parents] + find_mic(r[children] - r[parents], atoms.cell, atoms.pbc)[0]
    return r
