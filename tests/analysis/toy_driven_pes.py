"""A potential for i-PI's driven dynamics that needs no model: polar diatomics on anharmonic springs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from ipi.pes.dummy import Dummy_driver

__DRIVER_NAME__ = "voltpi_toy_driven"
__DRIVER_CLASS__ = "ToyDriven"


class ToyDriven(Dummy_driver):
    """E = Σ ½k x² − c x³ and M = Σ q (1 + a x) d with bonds d of lengths l + x, in atomic units."""

    k, c, q, a, length = 0.06, 0.01, 0.4, 0.3, 2.4

    def compute(self, cell: Any, pos: Any) -> Any:
        if isinstance(pos, list):
            return [self.compute(h, r) for h, r in zip(cell, pos, strict=True)]
        d = pos[1::2] - pos[::2]
        r = np.linalg.norm(d, axis=1)
        x, unit = r - self.length, d / r[:, None]
        energy = (0.5 * self.k * x**2 - self.c * x**3).sum()
        pull = -(self.k * x - 3.0 * self.c * x**2)[:, None] * unit
        forces = np.stack([-pull, pull], axis=1).reshape(-1, 3)
        dipole = (self.q * (1.0 + self.a * x)[:, None] * d).sum(0)
        z = self.q * ((1.0 + self.a * x)[:, None, None] * np.eye(3) + self.a * d[:, :, None] * unit[:, None, :])
        born = np.stack([-z, z], axis=1).transpose(0, 1, 3, 2).reshape(-1, 3)
        return energy, forces, np.zeros((3, 3)), json.dumps({"dipole": dipole.tolist(), "BEC": born.tolist()})
