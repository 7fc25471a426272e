"""What a trained network says about labelled structures: numbers to plot, and errors by kind of structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.units import GPa
from torch import nn

from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.loss import collate, pack, predict

__all__ = ["Evaluated", "errors_by_group", "evaluate_samples"]

_ATOMS = 512


@dataclass(frozen=True)
class Evaluated:
    """Targets and predictions of one sample: energy (eV), forces [n, 3] (eV/Å), stress [3, 3] (eV/Å³) or None."""

    sample: Sample
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


def evaluate_samples(network: nn.Module, samples: Sequence[Sample]) -> list[Evaluated]:
    """The answer of ``network`` to each of ``samples``, in its own precision and on its device."""
    first = next(network.parameters())
    answers: list[Evaluated] = []
    group: list[Sample] = []
    for k, sample in enumerate(samples):
        group.append(sample)
        full = sum(s.systems.n_atoms for s in group) >= _ATOMS
        if not full and k + 1 < len(samples):
            continue
        batch = collate([pack(s, dtype=first.dtype, device=first.device) for s in group])
        energy, forces, stress, *_ = predict(network, batch, create_graph=False)
        parts = forces.cpu().double().split([s.systems.n_atoms for s in group])
        for i, own in enumerate(group):
            tensor = None if own.stress is None or stress is None else stress[i].cpu().double().numpy()
            answers.append(Evaluated(own, float(energy[i]), parts[i].numpy(), tensor))
        group = []
    return answers


def errors_by_group(answers: Sequence[Evaluated]) -> dict[str, dict[str, float]]:
    """Errors by data set and by ``DATASET/GROUP`` where structures say what kind they are.

    frames · force_rmse, force_mae (eV/Å) · energy_rmse, energy_mae (meV/atom) · stress_rmse (GPa) · force_rms, of the
    targets (eV/Å).
    """
    groups: dict[str, list[Evaluated]] = {}
    for answer in answers:
        sample = answer.sample
        groups.setdefault(sample.dataset, []).append(answer)
        if sample.group:
            groups.setdefault(f"{sample.dataset}/{sample.group}", []).append(answer)
    return {name: _errors(own) for name, own in groups.items()}


def _errors(answers: Sequence[Evaluated]) -> dict[str, float]:
    force = np.concatenate([(a.forces - a.sample.forces.numpy()).reshape(-1) for a in answers])
    target = torch.cat([a.sample.forces.reshape(-1) for a in answers]).numpy()
    energy = np.array([(a.energy - a.sample.energy) / a.sample.systems.n_atoms for a in answers]) * 1000
    stress = [
        a.stress - a.sample.stress.numpy() for a in answers if a.stress is not None and a.sample.stress is not None
    ]
    errors = {
        "frames": len(answers),
        "force_rmse": _rms(force),
        "force_mae": float(np.abs(force).mean()),
        "energy_rmse": _rms(energy),
        "energy_mae": float(np.abs(energy).mean()),
        "force_rms": _rms(target),
    }
    return errors | ({"stress_rmse": _rms(np.array(stress)) / GPa} if stress else {})


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
