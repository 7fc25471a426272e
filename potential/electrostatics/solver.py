"""Truncated Newton with preconditioned conjugate gradients for charges and shells together.

Minimises a smooth function of y = (q, Δ) under A δq = 0 (every fragment, or the whole structure, keeps its charge):

    H δy = −g  on the constraint surface, solved only as well as the step needs (Eisenstat & Walker 1996), followed by a
    line search on the energy; a direction of negative curvature is followed downhill (Steihaug 1983).

The solver knows nothing of Coulomb: it asks a ``Functional`` for energy, gradient and Hessian products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Functional", "Point", "Solution", "linear_solve", "minimize"]


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


def linear_solve(
    point: Point, functional: Functional, right: Tensor, *, tolerance: float, max_iterations: int = 500
) -> tuple[Tensor, int, bool]:
    """x with H x = right on the constraint surface to ``tolerance`` (largest residual).

    Returns (x, products, met negative curvature).
    Where the curvature turns negative the iterate so far is returned (or the direction itself, at the first step).
    """
    x = torch.zeros_like(right)
    r = functional.project(right)
    z = functional.precondition(r)
    p = z
    rz = (r * z).sum()
    for k in range(max_iterations):
        if float(r.abs().max()) <= tolerance:
            return x, k, False
        hp = point.product(p)
        curvature = (p * hp).sum()
        if float(curvature) <= 0:
            return (x if k else p), k + 1, True
        step = rz / curvature
        x = x + step * p
        r = r - step * functional.project(hp)
        z = functional.precondition(r)
        rz_new = (r * z).sum()
        p = z + (rz_new / rz) * p
        rz = rz_new
    return x, max_iterations, False


def minimize(functional: Functional, start: Tensor, *, tolerance: float, max_steps: int = 100) -> Solution:
    """Stationary point of the functional nearest downhill from ``start`` [N, 4] (already on the constraint surface).

    ``tolerance`` is the largest residual in V (charges) and V/Å·e (shells).
    """
    y = start
    point = functional.at(y)
    products = 0
    negative = False
    residual = functional.project(point.gradient)
    largest = float(residual.abs().max())
    for _ in range(max_steps):
        if largest <= tolerance:
            break
        point.linearize()
        inner = max(0.3 * tolerance, 0.01 * largest * min(0.1, largest))
        direction, count, negative = linear_solve(point, functional, -residual, tolerance=inner)
        products += count
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
