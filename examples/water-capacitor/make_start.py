"""Makes the start of inputs/water-capacitor: 48 molecules at 300 K between two gold electrodes.

First flexible TIP3P between walls (seconds a ps), which pushes the right one until it is at zero pressure; there the
electrodes stay. Then the model itself at the voltage of the settings:

python make_start.py OUT.xyz [--settings ../../inputs/water-capacitor/settings.yaml]
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
from ase import Atoms, units
from ase.build import fcc100
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.tip3p import angleHOH, rOH
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from rich.progress import track
from scipy.spatial.transform import Rotation

from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.settings import load_settings

TEMPERATURE = 300.0  # K
LATTICE = 4.07  # Å, gold
MOLECULES = (4, 4, 3)
GAP = 16.0  # Å between the inner planes of the metal to begin with
MARGIN = 2.0  # Å beyond the outer planes
VACUUM = 12.0  # Å: no molecule sees another across it
PISTON_STEPS = 20
EXAMPLES = Path(__file__).resolve().parents[1]
INPUTS = EXAMPLES.parent / "inputs" / "water-capacitor"


def script(example: str) -> ModuleType:
    """make_start.py of another example."""
    spec = importlib.util.spec_from_file_location(example.replace("-", "_"), EXAMPLES / example / "make_start.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bulk_water, molten_salt = script("water-in-a-field"), script("nacl-capacitor")


def electrode() -> Atoms:
    """Two layers of 4 × 4 gold atoms, the upper one at z = 0."""
    metal = fcc100("Au", (4, 4, 2), a=LATTICE, periodic=False)
    metal.positions[:, 2] -= metal.positions[:, 2].max()
    metal.set_tags(None)
    return metal


def grid(side: float, rng: np.random.Generator) -> Atoms:
    """Molecules on a grid above z = 0, turned at random."""
    half = np.radians(angleHOH / 2)
    molecule = rOH * np.array([[0, 0, 0], [np.sin(half), np.cos(half), 0], [-np.sin(half), np.cos(half), 0]])
    axes = [np.arange(n) for n in MOLECULES]
    spacing = np.array([side / MOLECULES[0], side / MOLECULES[1], (GAP - 7.0) / (MOLECULES[2] - 1)])
    sites = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3) * spacing + [0, 0, 3.5]
    turns = Rotation.random(len(sites), random_state=rng).as_matrix()
    positions = np.concatenate([molecule @ turn.T + site for turn, site in zip(turns, sites, strict=True)])
    return Atoms("OH2" * len(sites), positions, cell=[side, side, GAP + VACUUM], pbc=True)


class BetweenWalls(Calculator):
    """Flexible TIP3P between two walls of Lennard-Jones sites; ``gap`` (Å) may change between calls.

    ``push`` (eV/Å) is the force on the right wall.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, metal: Atoms, gap: float, epsilon: float, sigma: float, cutoff: float) -> None:
        super().__init__()
        self.water = bulk_water.FlexibleWater()
        self.gap, self.push = gap, 0.0
        self.epsilon, self.sigma, self.cutoff = epsilon, sigma, cutoff
        side = float(metal.cell[0, 0])
        images = [(i * side, j * side, 0.0) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        self.sites = np.concatenate([metal.positions + image for image in images])
        self.side = side

    def calculate(self, atoms=None, properties=("energy", "forces"), system_changes=all_changes):
        """Energy and forces (ASE's calculator interface)."""
        super().calculate(atoms, properties, system_changes)
        self.water.calculate(atoms, properties, all_changes)
        energy, forces = self.water.results["energy"], self.water.results["forces"].copy()
        oxygen = atoms.positions[::3].copy()
        oxygen[:, :2] %= self.side
        for wall in (self.sites, self.sites * [1, 1, -1] + [0, 0, self.gap]):
            apart = oxygen[:, None] - wall
            square = (apart**2).sum(-1)
            sixth = np.where(square < self.cutoff**2, (self.sigma**2 / square) ** 3, 0.0)
            energy += 4 * self.epsilon * (sixth * (sixth - 1)).sum()
            pull = ((24 * self.epsilon * sixth * (2 * sixth - 1) / square)[..., None] * apart).sum(1)
            forces[::3] += pull
            self.push = -pull[:, 2].sum()  # of the last wall, the right one
        self.results = {"energy": energy, "forces": forces}


def langevin(atoms: Atoms, friction: float, rng: np.random.Generator) -> Langevin:
    """Langevin dynamics at the temperature; ``friction`` in 1/fs."""
    options = {"temperature_K": TEMPERATURE, "friction": friction / units.fs, "rng": rng, "fixcm": False}
    return Langevin(atoms, 0.5 * units.fs, **options)


def classical(water: Atoms, walls: BetweenWalls, picoseconds: float, rng: np.random.Generator) -> None:
    """Flexible TIP3P from the grid through a strongly damped start; the gap ends as the mean of the second half."""
    water.calc = walls
    area = walls.side**2
    langevin(water, 0.1, rng).run(1000)
    motion, gaps = langevin(water, 0.01, rng), []

    def set_gap(new: float) -> None:
        molecules = water.positions.reshape(-1, 3, 3)
        # molecules move as a whole
        molecules[:, :, 2] += molecules[:, :1, 2] * (new / walls.gap - 1)
        walls.gap = new
        walls.reset()

    for _ in track(range(int(picoseconds * 2000 / PISTON_STEPS)), description="flexible TIP3P"):
        pushes = []
        for _ in range(PISTON_STEPS):
            motion.run(1)
            pushes.append(walls.push)
        # water's compressibility is about 70 Å³/eV: a hundredth of the way each time
        set_gap(walls.gap * (1 + np.clip(0.7 * np.mean(pushes) / area, -0.002, 0.002)))
        gaps.append(walls.gap)
    half = gaps[len(gaps) // 2 :]
    print(f"gap {np.mean(half):.3f} ± {np.std(half):.3f} Å")
    set_gap(float(np.mean(half)))
    motion.run(2000)


def assemble(metal: Atoms, water: Atoms, gap: float) -> Atoms:
    """Both electrodes, then the molecules."""
    right = metal.copy()
    right.positions[:, 2] = gap - right.positions[:, 2]
    atoms = metal + right + Atoms(water.numbers, water.positions)
    atoms.positions[:, 2] += MARGIN - atoms.positions[:, 2].min()
    atoms.set_cell([*metal.cell.lengths()[:2], atoms.positions[:, 2].max() + MARGIN])
    atoms.pbc = [True, True, False]
    return atoms


def main() -> None:
    """Writes OUT.xyz in the extended XYZ that i-PI reads with mode='ase'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--settings", type=Path, default=INPUTS / "settings.yaml")
    parser.add_argument("--classical-ps", type=float, default=3.0)
    parser.add_argument("--model-ps", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng, model_rng = np.random.default_rng(options.seed).spawn(2)
    settings = load_settings(options.settings)
    assert settings.short_range is not None
    assert settings.short_range.pair is not None
    pair = settings.short_range.pair
    metal = electrode()
    water = grid(float(metal.cell[0, 0]), rng)
    gold, oxygen = pair.lennard_jones["Au"], pair.lennard_jones["O"]
    epsilon, sigma = np.sqrt(gold.epsilon * oxygen.epsilon), np.sqrt(gold.sigma * oxygen.sigma)
    walls = BetweenWalls(metal, GAP, epsilon, sigma, pair.cutoff)
    classical(water, walls, options.classical_ps, rng)
    atoms = assemble(metal, water, walls.gap)
    atoms.set_constraint(FixAtoms(np.flatnonzero(atoms.numbers == 79)))
    atoms.calc = VoltPICalculator(settings)
    thermalize_momenta(atoms, temperature_K=TEMPERATURE, rng=model_rng)
    motion = langevin(atoms, 0.02, model_rng)
    for _ in track(range(int(options.model_ps * 200)), description="the model at the voltage"):
        motion.run(10)
    start = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    atoms.get_potential_energy()
    molten_salt.write_starts(options.out, start, atoms.calc.results["electrodes"]["right"]["charge"])


if __name__ == "__main__":
    main()
