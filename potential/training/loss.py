"""Batches of graphs on the training device, network energies, forces and stresses on them, and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from ase.units import GPa
from torch import Tensor, nn

from voltpi.potential.shortrange.latent import exchanged
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.joint import Charged, JointCharges
from voltpi.potential.training.latent import Interaction, long_range_of

__all__ = ["Batch", "Errors", "Loss", "Prediction", "by_atoms", "collate", "pack", "predict"]


class Batch(NamedTuple):
    """``b`` structures with ``n`` atoms and ``e`` edges in all, in the precision of the network.

    numbers [n] int64 · edge_index [2, e] int64 (centre i, neighbour j) · vectors [e, 3] r_j + shift − r_i, Å ·
    structure [n] int64 · n_atoms [b] · energy [b] eV · forces [n, 3] eV/Å · weight [b] (of the data set) ·
    stress [b, 3, 3] eV/Å³ · volume [b] Å³, 0 for a structure without a stress label · stressed: how many have one ·
    latent: what the latent charges of every structure do to each other, empty for a network without · charged: the
    structures as charge equilibration takes them, empty where it is not trained along
    """

    numbers: Tensor
    edge_index: Tensor
    vectors: Tensor
    structure: Tensor
    n_atoms: Tensor
    energy: Tensor
    forces: Tensor
    weight: Tensor
    stress: Tensor
    volume: Tensor
    stressed: int
    latent: tuple[Interaction, ...] = ()
    charged: tuple[Charged, ...] = ()


class Prediction(NamedTuple):
    """energy [b] eV · forces [n, 3] eV/Å · stress [b, 3, 3] eV/Å³ (zero where there is no label), or None.

    excess [b] e²: by how much latent charges did not add up by themselves, Σ over groups of (sum − total)², or None.
    misfit [b]: weighted relative squared errors of dipoles and the like, where charges are trained along, or None.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    excess: Tensor | None = None
    misfit: Tensor | None = None

    def detach(self) -> Prediction:
        """The numbers alone."""
        return Prediction(
            self.energy.detach(),
            self.forces.detach(),
            None if self.stress is None else self.stress.detach(),
            misfit=None if self.misfit is None else self.misfit.detach(),
        )


