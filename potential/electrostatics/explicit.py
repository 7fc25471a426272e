"""The functional of charges and shells written out in torch, differentiable in everything that it depends on.

    Ω(q, Δ; r, θ),  θ = (χ, η, K, α) of every atom

The operator of a run (:mod:`voltpi.potential.electrostatics.ewald`) has the derivatives in q, Δ and r that dynamics
need, by hand and on a mesh. What a fit of θ needs besides, ∂Ω/∂θ, ∂²Ω/∂y∂θ, ∂²Ω/∂r∂θ and third derivatives along
given directions, comes from automatic differentiation of this plain sum instead of from more derivatives by hand;
stationary points and linear responses stay the operator's. Clusters are summed pair by pair. A cell is an Ewald sum
without a mesh: with α'_i = min(α_i, cap), the k-space part is that of Gaussians α', and pairs of which one is sharper
than the cap add [erf(α_ij r) − erf(α'_ij r)]/r in real space, both up to where exp(−x²) is 1e-13.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.errors import InputError
from voltpi.potential.fragments import whole_positions
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems

__all__ = ["ExplicitFunctional", "Rows"]

_DECAY = 5.5  # erfc(5.5) = 7e-15, exp(−5.5²) = 7e-14
_SERIES_BELOW = 1.0
_SERIES_TERMS = 24  # 24⁴/24! < 1e-18: four derivatives
_COST_PAIR, _COST_WAVE = 4.0, 1.0  # a pair with its four distances, and a wave of an atom


class Rows(NamedTuple):
    """Parameters of every atom [n]: chi (V), eta (V/e), stiffness K (eV/Å²) and alpha (Å⁻²)."""

    chi: Tensor
    eta: Tensor
    stiffness: Tensor
    alpha: Tensor


class _Pairs(NamedTuple):
    """Pairs [p], each once: the atoms, and the lattice vector of the second one's image [p, 3] (Å)."""

    first: Tensor
    second: Tensor
    shift: Tensor


class _Cell(NamedTuple):
    """A periodic structure: its number and atoms, pairs in real space, half of the waves [k, 3] (1/Å), cap (Å⁻²)."""

    structure: int
    atoms: Tensor
    pairs: _Pairs
    waves: Tensor
    volume: float
    cap: float


