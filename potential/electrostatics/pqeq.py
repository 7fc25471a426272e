"""Polarizable charge equilibration: Gaussian cores and shells, charges and shells stationary together.

Every structure of a batch minimises, over q [n] (e) and Δ [n, 3] (Å),

    E = Σ_i [χ_i q_i + ½ η_i q_i² + U_i(Δ_i)] + E_coulomb(q, Δ) − ε·M

with E_coulomb from :mod:`voltpi.potential.electrostatics.ewald`, U the spring (``limiter: none``: ½ K Δ²; ``fene``:
−½ K Δ_max² ln(1 − Δ²/Δ_max²), smooth, and equal to it for small Δ) and M the dipole that ``response`` names.
Naserifar et al., J. Chem. Phys. 146, 124117 (2017); Gao et al., Nat. Commun. 16, 10484 (2025). At the stationary
point forces and virial are partial derivatives at fixed (q, Δ) (Hellmann–Feynman); Born charges and polarizability
come from H δy = −∂²E/∂y∂ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from voltpi.potential.electrostatics import stability
from voltpi.potential.electrostatics.elements import ElementParameters, check_parameters, read_parameters
from voltpi.potential.electrostatics.ewald import CoulombOperator, CoulombState, KernelCache, LongWaves
from voltpi.potential.electrostatics.solver import Segments, Solution, linear_solve, minimize
from voltpi.potential.errors import InputError, NoStablePointError, NotConvergedError
from voltpi.potential.fragments import check_whole, percolating, whole_positions
from voltpi.potential.systems import Systems

__all__ = [
    "COULOMB_CONSTANT",
    "KCAL_PER_EV",
    "ElementParameters",
    "PQEq",
    "PQEqSolution",
    "check_parameters",
    "read_parameters",
]

COULOMB_CONSTANT = 14.3996454784255
"""eV Å/e², CODATA 2018."""
KCAL_PER_EV = 23.060547830619
LAMBDA = 0.462770
"""α = ½ λ/R²."""
ROUGH_ACCURACY = 4e-3
"""Of the Coulomb sum in approximate Hessian products: a coarser one costs more Newton steps than it saves."""
STEERING_RANGE = 2e-3
"""e, Å; approximate Hessian products serve for charges and shells within this distance."""
FREE_SHELL_BOUND = 2.0
"""Å; with ``limiter: none`` a shell this far from its core is past every sound stable point (K, Cs clusters: 1.4 Å)."""


@dataclass(frozen=True)
class PQEqSolution:
    """Answer for a batch (eV, Å, e); see :class:`voltpi.potential.response.Response` for the meaning of each.

    energy [b], terms name -> [b], forces [n, 3], virial [b, 3, 3], charges [n], shells [n, 3], dipole [b, 3], residual
    [b], iterations [b], born_charges [n, 3, 3], polarizability [b, 3, 3], smallest_curvature [b].
    """

    energy: Tensor
    terms: dict[str, Tensor]
    forces: Tensor
    virial: Tensor
    charges: Tensor
    shells: Tensor
    dipole: Tensor
    residual: Tensor
    iterations: Tensor
    born_charges: Tensor | None = None
    polarizability: Tensor | None = None
    smallest_curvature: Tensor | None = None


class _Point:
    """The functional at one (q, Δ): implements solver.Point."""

    def __init__(self, functional: _Functional, y: Tensor) -> None:
        self.functional = f = functional
        self.q, self.shells = y[:, 0], y[:, 1:]
        self.coulomb: CoulombState = f.operator.at(self.q, self.shells)
        spring, stiffness, growth = f.spring(self.shells)
        self.stiffness, self.growth = stiffness, growth
        coupled = f.coupling_charges(self.q)
        moments = coupled[:, None] * f.whole - f.shell_coupling * f.z[:, None] * self.shells
        self.dipole = torch.zeros_like(f.system.field).index_add_(0, f.system.batch, moments)
        total = f.segments.sum
        self.terms = {
            "electronegativity": total(f.chi * self.q),
            "hardness": total(0.5 * f.eta * self.q.square()),
            "spring": total(spring),
            "coulomb": self.coulomb.energy,
            "field": -(f.system.field * self.dipole).sum(-1),
        }
        self.energy = torch.stack(list(self.terms.values())).sum(0)
        g_q = f.chi + f.eta * self.q + self.coulomb.potential[0]
        if f.charges_feel_field:
            g_q = g_q - (f.whole * f.field).sum(-1)
        g_shell = stiffness[:, None] * self.shells - f.z[:, None] * self.coulomb.shell_gradient
        g_shell = g_shell + f.shell_coupling * f.z[:, None] * f.field
        self.gradient = torch.cat([g_q[:, None], g_shell], dim=1)

    def linearize(self) -> None:
        self.rough = self.functional.steering(self)
        self._exact = self.coulomb is self.rough

    def product(self, direction: Tensor) -> Tensor:
        return self._with_springs(self.rough.product(direction), direction)

    def matrix(self) -> Tensor | None:
        """The Hessian itself, [4n, 4n], where the Coulomb operator has it."""
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
        return self._with_springs(self.coulomb.product(direction), direction)

    def _with_springs(self, out: Tensor, direction: Tensor) -> Tensor:
        dshell = direction[:, 1:]
        out[:, 0] += self.functional.eta * direction[:, 0]
        radial = (self.shells * dshell).sum(-1, keepdim=True) * self.growth[:, None] * self.shells
        out[:, 1:] += self.stiffness[:, None] * dshell + radial
        return out


class _Functional:
    """The functional of a batch: implements solver.Functional."""

    def __init__(self, model: PQEq, system: Systems) -> None:
        self.model, self.system = model, system
        self.segments = Segments(system.batch, system.n_systems)
        table = model.tensors(system)
        self.chi, self.eta, self.z, self.stiff = table["chi"], table["eta"], table["Z"], table["K"]
        self.field = system.field[system.batch]  # [n, 3]
        self.whole = whole_positions(system)
        self.charges_feel_field = model.response == "all"
        self.shell_coupling = 0.0 if model.response == "frozen" else 1.0
        self.bound = model.shell_bound
        options: dict[str, Any] = {"k_e": model.coulomb_constant, "cache": model.kernels}
        self.operator = self.rough = CoulombOperator(
            system, table["alpha"], -self.z, accuracy=model.accuracy, **options
        )
        if self.operator.meshes:
            self.rough = CoulombOperator(
                system, table["alpha"], -self.z, accuracy=ROUGH_ACCURACY, rough=True, **options
            )
        self._steering: CoulombState | None = None
        self._steering_at = torch.empty(0)
        if model.conserve == "fragments":
            if system.fragments is None or system.fragment_charges is None:
                raise InputError("charges.conserve is fragments but the structure has none: prepare it first")
            self.group, self.group_charge = system.fragments, system.fragment_charges
        else:
            self.group, self.group_charge = system.batch, system.net_charge
        # preconditioner: own hardness per charge, spring per shell
        self.inverse_q = 1 / self.eta
        self.inverse_shell = 1 / self.stiff
        self.group_weight = self._sum(self.inverse_q)
        # where charge flows between all atoms, long waves of it are stiff
        flows = model.conserve == "total"
        self.long_waves = [
            LongWaves(mesh, self.inverse_q, self.inverse_shell, model.kernels) for mesh in self.rough.meshes if flows
        ]

    def steering(self, point: _Point) -> CoulombState:
        """The Coulomb operator for Hessian products at a point; an earlier one where hardly anything has changed."""
        if self.rough is self.operator:
            point.coulomb.linearize()
            return point.coulomb
        known = self._steering
        here = torch.cat([point.q[:, None], point.shells], dim=1)
        if known is None or float((here - self._steering_at).abs().max()) > STEERING_RANGE:
            self._steering_at = here
            known = self._steering = self.rough.at(point.q, point.shells)
            known.linearize()
        return known

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.group_charge).index_add_(0, self.group, values)

    def coupling_charges(self, q: Tensor) -> Tensor:
        """Charges in the dipole that couples to the field: q itself, or the carried ones."""
        if self.charges_feel_field:
            return q
        if self.system.carried is None:
            if bool((self.field != 0).any()):
                raise InputError(
                    f"charges.response is {self.model.response} in a field but the structure carries no charges: "
                    "prepare it first"
                )
            return q.detach()
        return self.system.carried

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
            q, shells = -self.chi * self.inverse_q, torch.zeros_like(self.system.positions)
        excess = (self._sum(q) - self.group_charge) / self.group_weight
        return torch.cat([(q - self.inverse_q * excess[self.group])[:, None], shells], dim=1)

    def at(self, y: Tensor) -> _Point:
        return _Point(self, y)

    def project(self, gradient: Tensor) -> Tensor:
        out = gradient.clone()
        out[:, 0] -= (self._sum(self.inverse_q * gradient[:, 0]) / self.group_weight)[self.group]
        return out

    def precondition(self, residual: Tensor) -> Tensor:
        out = torch.cat([self._flow(residual[:, 0])[:, None], self.inverse_shell[:, None] * residual[:, 1:]], dim=1)
        if not self.long_waves:
            return out
        felt = torch.zeros_like(out)
        for waves in self.long_waves:
            atoms = waves.sum.atoms
            felt[atoms, 0], felt[atoms, 1:] = waves(out[atoms])
        return out - torch.cat([self._flow(felt[:, 0])[:, None], self.inverse_shell[:, None] * felt[:, 1:]], dim=1)

    def _flow(self, potential: Tensor) -> Tensor:
        """Charges that a potential [n] moves without interaction, on the constraint surface, times −1."""
        mean = self._sum(self.inverse_q * potential) / self.group_weight
        return self.inverse_q * (potential - mean[self.group])

    def constraints(self) -> Tensor:
        """Rows [groups, 4n] whose products with y stay what they are."""
        rows = torch.zeros(len(self.group_charge), 4 * len(self.group), dtype=self.chi.dtype, device=self.chi.device)
        rows[self.group, 4 * torch.arange(len(self.group), device=rows.device)] = 1
        return rows

    def scale(self, direction: Tensor) -> Tensor:
        return torch.cat(
            [direction[:, :1] / self.inverse_q[:, None], direction[:, 1:] / self.inverse_shell[:, None]], dim=1
        )

    def largest_step(self, y: Tensor, direction: Tensor) -> Tensor:
        """Step along which the first shell of a structure reaches its bound, [b]."""
        shells, d = y[:, 1:], direction[:, 1:]
        a = d.square().sum(-1).clamp(min=1e-300)
        b = (shells * d).sum(-1)
        c = self.bound**2 - shells.square().sum(-1)
        return self.segments.smallest((-b + (b * b + a * c).clamp(min=0).sqrt()) / a)


@dataclass
class PQEq:
    """Charge equilibration with (``pqeq``) or without (``qeq``: all Z = 0) polarizable shells.

    Attributes
    ----------
    parameters : symbol -> ElementParameters
    conserve : ``total`` or ``fragments`` (physics: what charge balance holds)
    response : ``shells``, ``all`` or ``frozen`` (what feels a field)
    limiter, shell_limit : the smooth bound on shells, Å
    accuracy : relative force error of a periodic sum
    coulomb_constant : eV Å/e²
    tolerance : largest residual of a converged solution, V (V/Å·e for shells)
    """

    parameters: Mapping[str, ElementParameters] = field(default_factory=read_parameters)
    conserve: str = "total"
    response: str = "shells"
    limiter: str = "fene"
    shell_limit: float = 0.25
    accuracy: float = 1e-6
    coulomb_constant: float = COULOMB_CONSTANT
    tolerance: float = 1e-8
    kernels: KernelCache = field(default_factory=KernelCache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {
            "conserve": ("total", "fragments"),
            "response": ("shells", "all", "frozen"),
            "limiter": ("fene", "none"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise InputError(f"charges.{key} is '{getattr(self, key)}': choose {' | '.join(allowed)}")
        if not 1e-14 <= self.accuracy <= 1e-2:
            raise InputError(f"coulomb.accuracy is {self.accuracy:g}: choose a relative force error from 1e-14 to 1e-2")
        for name, value, fix in (
            ("charges.shell_limit", self.shell_limit, "give the largest core-shell distance in Å, as 0.25"),
            ("charges.tolerance", self.tolerance, "give the largest residual in V, as 1e-8"),
            ("coulomb.coulomb_constant", self.coulomb_constant, f"give eV Å/e², {COULOMB_CONSTANT:.6f} in vacuum"),
        ):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value:g}: {fix}")
        for symbol, row in self.parameters.items():
            check_parameters("charges.parameters", symbol, row)

    @property
    def shell_bound(self) -> float:
        """Å; no shell gets this far from its core and stays stable."""
        return self.shell_limit if self.limiter == "fene" else FREE_SHELL_BOUND

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments to build the same model again."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        out["parameters"] = {k: list(v) for k, v in self.parameters.items()}
        return out

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PQEq:
        """The model that ``config`` describes."""
        table = {k: ElementParameters(*v) for k, v in config["parameters"].items()}
        return cls(**{**config, "parameters": table})

    def tensors(self, system: Systems) -> dict[str, Tensor]:
        """Per-atom parameters [N]: chi, eta (eV), Z (e), K (eV/Å²), alpha (Å⁻²).

        Raises InputError for an unknown element.
        """
        present = sorted(set(system.numbers.tolist()))
        missing = [chemical_symbols[z] for z in present if chemical_symbols[z] not in self.parameters]
        if missing:
            raise InputError(
                f"no PQEq parameters for {', '.join(missing)}: add a row to charges.parameters (this model knows "
                f"{', '.join(self.parameters)})"
            )
        rows = torch.zeros(max(present) + 1, 5, dtype=torch.float64)
        for z in present:
            p = self.parameters[chemical_symbols[z]]
            k = p.K / KCAL_PER_EV if p.Z else 1.0
            rows[z] = torch.tensor([p.chi, p.eta, p.Z, k, 0.5 * LAMBDA / p.R**2], dtype=torch.float64)
        columns = rows.to(system.device)[system.numbers].unbind(1)
        return dict(zip(("chi", "eta", "Z", "K", "alpha"), columns, strict=True))

    def check_field(self, system: Systems) -> None:
        """Refuses a field that is not well defined for these boundaries.

        Raises InputError: charges that flow under a field along a periodic direction.
        """
        along = torch.einsum("bij,bj->bi", system.cell, system.field).abs() > 1e-12
        if self.response != "all" or not bool((along & system.pbc).any()):
            return
        if self.conserve == "total":
            raise InputError(
                "field along a periodic direction with charges.response all and charges.conserve total: charge would "
                "flow across the cell without end; set charges.conserve to fragments or charges.response to shells"
            )
        check_whole(system)
        if bool((percolating(system) & along).any()):
            raise InputError(
                "field along a direction in which a fragment is bonded to its own image: "
                "its charge could flow across the cell; set charges.response to shells"
            )

    def solve(
        self,
        system: Systems,
        *,
        start: tuple[Tensor, Tensor] | None = None,
        born_charges: bool = False,
        polarizability: bool = False,
        smallest_curvature: bool = False,
    ) -> PQEqSolution:
        """Charges, shells, energy, forces and virial of a batch, from a first guess (q [n], Δ [n, 3]) if given.

        Raises
        ------
        NoStablePointError : the shells or charges have no stable stationary point
        NotConvergedError : the residual stayed above ``tolerance``
        InputError : unknown element, field or boundary that is not well defined
        """
        self.check_field(system)
        functional = _Functional(self, system)
        # a warm start follows its branch; what is new is checked to be a minimum
        solution = minimize(functional, functional.start(start), tolerance=self.tolerance, check=start is None)
        if start is not None and not bool(solution.converged.all()):
            kept = functional.segments.spread(solution.converged)
            again = torch.where(kept, solution.y, functional.start(None))
            solution = minimize(functional, again, tolerance=self.tolerance)
        if not bool(solution.converged.all()):  # so soft that the coarse operator misleads
            functional.rough = functional.operator
            kept = functional.segments.spread(solution.converged)
            again = torch.where(kept, solution.y, functional.start(None))
            solution = minimize(functional, again, tolerance=self.tolerance)
        point = solution.point
        assert isinstance(point, _Point)
        self._check(system, point, solution)
        coupled = functional.coupling_charges(point.q)
        coulomb = point.coulomb
        forces = -(coulomb.site_charges[..., None] * coulomb.gradient).sum(0)
        forces = forces + coupled[:, None] * functional.field
        strained = coupled[:, None, None] * functional.field[:, :, None] * functional.whole[:, None, :]
        virial = coulomb.virial().index_add(0, system.batch, 0.5 * (strained + strained.transpose(1, 2)))
        born = alpha = None
        if born_charges or polarizability:
            born, alpha = self._field_response(functional, point, coupled)
        curvature = None
        if smallest_curvature:
            point.linearize()
            curvature = stability.smallest_curvature(point, functional, functional.z != 0)
        return PQEqSolution(
            energy=point.energy,
            terms=point.terms,
            forces=forces,
            virial=virial,
            charges=point.q,
            shells=point.shells,
            dipole=point.dipole,
            residual=solution.residual,
            iterations=solution.products,
            born_charges=born if born_charges else None,
            polarizability=alpha if polarizability else None,
            smallest_curvature=curvature,
        )

    def _check(self, system: Systems, point: _Point, solution: Solution) -> None:
        if bool(solution.converged.all()):
            return
        b = int((~solution.converged).nonzero()[0])
        atoms = (system.batch == b).nonzero()[:, 0]
        length = point.shells[atoms].norm(dim=-1)
        worst = int(length.argmax())
        where = f"atom {worst} ({system.symbols[int(atoms[worst])]})"
        if system.n_systems > 1:
            where += f" of structure {b}"
        residual, reached = float(solution.residual[b]), float(length[worst])
        if not math.isfinite(residual):
            raise NotConvergedError(f"charges became NaN near {where}: check the structure")
        if self.limiter == "none" and (bool(solution.negative_curvature[b]) or reached > 0.8 * self.shell_bound):
            raise NoStablePointError(
                f"no stable point for charges and shells: polarization catastrophe at {where}, whose "
                f"shell is {reached:.2f} Å from its core; set charges.limiter to fene"
            )
        raise NotConvergedError(
            f"charges did not converge: residual {residual:.1e} V after {int(solution.products[b])} products (asked "
            f"{self.tolerance:.1e} V); check the structure near {where}, whose shell is "
            f"{reached:.2f} Å from its core, or give it a stiffer spring (larger K)"
        )

    def _field_response(self, functional: _Functional, point: _Point, coupled: Tensor) -> tuple[Tensor, Tensor]:
        """Born charges [n, 3, 3] and polarizability [b, 3, 3] (Å³) from H δy = −∂²E/∂y∂ε.

        A mesh keeps the acoustic sum rule, Σ_i Z*_i = Σ_i q̄_i, to its accuracy; what is missing is shared by all atoms.
        """
        n, batch = len(coupled), functional.system.batch
        point.linearize()
        point.linearize_exactly()
        born = torch.zeros(n, 3, 3, dtype=torch.float64, device=coupled.device)
        alpha = torch.zeros(functional.segments.count, 3, 3, dtype=torch.float64, device=coupled.device)
        for a in range(3):
            mixed = torch.zeros(n, 4, dtype=torch.float64, device=coupled.device)  # ∂²E/∂y∂ε_a
            if functional.charges_feel_field:
                mixed[:, 0] = -functional.whole[:, a]
            mixed[:, 1 + a] = functional.shell_coupling * functional.z
            answer = linear_solve(point, functional, -mixed, tolerance=0.1 * self.tolerance)
            if bool(answer.negative_curvature.any()):
                raise NoStablePointError(
                    "the response to a field does not exist: charges and shells are at a saddle point (a polarization "
                    "catastrophe is near); set charges.limiter to fene, or give stiffer parameters (larger K)"
                )
            if not bool(answer.converged.all()):
                raise NotConvergedError(
                    f"the response to a field did not converge in {int(answer.products.max())} products; check the "
                    "structure"
                )
            dq, dshells = answer.x[:, 0], answer.x[:, 1:]
            change = point.coulomb.core_gradient_change(answer.x)
            net = torch.zeros_like(functional.system.field).index_add_(0, batch, change)
            born[:, a] = (net / torch.bincount(batch)[:, None])[batch] - change
            born[:, a, a] += coupled
            moved = -functional.shell_coupling * functional.z[:, None] * dshells
            if functional.charges_feel_field:
                born[:, a] += dq[:, None] * functional.field
                moved = moved + dq[:, None] * functional.whole
            alpha[:, :, a] = torch.zeros_like(functional.system.field).index_add_(0, batch, moved)
        return born, 0.5 * (alpha + alpha.transpose(1, 2)) * self.coulomb_constant
