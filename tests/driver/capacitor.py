"""A small capacitor for runs in i-PI: two squares of gold atoms, whose capacitance is one linear solve, and argon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from ase.io import write
from numpy.typing import NDArray
from scipy.special import erf

from voltpi.driver import pes

Array = NDArray[np.float64]

COULOMB = 14.3996454784255  # eV Å/e²
ETA = 1.8  # 1/Å
SIDE, SPACING, GAP = 3, 2.88, 8.0
PLATE = SIDE**2
KT = 8.617333262e-5 * 300  # eV

XML = """<simulation verbosity='low' floatformat='%24.17e' safe_stride='1'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [step, time{{picosecond}}, potential, temperature{{kelvin}}] </properties>
    <trajectory filename='pos' stride='1' format='xyz'> positions </trajectory>
    {outputs}
    <checkpoint filename='chk' stride='7' overwrite='True'/>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>5</seed></prng>
  {forcefield}
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'> start.xyz </file>
      {masses}
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <fixcom> False </fixcom>
      <fixatoms_dof> {fixed} </fixatoms_dof>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> {timestep} </timestep>
        <thermostat mode='{thermostat}'> <tau units='femtosecond'> 10 </tau> </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""
UNIX = "<ffsocket name='ff' mode='unix'> <address>capacitor</address> </ffsocket>"


def direct(options: str = "") -> str:
    return (
        f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> {options} "
        "<parameters>{settings: settings.yaml, template: start.xyz}</parameters> </ffdirect>"
    )


def plates() -> Array:
    """[2 PLATE, 3] Å."""
    square = np.array([[x, y, 0.0] for x in range(SIDE) for y in range(SIDE)]) * SPACING
    return np.vstack([square, square + np.array([0, 0, GAP])])


def structure(charge: float | None = None) -> Atoms:
    """The capacitor; with ``charge`` (e) the potentiostat's ghost at 1 Å/e comes last."""
    argon = [[1.5, 1.5, 4.0], [4.5, 4.2, 4.0]]
    atoms = Atoms(["Au"] * 2 * PLATE + ["Ar"] * 2, np.vstack([plates(), argon]), cell=[30, 30, 30], pbc=False)
    if charge is not None:
        atoms += Atoms("X", [[charge, 0, 0]])
    return atoms


def electrodes(**held: Any) -> list[dict[str, Any]]:
    """Both plates; ``left`` and ``right`` say what each is held at."""
    places = {"left": f"index 0:{PLATE}", "right": f"index {PLATE}:{2 * PLATE}"}
    return [{"name": name, "atoms": atoms, "eta": ETA, **held[name]} for name, atoms in places.items()]


def settings(**more: Any) -> dict[str, Any]:
    argon = {"epsilon": 0.3, "sigma": 3.2}  # such that it stays
    return {
        "device": "cpu",
        "precision": "double",
        "charges": {"model": "fixed"},
        "short_range": {"pair": {"lennard_jones": {"Ar": argon, "Au": {"epsilon": 0.005, "sigma": 2.6}}}},
        **more,
    }


def potentiostat(potential: Any, **more: Any) -> dict[str, Any]:
    held = {"left": {"charge": 0}, "right": {"charge": 0}}
    own = {"electrodes": ["left", "right"], "potential": potential, **more}
    return settings(electrodes=electrodes(**held), potentiostat=own)


def capacitance() -> float:
    """e/V, from the matrix of Gaussian charges: brute force, nothing of the package."""
    r = plates()
    distance = np.linalg.norm(r[:, None] - r, axis=-1) + np.eye(len(r))
    matrix = COULOMB * erf(ETA / np.sqrt(2) * distance) / distance
    np.fill_diagonal(matrix, COULOMB * np.sqrt(2 / np.pi) * ETA)
    sides = np.repeat(np.eye(2), PLATE, axis=1)
    # charges -n and n on the plates and their potentials, stationary together
    system = np.block([[matrix, -sides.T], [sides, np.zeros((2, 2))]])
    potentials = np.linalg.solve(system, np.r_[np.zeros(2 * PLATE), -1.0, 1.0])[-2:]
    return float(1 / (potentials[1] - potentials[0]))


def write_run(
    folder: Path,
    tree: dict[str, Any],
    *,
    charge: float | None = None,
    mass: float | None = None,
    forcefield: str = "",
    steps: int = 20,
    beads: int = 1,
    timestep: float = 4.0,
    thermostat: str = "",
    extras: tuple[str, ...] = ("electrode_charges", "electrode_potentials"),
) -> Path:
    """Input, settings and start structure; the plates are frozen, and the ghost's y and z. Returns the XML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    atoms = structure(charge)
    atoms.set_initial_charges(np.zeros(len(atoms)))
    write(folder / "start.xyz", atoms, format="extxyz")
    (folder / "settings.yaml").write_text(yaml.safe_dump(tree))
    fixed, masses = list(range(6 * PLATE)), ""
    if charge is not None:
        ghost = len(atoms) - 1
        fixed += [3 * ghost + 1, 3 * ghost + 2]
        if mass is not None:
            masses = f"<masses mode='manual' index='{ghost}' units='dalton'> [{mass}] </masses>"
    lines = [f"<trajectory filename='{e}' stride='1' extra_type='{e}'> extras </trajectory>" for e in extras]
    text = XML.format(
        outputs="\n    ".join(lines),
        steps=steps,
        forcefield=forcefield or direct(),
        beads=beads,
        masses=masses,
        fixed=fixed,
        timestep=timestep,
        thermostat=thermostat or ("langevin" if beads == 1 else "pile_l"),
    )
    (folder / "in.xml").write_text(text)
    return folder / "in.xml"


def printed(folder: Path, name: str, bead: int = 0) -> Array:
    """An extras file of a bead as i-PI wrote it, one row a step."""
    return np.loadtxt(folder / f"run.{name}_{bead}", ndmin=2)
