"""The shipped model tio2-water: its card, held-out frames, derivatives, and a slab in a field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from voltpi.driver.ase import VoltPICalculator
from voltpi.potential.checkpoints import list_models, load_potential, read_card
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT
from voltpi.potential.training.tio2_water import bulk, bulk_answers, charge_model, kind, water_charge

FRAMES = json.loads((Path(__file__).parent / "data/tio2_water_frames.json").read_text())["frames"]
KINDS = ("slab", "interface", "water")


def frame(row: dict[str, Any]) -> Atoms:
    return Atoms(row["symbols"], row["positions"], cell=row["cell"], pbc=True)


def wet_slab() -> Atoms:
    """Rutile (001), four layers of 4.6 by 4.6 Å, a water molecule on Ti, open along z."""
    slab = bulk("rutile").repeat((1, 1, 2))
    slab.positions[:, 2] += 6.0
    top = slab.positions[slab.numbers == 22][:, 2].max()
    over = slab.positions[(slab.numbers == 22) & (slab.positions[:, 2] > top - 0.1)][0]
    water = Atoms("OH2", [[0, 0, 2.15], [0.76, 0.1, 2.74], [-0.76, 0.2, 2.74]])
    water.positions += over
    atoms = slab + water
    atoms.set_cell([*slab.cell.lengths()[:2], 20.0])
    atoms.pbc = [True, True, False]
    atoms.rattle(0.03, seed=5)
    return atoms


def calculator(**settings: object) -> VoltPICalculator:
    return VoltPICalculator({"model": "tio2-water", "precision": "double", "device": "cpu", **settings})


def test_card() -> None:
    """Says what it was trained on, under which terms, its errors by kind, for how long, and what it is not for."""
    assert "tio2-water" in list_models()
    card = read_card("tio2-water")
    for key in ("summary", "licence", "provenance", "dispersion", "charges", "not_for", "held_out"):
        assert len(card[key]) > 2
    assert "2303.07433" in card["provenance"]
    assert card["training"]["seconds"] > 0
    assert card["data"]["train"] + card["data"]["validation"] == 346
    assert sum(card["errors"][f"tio2-water/{k}"]["frames"] for k in KINDS) == card["data"]["validation"]
    for name, numbers in bulk_answers().items():
        assert card["charges_alone"][name] == pytest.approx(numbers, abs=2e-3)


def test_charges_are_those_of_the_script() -> None:
    """The file's PQEq is the one that was subtracted from the labels, and nothing adds dispersion."""
    potential = load_potential("tio2-water")
    assert potential.dispersion is None
    assert potential.charges is not None
    assert potential.charges.config == charge_model().config


@pytest.mark.parametrize("row", FRAMES, ids=[row["kind"] for row in FRAMES])
def test_held_out_frames(row: dict[str, Any]) -> None:
    """Forces within 1.3 times the card's error of their kind, energies within three times it."""
    atoms = frame(row)
    assert kind(atoms) == row["kind"]
    stated = read_card("tio2-water")["errors"][f"tio2-water/{row['kind']}"]
    atoms.calc = VoltPICalculator({"model": "tio2-water", "device": "cpu"})
    error = atoms.get_forces() - row["forces"]
    assert np.sqrt(np.mean(error**2)) < 1.3 * stated["force_rmse"]
    assert stated["force_rmse"] < 0.5 * stated["force_rms"]
    assert 1e3 * abs(atoms.get_potential_energy() - row["energy"]) / len(atoms) < 3 * stated["energy_rmse"]


def test_forces_are_derivatives() -> None:
    """Central differences in float64 on a wet slab in a field, to 1e-7 eV/Å."""
    atoms = wet_slab()
    atoms.calc = calculator(field=[0, 0, 0.05])
    forces = atoms.get_forces()
    direction = np.random.default_rng(2).normal(size=forces.shape)
    direction /= np.linalg.norm(direction)
    places = atoms.positions.copy()

    def energy(step: float) -> float:
        atoms.positions = places + step * direction
        return atoms.get_potential_energy()

    h = 2e-4
    slope = (8 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12 * h)
    assert -slope == pytest.approx(np.sum(forces * direction), abs=1e-7)


def test_slab_in_a_field() -> None:
    """E' = −M, and the dipole grows along the field as the polarizability says."""
    atoms = wet_slab()
    atoms.calc = calculator(field="from-frame", output={"polarizability": True})

    def answer(field: float) -> tuple[float, float, float]:
        atoms.info["electric_field"] = np.array([0, 0, field])
        energy = atoms.get_potential_energy()
        return energy, float(atoms.calc.results["dipole"][2]), float(atoms.calc.results["polarizability"][2, 2])

    _, dipole, polarizability = answer(0.0)
    h = 5e-3
    rows = {step: answer(step * h) for step in (-2, -1, 1, 2)}
    slope = (8 * (rows[1][0] - rows[-1][0]) - (rows[2][0] - rows[-2][0])) / (12 * h)
    assert slope == pytest.approx(-dipole, abs=1e-7)
    growth = (8 * (rows[1][1] - rows[-1][1]) - (rows[2][1] - rows[-2][1])) / (12 * h)
    assert growth == pytest.approx(polarizability / COULOMB_CONSTANT, rel=1e-6)
    assert rows[2][1] > rows[1][1] > dipole > rows[-1][1] > rows[-2][1]


def test_given_charges_feel_the_field() -> None:
    """``charges.carried`` changes Born charges, not the energy at zero field."""
    own, given = wet_slab(), wet_slab()
    given.arrays["born"] = np.concatenate([np.where(given.numbers[:-3] == 22, 4.0, -2.0), [-0.8, 0.4, 0.4]])
    own.calc = calculator()
    given.calc = calculator(charges={"carried": "born"}, output={"born_charges": True})
    assert given.get_potential_energy() == pytest.approx(own.get_potential_energy(), abs=1e-7)
    born = np.trace(given.calc.results["born_charges"], axis1=1, axis2=2) / 3
    assert born[given.numbers == 22] == pytest.approx(4.0, abs=0.2)
    assert born[-3:].sum() == pytest.approx(0.0, abs=0.1)


def test_water_at_the_oxide_takes_charge() -> None:
    """What the card warns of: in PQEq a whole molecule on TiO2 is charged."""
    atoms = wet_slab()
    atoms.calc = calculator()
    atoms.get_potential_energy()
    taken = water_charge([atoms])
    assert taken["frames"] == 1
    assert taken["mean"] == pytest.approx(atoms.calc.results["charges"][-3:].sum(), abs=0.01)
    assert abs(taken["mean"]) > 0.02
    assert read_card("tio2-water")["charges_alone"]["whole_water_at_interfaces"]["highest"] < -1.0
