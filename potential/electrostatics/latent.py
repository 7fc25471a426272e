"""Latent charges (Latent Ewald Summation): a network reads the charges off the surroundings of every atom.

Cheng, npj Comput. Mater. 11, 80 (2025); Kim et al., J. Chem. Theory Comput. 21 (2025); Born charges: Zhong et al.,
arXiv:2504.05169 (2025). Charges have Gaussian densities ∝ exp(−r²/σ²), so that two of them interact through
k_e erf(r/√2σ)/r; no charge interacts with itself, but with its periodic images it does. The sum is that of PQEq
(:mod:`voltpi.potential.electrostatics.ewald`): open, slab and periodic alike, among electrodes too.

What the network gives is shifted evenly, over the structure or over every fragment (``conserve``), so that the net
charge is met. With q(r) the energy is Ω(q(r), r) + short range, and its forces −∂Ω/∂r − (∂q/∂r)ᵀ ∂Ω/∂q.

Learned from forces, latent charges are those that a medium of frozen nuclei has screened: charges in a field are
√ε∞ times larger, M = √ε∞ Σ q r. In a field along a periodic direction M has to be one number, so charges must stay
within fragments there; Born charges ∂M/∂r need no such thing (:func:`add_charge_motion`).

With ``conserve: neighbors`` no even shift is needed: charge is exchanged between neighbours
(:func:`voltpi.potential.shortrange.latent.exchanged`), so that what an atom does stays near it, as in an insulator, and
M is a function of the positions in any cell: fields pull along all directions. Net charge is spread evenly.

With ``relaxation`` the network's charges q⁰ are those of atoms by themselves, and q minimises
½ Σ η (q − q⁰)² + E_coulomb(q) − ε·M (electronegativities −η q⁰ in PQEq's functional without shells): charges then
answer to each other, to fields and to electrodes, and √ε∞ is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from voltpi.potential.electrostatics.pqeq import ElementParameters, FixedCharges, PQEq, PQEqSolution
from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

__all__ = ["LatentCharges", "add_charge_motion", "even_shift"]


@dataclass
class LatentCharges(FixedCharges):
    """Charges that a network gives (``Systems.carried``), which change with the positions.

    Attributes
    ----------
    conserve : what the charges are shifted to add up to: the structure's net charge (``total``) or that of every
        fragment (``fragments``); or ``neighbors``, between which charge is exchanged
    sigma : Å, width of the Gaussian density ∝ exp(−r²/σ²)
    epsilon_infinity : relative permittivity at fixed nuclei of what the model was trained on
    relaxation : whether charges relax from what the network gives, against the hardness of ``parameters``

    ``parameters`` are also those of electrodes without eta.
    """

    balances: ClassVar[tuple[str, ...]] = ("total", "fragments", "neighbors")
    response: str = "all"
    sigma: float = 1.0
    epsilon_infinity: float = 1.0
    relaxation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, fix in (
            ("sigma", self.sigma, "give the width of the Gaussians in Å, as 1.0"),
            ("epsilon_infinity", self.epsilon_infinity, "give the permittivity at fixed nuclei, 1 for a molecule"),
        ):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"charges.{key} is {value:g}: {fix}")
        if self.relaxation and self.exchanges:
            raise InputError("charges.conserve is neighbors with charges.relaxation: set it to total or fragments")
        if self.relaxation and self.epsilon_infinity != 1:
            raise InputError(
                f"charges.epsilon_infinity is {self.epsilon_infinity:g} with charges.relaxation, which screens by "
                "itself: set it to 1"
            )

    @property
    def carries(self) -> bool:
        return False

    @property
    def exchanges(self) -> bool:
        """Whether charge is exchanged between neighbours."""
        return self.conserve == "neighbors"

    @property
    def screening(self) -> float:
        """√ε∞, what the charges count in a field."""
        return math.sqrt(self.epsilon_infinity)

    @property
    def dipole_scale(self) -> float:
        return 0.0 if self.exchanges else self.screening  # the network itself gives the moment of exchanged charges

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able arguments to build the same model again."""
        names = ("conserve", "sigma", "epsilon_infinity", "relaxation", "accuracy", "coulomb_constant", "tolerance")
        own = {"kind": "latent", **{name: getattr(self, name) for name in names}}
        return own | ({"parameters": {k: list(v) for k, v in self.parameters.items()}} if self.relaxation else {})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentCharges:
        """The model that ``config`` describes."""
        own = {k: v for k, v in config.items() if k != "kind"}
        if "parameters" in own:
            own["parameters"] = {k: ElementParameters(*v) for k, v in own["parameters"].items()}
        return cls(**own)

    def _free(self, electrolyte: Tensor) -> Tensor:
        return torch.ones_like(electrolyte) if self.relaxation else ~electrolyte

    def _flowing(self, electrolyte: Tensor) -> Tensor:
        return torch.zeros_like(electrolyte) if self.exchanges else electrolyte

    def check_field(self, system: Systems) -> None:
        """As of PQEq, but exchanged charges refuse what needs M within the functional. Raises InputError."""
        super().check_field(system)
        if not self.exchanges:
            return
        for given, key in (
            (system.displacement is not None, "displacement"),
            (system.field_cell is not None, "field_under_strain: reduced"),
            (self.finite_field is not None, "coulomb.boundary: finite-field"),
        ):
            if given:
                raise InputError(f"{key} is not available with charges.conserve: neighbors; remove it")
        along = (torch.einsum("bij,bj->bi", system.cell, system.field).abs() > 1e-12) & system.pbc
        if bool((system.net_charge[along.any(1)] != 0).any()):
            raise InputError(
                "a field along a periodic direction would pull a structure with a net charge without end: set "
                "charges.net_charge to 0, or that component to 0"
            )

    @property
    def _flows_as(self) -> tuple[str, str, str]:
        whole = "model to one that was trained with charges.conserve: fragments, or that component to 0"
        return "charges.model latent", whole, "that component to 0"

    def _element_rows(self, numbers: Tensor) -> Tensor:
        rows = torch.zeros(len(numbers), 5, dtype=torch.float64, device=numbers.device)
        if self.relaxation:
            rows[:, 1] = PQEq._element_rows(self, numbers)[:, 1]
        rows[:, 3], rows[:, 4] = 1.0, self.sigma**-2
        return rows

    def tensors(self, system: Systems) -> dict[str, Tensor]:
        """As of PQEq, with electronegativities −η q⁰ where charges relax."""
        out = super().tensors(system)
        if self.relaxation:
            out["chi"] = torch.where(self._electrolyte(system), -out["eta"] * self._given(system), out["chi"])
        return out

    def hardness(self, system: Systems) -> Tensor | None:
        """η [n] (eV/e²) of charges that relax, None where they do not."""
        return self._element_rows(system.numbers)[:, 1] if self.relaxation else None

    def _given(self, system: Systems) -> Tensor:
        if system.carried is None:
            raise InputError(
                "charges.model is latent but the structure brings no charges: evaluate it with its network"
            )
        return system.carried

    def solve(self, system: Systems, **options: Any) -> PQEqSolution:
        """As of PQEq; ``charge_gradient`` and ``charge_response`` are those of what the network gives.

        Raises as PQEq, and InputError for Born charges where relaxing charges flow across a cell.
        """
        if not self.relaxation:
            return super().solve(system, **options)
        if options.get("born_charges") and self.conserve == "total" and bool(system.pbc.any()):
            raise InputError(
                "output.born_charges with charges.relaxation and charges.conserve total in a cell: charge "
                "would flow across the cell without end; use a model that was trained with charges.conserve: fragments"
            )
        solution = super().solve(system, **options)
        kept = self._electrolyte(system)
        eta = torch.where(kept, self.tensors(system)["eta"], 0.0)
        given = torch.where(kept, self._given(system), 0.0)
        constant = torch.zeros_like(solution.energy).index_add_(0, system.batch, 0.5 * eta * given.square())
        response = solution.charge_response
        return dataclasses.replace(
            solution,
            energy=solution.energy + constant,
            terms={**solution.terms, "latent": constant},
            charge_gradient=eta * (given - solution.charges),
            charge_response=None if response is None else eta[:, None] * response,
        )

    def constrained(self, system: Systems, latent: Tensor) -> Tensor:
        """Charges [n] (e) from what the network gives [n], shifted to add up; 0 on electrodes.

        Raises InputError where ``conserve`` is fragments and the structure has none.
        """
        group, totals = self.groups(system)
        kept = self._electrolyte(system)
        latent = torch.where(kept, latent, 0.0)
        # what is exchanged adds up already
        shift = even_shift(torch.zeros_like(latent) if self.exchanges else latent, group, totals, kept)
        return torch.where(kept, latent + shift, 0.0)

    def groups(self, system: Systems) -> tuple[Tensor, Tensor]:
        """Group of every atom [n] and what its charges add up to [groups]. Raises InputError as ``constrained``."""
        if self.conserve != "fragments":
            return system.batch, system.net_charge
        if system.fragments is None or system.fragment_charges is None:
            raise InputError("charges.conserve is fragments but the structure has none: prepare it first")
        return system.fragments, system.fragment_charges

    def unconstrained(self, system: Systems, gradient: Tensor) -> Tensor:
        """∂/∂(what the network gives) [n] of what has ``gradient`` [n] in the charges: the transpose of the shift."""
        if self.exchanges:
            return torch.where(self._electrolyte(system), gradient, 0.0)
        neutral = system.replace(net_charge=torch.zeros_like(system.net_charge))
        if system.fragment_charges is not None:
            neutral = neutral.replace(fragment_charges=torch.zeros_like(system.fragment_charges))
        return self.constrained(neutral, gradient)