class ExplicitFunctional:
    """The functional of ``functional``'s structures, at parameters that may be differentiated.

    Raises InputError for structures periodic in one or two directions, for electrodes, held charges and a constant
    displacement, which no fit has.
    """

    def __init__(self, functional: Functional) -> None:
        self.functional, self.system = functional, functional.system
        self.model = functional.model
        self.k_e = self.model.coulomb_constant
        if functional.displaced or self.model.electrodes or not bool(functional.free.all()):
            raise InputError(
                "charges are fitted to structures without electrodes, fixed charges and displacement: remove them"
            )
        periodic = self.system.pbc.sum(1).tolist()
        if set(periodic) - {0, 3}:
            raise InputError(
                "charges are fitted to clusters and to cells periodic in all three directions: set pbc to F F F or T T "
                "T, or leave the frame out"
            )
        self._whole = whole_positions(self.system)
        alpha = self.model.tensors(self.system)["alpha"]
        self.open = self._open_pairs([b for b, directions in enumerate(periodic) if not directions])
        self.cells = [self._cell(b, alpha) for b, directions in enumerate(periodic) if directions]

    def _open_pairs(self, members: list[int]) -> _Pairs:
        counts = self.system.counts()
        found = [torch.zeros(2, 0, dtype=torch.int64)]
        for b in members:
            found.append(torch.triu_indices(counts[b], counts[b], offset=1) + sum(counts[:b]))
        index = torch.cat(found, dim=1)
        return _Pairs(index[0], index[1], self.system.positions.new_zeros(index.shape[1], 3))

    def _cell(self, structure: int, alpha: Tensor) -> _Cell:
        atoms = (self.system.batch == structure).nonzero()[:, 0]
        cell = self.system.cell[structure]
        volume = float(torch.linalg.det(cell).abs())
        alpha = alpha[atoms]
        cap = _best_cap(alpha, volume)
        widest = torch.minimum(alpha.min(), alpha.new_tensor(cap))
        sharpest = torch.minimum(alpha.max(), alpha.new_tensor(cap))
        shift, first, second = cell.new_zeros(0, 3), atoms[:0], atoms[:0]
        if bool((alpha > cap).any()):
            reach = _DECAY / math.sqrt(float(cap * widest / (cap + widest)))
            one = Systems(
                positions=self.system.positions[atoms],
                numbers=self.system.numbers[atoms],
                cell=cell[None],
                pbc=self.system.pbc[structure][None],
                batch=torch.zeros_like(atoms),
                field=self.system.field[:1],
                net_charge=self.system.net_charge[:1],
            )
            found = neighbor_list(one, reach, half=True)
            i, j = found.index
            kept = (alpha[i] > cap) | (alpha[j] > cap)
            i, j = i[kept], j[kept]
            shift = found.vectors[kept] - (one.positions[j] - one.positions[i])
            first, second = atoms[i], atoms[j]
        waves = _waves(cell, _DECAY * math.sqrt(2 * float(sharpest)))
        return _Cell(structure, atoms, _Pairs(first, second, shift), waves, volume, cap)

    def energy(self, y: Tensor, positions: Tensor, rows: Rows, strain: Tensor | None = None) -> Tensor:
        """Ω [b] (eV) at y [n, 4] = (q, Δ) and positions [n, 3] (Å).

        ``strain`` [b, 3, 3]: positions and cells are r_a + s_ab r_b, shells stay.
        """
        f = self.functional
        q, shells = y[:, 0], y[:, 1:]
        u = shells.square().sum(-1)
        if self.model.limiter == "none":
            spring = 0.5 * rows.stiffness * u
        else:
            limit = self.model.shell_bound**2
            spring = -0.5 * rows.stiffness * limit * torch.log1p(-u / limit)
        local = rows.chi * q + 0.5 * rows.eta * q.square() + spring
        out = torch.zeros_like(self.system.net_charge).index_add(0, self.system.batch, local)
        at = self._strained(positions, strain, self.system.batch)
        pairs = self._pair_energy(self.open, y, at, rows.alpha, None)
        out = out.index_add(0, self.system.batch[self.open.first], pairs)
        if self.cells:
            energies = torch.stack([self._cell_energy(cell, y, at, rows, strain) for cell in self.cells])
            out = out.index_add(0, out.new_tensor([c.structure for c in self.cells], dtype=torch.int64), energies)
        if bool((f.field != 0).any()):
            out = out - (f.field * self.dipole(y, positions, strain)).sum(-1)
        return out

    def dipole(self, y: Tensor, positions: Tensor, strain: Tensor | None = None) -> Tensor:
        """M [b, 3] (e Å); what does not feel a field enters it with its own charge."""
        f = self.functional
        whole = self._strained(self._whole + (positions - self.system.positions), strain, self.system.batch)
        origin = f.origin if strain is None else f.origin + torch.einsum("bij,bj->bi", strain, f.origin)
        return f.total(y[:, :1] * whole - f.shell_coupling * f.z[:, None] * y[:, 1:]) - origin

    @staticmethod
    def _strained(vectors: Tensor, strain: Tensor | None, structure: Tensor) -> Tensor:
        """Vectors [m, 3] of the structures [m] in strained space."""
        return vectors if strain is None else vectors + torch.einsum("mij,mj->mi", strain[structure], vectors)

    def _pair_energy(self, pairs: _Pairs, y: Tensor, positions: Tensor, alpha: Tensor, capped: Tensor | None) -> Tensor:
        """Energy of every pair [p]; ``capped``: exponents whose interaction is counted elsewhere."""
        i, j, shift = pairs
        z = self.functional.z
        core = y[:, 0] + z
        q_i = torch.stack([core[i], -z[i]], dim=1)[:, :, None]
        q_j = torch.stack([core[j], -z[j]], dim=1)[:, None, :]
        between = positions[j] - positions[i] + shift
        own = torch.stack([torch.zeros_like(between), y[i, 1:]], dim=1)[:, :, None]
        other = torch.stack([torch.zeros_like(between), y[j, 1:]], dim=1)[:, None, :]
        distance = (between[:, None, None] + other - own).square().sum(-1).sqrt()
        kernel = _screened(distance, alpha[i], alpha[j])
        if capped is not None:
            kernel = kernel - _screened(distance, capped[i], capped[j])
        return self.k_e * (q_i * q_j * kernel).sum((1, 2))

    def _cell_energy(
        self, cell: _Cell, y: Tensor, positions: Tensor, rows: Rows, strain: Tensor | None = None
    ) -> Tensor:
        """Coulomb energy of a cell with its images, without an atom's own core and shell; positions are strained."""
        alpha = rows.alpha.clamp(max=cell.cap)
        pairs, waves, volume = cell.pairs, cell.waves, cell.waves.new_tensor(cell.volume)
        if strain is not None:
            deformed = torch.eye(3, dtype=strain.dtype) + strain[cell.structure]
            pairs = pairs._replace(shift=pairs.shift @ deformed.T)
            waves = torch.linalg.solve(deformed, waves, left=False)
            volume = volume * torch.linalg.det(deformed)
        out = self._pair_energy(pairs, y, positions, rows.alpha, alpha).sum()
        at, shells, q, z = positions[cell.atoms], y[cell.atoms, 1:], y[cell.atoms, 0], self.functional.z[cell.atoms]
        alpha, true = alpha[cell.atoms], rows.alpha[cell.atoms]
        square = waves.square().sum(-1)
        shape = torch.exp(-square / (4 * alpha[:, None]))
        at_core, at_shell = at @ waves.T, (at + shells) @ waves.T
        real = (shape * ((q + z)[:, None] * torch.cos(at_core) - z[:, None] * torch.cos(at_shell))).sum(0)
        imaginary = (shape * ((q + z)[:, None] * torch.sin(at_core) - z[:, None] * torch.sin(at_shell))).sum(0)
        out = out + (4 * math.pi * self.k_e / volume) * ((real.square() + imaginary.square()) / square).sum()
        own = 0.5 * alpha  # exponent of a Gaussian with its like
        itself = ((q + z).square() + z.square()) * (own / math.pi).sqrt()
        out = out - self.k_e * (itself - (q + z) * z * _near(shells.square().sum(-1), own)).sum()
        background = math.pi * self.k_e / volume
        return out - background * q.sum() * (q * (1 / alpha - 1 / true)).sum()


