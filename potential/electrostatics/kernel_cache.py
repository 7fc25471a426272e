"""What a Coulomb sum keeps from step to step: kernels of a box, lists of pairs, the choice of a splitting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.electrostatics.mesh import Mesh, MeshBox
from voltpi.potential.electrostatics.splitting import Box, Splitting, choose_splitting
from voltpi.potential.electrostatics.window import Resolution
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems

__all__ = ["KernelCache"]

# kernels that are kept from call to call: at least so many, and no more numbers than these
_FEWEST_KERNELS, _CACHED_NUMBERS = 6, 40_000_000
_SKIN = 0.8  # Å, of lists of pairs that are kept


class _List(NamedTuple):
    """Pairs [2, p] closer than a cutoff and a skin, with lattice vectors [p, 3] (Å), where they were found."""

    system: Systems
    index: Tensor
    offsets: Tensor


class KernelCache:
    """What stays the same from step to step: kernels of the latest boxes, and lists of pairs."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Mesh] = {}
        self._lists: dict[tuple[object, ...], _List] = {}
        self._splittings: dict[tuple[object, ...], Splitting] = {}

    def splitting(
        self, box: Box, inverse: Tensor, counts: Tensor, accuracy: float, *, mesh_only: bool, cost_pair: float
    ) -> Splitting:
        """:func:`choose_splitting`, remembered for the latest boxes."""
        arrays = (box.cell, inverse, counts)
        key = (*(a.cpu().numpy().tobytes() for a in arrays), *box[1:], accuracy, mesh_only, cost_pair)
        found = self._splittings.pop(key, None)
        if found is None:
            found = choose_splitting(box, inverse, counts, accuracy, mesh_only=mesh_only, cost_pair=cost_pair)
        self._splittings[key] = found
        while len(self._splittings) > _FEWEST_KERNELS:
            del self._splittings[next(iter(self._splittings))]
        return found

    def pairs(self, system: Systems, cutoff: float, wanted: Tensor, key: tuple[object, ...]) -> tuple[Tensor, Tensor]:
        """Index [2, p] and offsets [p, 3] of pairs among ``wanted`` [n] (bool), closer than ``cutoff`` (Å).

        Found again where an atom has moved half the skin since, the cell has changed, or ``key`` is new.
        """
        key = (*key, system.n_atoms, cutoff)
        known = self._lists.pop(key, None)
        if known is None or not _near(known.system, system):
            found = neighbor_list(system, cutoff + _SKIN, half=True)
            kept = (wanted[found.index[0]] & wanted[found.index[1]]).nonzero()[:, 0]
            index, shift = found.index[:, kept].contiguous(), found.shift[kept].to(system.cell.dtype)
            known = _List(system, index, torch.einsum("pa,pab->pb", shift, system.cell[system.batch[index[0]]]))
        self._lists[key] = known
        while len(self._lists) > _FEWEST_KERNELS:
            del self._lists[next(iter(self._lists))]
        return known.index, known.offsets

    def __call__(
        self,
        box: MeshBox,
        inverse: Tensor,
        split: Tensor,
        beta: float,
        k_e: float,
        window: Resolution,
        dtype: torch.dtype,
    ) -> Mesh:
        """The mesh for these arguments of :class:`~voltpi.potential.electrostatics.mesh.Mesh`."""
        arrays = (box.cell, box.origin, inverse, split)
        key = (*(a.cpu().numpy().tobytes() for a in arrays), *box[2:], beta, k_e, window, dtype, str(inverse.device))
        mesh = self._kept.pop(key, None) or Mesh(box, inverse, split, beta, k_e, window, dtype)
        self._kept[key] = mesh
        while len(self._kept) > _FEWEST_KERNELS and sum(m.size for m in self._kept.values()) > _CACHED_NUMBERS:
            del self._kept[next(iter(self._kept))]
        return mesh


def _near(old: Systems, new: Systems) -> bool:
    """Whether a list of pairs found for ``old`` still holds for ``new``."""
    if old.positions.shape != new.positions.shape or old.device != new.device:
        return False
    if not (torch.equal(old.cell, new.cell) and torch.equal(old.batch, new.batch) and torch.equal(old.pbc, new.pbc)):
        return False
    return bool((new.positions - old.positions).square().sum(-1).max() < (0.5 * _SKIN) ** 2)
