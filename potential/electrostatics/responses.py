"""How charges and shells answer a field and the potentials of electrodes: one linear solve for each direction.

At the stationary point, with y = (q, Δ) and a parameter λ, H δy = −∂²Ω/∂y∂λ on the constraint surface.
"""

from __future__ import annotations

import torch
from torch import Tensor

from voltpi.potential.electrostatics.functional import Functional, Point
from voltpi.potential.electrostatics.solver import linear_solve
from voltpi.potential.errors import InputError, NoStablePointError, NotConvergedError

__all__ = ["to_field", "to_potentials"]


def to_field(functional: Functional, point: Point, tolerance: float) -> tuple[Tensor, Tensor]:
    """Born charges [n, 3, 3] (e) and polarizability [b, 3, 3] (Å³).

    A mesh keeps the acoustic sum rule, Σ_i Z*_i = Σ_i q̄_i, to its accuracy; what is missing is shared by all atoms.
    Raises NoStablePointError and NotConvergedError where there is no response.
    """
    coupled, batch = functional.coupling(point.q), functional.system.batch
    born = torch.zeros_like(coupled)
    alpha = torch.zeros_like(functional.system.cell)
    for a in range(3):
        mixed = torch.zeros_like(point.gradient)  # ∂²Ω/∂y∂ε_a
        mixed[:, 0] = -functional.lever[:, a]
        mixed[:, 1 + a] = functional.shell_coupling * functional.z
        answer = _response(functional, point, mixed, tolerance, "a field")
        dq, dshells = answer[:, 0], answer[:, 1:]
        change = point.coulomb.core_gradient_change(answer)
        net = torch.zeros_like(functional.system.field).index_add_(0, batch, change)
        born[:, a] = (net / torch.bincount(batch)[:, None])[batch] - change
        born[:, a] += coupled[:, a] + dq[:, None] * functional.pull
        moved = dq[:, None] * functional.lever - functional.shell_coupling * functional.z[:, None] * dshells
        alpha[:, :, a] = torch.zeros_like(functional.system.field).index_add_(0, batch, moved)
    return born, 0.5 * (alpha + alpha.transpose(1, 2)) * functional.model.coulomb_constant


def to_potentials(functional: Functional, point: Point, tolerance: float) -> Tensor:
    """Capacitance ∂Q_a/∂ψ_b [b, electrodes, electrodes] (e/V) at fixed nuclei; 0 for an electrode at a charge.

    Raises InputError without electrodes at potentials, NoStablePointError and NotConvergedError as above.
    """
    system, electrodes = functional.system, functional.model.electrodes
    at_potential = [k for k, e in enumerate(electrodes) if e.control == "potential"]
    if not at_potential or system.electrode is None:
        raise InputError("output.capacitance needs electrodes at potentials: give them, or set it to false")
    count = len(electrodes)
    out = torch.zeros(system.n_systems, count, count, dtype=point.q.dtype, device=point.q.device)
    own = system.electrode >= 0
    place = (system.batch * count + system.electrode)[own]
    for k in at_potential:
        mixed = torch.zeros_like(point.gradient)  # ∂²Ω/∂y∂ψ_k
        mixed[:, 0] = -(system.electrode == k).to(mixed.dtype)
        slope = functional.field_per_volt(k)
        if slope is not None:
            mixed[:, 0] -= (functional.lever * slope[system.batch]).sum(-1)
            mixed[:, 1:] += functional.shell_coupling * functional.z[:, None] * slope[system.batch]
        moved = _response(functional, point, mixed, tolerance, "a potential")[own, 0]
        out[:, :, k] = torch.zeros_like(out[:, :, k]).reshape(-1).index_add_(0, place, moved).reshape(-1, count)
    return 0.5 * (out + out.transpose(1, 2))


def _response(functional: Functional, point: Point, mixed: Tensor, tolerance: float, what: str) -> Tensor:
    """δy [n, 4] with H δy = −mixed."""
    point.linearize()
    point.linearize_exactly()
    answer = linear_solve(point, functional, -mixed, tolerance=0.1 * tolerance)
    if bool(answer.negative_curvature.any()):
        raise NoStablePointError(
            f"the response to {what} does not exist: charges and shells are at a saddle point (a polarization "
            "catastrophe is near); set charges.limiter to fene, or give stiffer parameters (larger K)"
        )
    if not bool(answer.converged.all()):
        raise NotConvergedError(
            f"the response to {what} did not converge in {int(answer.products.max())} products; check the structure"
        )
    return answer.x
