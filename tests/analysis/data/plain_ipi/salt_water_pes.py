"""Salt water with fixed charges for i-PI, of no use but as a test: flexible SPC/Fw water with Na and Cl.

Water: Y. Wu, H. L. Tepper, G. A. Voth, J. Chem. Phys. 124, 024503 (2006). Coulomb's law with a damped, shifted force
(C. J. Fennell, J. D. Gezelter, J. Chem. Phys. 124, 234104 (2006)). Atoms come as O H H …, Na …, Cl ….
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from ipi.pes.dummy import Dummy_driver
from scipy.special import erfc

__DRIVER_NAME__ = "salt_water"
__DRIVER_CLASS__ = "SaltWater"

BOHR, HARTREE, KCAL = 0.529177210903, 27.211386245988, 0.0433641
K_E = 14.3996454785  # eV Å/e²


class SaltWater(Dummy_driver):
    """``waters``, ``salts``: numbers of H2O and NaCl. Energies in eV, lengths in Å inside."""

    cutoff, damping = 4.2, 0.35

    def __init__(self, waters: int = 12, salts: int = 2, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waters = waters
        self.charges = np.array([-0.82, 0.41, 0.41] * waters + [1.0] * salts + [-1.0] * salts)
        eps = np.array([0.1554252, 0.0, 0.0] * waters + [0.1] * 2 * salts) * KCAL
        sigma = np.array([3.165492, 1.0, 1.0] * waters + [2.35] * salts + [4.0] * salts)
        self.eps = np.sqrt(np.outer(eps, eps))
        self.sigma = 0.5 * (sigma[:, None] + sigma)
        label = np.concatenate([np.repeat(np.arange(waters), 3), waters + np.arange(2 * salts)])
        self.pairs = label[:, None] != label

    def compute(self, cell: Any, pos: Any) -> Any:
        if isinstance(pos, list):
            return [self.compute(h, r) for h, r in zip(cell, pos, strict=True)]
        energy, forces = self.evaluate(pos * BOHR, cell[0, 0] * BOHR)
        return energy / HARTREE, forces * BOHR / HARTREE, np.zeros((3, 3)), json.dumps({})

    def evaluate(self, r: np.ndarray, edge: float) -> tuple[float, np.ndarray]:
        d = r[:, None] - r
        d -= edge * np.rint(d / edge)
        x = np.sqrt((d**2).sum(axis=2)) + 1e9 * ~self.pairs
        near = x < self.cutoff
        x = np.where(near, x, self.cutoff)
        six = (self.sigma / x) ** 6
        qq = K_E * np.outer(self.charges, self.charges)
        a, c = self.damping, self.cutoff

        def slope(s: Any) -> Any:
            return erfc(a * s) / s**2 + 2 * a / np.sqrt(np.pi) * np.exp(-((a * s) ** 2)) / s

        coulomb = qq * (erfc(a * x) / x - erfc(a * c) / c + slope(c) * (x - c))
        energy = 0.5 * float((near * (4 * self.eps * (six**2 - six) + coulomb)).sum())
        push = near * (4 * self.eps * (12 * six**2 - 6 * six) / x + qq * (slope(x) - slope(c))) / x
        forces = np.einsum("ij,ijk->ik", push, d)
        for w in range(self.waters):
            o, h = 3 * w, (3 * w + 1, 3 * w + 2)
            bonds = r[list(h)] - r[o]
            lengths = np.linalg.norm(bonds, axis=1)
            k, k_angle = 1059.162 * KCAL, 75.90 * KCAL
            energy += 0.5 * k * float(((lengths - 1.012) ** 2).sum())
            f = -k * (lengths - 1.012)[:, None] * bonds / lengths[:, None]
            u = bonds / lengths[:, None]
            cosine = float(np.clip(u[0] @ u[1], -1 + 1e-12, 1 - 1e-12))
            bend = np.arccos(cosine) - np.radians(113.24)
            energy += 0.5 * k_angle * bend**2
            factor = k_angle * bend / np.sqrt(1 - cosine**2)
            f += factor * np.stack([(u[1] - cosine * u[0]) / lengths[0], (u[0] - cosine * u[1]) / lengths[1]])
            forces[list(h)] += f
            forces[o] -= f.sum(axis=0)
        return energy, forces
