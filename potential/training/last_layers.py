"""A committee of last layers for a trained network, and how far its spread is to be trusted.

The energy is linear in what the last scalars are weighted with, so that each member is one solution of a linear least
squares problem: the loss of the training (energies per atom, forces, stresses) on a bootstrap sample of its structures.
With A_f the derivatives of what is predicted of structure f with respect to the weights, r_f what the network leaves of
its labels, and w its weights in the loss,

    d_k = (Σ_f c_kf A_fᵀ w A_f + λ)⁻¹ Σ_f c_kf A_fᵀ w r_f

where c_kf counts how often f was drawn. The mean of the members is taken out: the network stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voltpi.potential.committee import FEWEST, Calibration, Committee, LastLayers, Seeds, force_spread, read_scalars
from voltpi.potential.errors import InputError
from voltpi.potential.model import root_derivatives
from voltpi.potential.neighbors import Neighbors
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.evaluation import Evaluated, evaluate_samples
from voltpi.potential.training.loss import Loss

__all__ = ["MOST_ATOMS", "calibrate", "fit_last_layers"]

MOST_ATOMS = 10_000
"""Atoms in the structures, drawn at random, to which last layers are fitted."""
_RIDGE = 1e-6
"""λ over the mean eigenvalue of the normal matrix: where no label speaks, a member stays as the network is."""
_ATOMS_AT_ONCE = 512


def fit_last_layers(network: NequIP, samples: Sequence[Sample], loss: Loss, *, members: int, seed: int) -> LastLayers:
    """``members`` last layers of a trained network, each fitted to a bootstrap sample of the structures.

    ``samples`` : as the network was trained on (long range and references subtracted); at most ``MOST_ATOMS`` atoms of
    them are used. Raises InputError for fewer structures than make a difference from draw to draw, or too few members.
    """
    generator = np.random.default_rng(seed)
    chosen = _some(samples, generator)
    if len(chosen) < FEWEST:
        raise InputError(f"training.committee: {len(chosen)} structures cannot tell members apart; give more")
    matrices, sides = _normal_equations(network, chosen, loss)
    total = matrices.sum(0)
    ridge = _RIDGE * total.trace() / len(total) * torch.eye(len(total), dtype=total.dtype)
    deviations = []
    for _ in range(members):
        drawn = np.bincount(generator.integers(len(chosen), size=len(chosen)), minlength=len(chosen))
        counts = torch.tensor(drawn, dtype=total.dtype)
        matrix, side = torch.einsum("f,fst->st", counts, matrices), counts @ sides
        deviations.append(torch.linalg.solve(matrix + ridge, side))
    own = next(network.parameters())
    return LastLayers(network, torch.stack(deviations).to(own))


def calibrate(committee: Committee, samples: Sequence[Sample]) -> tuple[Calibration, dict[str, Any]]:
    """Factors for the spreads of energies and forces from structures that were not trained on, and what they give.

    α² = (K − 3)/(K − 1) ⟨error²/spread²⟩; the first factor corrects for the scatter of a spread of K members (Imbalzano
    et al., J. Chem. Phys. 154, 074102 (2021), doi:10.1063/5.0036522). Energies are those of whole structures; for
    forces, components are compared with the uncertainty of their atom. The report has for both: alpha, rmse (eV or
    eV/Å), uncertainty (root mean square), within_1_sigma and within_2_sigma (parts of the errors; 0.683 and 0.954 if
    they were Gaussian), rank_correlation (Spearman's, of uncertainty and size of the error).

    Raises InputError where there is nothing to calibrate on.
    """
    if not samples:
        raise InputError("a committee is calibrated on validation data, and there are none: give data.validation")
    mean = committee if isinstance(committee, Seeds) else committee.first
    energy_errors, force_errors = _errors(evaluate_samples(mean, samples))
    energies, forces = [], []
    for group in _grouped(samples):
        answers = _derivatives(committee.first, group, committee.roots)
        energies.append(committee.combine(answers[0])[1])
        forces.append(force_spread(committee.combine(answers[1])[1]))
    spread_e = torch.cat(energies, dim=1).square().sum(0).div(committee.size - 1).sqrt().cpu().numpy()
    spread_f = np.repeat(torch.cat(forces).cpu().numpy()[:, None], 3, axis=1)
    report: dict[str, Any] = {"kind": committee.kind, "members": committee.size, "frames": len(samples)}
    alphas = {}
    for name, error, spread in (("energy", energy_errors, spread_e), ("forces", force_errors, spread_f)):
        told = spread > 0
        if not told.any():
            raise InputError(f"all members agree on the {name} of all validation data: give data.validation others")
        ratio = float(np.mean((error[told] / spread[told]) ** 2)) * (committee.size - 3) / (committee.size - 1)
        alphas[name] = ratio**0.5
        report[name] = _report(error, alphas[name] * spread) | {"alpha": alphas[name]}
    return Calibration(**alphas), report


def _report(error: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    from scipy.stats import spearmanr

    size = np.abs(error) if error.ndim == 1 else np.linalg.norm(error, axis=1)
    width = sigma if error.ndim == 1 else sigma[:, 0]
    several = len(np.unique(size)) > 1 and len(np.unique(width)) > 1
    return {
        "rmse": _rms(error),
        "uncertainty": _rms(sigma),
        "within_1_sigma": float(np.mean(np.abs(error) <= sigma)),
        "within_2_sigma": float(np.mean(np.abs(error) <= 2 * sigma)),
        **({"rank_correlation": float(spearmanr(width, size).statistic)} if several else {}),
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _errors(answers: Sequence[Evaluated]) -> tuple[np.ndarray, np.ndarray]:
    """Of energies [samples] (eV) and of forces [atoms, 3] (eV/Å), prediction − label."""
    energy = np.array([a.energy - a.sample.energy for a in answers])
    return energy, np.concatenate([a.forces - a.sample.forces.numpy() for a in answers])


def _normal_equations(network: NequIP, samples: Sequence[Sample], loss: Loss) -> tuple[Tensor, Tensor]:
    """A_fᵀ w A_f [samples, s, s] and A_fᵀ w r_f [samples, s], float64 on the CPU."""
    atoms = sum(s.systems.n_atoms for s in samples)
    stressed = sum(s.stress is not None for s in samples)
    scalars = network.readout[0].shape[0]
    unit = torch.eye(scalars).to(next(network.parameters()))

    def features(numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        return read_scalars(network, numbers, network.scalars(numbers, edge_index, vectors), unit)

    matrices, sides = [], []
    for group in _grouped(samples):
        energies, forces, virials = (x.cpu() for x in _derivatives(network, group, features))
        by_atom = forces.split([s.systems.n_atoms for s in group], dim=1)
        for i, (answer, f) in enumerate(zip(evaluate_samples(network, group), by_atom, strict=True)):
            s = answer.sample
            rows, left, weights = [energies[:, i : i + 1].T / s.systems.n_atoms], [], []
            left.append(torch.tensor([(s.energy - answer.energy) / s.systems.n_atoms], dtype=torch.float64))
            weights.append(torch.full((1,), loss.energy / len(samples), dtype=torch.float64))
            rows.append(f.flatten(1).T)
            left.append((s.forces - torch.from_numpy(answer.forces)).flatten())
            weights.append(torch.full((f[0].numel(),), loss.forces / (3 * atoms), dtype=torch.float64))
            if s.stress is not None and answer.stress is not None:
                rows.append(-virials[:, i].flatten(1).T / s.volume)
                left.append((s.stress - torch.from_numpy(answer.stress)).flatten())
                weights.append(torch.full((9,), loss.stress / (9 * stressed), dtype=torch.float64))
            a, w = torch.cat(rows), s.weight * torch.cat(weights)
            matrices.append(a.T @ (w[:, None] * a))
            sides.append(a.T @ (w * torch.cat(left)))
    return torch.stack(matrices), torch.stack(sides)


def _derivatives(network: NequIP, samples: Sequence[Sample], roots: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, forces and virials (``root_derivatives``) of sets of atomic energies of several samples."""
    own = next(network.parameters())
    systems = Systems.join([s.systems for s in samples]).to(own.device)
    starts = np.cumsum([0, *(s.systems.n_atoms for s in samples)])
    index = torch.cat([s.edge_index + int(a) for s, a in zip(samples, starts[:-1], strict=True)], dim=1)
    exact = torch.cat([s.vectors for s in samples]).to(own.device)
    pairs = Neighbors(index.to(own.device), torch.zeros_like(exact), exact)
    vectors = exact.to(own.dtype).requires_grad_(True)
    return root_derivatives(systems, pairs, vectors, roots(systems.numbers, pairs.index, vectors))


def _grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: list[list[Sample]] = []
    filled = _ATOMS_AT_ONCE
    for sample in samples:
        if filled + sample.systems.n_atoms > _ATOMS_AT_ONCE:
            groups.append([])
            filled = 0
        groups[-1].append(sample)
        filled += sample.systems.n_atoms
    return groups


def _some(samples: Sequence[Sample], generator: np.random.Generator) -> list[Sample]:
    """In random order, as many as have ``MOST_ATOMS`` atoms."""
    chosen: list[Sample] = []
    left = MOST_ATOMS
    for i in generator.permutation(len(samples)):
        left -= samples[i].systems.n_atoms
        if left < 0 and chosen:
            break
        chosen.append(samples[i])
    return chosen