def pack(sample: Sample, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Batch:
    """One sample as a batch of one, cast once; the subtraction of references was done in float64 before."""
    numbers = sample.systems.numbers.to(device)
    real = {"dtype": dtype, "device": device}
    stress = torch.zeros(3, 3) if sample.stress is None else sample.stress
    return Batch(
        numbers=numbers,
        edge_index=sample.edge_index.to(device),
        vectors=sample.vectors.to(**real),
        structure=torch.zeros_like(numbers),
        n_atoms=torch.tensor([len(numbers)], **real),
        energy=torch.tensor([sample.energy], **real),
        forces=sample.forces.to(**real),
        weight=torch.tensor([sample.weight], **real),
        stress=stress[None].to(**real),
        volume=torch.tensor([0.0 if sample.stress is None else sample.volume], **real),
        stressed=int(sample.stress is not None),
        latent=() if sample.latent is None else (sample.latent.to(**real),),
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
        stress=torch.cat([p.stress for p in parts]),
        volume=torch.cat([p.volume for p in parts]),
        stressed=sum(p.stressed for p in parts),
        latent=tuple(x for p in parts for x in p.latent),
        charged=tuple(x for p in parts for x in p.charged),
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


def predict(network: nn.Module, batch: Batch, *, create_graph: bool, charges: JointCharges | None = None) -> Prediction:
    """Energies, forces and (where labelled) stresses of ``network``; ``create_graph`` to train through them.

    With v = r_j + shift − r_i and g = ∂E/∂v, ∂E/∂r_j = g and ∂E/∂r_i = −g, so the force on i gains g and that on j
    loses it; a strain scales every v, so the stress is Σ g ⊗ v / V, made symmetric. Latent charges add their Coulomb
    energy, with what it does at fixed charges; ``charges`` that are trained along add theirs.
    """
    vectors = batch.vectors.detach().requires_grad_()
    forces, strained = torch.zeros_like(batch.forces), torch.zeros_like(batch.stress)
    excess: Tensor | None = None
    if batch.latent:
        assert isinstance(network, NequIP)
        atomic, latent = network.with_charges(batch.numbers, batch.edge_index, vectors)
        moment = None
        if batch.latent[0].exchanged is not None:
            edges, count = batch.edge_index, len(batch.energy)
            latent, moment = exchanged(network.cutoff, latent, edges, vectors, batch.structure, count)
        coulomb, forces, strained, excess = long_range_of(latent, batch.latent)
        if moment is not None:
            fields = torch.stack([x.scale * x.field for x in batch.latent])
            coulomb = coulomb - (fields * moment).sum(1)
        energy = coulomb.index_add(0, batch.structure, atomic)
    else:
        atomic = network(batch.numbers, batch.edge_index, vectors).reshape(-1)
        energy = torch.zeros_like(batch.energy).index_add(0, batch.structure, atomic)
    (g,) = torch.autograd.grad(energy.sum(), vectors, create_graph=create_graph)
    misfit: Tensor | None = None
    if charges is not None:
        part = charges(batch.charged, stress=bool(batch.stressed))
        energy, forces = energy + part.energy.to(energy), forces + part.forces.to(energy)
        strained, misfit = strained + part.strain.to(energy), part.misfit.to(energy)
    centre, neighbour = batch.edge_index
    forces = forces.index_add(0, centre, g).index_add(0, neighbour, g, alpha=-1)
    stress = None
    if batch.stressed:
        products = g[:, :, None] * batch.vectors[:, None, :]
        strained = strained.index_add(0, batch.structure[centre], products)
        per_volume = torch.where(batch.volume > 0, 1 / batch.volume.clamp(min=1e-12), 0.0)
        stress = 0.5 * (strained + strained.transpose(1, 2)) * per_volume[:, None, None]
    answer = Prediction(energy, forces, stress, excess, misfit)
    return answer if create_graph else answer.detach()


@dataclass(frozen=True)
class Loss:
    """Weighted mean of squared errors of energy per atom, force and stress components.

    loss = energy · ⟨w h(ΔE/N)⟩ + forces · ⟨w h(|ΔF|)⟩/3 + stress · ⟨w h(|Δσ|)⟩/9, averaged over structures, atoms and
    structures with a stress label; w the weight of the data set, h(x) = x². The misfit of charges that are trained
    along brings weights of its own. With a Huber threshold δ, h(x) =
    δ(2|x| − δ) beyond |x| = δ, so that a wrong label pulls with a bounded gradient; errors of vectors and tensors enter
    with their norm, which keeps the loss rotation invariant.

    Attributes
    ----------
    energy, forces, stress : weights of the terms, 1/(eV/atom)², 1/(eV/Å)² and 1/(eV/Å³)²
    neutrality : weight of the mean ``excess`` of latent charges, 1/e²: what is shifted over the whole structure moves
        charge from one end to the other, which Born charges should not see
    huber_energy, huber_forces, huber_stress : thresholds in eV/atom, eV/Å and eV/Å³, or None
    """

    energy: float = 1.0
    forces: float = 10.0
    stress: float = 10.0
    huber_energy: float | None = None
    huber_forces: float | None = None
    huber_stress: float | None = None
    neutrality: float = 0.0

    def __call__(self, answer: Prediction, batch: Batch, counts: tuple[int, int, int] | None = None) -> Tensor:
        """Scalar loss of a prediction; ``counts`` (see :meth:`counts`) of the batch that this one is a part of."""
        structures, atoms, stressed = counts or self.counts([batch])
        energy_error = ((answer.energy - batch.energy) / batch.n_atoms).square()
        force_error = (answer.forces - batch.forces).square().sum(dim=1)
        energy_term = (batch.weight * _huber(energy_error, self.huber_energy)).sum() / structures
        force_term = (batch.weight[batch.structure] * _huber(force_error, self.huber_forces)).sum() / (3 * atoms)
        total = self.energy * energy_term + self.forces * force_term
        if answer.stress is not None:
            # without a label both are zero
            stress_error = (answer.stress - batch.stress).square().sum(dim=(1, 2))
            stress_term = (batch.weight * _huber(stress_error, self.huber_stress)).sum() / (9 * max(stressed, 1))
            total = total + self.stress * stress_term
        if answer.excess is not None and self.neutrality:
            total = total + self.neutrality * (batch.weight * answer.excess).sum() / structures
        if answer.misfit is not None:
            total = total + (batch.weight * answer.misfit).sum() / structures
        return total

    @staticmethod
    def counts(parts: Sequence[Batch]) -> tuple[int, int, int]:
        """Structures, atoms, structures with a stress label: what the terms are averaged over."""
        return (
            sum(p.energy.shape[0] for p in parts),
            sum(p.numbers.shape[0] for p in parts),
            sum(p.stressed for p in parts),
        )


def _huber(squared: Tensor, threshold: float | None) -> Tensor:
    if threshold is None:
        return squared
    limit = threshold**2
    # the clamp keeps the square root differentiable at zero error
    linear = threshold * (2 * squared.clamp(min=limit).sqrt() - threshold)
    return torch.where(squared <= limit, squared, linear)


class Errors:
    """Sums of errors over batches, kept on the device in float64: ``sums`` [9].

    Σ loss · structures, structures, Σ (ΔE/N)², Σ |ΔE/N|, Σ |ΔF|², Σ |ΔF component|, components, Σ |Δσ|², components.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(9, dtype=torch.float64, device=device)

    def add(self, answer: Prediction, batch: Batch, loss: Tensor) -> None:
        """Count one predicted batch and its mean ``loss``."""
        structures, components = float(len(answer.energy)), float(answer.forces.numel())
        per_atom = ((answer.energy - batch.energy) / batch.n_atoms).double()
        error = (answer.forces - batch.forces).double()
        stress = batch.stress.new_zeros(1) if answer.stress is None else answer.stress - batch.stress
        parts = (
            loss.double() * structures,
            per_atom.square().sum(),
            per_atom.abs().sum(),
            error.square().sum(),
            error.abs().sum(),
            stress.double().square().sum(),
        )
        self.sums[[0, 2, 3, 4, 5, 7]] += torch.stack(parts)
        self.sums[1] += structures
        self.sums[6] += components
        self.sums[8] += 9.0 * batch.stressed

    def spoil(self) -> None:
        """What is counted here has no errors, as there is no prediction."""
        self.sums[[0, 2, 3, 4, 5, 7]] = math.nan

    def means(self) -> dict[str, float]:
        """Mean loss, force RMSE and MAE (eV/Å), energy RMSE and MAE (meV/atom), stress RMSE (GPa) where labelled."""
        loss, structures, energies, energies_abs, squares, absolutes, components, stresses, entries = self.sums.tolist()
        structures, components = max(structures, 1.0), max(components, 1.0)
        means = {
            "loss": loss / structures,
            "force_rmse": math.sqrt(squares / components),
            "force_mae": absolutes / components,
            "energy_rmse": 1000 * math.sqrt(energies / structures),
            "energy_mae": 1000 * energies_abs / structures,
        }
        return means | ({"stress_rmse": math.sqrt(stresses / entries) / GPa} if entries else {})
