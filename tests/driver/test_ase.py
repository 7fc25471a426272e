"""The ASE calculator: ASE's signs and orders, fields in ``info``, and what it recomputes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress

from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.frames import evaluate_frames
from voltpi.driver.settings import load_settings
from voltpi.potential.errors import InputError

SETTINGS = {"charges": {"conserve": "fragments"}, "field": [0.02, -0.05, 0.04], "dispersion": {"damping": "bj"}}


def water(pbc: bool = True) -> Atoms:
    positions = [[0.1, 0.0, 0.1], [0.86, 0.6, 0.0], [-0.66, 0.6, 0.0]]
    return Atoms("OHH", positions, cell=[[5.2, 0.3, 0], [0, 5.5, -0.4], [0.2, 0, 5.8]], pbc=pbc)


def numerical_force(atoms: Atoms, atom: int, axis: int, step: float = 1e-4) -> float:
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.calc = atoms.calc
        moved.positions[atom, axis] += sign * step
        energies.append(moved.get_potential_energy())
    return -(energies[0] - energies[1]) / (2 * step)


def numerical_stress(atoms: Atoms, step: float = 1e-5) -> np.ndarray:
    """dE/dstrain/V by central differences, ASE's definition and sign."""
    stress = np.zeros((3, 3))
    cell, volume = atoms.cell.copy(), atoms.get_volume()
    for a in range(3):
        for b in range(3):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += 0.5 * sign * step
                strain[b, a] += 0.5 * sign * step
                strained = atoms.copy()
                strained.calc = atoms.calc
                strained.set_cell(cell @ strain, scale_atoms=True)
                energies.append(strained.get_potential_energy())
            stress[a, b] = (energies[0] - energies[1]) / (2 * step) / volume
    return stress


def test_forces_and_stress_are_derivatives() -> None:
    atoms = water()
    atoms.calc = VoltPICalculator(SETTINGS)
    forces = atoms.get_forces()
    for atom, axis in ((0, 0), (2, 1)):
        assert forces[atom, axis] == pytest.approx(numerical_force(atoms, atom, axis), rel=1e-6, abs=1e-7)
    stress = atoms.get_stress()
    np.testing.assert_allclose(stress, full_3x3_to_voigt_6_stress(numerical_stress(atoms)), rtol=1e-5, atol=1e-8)


def test_results_are_those_of_the_command_line() -> None:
    settings = load_settings(overrides={**SETTINGS, "output": {"born_charges": True, "polarizability": True}})
    atoms = water()
    atoms.calc = VoltPICalculator(settings)
    atoms.get_potential_energy()
    (record,) = evaluate_frames(settings, [atoms], "w.xyz")
    results = atoms.calc.results
    assert results["energy"] == results["free_energy"] == pytest.approx(record["energy"], abs=1e-10)
    for key in ("forces", "charges", "shells", "dipole", "born_charges", "polarizability"):
        np.testing.assert_allclose(results[key], record[key], atol=1e-8)
    np.testing.assert_allclose(results["stress"], full_3x3_to_voigt_6_stress(np.array(record["stress"])), atol=1e-10)
    assert sum(record["energy_terms"].values()) == pytest.approx(record["energy"], abs=1e-12)
    assert atoms.get_charges().sum() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(atoms.get_dipole_moment(), record["dipole"], atol=1e-8)


@pytest.mark.parametrize("boundary", ["open", "periodic"])
def test_stress_is_that_of_the_boundary_that_is_evaluated(boundary: str) -> None:
    """``coulomb.boundary`` overrides the file's: periodic has a stress, open has none."""
    settings = load_settings(overrides={**SETTINGS, "coulomb.boundary": boundary})
    atoms, plain = water(pbc=boundary == "open"), water(pbc=boundary == "periodic")
    overridden, right = (next(evaluate_frames(settings, [a], "w.xyz"))["stress"] for a in (atoms, plain))
    np.testing.assert_allclose(overridden, right, atol=1e-12)
    assert np.any(overridden) == (boundary == "periodic")
    atoms.calc = VoltPICalculator(settings)
    atoms.get_potential_energy()
    if boundary == "open":
        assert "stress" not in atoms.calc.results
    else:
        np.testing.assert_allclose(atoms.get_stress(), full_3x3_to_voigt_6_stress(np.array(right)), atol=1e-10)


def test_the_dipole_is_minus_the_slope_of_the_energy_in_the_field_of_the_frame() -> None:
    atoms = water()
    atoms.calc = VoltPICalculator({"charges.conserve": "fragments", "field": "from-frame"})
    field, step = np.array([0.03, 0.02, -0.05]), 1e-4
    energies = []
    for sign in (1, -1):
        atoms.info["electric_field"] = field + np.array([0, sign * step, 0])
        energies.append(atoms.get_potential_energy())  # only the field changed: it must be computed again
    atoms.info["electric_field"] = field
    slope = -(energies[0] - energies[1]) / (2 * step)
    assert atoms.get_dipole_moment()[1] == pytest.approx(slope, rel=1e-7)
    del atoms.info["electric_field"]
    with pytest.raises(InputError, match="no electric_field"):
        atoms.get_potential_energy()


def test_nothing_is_computed_twice_for_the_same_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = water()
    atoms.calc = VoltPICalculator(SETTINGS)
    energy = atoms.get_potential_energy()
    monkeypatch.setattr(atoms.calc, "calculate", lambda *_: pytest.fail("computed again"))
    assert atoms.get_forces().shape == (len(atoms), 3)
    assert atoms.get_stress().shape == (6,)
    assert atoms.get_potential_energy() == energy


def test_another_structure_starts_anew() -> None:
    calculator = VoltPICalculator({"charges.conserve": "fragments"})
    first, other = water(), Atoms("NaCl", [[0, 0, 0], [2.4, 0, 0]])
    other.set_initial_charges([1, -1])
    for atoms in (first, other, first):
        atoms.calc = calculator
        fresh = atoms.copy()
        fresh.calc = VoltPICalculator({"charges.conserve": "fragments"})
        assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-9)
    assert "stress" in calculator.results
    assert other.get_charges().sum() == pytest.approx(0, abs=1e-9)
    assert "stress" not in calculator.results  # no volume, so none


def test_a_molecule_relaxes_and_a_settings_file_will_do(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("charges: {conserve: fragments}\ncoulomb: {boundary: open}\n")
    atoms = water()
    atoms.calc = VoltPICalculator(tmp_path / "s.yaml")
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=3)
    assert atoms.get_potential_energy() < before


def test_wrong_settings_are_one_sentence() -> None:
    with pytest.raises(
        InputError, match=r"settings charges.modl: unknown key charges.modl; did you mean charges.model\?"
    ):
        VoltPICalculator({"charges.modl": "pqeq"})
