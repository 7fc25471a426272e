"""Positions that go on continuously although whoever sends or writes them wraps atoms into the cell."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray

__all__ = ["Unwrapper"]

Array = NDArray[np.float64]


class Unwrapper:
    """Puts every atom at the image nearest to where it was in the previous call.

    The dipole Σ q_i r_i depends on the image of every charge; a trajectory that is wrapped would make it jump by
    charge times lattice vector. Comparison is in fractional coordinates, so the cell may change from call to call. The
    first positions are taken as they come, or put nearest to ``first`` [n, 3] (fractional). Valid while no atom moves
    by half a cell between two calls.
    """

    def __init__(self, pbc: NDArray[np.bool_], first: Array | None = None) -> None:
        self._pbc = np.asarray(pbc, dtype=bool)
        self._first = first
        self._last: dict[Hashable, Array] = {}

    def __call__(self, positions: Array, cell: Array, key: Hashable = 0) -> Array:
        """Continuous positions [n, 3] (same unit as given); ``cell`` [3, 3] has lattice vectors as rows.

        ``key`` names what is followed (one replica of a ring polymer, one trajectory).
        """
        if not self._pbc.any():
            return positions
        full = complete_cell(cell)
        fractional = np.linalg.solve(full.T, positions.T).T
        last = self._last.get(key, self._first)
        if last is None or last.shape != fractional.shape:
            images = np.zeros_like(fractional)
        else:
            images = np.where(self._pbc, np.rint(last - fractional), 0.0)
        self._last[key] = fractional + images
        # whole lattice vectors are added to what came, so positions that did not wrap stay bit for bit
        return positions + images @ full
