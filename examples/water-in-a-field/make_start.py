"""Makes the start of inputs/water-field: 64 molecules at 300 K, first TIP3P (seconds), then the model itself in the field.

    python make_start.py OUT.xyz [--classical-ps 30] [--model-ps 1.5]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.tip3p import TIP3P, angleHOH, rOH
from ase.constraints import FixBondLengths
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


def classical(atoms: Atoms, picoseconds: float, rng: np.random.Generator) -> None:
    """Rigid TIP3P at 300 K."""
    first = 3 * np.arange(64)
    pairs = np.concatenate([np.stack([first + i, first + j], 1) for i, j in ((0, 1), (0, 2), (1, 2))])
    atoms.set_constraint(FixBondLengths(pairs, tolerance=1e-5))
    atoms.calc = TIP3P(rc=5.5, width=0.5)
    steps = int(picoseconds * 1000)
    for temperature, friction, count in ((150, 0.1, 1000), (300, 0.01, steps)):
        dynamics = Langevin(atoms, 1.0 * units.fs, temperature_K=temperature, friction=friction / units.fs, rng=rng)
        for _ in track(range(count // 100), description=f"TIP3P at {temperature} K"):
            dynamics.run(100)
    atoms.set_constraint()


def quantum_surface(atoms: Atoms, picoseconds: float, rng: np.random.Generator) -> None:
    """The shipped model at 300 K in the field of inputs/water-field."""
    atoms.calc = VoltPICalculator({"model": "water", "field": [0.1, 0.0, 0.0]})
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
    Stationary(atoms)
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=rng)
    for _ in track(range(int(picoseconds * 200)), description="water in the field"):
        dynamics.run(10)


def main() -> None:
    """Writes OUT.xyz in the extended XYZ that i-PI reads with mode='ase'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classical-ps", type=float, default=30.0)
    parser.add_argument("--model-ps", type=float, default=1.5)
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
