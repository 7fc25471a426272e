"""A new user's first minutes, with the shipped model and the real i-PI: new, check, run, evaluate, analyze."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

USES = ("water-field", "water-field-nve")
BOHR = 0.529177210903


def voltpi(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "voltpi.driver.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module", params=USES)
def folder(request, tmp_path_factory):
    """A finished run of eight steps."""
    root = tmp_path_factory.mktemp(request.param)
    made = voltpi("new", request.param, "run", cwd=root)
    assert made.returncode == 0, made.stderr
    text = (root / "run" / "input.xml").read_text()
    start, end = text.index("<total_steps>"), text.index("</total_steps>")
    (root / "run" / "input.xml").write_text(text[:start] + "<total_steps> 8 " + text[end:])
    checked = voltpi("check", "input.xml", cwd=root / "run")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    ran = voltpi("run", "input.xml", cwd=root / "run")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return root / "run"


@pytest.mark.slow
def test_what_ipi_wrote_is_what_the_potential_says(folder):
    """Dipole and charges in i-PI's files equal those of `voltpi evaluate` on the positions in its files."""
    frames = read(next(folder.glob("*.pos_0.extxyz")), ":")
    settings = ["--settings", "settings.yaml"]
    evaluated = voltpi("evaluate", next(folder.glob("*.pos_0.extxyz")).name, *settings, "--json", cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    answers = [json.loads(line) for line in evaluated.stdout.splitlines()]
    assert len(answers) == len(frames)
    for answer in answers:
        assert {"energy", "energy_terms", "forces", "stress", "charges", "shells", "dipole", "residual"} <= set(answer)
        assert answer["residual"] < 1e-8
        assert np.array(answer["charges"]).reshape(-1, 3).sum(1) == pytest.approx(np.zeros(64), abs=1e-10)
    printed = np.loadtxt(next(folder.glob("*.dipole_0")), comments="#").reshape(-1, 3) * BOHR
    assert printed[0] == pytest.approx(answers[0]["dipole"], abs=1e-5)


@pytest.mark.slow
def test_analysis_of_the_run(folder):
    done = voltpi("analyze", "polarization", ".", cwd=folder)
    assert done.returncode == 0, done.stderr
    for suffix in ("csv", "png", "svg"):
        assert (folder / f"polarization.{suffix}").stat().st_size > 0
    numbers = json.loads((folder / "polarization.json").read_text())
    assert np.isfinite(numbers["temperature_K"])
    assert np.isfinite(numbers["induced_dipole_per_molecule_eA"])
    assert np.isfinite(numbers["conserved_drift_eV_per_atom_ps"])
    *_, dipole, temperature, drift, figure = done.stdout.splitlines()
    assert dipole.startswith("induced dipole per molecule")
    assert temperature.startswith("temperature")
    assert drift.startswith("drift of conserved quantity")
    assert figure.startswith("figure: ")
    assert (folder / figure.removeprefix("figure: ")).read_bytes().startswith(b"\x89PNG")
