"""A field in time: i-PI's driven dynamics with the Born charges and dipole of the driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.cell import Cell
from ase.io import read, write
from scipy import constants

from voltpi.analysis.absorption import absorption_of
from voltpi.analysis.ipi_files import read_extras, read_properties
from voltpi.analysis.runs import find_run
from voltpi.driver import launch
from voltpi.driver.check import check
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator
from voltpi.driver.settings import Settings
from voltpi.driver.uses import copy_use
from voltpi.potential.errors import InputError

PES = Path(launch.__file__).with_name("pes.py")
STEPS = 30
SETTINGS = {
    "short_range": {"pair": {"set": "nacl", "cutoff": 5.0}},
    "charges": {"model": "pqeq"},
    "precision": "double",
    "output": {"born_charges": True, "charges": False},
}
XML = """<simulation verbosity='low' floatformat='%24.17e'>
  <output prefix='run'>
    {places}
    {outputs}
  </output>
  <total_steps> {steps} </total_steps> <prng><seed> 7 </seed></prng>
  <ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes}</pes_path>
    <parameters>{{settings: settings.yaml, template: start.xyz, field: {field}}}</parameters> </ffdirect>
  <system>
    <initialize nbeads='{beads}'> <file mode='ase'> start.xyz </file>
      {velocities} </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    {motion}
  </system>
</simulation>
"""
PLACES = """<properties stride='1' filename='out'>
      [ step, atom_x(0){angstrom}, atom_x(1){angstrom}, atom_x(2){angstrom}, atom_x(3){angstrom} ] </properties>"""
STATIC = """<motion mode='dynamics'> <dynamics mode='nve'>
      <timestep units='femtosecond'> 2 </timestep> </dynamics> </motion>"""
DRIVEN = """<motion mode='driven_dynamics'> <driven_dynamics mode='eda-nve'>
      <timestep units='femtosecond'> 2 </timestep>
      <efield> <amp units='v/ang'> [ {amplitude} ] </amp> {wave} </efield> <bec mode='driver'/>
      </driven_dynamics> </motion>"""


def cluster() -> Atoms:
    """Two ion pairs in vacuum, none of them at a symmetric place."""
    d = 2.7
    atoms = Atoms("NaClNaCl", [[0, 0, 0], [d, 0, 0], [d, d, 0], [0, d, 0]], cell=[30, 30, 30], pbc=False)
    atoms.positions += 15 + np.random.default_rng(3).normal(scale=0.1, size=(4, 3))
    return atoms


def make(
    folder: Path,
    motion: str,
    *,
    field: str = "0 0 0",
    steps: int = STEPS,
    beads: int = 1,
    at_rest: bool = False,
    places: str = PLACES,
    outputs: str = "",
) -> Path:
    folder.mkdir()
    write(folder / "start.xyz", cluster(), format="extxyz")
    (folder / "settings.yaml").write_text(
        "short_range: {pair: {set: nacl, cutoff: 5.0}}\ncharges: {model: pqeq}\nprecision: double\n"
        "output: {born_charges: true, charges: false}\n"
    )
    velocities = "" if at_rest else "<velocities mode='thermal' units='kelvin'> 300 </velocities>"
    given = {"motion": motion, "field": field, "steps": steps, "beads": beads, "velocities": velocities}
    (folder / "input.xml").write_text(XML.format(pes=PES, places=places, outputs=outputs, **given))
    return folder


def ipi(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def positions(folder: Path) -> np.ndarray:
    """Of the centroids, [frames, n, 3] Å, in all digits."""
    return np.loadtxt(folder / "run.out")[:, 1:].reshape(-1, 4, 3)


def test_a_static_field_and_the_same_field_driven_agree_to_second_order(tmp_path: Path) -> None:
    """i-PI's force is linear in the field; what the two differ by is quadratic, step by step. Two beads."""
    away, moved = [], []
    for i, strength in enumerate((0.01, 0.005)):
        field = f"{strength} {strength / 2} 0"
        static = make(tmp_path / f"static{i}", STATIC, field=field, beads=2)
        driven = make(tmp_path / f"driven{i}", DRIVEN.format(amplitude=field.replace(" ", ", "), wave=""), beads=2)
        for folder in (static, driven):
            done = ipi(folder)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        away.append(positions(driven) - positions(static))
        moved.append(positions(driven))
    assert away[0].shape == (STEPS + 1, 4, 3)
    effect = np.abs(moved[0] - moved[1]).max()  # of half the field
    first, second = (np.abs(difference).max() for difference in away)
    assert first < 0.05 * effect
    assert first > 1e-7  # so that the next lines compare no rounding
    assert first / second == pytest.approx(4.0, rel=0.06)
    np.testing.assert_allclose(away[0], 4.0 * away[1], rtol=0, atol=0.1 * first)


