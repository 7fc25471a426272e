"""Batches of graphs on the training device, network energies and forces on them, and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from voltpi.potential.training.dataset import Sample

__all__ = ["Batch", "EnergyForceLoss", "Errors", "by_atoms", "collate", "pack", "predict"]


class Batch(NamedTuple):
    """``b`` structures with ``n`` atoms and ``e`` edges in all, in the precision of the network.

    numbers [n] int64 · edge_index [2, e] int64 (centre i, neighbour j) · vectors [e, 3] r_j + shift − r_i, Å ·
    structure [n] int64 · n_atoms [b] · energy [b] eV · forces [n, 3] eV/Å · weight [b] (of the data set)
    """

    numbers: Tensor
    edge_index: Tensor
    vectors: Tensor
    structure: Tensor
    n_atoms: Tensor
    energy: Tensor
    forces: Tensor
    weight: Tensor


def pack(sample: Sample, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Batch:
    """One sample as a batch of one, cast once; the subtraction of references was done in float64 before."""
    numbers = sample.systems.numbers.to(device)
    real = {"dtype": dtype, "device": device}
    return Batch(
        numbers=numbers,
        edge_index=sample.edge_index.to(device),
        vectors=sample.vectors.to(**real),
        structure=torch.zeros_like(numbers),
        n_atoms=torch.tensor([len(numbers)], **real),
        energy=torch.tensor([sample.energy], **real),
        forces=sample.forces.to(**real),
        weight=torch.tensor([sample.weight], **real),
    )


def collate(parts: Sequence[Batch]) -> Batch:
    """The graphs of several batches side by side."""
    edges, structures = [], []
    first_atom = first_structure = 0
    for part in parts:
        edges.append(part.edge_index + first_atom)
        structures.append(part.structure + first_structure)
        first_atom += part.numbers.shape[0]
        first_structure += part.energy.shape[0]
    return Batch(
        numbers=torch.cat([p.numbers for p in parts]),
        edge_index=torch.cat(edges, dim=1),
        vectors=torch.cat([p.vectors for p in parts]),
        structure=torch.cat(structures),
        n_atoms=torch.cat([p.n_atoms for p in parts]),
        energy=torch.cat([p.energy for p in parts]),
        forces=torch.cat([p.forces for p in parts]),
        weight=torch.cat([p.weight for p in parts]),
    )


def by_atoms(parts: Iterable[Batch], atoms: int) -> list[Batch]:
    """Collate in order into batches of at most ``atoms`` atoms (at least one structure each)."""
    groups: list[list[Batch]] = []
    filled = atoms
    for part in parts:
        size = part.numbers.shape[0]
        if filled + size > atoms:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
    return [collate(group) for group in groups]


def predict(network: nn.Module, batch: Batch, *, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Energies [b] (eV) and forces [n, 3] (eV/Å) of ``network``; ``create_graph`` to train through the forces.

    With v = r_j + shift − r_i and g = ∂E/∂v, ∂E/∂r_j = g and ∂E/∂r_i = −g, so the force on i gains g and that on j
    loses it.
    """
    vectors = batch.vectors.detach().requires_grad_()
    atomic = network(batch.numbers, batch.edge_index, vectors).reshape(-1)
    energy = torch.zeros_like(batch.energy).index_add(0, batch.structure, atomic)
    (g,) = torch.autograd.grad(atomic.sum(), vectors, create_graph=create_graph)
    centre, neighbour = batch.edge_index
    forces = torch.zeros_like(batch.forces).index_add(0, centre, g).index_add(0, neighbour, g, alpha=-1)
    return (energy, forces) if create_graph else (energy.detach(), forces.detach())


@dataclass(frozen=True)
class EnergyForceLoss:
    """Weighted mean of squared energy errors per atom and squared force errors.

    loss = energy · ⟨w h(ΔE/N)⟩ + forces · ⟨w h(|ΔF|)⟩/3, averaged over structures and atoms, w the weight of the
    data set, h(x) = x². With a Huber threshold δ, h(x) = δ(2|x| − δ) beyond |x| = δ, so that a wrong label pulls
    with a bounded gradient; the force error enters with its norm, which keeps the loss rotation invariant.

    Attributes
    ----------
    energy, forces : weights of the terms, 1/(eV/atom)² and 1/(eV/Å)²
    huber_energy, huber_forces : thresholds in eV/atom and eV/Å, or None
    """

    energy: float = 1.0
    forces: float = 10.0
    huber_energy: float | None = None
    huber_forces: float | None = None

    def __call__(self, energy: Tensor, forces: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of predicted ``energy`` [b] and ``forces`` [n, 3]."""
        energy_error = ((energy - batch.energy) / batch.n_atoms).square()
        force_error = (forces - batch.forces).square().sum(dim=1)
        energy_term = (batch.weight * _huber(energy_error, self.huber_energy)).mean()
        force_term = (batch.weight[batch.structure] * _huber(force_error, self.huber_forces)).mean() / 3
        return self.energy * energy_term + self.forces * force_term


def _huber(squared: Tensor, threshold: float | None) -> Tensor:
    if threshold is None:
        return squared
    limit = threshold**2
    # the clamp keeps the square root differentiable at zero error
    linear = threshold * (2 * squared.clamp(min=limit).sqrt() - threshold)
    return torch.where(squared <= limit, squared, linear)


class Errors:
    """Sums of errors over batches, kept on the device in float64: ``sums`` [6].

    Σ loss · structures, structures, Σ (ΔE/N)², Σ |ΔF|², Σ |ΔF component|, components.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    def add(self, energy: Tensor, forces: Tensor, batch: Batch, loss: Tensor) -> None:
        """Count one predicted batch and its mean ``loss``."""
        structures, components = float(len(energy)), float(forces.numel())
        per_atom = ((energy - batch.energy) / batch.n_atoms).double()
        error = (forces - batch.forces).double()
        parts = (loss.double() * structures, per_atom.square().sum(), error.square().sum(), error.abs().sum())
        self.sums[[0, 2, 3, 4]] += torch.stack(parts)
        self.sums[1] += structures
        self.sums[5] += components

    def means(self) -> dict[str, float]:
        """Mean loss, force RMSE and MAE (eV/Å), energy RMSE (meV/atom)."""
        loss, structures, energies, squares, absolutes, components = self.sums.tolist()
        structures, components = max(structures, 1.0), max(components, 1.0)
        return {
            "loss": loss / structures,
            "force_rmse": math.sqrt(squares / components),
            "force_mae": absolutes / components,
            "energy_rmse": 1000 * math.sqrt(energies / structures),
        }
