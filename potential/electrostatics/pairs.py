"""The real-space part of the Coulomb operator: pairs of atoms, each with a core and a shell.

A pair sum of the plain kernel erf(α_ij r)/r is a structure without a cell; with a splitting width β it is what the
mesh leaves out, [erf(α_ij r) − erf(β r)]/r, with a C² switch over the last tenth of the cutoff. Kernels are kept as
B₀, B₁, B₂ (:mod:`voltpi.potential.electrostatics.gaussians`) at the four core–shell combinations of every pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voltpi.potential.electrostatics import mesh_kernels as kernels
from voltpi.potential.electrostatics.gaussians import erf_kernel, smooth_switch, switched

__all__ = ["SWITCH_WIDTH", "PairState", "Pairs", "RigidPairState", "RigidPairs"]

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
    kinds : the different exponents [t], and which [p] a pair has
    """

    index: Tensor
    vectors: Tensor
    exponent: Tensor
    structure: Tensor
    beta: float
    cutoff: float
    kinds: tuple[Tensor, Tensor]


_NODES = 8  # Chebyshev points of an interval of a table
_INTERVALS = 100  # the switch begins on one of their ends: 0.9² = 81/100
_FINEST = 0.25  # width of an interval times the larger exponent
_SHARP = 36.0  # exponent times r² from which erf is 1 to all digits


