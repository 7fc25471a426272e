"""A new user's first minutes, with the shipped model and the real i-PI: new, check, run, evaluate, analyze."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

FIELDS = {"water-field": [0.1, 0, 0], "water-field-nve": [0.05, 0.0, 0.0]}
STEPS = [0, 4, 8]
BOHR = 0.529177210903


def voltpi(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "voltpi.driver.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module", params=FIELDS)
def folder(request, tmp_path_factory):
    """A finished run of eight steps that wrote everything every four steps."""
    root = tmp_path_factory.mktemp("end-to-end")
    made = voltpi("new", request.param, request.param, cwd=root)
    assert made.returncode == 0, made.stderr
    run = root / request.param
    text = (run / "input.xml").read_text()
    text, changed = re.subn(r"<total_steps> *\d+ *</total_steps>", f"<total_steps> {STEPS[-1]} </total_steps>", text)
    assert changed == 1
    text, changed = re.subn(r"stride='20'", "stride='4'", text)
    assert changed == 2  # positions and charges
    (run / "input.xml").write_text(text)
    ran = voltpi("run", "input.xml", cwd=run)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return run


def extras(folder: Path, name: str) -> np.ndarray:
    """What i-PI wrote of the driver's answers [records, numbers]; checks that the records are those of STEPS."""
    text = (folder / f"run.{name}_0").read_text()
    assert [int(step) for step in re.findall(r"Step: +(\d+)", text)] == STEPS
    return np.loadtxt(text.splitlines(), comments="#").reshape(len(STEPS), -1)


def test_a_use_as_it_ships_is_found_right(tmp_path):
    assert voltpi("new", "water-field", cwd=tmp_path).returncode == 0
    checked = voltpi("check", "input.xml", cwd=tmp_path / "water-field")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "no problem found" in checked.stdout


@pytest.mark.slow
def test_what_ipi_wrote_is_what_the_potential_says(folder):
    """Dipole and charges in i-PI's files equal those of `voltpi evaluate` on the positions in its files, every step."""
    frames = read(folder / "run.pos_0.extxyz", ":")
    assert len(frames) == len(STEPS)
    evaluated = voltpi("evaluate", "run.pos_0.extxyz", "--settings", "settings.yaml", "--json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    answers = [json.loads(line) for line in evaluated.stdout.splitlines()]
    assert len(answers) == len(STEPS)
    for answer in answers:
        assert answer["residual"] < 1e-8
        assert np.array(answer["charges"]).reshape(-1, 3).sum(1) == pytest.approx(np.zeros(64), abs=1e-10)
    dipoles, charges = extras(folder, "dipole") * BOHR, extras(folder, "charges")
    assert np.ptp(dipoles, axis=0).max() > 1e-3  # the atoms moved, so that one record would not do for another
    for step, answer in enumerate(answers):
        np.testing.assert_allclose(dipoles[step], answer["dipole"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(charges[step], answer["charges"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_analysis_of_the_run(folder):
    done = voltpi("analyze", "polarization", ".", cwd=folder)
    assert done.returncode == 0, done.stderr
    for suffix in ("csv", "png", "svg"):
        assert (folder / f"polarization.{suffix}").stat().st_size > 0
    assert "polarization.png" in done.stdout
    numbers = json.loads((folder / "polarization.json").read_text())
    assert 150 < numbers["temperature_K"] < 450
    assert numbers["field_V_per_A"] == FIELDS[folder.name]
    assert (numbers["n_molecules"], numbers["n_records"]) == (64, len(STEPS))
    mean = extras(folder, "dipole").mean(0) * BOHR
    assert numbers["dipole_eA"] == pytest.approx(mean.tolist(), abs=1e-5)
    along = np.array(FIELDS[folder.name]) / np.linalg.norm(FIELDS[folder.name])
    assert numbers["induced_dipole_per_molecule_eA"] == pytest.approx(mean @ along / 64, abs=1e-6)
