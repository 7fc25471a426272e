"""Constant-potential reference cases: gold-like slabs with and without point ions, three boundaries.

The numbers are those of a brute-force dense solution that LAMMPS ELECTRODE and OpenMM agree with; how they were made:
``data/make_constant_potential.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from voltpi.potential.electrostatics.pqeq import FixedCharges
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems

DATA = json.loads((Path(__file__).parent / "data" / "constant_potential.json").read_text())
CASES = DATA["cases"]


class Case:
    """One case, ready to solve; ``stored`` is what the JSON holds of it."""

    def __init__(self, name: str, **settings: float) -> None:
        self.stored = stored = CASES[name]
        geometry = DATA["geometries"][stored["geometry"]]
        self.role = np.array(list(geometry["role"]))
        periodic = stored["boundary"] == "ffield"
        atoms = Atoms(
            np.where(self.role == "E", "Na", "Au").tolist(),
            geometry["positions"],
            cell=geometry["cell"],
            pbc=[True, True, periodic],
        )
        metal = Electrode(
            "A",
            "potential",
            eta=stored["eta"],
            thomas_fermi=stored["thomas_fermi"],
            atom_volume=stored["atom_volume"],
        )
        electrodes = (metal, replace(metal, name="B"))
        carried = torch.zeros(len(atoms), dtype=torch.float64)
        carried[torch.as_tensor(self.role == "E")] = torch.tensor(geometry["fixed_charges"], dtype=torch.float64)
        members = [np.flatnonzero(self.role == name) for name in "AB"]
        system = assign_electrodes(Systems.from_atoms(atoms), electrodes, members, stored["potentials"])
        self.potential = Potential(
            charges=FixedCharges(
                electrodes=electrodes,
                finite_field=2 if periodic else None,
                coulomb_constant=stored["coulomb_constant"],
                **settings,
            )
        )
        self.system = self.potential.prepare(system.replace(carried=carried))
        self.response = self.potential(self.system)


_SOLVED: dict[str, Case] = {}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each case solved once, at the default accuracy and tolerance."""
    if request.param not in _SOLVED:
        _SOLVED[request.param] = Case(request.param)
    return _SOLVED[request.param]


def test_charges(case: Case) -> None:
    """Issue: 1e-6 e; the default accuracy and tolerance give 1e-8 e."""
    found = case.response.charges.numpy()
    assert found[case.role != "E"] == pytest.approx(np.array(case.stored["electrode_charges"]), abs=1e-8)
    assert found[case.role == "E"].tolist() == DATA["geometries"][case.stored["geometry"]]["fixed_charges"]
    for name, sign in (("A", -1), ("B", 1)):
        total = float(case.response.electrodes[name]["charge"])
        for engine, answer in case.stored["engines"].items():
            assert total == pytest.approx(sign * answer["Q_B_e"], abs=1e-7), engine


def test_energies(case: Case) -> None:
    stored, terms = case.stored, {k: float(v) for k, v in case.response.energy_terms.items()}
    assert float(case.response.energy) == pytest.approx(stored["omega_eV"], rel=1e-6)
    assert sum(terms.values()) == pytest.approx(float(case.response.energy), rel=1e-12)
    assert terms["electrodes"] == pytest.approx(stored["minus_QV_eV"], rel=1e-6, abs=1e-12)
    assert terms["field"] == pytest.approx(stored["field_energy_eV"], rel=1e-6, abs=1e-12)
    # their Coulomb energy holds the Gaussians' own energy, their images and the Thomas–Fermi term
    inner = terms["coulomb"] + terms["hardness"] + terms["electronegativity"] + terms["spring"]
    assert inner == pytest.approx(stored["U_coul_eV"], rel=1e-6)
    # their approximate erfc (2e-7) and mesh (2e-7); single precision (1e-7)
    for engine, answer in stored["engines"].items():
        assert float(case.response.energy) == pytest.approx(answer["omega_eV"], rel=3e-7), engine


def test_forces(case: Case) -> None:
    """On ions and on metal atoms."""
    assert case.response.forces.numpy() == pytest.approx(np.array(case.stored["forces"]), abs=1e-6)


def test_equipotential(case: Case) -> None:
    for name, potential in zip("AB", case.stored["potentials"], strict=True):
        assert float(case.response.electrodes[name]["potential"]) == potential
        assert float(case.response.electrodes[name]["residual"]) < 1e-7


@pytest.mark.parametrize("name", ["case2_au_ions_dV2_ew2d", "case2_au_ions_dV2_ffield", "case4_au_ions_tf_dV0_ew2d"])
def test_a_tighter_sum_comes_closer(name: str) -> None:
    """To the digits of the stored numbers, so that no constant or definition differs."""
    case = Case(name, accuracy=1e-11, tolerance=1e-11)
    found = case.response.charges.numpy()[case.role != "E"]
    assert found == pytest.approx(np.array(case.stored["electrode_charges"]), abs=2e-11)
    assert float(case.response.energy) == pytest.approx(case.stored["omega_eV"], abs=2e-10)
    assert case.response.forces.numpy() == pytest.approx(np.array(case.stored["forces"]), abs=1e-10)


@pytest.mark.parametrize("name", ["case1_au_vacuum_dV1", "case2_au_ions_dV0", "case2_au_ions_dV2"])
def test_finite_field_is_the_slab_and_the_energy_of_the_displacement(name: str) -> None:
    """Ω_ff − ε0 E² V/2 = Ω_slab and equal charges, but for the little field that leaks through two layers of atoms.

    That difference is derived, and tested to the digits of the sums, in ``test_electrodes``.
    """
    slab, across = Case(f"{name}_ew2d"), Case(f"{name}_ffield")
    jump = slab.stored["potentials"][1] - slab.stored["potentials"][0]
    volume = float(torch.linalg.det(across.system.cell[0]))
    height = float(across.system.cell[0, 2, 2])
    vacuum_permittivity = 1 / (4 * np.pi * slab.stored["coulomb_constant"])
    field_energy = 0.5 * vacuum_permittivity * (jump / height) ** 2 * volume
    assert float(across.response.energy) - field_energy == pytest.approx(float(slab.response.energy), abs=1e-7)
    total = float(slab.response.electrodes["B"]["charge"])
    assert float(across.response.electrodes["B"]["charge"]) == pytest.approx(total, rel=1e-3)
