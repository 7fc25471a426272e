"""One molecule for i-PI without a model: springs between all its atoms, fixed charges, polarizabilities of bonds."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
from ipi.pes.dummy import Dummy_driver

__DRIVER_NAME__ = "voltpi_toy_molecule"
__DRIVER_CLASS__ = "ToyMolecule"

BOHR = 0.529177210903
START = np.array([[0.0, 0.0, 0.0], [0.9572, 0.0, 0.0], [-0.24, 0.9266, 0.0]]) / BOHR
CHARGES = np.array([-0.8, 0.4, 0.4])
SPRINGS = {(0, 1): 0.50, (0, 2): 0.50, (1, 2): 0.08}  # hartree/bohr²
LENGTHS = {pair: np.linalg.norm(START[pair[0]] - START[pair[1]]) for pair in SPRINGS}


def energy_forces(pos: np.ndarray) -> tuple[float, np.ndarray]:
    """½ Σ k (d − d0)² and its forces, atomic units."""
    energy, forces = 0.0, np.zeros((3, 3))
    for (i, j), k in SPRINGS.items():
        r = pos[j] - pos[i]
        d = float(np.linalg.norm(r))
        energy += 0.5 * k * (d - LENGTHS[i, j]) ** 2
        pull = k * (d - LENGTHS[i, j]) * r / d
        forces[i] += pull
        forces[j] -= pull
    return energy, forces


def polarizability(pos: np.ndarray) -> np.ndarray:
    """Σ over the two O–H bonds of 3·1 + (5 + 4 (d − d0)) u u [3, 3], bohr³."""
    out = np.zeros((3, 3))
    for i, j in combinations(range(3), 2):
        if i == 0:
            r = pos[j] - pos[i]
            d = float(np.linalg.norm(r))
            out += 3.0 * np.eye(3) + (5.0 + 4.0 * (d - LENGTHS[i, j])) * np.outer(r, r) / d**2
    return out


class ToyMolecule(Dummy_driver):
    """Energy, forces and extras in atomic units."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def compute(self, cell: Any, pos: Any) -> Any:
        if isinstance(pos, list):
            return [self.compute(h, r) for h, r in zip(cell, pos, strict=True)]
        energy, forces = energy_forces(pos)
        extras = {
            "dipole": (CHARGES @ pos).tolist(),
            "BEC": np.kron(CHARGES[:, None], np.eye(3)).tolist(),
            "polarizability": polarizability(pos).tolist(),
        }
        return energy, forces, np.zeros((3, 3)), json.dumps(extras)
