"""The shipped model batio3 against its teacher, its double well, and the inputs that use it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from ase.optimize import BFGS

from voltpi.analysis.double_well import double_well, points_of
from voltpi.analysis.ipi_files import read_extras
from voltpi.analysis.runs import find_runs
from voltpi.driver import launch
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.check import check
from voltpi.driver.uses import copy_use
from voltpi.potential.checkpoints import load_potential
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT
from voltpi.potential.systems import Systems
from voltpi.potential.training.batio3 import (
    BORN,
    EPSILON,
    FITTED,
    charge_model,
    cubic_answers,
    cubic_response,
    fit_charges,
    perovskite,
    structures,
)

INPUTS = Path(__file__).parents[1] / "inputs"
TEACHER = json.loads((Path(__file__).parent / "data/batio3_teacher.json").read_text())
HARTREE_PER_BOHR = 27.211386245988 / 0.529177210903
VARIANTS = [(p.parent.name, p.stem) for use in ("constant-d", "double-well", "npt-field", "phonons-field")
            for p in sorted((INPUTS / f"batio3-{use}").glob("*.xml"))]  # fmt: skip


@pytest.fixture(scope="module")
def calculator() -> VoltPICalculator:
    return VoltPICalculator({"model": "batio3", "precision": "double", "field": "from-frame"})


def phase(name: str) -> Atoms:
    row = TEACHER["phases"][name]
    atoms = Atoms("BaTiO3", row["positions"], cell=row["cell"], pbc=True)
    atoms.info["electric_field"] = np.zeros(3)
    return atoms


def crystal(use: str) -> Atoms:
    return read(INPUTS / use / "start.xyz")


def at_displacement(displacement: float, atoms: Atoms) -> VoltPICalculator:
    settings = {"model": "batio3", "precision": "double", "displacement": [0, 0, displacement],
                "polarization_reference": str(INPUTS / "batio3-constant-d/reference.xyz")}  # fmt: skip
    atoms.calc = VoltPICalculator(settings)
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=60)
    assert np.abs(atoms.get_forces()).max() < 1e-3
    return atoms.calc


def test_frames_of_the_teacher_that_were_not_trained_on(calculator: VoltPICalculator) -> None:
    """Forces within 0.1 eV/Å at 300 K, 0.16 at 900 K, and energies (from the cubic phase) within 5 meV/atom."""
    below = phase("cubic")
    below.calc = calculator
    ours, teacher = below.get_potential_energy() / 5, TEACHER["phases"]["cubic"]["energy"] / 5
    for frame, allowed in zip(TEACHER["frames"], (0.10, 0.16), strict=True):
        atoms = Atoms(frame["symbols"], frame["positions"], cell=frame["cell"], pbc=True, calculator=calculator)
        atoms.info["electric_field"] = np.zeros(3)
        error = atoms.get_forces() - frame["forces"]
        assert np.sqrt(np.mean(error**2)) < allowed < 0.25 * np.sqrt(np.mean(np.square(frame["forces"])))
        mean = atoms.get_potential_energy() / len(atoms) - ours - (frame["energy"] / len(atoms) - teacher)
        assert abs(mean) < 5e-3


def test_phases_have_the_order_of_the_teacher(calculator: VoltPICalculator) -> None:
    """meV per formula unit below the cubic phase, in the teacher's relaxed cells."""
    energy = {}
    for name in TEACHER["phases"]:
        atoms = phase(name)
        atoms.calc = calculator
        energy[name] = 1e3 * atoms.get_potential_energy()
    depth = {name: energy[name] - energy["cubic"] for name in energy}
    teacher = {
        name: 1e3 * (row["energy"] - TEACHER["phases"]["cubic"]["energy"]) for name, row in TEACHER["phases"].items()
    }
    assert depth["rhombohedral"] < depth["orthorhombic"] < depth["tetragonal"] < 0
    for name in ("tetragonal", "orthorhombic", "rhombohedral"):
        assert depth[name] == pytest.approx(teacher[name], abs=6.0)


