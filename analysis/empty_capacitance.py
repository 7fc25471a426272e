"""Capacitance of two electrodes without anything between them, from their geometry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from voltpi.analysis.capacitor import Setup
from voltpi.analysis.site_sum import Sites
from voltpi.potential.errors import InputError

__all__ = ["empty_capacitance"]

Array = NDArray[np.float64]

_MOST_ATOMS = 4000  # whose matrix is solved densely


def empty_capacitance(setup: Setup, positions: Array, cell: Array) -> float:
    """C_empty (e/V) of the setup's ``pair`` of electrodes, of atoms at ``positions`` [n, 3] (Å), without electrolyte.

    The charges of electrode atoms solve A q = ψ + λ (+ the field of a jump across the cell) with Σq = 0. Electrodes at
    constant charge keep theirs. Raises InputError for electrodes with shells, or too many atoms.
    """
    atoms = np.concatenate([electrode.atoms for electrode in setup.electrodes])
    if setup.shell_charge[atoms].any():
        raise InputError("the electrodes are polarizable: give their capacitance without electrolyte as --empty (e/V)")
    if len(atoms) > _MOST_ATOMS:
        raise InputError(f"the electrodes have {len(atoms)} atoms: give their empty capacitance as --empty (e/V)")
    geometry, sites = setup.sum_over(cell), Sites(positions[atoms], setup.alpha[atoms])
    n, label, (low, high) = len(atoms), setup.labels[atoms], setup.pair()
    matrix = geometry.matrix(sites)
    own = setup.k_e * np.sqrt(2.0 * sites.alpha / np.pi)
    matrix[np.arange(n), np.arange(n)] += setup.hardness[atoms] - own
    psi = np.where(label == high, 0.5, np.where(label == low, -0.5, 0.0))
    if setup.boundary == "finite-field" and geometry.period is not None:
        psi = psi - setup.heights(sites.positions, geometry) / geometry.period
    held = [k for k, electrode in enumerate(setup.electrodes) if electrode.potential is None]
    constraints = np.array([np.ones(n), *[(label == k).astype(float) for k in held]])
    size = n + len(constraints)
    whole = np.zeros((size, size))
    whole[:n, :n], whole[:n, n:], whole[n:, :n] = matrix, constraints.T, constraints
    q = np.linalg.solve(whole, np.concatenate([psi, np.zeros(len(constraints))]))[:n]
    return float(0.5 * (q[label == high].sum() - q[label == low].sum()))
