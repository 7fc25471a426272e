"""Work of a field in time against the energy absorbed, on real i-PI runs with a cheap potential."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from scipy import constants
from scipy.integrate import quad

from voltpi.analysis.absorption import Absorption, absorption_of, work_of_field
from voltpi.analysis.absorption_analyses import analyze_absorption
from voltpi.analysis.driven_field import DrivenField, driven_field_of, read_efield
from voltpi.analysis.ipi_files import read_properties
from voltpi.analysis.runs import find_run
from voltpi.potential.errors import InputError

TOY = Path(__file__).with_name("toy_driven_pes.py")
PULSE = """<amp units='v/ang'> [ 0.3, 0.1, -0.2 ] </amp> <freq units='inversecm'> 1100 </freq> <phase> 0.4 </phase>
           <peak units='femtosecond'> 150 </peak> <sigma units='femtosecond'> 25 </sigma>"""
WAVE = "<amp> [ 0.004, 0, 0 ] </amp> <freq units='thz'> 20 </freq>"
XML = """<simulation verbosity='low' floatformat='%24.17e'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [ step, time{{femtosecond}}, conserved{{electronvolt}},
      potential{{electronvolt}}, kinetic_md{{electronvolt}}, spring{{electronvolt}}, Efield{{v/ang}} ] </properties>
    <trajectory filename='dipole' stride='{stride}' extra_type='dipole'> extras </trajectory>
    <trajectory filename='pos' stride='10' format='ase'> positions </trajectory>
    <trajectory filename='forces' stride='5'> forces </trajectory>
  </output>
  <total_steps> {steps} </total_steps> <prng><seed> 5 </seed></prng>
  <ffdirect name='ff'> <pes>custom</pes> <pes_path>{toy}</pes_path> </ffdirect>
  <system>
    <initialize nbeads='{beads}'> <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities> </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='driven_dynamics'> <fixcom>False</fixcom>
      <driven_dynamics mode='{mode}'>
        <timestep units='femtosecond'> {dt} </timestep> {thermostat}
        <efield> {field} </efield> <bec mode='driver'/>
      </driven_dynamics> </motion>
  </system>