def test_conformance() -> None:
    """Forces in a field and the virial are derivatives of the energy of the shipped file."""
    settings = {"model": "batio3", "precision": "double", "field": [0.02, -0.01, 0.03]}
    atoms = crystal("batio3-constant-d").copy()
    atoms.rattle(0.03, seed=3)
    atoms.calc = VoltPICalculator(settings)
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    assert np.abs(forces.sum(0)).max() < 1e-6
    direction = np.random.default_rng(1).normal(size=forces.shape)
    places, step = atoms.positions.copy(), 2.5e-4
    energies = []
    for sign in (1, -1):
        atoms.positions = places + sign * step * direction
        energies.append(atoms.get_potential_energy())
    assert (energies[1] - energies[0]) / (2 * step) == pytest.approx(np.sum(forces * direction), abs=1e-5)
    atoms.positions = places
    cell, strain = np.asarray(atoms.cell).copy(), np.diag([0.3, -0.2, 1.0]) + 0.1
    energies = []
    for sign in (1, -1):
        atoms.set_cell(cell @ (np.eye(3) + sign * 1e-4 * strain), scale_atoms=True)
        energies.append(atoms.get_potential_energy())
    atoms.set_cell(cell, scale_atoms=True)
    slope = (energies[0] - energies[1]) / 2e-4
    assert slope == pytest.approx(atoms.get_volume() * np.sum(stress * strain), abs=2e-4)


def test_born_charges_are_those_of_the_fit() -> None:
    """The closed form of the fit and PQEq itself agree, and both with density functional theory within 1 %."""
    answers = cubic_answers()
    names = ("born_Ba", "born_Ti", "born_O_across", "born_O_along")
    np.testing.assert_allclose([answers[name] for name in names], BORN, rtol=0.01)
    assert answers["epsilon_infinity"] == pytest.approx(EPSILON, rel=0.01)
    found = fit_charges(4.007)
    model = charge_model(found)
    charges = model.solve(Systems.from_atoms(perovskite(4.007))).charges[:3].numpy()
    rows = [found[name] for name in ("Ba", "Ti", "O")]
    spring, radius, shell = (np.array([getattr(row, key) for row in rows]) for key in ("K", "R", "Z"))
    closed = cubic_response(4.007, charges, spring, radius, shell)
    np.testing.assert_allclose(closed.born, BORN, rtol=0.01)
    for name, row in found.items():
        assert pytest.approx((FITTED[name].R, FITTED[name].K), rel=0.05) == (row.R, row.K)
    assert load_potential("batio3").charges.parameters == FITTED


def test_what_the_teacher_labels_is_distinct_and_whole() -> None:
    found = {name: phase(name) for name in TEACHER["phases"]}
    frames = list(structures(found, np.random.default_rng(7)))
    kinds = [f.info["config_type"] for f in frames]
    assert (kinds.count("wells"), kinds.count("cells"), kinds.count("supercells")) == (58, 200, 90)
    assert min(f.get_all_distances(mic=True)[np.triu_indices(len(f), 1)].min() for f in frames) > 1.2


def test_the_double_well_of_the_polarization() -> None:
    """At fixed D the crystal rests between its wells: ε against D there, zero at the wells, and Vε/4πk_e = dU/dD."""
    atoms = crystal("batio3-constant-d")
    volume = atoms.get_volume()
    values = [0.0, 1.9, 2.0, 2.1, 3.0, 4.5]
    energy, field = [], []
    for displacement in values:
        answer = at_displacement(displacement, atoms)
        energy.append(answer.results["energy"])
        field.append(answer.results["field"][2])
        inside = displacement - 4 * np.pi * COULOMB_CONSTANT * answer.results["dipole"][2] / volume
        assert answer.results["field"][2] == pytest.approx(inside, abs=1e-6)
    assert field[0] == pytest.approx(0.0, abs=1e-3)
    assert field[2] == pytest.approx(-0.044, abs=2e-3)
    assert field[4] < 0 < field[5]
    assert energy[0] - energy[4] > 0.03  # eV per cell
    slope = (energy[3] - energy[1]) / (values[3] - values[1])
    assert slope == pytest.approx(volume * field[2] / (4 * np.pi * COULOMB_CONSTANT), rel=0.02)


@pytest.mark.parametrize(("use", "variant"), VARIANTS)
def test_an_input_is_found_right(use: str, variant: str, tmp_path: Path) -> None:
    if (use, variant) == ("batio3-phonons-field", "input"):  # it begins where relax.xml ends
        copy_use(use, tmp_path / use)
        (tmp_path / use / "relaxed.xyz").write_bytes((tmp_path / use / "start.xyz").read_bytes())
        path = tmp_path / use / "input.xml"
    else:
        path = INPUTS / use / f"{variant}.xml"
    findings = list(check(path))
    assert findings
    assert not [f.sentence for f in findings if not f.ok]


