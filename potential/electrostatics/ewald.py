"""The linear operator of Gaussian cores and shells: charges -> potential, field and their derivatives.

Every atom i has a core of charge Q_c at r_i and a shell of charge Q_s at r_i + Δ_i, both with density
∝ exp(−α_i r²). Two Gaussians interact through k_e erf(α_ij r)/r, α_ij² = α_i α_j/(α_i + α_j); the core and the shell
of one atom in the same image do not interact, their periodic images do.

Periodic sums are the exact sum over k ≠ 0 of the true densities (tin-foil boundary, uniform background where
the cell is charged), split with one inverse length β:

    narrow–narrow (α > β²):  [erf(α_ij r) − erf(β r)]/r in real space, exp(−k²/4β²) in reciprocal space
    anything with a wide Gaussian (α ≤ β²):  reciprocal space alone, with its own form factors exp(−k²/4α_i − k²/4α_j),
                                             which decays at least as fast

so that a very wide Gaussian costs no long real-space sum. In reciprocal space an atom belongs to one or two of three
channels (narrow split, narrow true, wide) whose structure factors mix by ``_MIX``. Both sums end in a C² switch over
their last tenth: energy, forces and virial are derivatives of one smooth function at any accuracy.

A plain Ewald sum: O(N^1.5); pair blocks [p, 4, 4] and phases [N, n_k] are kept per geometry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.electrostatics.gaussians import erf_kernel, smooth_switch, switched
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems

__all__ = ["CoulombOperator", "CoulombState", "Splitting", "choose_splitting"]

_SWITCH_WIDTH = 0.1  # share of the cutoff over which a sum is switched off
_MIX = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
_REAL_OVER_RECIPROCAL_COST = 8.0  # measured on a CPU: one pair kernel against one site · wave vector


class Splitting(NamedTuple):
    """β (1/Å), real-space cutoff (Å) and reciprocal cutoff (1/Å) of one sum."""

    beta: float
    cutoff: float
    k_max: float


def choose_splitting(n_atoms: int, volume: float, alpha: Tensor, accuracy: float) -> Splitting:
    """Splitting that balances the two sums for a requested relative force error.

    β is rounded to a coarse grid, so that it stays what it is for small strains and for replicas. Where a cell crosses
    from one β to the next the energy changes by the error of the sum (5e-9 eV/atom at an accuracy of 1e-6).
    """
    decay = math.sqrt(-math.log(0.2 * accuracy))
    ideal = math.sqrt(math.pi) * (_REAL_OVER_RECIPROCAL_COST * n_atoms / volume**2) ** (1 / 6)
    beta = 2 ** (round(4 * math.log2(ideal)) / 4)
    narrow = alpha[alpha > beta**2]
    slowest = beta if narrow.numel() == 0 else min(beta, math.sqrt(0.5 * float(narrow.min())))
    widen = 1 / (1 - 0.5 * _SWITCH_WIDTH)
    cutoff = widen * decay / slowest if narrow.numel() else 0.0
    return Splitting(beta, cutoff, widen * 2 * beta * decay)


class _Pairs(NamedTuple):
    """Pairs of atoms in real space, each once."""

    index: Tensor  # [2, p]
    vectors: Tensor  # [p, 3] Å, core to core
    exponent: Tensor  # [p] Å⁻², α_ij²


class _Reciprocal(NamedTuple):
    """Wave vectors (half space) with their weights, and the channels of the atoms."""

    vectors: Tensor  # [k, 3] 1/Å
    weight: Tensor  # [k] eV Å^0 / e²: 2 · 4π k_e/(V k²) · switch
    slope: Tensor  # [k] d weight/d k², volume held
    channels: list[tuple[int, Tensor, Tensor]]  # channel, atoms [n], width a [n]: form factor exp(−a k²)


class CoulombOperator:
    """Interaction of the cores and shells of one structure, built once per geometry.

    Parameters
    ----------
    system : one structure (a Systems with b = 1), periodic in all directions or in none
    alpha : [N], Å⁻², Gaussian exponents
    shell_charge : [N], e, charge of the shell (−Z)
    accuracy : relative force error of a periodic sum
    k_e : Coulomb constant, eV Å/e²
    """

    def __init__(
        self,
        system: Systems,
        alpha: Tensor,
        shell_charge: Tensor,
        *,
        accuracy: float,
        k_e: float,
    ) -> None:
        self.system = system
        self.positions = system.positions
        self.alpha = alpha
        self.shell_charge = shell_charge
        self.k_e = k_e
        self.periodic = bool(system.pbc.all())
        self.volume = float(torch.linalg.det(system.cell[0]).abs()) if self.periodic else math.inf
        if self.periodic:
            self.splitting = choose_splitting(system.n_atoms, self.volume, alpha, accuracy)
            self.narrow = narrow = alpha > self.splitting.beta**2
            self.self_exponent = torch.where(narrow, torch.full_like(alpha, self.splitting.beta**2), 0.5 * alpha)
            self.reciprocal = self._reciprocal(system.cell[0])
            self.core_phases = self._phases(self.positions)
        self._reach = 0.0
        self._pairs: _Pairs | None = None

    def pairs(self, shells: Tensor) -> _Pairs:
        """Pairs that interact in real space when shells are displaced by ``shells`` [N, 3]."""
        farthest = float(shells.norm(dim=-1).max())
        if self._pairs is None or (self.periodic and farthest > self._reach):
            self._reach = max(0.1, 1.5 * farthest)
            self._pairs = self._build_pairs()
        return self._pairs

    def _build_pairs(self) -> _Pairs:
        if self.periodic:
            found = neighbor_list(self.system, max(self.splitting.cutoff, 0.1) + 2 * self._reach, half=True)
            both = self.narrow[found.index[0]] & self.narrow[found.index[1]]
            index, vectors = found.index[:, both], found.vectors[both]
        else:
            index = torch.triu_indices(self.n_atoms, self.n_atoms, offset=1, device=self.positions.device)
            vectors = self.positions[index[1]] - self.positions[index[0]]
        i, j = index
        return _Pairs(index, vectors, self.alpha[i] * self.alpha[j] / (self.alpha[i] + self.alpha[j]))

    @property
    def n_atoms(self) -> int:
        """Atoms of the structure."""
        return self.positions.shape[0]

    def _reciprocal(self, cell: Tensor) -> _Reciprocal:
        k_max = self.splitting.k_max
        basis = 2 * math.pi * torch.linalg.inv(cell).T  # rows are reciprocal vectors
        reach = (torch.linalg.norm(cell, dim=1) * k_max / (2 * math.pi)).ceil().to(torch.int64).tolist()
        axes = [torch.arange(-n, n + 1, dtype=torch.float64, device=cell.device) for n in reach]
        n = torch.cartesian_prod(*axes)
        half = (n[:, 0] > 0) | ((n[:, 0] == 0) & ((n[:, 1] > 0) | ((n[:, 1] == 0) & (n[:, 2] > 0))))
        k = n[half] @ basis
        k2 = k.square().sum(-1)
        k, k2 = k[k2 < k_max**2], k2[k2 < k_max**2]
        switch, slope, _ = smooth_switch(k2, ((1 - _SWITCH_WIDTH) * k_max) ** 2, k_max**2)
        channels: list[tuple[int, Tensor, Tensor]] = []
        inside, outside = self.narrow.nonzero()[:, 0], (~self.narrow).nonzero()[:, 0]
        if inside.numel():
            split = torch.full_like(self.alpha[inside], 1 / (8 * self.splitting.beta**2))
            channels.append((0, inside, split))
        if outside.numel():
            if inside.numel():
                channels.append((1, inside, 1 / (4 * self.alpha[inside])))
            channels.append((2, outside, 1 / (4 * self.alpha[outside])))
        bare = 8 * math.pi * self.k_e / (self.volume * k2)
        return _Reciprocal(
            vectors=k,
            weight=bare * switch,
            slope=bare * (slope - switch / k2),
            channels=channels,
        )

    def _phases(self, points: Tensor) -> list[Tensor]:
        """exp(i k·x) times the form factor, [n, k] complex, for every channel."""
        k = self.reciprocal.vectors
        k2 = k.square().sum(-1)
        phases = torch.exp(1j * (points @ k.T))
        split = torch.exp(-k2 / (8 * self.splitting.beta**2))
        return [
            phases[atoms] * (split if channel == 0 else torch.exp(-torch.outer(width, k2)))
            for channel, atoms, width in self.reciprocal.channels
        ]

    def at(self, charges: Tensor, shells: Tensor) -> CoulombState:
        """The operator at charges q [N] (core + shell) and shell displacements [N, 3]."""
        return CoulombState(self, charges, shells)


class CoulombState:
    """Energy, potential, field and second derivatives at given charges and shells.

    Attributes
    ----------
    energy : eV
    potential : [2, N], V, at cores and shells (the site's own terms left out as described above)
    gradient : [2, N, 3], V/Å, its gradient at cores and shells; the force on a site is −Q·gradient
    """

    def __init__(self, operator: CoulombOperator, charges: Tensor, shells: Tensor) -> None:
        self.op = operator
        self.pairs = operator.pairs(shells)
        self.shells = shells
        self.site_charges = torch.stack([charges - operator.shell_charge, operator.shell_charge])
        self.potential = torch.zeros_like(self.site_charges)
        self.gradient = torch.zeros(2, operator.n_atoms, 3, dtype=shells.dtype, device=shells.device)
        self._add_pairs()
        if operator.periodic:
            self._add_own()
            self._add_reciprocal()
        self.energy = 0.5 * (self.site_charges * self.potential).sum()

    # -- real space ---------------------------------------------------------------------------------------------

    def _add_pairs(self) -> None:
        op = self.op
        i, j = self.pairs.index
        core = torch.zeros_like(self.shells)
        offset = torch.stack([core, self.shells], dim=1)  # [N, site, 3]
        # d[p, a, b]: from site a of i to site b of j
        d = self.pairs.vectors[:, None, None] + offset[j][:, None, :] - offset[i][:, :, None]
        u = d.square().sum(-1)
        exponent = self.pairs.exponent[:, None, None].expand_as(u)
        kernel = erf_kernel(u, exponent)
        if op.periodic:
            long = erf_kernel(u, torch.full_like(u, op.splitting.beta**2))
            rc = op.splitting.cutoff
            switch = smooth_switch(u, ((1 - _SWITCH_WIDTH) * rc) ** 2, rc**2)
            kernel = switched(tuple(a - b for a, b in zip(kernel, long, strict=True)), switch)
        b0, b1, b2 = (op.k_e * b for b in kernel)
        self.d, self.b1, self.b2 = d, b1, b2
        self.b0 = b0
        qi, qj = self.site_charges.T[i], self.site_charges.T[j]  # [p, site]
        # potential and its gradient at core, shell
        felt = torch.zeros(op.n_atoms, 2, 4, dtype=d.dtype, device=d.device)
        by_j, by_i = qj[:, None, :], qi[:, :, None]
        felt.index_add_(0, i, torch.cat([(b0 * by_j).sum(2, keepdim=True), ((b1 * by_j)[..., None] * d).sum(2)], dim=2))
        pull = ((b1 * by_i)[..., None] * d).sum(1)
        felt.index_add_(0, j, torch.cat([(b0 * by_i).sum(1)[..., None], -pull], dim=2))
        self.potential += felt[..., 0].T
        self.gradient += felt[..., 1:].transpose(0, 1)

    def _add_own(self) -> None:
        """Takes a core's and a shell's own atom, same image, out of the reciprocal sum again."""
        op = self.op
        b0, b1, b2 = (-op.k_e * b for b in erf_kernel(self.shells.square().sum(-1), op.self_exponent))
        at_zero = -op.k_e * (2 / math.sqrt(math.pi)) * op.self_exponent.sqrt()
        self.own_b1, self.own_b2 = b1, b2
        qc, qs = self.site_charges
        self.potential += torch.stack([b0 * qs + at_zero * qc, b0 * qc + at_zero * qs])
        # d = x_shell − x_core = Δ
        self.gradient[0] += (b1 * qs)[:, None] * self.shells
        self.gradient[1] -= (b1 * qc)[:, None] * self.shells
        # uniform background of the real-space part (k = 0)
        narrow, inverse = op.narrow, 1 / op.alpha
        q = (qc + qs) * narrow
        total, weighted = q.sum(), (q * inverse).sum()
        background = -(math.pi * op.k_e / op.volume) * (total * (1 / op.splitting.beta**2 - inverse) - weighted)
        self.potential += background * narrow
        self.background_energy = 0.5 * (q * background).sum()

    # -- reciprocal space -------------------------------------------------------------------------------------------

    def _add_reciprocal(self) -> None:
        op = self.op
        self.shell_phases = op._phases(op.positions + self.shells)
        self.structure = self._structure(self.site_charges)
        potential, gradient = self._spread(self.structure)
        self.potential += potential
        self.gradient += gradient

    def _structure(self, charges: Tensor) -> Tensor:
        """Structure factors [channel, k] of site charges [2, N]."""
        op = self.op
        out = torch.zeros(3, op.reciprocal.vectors.shape[0], dtype=torch.complex128, device=charges.device)
        for (channel, atoms, _), core, shell in zip(
            op.reciprocal.channels, op.core_phases, self.shell_phases, strict=True
        ):
            out[channel] = charges[0, atoms].to(core.dtype) @ core + charges[1, atoms].to(core.dtype) @ shell
        return out

    def _mixed(self, structure: Tensor) -> Tensor:
        """Weighted conj(S) each channel feels, [channel, k]."""
        mix = _MIX.to(structure.device).to(structure.dtype)
        return self.op.reciprocal.weight * (mix @ structure).conj()

    def _spread(self, structure: Tensor) -> tuple[Tensor, Tensor]:
        """Potential [2, N] and its gradient [2, N, 3] at the sites from structure factors."""
        op = self.op
        n = op.n_atoms
        out = torch.zeros(2, n, 4, dtype=torch.float64, device=structure.device)
        felt = self._mixed(structure)
        ik = 1j * op.reciprocal.vectors.to(felt.dtype)
        for (channel, atoms, _), core, shell in zip(
            op.reciprocal.channels, op.core_phases, self.shell_phases, strict=True
        ):
            columns = torch.cat([felt[channel, :, None], felt[channel, :, None] * ik], dim=1)  # [k, 4]
            out[0].index_add_(0, atoms, (core @ columns).real)
            out[1].index_add_(0, atoms, (shell @ columns).real)
        return out[..., 0], out[..., 1:]

    def _shell_curvature(self) -> Tensor:
        """∇∇φ at the shells from the reciprocal sum, [N, 3, 3]."""
        op = self.op
        felt = self._mixed(self.structure)
        k = op.reciprocal.vectors
        kk = (k[:, :, None] * k[:, None, :]).reshape(-1, 9)[:, [0, 1, 2, 4, 5, 8]]
        out = torch.zeros(op.n_atoms, 6, dtype=torch.float64, device=k.device)
        for (channel, atoms, _), shell in zip(op.reciprocal.channels, self.shell_phases, strict=True):
            out.index_add_(0, atoms, -(shell @ (felt[channel, :, None] * kk)).real)
        return out[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)

    # -- second derivatives -----------------------------------------------------------------------------------------

    def linearize(self) -> None:
        """Builds what ``product`` needs: pair blocks in (q, Δ), and the curvature at the shells."""
        op = self.op
        i, j = self.pairs.index
        qs_i, qs_j = op.shell_charge[i], op.shell_charge[j]
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
        # ∇∇φ at a shell: Σ Q (B₂ d dᵀ − B₁ 1) over the sites of its neighbours
        own = torch.zeros(op.n_atoms, 3, 3, dtype=d.dtype, device=d.device)
        for atom, lines, c1, c2, q in (
            (i, d[:, 1], b1[:, 1], b2[:, 1], self.site_charges.T[j]),
            (j, d[:, :, 1], b1[:, :, 1], b2[:, :, 1], self.site_charges.T[i]),
        ):
            curved = torch.bmm(((c2 * q)[..., None] * lines).transpose(1, 2), lines)
            own.index_add_(0, atom, curved - (c1 * q).sum(1)[:, None, None] * eye)
        self.own_core = torch.zeros(op.n_atoms, 3, dtype=d.dtype, device=d.device)
        if op.periodic:
            outer = self.own_b2[:, None, None] * self.shells[:, :, None] * self.shells[:, None, :]
            curved = outer - self.own_b1[:, None, None] * eye
            own = own + self.site_charges[0][:, None, None] * curved + self._shell_curvature()
            # ∂φ_core/∂Δ = Q_s ∇_shell B₀(Δ)
            self.own_core = -(op.shell_charge * self.own_b1)[:, None] * self.shells
        self.own_shell = op.shell_charge[:, None, None] * own

    def product(self, dq: Tensor, dshells: Tensor) -> tuple[Tensor, Tensor]:
        """Second derivative of the energy in (q, Δ) times a direction: ([N] V, [N, 3] V/Å·e)."""
        op = self.op
        i, j = self.pairs.index
        y = torch.cat([dq[:, None], dshells], dim=1)
        out = torch.zeros_like(y)
        out.index_add_(0, i, torch.einsum("pxy,py->px", self.blocks, y[j]))
        out.index_add_(0, j, torch.einsum("pxy,px->py", self.blocks, y[i]))
        out[:, 1:] += torch.einsum("nxy,ny->nx", self.own_shell, dshells)
        if op.periodic:
            out[:, 0] += (self.own_core * dshells).sum(-1) + self._own_charge_terms(dq)
            out[:, 1:] += self.own_core * dq[:, None]
            potential, gradient = self._spread(self._structure_change(dq, dshells))
            out[:, 0] += potential[0]
            out[:, 1:] += op.shell_charge[:, None] * gradient[1]
        return out[:, 0], out[:, 1:]

    def _own_charge_terms(self, dq: Tensor) -> Tensor:
        op = self.op
        narrow, inverse = op.narrow, 1 / op.alpha
        q = dq * narrow
        shift = q.sum() * (1 / op.splitting.beta**2 - inverse) - (q * inverse).sum()
        own = -op.k_e * (2 / math.sqrt(math.pi)) * op.self_exponent.sqrt() * dq
        return own - (math.pi * op.k_e / op.volume) * shift * narrow

    def _structure_change(self, dq: Tensor, dshells: Tensor) -> Tensor:
        op = self.op
        k = op.reciprocal.vectors
        out = torch.zeros_like(self.structure)
        moved = op.shell_charge[:, None] * dshells
        for (channel, atoms, _), core, shell in zip(
            op.reciprocal.channels, op.core_phases, self.shell_phases, strict=True
        ):
            along = shell.T @ moved[atoms].to(shell.dtype)  # [k, 3]
            out[channel] = dq[atoms].to(core.dtype) @ core + 1j * (along * k).sum(-1)
        return out

    def core_gradient_change(self, dq: Tensor, dshells: Tensor) -> Tensor:
        """Change of the force on (core + shell) of every atom, at fixed cores, times −1: [N, 3].

        With g_i = Q_c ∇φ(core) + Q_s ∇φ(shell), the derivative of the Coulomb energy in the position of the whole atom.
        """
        op = self.op
        i, j = self.pairs.index
        dcharge = torch.stack([dq, torch.zeros_like(dq)])
        dsite = torch.stack([torch.zeros_like(dshells), dshells], dim=1)  # [N, site, 3]
        dd = dsite[j][:, None, :] - dsite[i][:, :, None]
        qi, qj = self.site_charges[:, i].T, self.site_charges[:, j].T
        product = qi[:, :, None] * qj[:, None, :]
        dproduct = dcharge[:, i].T[:, :, None] * qj[:, None, :] + qi[:, :, None] * dcharge[:, j].T[:, None, :]
        along = (self.d * dd).sum(-1)
        change = (dproduct * self.b1 - product * self.b2 * along)[..., None] * self.d
        change = (change + (product * self.b1)[..., None] * dd).sum((1, 2))
        out = torch.zeros_like(dshells)
        out.index_add_(0, i, change)
        out.index_add_(0, j, -change)
        if op.periodic:
            # the own core–shell term moves with the atom and drops out
            structure = self._structure_change(dq, dshells)
            _, dgradient = self._spread(structure)
            _, gradient = self._spread(self.structure)
            out += (self.site_charges[:, :, None] * dgradient).sum(0) + dq[:, None] * gradient[0]
            out += op.shell_charge[:, None] * torch.einsum("nxy,ny->nx", self._shell_curvature(), dshells)
        return out

    # -- strain -----------------------------------------------------------------------------------------------------

    def virial(self) -> Tensor:
        """−∂E/∂strain with charges and shell displacements Δ (Å, not scaled) held fixed, [3, 3] eV."""
        op = self.op
        i, j = self.pairs.index
        product = self.site_charges[:, i].T[:, :, None] * self.site_charges[:, j].T[:, None, :]
        # only the core–core vector of a pair is strained, Δ is not
        pull = (product * self.b1)[..., None] * self.d
        out = torch.einsum("px,py->xy", pull.sum((1, 2)), self.pairs.vectors)
        if op.periodic:
            out = out + self._reciprocal_virial()
        return 0.5 * (out + out.T)

    def _reciprocal_virial(self) -> Tensor:
        op = self.op
        k = op.reciprocal.vectors
        eye = torch.eye(3, dtype=k.dtype, device=k.device)
        slope = torch.zeros_like(self.structure)  # dS/dk² through the form factors
        for (channel, atoms, width), core, shell in zip(
            op.reciprocal.channels, op.core_phases, self.shell_phases, strict=True
        ):
            charges = -(self.site_charges[:, atoms] * width).to(core.dtype)
            slope[channel] = charges[0] @ core + charges[1] @ shell
        felt = self._mixed(self.structure)
        mixed = _MIX.to(k.device).to(self.structure.dtype) @ self.structure
        energy = 0.5 * (felt * self.structure).real.sum()
        # dE/dk² of every wave vector: through its weight, and through the form factors
        change = 0.5 * op.reciprocal.slope * (mixed.conj() * self.structure).real.sum(0) + (felt * slope).real.sum(0)
        out = (energy + self.background_energy) * eye + 2 * torch.einsum("k,ka,kb->ab", change, k, k)
        # the phases of the shells hold Δ fixed: take out what an affine strain of the shells would have done
        _, gradient = self._spread(self.structure)
        return out + torch.einsum("nx,ny->xy", op.shell_charge[:, None] * gradient[1], self.shells)
