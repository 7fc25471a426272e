"""The inputs with quantum nuclei and of a field sweep: found right, and a few steps of them run and are analysed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from scipy import linalg

from voltpi.analysis.ipi_files import read_extras
from voltpi.analysis.quantum_analyses import analyze_quantum_kinetic
from voltpi.analysis.registry import analyze_field_response
from voltpi.analysis.runs import find_run, find_runs
from voltpi.driver import launch
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.check import check
from voltpi.driver.ipi_input import read_input
from voltpi.driver.settings import load_settings
from voltpi.driver.uses import copy_use

INPUTS = Path(__file__).parents[1] / "inputs"
VARIANTS = [("water-pimd", "input"), ("water-pimd", "field"), ("water-piglet", "input"), ("water-piglet", "field")]
BEADS = {"water-pimd": 32, "water-piglet": 6}
BOHR = 0.529177210903


def prepare(folder: Path, use: str, name: str, steps: int, molecules: int) -> Path:
    """A copy of the use, so short and with so few of its molecules, that writes everything at every step."""
    copy_use(use, folder)
    start = read(folder / "start.xyz")[: 3 * molecules]
    start.set_cell([9.0, 9.0, 9.0])
    start.write(folder / "start.xyz", columns=["symbols", "positions"])
    path = folder / f"{name}.xml"
    text = re.sub(r"stride='\d+'", "stride='1'", path.read_text())
    text, changed = re.subn(r"<total_steps> *\d+ *</total_steps>", f"<total_steps>{steps}</total_steps>", text)
    assert changed == 1
    path.write_text(text)
    return path


@pytest.mark.parametrize(("use", "name"), [*VARIANTS, ("water-field-sweep", "input")])
def test_as_it_ships_it_is_found_right(use: str, name: str) -> None:
    findings = list(check(INPUTS / use / f"{name}.xml"))
    assert len(findings) > 2
    assert not [f.sentence for f in findings if not f.ok or f.sentence.startswith("hint")]


@pytest.mark.parametrize(("use", "name"), VARIANTS)
def test_beads_go_in_one_batch(use: str, name: str) -> None:
    plan = read_input(INPUTS / use / f"{name}.xml")
    (ff,) = plan.sockets
    assert plan.n_beads == ff.batch_size == BEADS[use]
    assert ff.overrides == ({"field": [0.1, 0, 0]} if name == "field" else {})


@pytest.mark.slow
@pytest.mark.parametrize(("use", "name"), VARIANTS)
def test_a_few_steps(tmp_path: Path, use: str, name: str) -> None:
    """Every bead's dipole is that of its positions in the field of <parameters>; the analysis has its numbers."""
    path = prepare(tmp_path / use, use, name, 2, 4)
    assert launch.run(path, quiet=True) == 0
    prefix = "run" if name == "input" else name
    outputs = [p for p in path.parent.iterdir() if p.name.startswith(f"{prefix}.") and p.suffix != ".json"]
    run = find_run(outputs)
    assert run.field.tolist() == ([0.1, 0, 0] if name == "field" else [0, 0, 0])
    assert len(run.positions) == len(run.extras["dipole"]) == len(run.extras["charges"]) == BEADS[use]
    for bead in (0, BEADS[use] - 1):
        atoms = read(run.positions[bead], "-1")
        settings = load_settings(path.parent / "settings.yaml", {"field": run.field.tolist()})
        atoms.calc = VoltPICalculator(settings)
        dipoles = read_extras(run.extras["dipole"][bead])
        assert dipoles.steps.tolist() == [0, 1, 2]
        np.testing.assert_allclose(dipoles.values[-1] * BOHR, atoms.calc.get_dipole_moment(atoms), rtol=0, atol=2e-5)
    result = analyze_quantum_kinetic(outputs, tmp_path)
    hydrogen = result["elements"]["H"]
    assert result["temperature_K"] == pytest.approx(300)
    assert hydrogen["n_atoms"] == 8
    assert hydrogen["kinetic_energy_meV"] > hydrogen["classical_meV"]
    assert hydrogen["radius_of_gyration_A"] > result["elements"]["O"]["radius_of_gyration_A"] > 0


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    """Five replicas, each in its own field, and the slope from all of them."""
    path = prepare(tmp_path / "sweep", "water-field-sweep", "input", 1, 2)
    assert launch.run(path, quiet=True) == 0
    fields = [run.field.tolist() for run in find_runs([path.parent])]
    assert fields == [[x, 0, 0] for x in (0, 0.005, 0.01, 0.02, 0.04)]
    result = analyze_field_response([path.parent], tmp_path)
    assert [run["field_V_per_A"] for run in result["runs"]] == fields
    assert np.isfinite(result["relative_permittivity"])


def matrices() -> tuple[np.ndarray, np.ndarray]:
    """A [6, 9, 9] (atomic units) and C [6, 9, 9] (K) of water-piglet."""
    text = (INPUTS / "water-piglet" / "input.xml").read_text()
    found = [re.search(rf"<{name} shape='\(6,9,9\)'[^>]*> \[(.*?)\] </{name}>", text, re.DOTALL) for name in "AC"]
    assert all(found)
    a, c = (np.array(m[1].split(","), dtype=float).reshape(6, 9, 9) for m in found if m)
    return a, c


def test_piglet_gives_harmonic_modes_their_quantum_energy() -> None:
    """Stationary moments of the Langevin equation of every ring-polymer mode, summed: ħω/4 coth(ħω/2kT), to 0.2 %."""
    a, c = matrices()
    kelvin = 3.1668115634556e-6  # hartree
    kt, beads = 300 * kelvin, 6
    for wavenumber in (50, 500, 1600, 3400, 4000):
        omega = wavenumber / 219474.63
        kinetic, potential = 0.5 * kt, 0.0
        for k in range(beads):
            square = omega**2 + (2 * beads * kt * np.sin(np.pi * k / beads)) ** 2
            drift = np.zeros((10, 10))
            drift[0, 1], drift[1, 0] = -1.0, square
            drift[1:, 1:] += a[k]
            noise = np.zeros((10, 10))
            noise[1:, 1:] = (a[k] @ c[k] + c[k] @ a[k].T) * kelvin
            here = 0.5 * omega**2 * linalg.solve_continuous_lyapunov(drift, noise)[0, 0] / beads
            potential += here
            kinetic += here if k else 0.0
        exact = 0.25 * omega / np.tanh(0.5 * omega / kt)
        assert kinetic == pytest.approx(exact, rel=2e-3)
        assert potential == pytest.approx(exact, rel=2e-3)
    assert (INPUTS / "water-piglet" / "field.xml").read_text().count("e-0") > 100
    for name in "AC":
        one, other = (
            re.search(rf"<{name} shape.*?</{name}>", (INPUTS / "water-piglet" / f"{f}.xml").read_text(), re.DOTALL)
            for f in ("input", "field")
        )
        assert one is not None
        assert other is not None
        assert one[0] == other[0]
