"""Makes the start of inputs/nacl-capacitor: 64 NaCl at 1300 K between two gold electrodes at 1 V.

The ions start on a lattice, melt, and push the right electrode, which moves along z until the melt is at zero pressure;
there it is fixed, and the melt equilibrates at the voltage of the settings. All with VoltPI's own potential:

python make_start.py OUT.xyz [--settings ../../inputs/nacl-capacitor/settings.yaml]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import fcc100
from ase.constraints import FixAtoms
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from numpy.typing import NDArray
from rich.progress import track

from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.settings import load_settings

TEMPERATURE = 1300.0  # K
LATTICE = 4.07  # Å, gold
PAIRS = 64
GAP = 27.0  # Å between the inner planes of the metal to begin with
CONTACT = 2.8  # Å from there to the first ions
MARGIN = 2.0  # Å beyond the outer planes
TIMESTEP = 2.0 * units.fs
PISTON_STEPS = 20
INPUTS = Path(__file__).resolve().parents[2] / "inputs" / "nacl-capacitor"


def build() -> Atoms:
    """Two layers of 5 × 5 gold atoms on each side, ions on a cubic lattice between them."""
    left = fcc100("Au", (5, 5, 2), a=LATTICE, periodic=False)
    side = float(left.cell[0, 0])
    left.positions[:, 2] += MARGIN - left.positions[:, 2].min()
    right = left.copy()
    right.positions[:, 2] += left.positions[:, 2].max() + GAP - MARGIN
    lattice = np.stack(np.meshgrid(*[np.arange(4)] * 2, np.arange(8), indexing="ij"), -1).reshape(-1, 3)
    spacing = np.array([side / 4, side / 4, (GAP - 2 * CONTACT) / 7])
    positions = lattice * spacing + np.array([0, 0, left.positions[:, 2].max() + CONTACT])
    sign = np.where(lattice.sum(1) % 2 == 0, 1, -1)
    order = np.argsort(-sign, kind="stable")
    ions = Atoms(f"Na{PAIRS}Cl{PAIRS}", positions[order])
    ions.set_initial_charges(sign[order])
    atoms = Atoms(cell=[side, side, right.positions[:, 2].max() + MARGIN], pbc=[True, True, False])
    for part in (left, right, ions):
        part.set_tags(None)
        atoms += part
    return atoms


def dynamics(atoms: Atoms, friction: float, rng: np.random.Generator) -> Langevin:
    """Langevin dynamics of the ions at the temperature; ``friction`` in 1/fs."""
    options = {"temperature_K": TEMPERATURE, "friction": friction / units.fs, "rng": rng, "fixcm": False}
    return Langevin(atoms, TIMESTEP, **options)


def relax_gap(atoms: Atoms, right: NDArray[np.intp], picoseconds: float, rng: np.random.Generator) -> None:
    """Moves the right electrode with the force on it, overdamped, and leaves it at the mean of the second half."""
    motion = dynamics(atoms, 0.01, rng)
    ions = np.setdiff1d(np.arange(len(atoms)), atoms.constraints[0].index)
    inner = atoms.positions[atoms.positions[:, 2] < MARGIN + LATTICE][:, 2].max()
    area = float(atoms.cell[0, 0] * atoms.cell[1, 1])
    gaps = []

    def set_gap(new: float) -> None:
        old = atoms.positions[right, 2].min() - inner
        positions = atoms.get_positions()
        positions[ions, 2] = inner + (positions[ions, 2] - inner) * new / old
        positions[right, 2] += new - old
        atoms.set_positions(positions, apply_constraint=False)
        atoms.cell[2, 2] = positions[:, 2].max() + MARGIN

    for _ in track(range(int(picoseconds * 500 / PISTON_STEPS)), description="gap at zero pressure"):
        pressure = []
        for _ in range(PISTON_STEPS):
            motion.run(1)
            pressure.append(atoms.get_forces(apply_constraint=False)[right, 2].sum() / area)
        gap = atoms.positions[right, 2].min() - inner
        # a melt's compressibility is about 50 Å³/eV: a hundredth of the way each time
        set_gap(gap * (1 + np.clip(0.5 * np.mean(pressure), -0.005, 0.005)))
        gaps.append(atoms.positions[right, 2].min() - inner)
    half = gaps[len(gaps) // 2 :]
    set_gap(float(np.mean(half)))
    print(f"gap {np.mean(half):.3f} ± {np.std(half):.3f} Å")


def write_starts(out: Path, start: Atoms, charge: float) -> None:
    """OUT.xyz, and OUT-potentiostat.xyz with the charge (e) on the right electrode as the x (Å) of an atom X."""
    columns = ["symbols", "positions", *(["initial_charges"] if start.has("initial_charges") else [])]
    write(out, start, format="extxyz", columns=columns)
    ghost = Atoms("X", [[charge, 0.0, 0.0]])
    write(out.with_name(f"{out.stem}-potentiostat.xyz"), start + ghost, format="extxyz", columns=columns)


def main() -> None:
    """Writes OUT.xyz in the extended XYZ that i-PI reads with mode='ase'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--settings", type=Path, default=INPUTS / "settings.yaml")
    parser.add_argument("--gap-ps", type=float, default=16.0)
    parser.add_argument("--ps", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    atoms = build()
    metal = np.flatnonzero(atoms.numbers == 79)
    right = metal[len(metal) // 2 :]
    atoms.set_constraint(FixAtoms(metal))
    thermalize_momenta(atoms, temperature_K=2 * TEMPERATURE, rng=rng)
    atoms.calc = VoltPICalculator(
        load_settings(options.settings, {"electrodes.left.potential": 0.0, "electrodes.right.potential": 0.0})
    )
    relax_gap(atoms, right, options.gap_ps, rng)
    atoms.calc = VoltPICalculator(options.settings)
    motion = dynamics(atoms, 0.005, rng)
    for _ in track(range(int(options.ps * 10)), description="melt at the voltage"):
        motion.run(50)
    start = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    start.set_initial_charges(atoms.get_initial_charges())
    atoms.get_potential_energy()
    write_starts(options.out, start, atoms.calc.results["electrodes"]["right"]["charge"])


if __name__ == "__main__":
    main()
