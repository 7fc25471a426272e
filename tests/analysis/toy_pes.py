"""A potential for i-PI that needs no model: atoms on springs, molecules of charge zero in a field along x."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from ipi.pes.dummy import Dummy_driver

__DRIVER_NAME__ = "voltpi_toy_water"
__DRIVER_CLASS__ = "ToyWater"


class ToyWater(Dummy_driver):
    """E = ½k Σ|r − r0|² − ε·M with M = Σ q r, q = (−0.8, 0.4, 0.4), in atomic units."""

    spring = 0.05
    field = 0.05 * 0.529177210903 / 27.211386245988  # 0.05 V/Å

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin: np.ndarray | None = None

    def compute(self, cell: Any, pos: Any) -> Any:
        if isinstance(pos, list):
            return [self.compute(h, r) for h, r in zip(cell, pos, strict=True)]
        if self.origin is None:
            self.origin = pos.copy()
        away = pos - self.origin
        charges = np.tile([-0.8, 0.4, 0.4], len(pos) // 3)
        dipole = charges @ pos
        forces = -self.spring * away
        forces[:, 0] += self.field * charges
        energy = 0.5 * self.spring * (away**2).sum() - self.field * dipole[0]
        extras = {"dipole": dipole.tolist(), "charges": charges.tolist(), "polarizability": np.eye(3).tolist()}
        return energy, forces, np.zeros((3, 3)), json.dumps(extras)