</simulation>
"""


def driven(
    folder: Path,
    *,
    dt: float,
    length: float = 300.0,
    field: str = PULSE,
    mode: str = "eda-nve",
    beads: int = 1,
    stride: int = 1,
) -> Path:
    """A finished run of four diatomics."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    bonds = rng.normal(size=(4, 3))
    bonds *= 1.27 / np.linalg.norm(bonds, axis=1)[:, None]
    places = np.array([[4.0, 4, 4], [10, 4, 4], [4, 10, 4], [4, 4, 10]])
    atoms = Atoms("HF" * 4, np.stack([places, places + bonds], axis=1).reshape(-1, 3), cell=[14, 14, 14], pbc=True)
    write(folder / "start.xyz", atoms, format="extxyz")
    thermostat = "<thermostat mode='svr'> <tau units='femtosecond'> 50 </tau> </thermostat>" if "nvt" in mode else ""
    text = XML.format(
        toy=TOY,
        dt=dt,
        steps=round(length / dt),
        field=field,
        mode=mode,
        thermostat=thermostat,
        beads=beads,
        stride=stride,
    )
    (folder / "input.xml").write_text(text)
    command = [str(Path(sys.executable).with_name("i-pi")), "input.xml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def absorb(folder: Path, skip: float = 0.0) -> Absorption:
    return absorption_of(find_run(folder, np.zeros(3)), skip=skip)


@pytest.fixture(scope="module")
def pulse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driven(tmp_path_factory.mktemp("absorption") / "pulse", dt=0.5)


def test_the_work_is_the_integral() -> None:
    """[ε·M] − ∫ ε̇·M against a quadrature of ε·Ṁ for a dipole given by a formula, for pulse and plane wave."""

    def dipole(t: np.ndarray | float) -> np.ndarray:
        t = np.asarray(t)
        return np.stack([np.sin(0.09 * t), 0.3 * np.cos(0.21 * t) + 0.01 * t, 2.0 + 0.0 * t], axis=-1)

    def velocity(t: float) -> np.ndarray:
        return np.array([0.09 * np.cos(0.09 * t), -0.063 * np.sin(0.21 * t) + 0.01, 0.0])

    times = np.arange(0.0, 200.1, 0.5)
    for field in (
        DrivenField((0.3, -0.1, 0.2), 0.1, 0.3, peak=90.0, sigma=20.0),
        DrivenField((0.3, -0.1, 0.2), 0.1, 0.3),
        DrivenField((0.3, -0.1, 0.2)),
    ):
        work = work_of_field(field, times, dipole(times))
        for k in (0, 100, 250, 400):
            exact = quad(lambda t, f=field: float(f(t) @ velocity(t)), 0.0, times[k], limit=400)[0]
            assert work[k] == pytest.approx(exact, abs=1e-7)
    rate = (field(times[1:] + 1e-4) - field(times[1:] - 1e-4)) / 2e-4
    np.testing.assert_allclose(field.rate(times[1:]), rate, atol=1e-9)


def test_the_field_is_that_of_ipi(pulse: Path, tmp_path: Path) -> None:
    for folder in (pulse, driven(tmp_path / "wave", dt=1.0, length=60.0, field=WAVE)):
        table = read_properties(folder / "run.out")
        field = driven_field_of(folder, [folder / "run.out"])
        time = table.get("time", "time", "femtosecond")
        np.testing.assert_allclose(field(time), table.get("Efield", "electric-field", "v/ang"), rtol=0, atol=1e-8)
        assert np.abs(field(time)).max() > 0.1


def test_the_energy_absorbed_is_the_work(pulse: Path, tmp_path: Path) -> None:
    """What is between them belongs to the time step: half the step leaves a quarter, and the shadow energy nothing."""
    fine = absorb(pulse)
    coarse = absorb(driven(tmp_path / "coarse", dt=1.0))
    assert fine.work[-1] > 0.1
    assert coarse.work[-1] == pytest.approx(fine.work[-1], rel=0.1)
    for a, limit in ((coarse, 1e-4), (fine, 1e-5)):
        np.testing.assert_allclose(a.absorbed, a.matter, rtol=0, atol=1e-9)
        assert a.shadow is not None
        assert min(a.shadow.n_before, a.shadow.n_after) >= 5
        assert abs(a.shadow.absorbed - a.work[-1]) < limit * a.work[-1]
        assert a.work_error < limit * a.work[-1]
    away = [np.sqrt(np.mean((a.absorbed - a.work)[-len(a.work) // 3 :] ** 2)) for a in (coarse, fine)]
    assert 3.0 < away[0] / away[1] < 5.5
    assert away[0] < 0.02 * coarse.work[-1]


def test_with_a_thermostat_and_with_beads(tmp_path: Path) -> None:
    for name, options in (("nvt", {"mode": "eda-nvt"}), ("beads", {"beads": 3})):
        a = absorb(driven(tmp_path / name, dt=0.5, **options))
        assert a.shadow is None
        assert a.work[-1] > 0.05
        assert np.abs(a.absorbed - a.work).max() < 0.01 * a.work[-1]
        heat = np.abs(a.absorbed - a.matter).max()
        assert heat > 0.05 * a.work[-1] if name == "nvt" else heat < 1e-9


def test_a_coarse_dipole_and_a_skipped_start(pulse: Path, tmp_path: Path) -> None:
    rare = absorb(driven(tmp_path / "rare", dt=0.5, stride=3))
    whole = absorb(pulse)
    assert len(rare.steps) == len(whole.steps[::3])
    assert rare.work[-1] == pytest.approx(whole.work[whole.steps == rare.steps[-1]][0], abs=1e-4 * whole.work[-1])
    late = absorb(pulse, skip=140.2)
    assert late.time[0] == pytest.approx(140.5)
    start = whole.work[np.searchsorted(whole.time, 140.2)]
    assert late.work[-1] == pytest.approx(whole.work[-1] - start, abs=1e-7)


def test_what_the_command_writes(pulse: Path, tmp_path: Path) -> None:
    answer = analyze_absorption([pulse], tmp_path)
    a = absorb(pulse)
    numbers = json.loads((tmp_path / "absorption.json").read_text())
    assert numbers["work_eV"] == pytest.approx(a.work[-1])
    assert numbers["wavenumber_per_cm"] == pytest.approx(1100.0, rel=1e-6)
    assert (numbers["peak_fs"], numbers["sigma_fs"]) == pytest.approx((150.0, 25.0))
    # n α from SI, with the integral of the squared field over a Gaussian
    squares = 0.14e20 * 25e-15 * np.sqrt(np.pi) / 2 * (1 + np.cos(2 * (a.driving.frequency * 150 + 0.4)) * 1e-9)
    wave = 1e-2 * a.work[-1] * constants.e / (14.0e-10**3 * constants.c * constants.epsilon_0 * squares)
    assert numbers["n_alpha_per_cm"] == pytest.approx(wave, rel=1e-4)
    with (tmp_path / "absorption.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 601
    assert float(rows[-1]["work_eV"]) == pytest.approx(a.work[-1])
    assert float(rows[-1]["absorbed_eV"]) == pytest.approx(a.absorbed[-1])
    assert all(Path(path).stat().st_size > 0 for path in answer["files"])
    assert any("shadow energy" in line for line in answer["report"])
    assert "susceptibility_real" not in numbers  # the bonds still ring


def test_what_is_refused(pulse: Path, tmp_path: Path, nve_run: Path) -> None:
    with pytest.raises(InputError, match="no i-PI input with <driven_dynamics>"):
        analyze_absorption([nve_run], tmp_path)
    with pytest.raises(InputError, match="call it for each"):
        analyze_absorption([pulse, pulse], tmp_path)
    both = tmp_path / "both"
    both.mkdir()
    for path in pulse.iterdir():
        (both / path.name).write_bytes(path.read_bytes())
    (both / "other.xml").write_text((pulse / "input.xml").read_text().replace("0.3, 0.1", "0.2, 0.1"))
    with pytest.raises(InputError, match="move away the file that the run did not use"):
        analyze_absorption([both], tmp_path)


@pytest.mark.parametrize(
    ("efield", "sentence"),
    [
        ("<amp> [ 1, 2 ] </amp>", "<amp> has 2 numbers; give three"),
        ("<amp> [ 1, 2, 3 ] </amp> <freq> [ 1, 2 ] </freq>", "<freq> has 2 numbers; give one"),
        ("<amp> [ 1, 2, 3 ] </amp> <sigma units='metre'> 1 </sigma>", "<sigma> is '1'; give numbers in a unit of i-PI"),
    ],
)
def test_fields_that_cannot_be_read(efield: str, sentence: str) -> None:
    element = ET.fromstring(f"<driven_dynamics> <efield> {efield} </efield> </driven_dynamics>")
    with pytest.raises(ValueError, match=sentence):
        read_efield(element)
