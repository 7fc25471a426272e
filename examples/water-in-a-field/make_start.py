"""Makes the start of inputs/water-field: 64 molecules at 300 K.

First TIP3P (seconds), then the model itself in the field:

python make_start.py OUT.xyz [--classical-ps 10] [--model-ps 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import ClassVar

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.tip3p import TIP3P, angleHOH, rOH
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from rich.progress import track
from scipy.spatial.transform import Rotation

from voltpi.driver.ase import VoltPICalculator

EDGE = 12.42  # Å: 64 molecules at 1.00 g/cm³


def grid(rng: np.random.Generator) -> Atoms:
    """64 molecules on a grid, turned at random."""
    half = np.radians(angleHOH / 2)
    molecule = rOH * np.array([[0, 0, 0], [np.sin(half), np.cos(half), 0], [-np.sin(half), np.cos(half), 0]])
    sites = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3) * EDGE / 4
    turns = Rotation.random(64, random_state=rng).as_matrix()
    positions = np.concatenate([molecule @ turn.T + site for turn, site in zip(turns, sites, strict=True)])
    return Atoms("OH2" * 64, positions, cell=[EDGE] * 3, pbc=True)


class FlexibleWater(Calculator):
    """TIP3P between molecules, harmonic bonds and angles (SPC/Fw's constants, TIP3P's geometry) within."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]
    bond, angle = 1059.162 * units.kcal / units.mol, 75.90 * units.kcal / units.mol

    def __init__(self) -> None:
        super().__init__()
        self.between = TIP3P(rc=5.5, width=0.5)

    def calculate(self, atoms=None, properties=("energy", "forces"), system_changes=all_changes):
        """Energy and forces (ASE's calculator interface)."""
        super().calculate(atoms, properties, system_changes)
        bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        self.between.calculate(bare, ["energy", "forces"], all_changes)
        r = atoms.positions.reshape(-1, 3, 3)
        arms = r[:, 1:] - r[:, :1]
        lengths = np.linalg.norm(arms, axis=2)
        unit = arms / lengths[..., None]
        cosine = (unit[:, 0] * unit[:, 1]).sum(1)
        theta = np.arccos(cosine)
        bend = theta - np.radians(angleHOH)
        stretch = lengths - rOH
        energy = 0.5 * self.bond * (stretch**2).sum() + 0.5 * self.angle * (bend**2).sum()
        pull = self.bond * stretch[..., None] * unit
        # dθ/d arm = (cosθ u − v)/(|arm| sinθ)
        turned = (cosine[:, None, None] * unit - unit[:, ::-1]) / (lengths * np.sin(theta)[:, None])[..., None]
        pull += (self.angle * bend)[:, None, None] * turned
        forces = np.concatenate([pull.sum(1, keepdims=True), -pull], axis=1).reshape(-1, 3)
        self.results = {
            "energy": self.between.results["energy"] + energy,
            "forces": self.between.results["forces"] + forces,
        }


def classical(atoms: Atoms, picoseconds: float, rng: np.random.Generator) -> None:
    """Flexible TIP3P at 300 K, from the grid through a hot, strongly damped start."""
    atoms.calc = FlexibleWater()
    for friction, count in ((0.1, 2000), (0.01, int(picoseconds * 2000))):
        options = {"temperature_K": 300, "friction": friction / units.fs, "rng": rng, "fixcm": False}
        dynamics = Langevin(atoms, 0.5 * units.fs, **options)
        for _ in track(range(count // 100), description="flexible TIP3P"):
            dynamics.run(100)


def quantum_surface(atoms: Atoms, picoseconds: float, rng: np.random.Generator) -> None:
    """The shipped model at 300 K in the field of inputs/water-field."""
    atoms.calc = VoltPICalculator({"model": "water", "field": [0.1, 0.0, 0.0]})
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
    Stationary(atoms)
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=rng, fixcm=False)
    for _ in track(range(int(picoseconds * 200)), description="water in the field"):
        dynamics.run(10)


def main() -> None:
    """Writes OUT.xyz in the extended XYZ that i-PI reads with mode='ase'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classical-ps", type=float, default=10.0)
    parser.add_argument("--model-ps", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    atoms = grid(rng)
    classical(atoms, options.classical_ps, rng)
    if options.model_ps > 0:
        quantum_surface(atoms, options.model_ps, rng)
    write(options.out, Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True), format="extxyz")


if __name__ == "__main__":
    main()
