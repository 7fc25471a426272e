"""A preconditioner for long waves of charge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from voltpi.potential.electrostatics.kernel_cache import KernelCache
from voltpi.potential.electrostatics.mesh import make_sites
from voltpi.potential.electrostatics.window import Resolution

if TYPE_CHECKING:
    from voltpi.potential.electrostatics.ewald import MeshSum

__all__ = ["LongWaves"]


class LongWaves:
    """What a uniform medium does to long waves of charge: the slow part of equilibration, for a preconditioner.

    With B the inverse hardness of charges and shells on the constraint surface and G the Coulomb interaction,
    smeared by ``_SMEAR``, (B⁻¹ + G)⁻¹ = B − B (G⁻¹ + B)⁻¹ B; in the middle B is replaced by its mean, a number for
    every wave, so that it is a product in Fourier space. The mean is that of the space which atoms fill, and a
    little too large: where atoms are spread unevenly B falls short of it by some N^-½, and what is subtracted must
    stay less than B. LiPON, cold: the same number of products for 2160 and 17280 atoms; without this twice as many
    and growing, since the largest eigenvalue of the Hessian grows like the square of the cell.
    """

    _SMEAR = 0.35  # 1/Å
    _WINDOW = Resolution(4, 2.4, 0.5)
    _MARGIN = 0.7
    _LEAST_MARGIN = 0.007  # copies of a small cell do not even out
    _EVEN = 1.1  # a mean of the local over the average density up to which a structure counts as filling its box

    def __init__(self, mesh: MeshSum, inverse_hardness: Tensor, inverse_stiffness: Tensor, cache: KernelCache) -> None:
        self.sum = mesh
        box = mesh.coarse_box(self._WINDOW.spacing / self._SMEAR)
        width = torch.full((1,), 0.5 / self._SMEAR**2, dtype=torch.float64, device=mesh.inverse.device)
        whole = torch.zeros(1, 1, dtype=torch.bool, device=width.device)
        self.mesh = cache(box, width, whole, math.inf, mesh.operator.k_e, self._WINDOW, torch.float32)
        self.sites = make_sites(self.mesh.points(mesh.positions), mesh.replica, box.shape, self._WINDOW, torch.float32)
        self.shell_charge = mesh.operator.shell_charge[mesh.atoms]
        atoms, replicas = len(mesh.atoms), len(mesh.members)
        margin = 1 + max(self._MARGIN / math.sqrt(atoms / replicas), self._LEAST_MARGIN)
        b = inverse_hardness[mesh.atoms]
        k2 = self.mesh.wave_vectors().square().sum(-1)
        polarizable = self.shell_charge.square() * inverse_stiffness[mesh.atoms]
        mean = self._dense(b) + k2 * self._dense(polarizable)
        mean = (margin / replicas) * mean
        smooth = self.mesh.form[0].square()
        self.filter = self.mesh.weight * smooth / (1 + self.mesh.bare * smooth * mean.to(torch.float32))
        self.filter[0] = 0

    def _dense(self, weights: Tensor) -> Tensor:
        """Sum of weights [n]; beside a vacuum, what it would be were the whole box as dense as the densest place."""
        grid = self._empty()
        self.sites.spread(weights.to(torch.float32).contiguous(), grid)
        average = grid.mean((1, 2, 3))
        density = self._gathered(grid, self.mesh.form[0])[:, 0]
        relative = density / (average[self.sum.replica] * self.sites.gather(grid.fill_(1.0)))
        uneven = float((relative * weights).sum() / weights.sum()) > self._EVEN if bool(weights.any()) else False
        return weights.sum() * relative.max() if uneven else weights.sum()

    def _empty(self) -> Tensor:
        return self.mesh.grid(len(self.sum.members))

    def _gathered(self, grid: Tensor, factors: Tensor) -> Tensor:
        """Values and gradients [n, 4] at the atoms of a grid, whose waves are multiplied by ``factors``."""
        n1, n2, n3 = self.mesh.box.shape
        waves = torch.fft.rfftn(grid, dim=(1, 2, 3)).reshape(len(grid), -1)
        return self.sites.gather_gradient(self.mesh.back((factors * waves).reshape(-1, n1, n2, n3 // 2 + 1)))

    def __call__(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """(G⁻¹ + B)⁻¹ of charges and shell displacements [n, 4]: at their atoms, ([n], [n, 3])."""
        grid = self._empty()
        self.sites.spread(direction[:, 0].to(torch.float32).contiguous(), grid)
        moved = (self.shell_charge[:, None] * direction[:, 1:]) @ self.mesh.to_mesh
        self.sites.spread_dipoles(moved.to(torch.float32), grid)
        felt = self._gathered(grid, self.filter)
        return felt[:, 0], self.shell_charge[:, None] * (felt[:, 1:] @ self.mesh.to_mesh.T)
