"""The functional of cores, shells and electrodes whose stationary point is sought, and one point of it.

    Ω(q, Δ) = Σ_i [χ_i q_i + ½ η_i q_i² + U_i(Δ_i)] + E_coulomb(q, Δ) − Σ_b ε_b·M_b − Σ_a ψ_a Q_a

Charges are free, held (fixed charges), or free in groups whose sum stays: a fragment, an electrode at a charge, or the
*reservoir* of a structure, which is whatever shares its total charge: all electrodes at potentials, and with
``conserve: total`` the electrolyte too.

A field acts through M = Σ_i c_i r_i − Σ_i Z_i Δ_i, where c_i is q_i for what feels it and the carried charge for what
does not (``response``). Electrodes feel it along open directions; along periodic ones, in which a metal's dipole has no
meaning, they are left out of M. Across a *finite-field* cell (Dufils et al., Phys. Rev. Lett. 123, 195501 (2019)) every
charge feels, beside the electrodes' potentials, the uniform field −(ψ_high − ψ_low) c*, with c* the reciprocal vector
(c*·c = 1) of the periodic direction c across which the potential jumps.

Along Cartesian axes a with a *displacement* D_a (Stengel, Spaldin & Vanderbilt, Nat. Phys. 5, 304 (2009)) the field is
an answer, ε_a = D_a − 4πk_e M_a/V, and −ε_a M_a gives way to V/(8πk_e)·ε_a²: what is stationary is then

    U(q, Δ; D) = Ω(ε = 0) + V/(8πk_e) Σ_{a: D} (D_a − 4πk_e M_a/V)² − Σ_{b: ε} ε_b M_b

which adds (4πk_e/V) ∂M_a/∂y ∂M_a/∂yᵀ to the Hessian. Under strain ε and D stay (V/Å), or, where the structure brings
the cell h₀ (``Systems.field_cell``, rows) they are given at, the voltages across the cell and the flux through its
faces: ε = h⁻¹ h₀ ε₀ and D = (V₀/V) D₀ h₀⁻¹ h, of which along an axis with D only the second and along the others only
the first counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from voltpi.potential.electrostatics.block import ElectrodeBlock
from voltpi.potential.electrostatics.ewald import CoulombOperator, CoulombState
from voltpi.potential.electrostatics.long_waves import LongWaves
from voltpi.potential.electrostatics.solver import Segments
from voltpi.potential.errors import InputError
from voltpi.potential.fragments import whole_positions
from voltpi.potential.systems import Systems

if TYPE_CHECKING:
    from voltpi.potential.electrostatics.pqeq import PQEq

__all__ = ["Functional", "Point", "finite_field", "open_directions"]

ROUGH_ACCURACY = 4e-3
"""Of the Coulomb sum in approximate Hessian products: a coarser one costs more Newton steps than it saves."""
STEERING_RANGE = 2e-3
"""e, Å; approximate Hessian products serve for charges and shells within this distance."""


class Point:
    """The functional at one (q, Δ): implements solver.Point."""

    def __init__(self, functional: Functional, y: Tensor) -> None:
        self.functional = f = functional
        self.q, self.shells = y[:, 0], y[:, 1:]
        self.coulomb: CoulombState = f.operator.at(self.q, self.shells)
        spring, stiffness, growth = f.spring(self.shells)
        self.stiffness, self.growth = stiffness, growth
        moments = f.charge_moments(self.q) - f.shell_coupling * f.z[:, None] * self.shells
        self.dipole = f.total(moments) - f.origin
        self.field = f.field - f.screening * self.dipole  # that acts, [b, 3]
        total = f.segments.sum
        self.terms = {
            "electronegativity": total(f.chi * self.q),
            "hardness": total(0.5 * f.eta * self.q.square()),
            "spring": total(spring),
            "coulomb": self.coulomb.energy,
            "field": -(torch.where(f.held, 0.0, f.field) * self.dipole).sum(-1),
        }
        if f.displaced:
            self.terms["displacement"] = 0.5 * f.room * (f.held * self.field.square()).sum(-1)
        field = self.field[f.system.batch]
        g_q = f.chi + f.eta * self.q + self.coulomb.potential[0] - (f.lever * field).sum(-1)
        if f.psi is not None:
            self.terms["electrodes"] = -total(f.psi * self.q)
            g_q = g_q - f.psi
        self.energy = torch.stack(list(self.terms.values())).sum(0)
        g_shell = stiffness[:, None] * self.shells - f.z[:, None] * self.coulomb.shell_gradient
        g_shell = g_shell + f.shell_coupling * f.z[:, None] * field
        self.gradient = torch.cat([g_q[:, None], g_shell], dim=1)
        self._exact = False

    def linearize(self) -> None:
        self.steering = self.functional.steering(self)
        self._exact = self.steering.state is self.coulomb

    def product(self, direction: Tensor) -> Tensor:
        return self._with_local(self.steering.product(direction), direction)

    def matrix(self) -> Tensor | None:
        """The Hessian itself, [4n, 4n], where the Coulomb operator has it: never in a cell, where there may be a D."""
        out = self.coulomb.matrix()
        if out is None:
            return None
        f, atom = self.functional, torch.arange(len(self.q), device=self.q.device)
        out[atom, atom, 0, 0] += f.eta
        eye = torch.eye(3, dtype=out.dtype, device=out.device)
        outer = self.shells[:, :, None] * self.shells[:, None, :]
        out[atom, atom, 1:, 1:] += self.stiffness[:, None, None] * eye + self.growth[:, None, None] * outer
        return out.transpose(1, 2).reshape(4 * len(atom), -1)

    def linearize_exactly(self) -> None:
        """Prepares ``exact_product`` and the change of forces."""
        if not self._exact:
            self.coulomb.linearize()
            self._exact = True

    def exact_product(self, direction: Tensor) -> Tensor:
        self.linearize_exactly()
        return self._with_local(self.coulomb.product(direction), direction)

    def _with_local(self, out: Tensor, direction: Tensor) -> Tensor:
        """Adds hardness, springs and what a displacement makes of the change of M."""
        dshell = direction[:, 1:]
        out[:, 0] += self.functional.eta * direction[:, 0]
        radial = (self.shells * dshell).sum(-1, keepdim=True) * self.growth[:, None] * self.shells
        out[:, 1:] += self.stiffness[:, None] * dshell + radial
        f = self.functional
        if f.displaced:
            change = (f.screening * f.moved(direction))[f.system.batch]
            out[:, 0] += (f.lever * change).sum(-1)
            out[:, 1:] -= f.shell_coupling * f.z[:, None] * change
        return out


class _Steering:
    """Hessian products of the Coulomb energy that steer the solver, among the atoms that are not held."""

    def __init__(self, state: CoulombState, atoms: Tensor | None) -> None:
        self.state, self._atoms = state, atoms
        state.linearize()

    def product(self, direction: Tensor) -> Tensor:
        if self._atoms is None:
            return self.state.product(direction)
        out = torch.zeros_like(direction)
        out[self._atoms] = self.state.product(direction[self._atoms])
        return out


class Functional:
    """The functional of a batch: implements solver.Functional.

    Attributes of use outside: segments, system, chi, eta, z, free (False: held charge), lever [n, 3] (∂M/∂q, Å),
    coupling [n, 3, 3] (∂M_a/∂r_b at fixed charges less the shells', e), shell_coupling, psi [n] or None;
    field [b, 3] (V/Å: ε, or D along axes where it is held), held [b, 3] (bool: D is), displaced (whether any is),
    screening [b, 3] (4πk_e/V along these axes, else 0), origin [b, 3] (e Å: where M counts from).
    """

    def __init__(self, model: PQEq, system: Systems) -> None:
        self.model, self.system = model, system
        self.segments = Segments(system.batch, system.n_systems)
        table = model.tensors(system)
        self.z, self.stiff, self.free = table["Z"], table["K"], table["free"]
        self._alpha = table["alpha"]
        # nothing acts on a held charge
        self.chi, self.eta = table["chi"] * self.free, table["eta"] * self.free
        self._all_free = bool(self.free.all())
        self.bound = model.shell_bound
        self._options: dict[str, Any] = {"k_e": model.coulomb_constant, "cache": model.kernels}
        self.operator = CoulombOperator(system, self._alpha, -self.z, accuracy=model.accuracy, **self._options)
        self._applied()
        self._external()
        self._couple()
        self.group, self.group_charge = self._groups()
        # preconditioner: own hardness per charge, spring per shell
        self.inverse_q = torch.where(self.free, 1 / torch.where(self.free, self.eta, 1.0), 0.0)
        self.inverse_shell = 1 / self.stiff
        weight = self._sum(self.inverse_q)
        self.group_weight = torch.where(weight > 0, weight, 1.0)
        self.exact_steering = not self.operator.meshes
        self.block = self._electrode_block()
        self._rough: CoulombOperator | None = None
        self._variable: Tensor | None = None
        self._long_waves: list[LongWaves] | None = None
        self._steering: _Steering | None = None
        self._steering_at = torch.empty(0)

    @property
    def anything_free(self) -> bool:
        """Whether there is anything to solve for."""
        return bool(self.free.any()) or bool((self.z != 0).any())

    def _applied(self) -> None:
        """Potentials on atoms, ψ [n] (V)."""
        model, system = self.model, self.system
        self.psi: Tensor | None = None
        if not model.electrodes and system.electrode is None:
            return
        held = 0 if system.applied is None else system.applied.shape[1]
        if system.electrode is None or system.applied is None or held != len(model.electrodes):
            raise InputError(
                f"the structure has {held} electrodes but the potential {len(model.electrodes)}: assign them anew"
            )
        controlled = [e.control == "potential" for e in model.electrodes]
        at_potential = torch.tensor([*controlled, False], device=system.device)[system.electrode]
        values = torch.cat([system.applied, torch.zeros_like(system.applied[:, :1])], dim=1)
        self.psi = torch.where(at_potential, values[system.batch, system.electrode], 0.0)

    def _external(self) -> None:
        """Field and displacement in this cell, and how they change with it."""
        system, given = self.system, self.system.field
        self._turning = torch.zeros_like(given)  # the part of the field that is a voltage, along all axes
        if system.field_cell is not None:
            straight = torch.linalg.solve(system.cell, system.field_cell @ given[..., None])[..., 0]
            self._turning, given = straight, straight
        if self.model.finite_field is not None:
            jump = finite_field(system, self.model.finite_field)
            self._turning, given = self._turning + jump, given + jump
        self.origin = torch.zeros_like(given)
        if system.origin is not None:
            self.origin = torch.einsum("bi,bij->bj", system.origin, system.cell)
        self.field, self.screening = given, torch.zeros_like(given)
        self.held = torch.zeros_like(given, dtype=torch.bool)
        self.displaced = False
        if system.displacement is None:
            return
        self.held = ~system.displacement.isnan()
        self.displaced = bool(self.held.any())
        volume = torch.linalg.det(system.cell).abs()
        self.room = volume / (4 * math.pi * self.model.coulomb_constant)  # e/(V/Å) Å
        self._flux = torch.where(self.held, system.displacement, 0.0)
        if system.field_cell is not None:
            through = torch.linalg.solve(system.field_cell.transpose(1, 2), self._flux[..., None])
            ratio = torch.linalg.det(system.field_cell).abs() / volume
            self._flux = ratio[:, None] * (system.cell.transpose(1, 2) @ through)[..., 0]
        self.field = torch.where(self.held, self._flux, given)
        self.screening = self.held / self.room[:, None]

    def _couple(self) -> None:
        """Who feels a field, and with which lever."""
        model, system = self.model, self.system
        all_feel = model.response == "all" or model.finite_field is not None
        self.shell_coupling = 0.0 if model.response == "frozen" and model.finite_field is None else 1.0
        whole = whole_positions(system)
        if system.electrode is not None:  # an electrode is where it is, whatever fragments say
            whole = torch.where((system.electrode >= 0)[:, None], system.positions, whole)
        feel = torch.eye(3, dtype=whole.dtype, device=whole.device).expand(len(whole), 3, 3)
        if not all_feel:
            feel = torch.zeros_like(feel)
        held = ~self.free
        if bool(held.any()):
            own = model.dipole_scale * torch.eye(3, dtype=whole.dtype, device=whole.device)
            feel = torch.where(held[:, None, None], own, feel)
        if model.electrodes and system.electrode is not None:
            across = open_directions(system, model.finite_field)[system.batch]
            feel = torch.where((system.electrode >= 0)[:, None, None], across, feel)
        self._feel = feel
        self.lever = torch.einsum("nab,nb->na", feel, whole)
        self._carrying = torch.zeros_like(self.free)  # what does not feel a field itself
        if not all_feel:
            self._carrying = self.free if system.electrode is None else self.free & (system.electrode < 0)
        acts = self.displaced or bool((system.field != 0).any())
        if bool(self._carrying.any()) and system.carried is None and acts:
            raise InputError(
                f"charges.response is {model.response} in a field but the structure carries no charges: "
                "prepare it first"
            )
        self._whole = whole

    def pull(self, field: Tensor) -> Tensor:
        """Force of a field [b, 3] on a unit of every charge, [n, 3] (V/Å)."""
        return torch.einsum("nab,na->nb", self._feel, field[self.system.batch])

    def total(self, vectors: Tensor) -> Tensor:
        """Sums [b, 3] of vectors [n, 3] over the atoms of every structure."""
        return torch.zeros_like(self.system.field).index_add_(0, self.system.batch, vectors)

    def moved(self, direction: Tensor) -> Tensor:
        """Change of M [b, 3] with a direction [n, 4] in (q, Δ)."""
        return self.total(direction[:, :1] * self.lever - self.shell_coupling * self.z[:, None] * direction[:, 1:])

    def _carried(self, q: Tensor) -> Tensor:
        """Charges [n] in M of what does not feel a field: the carried ones (where none are given, its own)."""
        carried = self.system.carried
        return self._carrying * (q if carried is None else carried)

    def charge_moments(self, q: Tensor) -> Tensor:
        """Contributions of charges to M, [n, 3]."""
        return q[:, None] * self.lever + self._carried(q)[:, None] * self._whole

    def coupling(self, q: Tensor) -> Tensor:
        """∂M_a/∂r_b of every atom at fixed q and Δ, [n, 3, 3] (e)."""
        eye = torch.eye(3, dtype=q.dtype, device=q.device)
        return q[:, None, None] * self._feel + self._carried(q)[:, None, None] * eye

    def field_virial(self, point: Point) -> Tensor:
        """−∂/∂strain of what field and displacement add, at fixed q and Δ, [b, 3, 3]; strain: r_a -> r_a + s_ab r_b.

        Cores and the origin of M move along, shell displacements do not. Voltages turn the field, ∂ε_c/∂s_ab =
        −δ_cb ε_a; a flux turns and thins D, ∂D_c/∂s_ab = δ_ca D_b − δ_ab D_c.
        """
        moment = self.total(self.charge_moments(point.q)) - self.origin
        out = point.field[:, :, None] * moment[:, None, :]
        out = out - self._turning[:, :, None] * torch.where(self.held, 0.0, point.dipole)[:, None, :]
        if not self.displaced:
            return out
        field = torch.where(self.held, point.field, 0.0)
        growth = -0.5 * self.room * field.square().sum(-1) - (field * point.dipole).sum(-1)
        if self.system.field_cell is not None:
            growth = growth + self.room * (field * self._flux).sum(-1)
            out = out - self.room[:, None, None] * field[:, :, None] * self._flux[:, None, :]
        return out + growth[:, None, None] * torch.eye(3, dtype=out.dtype, device=out.device)

    def _groups(self) -> tuple[Tensor, Tensor]:
        """Group of every atom [n] and what its charges add up to [groups]; the last group is that of held charges.

        Raises InputError where what is held does not add up to the net charge and nothing can take up the rest.
        """
        model, system = self.model, self.system
        b, n_e = system.n_systems, len(model.electrodes)
        label = (
            system.electrode if model.electrodes and system.electrode is not None else torch.full_like(system.batch, -1)
        )
        electrolyte = (label < 0) & self.free
        n_f = 0
        charges = []
        spoken_for = torch.zeros_like(system.net_charge)
        group = system.batch
        if model.conserve == "fragments" and bool(electrolyte.any()):
            if system.fragments is None or system.fragment_charges is None:
                raise InputError("charges.conserve is fragments but the structure has none: prepare it first")
            n_f = len(system.fragment_charges)
            owner = torch.full((n_f,), -1, dtype=torch.int64, device=system.device)
            owner[system.fragments[electrolyte]] = system.batch[electrolyte]
            real = owner >= 0
            spoken_for.index_add_(0, owner[real], system.fragment_charges[real])
            charges.append(system.fragment_charges)
            group = system.fragments
        reservoir = n_f + system.batch
        if not n_f:
            group = reservoir
        if not self._all_free:
            spoken_for.index_add_(0, system.batch, self._held_charges())
        if n_e and system.applied is not None:
            control = torch.tensor([e.control == "charge" for e in model.electrodes], device=system.device)
            spoken_for += (system.applied * control).sum(1)
            own = n_f + b + system.batch * n_e + label
            group = torch.where(label >= 0, torch.where(control[label], own, reservoir), group)
        last = n_f + b + b * n_e
        group = torch.where(self.free, group, last)
        left = system.net_charge - spoken_for
        filled = torch.bincount(group, minlength=last + 1)[n_f : n_f + b] > 0
        wrong = ~filled & (left.abs() > 1e-6)
        if bool(wrong.any()):
            k = int(wrong.nonzero()[0])
            raise InputError(
                f"charges.net_charge is {float(system.net_charge[k]):g} e but the charges that are given (fixed "
                f"charges, fragments, electrodes at a charge) add up to {float(spoken_for[k]):g} e and no electrode at "
                "a potential takes up the rest: make them equal"
            )
        charges.append(left)
        if n_e and system.applied is not None:
            charges.append(system.applied.reshape(-1))
        charges.append(left.new_zeros(last + 1 - sum(len(c) for c in charges)))
        return group, torch.cat(charges)

    def _held_charges(self) -> Tensor:
        """[n], e; 0 where charges are free."""
        if self.system.carried is None:
            raise InputError(
                "charges.model is fixed but the structure brings no charges: give every atom its own, as "
                "initial_charges in the structure file or under the name in charges.values"
            )
        return torch.where(self.free, 0.0, self.system.carried)

    @property
    def rough(self) -> CoulombOperator:
        """The coarse operator of the atoms that are not held."""
        if self._rough is None:
            system, alpha, z = self.system, self._alpha, self.z
            if not self._all_free:
                kept = self.free | (self.z != 0)
                present = torch.bincount(system.batch[kept], minlength=system.n_systems)
                if bool((present > 0).all()):
                    self._variable = kept.nonzero()[:, 0]
                    system, alpha, z = system.take(self._variable), alpha[self._variable], z[self._variable]
            self._rough = CoulombOperator(system, alpha, -z, accuracy=ROUGH_ACCURACY, rough=True, **self._options)
        return self._rough

    def steering(self, point: Point) -> _Steering:
        """The Coulomb operator for Hessian products at a point; an earlier one where hardly anything has changed."""
        if self.exact_steering:
            return _Steering(point.coulomb, None)
        known = self._steering
        here = torch.cat([point.q[:, None], point.shells], dim=1)
        if known is None or float((here - self._steering_at).abs().max()) > STEERING_RANGE:
            self._steering_at = here
            rough, among = self.rough, self._variable
            q, shells = (point.q, point.shells) if among is None else (point.q[among], point.shells[among])
            known = self._steering = _Steering(rough.at(q, shells), among)
        return known

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.group_charge).index_add_(0, self.group, values)

    def spring(self, shells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spring energy [n] (eV), stiffness κ [n] with force −κΔ, and dκ/d(½Δ²) [n]."""
        u = shells.square().sum(-1)
        if self.model.limiter == "none":
            return 0.5 * self.stiff * u, self.stiff, torch.zeros_like(u)
        limit = self.bound**2
        room = 1 - u / limit
        energy = -0.5 * self.stiff * limit * torch.log1p(-u / limit)
        return energy, self.stiff / room, 2 * self.stiff / (limit * room**2)

    def start(self, guess: tuple[Tensor, Tensor] | None) -> Tensor:
        """Feasible first guess [n, 4]: an earlier (q, Δ) of the same atoms, or charges without interaction."""
        if guess is not None:
            q, shells = guess
            shells = shells * (0.95 * self.bound / shells.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        else:
            chi = self.chi if self.psi is None else self.chi - self.psi
            q, shells = -chi * self.inverse_q, torch.zeros_like(self.system.positions)
        if not self._all_free:
            q = torch.where(self.free, q, self._held_charges())
        excess = (self._sum(q) - self.group_charge) / self.group_weight
        return torch.cat([(q - self.inverse_q * excess[self.group])[:, None], shells], dim=1)

    def at(self, y: Tensor) -> Point:
        return Point(self, y)

    def multipliers(self, gradient: Tensor) -> Tensor:
        """Common potential of every group [groups] (V): the mean of ∂Ω/∂q over its atoms."""
        return self._sum(self.inverse_q * gradient[:, 0]) / self.group_weight

    def project(self, gradient: Tensor) -> Tensor:
        out = gradient.clone()
        out[:, 0] -= self.multipliers(gradient)[self.group]
        if not self._all_free:
            out[:, 0] *= self.free
        return out

    def precondition(self, residual: Tensor) -> Tensor:
        out = torch.cat([self._flow(residual[:, 0])[:, None], self.inverse_shell[:, None] * residual[:, 1:]], dim=1)
        for waves in self._stiff_waves():
            felt = torch.zeros_like(out)
            atoms = waves.sum.atoms
            felt[atoms, 0], felt[atoms, 1:] = waves(out[atoms])
            out = out - torch.cat([self._flow(felt[:, 0])[:, None], self.inverse_shell[:, None] * felt[:, 1:]], dim=1)
        return out

    def _stiff_waves(self) -> list[LongWaves]:
        """Where charge flows between all atoms, long waves of it are stiff."""
        if self._long_waves is None:
            flows = self.model.conserve == "total" and self._all_free and not self.model.electrodes
            self._long_waves = [
                LongWaves(mesh, self.inverse_q, self.inverse_shell, self.model.kernels)
                for mesh in (self.rough.meshes if flows else [])
            ]
        return self._long_waves

    def _flow(self, potential: Tensor) -> Tensor:
        """Charges that a potential [n] moves, on the constraint surface, times −1.

        Without interaction, but for that within the electrodes where their block is at hand.
        """
        block = self.block
        if block is None:
            mean = self._sum(self.inverse_q * potential) / self.group_weight
            return self.inverse_q * (potential - mean[self.group])
        moved = self.inverse_q * potential
        moved[block.atoms] = block.respond(potential[block.atoms])
        sums = self._sum(moved)
        mean = sums / self.group_weight
        common = block.multipliers(sums[block.groups])
        mean[block.groups] = common
        out = moved - self.inverse_q * mean[self.group]
        out[block.atoms] = moved[block.atoms] - block.shift(common)
        return out

    @property
    def linear(self) -> bool:
        """Whether ``step`` is the whole solution, up to the accuracy of the electrodes' block."""
        if self.block is None or bool((self.z != 0).any()):
            return False
        return int(self.free.sum()) == len(self.block.atoms)

    def step(self, point: Point) -> Tensor:
        """y after one step of the charges alone."""
        q = point.q - self._flow(point.gradient[:, 0])
        return torch.cat([q[:, None], point.shells], dim=1)

    def _electrode_block(self) -> ElectrodeBlock | None:
        """The electrodes' factorised block, once their geometry is known to come back."""
        model, system = self.model, self.system
        if not model.electrodes or system.electrode is None:
            return None
        atoms = (system.electrode >= 0).nonzero()[:, 0]
        b = system.n_systems
        counts = torch.bincount(system.batch[atoms], minlength=b)
        if bool((counts != counts[0]).any()):
            return None
        m = int(counts[0])
        inverse = model.blocks(system, atoms[:m], self._alpha, self.eta, model.coulomb_constant)
        if inverse is None:
            return None
        members = self.group[atoms].reshape(b, m)
        local = torch.unique(members[0], return_inverse=True)[1]
        first = torch.searchsorted(local[local.argsort(stable=True)], torch.arange(int(local.max()) + 1).to(local))
        groups = members[:, local.argsort(stable=True)[first]]
        others = self.inverse_q.clone()
        others[atoms] = 0.0
        return ElectrodeBlock(inverse, atoms, local, groups, self._sum(others)[groups])

    def constraints(self) -> Tensor:
        """Rows [constraints, 4n] whose products with y stay what they are."""
        places = 4 * torch.arange(len(self.group), device=self.chi.device)
        held = (~self.free).nonzero()[:, 0]
        rows = torch.zeros(
            len(self.group_charge) + len(held), 4 * len(self.group), dtype=self.chi.dtype, device=self.chi.device
        )
        rows[self.group[self.free], places[self.free]] = 1
        rows[len(self.group_charge) + torch.arange(len(held), device=rows.device), places[held]] = 1
        return rows[rows.any(dim=1)]

    def scale(self, direction: Tensor) -> Tensor:
        return torch.cat([direction[:, :1] * self.eta[:, None], direction[:, 1:] * self.stiff[:, None]], dim=1)

    def largest_step(self, y: Tensor, direction: Tensor) -> Tensor:
        """Step along which the first shell of a structure reaches its bound, [b]."""
        shells, d = y[:, 1:], direction[:, 1:]
        a = d.square().sum(-1).clamp(min=1e-300)
        b = (shells * d).sum(-1)
        c = self.bound**2 - shells.square().sum(-1)
        return self.segments.smallest((-b + (b * b + a * c).clamp(min=0).sqrt()) / a)

    def field_per_volt(self, electrode: int) -> Tensor | None:
        """∂ε/∂ψ [b, 3] (1/Å) of a finite-field cell."""
        if self.model.finite_field is None or self.system.applied is None:
            return None
        volt = torch.zeros_like(self.system.applied)
        volt[:, electrode] = 1.0
        return finite_field(self.system.replace(applied=volt), self.model.finite_field)

    def electrode_answers(self, point: Point) -> dict[str, dict[str, Tensor]]:
        """Charge (e), potential (V) and largest residual (V) of every electrode, [b] each.

        Potentials of electrodes at a charge count from the same zero as those of electrodes at a potential; where there
        is none of these, from that of the Coulomb sum.
        """
        system, model = self.system, self.model
        if not model.electrodes or system.electrode is None or system.applied is None:
            return {}
        b, n_e = system.n_systems, len(model.electrodes)
        common = self.multipliers(point.gradient)
        off = self.project(point.gradient)[:, 0].abs()
        n_f = len(self.group_charge) - 1 - b - b * n_e
        zero = torch.zeros_like(system.net_charge)
        if any(e.control == "potential" for e in model.electrodes):
            zero = common[n_f : n_f + b]
        out = {}
        for k, electrode in enumerate(model.electrodes):
            own = system.electrode == k
            where = system.batch[own]
            charge = torch.zeros_like(system.net_charge).index_add_(0, where, point.q[own])
            potential = system.applied[:, k].clone()
            if electrode.control == "charge":
                first = n_f + b + n_e * torch.arange(b, device=system.device) + k
                potential = common[first] - zero
            residual = torch.zeros_like(charge).scatter_reduce(0, where, off[own], "amax")
            out[electrode.name] = {"charge": charge, "potential": potential, "residual": residual}
        return out


def open_directions(system: Systems, finite_field: int | None) -> Tensor:
    """Projectors [b, 3, 3] on the directions in which a metal's dipole has a meaning.

    Those normal to the periodic ones; across a finite-field cell, normal to its other two vectors.
    """
    periodic = system.pbc.clone()
    if finite_field is not None:
        periodic[:, finite_field] = False
    rows = system.cell * periodic[..., None]
    eye = torch.eye(3, dtype=rows.dtype, device=rows.device)
    return eye - torch.linalg.pinv(rows) @ rows


def finite_field(system: Systems, direction: int) -> Tensor:
    """Field [b, 3] (V/Å) of the potential's jump across a cell that is periodic in all directions.

    −(ψ_high − ψ_low) c*, where high and low are the two electrodes as they lie along lattice vector c.
    """
    assert system.electrode is not None
    assert system.applied is not None
    dual = torch.linalg.inv(system.cell)[:, :, direction]  # c*·c = 1
    along = (system.positions * dual[system.batch]).sum(-1)
    places = []
    for k in range(2):
        own = system.electrode == k
        count = torch.bincount(system.batch[own], minlength=system.n_systems)
        places.append(torch.zeros_like(system.net_charge).index_add_(0, system.batch[own], along[own]) / count)
    jump = torch.where(places[1] > places[0], 1.0, -1.0) * (system.applied[:, 1] - system.applied[:, 0])
    return -jump[:, None] * dual
