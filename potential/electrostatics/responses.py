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

_SOFTEST = 1e-6  # of 1/ε∞: where it vanishes, the response to a field diverges


def to_field(functional: Functional, point: Point, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Born charges [n, 3, 3] (e), polarizability [b, 3, 3] (Å³) and what a field does to charges [n, 3].

    All three at fixed field; the last is −∂²Ω/∂q∂ε (Å) of a held charge, what M gains with it after the others have
    followed, and ∂q/∂ε (e Å/V) of a free one.

    Where a displacement is held, the three answers X = H⁻¹U (U_a = ∂M_a/∂y) are those at fixed D; with α = UᵀX and the
    screening S = 4πk_e/V along its axes, those at fixed field are X (1 − Sα)⁻¹, exactly (Woodbury).
    A mesh keeps the acoustic sum rule, Σ_i Z*_i = Σ_i q̄_i, to its accuracy; what is missing is shared by all atoms.
    Raises NoStablePointError and NotConvergedError where there is no response.
    """
    coupled, batch = functional.coupling(point.q), functional.system.batch
    answers = torch.zeros(3, *point.gradient.shape, dtype=point.gradient.dtype, device=point.gradient.device)
    alpha = torch.zeros_like(functional.system.cell)
    for a in range(3):
        mixed = torch.zeros_like(point.gradient)  # ∂²Ω/∂y∂ε_a
        mixed[:, 0] = -functional.lever[:, a]
        mixed[:, 1 + a] = functional.shell_coupling * functional.z
        answers[a] = _response(functional, point, mixed, tolerance, "a field")
        alpha[:, :, a] = functional.moved(answers[a])
    if functional.displaced:
        released = _at_fixed_field(functional, alpha)
        answers = torch.einsum("cny,nca->any", answers, released[batch])
        alpha = alpha @ released
    born, response = torch.zeros_like(coupled), torch.zeros_like(point.shells)
    held = ~functional.free
    pull = functional.pull(point.field)
    for a, answer in enumerate(answers):
        response[:, a] = answer[:, 0]
        if bool(held.any()):
            pushed = functional.lever[:, a] - point.coulomb.product(answer)[:, 0]
            response[:, a] = torch.where(held, pushed, response[:, a])
        change = point.coulomb.core_gradient_change(answer)
        net = functional.total(change)
        born[:, a] = (net / torch.bincount(batch)[:, None])[batch] - change
        born[:, a] += coupled[:, a] + answer[:, :1] * pull
    return born, 0.5 * (alpha + alpha.transpose(1, 2)) * functional.model.coulomb_constant, response


def _at_fixed_field(functional: Functional, alpha: Tensor) -> Tensor:
    """(1 − Sα)⁻¹ [b, 3, 3] for α = ∂M/∂ε at fixed D. Raises NoStablePointError where no fixed field would hold it."""
    eye = torch.eye(3, dtype=alpha.dtype, device=alpha.device)
    root = functional.screening.sqrt()
    rest = eye - root[:, :, None] * 0.5 * (alpha + alpha.transpose(1, 2)) * root[:, None, :]
    if bool((torch.linalg.eigvalsh(rest)[:, 0] < _SOFTEST).any()):
        raise NoStablePointError(
            "charges and shells are stable at the constant displacement only: at constant field they have no response; "
            "set output.born_charges and output.polarizability to false, or give stiffer parameters (larger K)"
        )
    return torch.linalg.inv(eye - functional.screening[:, :, None] * alpha)


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
