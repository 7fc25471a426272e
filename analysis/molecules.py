"""Molecules by covalent connectivity, and what it takes to make them whole."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

__all__ = ["molecules_of", "whole"]


def _bonds(atoms: Atoms) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (i, j) closer than the sum of covalent radii times 1.2, with the images of j."""
    i, j, shift = neighbor_list("ijS", atoms, natural_cutoffs(atoms, mult=1.2))
    return i, j, shift


def molecules_of(atoms: Atoms) -> NDArray[np.int64]:
    """Label [n] of the molecule each atom belongs to, 0 … n_molecules − 1."""
    i, j, _ = _bonds(atoms)
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=(len(atoms), len(atoms)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def whole(atoms: Atoms) -> NDArray[np.float64]:
    """Positions [n, 3] with each molecule in one piece around its first atom (an infinite network stays cut)."""
    i, j, shift = _bonds(atoms)
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
    return atoms.positions + images @ np.asarray(atoms.cell)
