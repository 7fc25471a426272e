"""What a potential answers, with units; the driver converts, nobody else does."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from voltpi.potential.committee import Members

__all__ = ["Response"]


@dataclass(frozen=True)
class Response:
    """Answer for a batch of ``b`` structures with ``n`` atoms in all (eV, Å, e).

    Attributes
    ----------
    energy : [b], eV, the electric enthalpy: with a uniform field it contains −ε·M, with a constant displacement the
        energy V ε²/(8πk_e) of the field ε = D − 4πk_e M/V in the cell
    forces : [n, 3], eV/Å, exact derivatives of ``energy``
    virial : [b, 3, 3], eV, −∂energy/∂s_ab under r_a -> r_a + s_ab r_b of atoms and cell (stress = −virial/volume). In a
        field it is not symmetric: turning the structure against the field takes work
    charges : [n], e, charge of core and shell together
    shells : [n, 3], Å, displacement of the shell from its core
    dipole : [b, 3], e·Å, −∂energy/∂ε
    field : [b, 3], V/Å, the field that acts: ε where it is given, D − 4πk_e M/V where the displacement is
    energy_terms : name -> [b], eV; they sum to ``energy``
    residual : [b], V, largest stationarity residual of charges and shells (0 without charges)
    iterations : [b], operator applications that the solver used
    electrodes : name -> {"charge": [b] (e), "potential": [b] (V), "residual": [b] (V)}; the last is how far its
        atoms are from one potential
    born_charges : [n, 3, 3] or None, e, ∂M/∂r at fixed field (also where D is held), index order atom, dipole
        direction, direction in which the atom moves
    polarizability : [b, 3, 3] or None, Å³, ∂M/∂ε at fixed nuclei
    capacitance : [b, e, e] or None, e/V, ∂Q_a/∂ψ_b of the electrodes at fixed nuclei
    smallest_curvature : [b] or None, eV/Å², of the shells with the charges relaxed, at constant field or D as the
        run has it; near 0: close to a polarization catastrophe
    members : what the members of a committee say, and their spread; or None
    """

    energy: Tensor
    forces: Tensor
    virial: Tensor
    charges: Tensor
    shells: Tensor
    dipole: Tensor
    field: Tensor
    energy_terms: dict[str, Tensor]
    residual: Tensor
    iterations: Tensor
    electrodes: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    born_charges: Tensor | None = None
    polarizability: Tensor | None = None
    smallest_curvature: Tensor | None = None
    capacitance: Tensor | None = None
    members: Members | None = None
