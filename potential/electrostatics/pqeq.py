"""Polarizable charge equilibration: Gaussian cores and shells, charges and shells stationary together.

One structure at a time minimises, over q [N] (e) and Δ [N, 3] (Å),

    E = Σ_i [χ_i q_i + ½ η_i q_i² + U_i(Δ_i)] + E_coulomb(q, Δ) − ε·M

with E_coulomb from :mod:`voltpi.potential.electrostatics.ewald`, U the spring (``limiter: none``: ½ K Δ²; ``fene``:
−½ K Δ_max² ln(1 − Δ²/Δ_max²), smooth, and equal to it for small Δ) and M the dipole that ``response`` names.
Naserifar et al., J. Chem. Phys. 146, 124117 (2017); Gao et al., Nat. Commun. 16, 10484 (2025). At the stationary
point forces and virial are partial derivatives at fixed (q, Δ) (Hellmann–Feynman); Born charges and polarizability
come from H δy = −∂²E/∂y∂ε.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from voltpi.potential.electrostatics.ewald import CoulombOperator, CoulombState
from voltpi.potential.electrostatics.solver import linear_solve, minimize
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
FREE_SHELL_BOUND = 1.0
"""Å; with ``limiter: none`` a shell this far from its core has left every stable point."""


class ElementParameters(NamedTuple):
    """χ, η (eV), shell charge Z (e), Gaussian radius R (Å), spring constant K (kcal/mol/Å² for Z = 1)."""

    chi: float
    eta: float
    Z: float
    R: float
    K: float


def read_parameters(path: str | Path = "default") -> dict[str, ElementParameters]:
    """Element parameters from a CSV; ``default``: the shipped table.

    The columns are symbol, chi, eta, Z, R, K; '#' starts a comment.
    Raises InputError for a file that cannot be read, other columns, a table without rows, an element that is unknown or
    there twice, and a number that cannot be.
    """
    if str(path) == "default":
        text = resources.files("voltpi.potential.parameters").joinpath("pqeq.csv").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"{path}: cannot read the PQEq parameters ({reason}); give an existing CSV") from None
    rows = csv.DictReader(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    columns = [name.strip() for name in rows.fieldnames or ()]
    if sorted(columns) != sorted(("symbol", *ElementParameters._fields)):
        raise InputError(f"{path}: the columns are '{','.join(columns)}'; give symbol,chi,eta,Z,R,K, each once")
    rows.fieldnames = columns
    table: dict[str, ElementParameters] = {}
    for row in rows:
        symbol = (row.get("symbol") or "").strip()
        if symbol not in atomic_numbers:
            raise InputError(f"{path}: '{symbol}' is not an element; the columns are symbol,chi,eta,Z,R,K")
        if symbol in table:
            raise InputError(f"{path}: {symbol} has two rows; keep one")
        try:
            table[symbol] = ElementParameters(*(float(row[k]) for k in ElementParameters._fields))
        except (TypeError, ValueError):
            raise InputError(f"{path}: the row of {symbol} needs the numbers chi,eta,Z,R,K") from None
        if None in row:
            raise InputError(f"{path}: the row of {symbol} has more than the numbers chi,eta,Z,R,K")
        check_parameters(str(path), symbol, table[symbol])
    if not table:
        raise InputError(f"{path}: the table has no rows; give symbol,chi,eta,Z,R,K of every element")
    return table


def check_parameters(source: str, symbol: str, p: ElementParameters) -> None:
    """Raises InputError for numbers that no atom can have."""
    if not all(math.isfinite(value) for value in p):
        raise InputError(f"{source}: chi, eta, Z, R and K of {symbol} must be finite numbers")
    if p.R <= 0 or p.eta <= 0 or (p.Z and p.K <= 0):
        raise InputError(f"{source}: eta, R and K of {symbol} must be positive")


@dataclass(frozen=True)
class PQEqSolution:
    """Answer for one structure (eV, Å, e); see :class:`voltpi.potential.response.Response` for the meaning of each."""

    energy: Tensor
    terms: dict[str, Tensor]
    forces: Tensor
    virial: Tensor
    charges: Tensor
    shells: Tensor
    dipole: Tensor
    residual: float
    iterations: int
    born_charges: Tensor | None = None
    polarizability: Tensor | None = None


class _Point:
    """The functional at one (q, Δ): implements solver.Point."""

    def __init__(self, structure: _Structure, y: Tensor) -> None:
        self.structure = s = structure
        self.q, self.shells = y[:, 0], y[:, 1:]
        self.coulomb: CoulombState = s.operator.at(self.q, self.shells)
        spring, stiffness, growth = s.spring(self.shells)
        self.stiffness, self.growth = stiffness, growth
        coupled = s.coupling_charges(self.q)
        self.dipole = (coupled[:, None] * s.whole).sum(0) - s.shell_coupling * (s.z[:, None] * self.shells).sum(0)
        self.terms = {
            "electronegativity": (s.chi * self.q).sum(),
            "hardness": (0.5 * s.eta * self.q.square()).sum(),
            "spring": spring,
            "coulomb": self.coulomb.energy,
            "field": -(s.field * self.dipole).sum(),
        }
        self.energy = torch.stack(list(self.terms.values())).sum()
        g_q = s.chi + s.eta * self.q + self.coulomb.potential[0]
        if s.charges_feel_field:
            g_q = g_q - s.whole @ s.field
        g_shell = stiffness[:, None] * self.shells - s.z[:, None] * self.coulomb.gradient[1]
        g_shell = g_shell + s.shell_coupling * s.z[:, None] * s.field
        self.gradient = torch.cat([g_q[:, None], g_shell], dim=1)

    def linearize(self) -> None:
        self.coulomb.linearize()

    def product(self, direction: Tensor) -> Tensor:
        dq, dshell = direction[:, 0], direction[:, 1:]
        out_q, out_shell = self.coulomb.product(dq, dshell)
        out_q = out_q + self.structure.eta * dq
        radial = (self.shells * dshell).sum(-1, keepdim=True) * self.growth[:, None] * self.shells
        return torch.cat([out_q[:, None], out_shell + self.stiffness[:, None] * dshell + radial], dim=1)


class _Structure:
    """One structure's functional: implements solver.Functional."""

    def __init__(self, model: PQEq, system: Systems) -> None:
        self.model, self.system = model, system
        table = model.tensors(system)
        self.chi, self.eta, self.z, self.stiff = table["chi"], table["eta"], table["Z"], table["K"]
        self.field = system.field[0]
        self.whole = whole_positions(system)
        self.charges_feel_field = model.response == "all"
        self.shell_coupling = 0.0 if model.response == "frozen" else 1.0
        self.bound = model.shell_bound
        self.operator = CoulombOperator(
            system,
            table["alpha"],
            -self.z,
            accuracy=model.accuracy,
            k_e=model.coulomb_constant,
        )
        if model.conserve == "fragments":
            if system.fragments is None or system.fragment_charges is None:
                raise InputError("charges.conserve is fragments but the structure has none: prepare it first")
            self.group, self.group_charge = system.fragments, system.fragment_charges
        else:
            self.group = torch.zeros_like(system.numbers)
            self.group_charge = system.net_charge
        # block preconditioner: own hardness per charge, spring per shell
        self.inverse_q = 1 / self.eta
        self.inverse_shell = 1 / self.stiff
        self.group_weight = self._sum(self.inverse_q)

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
        """Spring energy (sum, eV), stiffness κ [N] with force −κΔ, and dκ/d(½Δ²) [N]."""
        u = shells.square().sum(-1)
        if self.model.limiter == "none":
            return (0.5 * self.stiff * u).sum(), self.stiff, torch.zeros_like(u)
        limit = self.bound**2
        room = 1 - u / limit
        return (
            (-0.5 * self.stiff * limit * torch.log(room)).sum(),
            self.stiff / room,
            2 * self.stiff / (limit * room**2),
        )

    def start(self, guess: tuple[Tensor, Tensor] | None) -> Tensor:
        """Feasible first guess [N, 4]: an earlier (q, Δ) of the same atoms, or charges without interaction."""
        if guess is not None:
            q, shells = guess
            shells = shells * (0.95 * self.bound / shells.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        else:
            q, shells = -self.chi * self.inverse_q, torch.zeros_like(self.system.positions)
        excess = (self._sum(q) - self.group_charge) / self.group_weight
        return torch.cat([(q - self.inverse_q * excess[self.group])[:, None], shells], dim=1)

    def at(self, y: Tensor) -> _Point:
        return _Point(self, y)

    def multiplier(self, gradient: Tensor) -> Tensor:
        """Chemical potential of every group, V."""
        return self._sum(self.inverse_q * gradient[:, 0]) / self.group_weight

    def project(self, gradient: Tensor) -> Tensor:
        out = gradient.clone()
        out[:, 0] -= self.multiplier(gradient)[self.group]
        return out

    def precondition(self, residual: Tensor) -> Tensor:
        balanced = residual[:, 0] - self.multiplier(residual)[self.group]
        return torch.cat([(self.inverse_q * balanced)[:, None], self.inverse_shell[:, None] * residual[:, 1:]], dim=1)

    def scale(self, direction: Tensor) -> Tensor:
        return torch.cat(
            [direction[:, :1] / self.inverse_q[:, None], direction[:, 1:] / self.inverse_shell[:, None]], dim=1
        )

    def largest_step(self, y: Tensor, direction: Tensor) -> float:
        """Step along which the first shell reaches its bound."""
        shells, d = y[:, 1:], direction[:, 1:]
        a = d.square().sum(-1).clamp(min=1e-300)
        b = (shells * d).sum(-1)
        c = self.bound**2 - shells.square().sum(-1)
        return float(((-b + (b * b + a * c).clamp(min=0).sqrt()) / a).min())


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
        out = asdict(self)
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

        Raises InputError: charges that flow under a field along a periodic direction, or mixed periodicity.
        """
        pbc = system.pbc[0]
        if bool(pbc.any()) and not bool(pbc.all()):
            raise InputError(
                "the structure is periodic in some directions only: coulomb.boundary open or periodic is available; "
                "set pbc to T T T (with vacuum) or F F F"
            )
        cells = system.cell[0]
        along = (cells @ system.field[0]).abs() > 1e-12
        if self.response != "all" or not bool((along & pbc).any()):
            return
        if self.conserve == "total":
            raise InputError(
                "field along a periodic direction with charges.response all and charges.conserve total: charge would "
                "flow across the cell without end; set charges.conserve to fragments or charges.response to shells"
            )
        check_whole(system)
        if bool((percolating(system)[0] & along).any()):
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
    ) -> PQEqSolution:
        """Charges, shells, energy, forces and virial of one structure, from a first guess (q [N], Δ [N, 3]) if given.

        Raises
        ------
        NoStablePointError : the shells or charges have no stable stationary point
        NotConvergedError : the residual stayed above ``tolerance``
        InputError : unknown element, field that is not well defined
        """
        self.check_field(system)
        structure = _Structure(self, system)
        # a warm start follows its branch; what is new is checked to be a minimum
        solution = minimize(structure, structure.start(start), tolerance=self.tolerance, check=start is None)
        if start is not None and not solution.converged:
            solution = minimize(structure, structure.start(None), tolerance=self.tolerance)
        point = solution.point
        assert isinstance(point, _Point)
        self._check(system, point, solution)
        coupled = structure.coupling_charges(point.q)
        coulomb = point.coulomb
        forces = -(coulomb.site_charges[..., None] * coulomb.gradient).sum(0)
        forces = forces + coupled[:, None] * structure.field
        strained = torch.outer(structure.field, (coupled[:, None] * structure.whole).sum(0))
        virial = coulomb.virial() + 0.5 * (strained + strained.T)
        born = alpha = None
        if born_charges or polarizability:
            born, alpha = self._field_response(structure, point, coupled)
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
        )

    def _check(self, system: Systems, point: _Point, solution: Any) -> None:
        length = point.shells.norm(dim=-1)
        atom = int(length.argmax())
        symbol = system.symbols[atom]
        if not math.isfinite(solution.residual):
            raise NotConvergedError(f"charges became NaN near atom {atom} ({symbol}): check the structure")
        if solution.converged:
            return
        if self.limiter == "none" and (solution.negative_curvature or float(length[atom]) > 0.8 * self.shell_bound):
            raise NoStablePointError(
                f"no stable point for charges and shells: polarization catastrophe at atom {atom} ({symbol}), whose "
                f"shell is {float(length[atom]):.2f} Å from its core; set charges.limiter to fene"
            )
        raise NotConvergedError(
            f"charges did not converge: residual {solution.residual:.1e} V after {solution.products} products (asked "
            f"{self.tolerance:.1e} V); check the structure near atom {atom} ({symbol}), whose shell is "
            f"{float(length[atom]):.2f} Å from its core, or give it a stiffer spring (larger K)"
        )

    def _field_response(self, structure: _Structure, point: _Point, coupled: Tensor) -> tuple[Tensor, Tensor]:
        """Born charges [N, 3, 3] and polarizability [3, 3] (Å³) from H δy = −∂²E/∂y∂ε."""
        n = len(coupled)
        point.linearize()
        born = torch.zeros(n, 3, 3, dtype=torch.float64, device=coupled.device)
        alpha = torch.zeros(3, 3, dtype=torch.float64, device=coupled.device)
        for a in range(3):
            mixed = torch.zeros(n, 4, dtype=torch.float64, device=coupled.device)  # ∂²E/∂y∂ε_a
            if structure.charges_feel_field:
                mixed[:, 0] = -structure.whole[:, a]
            mixed[:, 1 + a] = structure.shell_coupling * structure.z
            answer = linear_solve(point, structure, -mixed, tolerance=0.1 * self.tolerance)
            if answer.negative_curvature:
                raise NoStablePointError(
                    "the response to a field does not exist: charges and shells are at a saddle point (a polarization "
                    "catastrophe is near); set charges.limiter to fene, or give stiffer parameters (larger K)"
                )
            if not answer.converged:
                raise NotConvergedError(
                    f"the response to a field did not converge in {answer.products} products; check the structure"
                )
            dq, dshells = answer.x[:, 0], answer.x[:, 1:]
            change = point.coulomb.core_gradient_change(dq, dshells)
            born[:, a] = -change
            born[:, a, a] += coupled
            if structure.charges_feel_field:
                born[:, a] += dq[:, None] * structure.field
            moved = -structure.shell_coupling * (structure.z[:, None] * dshells).sum(0)
            if structure.charges_feel_field:
                moved = moved + (dq[:, None] * structure.whole).sum(0)
            alpha[:, a] = moved
        return born, 0.5 * (alpha + alpha.T) * self.coulomb_constant
