"""Folders as a run of i-PI with electrodes leaves them, written from arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import fcc100

BOHR = 0.529177210903  # Å, CODATA 2018
HARTREE = 27.211386245988  # eV
DATA = Path(__file__).parents[1] / "potential" / "data" / "constant_potential.json"

Frame = dict[str, Any]


def gold(case: str = "case2_au_ions_dV2_ew2d") -> tuple[Atoms, np.ndarray, np.ndarray]:
    """A published structure: gold slabs, with or without ions between; all its charges (e) and the role of atoms."""
    data = json.loads(DATA.read_text())
    stored = data["cases"][case]
    geometry = data["geometries"][stored["geometry"]]
    role = np.array(list(geometry["role"]))
    charges = np.zeros(len(role))
    charges[role == "E"] = geometry["fixed_charges"]
    symbols = np.where(role != "E", "Au", np.where(charges > 0, "Na", "Cl"))
    periodic = stored["boundary"] == "ffield"
    atoms = Atoms(symbols.tolist(), geometry["positions"], cell=geometry["cell"], pbc=[True, True, periodic])
    atoms.set_initial_charges(charges)
    charges[role != "E"] = stored["electrode_charges"]
    return atoms, charges, role


def water_between_gold(n_waters: int = 4) -> Atoms:
    """Water between two gold slabs, 4 Å apart at least; electrodes tagged 1 and 2."""
    rng = np.random.default_rng(7)
    slab = fcc100("Au", (2, 2, 3), a=4.08, vacuum=0.0)
    slab.info = {}
    low, high = slab.copy(), slab.copy()
    high.positions[:, 2] += 18.0
    low.set_tags(1)
    high.set_tags(2)
    atoms = low + high
    for k in range(n_waters):
        site = [1.5 + 2.8 * (k % 2), 1.4 + 2.6 * (k // 2), 8.6 + 2.4 * (k % 3)]
        frame = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        atoms += Atoms("OH2", np.array([[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]) @ frame + site)
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)  # the metal is rough, too
    atoms.positions[:, 2] += 1.5
    atoms.set_cell([*slab.cell.lengths()[:2], 26.0])
    atoms.pbc = True
    return atoms


def gold_settings(boundary: str, low: float | None = -1.0, high: float | None = 1.0) -> str:
    """Settings of that structure."""
    return f"""
charges: {{model: fixed}}
coulomb: {{boundary: {boundary}, coulomb_constant: 14.399645}}
electrodes:
  - {{name: left, atoms: "element Au and z < 10", eta: 1.805132, potential: {low}}}
  - {{name: right, atoms: "element Au and z >= 10", eta: 1.805132, potential: {high}}}
"""


def write_run(folder: Path, start: Atoms, frames: list[list[Frame]], settings: str, *, digits: int = 10) -> Path:
    """A run whose ``frames`` [f][beads] hold what is written, five steps of 1 fs between two.

    positions (Å), charges (e), shells (Å), totals (e), potentials (V)
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(settings)
    start.write(folder / "start.xyz", format="extxyz")
    rows = ["# column 1 --> step", "# column 2 --> time{femtosecond}", "# column 3 --> temperature{kelvin}"]
    rows += [f"{5 * f} {5.0 * f} 300.0" for f in range(len(frames))]
    (folder / "run.out").write_text("\n".join(rows) + "\n")
    bead_names = [f"_{b:02d}" for b in range(len(frames[0]))] if len(frames[0]) > 1 else ["_0"]
    lengths, angles = start.cell.lengths(), start.cell.angles()
    cell = " ".join(f"{x:.{digits}e}" for x in (*lengths, *angles))
    for b, name in enumerate(bead_names):
        with (folder / f"run.pos{name}.xyz").open("w") as file:
            for f, beads in enumerate(frames):
                if "positions" not in beads[b]:
                    continue
                title = f"# CELL(abcABC): {cell} Step: {5 * f} Bead: {b} positions{{angstrom}} cell{{angstrom}}"
                file.write(f"{len(start)}\n{title}\n")
                for symbol, r in zip(start.get_chemical_symbols(), beads[b]["positions"], strict=True):
                    file.write(f"{symbol} " + " ".join(f"{x:.{digits}e}" for x in r) + "\n")
        for key, extra, unit in (
            ("charges", "charges", 1.0),
            ("shells", "shells", BOHR),
            ("totals", "electrode_charges", 1.0),
            ("potentials", "electrode_potentials", HARTREE),
        ):
            if key not in frames[0][b]:
                continue
            with (folder / f"run.{extra}{name}").open("w") as file:
                for f, beads in enumerate(frames):
                    file.write(f" #EXTRAS({extra})# Step:  {5 * f:10d} \n")
                    values = np.atleast_2d(np.asarray(beads[b][key]) / unit)
                    for row in values:
                        file.write(" ".join(f"{x:.{digits + 6}e}" for x in row) + "\n")
    for path in folder.glob("run.pos*.xyz"):
        if path.stat().st_size == 0:
            path.unlink()
    return folder
