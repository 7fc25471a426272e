"""A harmonic crystal as i-PI's PES through the shipped one, and what path integrals must give for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ipi.utils.units import unit_to_user

import voltpi.driver.pes as shipped
from voltpi.driver.protocol import Array

sys.path.insert(0, str(Path(__file__).parent))
from toy import Result

__DRIVER_NAME__ = "harmonic"
__DRIVER_CLASS__ = "Harmonic"

# corners of a cube, two elements alternating; springs along its edges, the same in all directions, and to the sites
SITES = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * 3.0
ELEMENTS = ["HO"[int(site.sum() / 3.0) % 2] for site in SITES]
MASSES = np.array([{"H": 1837.36, "O": 29156.9}[e] for e in ELEMENTS])
"""Electron masses, to the six digits that matter here."""
BOND, TETHER = 0.09, 0.05
"""hartree/bohr²."""


def springs() -> Array:
    """∂²V/∂u∂u [8, 8] of one direction, hartree/bohr²."""
    near = np.isclose(np.linalg.norm(SITES[:, None] - SITES[None], axis=2), 3.0)
    return BOND * (np.diag(near.sum(1)) - near) + TETHER * np.eye(len(SITES))


def kinetic_energies(temperature: float, beads: int | None) -> dict[str, float]:
    """⟨K⟩ (hartree) of one atom of each element at k_B T (hartree) with so many beads; None: the exact one.

    For a mode ω, P beads give (k_B T/2) Σ_k ω²/(ω² + ω_k²) with ω_k = (2 P k_B T/ħ) sin(kπ/P), and many of them
    (ħω/4) coth(ħω/2k_B T).
    """
    weight = 1.0 / np.sqrt(MASSES)
    square, modes = np.linalg.eigh(springs() * weight[:, None] * weight[None])
    if beads is None:
        frequency = np.sqrt(square)
        each = 0.25 * frequency / np.tanh(0.5 * frequency / temperature)
    else:
        ring = 2 * beads * temperature * np.sin(np.arange(beads) * np.pi / beads)
        each = 0.5 * temperature * (square[:, None] / (square[:, None] + ring**2)).sum(1)
    of_atom = 3.0 * (modes**2 @ each)
    return {e: float(of_atom[[x == e for x in ELEMENTS]].mean()) for e in "HO"}


class Crystal:
    """What the PES asks."""

    n_atoms = len(SITES)

    def evaluate(self, cells: Array, positions: Array, replicas: Sequence[int] | None = None) -> list[Result]:
        moved = positions - SITES - 5.0
        forces = -np.einsum("ij,bjx->bix", springs(), moved)
        energies = -0.5 * (forces * moved).sum((1, 2))
        return [Result(float(e), f, np.zeros((3, 3)), {}) for e, f in zip(energies, forces, strict=True)]


class Harmonic(shipped.VoltPI):
    """The shipped PES with it."""

    def __init__(self, **parameters: Any) -> None:
        shipped.make_evaluator = lambda settings, template, overrides: Crystal()
        super().__init__(**parameters)


XML = """<simulation verbosity='quiet' safe_stride='1000000'>
  <output prefix='run'>
    <properties stride='4' filename='out'>
      [ step, time{{femtosecond}}, kinetic_cv(H){{electronvolt}}, kinetic_cv(O){{electronvolt}},
        r_gyration(H){{angstrom}}, r_gyration(O){{angstrom}}, kinetic_tens(H){{electronvolt}} ]
    </properties>
    {outputs}
  </output>
  <total_steps> {steps} </total_steps>
  <prng><seed> 7 </seed></prng>
  <ffdirect name='ff'>
    <pes>custom</pes> <pes_path> {pes} </pes_path> <batch_size> {beads} </batch_size>
    <parameters>{{settings: settings.yaml, template: start.xyz}}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <fixcom> False </fixcom>
      <dynamics mode='nvt'> <timestep units='femtosecond'> {timestep} </timestep> {thermostat} </dynamics>
    </motion>
  </system>
</simulation>
"""
PILE = "<thermostat mode='pile_l'> <tau units='femtosecond'> 10 </tau> <pile_lambda> 0.5 </pile_lambda> </thermostat>"


def write_crystal(
    folder: Path, beads: int, steps: int, *, thermostat: str = PILE, outputs: str = "", timestep: float = 0.25
) -> Path:
    """An i-PI input for the crystal at 300 K, with its start structure."""
    place = float(unit_to_user("length", "angstrom", 1.0))
    rows = "\n".join(
        f"{e} " + " ".join(f"{x:.10f}" for x in (site + 5.0) * place) for e, site in zip(ELEMENTS, SITES, strict=True)
    )
    head = 'Lattice="20 0 0 0 20 0 0 0 20" Properties=species:S:1:pos:R:3 pbc="T T T"'
    (folder / "start.xyz").write_text(f"{len(SITES)}\n{head}\n{rows}\n")
    (folder / "settings.yaml").write_text("model: none\n")
    (folder / "in.xml").write_text(
        XML.format(
            beads=beads,
            steps=steps,
            thermostat=thermostat,
            outputs=outputs,
            timestep=timestep,
            pes=Path(__file__).resolve(),
        )
    )
    return folder / "in.xml"
