"""Charge equilibration whose element parameters are learnt together with a network.

The network is trained on labels that still contain the charges:

    E = E_network + Ω(θ),   F = F_network − ∂Ω/∂r,   σ = σ_network + (1/V) ∂Ω/∂strain

all at the stationary charges and shells of the present θ = (χ, η, R, K of the elements), through which the loss is
differentiated (:mod:`voltpi.potential.electrostatics.implicit`): one more linear solve a step for all labels together.
Everything here is in float64 on the CPU, whatever the network is trained in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from voltpi.potential.electrostatics.explicit import ExplicitFunctional
from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.implicit import DifferentiablePQEq
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.training.charge_fit import (
    CHI_SCALE,
    TRAINABLE,
    ElementTable,
    Target,
    joined,
    label_squares,
    make_target,
    squared_errors,
)
from voltpi.potential.training.dataset import Sample

__all__ = ["ChargePart", "Charged", "JointCharges"]


class Charged(NamedTuple):
    """One structure with the labels of its charges, and its number among those that are trained and validated on."""

    number: int
    target: Target


class ChargePart(NamedTuple):
    """energy [b] (eV) · forces [n, 3] (eV/Å) · strain ∂Ω/∂strain [b, 3, 3] (eV, 0 where not asked for) · misfit [b]:
    Σ over kinds of label of weight |ours − label|² / ⟨|label|²⟩, with the mean over all structures."""

    energy: Tensor
    forces: Tensor
    strain: Tensor
    misfit: Tensor


class JointCharges(nn.Module):
    """The charges of ``model``, with a table of parameters that is trained.

    Parameters
    ----------
    model : settings and the table to start from
    samples : what is trained on: their elements are those of the table, their labels the scale of the misfit
    trained : which parameters change, of :data:`~voltpi.potential.training.charge_fit.TRAINABLE`
    weights : ``dipole``, ``polarizability``, ``born_charges`` -> weight of the relative squared error in the loss
    prior : weight of :meth:`ElementTable.drift` in the loss
    rate : learning rate of the table over that of the network, χ in units of 5 eV (``CHI_SCALE``)

    Raises InputError where no sample has a label that has a weight, and as :class:`ElementTable`.
    """

    def __init__(
        self,
        model: PQEq,
        samples: Sequence[Sample],
        *,
        trained: Sequence[str] = TRAINABLE,
        weights: Mapping[str, float] | None = None,
        prior: float = 1e-4,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        numbers = sorted({z for sample in samples for z in sample.systems.numbers.tolist()})
        self.elements = ElementTable(model.parameters, [chemical_symbols[z] for z in numbers], trained)
        self.model, self.prior, self.rate = model, prior, rate
        # per kind of parameter: a step of the optimizer is as long in all of them, and χ is in eV
        self.rates = {name: rate * CHI_SCALE if name == "chi" else rate for name in self.elements.trained}
        self._scales: dict[str, float] = {}
        if asked := {kind: weight for kind, weight in (weights or {}).items() if weight}:
            squares = label_squares([make_target(model, sample) for sample in samples], asked)
            self._scales = {kind: asked[kind] * len(samples) / square for kind, square in squares.items()}
        self._answers: list[Tensor] = []  # the last (q, Δ) [n, 4] of every structure; NaN: none yet

    @property
    def trained_model(self) -> PQEq:
        """The charges with the table as it is now."""
        return dataclasses.replace(self.model, parameters={**self.model.parameters, **self.elements.table()})

    def add(self, sample: Sample) -> Charged:
        """A structure, from now on known by its number.

        Raises InputError that names file and frame for a field that not all charges feel, and for boundaries that
        :class:`ExplicitFunctional` does not have.
        """
        target = make_target(self.model, sample)
        try:
            ExplicitFunctional(Functional(self.model, target.systems))
        except InputError as error:
            raise InputError(f"{sample.path}, frame {sample.frame}: {error}") from error
        self._answers.append(torch.full((target.systems.n_atoms, 4), torch.nan, dtype=torch.float64))
        return Charged(len(self._answers) - 1, target)

    def forward(self, structures: Sequence[Charged], *, stress: bool) -> ChargePart:
        """What the charges of some structures do, with a graph to the table.

        The solver starts from the last answer of each. Raises NoStablePointError and NotConvergedError where the table
        has no stationary point (or a saddle) for one of them.
        """
        clusters = [k for k, one in enumerate(structures) if not bool(one.target.systems.pbc.any())]
        # cells one by one: their sums share nothing
        cells = [[k] for k in range(len(structures)) if k not in clusters]
        found: dict[int, ChargePart] = {}
        for group in [clusters, *cells] if clusters else cells:
            part = self._solve([structures[k] for k in group], stress)
            counts = [structures[k].target.systems.n_atoms for k in group]
            for i, (k, forces) in enumerate(zip(group, part.forces.split(counts), strict=True)):
                found[k] = ChargePart(part.energy[i], forces, part.strain[i], part.misfit[i])
        ordered = [found[k] for k in range(len(structures))]
        return ChargePart(
            energy=torch.stack([p.energy for p in ordered]),
            forces=torch.cat([p.forces for p in ordered]),
            strain=torch.stack([p.strain for p in ordered]),
            misfit=torch.stack([p.misfit for p in ordered]),
        )

    def _solve(self, structures: Sequence[Charged], stress: bool) -> ChargePart:
        batch = joined([one.target for one in structures])
        last = torch.cat([self._answers[one.number] for one in structures])
        start = None if bool(last.isnan().any()) else (last[:, 0], last[:, 1:])
        answer = DifferentiablePQEq(
            self.model,
            batch.systems,
            {**self.model.parameters, **self.elements.table()},
            self.elements.rows(batch.systems.numbers),
            start,
        )
        if stress:
            forces, virial = answer.forces_and_virial()
        else:
            forces, virial = answer.forces, torch.zeros_like(batch.systems.cell)
        energy = answer.energy
        misfit = torch.zeros_like(energy)
        for kind, squares in squared_errors(answer, batch, self._scales).items():
            misfit = misfit + self._scales[kind] * squares
        own = answer.y.detach().split([one.target.systems.n_atoms for one in structures])
        for one, y in zip(structures, own, strict=True):
            self._answers[one.number] = y.clone()
        return ChargePart(energy, forces, -virial, misfit)

    def forget(self, structures: Sequence[Charged]) -> None:
        """Lets the solver start anew where it did not get on from its last answers."""
        for one in structures:
            self._answers[one.number] = torch.full_like(self._answers[one.number], torch.nan)

    # -- what a resumed run needs besides the parameters -----------------------------------------------------------

    def answers(self) -> Tensor:
        """The last (q, Δ) of all structures, one after the other."""
        return torch.cat(self._answers)

    def take_answers(self, answers: Tensor) -> None:
        """Puts what :meth:`answers` gave in place."""
        self._answers = [part.clone() for part in answers.split([len(y) for y in self._answers])]
