"""A network with latent charges at one geometry: its energy now, its derivatives once the charges' potential is known."""

from __future__ import annotations

import torch
from torch import Tensor

from voltpi.potential.neighbors import Neighbors
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems

__all__ = ["LatentPass"]


class LatentPass:
    """One forward pass, kept for several backward ones.

    Attributes: ``energy`` [b] (eV) and ``charges`` [n] (e, before they are made to add up), float64, without a graph.
    """

    def __init__(self, network: NequIP, systems: Systems, pairs: Neighbors, dtype: torch.dtype) -> None:
        self.systems, self.pairs = systems, pairs
        self._vectors = pairs.vectors.to(dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            self._atomic, self._charges = network.with_charges(systems.numbers, pairs.index, self._vectors)
        self.energy = torch.zeros(systems.n_systems, dtype=torch.float64, device=systems.device)
        self.energy.index_add_(0, systems.batch, self._atomic.detach().to(torch.float64))
        self.charges = self._charges.detach().to(torch.float64)

    def gradient(self, potential: Tensor) -> Tensor:
        """∂(Σ energies + Σ ``potential`` [n] (V) · charges)/∂(r_j − r_i) of every pair, [e, 3] eV/Å."""
        ones = torch.ones_like(self._atomic)
        return self._pulled([self._atomic, self._charges], [ones, potential.to(self._charges)])

    def moved(self, factors: Tensor) -> Tensor:
        """∂(Σ ``factors`` [n] · charges)/∂r, [n, 3]."""
        gradient = self._pulled([self._charges], [factors.to(self._charges)])
        i, j = self.pairs.index
        out = torch.zeros_like(self.systems.positions)
        return out.index_add_(0, j, gradient).index_add_(0, i, gradient, alpha=-1)

    def _pulled(self, outputs: list[Tensor], factors: list[Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs, self._vectors, factors, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self._vectors, dtype=torch.float64) if gradient is None else gradient.to(torch.float64)
