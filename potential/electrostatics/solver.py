"""Truncated Newton with preconditioned conjugate gradients for charges and shells together, batched.

Minimises, for every structure of a batch by itself, a smooth function of y = (q, Δ) under A δq = 0 (every fragment, or
the whole structure, keeps its charge):

    H δy = −g  on the constraint surface, solved only as well as the step needs (Eisenstat & Walker 1996), followed by a
    line search on the energy; a direction of negative curvature is followed downhill (Steihaug 1983).

Every structure has its own step lengths and its own convergence; one that has converged stays where it is while the
others go on. Nothing inside the conjugate gradients waits for the device: whether all have converged is asked every
``_ASK_EVERY`` iterations there.

The solver knows nothing of Coulomb: it asks a ``Functional`` for energy, gradient and Hessian products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "HESSIAN_ACCURACY",
    "Functional",
    "LinearSolution",
    "Point",
    "Segments",
    "Solution",
    "conjugate_gradients",
    "linear_solve",
    "minimize",
    "negative_direction",
]

_PROBES = 200  # products that look for negative curvature; 4 to 6 suffice at a sound minimum
_ESCAPES = 8  # saddle points left on the way down
HESSIAN_ACCURACY = 1e-3
"""Relative error of ``Point.product``: a Newton step reduces the residual to about this."""
DENSE_BELOW = 64
"""Atoms; one smaller structure whose Hessian is at hand is solved directly. One step, one core, against conjugate
gradients: 6 atoms 0.08 ms against 0.84, 19 atoms 0.12 against 0.58, 38 atoms 0.27 against 0.96, 76 atoms 1.65
against 2.04."""
_PENALTY = 1e3
_ASK_EVERY = 8  # iterations on a GPU between two questions whether to go on


class Segments:
    """Sums and maxima over the atoms of every structure of a batch; ``batch`` [n] ascending, ``count`` structures."""

    def __init__(self, batch: Tensor, count: int) -> None:
        self.batch, self.count = batch, count

    def sum(self, values: Tensor) -> Tensor:
        """[n, …] -> [b], over atoms and all further axes."""
        if self.count == 1:
            return values.sum().reshape(1)
        flat = values.reshape(len(values), -1).sum(1)
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).index_add_(0, self.batch, flat)

    def largest(self, values: Tensor) -> Tensor:
        """Largest absolute value, [n, …] -> [b]; NaN where one is."""
        flat = values.reshape(len(values), -1).abs().amax(1)
        if self.count == 1:
            return flat.amax().reshape(1)
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).scatter_reduce(
            0, self.batch, flat, "amax"
        )

    def smallest(self, values: Tensor) -> Tensor:
        """Smallest value, [n] -> [b]."""
        if self.count == 1:
            return values.amin().reshape(1)
        start = torch.full((self.count,), torch.inf, dtype=values.dtype, device=values.device)
        return start.scatter_reduce(0, self.batch, values, "amin")

    def spread(self, values: Tensor) -> Tensor:
        """[b] -> [n, 1]."""
        return values.expand(len(self.batch))[:, None] if self.count == 1 else values[self.batch][:, None]


class Point(Protocol):
    """The functional at one (q, Δ)."""

    energy: Tensor  # [b], eV
    gradient: Tensor  # [n, 4]: V (charges), eV/Å (shells)

    def linearize(self) -> None:
        """Prepares Hessian products."""

    def product(self, direction: Tensor) -> Tensor:
        """Hessian times a direction, [n, 4]; an approximation, good to ``HESSIAN_ACCURACY``, that steers."""

    def exact_product(self, direction: Tensor) -> Tensor:
        """Hessian times a direction, [n, 4]."""

    def matrix(self) -> Tensor | None:
        """The Hessian [4n, 4n], where it is at hand."""


class Functional(Protocol):
    """Energy of charges and shells of a batch of structures."""

    segments: Segments

    def at(self, y: Tensor) -> Point:
        """Energy and gradient at y [n, 4]."""

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient with the constraint's multiplier taken off, [n, 4]."""

    def precondition(self, residual: Tensor) -> Tensor:
        """Approximate inverse Hessian times a residual, on the constraint surface, [n, 4]."""

    def constraints(self) -> Tensor:
        """Rows A [constraints, 4n]: A δy = 0."""

    def scale(self, direction: Tensor) -> Tensor:
        """Inverse of ``precondition`` without the constraint: the size of a direction, [n, 4]."""

    def largest_step(self, y: Tensor, direction: Tensor) -> Tensor:
        """How far y may go along a direction before it leaves where the functional is defined, [b]."""


@dataclass(frozen=True)
class Solution:
    """Where the solver stopped: y [n, 4], and for every structure [b] residual, products, and whether it converged."""

    y: Tensor
    point: Point
    residual: Tensor
    products: Tensor
    negative_curvature: Tensor
    converged: Tensor


@dataclass(frozen=True)
class LinearSolution:
    """x [n, 4]; for every structure [b] the products used, whether it converged, whether it met negative curvature."""

    x: Tensor
    products: Tensor
    converged: Tensor
    negative_curvature: Tensor