@pytest.mark.slow
@pytest.mark.parametrize(("use", "variant"), [v for v in VARIANTS if v[0] in ("batio3-constant-d", "batio3-npt-field")])
def test_an_input_runs(use: str, variant: str, tmp_path: Path) -> None:
    folder = copy_use(use, tmp_path / use)
    path = folder / f"{variant}.xml"
    text = re.sub(r"stride='\d+'", "stride='1'", path.read_text())
    text, changed = re.subn(r"<total_steps> *\d+ *</total_steps>", "<total_steps>3</total_steps>", text)
    assert changed == 1
    path.write_text(text)
    assert launch.run(path, quiet=True) == 0
    prefix = "run" if variant == "input" else variant
    dipole = read_extras(folder / f"{prefix}.dipole_0").values.reshape(4, 3)
    assert dipole[:, 2].min() > 0  # along the polarization of the start, and its M counts from the reference
    if variant != "zero-field":
        field = read_extras(folder / f"{prefix}.field_0").values.reshape(4, 3) * HARTREE_PER_BOHR
        if use == "batio3-npt-field":
            np.testing.assert_allclose(field, np.tile([0, 0, 0.02], (4, 1)), atol=1e-9)
        elif variant == "loop":
            np.testing.assert_allclose(field[:, 2], 0.04 * 0.002 * np.arange(4), atol=1e-9)
        else:
            volume = crystal(use).get_volume()
            dipole_eA = dipole[:, 2] * 0.529177210903
            displacement = field[:, 2] + 4 * np.pi * COULOMB_CONSTANT * dipole_eA / volume
            np.testing.assert_allclose(displacement, 5.0 - 0.002 * np.arange(4), atol=1e-6)


@pytest.mark.slow
def test_optimisation_and_phonons_in_a_field(tmp_path: Path) -> None:
    """i-PI rests where forces in the field, of the same potential in ASE, vanish; its frequencies are ASE's."""
    folder = copy_use("batio3-phonons-field", tmp_path / "run")
    assert launch.run(folder / "relax.xml", quiet=True) == 0
    last = read(folder / "relax.pos_0.extxyz", "-1")
    write(folder / "relaxed.xyz", last, format="extxyz")
    start = read(folder / "start.xyz")
    start.calc = last.calc = VoltPICalculator(folder / "settings.yaml")
    assert np.abs(start.get_forces()).max() > 0.05
    assert np.abs(last.get_forces()).max() < 1e-3
    assert launch.run(folder / "input.xml", quiet=True) == 0
    squares = np.loadtxt(folder / "run.phonons.eigval")
    found = np.sign(squares) * np.sqrt(np.abs(squares)) * 219474.6313632  # cm⁻¹
    expected = frequencies(last)
    np.testing.assert_allclose(found[3:], expected[3:], atol=0.1)
    assert np.abs(found[:3]).max() < 0.1
    assert found[3] > 80.0


def frequencies(atoms: Atoms) -> np.ndarray:
    """cm⁻¹ from central differences of 0.01 bohr."""
    places, step = atoms.positions.copy(), 0.00529177
    rows = []
    for place in np.ndindex(places.shape):
        forces = []
        for sign in (1, -1):
            atoms.positions = places
            atoms.positions[place] += sign * step
            forces.append(atoms.get_forces().ravel())
        rows.append((forces[1] - forces[0]) / (2 * step))
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    matrix = np.array(rows) / np.outer(root, root)
    squares = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    return np.sign(squares) * np.sqrt(np.abs(squares)) * 521.4709  # of √(eV/Å²/amu)


@pytest.mark.slow
def test_minima_at_several_displacements(tmp_path: Path) -> None:
    """Six systems of one input, each at its D; what i-PI writes of ε at rest is what ASE finds, and U has its wells."""
    folder = copy_use("batio3-double-well", tmp_path / "run")
    assert launch.run(folder / "input.xml", quiet=True) == 0
    runs = find_runs([folder])
    assert len(runs) == 6
    well = double_well([points_of(run, relaxed=True) for run in runs], symmetric=True)
    wells = [place for place in well.stationary if place.stable]
    np.testing.assert_allclose([place.displacement for place in wells], [-3.597, 3.597], atol=5e-3)
    assert 1e3 * well.barrier == pytest.approx(37.4, abs=0.5)
    atoms = crystal("batio3-double-well")
    ours = at_displacement(2.0, atoms).results["field"][2]
    last = read_extras(folder / "D2_run.field_0").values.reshape(-1, 3)[-1, 2] * HARTREE_PER_BOHR
    assert last == pytest.approx(ours, abs=1e-3)