def even_shift(charges: Tensor, group: Tensor, totals: Tensor, kept: Tensor | None = None) -> Tensor:
    """What every atom [n] (e) gets for ``charges`` [n] to add up to ``totals`` [groups] in every ``group`` [n].

    ``kept`` [n] : which atoms share; all by default.
    """
    sharing = torch.ones_like(charges) if kept is None else kept.to(charges.dtype)
    sums = torch.zeros_like(totals).index_add(0, group, charges)
    counts = torch.zeros_like(totals).index_add(0, group, sharing).clamp(min=1)
    return ((totals - sums) / counts)[group] * sharing


def add_charge_motion(
    model: LatentCharges, system: Systems, solution: PQEqSolution, moved: Callable[[Tensor], Tensor]
) -> Tensor:
    """Born charges [n, 3, 3] (e): those of charges that ride along, and what their change with the positions adds.

    ``moved(c [n])`` is ∂(Σ c_j q_j)/∂r [n, 3] for constant c. Where charges stay within fragments, or along open
    directions, M = √ε∞ Σ q r is one number and this is its derivative. Elsewhere the charges that move to atom i count
    by the long-wavelength form of their distance, along lattice vector a: (a/2π) sin 2π(s_j − s_i) for r_j − r_i
    (Zhong et al., with k = 2π/a), which knows no origin and no cell boundary; it is exact for charges that come from
    nearby. Σ_i Z*_i is then set right evenly.
    """
    assert solution.born_charges is not None
    assert solution.charge_response is not None
    born, lever = solution.born_charges.clone(), solution.charge_response
    if model.conserve == "fragments" or model.exchanges or model.relaxation:
        for a in range(3):
            born[:, a] += moved(lever[:, a])
        return born
    inverse = torch.linalg.pinv(system.cell * system.pbc[..., None])[system.batch]  # no component along open directions
    scaled = torch.einsum("nb,nbd->nd", system.positions, inverse)
    vectors = model.screening * system.cell[system.batch]  # [n, d, 3]
    lever = lever - torch.einsum("nd,nda->na", scaled * system.pbc[system.batch], vectors)
    for a in range(3):
        born[:, a] += moved(lever[:, a])
    angle = 2 * math.pi * scaled
    for d in range(3):
        periodic = system.pbc[system.batch, d]
        if not bool(periodic.any()):
            continue
        sine, cosine = torch.sin(angle[:, d]), torch.cos(angle[:, d])
        near = cosine[:, None] * moved(sine * periodic) - sine[:, None] * moved(cosine * periodic)
        born += vectors[:, d, :, None] * near[:, None, :] / (2 * math.pi)
    if system.electrode is None:
        count = torch.bincount(system.batch, minlength=system.n_systems)
        total = torch.zeros_like(system.cell).index_add_(0, system.batch, born)
        eye = torch.eye(3, dtype=born.dtype, device=born.device)
        wanted = model.screening * system.net_charge[:, None, None] * eye
        born += ((wanted - total) / count[:, None, None])[system.batch]
    return born
