"""How far charges and shells are from a polarization catastrophe: the smallest curvature at a stationary point."""

from __future__ import annotations

import torch
from torch import Tensor

from voltpi.potential.electrostatics.solver import Functional, Point, linear_solve
from voltpi.potential.errors import NotConvergedError

__all__ = ["smallest_curvature"]

_STEPS = 16
_TOLERANCE = 1e-6  # eV/Å, of the linear solves


def smallest_curvature(point: Point, functional: Functional, polarizable: Tensor) -> Tensor:
    """Smallest eigenvalue [b] (eV/Å²) of the shells' Hessian with the charges relaxed, at a linearized point.

    ``polarizable`` [n]: atoms that have a shell (infinite where no atom of a structure has one).

    Lanczos on its inverse, each application one solve of the whole Hessian with a force on the shells alone; 16 steps
    from a fixed start without symmetry give the smallest eigenvalue to a per cent and better. Where the Hessian is not
    positive definite, the (negative) curvature per shell displacement of the direction that showed it, an upper bound.
    """
    seg = functional.segments
    like = point.gradient
    first = torch.searchsorted(seg.batch, seg.batch)
    place = 3 * (torch.arange(len(like), device=like.device) - first)[:, None] + torch.arange(3, device=like.device)
    v = torch.sin(1.0 + 0.7390851332151607 * place.to(like.dtype) ** 2)
    v = v * polarizable[:, None]
    v = v / seg.spread(seg.sum(v * v).sqrt().clamp(min=1e-300))
    basis, diagonal, off = [v], [], []
    out = torch.full((seg.count,), torch.inf, dtype=like.dtype, device=like.device)
    for _ in range(_STEPS):
        right = torch.cat([torch.zeros_like(v[:, :1]), v], dim=1)
        answer = linear_solve(point, functional, right, tolerance=_TOLERANCE)
        if bool(answer.negative_curvature.any()):
            moved = seg.sum(answer.x[:, 1:] ** 2).clamp(min=1e-300)
            found = seg.sum(answer.x * point.exact_product(answer.x)) / moved
            out = torch.where(answer.negative_curvature, torch.minimum(out, found), out)
            if bool(answer.negative_curvature.all()):
                return out
        if not bool((answer.converged | answer.negative_curvature).all()):
            raise NotConvergedError(
                "the smallest curvature did not converge: charges and shells are at the edge of a polarization "
                "catastrophe; give stiffer parameters (larger K)"
            )
        w = answer.x[:, 1:] * polarizable[:, None]
        diagonal.append(seg.sum(w * v))
        for u in basis:  # full orthogonalisation, twice is not needed for so few
            w = w - seg.spread(seg.sum(w * u)) * u
        length = seg.sum(w * w).sqrt()
        off.append(length)
        if bool((length < 1e-10).all()):
            break
        v = torch.where(seg.spread(length) > 1e-10, w / seg.spread(length.clamp(min=1e-300)), 0.0)
        basis.append(v)
    matrix = torch.diag_embed(torch.stack(diagonal, dim=1))
    for k, length in enumerate(off[: len(diagonal) - 1]):
        matrix[:, k, k + 1] = matrix[:, k + 1, k] = length
    return torch.minimum(out, (1 / torch.linalg.eigvalsh(matrix)).amin(1))