def linear_solve(
    point: Point, functional: Functional, right: Tensor, *, tolerance: float, max_rounds: int = 12
) -> LinearSolution:
    """Solves H x = right on the constraint surface to ``tolerance`` (largest residual).

    Conjugate gradients with the approximate Hessian, their residual taken again with the exact one until it is small.
    """
    seg = functional.segments
    x = torch.zeros_like(right)
    residual = functional.project(right)
    largest = seg.largest(residual)
    products = torch.zeros(seg.count, dtype=torch.int64, device=right.device)
    negative = torch.zeros(seg.count, dtype=torch.bool, device=right.device)
    for _ in range(max_rounds):
        active = (largest > tolerance) & ~negative
        if not bool(active.any()):
            break
        goal = torch.where(active, (HESSIAN_ACCURACY * largest).clamp(min=0.5 * tolerance), torch.inf)
        part = conjugate_gradients(point, functional, residual, goal)
        negative = negative | part.negative_curvature
        x = x + torch.where(seg.spread(active), part.x, 0.0)
        residual = functional.project(right - point.exact_product(x))
        products = products + part.products + active
        largest = seg.largest(residual)
    return LinearSolution(x, products, largest <= tolerance, negative)


def conjugate_gradients(
    point: Point, functional: Functional, right: Tensor, tolerance: Tensor, max_iterations: int = 500
) -> LinearSolution:
    """Solves H x = right with ``Point.product`` on the constraint surface, to ``tolerance`` [b] (largest residual).

    Where the curvature turns negative the iterate so far is returned (or the direction itself, at the first step).
    """
    seg = functional.segments
    direct = _direct_solve(point, functional, right)
    if direct is not None:
        yes = torch.ones(1, dtype=torch.bool, device=right.device)
        return LinearSolution(direct, yes.to(torch.int64), yes, ~yes)
    ask = _ASK_EVERY if right.device.type != "cpu" else 1
    x = torch.zeros_like(right)
    r = functional.project(right)
    z = functional.precondition(r)
    p = z
    rz = seg.sum(r * z)
    active = seg.largest(r) > tolerance
    negative = torch.zeros_like(active)
    broken = torch.zeros_like(active)
    products = torch.zeros(seg.count, dtype=torch.int64, device=right.device)
    for k in range(max_iterations):
        if k % ask == 0 and not bool(active.any()):
            break
        hp = point.product(p)
        products += active
        curvature = seg.sum(p * hp)
        broken = broken | (active & ~torch.isfinite(curvature))
        downhill = active & (curvature <= 0)
        negative = negative | downhill
        if k == 0:
            x = torch.where(seg.spread(downhill), p, x)
        active = active & (curvature > 0)
        step = seg.spread(torch.where(active, rz / curvature, 0.0))
        x = x + step * p
        r = r - step * functional.project(hp)
        z = functional.precondition(r)
        rz_new = seg.sum(r * z)
        active = active & (seg.largest(r) > tolerance)
        p = z + seg.spread(torch.where(active, rz_new / rz, 0.0)) * p
        rz = torch.where(active, rz_new, rz)
    return LinearSolution(x, products, ~(active | negative | broken), negative)


def _direct_solve(point: Point, functional: Functional, right: Tensor) -> Tensor | None:
    """H x = right on the constraint surface by a Cholesky factor; None if too large, or not positive definite there.

    H + c AᵀA is H on the surface A x = 0, and positive definite for large c just if H is positive definite there.
    """
    if functional.segments.count > 1 or len(right) > DENSE_BELOW:
        return None
    matrix = point.matrix()
    if matrix is None:
        return None
    rows = functional.constraints()
    factor, failed = torch.linalg.cholesky_ex(matrix + _PENALTY * matrix.diagonal().max() * (rows.T @ rows))
    if bool(failed):
        return None
    both = torch.cholesky_solve(torch.cat([right.reshape(-1, 1), rows.T], dim=1), factor)
    free, shift = both[:, :1], both[:, 1:]
    x = free - shift @ torch.linalg.solve(rows @ shift, rows @ free)
    return x.reshape(right.shape)


