"""Energies of atoms by regression, and what a network needs to know of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase.data import chemical_symbols

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.pair import ZBL
from voltpi.potential.training.dataset import Sample

__all__ = ["Summary", "reference_energies", "subtract_references", "summarize", "without_repulsion"]


@dataclass(frozen=True)
class Summary:
    """What a network needs to know of its data: elements, RMS of the target forces (eV/Å), neighbours per atom."""

    species: tuple[int, ...]
    force_rms: float
    average_neighbors: float


def reference_energies(
    samples: Sequence[Sample],
    *,
    ridge: float = 0.0,
    start: Mapping[int, float] | None = None,
) -> dict[str, dict[int, float]]:
    """Energies of the atoms (eV) by data set and atomic number, from least squares on the energies per atom.

    Minimises ⟨(Σ_z c_z e_z − E/N)²⟩ + ridge |e − start|², c_z the fractions of the elements in a frame. Where the
    compositions do not tell the elements apart (frames that all are water) and ``ridge`` is 0 the solution is the one
    nearest to ``start`` (zero where not given): its sum over a frame is right, its parts have no meaning. A ``ridge``
    of about 1e-6 does nothing but keep parts small that the data hardly determine.
    """
    references: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(s.dataset for s in samples):
        own = [s for s in samples if s.dataset == name]
        species = sorted({int(z) for s in own for z in s.systems.numbers.unique()})
        first = np.array([(start or {}).get(z, 0.0) for z in species])
        fractions = np.array([[float((s.systems.numbers == z).double().mean()) for z in species] for s in own])
        energies = np.array([s.energy / s.systems.n_atoms for s in own]) - fractions @ first
        held = np.sqrt(ridge * len(own)) * np.eye(len(species))
        matrix = np.concatenate([fractions, held])
        change = np.linalg.lstsq(matrix, np.concatenate([energies, np.zeros(len(species))]), rcond=1e-8)[0]
        references[name] = dict(zip(species, (first + change).tolist(), strict=True))
    return references


def subtract_references(samples: Sequence[Sample], references: Mapping[str, Mapping[int, float]]) -> list[Sample]:
    """Samples whose energies count from the atoms' ``references``; what the network then has to learn.

    Raises InputError for a data set or element that has no reference (validation files need the ``name`` of the
    training data of their level of theory).
    """
    result = []
    for sample in samples:
        own = references.get(sample.dataset)
        if own is None:
            raise InputError(
                f"{sample.path}: data set '{sample.dataset}' has no reference energies: "
                f"name it as training data of the same level of theory ({', '.join(references)})"
            )
        missing = set(sample.systems.numbers.tolist()) - set(own)
        if missing:
            raise InputError(
                f"{sample.path}, frame {sample.frame}: no reference energy for {chemical_symbols[min(missing)]}, which "
                f"the training data of '{sample.dataset}' do not have: add some with it, or remove the frame"
            )
        total = math.fsum(own[z] for z in sample.systems.numbers.tolist())
        result.append(replace(sample, energy=sample.energy - total))
    return result


def summarize(samples: Sequence[Sample], repulsion: ZBL | None = None) -> Summary:
    """Elements, RMS of the target forces without ``repulsion``, and average number of neighbours over all samples."""
    samples = without_repulsion(samples, repulsion)
    atoms = sum(s.systems.n_atoms for s in samples)
    square = sum(float(s.forces.square().sum()) for s in samples)
    return Summary(
        species=tuple(sorted({int(z) for s in samples for z in s.systems.numbers.unique()})),
        force_rms=math.sqrt(square / (3 * atoms)),
        average_neighbors=sum(s.edge_index.shape[1] for s in samples) / atoms,
    )


def without_repulsion(samples: Sequence[Sample], repulsion: ZBL | None) -> Sequence[Sample]:
    """The samples with the energies and forces that a repulsion leaves to learn; stresses stay."""
    if repulsion is None:
        return samples
    out = []
    for s in samples:
        vectors = s.vectors.clone().requires_grad_()
        energy = repulsion.atomic(s.systems.numbers, s.edge_index, vectors).sum()
        (slope,) = torch.autograd.grad(energy, vectors)
        centre, neighbour = s.edge_index
        forces = s.forces.index_add(0, centre, slope, alpha=-1).index_add(0, neighbour, slope)
        out.append(replace(s, energy=s.energy - float(energy.detach()), forces=forces))
    return out
