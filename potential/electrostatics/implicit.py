"""Answers of charge equilibration as functions of its parameters that torch can differentiate.

The stationary point y*(θ), ∂Ω/∂y = 0 on the constraint surface, and the responses X_a = H⁻¹U_a to the three fields
(U_a = ∂M_a/∂y) are found by the operator of a run. Their derivatives follow from the implicit function theorem:

    λ = H⁻¹ ∂L/∂y:        dL/dθ = ∂L/∂θ − λᵀ ∂²Ω/∂y∂θ
    μ_a = H⁻¹ ∂L/∂X_a:    dL/d(y, θ) = ∂L/∂(y, θ) − Σ_a ∂/∂(y, θ) [μ_aᵀ H X_a]

one linear solve each on the constraint surface, as nodes of torch's graph; everything between them (energy, forces,
virial, dipole, polarizability, Born charges) is
:class:`~voltpi.potential.electrostatics.explicit.ExplicitFunctional`. The energy needs no adjoint: at the stationary
point its derivative is the partial one (Hellmann–Feynman).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from voltpi.potential.electrostatics.explicit import ExplicitFunctional, Rows
from voltpi.potential.electrostatics.functional import Functional, Point
from voltpi.potential.electrostatics.pqeq import ElementParameters, PQEq
from voltpi.potential.electrostatics.solver import linear_solve, minimize
from voltpi.potential.errors import NoStablePointError, NotConvergedError
from voltpi.potential.systems import Systems

__all__ = ["DifferentiablePQEq"]

_RESPONSE_TOLERANCE = 1e-9  # largest residual of a linear solve over the largest element of its right-hand side


class DifferentiablePQEq:
    """Charge equilibration of ``systems`` at a table of parameters, differentiable in the rows of its atoms.

    Parameters
    ----------
    model : settings, whose parameters are replaced by ``table``
    systems : prepared (with fragments, where the charges keep them); clusters and cells periodic in three directions
    table : symbol -> ElementParameters, the numbers that ``rows`` hold
    rows : the same for every atom [n], as tensors that may require gradients
    start : (q [n], Δ [n, 3]) of the same structures at nearby parameters

    Raises InputError, NoStablePointError and NotConvergedError as ``PQEq.solve``, and InputError for boundaries and
    electrodes that :class:`ExplicitFunctional` does not have.
    """

    def __init__(
        self,
        model: PQEq,
        systems: Systems,
        table: dict[str, ElementParameters],
        rows: Rows,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.rows, self._problem = rows, _Problem(dataclasses.replace(model, parameters=table), systems, start)
        self.y: Tensor = cast(Any, _Stationary).apply(self._problem, *rows)
        self._positions = systems.positions.clone().requires_grad_()

    @property
    def energy(self) -> Tensor:
        """Ω [b], eV."""
        return self._problem.explicit.energy(self.y.detach(), self._problem.positions, self.rows)

    @property
    def dipole(self) -> Tensor:
        """M [b, 3], e Å."""
        return self._problem.explicit.dipole(self.y, self._problem.positions)

    @property
    def forces(self) -> Tensor:
        """−∂Ω/∂r at fixed charges and shells, [n, 3], eV/Å."""
        energy = self._problem.explicit.energy(self.y, self._positions, self.rows)
        return -torch.autograd.grad(energy.sum(), self._positions, create_graph=True)[0]

    def forces_and_virial(self) -> tuple[Tensor, Tensor]:
        """The forces and −∂Ω/∂strain at fixed charges and shells [b, 3, 3] (eV), as ``PQEq.solve`` has them."""
        strain = torch.zeros_like(self._problem.functional.system.cell).requires_grad_()
        energy = self._problem.explicit.energy(self.y, self._positions, self.rows, strain)
        pulled, stretched = torch.autograd.grad(energy.sum(), (self._positions, strain), create_graph=True)
        return -pulled, -stretched

    def responses(self, *, born_charges: bool = False) -> tuple[Tensor, Tensor | None]:
        """Polarizability [b, 3, 3] (Å³) and Born charges [n, 3, 3] (e; atom, dipole, displacement) at fixed field."""
        problem = self._problem
        answers: Tensor = cast(Any, _Response).apply(problem, self.y, *self.rows)
        alpha = torch.stack([problem.functional.moved(answer) for answer in answers], dim=2)
        alpha = 0.5 * (alpha + alpha.transpose(1, 2)) * problem.functional.model.coulomb_constant
        if not born_charges:
            return alpha, None
        slopes = problem.slopes(self.y, self._positions, self.rows)
        born = []
        for a, answer in enumerate(answers):
            (pulled,) = torch.autograd.grad((slopes * answer).sum(), self._positions, create_graph=True)
            direct = torch.zeros_like(pulled)
            direct[:, a] = 1.0
            born.append(self.y[:, :1] * direct - pulled)
        return alpha, torch.stack(born, dim=1)


class _Problem:
    """The stationary point as numbers, and derivatives there; nodes of a graph hold it, so it holds no graph."""

    def __init__(self, model: PQEq, systems: Systems, start: tuple[Tensor, Tensor] | None) -> None:
        self.positions = systems.positions
        model.check_field(systems)
        self.functional = Functional(model, systems)
        self.explicit = ExplicitFunctional(self.functional)
        solution = minimize(
            self.functional, self.functional.start(start), tolerance=model.tolerance, check=start is None
        )
        self.y = solution.y
        if not bool(solution.converged.all()):
            answer = model.solve(systems)
            self.y = torch.cat([answer.charges[:, None], answer.shells], dim=1)
        self.point: Point = self.functional.at(self.y)
        self.point.linearize()

    def slopes(self, y: Tensor, positions: Tensor, rows: Rows) -> Tensor:
        """∂ΣΩ/∂y [n, 4] at a y that requires gradients, to be differentiated further."""
        return torch.autograd.grad(self.explicit.energy(y, positions, rows).sum(), y, create_graph=True)[0]

    def inverse(self, right: Tensor) -> Tensor:
        """H⁻¹ times a right-hand side [n, 4], on the constraint surface."""
        segments = self.functional.segments
        size = segments.spread(segments.largest(right).clamp(min=1e-300))
        answer = linear_solve(self.point, self.functional, right / size, tolerance=_RESPONSE_TOLERANCE)
        if bool(answer.negative_curvature.any()):
            raise NoStablePointError(
                "charges and shells are at a saddle point, where they have no derivatives: give stiffer parameters "
                "(larger K or eta)"
            )
        if not bool(answer.converged.all()):
            raise NotConvergedError(
                f"the derivatives of the charges did not converge in {int(answer.products.max())} products: check the "
                "structure"
            )
        return answer.x * size

    def field_slopes(self) -> Tensor:
        """U = ∂M/∂y [3, n, 4]."""
        f = self.functional
        out = f.lever.new_zeros(3, len(f.z), 4)
        for a in range(3):
            out[a, :, 0] = f.lever[:, a]
            out[a, :, 1 + a] = -f.shell_coupling * f.z
        return out


class _Stationary(torch.autograd.Function):
    """y* [n, 4] of the rows."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *rows: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(*rows)
        return problem.y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        problem: _Problem = ctx.problem
        adjoint = problem.inverse(grad)
        with torch.enable_grad():
            y = problem.y.detach().requires_grad_()
            rows = Rows(*(row.detach().requires_grad_() for row in ctx.saved_tensors))
            slope = (problem.slopes(y, problem.positions, rows) * adjoint).sum()
            return None, *(-g for g in torch.autograd.grad(slope, rows))


class _Response(torch.autograd.Function):
    """X = H⁻¹U [3, n, 4] of y and the rows."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, y: Tensor, *rows: Tensor) -> Tensor:
        answers = torch.stack([problem.inverse(u) for u in problem.field_slopes()])
        ctx.problem = problem
        ctx.save_for_backward(answers, y, *rows)
        return answers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        problem: _Problem = ctx.problem
        answers, y, *saved = ctx.saved_tensors
        adjoint = [problem.inverse(g) for g in grad]
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            rows = Rows(*(row.detach().requires_grad_() for row in saved))
            slopes = problem.slopes(y, problem.positions, rows)
            curved = torch.zeros_like(slopes[0, 0])
            for mu, x in zip(adjoint, answers, strict=True):
                curved = curved + (torch.autograd.grad((slopes * x).sum(), y, create_graph=True)[0] * mu).sum()
            return None, *(-g for g in torch.autograd.grad(curved, (y, *rows), materialize_grads=True))