def negative_direction(point: Point, functional: Functional, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of negative curvature [n, 4] at a linearized point, where [b] there are any, and the products [b].

    Conjugate gradients from a fixed right-hand side without symmetry, so that a saddle that the structure's own
    symmetry hides from the gradient is found (a cold start has all shells at zero). Stops where the residual has fallen
    a thousandfold.
    """
    seg = functional.segments
    if _direct_solve(point, functional, torch.zeros_like(like)) is not None:  # it has a Cholesky factor
        return torch.zeros_like(like), *(torch.zeros(1, dtype=t, device=like.device) for t in (torch.bool, torch.int64))
    ask = _ASK_EVERY if like.device.type != "cpu" else 1
    # the same numbers for every structure, whatever the batch
    first = torch.searchsorted(seg.batch, seg.batch) if seg.count > 1 else torch.zeros_like(seg.batch)
    atom = torch.arange(len(like), device=like.device) - first
    k = (4 * atom[:, None] + torch.arange(4, device=like.device)).to(like.dtype)
    r = functional.project(torch.sin(1.0 + 0.7390851332151607 * k * k))
    z = functional.precondition(r)
    p = z
    rz = seg.sum(r * z)
    start = rz
    active = torch.ones(seg.count, dtype=torch.bool, device=like.device)
    found = torch.zeros_like(active)
    out = torch.zeros_like(like)
    products = torch.zeros(seg.count, dtype=torch.int64, device=like.device)
    for n in range(_PROBES):
        if n % ask == 0 and not bool(active.any()):
            break
        hp = point.product(p)
        products += active
        curvature = seg.sum(p * hp)
        hit = active & (curvature < -1e-6 * seg.sum(p * functional.scale(p)))
        out = torch.where(seg.spread(hit), p, out)
        found = found | hit
        active = active & (curvature > 0)  # a neutral mode ends the search as well
        step = seg.spread(torch.where(active, rz / curvature, 0.0))
        r = r - step * functional.project(hp)
        z = functional.precondition(r)
        rz_new = seg.sum(r * z)
        active = active & (rz_new >= 1e-6 * start)
        p = z + seg.spread(torch.where(active, rz_new / rz, 0.0)) * p
        rz = torch.where(active, rz_new, rz)
    if bool(found.any()):  # the approximate Hessian may only seem to have it
        found = found & (seg.sum(out * point.exact_product(out)) < 0)
    return out, found, products


def minimize(
    functional: Functional, start: Tensor, *, tolerance: float, check: bool = True, max_steps: int = 100
) -> Solution:
    """Minimum of the functional nearest downhill from ``start`` [n, 4] (already on the constraint surface).

    ``tolerance`` is the largest residual in V (charges) and V/Å·e (shells). With ``check`` a stationary point is
    accepted only where no direction of negative curvature leads on; the solver follows such a direction downhill.
    """
    seg = functional.segments
    solution = _descend(functional, start, tolerance, max_steps)
    if not check:
        return solution
    products = solution.products
    for escapes in range(_ESCAPES + 1):
        solution.point.linearize()
        p, found, count = negative_direction(solution.point, functional, solution.y)
        products = products + count
        found = found & solution.converged
        if not bool(found.any()):
            return replace(solution, products=products)
        if escapes == _ESCAPES:
            break
        p = torch.where(seg.spread(found), p * seg.spread(0.01 / seg.largest(p).clamp(min=1e-300)), 0.0)
        uphill = seg.sum(p * solution.point.gradient) > 0
        p = torch.where(seg.spread(uphill), -p, p)
        p = p * seg.spread((0.5 * functional.largest_step(solution.y, p)).clamp(max=1.0))
        solution = _descend(functional, solution.y + p, tolerance, max_steps)
        products = products + solution.products
    return replace(
        solution,
        products=products,
        converged=solution.converged & ~found,
        negative_curvature=solution.negative_curvature | found,
    )


def _descend(functional: Functional, start: Tensor, tolerance: float, max_steps: int) -> Solution:
    """Truncated Newton from a start to the nearest stationary point downhill."""
    seg = functional.segments
    y = start
    point = functional.at(y)
    residual = functional.project(point.gradient)
    largest = seg.largest(residual)
    products = torch.zeros(seg.count, dtype=torch.int64, device=y.device)
    negative = torch.zeros(seg.count, dtype=torch.bool, device=y.device)
    active = torch.isfinite(largest) & (largest > tolerance)
    for _ in range(max_steps):
        if not bool(active.any()):
            break
        point.linearize()
        inner = torch.maximum(0.3 * largest.new_tensor(tolerance), HESSIAN_ACCURACY * largest)
        step = conjugate_gradients(point, functional, -residual, torch.where(active, inner, torch.inf))
        products = products + step.products
        negative = torch.where(active, step.negative_curvature, negative)
        slope = seg.sum(residual * step.x)
        direction = torch.where(seg.spread(slope > 0), -step.x, step.x)
        slope = -slope.abs()
        length = torch.where(active, (0.9 * functional.largest_step(y, direction)).clamp(max=1.0), 0.0)
        noise = 1e-13 * point.energy.abs().clamp(min=1.0)
        waiting = active
        for _ in range(30):
            trial = functional.at(y + seg.spread(length) * direction)
            fall = trial.energy - point.energy
            waiting = active & ~(fall <= 1e-4 * length * slope + noise)
            if not bool(waiting.any()):
                break
            length = torch.where(waiting, 0.5 * length, length)
        else:
            # these found nothing lower: they stay, and with them all that was tried
            length = torch.where(waiting, 0.0, length)
            trial = functional.at(y + seg.spread(length) * direction)
        y, point = y + seg.spread(length) * direction, trial
        residual = functional.project(point.gradient)
        new = seg.largest(residual)
        floor = (new >= largest) & (slope.abs() < noise) & ~negative  # rounding
        largest = torch.where(active, new, largest)
        active = active & ~waiting & ~floor & torch.isfinite(largest) & (largest > tolerance)
    return Solution(y, point, largest, products, negative, largest <= tolerance)
