"""The shipped model ``battery`` against numbers of its teacher, and what a run with it relies on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from voltpi.driver.ase import VoltPICalculator
from voltpi.potential.checkpoints import load_potential, model_path, read_card
from voltpi.potential.systems import Systems
from voltpi.potential.training.battery import charge_model, crystals, unseen_interface

TEACHER = json.loads((Path(__file__).parent / "data/battery.json").read_text())
ELEMENTS = ["Li", "O", "P", "S", "Cl", "Zr", "La"]


@pytest.fixture(scope="module")
def calculator() -> VoltPICalculator:
    return VoltPICalculator({"model": "battery", "precision": "double"})


def structure(entry: dict[str, Any], calculator: VoltPICalculator) -> Atoms:
    return Atoms(entry["symbols"], entry["positions"], cell=entry["cell"], pbc=True, calculator=calculator)


def test_card_says_what_a_user_has_to_know() -> None:
    card = read_card("battery")
    assert {"teacher", "licence", "data", "errors", "dynamics_of_the_model", "dispersion", "charges", "not_for"} <= set(
        card
    )
    assert "MIT" in card["teacher"]
    assert model_path("battery").stat().st_size < 6e6
    potential = load_potential("battery")
    assert potential.short_range is not None
    assert sorted(z for z in potential.short_range.species if z) == [3, 8, 15, 16, 17, 40, 57]
    assert potential.dispersion is not None
    assert potential.charges.config == charge_model().config


@pytest.mark.parametrize("entry", TEACHER["structures"], ids=lambda entry: entry["name"])
def test_structures_it_was_not_trained_on_against_the_teacher(
    entry: dict[str, Any], calculator: VoltPICalculator
) -> None:
    atoms = structure(entry, calculator)
    wrong = atoms.get_forces() - np.array(entry["forces"])
    energy = 1e3 * (atoms.get_potential_energy() - entry["energy"]) / len(atoms)
    assert np.sqrt(np.mean(wrong**2)) < TEACHER["bounds"]["forces"]
    assert abs(energy) < TEACHER["bounds"]["energy_meV_per_atom"]


@pytest.mark.parametrize("name", ["Li|LiCl", "Li3PS4"])
def test_forces_are_the_derivative_of_the_energy(name: str, calculator: VoltPICalculator) -> None:
    entry = next(e for e in TEACHER["structures"] if e["name"] == name)
    atoms = structure(entry, calculator)
    forces, step = atoms.get_forces(), 1e-3
    for atom, axis in ((0, 0), (len(atoms) - 1, 2)):
        energies = []
        for shift in (-2, -1, 1, 2):
            moved = atoms.copy()
            moved.calc = calculator
            moved.positions[atom, axis] += shift * step
            energies.append(moved.get_potential_energy())
        slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-7)


@pytest.mark.parametrize("name", ["Li", "LiCl", "Li2S", "Li2O"])
def test_lattice_constants_are_the_teachers(name: str, calculator: VoltPICalculator) -> None:
    atoms, teacher = crystals()[name], TEACHER["volumes"][name]
    factors = np.linspace(0.98, 1.02, 5)
    energies = []
    for factor in factors:
        scaled = atoms.copy()
        scaled.set_cell(np.asarray(atoms.cell) * factor * (teacher / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
        scaled.calc = calculator
        energies.append(scaled.get_potential_energy())
    a, b, _ = np.polyfit(factors - 1, energies, 2)
    assert a > 0
    assert -b / (2 * a) == pytest.approx(0, abs=TEACHER["bounds"]["edge"])


def test_ions_are_ions_and_the_inside_of_the_metal_is_neutral() -> None:
    entry = next(e for e in TEACHER["structures"] if e["name"] == "Li|LiCl")
    model = charge_model()
    answer = model.solve(Systems.from_atoms(Atoms(entry["symbols"], entry["positions"], cell=entry["cell"], pbc=True)))
    chlorine = np.array(entry["symbols"]) == "Cl"
    assert float(answer.residual.max()) < 1e-8
    assert (answer.charges.numpy()[chlorine] < -0.7).all()
    salt = model.solve(Systems.from_atoms(bulk("LiCl", "rocksalt", 5.13)))
    assert salt.charges.numpy() == pytest.approx([0.98, -0.98], abs=0.02)
    metal = model.solve(Systems.from_atoms(bulk("Li", "bcc", 3.45, cubic=True)))
    assert metal.charges.abs().max() < 1e-6


def test_salts_in_contact_have_a_stable_point() -> None:
    answer = charge_model().solve(Systems.from_atoms(unseen_interface()))
    assert float(answer.residual.max()) < 1e-8
    assert float(torch.linalg.vector_norm(answer.shells, dim=1).max()) < 0.5