def test_the_force_that_ipi_applies(tmp_path: Path) -> None:
    """Eforces and becx of i-PI are Z*·ε and Z* of finite differences of the driver's dipole."""
    outputs = "".join(
        f"<trajectory filename='{name}' stride='1'> {name} </trajectory>" for name in ("Eforces", "becx", "becy")
    )
    outputs += "<trajectory filename='dipole' stride='1' extra_type='dipole'> extras </trajectory>"
    folder = make(tmp_path / "run", DRIVEN.format(amplitude="0.1, -0.05, 0", wave=""), steps=1, outputs=outputs)
    done = ipi(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def last(name: str) -> np.ndarray:
        return read(folder / f"run.{name}_0.xyz", "-1", format="xyz").positions

    at = positions(folder)[-1]
    evaluator = Evaluator.from_settings(Settings.model_validate(SETTINGS), cluster())
    cell = np.diag([30.0, 30.0, 30.0])[None] / BOHR
    dipole = np.array(evaluator.evaluate(cell, at[None] / BOHR)[0].extras["dipole"])
    np.testing.assert_allclose(read_extras(folder / "run.dipole_0").values[-1], dipole, rtol=0, atol=1e-7)
    numeric = np.zeros((12, 3))
    h = 1e-3
    for k in range(12):
        step = np.zeros(12)
        step[k] = h
        plus, minus = (evaluator.evaluate(cell, (at + s * step.reshape(4, 3))[None] / BOHR)[0] for s in (1, -1))
        change = np.array(plus.extras["dipole"]) - np.array(minus.extras["dipole"])
        numeric[k] = change * BOHR / (2 * h)
    blocks = numeric.reshape(4, 3, 3)
    assert np.abs(blocks - np.trace(blocks, axis1=1, axis2=2)[:, None, None] * np.eye(3) / 3).max() > 0.02
    np.testing.assert_allclose(last("becx").ravel(), numeric[:, 0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(last("becy").ravel(), numeric[:, 1], rtol=0, atol=2e-5)
    wanted = numeric @ np.array([0.1, -0.05, 0.0]) * BOHR / HARTREE
    np.testing.assert_allclose(last("Eforces").ravel(), wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("charge", [0.0, 1.0])
@pytest.mark.parametrize("accuracy", [1e-3, 1e-6])
def test_the_sum_rule_holds_to_rounding_on_a_mesh(accuracy: float, charge: float) -> None:
    """Born charges sum up to the charge of the cell, whatever the mesh leaves out."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    atoms.positions += np.random.default_rng(0).normal(scale=0.15, size=(8, 3))
    carried = np.where(atoms.symbols == "Na", 1.0, -1.0) + charge / 8
    settings = Settings.model_validate(
        SETTINGS
        | {
            "coulomb": {"accuracy": accuracy},
            "charges": {"model": "pqeq", "net_charge": charge, "carried": carried.tolist()},
            "precision": "mixed",
        }
    )
    evaluator = Evaluator.from_settings(settings, atoms)
    cell = np.asarray(atoms.cell).T[None] / BOHR
    born = np.array(evaluator.evaluate(cell, atoms.positions[None] / BOHR)[0].extras["BEC"])
    assert born.shape == (24, 3)
    total = born.reshape(8, 3, 3).sum(0)
    np.testing.assert_allclose(total, charge * np.eye(3), rtol=0, atol=1e-13)
    assert np.abs(born.reshape(8, 3, 3) - carried[:, None, None] * np.eye(3)).max() > 1e-4


def test_the_response_to_a_driven_field_is_that_of_the_hessian(tmp_path: Path) -> None:
    """P(ω)/ε₀ε(ω) of rocksalt at rest in a slow weak pulse against Zᵀ (K − m ω²)⁻¹ Z/(ε₀ V), below its resonance."""
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.set_cell(Cell.new(atoms.cell.cellpar()), scale_atoms=True)  # as i-PI has it
    atoms.set_initial_charges([1.0, -1.0])
    wave = """<freq units='inversecm'> 70 </freq> <peak units='femtosecond'> 900 </peak>
        <sigma units='femtosecond'> 220 </sigma>"""
    outputs = """<properties stride='1' filename='out'> [ step, time{femtosecond}, conserved{electronvolt} ]
        </properties> <trajectory filename='dipole' stride='1' extra_type='dipole'> extras </trajectory>
        <trajectory filename='pos' stride='100' format='ase'> positions </trajectory>"""
    motion = DRIVEN.format(amplitude="0.003, 0.001, -0.002", wave=wave)
    folder = make(tmp_path / "run", motion, steps=900, at_rest=True, places="", outputs=outputs)
    write(folder / "start.xyz", atoms, format="extxyz")
    text = (folder / "settings.yaml").read_text().replace("model: pqeq", "model: fixed")
    (folder / "settings.yaml").write_text(text)
    done = ipi(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    absorption = absorption_of(find_run(folder))
    measured = absorption.susceptibility
    assert measured is not None

    settings = Settings.model_validate(SETTINGS | {"charges": {"model": "fixed"}})
    evaluator = Evaluator.from_settings(settings, atoms)
    h, hessian = 1e-3, np.zeros((6, 6))
    for k in range(6):
        step = h * np.eye(6)[k].reshape(2, 3)
        plus, minus = (
            evaluator.evaluate_systems(np.asarray(atoms.cell)[None], (atoms.positions + s * step)[None]).forces.numpy()
            for s in (1, -1)
        )
        hessian[k] = -(plus - minus).ravel() / (2 * h)
    field = absorption.driving
    born = np.kron([[1.0], [-1.0]], np.eye(3))
    # amu Å²/fs² in eV
    mass = np.repeat(atoms.get_masses(), 3) * constants.atomic_mass * 1e10 / constants.e
    dynamical = hessian - field.frequency**2 * np.diag(mass)
    along = np.array(field.amplitude) / field.strength
    epsilon_0 = constants.epsilon_0 * 1e-10 / constants.e
    wanted = along @ born.T @ np.linalg.solve(dynamical, born) @ along / atoms.get_volume() / epsilon_0
    assert wanted > 2.0
    assert measured.real == pytest.approx(wanted, rel=2e-3)
    assert abs(measured.imag) < 5e-3 * wanted
    assert abs(absorption.work[-1]) < 1e-3 * absorption.work.max()  # nothing is absorbed so far below


def found(folder: Path, *changes: tuple[str, str], file: str = "input.xml") -> tuple[list[str], list[str]]:
    """Problems and hints of the input after changes to its text."""
    path = folder / file
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    findings = list(check(folder / "input.xml"))
    problems = [f.sentence for f in findings if not f.ok]
    return problems, [f.sentence for f in findings if f.ok and f.sentence.startswith("hint")]


@pytest.fixture
def driven(tmp_path: Path) -> Path:
    return make(tmp_path / "run", DRIVEN.format(amplitude="0.1, 0, 0", wave=""))


def test_a_driven_input_is_found_right(driven: Path) -> None:
    assert found(driven) == ([], [])
    assert found(driven, ("nbeads='1'", "nbeads='4'")) == ([], [])


PROBLEMS = {
    "no Born charges": ("<bec mode='driver'/>", "", "has no Born charges; add <bec mode='driver'/>"),
    "multiple steps": ("<efield>", "<nmts> [2] </nmts> <efield>", "<nmts>, with which i-PI gives only a part"),
    "no envelope": ("</amp>", "</amp> <sigma units='femtosecond'> 50 </sigma>", "leaves the envelope out"),
    "unit": ("units='v/ang'", "units='v/nm'", "give numbers in a unit of i-PI"),
    "two senders": (
        "<force forcefield='ff'/>",
        "<force forcefield='ff'/> <force forcefield='ff'/>",
        "the Born charges of one <force> only",
    ),
    "barostat": ("mode='eda-nve'", "mode='eda-npt'", "there is none at constant pressure"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_driven_dynamics_cannot_do(driven: Path, case: str) -> None:
    old, new, sentence = PROBLEMS[case]
    problems, _ = found(driven, (old, new))
    assert [p for p in problems if sentence in p], problems


def test_a_cell_that_ipi_turns(driven: Path) -> None:
    """The driving field stays in i-PI's axes, the crystal does not."""
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    write(driven / "start.xyz", atoms, format="extxyz")
    problems, _ = found(driven)
    assert [p for p in problems if "i-PI turns the cell of the start structure" in p]


def test_settings_without_born_charges(driven: Path) -> None:
    problems, _ = found(driven, ("born_charges: true", "born_charges: false"), file="settings.yaml")
    assert [p for p in problems if p.endswith("set output.born_charges: true")]
    with pytest.raises(InputError, match=r"set output\.born_charges: true"):
        launch.run(driven / "input.xml", quiet=True)


@pytest.mark.parametrize("axes", ["[null, null, 0.1]", "[null, 0, {ramp: {start: 0, rate: 0.01, until: 0.1}}]"])
def test_a_displacement_beside_the_driving_field(driven: Path, axes: str) -> None:
    """Z* of i-PI's force is that at constant field, also along axes where D is held."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    write(driven / "start.xyz", atoms, format="extxyz")
    changes = ("charges: {model: pqeq}", f"charges: {{model: pqeq}}\ndisplacement: {axes}")
    found(driven, ("field: 0 0 0", "precision: double"))
    problems, _ = found(driven, changes, file="settings.yaml")
    named = "along z, where" if "null, null" in axes else "along y, z, where"
    assert [p for p in problems if named in p and "remove displacement, or drive by a displacement" in p], problems
    with pytest.raises(InputError, match=r"force Z\*·ε is wrong"):
        launch.run(driven / "input.xml", quiet=True)


def test_contracted_beads(driven: Path) -> None:
    changes = (("nbeads='1'", "nbeads='4'"), ("<force forcefield='ff'/>", "<force forcefield='ff' nbeads='2'/>"))
    problems, _ = found(driven, *changes)
    assert [p for p in problems if "i-PI drops the Born charges" in p]


def test_hints(driven: Path) -> None:
    pulse = "</amp> <peak units='femtosecond'> 100 </peak> <sigma units='femtosecond'> 50 </sigma>"
    problems, hints = found(driven, ("</amp>", pulse), ("field: 0 0 0", "field: 0.01 0 0"))
    assert not problems
    assert len(hints) == 3
    assert [h for h in hints if "the run ends at 60 fs, before the pulse is over" in h]
    assert [h for h in hints if "the pulse begins with 14% of its strength at once" in h]
    assert [h for h in hints if "the static field of the settings acts besides the driving one" in h]
    _, hints = found(driven, ("[ 0.1, 0, 0 ]", "[ 0, 0, 0 ]"))
    assert [h for h in hints if "nothing drives the run" in h]


def test_a_charged_cell_needs_another_threshold(driven: Path) -> None:
    """`check` says what i-PI would stop at, and the threshold that lets it run."""
    given = "charges: {model: pqeq, net_charge: 1.0}"
    problems, _ = found(driven, ("charges: {model: pqeq}", given), file="settings.yaml")
    (sentence,) = [p for p in problems if "asr_threshold" in p]
    assert "sum up to 1 e" in sentence
    assert "do not satisfy acoustic sum rule" in ipi(driven).stderr
    threshold = re.search(r"set <asr_threshold> to ([-+.e\d]+)", sentence)
    assert threshold
    changes = (
        ("<bec mode='driver'/>", f"<bec mode='driver'/> <asr_threshold> {threshold[1]} </asr_threshold>"),
        ("<total_steps> 30", "<total_steps> 2"),
    )
    assert found(driven, *changes)[0] == []
    done = ipi(driven)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_shipped_pulse_runs(tmp_path: Path) -> None:
    """A few steps at the top of the pulse: the field is that of the input, and the energy taken up its work."""
    folder = copy_use("water-thz-pulse", tmp_path / "run")
    few = read(folder / "start.xyz")[:24]
    few.set_cell([9.0, 9.0, 9.0])
    few.write(folder / "start.xyz", columns=["symbols", "positions"])
    changes = (
        ("<total_steps> 1300 ", "<total_steps> 16 "),
        ("<timestep units='femtosecond'> 0.5 ", "<timestep units='femtosecond'> 0.25 "),
        ("stride='10'", "stride='1'"),
        ("<peak units='femtosecond'> 300 ", "<peak units='femtosecond'> 2 "),
        ("[ 0.0, 0.0, 0.1 ]", "[ 0.0, 0.0, 0.5 ]"),
    )
    problems, _ = found(folder, *changes)
    assert not problems
    assert launch.run(folder / "input.xml", quiet=True) == 0
    absorption = absorption_of(find_run(folder))
    field = read_properties(folder / "run.out").get("Efield", "electric-field", "v/ang")
    np.testing.assert_allclose(absorption.field, field, rtol=0, atol=1e-8)
    assert np.abs(absorption.work).max() > 0.01
    assert np.abs(absorption.absorbed - absorption.work).max() < 0.1 * np.abs(absorption.work).max()


def test_the_shipped_pulse_is_found_right() -> None:
    import voltpi.inputs

    (folder,) = voltpi.inputs.__path__
    findings = list(check(Path(folder) / "water-thz-pulse" / "input.xml"))
    assert not [f.sentence for f in findings if not f.ok or f.sentence.startswith("hint")]