def _screened(distance: Tensor, alpha_i: Tensor, alpha_j: Tensor) -> Tensor:
    """erf(α_ij r)/r of pairs [p] at distances [p, 2, 2]."""
    together = (alpha_i * alpha_j / (alpha_i + alpha_j)).sqrt()
    return torch.erf(together[:, None, None] * distance) / distance


def _near(u: Tensor, exponent: Tensor) -> Tensor:
    """erf(a r)/r at u = r² from 0 on, with ``exponent`` a²: its power series where that is short."""
    t = exponent * u
    far = t.clamp(min=_SERIES_BELOW)
    direct = 0.5 * math.sqrt(math.pi) * torch.erf(far.sqrt()) / far.sqrt()
    near = t.clamp(max=_SERIES_BELOW)
    series = torch.zeros_like(t)
    for k in reversed(range(_SERIES_TERMS + 1)):
        series = series * near + (-1.0) ** k / (math.factorial(k) * (2 * k + 1))
    return (2 / math.sqrt(math.pi)) * exponent.sqrt() * torch.where(t < _SERIES_BELOW, series, direct)


def _best_cap(alpha: Tensor, volume: float) -> float:
    """The largest exponent of the k-space part with which both parts together cost least; infinite: all of it."""
    best, chosen = math.inf, math.inf
    density = len(alpha) / volume
    for cap in [math.inf, *(2 ** (j / 2) for j in range(-8, 7))]:
        capped = alpha.clamp(max=cap)
        sharp, wide = float(capped.max()), float(capped.min())
        waves = volume * (_DECAY * math.sqrt(2 * sharp)) ** 3 / (12 * math.pi**2)
        cost = _COST_WAVE * len(alpha) * waves
        share = float((alpha > cap).double().mean())
        if share:
            reach = _DECAY / math.sqrt(cap * wide / (cap + wide))
            pairs = 0.5 * len(alpha) * (1 - (1 - share) ** 2) * density * 4.19 * reach**3
            cost += _COST_PAIR * pairs
        if cost < best:
            best, chosen = cost, cap
    return chosen


def _waves(cell: Tensor, longest: float) -> Tensor:
    """Half of the reciprocal lattice without its origin, [k, 3], up to ``longest`` (1/Å)."""
    basis = 2 * math.pi * torch.linalg.inv(cell).T
    reach = [int(float(v.norm()) * longest / (2 * math.pi)) + 1 for v in cell]
    grid = torch.cartesian_prod(*(torch.arange(-m, m + 1, device=cell.device) for m in reach))
    grid = grid[len(grid) // 2 + 1 :]  # the order is symmetric about the origin
    waves = grid.to(cell.dtype) @ basis
    return waves[waves.square().sum(-1) < longest**2]
