"""Infrared lines of one molecule: those of its Hessian, and those of a run in which every normal mode has energy k_B T.

    python run.py [folder]      # about a quarter of an hour on a core; the numbers of docs/uses/infrared-raman.md

Hessian: central differences of the forces, through the ASE calculator. ∂M/∂Q: its Born charges at the minimum. The run
starts at the minimum with velocities along all modes; it is so cold that they stay harmonic.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.optimize import BFGS

from voltpi.driver.ase import VoltPICalculator

HERE = Path(__file__).parent
KELVIN, TIME_STEP, STEPS, RESOLUTION = 2.0, 0.4, 4000, 30.0
INPUT = """<simulation verbosity='low' floatformat='%24.17e'>
  <output prefix='run'>
    <properties stride='5' filename='out'>
      [ step, time{{femtosecond}}, conserved{{electronvolt}}, temperature{{kelvin}} ]
    </properties>
    <trajectory filename='pos' stride='5' format='ase'> positions </trajectory>
    <trajectory filename='vel' stride='5' format='ase'> velocities </trajectory>
    <trajectory filename='dipole' stride='5' extra_type='dipole'> extras </trajectory>
    <trajectory filename='born' stride='5' extra_type='BEC'> extras </trajectory>
  </output>
  <total_steps> {steps} </total_steps>
  <ffsocket name='voltpi' mode='unix' pbc='False'><address> voltpi </address><latency> 1e-4 </latency></ffsocket>
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='manual'> [ {velocities} ] </velocities>
    </initialize>
    <forces><force forcefield='voltpi'/></forces>
    <ensemble><temperature units='kelvin'> {kelvin} </temperature></ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nve'><timestep units='femtosecond'> {time_step} </timestep></dynamics>
    </motion>
  </system>
</simulation>
"""


def normal_modes(atoms: Atoms, step: float = 2e-3) -> tuple[np.ndarray, np.ndarray]:
    """Wavenumbers [3n] (cm⁻¹, negative: imaginary) and mass-weighted modes [3n, 3n] (rows) at the minimum ``atoms``."""
    n = 3 * len(atoms)
    hessian = np.zeros((n, n))
    for k in range(n):
        for sign in (1.0, -1.0):
            moved = atoms.copy()
            moved.calc = atoms.calc
            moved.positions.reshape(-1)[k] += sign * step
            hessian[k] -= sign * moved.get_forces().ravel() / (2.0 * step)
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T) / np.outer(root, root))
    energies = units._hbar * _PER_SECOND / units._e * np.sqrt(np.abs(values))  # ħω, eV
    return np.sign(values) * energies / units.invcm, vectors.T


_ATOMIC_VELOCITY = units._e**2 / (4.0 * np.pi * units._eps0 * units._hbar) * 1e-5  # Å/fs
_PER_SECOND = np.sqrt(units._e / units._amu) * 1e10  # sqrt(eV/(Å² amu)) in 1/s


def main(folder: Path) -> None:
    """Everything, in ``folder``."""
    folder.mkdir(parents=True)
    water = molecule("H2O")
    water.calc = VoltPICalculator(HERE / "settings.yaml")
    BFGS(water, logfile=None).run(fmax=2e-4, steps=200)
    wavenumbers, modes = normal_modes(water)
    water.calc.calculate(water)
    root = np.sqrt(np.repeat(water.get_masses(), 3))
    # born_charges: atom, dipole, displacement
    slopes = np.einsum("iab,kib->ka", water.calc.results["born_charges"], (modes / root).reshape(-1, len(water), 3))
    vibrations = np.flatnonzero(wavenumbers > 500.0)
    speeds = np.sqrt(2.0 * units.kB * KELVIN) * modes[vibrations].sum(axis=0) / root * units.fs / _ATOMIC_VELOCITY
    (folder / "settings.yaml").write_text((HERE / "settings.yaml").read_text())
    start = water.copy()
    start.set_cell(np.eye(3) * 20.0)
    start.write(folder / "start.xyz", format="extxyz")
    text = INPUT.format(
        steps=STEPS, kelvin=KELVIN, time_step=TIME_STEP, velocities=", ".join(f"{v:.12e}" for v in speeds)
    )
    (folder / "input.xml").write_text(text)
    voltpi = str(Path(sys.executable).with_name("voltpi"))
    subprocess.run([voltpi, "run", "input.xml"], cwd=folder, check=True)
    lines = [
        {"hessian_cm-1": float(wavenumbers[k]), "intensity_km_per_mol": 974.86 * float(slopes[k] @ slopes[k])}
        for k in vibrations
    ]
    for source in ("dipole", "current"):
        command = [voltpi, "analyze", "ir", str(folder), "--source", source, "--temperature", str(KELVIN), "--json"]
        command += ["--resolution", str(RESOLUTION), "--out", str(folder / source)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        areas = found["peak_km_per_mol_of_cells"]
        for line in lines:
            distance = [abs(peak["wavenumber_cm-1"] - line["hessian_cm-1"]) for peak in found["peaks"]]
            k = int(np.argmin(distance))
            peak = found["peaks"][k]
            line[source] = {
                "peak_cm-1": peak["wavenumber_cm-1"],
                "without_time_step_error_cm-1": peak["without_time_step_error_cm-1"],
                "intensity_km_per_mol": areas[k],
            }
    (folder / "lines.json").write_text(json.dumps(lines, indent=1) + "\n")
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
