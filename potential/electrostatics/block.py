"""The electrodes' block of the charge matrix, factorised once: exact for frozen electrodes, a guess for moving ones.

With A the Coulomb matrix of electrode atoms and D their diagonal (potential.external.electrodes), charges on electrodes
follow from the potential of everything else by (A + D)⁻¹. For frozen electrodes among fixed charges one application is
the whole solution; otherwise it preconditions conjugate gradients. The matrix takes m² numbers and O(m³) time, so it is
built when a structure comes back with its electrodes where they were, give or take ``_CLOSE``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.electrostatics.ewald import CoulombOperator
from voltpi.potential.systems import Systems

__all__ = ["BlockCache", "ElectrodeBlock"]

_CLOSE = 0.5  # Å, displacement from the positions of a factorised block up to which it preconditions
_LARGEST = 6000  # atoms: 288 MB
_ACCURACY = 1e-8  # relative, of the matrix: what is left is taken care of by refinement
_KEPT = 4  # electrode geometries


class _Request(NamedTuple):
    """Electrode atoms as they were asked for."""

    positions: Tensor
    cell: Tensor
    pbc: Tensor
    alpha: Tensor
    diagonal: Tensor

    def like(self, other: _Request) -> bool:
        """Whether a block for ``other`` serves here."""
        if self.positions.shape != other.positions.shape or self.positions.device != other.positions.device:
            return False
        same = (torch.equal(a, b) for a, b in zip(self[2:], other[2:], strict=True))
        if not all(same) or not torch.allclose(self.cell, other.cell, rtol=1e-2):
            return False
        return bool((self.positions - other.positions).square().sum(-1).max() < _CLOSE**2)


class BlockCache:
    """Factorised blocks by geometry; built at the second request for one."""

    def __init__(self) -> None:
        self._requests: list[_Request] = []
        self._blocks: list[tuple[_Request, Tensor | None]] = []

    def __call__(self, system: Systems, atoms: Tensor, alpha: Tensor, diagonal: Tensor, k_e: float) -> Tensor | None:
        """(A + D + c)⁻¹ [m, m] of the electrode atoms [m] of the first structure; None where it is not worth it.

        c is a constant on all elements. It costs nothing where the electrodes' total charge stays, and makes the
        matrix positive definite, which it need not be along that total.
        """
        wanted = _Request(system.positions[atoms], system.cell[0], system.pbc[0], alpha[atoms], diagonal[atoms])
        for known, inverse in self._blocks:
            if wanted.like(known):
                return inverse
        if len(atoms) > _LARGEST:
            return None
        if not any(wanted.like(other) for other in self._requests):
            self._requests = [*self._requests, wanted][-_KEPT:]
            return None
        inverse = _inverse(system, atoms, wanted, k_e)
        self._blocks = [*self._blocks, (wanted, inverse)][-_KEPT:]
        return inverse


def _inverse(system: Systems, atoms: Tensor, wanted: _Request, k_e: float) -> Tensor | None:
    """None where the electrodes have no stable charges."""
    electrodes = Systems(
        positions=wanted.positions,
        numbers=system.numbers[atoms],
        cell=system.cell[:1],
        pbc=system.pbc[:1],
        batch=torch.zeros_like(atoms),
        field=system.field[:1],
        net_charge=system.net_charge[:1],
    )
    none = torch.zeros_like(wanted.alpha)
    operator = CoulombOperator(electrodes, wanted.alpha, none, accuracy=_ACCURACY, k_e=k_e, many_products=True)
    matrix = operator.charge_matrix()
    matrix.diagonal().add_(wanted.diagonal)
    matrix += matrix.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool(failed) else torch.cholesky_inverse(factor)


class ElectrodeBlock:
    """Charges that potentials on the electrodes move, with every electrode group's total kept.

    Parameters
    ----------
    inverse : [m, m] from :class:`BlockCache`
    atoms : [b·m], electrode atoms of all structures, structure by structure
    members : [m], which of the groups [g] an electrode atom of a structure belongs to
    groups : [b, g], these groups' places among all groups
    others : [b, g], inverse hardness of other atoms in these groups (electrolyte that shares charge with electrodes)
    """

    def __init__(self, inverse: Tensor, atoms: Tensor, members: Tensor, groups: Tensor, others: Tensor) -> None:
        self.inverse, self.atoms, self.groups = inverse, atoms, groups
        one = torch.nn.functional.one_hot(members, groups.shape[1]).to(inverse.dtype)  # [m, g]
        self._shift = inverse @ one
        self._weight = (one.T @ self._shift)[None] + torch.diag_embed(others)  # [b, g, g]

    def respond(self, potential: Tensor) -> Tensor:
        """Charges [b·m] for potentials [b·m], times −1, without the constraint."""
        return (potential.reshape(-1, len(self.inverse)) @ self.inverse).reshape(-1)

    def multipliers(self, sums: Tensor) -> Tensor:
        """Potentials [b, g] that take the totals ``sums`` [b, g] (e) off the groups."""
        return torch.linalg.solve(self._weight, sums[..., None])[..., 0]

    def shift(self, multipliers: Tensor) -> Tensor:
        """Charges [b·m] that potentials [b, g] of the groups move."""
        return (multipliers @ self._shift.T).reshape(-1)
