"""One record a frame: what ``voltpi evaluate --json`` prints, in eV, Å and e."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms

from voltpi.driver.evaluator import Evaluator, build_potential
from voltpi.driver.settings import Settings
from voltpi.driver.structures import array_of, frame_field
from voltpi.potential.committee import Members
from voltpi.potential.errors import VoltPIError
from voltpi.potential.response import Response

__all__ = ["alike", "evaluate_frames", "record"]


def evaluate_frames(settings: Settings, frames: Sequence[Atoms], source: str) -> Iterator[dict[str, Any]]:
    """A record for every frame, in order, with the keys of the command line's contract.

    Frames of one composition, periodicity and fixed charges belong together: fragments, electrodes and carried charges
    are those of their first frame (at zero field, where ``auto``), as is the cell at which ``field_under_strain:
    reduced`` takes field and displacement; wrapped atoms are followed from frame to frame.
    Others start anew.

    Raises InputError for settings or frames that cannot be right; messages name ``source`` and the frame.
    """
    potential = build_potential(settings)
    evaluator: Evaluator | None = None
    known: Atoms | None = None
    for k, atoms in enumerate(frames):
        name = source if len(frames) == 1 else f"{source}, frame {k}"
        began = time.perf_counter()
        try:
            if evaluator is None or known is None or not alike(known, atoms, settings):
                evaluator = Evaluator(potential, atoms, settings)
                known = atoms
            evaluator.forget_start()  # a frame's answer does not depend on how the frame before was solved
            response = evaluator.evaluate_systems(
                np.asarray(atoms.cell)[None],
                atoms.get_positions()[None],
                fields=frame_field(atoms, settings)[None],
            )
        except VoltPIError as error:
            raise type(error)(f"{name}: {error}") from None
        yield record(response, evaluator.volume(np.asarray(atoms.cell)), time.perf_counter() - began)


def alike(first: Atoms, other: Atoms, settings: Settings) -> bool:
    """Whether what was prepared for one structure holds for the other: composition, periodicity, fixed charges."""
    arrays = ["numbers", *([settings.charges.values] if settings.charges.model == "fixed" else [])]
    pairs = [(array_of(first, name), array_of(other, name)) for name in arrays]
    same = all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairs)
    return same and np.array_equal(first.pbc, other.pbc)


def record(response: Response, volume: float, seconds: float) -> dict[str, Any]:
    """One structure's answer as numbers and lists.

    ``field`` (V/Å) is there in a field or at a displacement. Of a committee, as asked: ``energy_uncertainty`` (eV),
    ``forces_uncertainty`` [n] (eV/Å, standard deviation of a component) and ``committee``, the members' ``energies``
    [k], ``forces`` [k, n, 3] and ``stresses`` [k, 3, 3]. ``stress`` has ASE's sign (−virial/volume; 0 without a
    volume) and symmetry: the mean of the two sides.
    """
    virial = response.virial[0].detach().cpu().numpy()
    virial = 0.5 * (virial + virial.T)
    out: dict[str, Any] = {
        "energy": float(response.energy[0]),
        "energy_terms": {name: float(e[0]) for name, e in response.energy_terms.items()},
        "forces": response.forces.tolist(),
        "stress": (-virial / volume if volume else np.zeros((3, 3))).tolist(),
        "charges": response.charges.tolist(),
        "shells": response.shells.tolist(),
        "dipole": response.dipole[0].tolist(),
        "electrodes": {
            name: {key: float(values[key][0]) for key in ("charge", "potential", "residual")}
            for name, values in response.electrodes.items()
        },
        "residual": float(response.residual[0]),
        "iterations": int(response.iterations[0]),
        "seconds": seconds,
    }
    if "displacement" in response.energy_terms or bool((response.field != 0).any()):
        out["field"] = response.field[0].tolist()
    if response.electrodes:
        out["capacitive_energy"] = 0.5 * sum(e["charge"] * e["potential"] for e in out["electrodes"].values())
    if response.born_charges is not None:
        out["born_charges"] = response.born_charges.tolist()
    if response.polarizability is not None:
        out["polarizability"] = response.polarizability[0].tolist()
    if response.capacitance is not None:
        out["capacitance"] = response.capacitance[0].tolist()
    if response.smallest_curvature is not None:
        out["smallest_curvature"] = float(response.smallest_curvature[0])
    if response.members is not None:
        out |= _of_members(response.members, volume)
    _refuse_not_finite(out)
    return out


def _of_members(members: Members, volume: float) -> dict[str, Any]:
    out: dict[str, Any] = {"energy_uncertainty": float(members.energy_uncertainty[0])}
    if members.forces_uncertainty is not None:
        out["forces_uncertainty"] = members.forces_uncertainty.tolist()
    out["committee"] = {"energies": members.energies[:, 0].tolist()}
    if members.forces is not None and members.virials is not None:
        virials = members.virials[:, 0]
        virials = 0.5 * (virials + virials.transpose(1, 2))
        stresses = -virials / volume if volume else torch.zeros_like(virials)
        out["committee"] |= {"forces": members.forces.tolist(), "stresses": stresses.tolist()}
    return out


def _refuse_not_finite(out: dict[str, Any]) -> None:
    for key in ("energy", "forces", "stress"):
        if not np.isfinite(np.asarray(out[key])).all():
            raise VoltPIError(f"the {key} came out as not a finite number: check the structure")
