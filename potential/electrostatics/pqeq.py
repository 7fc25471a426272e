"""Polarizable charge equilibration: Gaussian cores and shells, charges and shells stationary together.

Every structure of a batch minimises, over q [n] (e) and Δ [n, 3] (Å),

    E = Σ_i [χ_i q_i + ½ η_i q_i² + U_i(Δ_i)] + E_coulomb(q, Δ) − ε·M

(with electrodes: :mod:`voltpi.potential.electrostatics.functional`), E_coulomb from
:mod:`voltpi.potential.electrostatics.ewald`, U the spring (``limiter: none``: ½ K Δ²; ``fene``:
−½ K Δ_max² ln(1 − Δ²/Δ_max²), smooth, and equal to it for small Δ) and M the dipole that ``response`` names.
Naserifar et al., J. Chem. Phys. 146, 124117 (2017); Gao et al., Nat. Commun. 16, 10484 (2025). At the stationary
point forces and virial are partial derivatives at fixed (q, Δ) (Hellmann–Feynman; the virial is not symmetric in a
field, which distinguishes directions); Born charges and polarizability come from H δy = −∂²E/∂y∂ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from ase.data import chemical_symbols
from torch import Tensor

from voltpi.potential.electrostatics import responses, stability
from voltpi.potential.electrostatics.block import BlockCache
from voltpi.potential.electrostatics.elements import ElementParameters, check_parameters, read_parameters
from voltpi.potential.electrostatics.functional import Functional, Point, open_directions
from voltpi.potential.electrostatics.kernel_cache import KernelCache
from voltpi.potential.electrostatics.solver import Solution, minimize
from voltpi.potential.errors import InputError, NoStablePointError, NotConvergedError
from voltpi.potential.external.electrodes import Electrode, electrode_rows
from voltpi.potential.fragments import check_whole, percolating
from voltpi.potential.systems import Systems

__all__ = [
    "COULOMB_CONSTANT",
    "KCAL_PER_EV",
    "ElementParameters",
    "FixedCharges",
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
POINT = 1e6
"""Å⁻², exponent of a point charge: from 0.006 Å on the interaction is that of points to all digits."""
FREE_SHELL_BOUND = 2.0
"""Å; with ``limiter: none`` a shell this far from its core is past every sound stable point (K, Cs clusters: 1.4 Å)."""


@dataclass(frozen=True)
class PQEqSolution:
    """Answer for a batch (eV, Å, e); see :class:`voltpi.potential.response.Response` for the meaning of each.

    energy [b], terms name -> [b], forces [n, 3], virial [b, 3, 3], charges [n], shells [n, 3], dipole [b, 3], field
    [b, 3], residual [b], iterations [b], born_charges [n, 3, 3], polarizability [b, 3, 3], smallest_curvature [b],
    electrodes name -> answers [b], capacitance [b, electrodes, electrodes]. charge_gradient [n] (V) is ∂Ω/∂q, which
    does not vanish for held charges; charge_response [n, 3], beside Born charges, is −∂²Ω/∂q∂ε (Å) of held charges,
    ∂q/∂ε (e Å/V) of free ones.
    """

    energy: Tensor
    terms: dict[str, Tensor]
    forces: Tensor
    virial: Tensor
    charges: Tensor
    shells: Tensor
    dipole: Tensor
    field: Tensor
    residual: Tensor
    iterations: Tensor
    charge_gradient: Tensor | None = None
    born_charges: Tensor | None = None
    charge_response: Tensor | None = None
    polarizability: Tensor | None = None
    smallest_curvature: Tensor | None = None
    electrodes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    capacitance: Tensor | None = None


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
    electrodes : what the electrodes are that structures bring; of a run, not of the model (left out of ``config``)
    finite_field : lattice vector (0, 1, 2) of a periodic cell across which the potential jumps between two electrodes
    """

    balances: ClassVar[tuple[str, ...]] = ("total", "fragments")
    parameters: Mapping[str, ElementParameters] = field(default_factory=read_parameters)
    conserve: str = "total"
    response: str = "shells"
    limiter: str = "fene"
    shell_limit: float = 0.25
    accuracy: float = 1e-6
    coulomb_constant: float = COULOMB_CONSTANT
    tolerance: float = 1e-8
    electrodes: tuple[Electrode, ...] = field(default=(), metadata={"run": True})
    finite_field: int | None = field(default=None, metadata={"run": True})
    kernels: KernelCache = field(default_factory=KernelCache, init=False, repr=False, compare=False)
    blocks: BlockCache = field(default_factory=BlockCache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choices = {
            "conserve": self.balances,
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
        names = [e.name for e in self.electrodes]
        if len(set(names)) < len(names):
            raise InputError(f"two electrodes have one name ({', '.join(names)}): give each its own")
        if self.finite_field is not None:
            controls = [e.control for e in self.electrodes]
            if self.finite_field not in (0, 1, 2) or controls != ["potential", "potential"]:
                raise InputError(
                    f"coulomb.boundary is finite-field with {len(controls)} electrodes, {controls.count('charge')} of "
                    "them at a charge: give two electrodes at potentials, or use a slab boundary"
                )

    @property
    def carries(self) -> bool:
        """Whether the charges that couple to a field stay those of the first structure."""
        return self.response != "all" and self.finite_field is None

    @property
    def dipole_scale(self) -> float:
        """What held charges count in M times their charge."""
        return 1.0

    @property
    def shell_bound(self) -> float:
        """Å; no shell gets this far from its core and stays stable."""
        return self.shell_limit if self.limiter == "fene" else FREE_SHELL_BOUND

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments to build the same model again."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init and not f.metadata}
        out["parameters"] = {k: list(v) for k, v in self.parameters.items()}
        return out

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PQEq:
        """The model that ``config`` describes."""
        table = {k: ElementParameters(*v) for k, v in config["parameters"].items()}
        return cls(**{**config, "parameters": table})

    def tensors(self, system: Systems) -> dict[str, Tensor]:
        """Per-atom parameters [n]: chi (V), eta (eV/e²), Z (e), K (eV/Å²), alpha (Å⁻²), free (bool: not a held charge).

        Raises InputError for an unknown element.
        """
        electrolyte = self._electrolyte(system)
        rows = torch.zeros(system.n_atoms, 5, dtype=torch.float64, device=system.device)
        rows[:, 3:] = 1.0
        rows[electrolyte] = self._element_rows(system.numbers[electrolyte])
        if not bool(electrolyte.all()):
            places, own = electrode_rows(
                system, self.electrodes, self.parameters, self.coulomb_constant, _spring_and_exponent
            )
            rows[places] = own
        out = dict(zip(("chi", "eta", "Z", "K", "alpha"), rows.unbind(1), strict=True))
        out["free"] = self._free(electrolyte)
        return out

    def _electrolyte(self, system: Systems) -> Tensor:
        """[n] bool: atoms of no electrode."""
        if not self.electrodes or system.electrode is None:
            return torch.ones_like(system.batch, dtype=torch.bool)
        return system.electrode < 0

    def _free(self, electrolyte: Tensor) -> Tensor:
        return torch.ones_like(electrolyte)

    def _flowing(self, electrolyte: Tensor) -> Tensor:
        """[n] bool: atoms of the electrolyte whose charges feel a field and are not given."""
        return self._free(electrolyte) & electrolyte

    @property
    def _flows_as(self) -> tuple[str, str, str]:
        """With what charges feel a field; what to set instead where they flow across a cell, or a fragment does."""
        instead = "charges.response to shells"
        return "charges.response all", f"charges.conserve to fragments or {instead}", instead

    def _element_rows(self, numbers: Tensor) -> Tensor:
        """chi, eta, Z, K, alpha [n, 5] of electrolyte atoms."""
        present = sorted(set(numbers.tolist()))
        missing = [chemical_symbols[z] for z in present if chemical_symbols[z] not in self.parameters]
        if missing:
            raise InputError(
                f"no PQEq parameters for {', '.join(missing)}: add a row to charges.parameters (this model knows "
                f"{', '.join(self.parameters)})"
            )
        rows = torch.zeros(max(present, default=0) + 1, 5, dtype=torch.float64)
        for z in present:
            p = self.parameters[chemical_symbols[z]]
            spring, alpha = _spring_and_exponent(p)
            rows[z] = torch.tensor([p.chi, p.eta, p.Z, spring, alpha], dtype=torch.float64)
        return rows.to(numbers.device)[numbers]

    def check_field(self, system: Systems) -> None:
        """Refuses a field or displacement that is not well defined for these boundaries.

        Raises InputError: charges that flow under a field along a periodic direction; a displacement without three
        periodic directions, with electrodes, a net charge, or a field along the same axis; voltages to keep under
        strain without three periodic directions.
        """
        along = torch.einsum("bij,bj->bi", system.cell, system.field).abs() > 1e-12
        if system.field_cell is not None and not bool(system.pbc.all()):
            raise InputError(
                "field_under_strain is reduced, which keeps the voltages across a cell, but the structure is not "
                "periodic in all three directions: set it to uniform"
            )
        if system.displacement is not None:
            self._check_displacement(system, ~system.displacement.isnan())
            along = along | ((system.cell.abs() > 1e-12) & ~system.displacement.isnan()[:, None, :]).any(-1)
        if self.electrodes:
            blocked = torch.einsum("bac,bc->ba", open_directions(system, None), system.field) - system.field
            if bool((blocked.abs() > 1e-12).any()):
                raise InputError(
                    "field along a periodic direction with electrodes: a metal has no end there, its charge would flow "
                    "without end; set that component of field to 0"
                )
        if self.finite_field is not None:
            self._check_finite_field(system)
            along[:, self.finite_field] = True
        elif self.response != "all":
            return
        electrolyte = self._electrolyte(system)
        if not bool((along & system.pbc).any()) or not bool(self._flowing(electrolyte).any()):
            return
        kind = "field" if system.displacement is None else "displacement"
        setting, whole, instead = self._flows_as
        field = f"{kind} along a periodic direction with {setting}"
        if self.finite_field is not None:
            field, instead = "coulomb.boundary finite-field", "coulomb.boundary to a slab"
            whole = f"charges.conserve to fragments or {instead}"
        if self.conserve == "total":
            raise InputError(
                f"{field} and charges.conserve total: charge would flow across the cell without end; set {whole}"
            )
        check_whole(system)
        if bool((percolating(system) & along).any()):
            raise InputError(
                f"{field}, along which a fragment is bonded to its own image: its charge could flow across the cell; "
                f"set {instead}"
            )

    def _check_displacement(self, system: Systems, held: Tensor) -> None:
        """Raises InputError for a constant displacement along axes ``held`` [b, 3] that is not well defined."""
        if not bool(held.any()):
            return
        if bool((held & (system.field != 0)).any()):
            axis = "xyz"[int((held & (system.field != 0)).any(0).nonzero()[0])]
            raise InputError(f"displacement and field are both set along {axis}: keep one of the two along each axis")
        if self.electrodes:
            raise InputError(
                "displacement with electrodes: their charges are the displacement; give them charges, or remove it"
            )
        if not bool(system.pbc[held.any(1)].all()):
            raise InputError(
                "displacement in a structure that is not periodic in all three directions, where the volume in "
                "D = ε + 4πk_e M/V has no meaning: give field instead, or set coulomb.boundary to periodic"
            )
        charged = (held.any(1) & (system.net_charge.abs() > 1e-6)).nonzero()[:, 0]
        if len(charged):
            raise InputError(
                f"charges.net_charge is {float(system.net_charge[charged[0]]):g} e with a displacement, but the "
                "polarization of a charged cell depends on where it is counted from: set it to 0, or give field instead"
            )

    def _check_finite_field(self, system: Systems) -> None:
        """Raises InputError for a structure that a jump of the potential across the cell makes no sense for."""
        if not bool(system.pbc.all()):
            raise InputError(
                "coulomb.boundary finite-field needs a structure that is periodic in all three directions: set pbc to "
                "T T T, or coulomb.boundary to a slab"
            )
        charged = (system.net_charge.abs() > 1e-6).nonzero()[:, 0]
        if len(charged):
            raise InputError(
                f"charges.net_charge is {float(system.net_charge[charged[0]]):g} e with coulomb.boundary finite-field, "
                "whose field would pull the whole cell: set it to 0, or coulomb.boundary to a slab"
            )

    def solve(
        self,
        system: Systems,
        *,
        start: tuple[Tensor, Tensor] | None = None,
        born_charges: bool = False,
        polarizability: bool = False,
        smallest_curvature: bool = False,
        capacitance: bool = False,
    ) -> PQEqSolution:
        """Charges, shells, energy, forces and virial of a batch, from a first guess (q [n], Δ [n, 3]) if given.

        Raises
        ------
        NoStablePointError : the shells or charges have no stable stationary point
        NotConvergedError : the residual stayed above ``tolerance``
        InputError : unknown element, field or boundary that is not well defined
        """
        self.check_field(system)
        functional = Functional(self, system)
        solution = self._minimum(functional, start)
        point = solution.point
        assert isinstance(point, Point)
        self._check(system, point, solution)
        coupled = functional.coupling(point.q)
        coulomb = point.coulomb
        forces = -(coulomb.site_charges[..., None] * coulomb.gradient).sum(0)
        forces = forces + torch.einsum("nab,na->nb", coupled, point.field[system.batch])
        virial = coulomb.virial() + functional.field_virial(point)
        born = alpha = response = None
        if born_charges or polarizability:
            born, alpha, response = responses.to_field(functional, point, self.tolerance)
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
            field=point.field,
            residual=solution.residual,
            iterations=solution.products,
            charge_gradient=point.gradient[:, 0],
            born_charges=born if born_charges else None,
            charge_response=response if born_charges else None,
            polarizability=alpha if polarizability else None,
            smallest_curvature=curvature,
            electrodes=functional.electrode_answers(point),
            capacitance=responses.to_potentials(functional, point, self.tolerance) if capacitance else None,
        )

    def _minimum(self, functional: Functional, guess: tuple[Tensor, Tensor] | None) -> Solution:
        """The stationary point, from a guess or from scratch."""
        if functional.linear:
            solution = self._refined(functional, functional.start(guess))
            if bool(solution.converged.all()):
                return solution
            guess = (solution.y[:, 0], solution.y[:, 1:])
        # a warm start follows its branch; what is new is checked to be a minimum
        check = guess is None and functional.anything_free
        solution = minimize(functional, functional.start(guess), tolerance=self.tolerance, check=check)
        if guess is not None and not bool(solution.converged.all()):
            kept = functional.segments.spread(solution.converged)
            again = torch.where(kept, solution.y, functional.start(None))
            solution = minimize(functional, again, tolerance=self.tolerance)
        if not bool(solution.converged.all()):  # so soft that the coarse operator misleads
            functional.exact_steering = True
            kept = functional.segments.spread(solution.converged)
            again = torch.where(kept, solution.y, functional.start(None))
            solution = minimize(functional, again, tolerance=self.tolerance)
        return solution

    def _refined(self, functional: Functional, y: Tensor) -> Solution:
        """Charges of electrodes by their factorised block, as often as it makes the residual ten times smaller."""
        seg = functional.segments
        point = functional.at(y)
        residual = seg.largest(functional.project(point.gradient))
        products = torch.ones(seg.count, dtype=torch.int64, device=y.device)
        while not bool((residual <= self.tolerance).all()):
            y = functional.step(point)
            point = functional.at(y)
            before, residual = residual, seg.largest(functional.project(point.gradient))
            products += 1
            if not bool((residual < 0.1 * before).any()):
                break
        return Solution(y, point, residual, products, torch.zeros_like(residual <= 0), residual <= self.tolerance)

    def _check(self, system: Systems, point: Point, solution: Solution) -> None:
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
        failed = f"charges did not converge: residual {residual:.1e} V after {int(solution.products[b])} products"
        if self.electrodes and reached == 0.0:
            raise NotConvergedError(
                f"{failed} (asked {self.tolerance:.1e} V); check for atoms on top of each other, or give the "
                "electrodes narrower Gaussians (larger eta): those much wider than the distance of their atoms make "
                "the charge matrix nearly singular"
            )
        raise NotConvergedError(
            f"{failed} (asked {self.tolerance:.1e} V); check the structure near {where}, whose shell is "
            f"{reached:.2f} Å from its core, or give it a stiffer spring (larger K)"
        )


def _spring_and_exponent(p: ElementParameters) -> tuple[float, float]:
    """K (eV/Å², 1 where there is no shell) and α (Å⁻²) of an element."""
    return (p.K / KCAL_PER_EV if p.Z else 1.0), 0.5 * LAMBDA / p.R**2


@dataclass
class FixedCharges(PQEq):
    """Charges that are given (``Systems.carried``) and stay, among electrodes whose charges follow.

    Attributes
    ----------
    widths : symbol -> eta (1/Å), density ∝ exp(−eta² r²); None: points

    ``parameters`` are those of electrodes without eta. Dipole, field and forces are those of the given charges.
    """

    response: str = "frozen"
    widths: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for symbol, eta in (self.widths or {}).items():
            if not (math.isfinite(eta) and eta > 0):
                raise InputError(f"charges.width of {symbol} is {eta:g}: give a positive eta (1/Å)")

    @property
    def carries(self) -> bool:
        return True

    def _free(self, electrolyte: Tensor) -> Tensor:
        return ~electrolyte

    def _element_rows(self, numbers: Tensor) -> Tensor:
        present = sorted(set(numbers.tolist()))
        rows = torch.zeros(max(present, default=0) + 1, 5, dtype=torch.float64)
        rows[:, 3], rows[:, 4] = 1.0, POINT
        for z in present:
            symbol = chemical_symbols[z]
            if self.widths is not None:
                if symbol not in self.widths:
                    raise InputError(
                        f"charges.width has no {symbol} (it has {', '.join(self.widths)}): give its eta (1/Å), or "
                        "charges.width: point"
                    )
                rows[z, 4] = self.widths[symbol] ** 2
        return rows.to(numbers.device)[numbers]
