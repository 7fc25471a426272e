"""VoltPI's PES for i-PI with other ways to find the charges; short range and dispersion stay what the settings say.

In an i-PI input:

    <ffdirect name='voltpi'>
      <pes>custom</pes> <pes_path> schemes.py </pes_path>
      <parameters>{settings: settings.yaml, template: start.xyz, scheme: published}</parameters>
    </ffdirect>

``scheme`` is ``published`` (ReaxNet's: tapered sum, two iterations, forces at fixed charges and shells), ``taper`` (the
same energy, but with its exact gradient) or ``default`` (stationary charges, the shipped code); with the latter
``tolerance`` sets another residual, V.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from voltpi.driver.pes import VoltPI
from voltpi.potential.electrostatics.pqeq import PQEq, PQEqSolution
from voltpi.potential.electrostatics.taper import TaperedPQEq, _BlockState, _Structure, _Sums
from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

__DRIVER_NAME__ = "schemes"
__DRIVER_CLASS__ = "Schemes"


class FixedChargeForces(TaperedPQEq):
    """The forces of the published code: −∂E/∂r at the charges and shells of the last iteration, held fixed."""

    def solve(self, systems: Systems, **_: object) -> PQEqSolution:
        """Charges, shells, energy and these forces, for a batch of one; the virial is of the same kind."""
        (system,) = systems.split()
        structure = _Structure(self, system)
        z, shells = structure.z, torch.zeros_like(system.positions)
        states: list[_BlockState] = [block.at(None) for block in structure.blocks]
        for _k in range(self.iterations):
            q = structure.charges(states)
            shells = structure.clamped(structure.free_shells(states, q))
            states = [block.at(shells) for block in structure.blocks]
        sums = _Sums(system.positions)
        for state in states:
            state.derivatives(sums, q + z, -z)
        spring = structure.stiff[:, None] * shells
        terms = {
            "electronegativity": (structure.chi * q).sum(),
            "hardness": (0.5 * structure.eta * q.square()).sum(),
            "spring": 0.5 * (spring * shells).sum(),
            "coulomb": sums.energy,
        }
        residual = structure._residual(structure.chi + structure.eta * q + sums.charges, spring + sums.shells)
        return PQEqSolution(
            energy=torch.stack(list(terms.values())).sum()[None],
            terms={name: value[None] for name, value in terms.items()},
            forces=-sums.cores,
            virial=0.5 * (sums.virial + sums.virial.T)[None],
            charges=q,
            shells=shells,
            dipole=structure._dipole(q, shells)[None],
            field=structure.field[None],
            residual=residual[None],
            iterations=torch.tensor([self.iterations]),
        )


def charge_model(charges: PQEq, scheme: str, tolerance: float | None = None) -> PQEq | TaperedPQEq:
    """The charge model of a scheme, with the parameters of ``charges``. Raises InputError for another name."""
    if scheme == "default":
        return charges if tolerance is None else dataclasses.replace(charges, tolerance=tolerance)
    options: dict[str, Any] = {"parameters": charges.parameters, "response": charges.response}
    if scheme == "published":
        return FixedChargeForces(cut="cores", **options)  # and its list of pairs, by the distance of cores
    if scheme == "taper":
        return TaperedPQEq(cut="sites", **options)  # continuous where pairs cross the cutoff
    raise InputError(f"scheme is '{scheme}': choose published | taper | default")


class Schemes(VoltPI):
    """The PES: VoltPI's with one more parameter, ``scheme``, and ``tolerance`` for the default."""

    def __init__(self, scheme: str = "default", tolerance: float | None = None, **parameters: Any) -> None:
        super().__init__(**parameters)
        potential = self._evaluator.potential
        potential.charges = charge_model(potential.charges, scheme, tolerance)
