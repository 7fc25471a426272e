"""The real-space part of the Coulomb operator: pairs of atoms, each with a core and a shell.

A pair sum of the plain kernel erf(α_ij r)/r is a structure without a cell; with a splitting width β it is what the
mesh leaves out, [erf(α_ij r) − erf(β r)]/r, with a C² switch over the last tenth of the cutoff. Kernels are kept as
B₀, B₁, B₂ (:mod:`voltpi.potential.electrostatics.gaussians`) at the four core–shell combinations of every pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.electrostatics.gaussians import erf_kernel, smooth_switch, switched

__all__ = ["SWITCH_WIDTH", "PairState", "Pairs"]

SWITCH_WIDTH = 0.1
"""Share of the cutoff over which a real-space sum is switched off."""


class Pairs(NamedTuple):
    """Pairs of atoms, each once.

    index : [2, p]
    vectors : [p, 3], Å, core to core
    exponent : [p], Å⁻², α_ij²
    structure : [p], the structure of the batch that the pair belongs to
    beta : 1/Å, splitting width; 0: the whole kernel
    cutoff : Å; without a splitting it has no meaning
    """

    index: Tensor
    vectors: Tensor
    exponent: Tensor
    structure: Tensor
    beta: float
    cutoff: float


class PairState:
    """Potential, field and second derivatives of the pairs at given charges and shells.

    Attributes
    ----------
    potential : [2, n], V, at cores and shells
    gradient : [2, n, 3], V/Å
    """

    def __init__(self, pairs: Pairs, site_charges: Tensor, shells: Tensor, k_e: float) -> None:
        self.pairs, self.site_charges = pairs, site_charges
        i, j = pairs.index
        n = len(shells)
        offset = torch.stack([torch.zeros_like(shells), shells], dim=1)  # [n, site, 3]
        # d[p, a, b]: from site a of i to site b of j
        d = pairs.vectors[:, None, None] + offset[j][:, None, :] - offset[i][:, :, None]
        u = d.square().sum(-1)
        kernel = erf_kernel(u, pairs.exponent[:, None, None].expand_as(u))
        if pairs.beta:
            long = erf_kernel(u, torch.full_like(u, pairs.beta**2))
            switch = smooth_switch(u, ((1 - SWITCH_WIDTH) * pairs.cutoff) ** 2, pairs.cutoff**2)
            kernel = switched(tuple(a - b for a, b in zip(kernel, long, strict=True)), switch)
        self.d = d
        self.b0, self.b1, self.b2 = b0, b1, _ = tuple(k_e * b for b in kernel)
        by_i, by_j = site_charges.T[i][:, :, None], site_charges.T[j][:, None, :]  # [p, site, site]
        felt = torch.zeros(n, 2, 4, dtype=d.dtype, device=d.device)
        felt.index_add_(0, i, torch.cat([(b0 * by_j).sum(2, keepdim=True), ((b1 * by_j)[..., None] * d).sum(2)], dim=2))
        pull = ((b1 * by_i)[..., None] * d).sum(1)
        felt.index_add_(0, j, torch.cat([(b0 * by_i).sum(1)[..., None], -pull], dim=2))
        self.potential = felt[..., 0].T
        self.gradient = felt[..., 1:].transpose(0, 1)

    def linearize(self, shell_charge: Tensor) -> Tensor:
        """Builds the blocks [p, 4, 4] in (q, Δ) that ``product`` needs; returns ∇∇φ at the shells, [n, 3, 3]."""
        i, j = self.pairs.index
        qs_i, qs_j = shell_charge[i], shell_charge[j]
        d, b1, b2 = self.d, self.b1, self.b2
        eye = torch.eye(3, dtype=d.dtype, device=d.device)
        block = torch.empty(len(b1), 4, 4, dtype=d.dtype, device=d.device)
        block[:, 0, 0] = self.b0[:, 0, 0]
        block[:, 0, 1:] = -(qs_j * b1[:, 0, 1])[:, None] * d[:, 0, 1]
        block[:, 1:, 0] = (qs_i * b1[:, 1, 0])[:, None] * d[:, 1, 0]
        between, qq = d[:, 1, 1], qs_i * qs_j
        block[:, 1:, 1:] = (qq * b1[:, 1, 1])[:, None, None] * eye
        block[:, 1:, 1:] -= ((qq * b2[:, 1, 1])[:, None] * between)[:, :, None] * between[:, None, :]
        self.blocks = block
        # Σ Q (B₂ d dᵀ − B₁ 1) over the sites of the neighbours
        own = torch.zeros(len(shell_charge), 3, 3, dtype=d.dtype, device=d.device)
        for atom, lines, c1, c2, q in (
            (i, d[:, 1], b1[:, 1], b2[:, 1], self.site_charges.T[j]),
            (j, d[:, :, 1], b1[:, :, 1], b2[:, :, 1], self.site_charges.T[i]),
        ):
            curved = torch.bmm(((c2 * q)[..., None] * lines).transpose(1, 2), lines)
            own.index_add_(0, atom, curved - (c1 * q).sum(1)[:, None, None] * eye)
        return own

    def product(self, direction: Tensor) -> Tensor:
        """The blocks times a direction [n, 4] in (q, Δ)."""
        i, j = self.pairs.index
        out = torch.zeros_like(direction)
        out.index_add_(0, i, torch.einsum("pxy,py->px", self.blocks, direction[j]))
        out.index_add_(0, j, torch.einsum("pxy,px->py", self.blocks, direction[i]))
        return out

    def core_gradient_change(self, direction: Tensor) -> Tensor:
        """Change of Σ_sites Q ∇φ of every whole atom with a direction in (q, Δ), [n, 3]."""
        i, j = self.pairs.index
        zero = torch.zeros_like(direction[:, :1])
        dcharge = torch.cat([direction[:, :1], zero], dim=1)  # [n, site]
        dsite = torch.stack([zero.expand(-1, 3), direction[:, 1:]], dim=1)  # [n, site, 3]
        dd = dsite[j][:, None, :] - dsite[i][:, :, None]
        qi, qj = self.site_charges.T[i][:, :, None], self.site_charges.T[j][:, None, :]
        dproduct = dcharge[i][:, :, None] * qj + qi * dcharge[j][:, None, :]
        along = (self.d * dd).sum(-1)
        change = (dproduct * self.b1 - qi * qj * self.b2 * along)[..., None] * self.d
        change = (change + (qi * qj * self.b1)[..., None] * dd).sum((1, 2))
        out = torch.zeros_like(direction[:, 1:])
        out.index_add_(0, i, change)
        return out.index_add_(0, j, -change)

    def virial(self, structures: int) -> Tensor:
        """−∂E/∂strain at fixed charges and Δ, [structures, 3, 3]: only the core–core vector of a pair is strained."""
        i, j = self.pairs.index
        product = self.site_charges.T[i][:, :, None] * self.site_charges.T[j][:, None, :]
        pull = ((product * self.b1)[..., None] * self.d).sum((1, 2))
        out = torch.zeros(structures, 3, 3, dtype=pull.dtype, device=pull.device)
        return out.index_add_(0, self.pairs.structure, pull[:, :, None] * self.pairs.vectors[:, None])
