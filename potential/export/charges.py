"""Stationary charges and shells in TorchScript: PQEq of one structure without field.

The functional of :mod:`voltpi.potential.electrostatics.functional` and the solver of
:mod:`voltpi.potential.electrostatics.solver` (truncated Newton with conjugate gradients, then a search for directions
of negative curvature), for one structure at a time, always from charges without interaction: an exported model keeps no
memory from call to call.

The energy that is returned is differentiable at fixed charges and shells. Where these are stationary its derivatives
are those of the whole (Hellmann–Feynman), up to the residual.
"""

# No `from __future__ import annotations` here: TorchScript reads the annotations of these classes.
import math
from typing import NamedTuple

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from voltpi.potential.electrostatics.functional import ROUGH_ACCURACY
from voltpi.potential.electrostatics.pqeq import PQEq, _spring_and_exponent
from voltpi.potential.electrostatics.solver import HESSIAN_ACCURACY
from voltpi.potential.electrostatics.window import resolutions
from voltpi.potential.export.coulomb import Grid, MeshSum, PairSum, Windows, erf_kernel

__all__ = ["ScriptedPQEq"]


class Structure(NamedTuple):
    """One structure and its parameters: per atom [n], in groups whose charges add up to ``total`` [groups]."""

    positions: Tensor
    cell: Tensor
    periodic: bool
    chi: Tensor
    eta: Tensor
    z: Tensor
    spring: Tensor
    alpha: Tensor
    channel: Tensor
    group: Tensor
    total: Tensor


class Mesh(NamedTuple):
    """A mesh and the cores on it."""

    grid: Grid
    cores: Windows


class Linear(NamedTuple):
    """What Hessian products at one (q, Δ) need."""

    local: Tensor  # [n, 3, 3], ∂²E/∂Δ∂Δ of every atom at fixed charges of the others
    own: Tensor  # [n, 3], ∂φ_core/∂Δ of the own shell
    shells: Windows  # on a mesh
    kernels: list[Tensor]  # of pairs: B₀, B₁, B₂ [s, s], d [s, s, 3]
    rough: bool


