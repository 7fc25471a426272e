"""How well the charges reproduce labelled dipoles, polarizabilities and Born charges.

Charges that a network does not give it cannot mend either: it does not know the field. They are compared here and not
trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.model import Potential
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.unit_check import TOLERANCE

__all__ = ["nearest_branch", "report_charges"]


def nearest_branch(difference: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """A difference of two dipoles [3] (e·Å) on its smallest branch: known modulo e times lattice vectors."""
    lattice = cell[pbc]
    if not len(lattice):
        return difference
    quanta = np.linalg.lstsq(lattice.T, difference, rcond=None)[0]
    reduced = difference - np.round(quanta) @ lattice
    # rounding finds the nearest branch of a skewed cell only nearly
    steps = np.array(np.meshgrid(*[[-1, 0, 1]] * len(lattice))).reshape(len(lattice), -1).T @ lattice
    branches = reduced + steps
    return branches[np.argmin(np.linalg.norm(branches, axis=1))]


def report_charges(potential: Potential, samples: Sequence[Sample], *, most: int = 32) -> dict[str, Any]:
    """Errors of a potential's charges on up to ``most`` of the ``samples`` that have such labels; empty where none has.

    frames · dipole: rmse, rms of the labels (e·Å, modulo e times lattice vectors; neutral frames only) and, where
    it fits better with the opposite sign, a remark · polarizability: relative error (Frobenius), isotropic mean and
    that of the labels (Å³), and a remark where these are far apart · born_charges: rmse, rms of the labels (e), R² over
    all entries, and a remark where they fit better transposed · refused: why a frame could not be compared, where any
    could not.
    """
    labelled = [s for s in samples if s.observed]
    chosen = labelled[:: max(1, -(-len(labelled) // most))]
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"dipole": [], "polarizability": [], "born_charges": []}
    flipped: list[np.ndarray] = []
    refused = ""
    for sample in chosen:
        try:
            answer = _solve(potential, sample)
        except VoltPIError as error:
            refused = refused or f"{sample.path}, frame {sample.frame}: {error}"
            continue
        for kind, value in sample.observed.items():
            if kind == "dipole":
                if float(sample.systems.net_charge[0]) != 0:
                    continue
                cell, pbc = sample.systems.cell[0].numpy(), sample.systems.pbc[0].numpy()
                flipped.append(nearest_branch(answer[kind] + value, cell, pbc))
                pairs[kind].append((value + nearest_branch(answer[kind] - value, cell, pbc), value))
            elif kind in answer:
                pairs[kind].append((answer[kind], value))
    report: dict[str, Any] = {"frames": len(chosen)} if chosen else {}
    for kind, both in pairs.items():
        if both:
            report[kind] = _compare(kind, both)
    if flipped and np.mean(np.square(flipped)) < 0.25 * np.square(report["dipole"]["rmse"]):
        report["dipole"]["remark"] = "fits better with the opposite sign: the labels may be −M"
    return report | ({"refused": refused} if refused else {})


def _solve(potential: Potential, sample: Sample) -> Mapping[str, np.ndarray]:
    answers = not isinstance(potential.charges, LatentCharges)  # to a field, at fixed nuclei
    answer = potential(
        potential.prepare(sample.systems, initial_charges=sample.initial_charges),
        polarizability=answers and "polarizability" in sample.observed,
        born_charges="born_charges" in sample.observed,
    )
    out = {"dipole": answer.dipole[0]}
    if answer.polarizability is not None:
        out["polarizability"] = answer.polarizability[0]
    if answer.born_charges is not None:
        out["born_charges"] = answer.born_charges
    if not all(bool(value.isfinite().all()) for value in out.values()):
        raise InputError("the charges' answer is not finite")
    return {kind: value.detach().cpu().numpy() for kind, value in out.items()}


def _compare(kind: str, both: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    if kind == "polarizability":
        ours, labels = (np.array(side) for side in zip(*both, strict=True))
        mean, label = (float(np.einsum("kaa->k", x).mean() / 3) for x in (ours, labels))
        found: dict[str, Any] = {
            "relative_error": float(np.linalg.norm(ours - labels) / np.linalg.norm(labels)),
            "isotropic": mean,
            "isotropic_label": label,
        }
        if mean > 0 and not 1 / TOLERANCE < label / mean < TOLERANCE:
            found["remark"] = "labels may be in other units: see units.polarizability"
        return found
    ours, labels = (np.concatenate([x.reshape(-1) for x in side]) for side in zip(*both, strict=True))
    report: dict[str, Any] = {
        "rmse": float(np.sqrt(np.mean(np.square(ours - labels)))),
        "rms_label": float(np.sqrt(np.mean(np.square(labels)))),
    }
    if kind == "born_charges" and np.std(ours) > 0 and np.std(labels) > 0:
        report["r2"] = float(np.corrcoef(ours, labels)[0, 1] ** 2)
        turned = np.concatenate([x.transpose(0, 2, 1).reshape(-1) for x, _ in both])
        if np.mean(np.square(turned - labels)) < 0.9 * np.square(report["rmse"]):
            report["remark"] = "fits better transposed: the labels may be [displacement, dipole]"
    return report