class RigidPairs(NamedTuple):
    """Pairs of atoms that have no shells, each once, in a list that may reach beyond the cutoff.

    index : [2, p]
    offsets : [p, 3], Å, lattice vector of the second atom's image
    positions : [n, 3], Å
    kinds : [n], the width of an atom
    exponents : [kinds², ], Å⁻², α_ij² of widths i and j at i·kinds + j
    structure : [n], the structure of the batch that an atom belongs to
    beta, cutoff : as in :class:`Pairs`
    """

    index: Tensor
    offsets: Tensor
    positions: Tensor
    kinds: Tensor
    exponents: Tensor
    structure: Tensor
    beta: float
    cutoff: float

    def radial(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lines [p, 3] (Å) and B₀, B₁ [p] there, without k_e."""
        i, j = self.index
        d = self.positions[j] - self.positions[i] + self.offsets
        kinds = math.isqrt(len(self.exponents))
        exponent = self.exponents[self.kinds[i] * kinds + self.kinds[j]]
        b0, b1, _ = _radial(d.square().sum(-1), exponent, self.beta, self.cutoff)
        return d, b0, b1


class RigidPairState:
    """Potential, field and second derivatives of rigid pairs at given charges [n].

    Attributes
    ----------
    potential : [n], V
    gradient : [n, 3], V/Å
    """

    def __init__(self, pairs: RigidPairs, charges: Tensor, structures: int, k_e: float) -> None:
        self.pairs, self.charges, self.k_e, self.structures = pairs, charges, k_e, structures
        felt, self._pull = self._field(charges)
        self.potential, self.gradient = felt[:, 0], felt[:, 1:]

    def _field(self, charges: Tensor) -> tuple[Tensor, Tensor]:
        """Potential and gradient [n, 4] of charges [n], and −∂E/∂strain [structures, 3, 3]."""
        p = self.pairs
        if charges.device.type != "cpu":
            return self._summed(charges)
        kinds = math.isqrt(len(p.exponents))
        table = _table(tuple(p.exponents.tolist()), p.beta, p.cutoff)
        count = p.index.shape[1]
        threads = torch.get_num_threads() if count > 100_000 else 1
        out = np.zeros((threads, len(charges), 4))
        pull = np.zeros((threads, self.structures, 3, 3))
        fixed: list[Any] = [p.index.numpy(), p.offsets.numpy(), p.positions.numpy(), p.kinds.numpy(), kinds, *table]
        fixed += [charges.contiguous().numpy(), p.structure.numpy()]
        parts = kernels.shares(count, threads)
        kernels.in_parallel(
            lambda a, b: kernels.rigid_field(a, b, *fixed, out[parts.index((a, b))], pull[parts.index((a, b))]), parts
        )
        upper = torch.from_numpy(pull.sum(0))
        whole = upper + torch.triu(upper, 1).transpose(1, 2)
        return self.k_e * torch.from_numpy(out.sum(0)), self.k_e * whole

    def _summed(self, charges: Tensor) -> tuple[Tensor, Tensor]:
        p = self.pairs
        i, j = p.index
        d, b0, b1 = p.radial()
        b0, b1 = self.k_e * b0, self.k_e * b1
        out = torch.zeros(len(charges), 4, dtype=d.dtype, device=d.device)
        qi, qj = charges[i], charges[j]
        out.index_add_(0, i, torch.cat([(b0 * qj)[:, None], (b1 * qj)[:, None] * d], dim=1))
        out.index_add_(0, j, torch.cat([(b0 * qi)[:, None], -(b1 * qi)[:, None] * d], dim=1))
        pull = torch.zeros(self.structures, 3, 3, dtype=d.dtype, device=d.device)
        pull.index_add_(0, p.structure[i], (qi * qj * b1)[:, None, None] * d[:, :, None] * d[:, None, :])
        return out, pull

    def product(self, dq: Tensor) -> Tensor:
        """Change of the potential [n] with charges [n]."""
        return self._field(dq)[0][:, 0]

    def core_gradient_change(self, dq: Tensor) -> Tensor:
        """Change of Q ∇φ of every atom with charges [n]: [n, 3]."""
        return self.charges[:, None] * self._field(dq)[0][:, 1:] + dq[:, None] * self.gradient

    def virial(self) -> Tensor:
        """−∂E/∂strain at fixed charges, [structures, 3, 3]."""
        return self._pull


class PairState:
    """Potential, field and second derivatives of the pairs at given charges and shells.

    Attributes
    ----------
    potential : [2, n], V, at cores and shells
    gradient : [2, n, 3], V/Å
    pull : [p, 3], eV/Å, Σ Q Q' B₁ d over the four combinations of a pair
    """

    def __init__(self, pairs: Pairs, site_charges: Tensor, shells: Tensor, k_e: float) -> None:
        self.pairs, self.site_charges, self.shells, self.k_e = pairs, site_charges, shells, k_e
        self._kernel: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        felt = self._tabulated() if pairs.beta and shells.device.type == "cpu" else self._summed()
        self.potential = felt[..., 0].T
        self.gradient = felt[..., 1:].transpose(0, 1)

    def _tabulated(self) -> Tensor:
        """Potential and gradient [n, site, 4] by compiled loops over tabulated kernels."""
        pairs = self.pairs
        exponents, kind = pairs.kinds
        table = _table(tuple(exponents.tolist()), pairs.beta, pairs.cutoff)
        n, count = len(self.shells), len(kind)
        threads = torch.get_num_threads() if count > 100_000 else 1
        out = np.zeros((threads, n, 8))
        pull = np.empty((count, 3))
        fixed: list[Any] = [pairs.index.numpy(), pairs.vectors.numpy(), kind.numpy(), *table]
        fixed += [self.shells.contiguous().numpy(), self.site_charges.contiguous().numpy()]
        parts = kernels.shares(count, threads)
        kernels.in_parallel(lambda a, b: kernels.pair_field(a, b, *fixed, out[parts.index((a, b))], pull), parts)
        self.pull = self.k_e * torch.from_numpy(pull)
        return self.k_e * torch.from_numpy(out.sum(0)).reshape(n, 2, 4)

    def _kernels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d [p, 2, 2, 3], from site a of i to site b of j, and B₀, B₁, B₂ there [p, 2, 2]."""
        if self._kernel is None:
            pairs = self.pairs
            i, j = pairs.index
            offset = torch.stack([torch.zeros_like(self.shells), self.shells], dim=1)  # [n, site, 3]
            d = pairs.vectors[:, None, None] + offset[j][:, None, :] - offset[i][:, :, None]
            u = d.square().sum(-1)
            kernel = _radial(u, pairs.exponent[:, None, None].expand_as(u), pairs.beta, pairs.cutoff)
            b0, b1, b2 = (self.k_e * b for b in kernel)
            self._kernel = d, b0, b1, b2
        return self._kernel

    def _summed(self) -> Tensor:
        """Potential and gradient [n, site, 4] with the kernels themselves."""
        i, j = self.pairs.index
        d, b0, b1, _ = self._kernels()
        by_i, by_j = self.site_charges.T[i][:, :, None], self.site_charges.T[j][:, None, :]  # [p, site, site]
        felt = torch.zeros(len(self.shells), 2, 4, dtype=d.dtype, device=d.device)
        felt.index_add_(0, i, torch.cat([(b0 * by_j).sum(2, keepdim=True), ((b1 * by_j)[..., None] * d).sum(2)], dim=2))
        pull = ((b1 * by_i)[..., None] * d).sum(1)
        felt.index_add_(0, j, torch.cat([(b0 * by_i).sum(1)[..., None], -pull], dim=2))
        self.pull = ((by_i * by_j * b1)[..., None] * d).sum((1, 2))
        return felt

    def linearize(self, shell_charge: Tensor) -> Tensor:
        """Builds the blocks [p, 4, 4] in (q, Δ) that ``product`` needs; returns ∇∇φ at the shells, [n, 3, 3]."""
        i, j = self.pairs.index
        qs_i, qs_j = shell_charge[i], shell_charge[j]
        d, b0, b1, b2 = self._kernels()
        eye = torch.eye(3, dtype=d.dtype, device=d.device)
        block = torch.empty(len(b1), 4, 4, dtype=d.dtype, device=d.device)
        block[:, 0, 0] = b0[:, 0, 0]
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

    def add_matrix(self, matrix: Tensor) -> None:
        """Adds the blocks to a dense matrix [n, n, 4, 4]; a pair of atoms is there once."""
        i, j = self.pairs.index
        matrix[i, j] += self.blocks
        matrix[j, i] += self.blocks.transpose(1, 2)

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
        d, _, b1, b2 = self._kernels()
        along = (d * dd).sum(-1)
        change = (dproduct * b1 - qi * qj * b2 * along)[..., None] * d
        change = (change + (qi * qj * b1)[..., None] * dd).sum((1, 2))
        out = torch.zeros_like(direction[:, 1:])
        out.index_add_(0, i, change)
        return out.index_add_(0, j, -change)

    def virial(self, structures: int) -> Tensor:
        """−∂E/∂strain at fixed charges and Δ, [structures, 3, 3]: only the core–core vector of a pair is strained."""
        out = torch.zeros(structures, 3, 3, dtype=self.pull.dtype, device=self.pull.device)
        return out.index_add_(0, self.pairs.structure, self.pull[:, :, None] * self.pairs.vectors[:, None])


def _radial(u: Tensor, exponent: Tensor, beta: float, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """B₀, B₁, B₂ at squared distances ``u``; with a splitting less the long-range part, and switched off."""
    kernel = erf_kernel(u, exponent)
    if not beta:
        return kernel
    long = erf_kernel(u, torch.full_like(u, beta**2))
    switch = smooth_switch(u, ((1 - SWITCH_WIDTH) * cutoff) ** 2, cutoff**2)
    a, b, c = (x - y for x, y in zip(kernel, long, strict=True))
    return switched((a, b, c), switch)


class _Table(NamedTuple):
    """Arguments of mesh_kernels' ``_kernel``."""

    fine: NDArray[np.float64]
    ends: NDArray[np.float64]
    steps: NDArray[np.float64]
    coarse: NDArray[np.float64]
    step: float
    start: float
    cutoff: float


def _first_radial(u: Tensor, exponent: float, beta: float, cutoff: float) -> Tensor:
    return _radial(u, torch.full_like(u, exponent), beta, cutoff)[0]


@lru_cache(maxsize=16)
def _table(exponents: tuple[float, ...], beta: float, cutoff: float) -> _Table:
    """B₀ of every exponent as polynomials of 8 terms in u = r² from an interval's middle (Å²), without k_e.

    Interpolated at Chebyshev points: 1e-12 of the value at the origin, its derivatives those of the polynomial. Beyond
    ``_SHARP`` the kernel is (1 − erf(β r))/r, whose first part needs no table.
    """
    end = cutoff**2
    ends = np.array([end if 0.8 * a * end <= _SHARP else _SHARP / a for a in exponents])
    counts = [
        _INTERVALS * math.ceil(end * a / (_FINEST * _INTERVALS)) if reach == end else math.ceil(reach * a / _FINEST)
        for a, reach in zip(exponents, ends, strict=True)
    ]
    steps = ends / counts
    fine = np.zeros((len(exponents), max(counts), _NODES))
    for k, (a, count) in enumerate(zip(exponents, counts, strict=True)):
        fine[k, :count] = _polynomials(partial(_first_radial, exponent=a, beta=beta, cutoff=cutoff), count, steps[k])
    count = _INTERVALS * math.ceil(end * beta**2 / (_FINEST * _INTERVALS))
    switch = ((1 - SWITCH_WIDTH) ** 2 * end, end)

    def taken(u: Tensor) -> Tensor:
        return -switched(erf_kernel(u, torch.full_like(u, beta**2)), smooth_switch(u, *switch))[0]

    return _Table(fine, ends, steps, _polynomials(taken, count, end / count), end / count, *switch)


def _polynomials(function: Callable[[Tensor], Tensor], intervals: int, step: float) -> NDArray[np.float64]:
    """Coefficients [intervals, 8] of a function of u on equal intervals from 0."""
    points = np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
    to_powers = np.linalg.inv(np.vander(points, increasing=True)) / (0.5 * step) ** np.arange(_NODES)[:, None]
    u = torch.from_numpy((np.arange(intervals)[:, None] + 0.5 + 0.5 * points) * step)
    return np.ascontiguousarray(function(u).numpy() @ to_powers.T)
