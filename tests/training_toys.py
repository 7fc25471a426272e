"""Tiny labelled structures and a tiny network for the tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import write
from torch import Tensor, nn

from voltpi.potential.training.labels import AUTO, KINDS, Source

CUTOFF = 3.0
ALL_AUTO = {f"{kind}_key": AUTO for kind in KINDS}


class TinyNetwork(nn.Module):
    """Pair energies from a small perceptron on Gaussians of the distance: smooth to the cutoff, conservative."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = {"seed": seed}
        self.species = nn.Parameter(torch.randn(10, 4, generator=generator))
        self.first = nn.Parameter(torch.randn(16, 12, generator=generator) * 0.3)
        self.last = nn.Parameter(torch.randn(12, generator=generator) * 0.3)
        self.register_buffer("centres", torch.linspace(0.5, CUTOFF, 8))

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        i, j = edge_index
        r = vectors.norm(dim=1, keepdim=True)
        radial = torch.exp(-4 * (r - self.centres) ** 2)
        species = torch.cat([self.species[numbers[i]], self.species[numbers[j]]], dim=1)
        smooth = (0.5 * (1 + torch.cos(torch.pi * r / CUTOFF)))[:, 0]
        pair = (torch.tanh(torch.cat([radial, species], dim=1) @ self.first) @ self.last) * smooth
        return torch.zeros(len(numbers), dtype=vectors.dtype).index_add(0, i, pair)


def water(n: int = 2, seed: int = 0, box: float = 5.0) -> Atoms:
    """A labelled cell of ``n`` distorted water molecules; labels are smooth but arbitrary."""
    rng = np.random.default_rng(seed)
    molecule = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    places = np.array([[0.2, 0.3, 0.4], [2.7, 2.4, 2.9], [0.3, 2.6, 2.2], [2.5, 0.1, 0.5]])[:n]
    positions = np.concatenate([molecule + p + rng.normal(scale=0.05, size=(3, 3)) for p in places])
    atoms = Atoms("OH2" * n, positions=positions, cell=[box] * 3, pbc=True)
    atoms.info["REF_energy"] = -468.0 * n + rng.normal(scale=0.1)
    atoms.arrays["REF_forces"] = rng.normal(scale=0.5, size=(3 * n, 3))
    return atoms


def molecule(symbols: str, energy: float, seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(symbols)
    atoms.positions = np.arange(len(atoms))[:, None] * [1.1, 0.3, 0.0] + rng.normal(scale=0.02, size=(len(atoms), 3))
    atoms.info["REF_energy"] = energy
    atoms.arrays["REF_forces"] = np.zeros((len(atoms), 3))
    return atoms


def stored(tmp_path: Path, frames: list[Atoms], file: str = "set.xyz", **options: object) -> Source:
    write(tmp_path / file, frames, format="extxyz")
    return Source(**{"path": tmp_path / file, "name": "water", **options})  # type: ignore[arg-type]


def flexible_water(n: int = 2, seed: int = 0, box: float = 6.0, scatter: float = 0.06) -> Atoms:
    """``n`` flexible molecules with energy, forces and stress of one smooth pair potential (eV, Å).

    O–H springs of 45 eV/Å², H–H springs of 12 eV/Å² within a molecule, exponential repulsion and a Gaussian well
    between oxygens; −468 eV a molecule.
    """
    rng = np.random.default_rng(seed)
    shape = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    places = np.array([[0.2, 0.3, 0.4], [2.9, 2.4, 2.9], [0.3, 2.9, 2.2], [2.8, 0.1, 0.5]])[:n] * box / 6.0
    turned = [shape @ np.linalg.qr(rng.normal(size=(3, 3)))[0].T for _ in range(n)]
    positions = np.concatenate(
        [t + p + rng.normal(scale=scatter, size=(3, 3)) for t, p in zip(turned, places, strict=True)]
    )
    atoms = Atoms("OH2" * n, positions=positions, cell=[box] * 3, pbc=True)
    energy, forces, strained = -468.0 * n, np.zeros((3 * n, 3)), np.zeros((3, 3))
    for i in range(3 * n):
        for j in range(i):
            bonded, both = i // 3 == j // 3, i % 3 == 0 and j % 3 == 0
            if not bonded and not both:
                continue
            v = atoms.get_distance(i, j, mic=not bonded, vector=True)
            r = float(np.linalg.norm(v))
            if bonded:
                k, rest = (45.0, 0.96) if i % 3 == 0 or j % 3 == 0 else (12.0, 1.52)
                e, slope = 0.5 * k * (r - rest) ** 2, k * (r - rest)
            else:
                wall, well = 40.0 * np.exp(-2.5 * (r - 1.5)), 0.2 * np.exp(-2.0 * (r - 2.8) ** 2)
                e, slope = wall - well, -2.5 * wall + 4.0 * (r - 2.8) * well
            energy += e
            forces[i] += slope * v / r
            forces[j] -= slope * v / r
            strained += slope / r * np.outer(v, v)
    atoms.info |= {"REF_energy": energy, "REF_stress": strained / atoms.get_volume()}
    atoms.arrays["REF_forces"] = forces
    return atoms
