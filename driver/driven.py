"""What an input of i-PI's driven dynamics (a field in time) needs of the driver, and what it cannot do.

i-PI adds the force Z*·ε(t), with the Born charges Z* that the driver sends for every bead, to the momenta at the ends
of each step (``ipi/engine/motion/driven_dynamics.py``, 3.3). So the field acts on a ring polymer as well, in
``eda-nve`` and ``eda-nvt``, but not under a barostat, and the driver knows nothing of ε(t).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from voltpi.driver.ipi_input import DirectForceField, Driven, RunInput, SocketForceField
    from voltpi.driver.settings import Settings

__all__ = ["advice", "refusals", "sum_rule"]


_MODES = ("eda-nve", "eda-nvt")


def _driven(plan: RunInput) -> Iterator[Driven]:
    yield from (motion.driven for motion in plan.motions if motion.driven is not None)


def refusals(plan: RunInput, ff: SocketForceField | DirectForceField, settings: Settings) -> Iterator[str]:
    """Why i-PI cannot drive this run with the Born charges of this forcefield, each with its fix."""
    for motion in plan.motions:
        if motion.driven is not None and motion.dynamics not in _MODES:
            yield (
                f"<driven_dynamics mode='{motion.dynamics}'> is not known to i-PI, which would then move nothing; use "
                f"{' or '.join(_MODES)} (there is none at constant pressure)"
            )
    for driven in _driven(plan):
        if settings.displacement is not None:
            given = zip("xyz", settings.displacement, strict=True)
            held = ", ".join(axis for axis, value in given if value is not None)
            yield (
                f"<driven_dynamics> stands beside a displacement along {held}, where i-PI's force Z*·ε is wrong: Z* is "
                "that at constant field, and at constant displacement the dipole follows the atoms with ε∞⁻¹·Z*; "
                "remove displacement, or drive by a displacement of the settings that changes with time instead"
            )
        if driven.field is None:
            yield f"<efield> cannot be read: {driven.problem}; correct it"
        elif driven.field.sigma != float("inf") and not driven.field.is_pulse:
            yield (
                f"<efield> has <sigma> but <peak> {driven.field.peak:g} fs, and i-PI leaves the envelope out where the "
                "peak is not after time 0; set <peak> to some <sigma> after the start, or remove <sigma>"
            )
        if driven.born_charges == "none":
            yield "<driven_dynamics> has no Born charges; add <bec mode='driver'/>"
        if driven.multiple_steps:
            yield ("<driven_dynamics> has <nmts>, with which i-PI gives only a part of the field's force; remove it")
        own = [force for force in plan.forces if force.forcefield == ff.name]
        if driven.born_charges != "driver" or not own:
            continue
        ours = {*(socket.name for socket in plan.sockets), *(direct.name for direct in plan.direct if direct.ours)}
        senders = [force.forcefield for force in plan.forces if force.forcefield in ours]
        if len(senders) > 1:
            yield (
                f"i-PI takes the Born charges of one <force> only, but {len(senders)} are of forcefields that send "
                f"some ({', '.join(senders)}); keep one, or give the charges with <bec mode='file'>"
            )
        if not settings.output.born_charges:
            yield (
                "<bec mode='driver'/> needs the Born charges, which these settings do not give; set "
                "output.born_charges: true"
            )
        contracted = [force.n_beads for force in own if force.n_beads not in (0, plan.n_beads)]
        if contracted:
            yield (
                f"i-PI drops the Born charges where <force nbeads='{contracted[0]}'> evaluates {contracted[0]} of "
                f"{plan.n_beads} beads; remove that nbeads"
            )


def advice(plan: RunInput, settings: Settings) -> Iterator[str]:
    """Sentences about what is allowed but may not be meant."""
    for driven in _driven(plan):
        field = driven.field
        if field is None:
            continue
        if not field.strength:
            yield "<amp> of <efield> is 0, so that nothing drives the run"
        elif field.is_pulse and plan.timestep:
            end = (plan.steps + plan.first_step) * plan.timestep
            if end < field.peak + 3.0 * field.sigma:
                yield (
                    f"the run ends at {end:g} fs, before the pulse is over (highest at {field.peak:g} fs, sigma "
                    f"{field.sigma:g} fs)"
                )
            if field.envelope(0.0) > 1e-2:
                yield (
                    f"the pulse begins with {field.envelope(0.0):.0%} of its strength at once; a <peak> of 4 <sigma> "
                    "or more begins softly"
                )
        if settings.field_from_frame or any(settings.field):
            yield (
                "the static field of the settings acts besides the driving one, whose force is linear about it; "
                "i-PI's `Efield` shows the driving one only"
            )


def sum_rule(plan: RunInput, born: NDArray[np.float64]) -> Iterator[str]:
    """Why i-PI would stop at Born charges [n, 3, 3] (e) of these sums, with the fix."""
    n = len(born)
    largest = float(np.abs(born.sum(axis=0)).max()) / n
    for driven in _driven(plan):
        if driven.born_charges == "driver" and largest > driven.asr_threshold * n:
            yield (
                f"the Born charges sum up to {largest * n:.6g} e, as in a charged cell, and i-PI stops beyond "
                f"<asr_threshold> x atoms² = {driven.asr_threshold * n**2:.2g} e; set <asr_threshold> to "
                f"{1.01 * largest / n:.1e}, and mind that the field pulls at the whole cell"
            )
