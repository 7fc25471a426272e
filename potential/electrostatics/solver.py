"""Truncated Newton with preconditioned conjugate gradients for charges and shells together.

Minimises a smooth function of y = (q, Δ) under A δq = 0 (every fragment, or the whole structure, keeps its charge):

    H δy = −g  on the constraint surface, solved only as well as the step needs (Eisenstat & Walker 1996), followed by a
    line search on the energy; a direction of negative curvature is followed downhill (Steihaug 1983).

The solver knows nothing of Coulomb: it asks a ``Functional`` for energy, gradient and Hessian products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Functional", "LinearSolution", "Point", "Solution", "linear_solve", "minimize", "negative_direction"]

_PROBES = 200  # products that look for negative curvature; 4 to 6 suffice at a sound minimum
_ESCAPES = 8  # saddle points left on the way down


class Point(Protocol):
    """The functional at one (q, Δ)."""

    energy: Tensor
    gradient: Tensor  # [N, 4]: V (charges), eV/Å (shells)

    def linearize(self) -> None:
        """Prepares Hessian products."""

    def product(self, direction: Tensor) -> Tensor:
        """Hessian times a direction, [N, 4]."""


class Functional(Protocol):
    """Energy of charges and shells of one structure."""

    def at(self, y: Tensor) -> Point:
        """Energy and gradient at y [N, 4]."""

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient with the constraint's multiplier taken off, [N, 4]."""

    def precondition(self, residual: Tensor) -> Tensor:
        """Approximate inverse Hessian times a residual, on the constraint surface, [N, 4]."""

    def scale(self, direction: Tensor) -> Tensor:
        """Inverse of ``precondition`` without the constraint: the size of a direction, [N, 4]."""

    def largest_step(self, y: Tensor, direction: Tensor) -> float:
        """How far y may go along a direction before it leaves where the functional is defined."""


@dataclass(frozen=True)
class Solution:
    """Where the solver stopped."""

    y: Tensor
    point: Point
    residual: float
    products: int
    negative_curvature: bool
    converged: bool


@dataclass(frozen=True)
class LinearSolution:
    """x [N, 4], Hessian products used, whether it converged, whether it met negative curvature."""

    x: Tensor
    products: int
    converged: bool
    negative_curvature: bool


def linear_solve(
    point: Point, functional: Functional, right: Tensor, *, tolerance: float, max_iterations: int = 500
) -> LinearSolution:
    """Solves H x = right on the constraint surface by conjugate gradients, to ``tolerance`` (largest residual).

    Where the curvature turns negative the iterate so far is returned (or the direction itself, at the first step).
    """
    x = torch.zeros_like(right)
    r = functional.project(right)
    z = functional.precondition(r)
    p = z
    rz = (r * z).sum()
    for k in range(max_iterations):
        if float(r.abs().max()) <= tolerance:
            return LinearSolution(x, k, True, False)
        hp = point.product(p)
        curvature = float((p * hp).sum())
        if not math.isfinite(curvature):
            return LinearSolution(x, k + 1, False, False)
        if curvature <= 0:
            return LinearSolution(x if k else p, k + 1, False, True)
        step = rz / curvature
        x = x + step * p
        r = r - step * functional.project(hp)
        z = functional.precondition(r)
        rz_new = (r * z).sum()
        p = z + (rz_new / rz) * p
        rz = rz_new
    return LinearSolution(x, max_iterations, False, False)


def negative_direction(point: Point, functional: Functional, like: Tensor) -> tuple[Tensor | None, int]:
    """A direction of negative curvature at a linearized point, or None at a minimum; and the products it took.

    Conjugate gradients from a fixed right-hand side without symmetry, so that a saddle that the structure's own
    symmetry hides from the gradient is found (a cold start has all shells at zero). Stops where the residual has fallen
    a thousandfold.
    """
    k = torch.arange(like.numel(), dtype=like.dtype, device=like.device).reshape(like.shape)
    r = functional.project(torch.sin(1.0 + 0.7390851332151607 * k * k))
    z = functional.precondition(r)
    p = z
    rz = (r * z).sum()
    first = float(rz)
    for n in range(1, _PROBES + 1):
        hp = point.product(p)
        curvature = float((p * hp).sum())
        if curvature < -1e-6 * float((p * functional.scale(p)).sum()):
            return p, n
        if curvature <= 0:
            return None, n  # a neutral mode
        step = rz / curvature
        r = r - step * functional.project(hp)
        z = functional.precondition(r)
        rz_new = (r * z).sum()
        if float(rz_new) < 1e-6 * first:
            return None, n
        p = z + (rz_new / rz) * p
        rz = rz_new
    return None, _PROBES


def minimize(
    functional: Functional, start: Tensor, *, tolerance: float, check: bool = True, max_steps: int = 100
) -> Solution:
    """Minimum of the functional nearest downhill from ``start`` [N, 4] (already on the constraint surface).

    ``tolerance`` is the largest residual in V (charges) and V/Å·e (shells). With ``check`` a stationary point is
    accepted only where no direction of negative curvature leads on; the solver follows such a direction downhill.
    """
    solution = _descend(functional, start, tolerance, max_steps)
    products = solution.products
    for _ in range(_ESCAPES if check else 0):
        if not solution.converged:
            break
        solution.point.linearize()
        p, count = negative_direction(solution.point, functional, solution.y)
        products += count
        if p is None:
            break
        p = p * (0.01 / float(p.abs().max()))
        if float((p * solution.point.gradient).sum()) > 0:
            p = -p
        p = p * min(1.0, 0.5 * functional.largest_step(solution.y, p))
        solution = _descend(functional, solution.y + p, tolerance, max_steps)
        products += solution.products
    else:
        if check:
            solution = replace(solution, converged=False, negative_curvature=True)
    return replace(solution, products=products)


def _descend(functional: Functional, start: Tensor, tolerance: float, max_steps: int) -> Solution:
    """Truncated Newton from a start to the nearest stationary point downhill."""
    y = start
    point = functional.at(y)
    products = 0
    negative = False
    residual = functional.project(point.gradient)
    largest = float(residual.abs().max())
    for _ in range(max_steps):
        if largest <= tolerance or not math.isfinite(largest):
            break
        point.linearize()
        inner = max(0.3 * tolerance, 0.01 * largest * min(0.1, largest))
        step = linear_solve(point, functional, -residual, tolerance=inner)
        direction, negative = step.x, step.negative_curvature
        products += step.products
        slope = float((residual * direction).sum())
        if slope > 0:
            direction, slope = -direction, -slope
        length = min(1.0, 0.9 * functional.largest_step(y, direction))
        noise = 1e-13 * max(1.0, abs(float(point.energy)))
        accepted = False
        for _ in range(30):
            trial = functional.at(y + length * direction)
            fall = float(trial.energy - point.energy)
            if fall <= 1e-4 * length * slope + noise:
                accepted = True
                break
            length *= 0.5
        if not accepted:
            break
        y, point = y + length * direction, trial
        residual = functional.project(point.gradient)
        new = float(residual.abs().max())
        if new >= largest and abs(slope) < noise and not negative:
            largest = new
            break  # at the rounding floor
        largest = new
    return Solution(y, point, largest, products, negative, largest <= tolerance)