class ScriptedPQEq(nn.Module):
    """Charges, shells and energy of one structure.

    Parameters
    ----------
    model : charge equilibration without electrodes
    net_charge : e
    """

    def __init__(self, model: PQEq, net_charge: float) -> None:
        super().__init__()
        rows = torch.zeros(len(chemical_symbols), 5, dtype=torch.float64)
        for symbol, p in model.parameters.items():
            spring, alpha = _spring_and_exponent(p)
            rows[atomic_numbers[symbol]] = torch.tensor([p.chi, p.eta, p.Z, spring, alpha], dtype=torch.float64)
        known = rows[:, 4] > 0
        inverse, channel = torch.unique(1.0 / rows[known, 4], return_inverse=True)
        channels = torch.zeros(len(rows), dtype=torch.int64)
        channels[known] = channel
        self.register_buffer("rows", rows)
        self.register_buffer("channels", channels)
        self.fine = MeshSum(inverse, model.coulomb_constant, next(resolutions(model.accuracy)))
        self.coarse = MeshSum(inverse, model.coulomb_constant, next(resolutions(ROUGH_ACCURACY)))
        self.pairs = PairSum(model.coulomb_constant)
        self.k_e = model.coulomb_constant
        self.net_charge = net_charge
        self.fragments = model.conserve == "fragments"
        self.limited = model.limiter == "fene"
        self.bound = model.shell_bound
        self.tolerance = model.tolerance
        self.hessian_accuracy = HESSIAN_ACCURACY

    def forward(
        self, positions: Tensor, cell: Tensor, periodic: bool, numbers: Tensor, fragment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Energies of atoms [n] (eV; differentiable in positions and cell), charges [n] (e), shells [n, 3] (Å).

        ``fragment`` [n], 0 … count − 1, are the molecules that keep their charge, where the model says so. Raises
        RuntimeError where charges do not converge.
        """
        s = self._structure(positions.detach(), cell.detach(), periodic, numbers, fragment)
        with torch.no_grad():
            y = self._solve(s)
        q, shells = y[:, 0].detach(), y[:, 1:].detach()
        sites = torch.cat([positions, positions + shells])
        charges = torch.cat([q + s.z, -s.z])
        own, _, _ = erf_kernel(shells.square().sum(-1), 0.5 * s.alpha)
        if periodic:
            felt = self.fine.potential_energy(sites, charges, s.channel.repeat(2), cell)
            at_zero = (2.0 / math.sqrt(math.pi)) * (0.5 * s.alpha).sqrt()
            self_energy = self.k_e * (0.5 * at_zero * ((q + s.z).square() + s.z.square()) - own * (q + s.z) * s.z)
        else:
            felt = self.pairs.potential_energy(sites, charges, s.alpha.repeat(2))
            self_energy = torch.zeros_like(q)
        n = q.size(0)
        local = s.chi * q + 0.5 * s.eta * q.square() + self._spring(s, shells)[0] - self_energy
        return felt[:n] + felt[n:] + local, q, shells

    def _structure(
        self, positions: Tensor, cell: Tensor, periodic: bool, numbers: Tensor, fragment: Tensor
    ) -> Structure:
        rows = self.rows[numbers]
        if not self.fragments:
            fragment = torch.zeros_like(fragment)
        count = int(fragment.max()) + 1
        if count > 1 and abs(self.net_charge) > 1e-6:
            raise RuntimeError(
                f"the model was exported for a net charge of {self.net_charge} e but the structure has {count} "
                "fragments, each of which keeps its charge: export it with a net charge of 0"
            )
        total = torch.full([count], self.net_charge, dtype=positions.dtype, device=positions.device)
        return Structure(
            positions,
            cell,
            periodic,
            rows[:, 0],
            rows[:, 1],
            rows[:, 2],
            rows[:, 3],
            rows[:, 4],
            self.channels[numbers],
            fragment,
            total,
        )

    # the functional

    def _spring(self, s: Structure, shells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energy, stiffness and its growth [n] (``Functional.spring``)."""
        u = shells.square().sum(-1)
        if not self.limited:
            return 0.5 * s.spring * u, s.spring, torch.zeros_like(u)
        limit = self.bound**2
        room = 1.0 - u / limit
        return (
            -0.5 * s.spring * limit * torch.log1p(-u / limit),
            s.spring / room,
            2.0 * s.spring / (limit * room**2),
        )

    def _sums(self, s: Structure, values: Tensor) -> Tensor:
        return torch.zeros_like(s.total).index_add(0, s.group, values)

    def _project(self, s: Structure, gradient: Tensor) -> Tensor:
        """Takes the constraint's multiplier off."""
        weight = self._sums(s, 1.0 / s.eta)
        mean = self._sums(s, gradient[:, 0] / s.eta) / weight
        return torch.cat([(gradient[:, 0] - mean[s.group]).unsqueeze(1), gradient[:, 1:]], dim=1)

    def _precondition(self, s: Structure, residual: Tensor) -> Tensor:
        """Own hardness for charges, spring for shells, on the constraint surface."""
        weight = self._sums(s, 1.0 / s.eta)
        mean = self._sums(s, residual[:, 0] / s.eta) / weight
        dq = (residual[:, 0] - mean[s.group]) / s.eta
        return torch.cat([dq.unsqueeze(1), residual[:, 1:] / s.spring.unsqueeze(1)], dim=1)

    def _mesh(self, s: Structure, rough: bool) -> Mesh:
        if rough:
            grid = self.coarse.grid(s.cell)
            return Mesh(grid, self.coarse.windows(s.positions, s.channel, grid, 0))
        grid = self.fine.grid(s.cell)
        return Mesh(grid, self.fine.windows(s.positions, s.channel, grid, 0))

    def _at(self, s: Structure, mesh: Mesh | None, y: Tensor) -> tuple[float, Tensor]:
        """Energy (eV) and gradient [n, 4] at y = (q, Δ)."""
        q, shells = y[:, 0], y[:, 1:]
        core = q + s.z
        energy, stiffness, _ = self._spring(s, shells)
        if mesh is None:
            d, square, exponent = self.pairs.distances(
                torch.cat([s.positions, s.positions + shells]), s.alpha.repeat(2)
            )
            b0, b1, _ = erf_kernel(square, exponent)
            charges = torch.cat([core, -s.z])
            felt = self.k_e * (b0 @ charges)
            n = q.size(0)
            gradient = -self.k_e * torch.einsum("stx,t->sx", d[n:] * b1[n:].unsqueeze(2), charges)
            at_core, at_shell = felt[:n], felt[n:]
        else:
            sites = self.fine.windows(s.positions + shells, s.channel, mesh.grid, 1)
            charged = self.fine.empty(mesh.grid)
            charged.index_add_(0, mesh.cores.points.flatten(), (core.unsqueeze(1) * mesh.cores.values).flatten())
            charged.index_add_(0, sites.points.flatten(), (-s.z.unsqueeze(1) * sites.values).flatten())
            felt = self.fine.felt(charged, mesh.grid)
            at_core = (felt[mesh.cores.points] * mesh.cores.values).sum(1)
            there = felt[sites.points]
            at_shell = (there * sites.values).sum(1)
            slopes = [(there * slope).sum(1) for slope in sites.slopes]
            gradient = torch.stack(slopes, dim=1) @ mesh.grid.to_mesh.t()
            # the mesh counts an atom's core and shell among each other
            b0, b1, _ = erf_kernel(shells.square().sum(-1), 0.5 * s.alpha)
            at_zero = (2.0 / math.sqrt(math.pi)) * (0.5 * s.alpha).sqrt()
            at_core = at_core - self.k_e * (at_zero * core - b0 * s.z)
            at_shell = at_shell - self.k_e * (b0 * core - at_zero * s.z)
            gradient = gradient + (self.k_e * b1 * core).unsqueeze(1) * shells
        energy = energy + s.chi * q + 0.5 * s.eta * q.square() + 0.5 * (core * at_core - s.z * at_shell)
        g_q = s.chi + s.eta * q + at_core
        g_shell = stiffness.unsqueeze(1) * shells - s.z.unsqueeze(1) * gradient
        return float(energy.sum()), torch.cat([g_q.unsqueeze(1), g_shell], dim=1)

    def _linearize(self, s: Structure, mesh: Mesh | None, rough: bool, y: Tensor) -> Linear:
        q, shells = y[:, 0], y[:, 1:]
        core = q + s.z
        _, stiffness, growth = self._spring(s, shells)
        eye = torch.eye(3, dtype=y.dtype, device=y.device)
        outer = shells.unsqueeze(2) * shells.unsqueeze(1)
        local = stiffness.view(-1, 1, 1) * eye + growth.view(-1, 1, 1) * outer
        nothing: list[Tensor] = []
        if mesh is None:
            d, square, exponent = self.pairs.distances(
                torch.cat([s.positions, s.positions + shells]), s.alpha.repeat(2)
            )
            b0, b1, b2 = erf_kernel(square, exponent)
            charges = self.k_e * torch.cat([core, -s.z])
            n = q.size(0)
            curved = torch.einsum("st,stx,sty->sxy", b2[n:] * charges, d[n:], d[n:])
            curved = curved - (b1[n:] @ charges).view(-1, 1, 1) * eye
            local = local - s.z.view(-1, 1, 1) * curved
            empty = Windows(square, square, nothing, nothing)
            return Linear(local, torch.zeros_like(shells), empty, [b0, b1, b2, d], rough)
        sum_ = self.coarse if rough else self.fine
        sites = sum_.windows(s.positions + shells, s.channel, mesh.grid, 2)
        charged = sum_.empty(mesh.grid)
        charged.index_add_(0, mesh.cores.points.flatten(), (core.unsqueeze(1) * mesh.cores.values).flatten())
        charged.index_add_(0, sites.points.flatten(), (-s.z.unsqueeze(1) * sites.values).flatten())
        there = sum_.felt(charged, mesh.grid)[sites.points]
        six = [(there * c).sum(1) for c in sites.curvatures]
        curved = torch.stack([six[0], six[1], six[2], six[1], six[3], six[4], six[2], six[4], six[5]], dim=1)
        curved = mesh.grid.to_mesh @ curved.view(-1, 3, 3) @ mesh.grid.to_mesh.t()
        _, b1, b2 = erf_kernel(shells.square().sum(-1), 0.5 * s.alpha)
        own = (b2 * core).view(-1, 1, 1) * outer - (b1 * core).view(-1, 1, 1) * eye
        local = local - s.z.view(-1, 1, 1) * (curved - self.k_e * own)
        return Linear(local, -(self.k_e * s.z * b1).unsqueeze(1) * shells, sites, nothing, rough)

    def _product(self, s: Structure, mesh: Mesh | None, linear: Linear, direction: Tensor) -> Tensor:
        """Hessian times a direction, [n, 4]."""
        dq, dshells = direction[:, 0], direction[:, 1:]
        n = dq.size(0)
        if mesh is None:
            b0, b1, b2, d = linear.kernels[0], linear.kernels[1], linear.kernels[2], linear.kernels[3]
            moved = (d[:, n:] * (-s.z.unsqueeze(1) * dshells)).sum(-1)  # [s, t] of shells t
            out_q = self.k_e * (b0[:n, :n] @ dq + (b1[:n, n:] * moved[:n]).sum(1))
            gradient = -torch.einsum("stx,t->sx", d[n:, :n] * b1[n:, :n].unsqueeze(2), dq)
            gradient = gradient - (b2[n:, n:] * moved[n:]).unsqueeze(1).matmul(d[n:, n:]).squeeze(1)
            gradient = self.k_e * (gradient - b1[n:, n:] @ (s.z.unsqueeze(1) * dshells))
        else:
            sum_ = self.coarse if linear.rough else self.fine
            moved = (-s.z.unsqueeze(1) * dshells) @ mesh.grid.to_mesh
            shells = linear.shells
            spread = moved[:, :1] * shells.slopes[0]
            spread = spread + moved[:, 1:2] * shells.slopes[1] + moved[:, 2:] * shells.slopes[2]
            charged = sum_.empty(mesh.grid)
            charged.index_add_(0, mesh.cores.points.flatten(), (dq.unsqueeze(1) * mesh.cores.values).flatten())
            charged.index_add_(0, shells.points.flatten(), spread.flatten())
            felt = sum_.felt(charged, mesh.grid)
            at_zero = self.k_e * (2.0 / math.sqrt(math.pi)) * (0.5 * s.alpha).sqrt()
            out_q = (felt[mesh.cores.points] * mesh.cores.values).sum(1) - at_zero * dq
            there = felt[shells.points]
            gradient = torch.stack([(there * slope).sum(1) for slope in shells.slopes], dim=1)
            gradient = gradient @ mesh.grid.to_mesh.t()
        out_q = out_q + s.eta * dq + (linear.own * dshells).sum(1)
        out_shell = (linear.local @ dshells.unsqueeze(2)).squeeze(2) + linear.own * dq.unsqueeze(1)
        return torch.cat([out_q.unsqueeze(1), out_shell - s.z.unsqueeze(1) * gradient], dim=1)

    # the solver

    def _conjugate_gradients(
        self, s: Structure, mesh: Mesh | None, linear: Linear, right: Tensor, tolerance: float
    ) -> tuple[Tensor, bool]:
        """H x = right on the constraint surface, and whether negative curvature ended it."""
        x = torch.zeros_like(right)
        r = self._project(s, right)
        z = self._precondition(s, r)
        p = z
        rz = float((r * z).sum())
        for k in range(500):
            if float(r.abs().max()) <= tolerance:
                break
            hp = self._product(s, mesh, linear, p)
            curvature = float((p * hp).sum())
            if not curvature > 0.0:
                return p if k == 0 else x, curvature <= 0.0
            x = x + (rz / curvature) * p
            r = r - (rz / curvature) * self._project(s, hp)
            z = self._precondition(s, r)
            new = float((r * z).sum())
            p = z + (new / rz) * p
            rz = new
        return x, False

    def _negative_direction(
        self, s: Structure, fine: Mesh | None, rough: Mesh | None, y: Tensor, steer: bool
    ) -> tuple[Tensor, bool]:
        """A direction of negative curvature, and whether there is one (``solver.negative_direction``)."""
        linear = self._linearize(s, rough if steer else fine, steer, y)
        k = torch.arange(y.size(0) * 4, dtype=y.dtype, device=y.device).view(-1, 4)
        r = self._project(s, torch.sin(1.0 + 0.7390851332151607 * k * k))
        z = self._precondition(s, r)
        p = z
        rz = float((r * z).sum())
        start = rz
        for _ in range(200):
            hp = self._product(s, rough if steer else fine, linear, p)
            curvature = float((p * hp).sum())
            size = p * torch.cat([(p[:, 0] * s.eta).unsqueeze(1), p[:, 1:] * s.spring.unsqueeze(1)], dim=1)
            if curvature < -1e-6 * float(size.sum()):
                if not steer:
                    return p, True
                # the approximate Hessian may only seem to have it
                exact = self._product(s, fine, self._linearize(s, fine, False, y), p)
                return p, float((p * exact).sum()) < 0.0
            if not curvature > 0.0:
                break
            r = r - (rz / curvature) * self._project(s, hp)
            z = self._precondition(s, r)
            new = float((r * z).sum())
            if new < 1e-6 * start:
                break
            p = z + (new / rz) * p
            rz = new
        return p, False

    def _largest_step(self, y: Tensor, direction: Tensor) -> float:
        """Step along which the first shell reaches its bound."""
        shells, d = y[:, 1:], direction[:, 1:]
        a = d.square().sum(-1).clamp(min=1e-300)
        b = (shells * d).sum(-1)
        c = self.bound**2 - shells.square().sum(-1)
        return float(((-b + (b * b + a * c).clamp(min=0.0).sqrt()) / a).min())

    def _descend(
        self, s: Structure, fine: Mesh | None, rough: Mesh | None, y: Tensor, steer: bool
    ) -> tuple[Tensor, float]:
        """Truncated Newton to the nearest stationary point downhill, and its largest residual."""
        energy, gradient = self._at(s, fine, y)
        residual = self._project(s, gradient)
        largest = float(residual.abs().max())
        for _ in range(100):
            if not math.isfinite(largest) or largest <= self.tolerance:
                break
            linear = self._linearize(s, rough if steer else fine, steer, y)
            inner = max(0.3 * self.tolerance, self.hessian_accuracy * largest)
            step, negative = self._conjugate_gradients(s, rough if steer else fine, linear, -residual, inner)
            slope = float((residual * step).sum())
            if slope > 0.0:
                step = -step
            slope = -abs(slope)
            length = min(1.0, 0.9 * self._largest_step(y, step))
            noise = 1e-13 * max(1.0, abs(energy))
            found = False
            trial, trial_gradient = energy, gradient
            for _ in range(30):
                trial, trial_gradient = self._at(s, fine, y + length * step)
                found = trial - energy <= 1e-4 * length * slope + noise
                if found:
                    break
                length = 0.5 * length
            if not found:
                break
            y, energy = y + length * step, trial
            residual = self._project(s, trial_gradient)
            new = float(residual.abs().max())
            floor = new >= largest and abs(slope) < noise and not negative  # rounding
            largest = new
            if floor:
                break
        return y, largest

    def _solve(self, s: Structure) -> Tensor:
        """Stationary (q, Δ), [n, 4]. Raises RuntimeError where there is none or it is not reached."""
        q = -s.chi / s.eta
        excess = (self._sums(s, q) - s.total) / self._sums(s, 1.0 / s.eta)
        q = q - excess[s.group] / s.eta
        start = torch.cat([q.unsqueeze(1), torch.zeros_like(s.positions)], dim=1)
        fine: Mesh | None = None
        rough: Mesh | None = None
        if s.periodic:
            fine, rough = self._mesh(s, False), self._mesh(s, True)
        largest = math.inf
        steer = s.periodic
        for _ in range(2):  # the second, where needed, with the exact Hessian
            y, largest = self._descend(s, fine, rough, start, steer)
            if largest <= self.tolerance:
                for _escape in range(8):  # saddle points left on the way down
                    p, found = self._negative_direction(s, fine, rough, y, steer)
                    if not found:
                        return y
                    p = p * (0.01 / float(p.abs().max()))
                    if float((p * self._project(s, self._at(s, fine, y)[1])).sum()) > 0.0:
                        p = -p
                    y = y + min(1.0, 0.5 * self._largest_step(y, p)) * p
                    y, largest = self._descend(s, fine, rough, y, steer)
            if not steer:
                break
            steer = False
        raise RuntimeError(
            f"charges and shells did not become stationary: residual {largest} V (asked {self.tolerance} V); check the "
            "structure for atoms too close to each other"
        )
