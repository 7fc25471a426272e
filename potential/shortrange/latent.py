"""A network with latent charges at one geometry: energy now, derivatives once the potential of its charges is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.neighbors import Neighbors
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems

__all__ = ["Exchanged", "LatentPass", "exchanged"]


_LONE = 0.1
"""Of one near neighbour's weight."""


class Exchanged(NamedTuple):
    """Charges [n] (e) that atoms have after they have exchanged some with neighbours, and their moment [b, 3] (e Å)."""

    charges: Tensor
    moment: Tensor


def exchanged(cutoff: float, latent: Tensor, index: Tensor, vectors: Tensor, batch: Tensor, count: int) -> Exchanged:
    """What ``latent`` [n] makes of charges: every atom spreads the opposite of its own over its neighbours.

    t_ij = w_ij (c_i/W_i − c_j/W_j) goes from j to i with w = (1 − r²/r_c²)³ within ``cutoff`` (Å) and W_i = Σ_j w_ij
    (plus a little, so that charges fade where an atom leaves all others); q_i = Σ_j t_ij. Every pair keeps what it has,
    so what an atom does stays near it, and the moment Σ q r = ½ Σ_ij t_ij (r_i − r_j) needs no origin and knows no
    cell: ``vectors`` [e, 3] are r_j − r_i, ``index`` [2, e] has every pair both ways, ``batch`` [n] the structure of
    ``count`` of every atom.
    """
    i, j = index
    near = (1 - vectors.square().sum(1) / cutoff**2).clamp(min=0) ** 3
    spread = latent / (_LONE + torch.zeros_like(latent).index_add(0, i, near))
    given = near * (spread[i] - spread[j])
    charges = torch.zeros_like(latent).index_add(0, i, given)
    moment = latent.new_zeros(count, 3).index_add(0, batch[i], -0.5 * given[:, None] * vectors)
    return Exchanged(charges, moment)


class LatentPass:
    """One forward pass, kept for several backward ones.

    Attributes: ``energy`` [b] (eV) and ``charges`` [n] (e, before they are made to add up), float64, without a graph;
    where charges are ``exchanged`` among neighbours, ``moment`` [b, 3] (e Å), else None.
    """

    def __init__(
        self, network: NequIP, systems: Systems, pairs: Neighbors, dtype: torch.dtype, *, exchange: bool = False
    ) -> None:
        self.systems, self.pairs = systems, pairs
        self._vectors = pairs.vectors.to(dtype).detach().requires_grad_(True)
        with torch.enable_grad():
            self._atomic, self._charges = network.with_charges(systems.numbers, pairs.index, self._vectors)
        self.energy = torch.zeros(systems.n_systems, dtype=torch.float64, device=systems.device)
        self.energy.index_add_(0, systems.batch, self._atomic.detach().to(torch.float64))
        self._moment: Tensor | None = None
        self.moment: Tensor | None = None
        if exchange:
            index, vectors = pairs.index, self._vectors
            with torch.enable_grad():
                if systems.electrode is not None:  # the charge of electrodes is their own
                    among = (systems.electrode[index] < 0).all(0)
                    index, vectors = index[:, among], vectors[among]
                self._charges, self._moment = exchanged(
                    network.cutoff, self._charges, index, vectors, systems.batch, systems.n_systems
                )
            self.moment = self._moment.detach().to(torch.float64)
        self.charges = self._charges.detach().to(torch.float64)

    def gradient(self, potential: Tensor) -> Tensor:
        """∂(Σ energies + Σ ``potential`` [n] (V) · charges)/∂(r_j − r_i) of every pair, [e, 3] eV/Å."""
        ones = torch.ones_like(self._atomic)
        return self._pulled([self._atomic, self._charges], [ones, potential.to(self._charges)])

    def pulled_moment(self, field: Tensor) -> Tensor:
        """∂(Σ ``field`` [b, 3] · moment)/∂(r_j − r_i) of every pair, [e, 3]."""
        assert self._moment is not None
        return self._pulled([self._moment], [field.to(self._moment)])

    def moved(self, factors: Tensor) -> Tensor:
        """∂(Σ ``factors`` [n] · charges)/∂r, [n, 3]."""
        return self.on_atoms(self._pulled([self._charges], [factors.to(self._charges)]))

    def on_atoms(self, gradient: Tensor) -> Tensor:
        """∂/∂r [n, 3] of what has ``gradient`` [e, 3] with r_j − r_i of every pair."""
        i, j = self.pairs.index
        out = torch.zeros_like(self.systems.positions)
        return out.index_add_(0, j, gradient).index_add_(0, i, gradient, alpha=-1)

    def _pulled(self, outputs: list[Tensor], factors: list[Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs, self._vectors, factors, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self._vectors, dtype=torch.float64) if gradient is None else gradient.to(torch.float64)
