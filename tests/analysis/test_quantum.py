"""Quantum kinetic energies and radii of gyration: their sources say the same, and wrong input says what lacks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from voltpi.analysis.ipi_files import file_kind, read_vectors
from voltpi.analysis.quantum import K_B, quantum_of
from voltpi.analysis.quantum_analyses import analyze_quantum_kinetic
from voltpi.analysis.runs import find_run
from voltpi.potential.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "driver"))
import harmonic

ZERO = (0.0, 0.0, 0.0)
OUTPUTS = "".join(
    f"<trajectory filename='{name}' stride='8' format='xyz'> {what} </trajectory>"
    for name, what in (("pos", "positions"), ("for", "forces"), ("kin", "kinetic_cv"), ("rg", "r_gyration"))
)


@pytest.fixture(scope="module")
def crystal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harmonic crystal with four beads for 400 steps, with everything that can be made use of, every eighth step."""
    folder = tmp_path_factory.mktemp("crystal")
    xml = harmonic.write_crystal(folder, 4, 400, outputs=OUTPUTS)
    xml.write_text(xml.read_text().replace("<properties stride='4'", "<properties stride='8'"))
    script = Path(sys.executable).with_name("i-pi")
    done = subprocess.run([sys.executable, str(script), "in.xml"], cwd=folder, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]
    return folder


def test_properties_trajectories_and_beads_say_the_same(crystal: Path, tmp_path: Path) -> None:
    """Series of both quantities and both elements, step by step."""
    full = quantum_of(find_run(crystal, ZERO))
    for kept, source in ((("kin", "rg"), ".kin"), (("pos", "for"), "beads")):
        folder = tmp_path / source.strip(".")
        folder.mkdir()
        shutil.copy(crystal / "in.xml", folder)
        for name in kept:
            for path in crystal.glob(f"run.{name}*"):
                shutil.copy(path, folder)
        # times alone are left of the properties
        lines = (crystal / "run.out").read_text().splitlines()
        rows = [line.split() for line in lines if not line.startswith("#")]
        text = "# column   1     --> step : x\n# column   2     --> time{femtosecond} : x\n"
        (folder / "run.out").write_text(text + "\n".join(" ".join(row[:2]) for row in rows) + "\n")
        other = quantum_of(find_run(folder, ZERO))
        for a, b in zip(full.species, other.species, strict=True):
            assert a.element == b.element
            for one, two in ((a.kinetic, b.kinetic), (a.gyration, b.gyration)):
                assert one is not None
                assert two is not None
                assert "run.out" in one.source
                assert source in two.source or "run.rg" in two.source
                np.testing.assert_allclose(two.times, one.times)
                np.testing.assert_allclose(two.values, one.values, rtol=1e-4)  # few digits in the files


def thinned(crystal: Path, folder: Path, kept: dict[str, slice]) -> Path:
    """The run with those of the beads' frames alone, and without kinetic energies."""
    folder.mkdir()
    for name in ("in.xml", "run.out"):
        shutil.copy(crystal / name, folder)
    text = (folder / "run.out").read_text()
    (folder / "run.out").write_text(text.replace("kinetic_cv", "kinetic_xy").replace("r_gyration", "other"))
    for name, chosen in kept.items():
        for path in crystal.glob(f"run.{name}_*.xyz"):
            lines = path.read_text().splitlines(keepends=True)
            frames = ["".join(lines[k : k + 10]) for k in range(0, len(lines), 10)]
            (folder / path.name).write_text("".join(frames[chosen]))
    return folder


def test_positions_and_forces_with_strides_of_their_own(crystal: Path, tmp_path: Path) -> None:
    """They are matched by step, whichever is written more often."""
    full = quantum_of(find_run(crystal, ZERO)).species[0]
    assert full.kinetic is not None
    for k, (positions, forces) in enumerate(((2, 1), (1, 2), (2, 3))):
        kept = {"pos": slice(None, None, positions), "for": slice(None, None, forces)}
        made = quantum_of(find_run(thinned(crystal, tmp_path / str(k), kept), ZERO)).species[0]
        assert made.kinetic is not None
        assert made.gyration is not None
        common = slice(None, None, int(np.lcm(positions, forces)))
        np.testing.assert_allclose(made.kinetic.times, full.kinetic.times[common])
        np.testing.assert_allclose(made.kinetic.values, full.kinetic.values[common], rtol=1e-4)
        assert len(made.gyration.times) == len(full.kinetic.times[::positions])


def test_steps_that_do_not_match(crystal: Path, tmp_path: Path) -> None:
    folder = thinned(crystal, tmp_path / "apart", {"pos": slice(0, None, 2), "for": slice(1, None, 2)})
    with pytest.raises(InputError, match=r"run\.for_0\.xyz: has no step in common with run\.pos_0\.xyz"):
        quantum_of(find_run(folder, ZERO))
    for name in ("pos", "for"):
        folder = thinned(crystal, tmp_path / name, {"pos": slice(None), "for": slice(None)})
        path = folder / f"run.{name}_1.xyz"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[10:]))
        with pytest.raises(InputError, match=rf"run\.{name}_0\.xyz: its frames do not say the same steps as those of"):
            quantum_of(find_run(folder, ZERO))


def test_numbers_are_those_of_the_columns(crystal: Path) -> None:
    table = np.loadtxt(crystal / "run.out")
    late = table[table[:, 1] >= 40.0]
    numbers = quantum_of(find_run(crystal, ZERO), skip=40.0).numbers()
    assert numbers["temperature_K"] == pytest.approx(300.0)
    for element, column in (("H", 2), ("O", 3)):
        own = numbers["elements"][element]
        assert own["n_atoms"] == 4
        assert own["kinetic_energy_meV"] == pytest.approx(1e3 * late[:, column].mean() / 4)
        assert own["classical_meV"] == pytest.approx(1.5 * K_B * 300.0 * 1e3)
        assert own["quantum_excess_meV"] == pytest.approx(own["kinetic_energy_meV"] - own["classical_meV"])
    tensor = numbers["elements"]["H"]["kinetic_energy_xyz_meV"]
    assert sum(tensor) == pytest.approx(numbers["elements"]["H"]["kinetic_energy_meV"], rel=1e-6)
    assert "kinetic_energy_xyz_meV" not in numbers["elements"]["O"]
    # ħ²/(4 m kT) of hydrogen at 300 K, from its de Broglie wavelength of 1.0044 Å: λ/√(8π)
    assert numbers["elements"]["H"]["radius_of_gyration_free_A"] == pytest.approx(1.0044 / np.sqrt(8 * np.pi), rel=1e-3)


def test_command(crystal: Path, tmp_path: Path) -> None:
    result = analyze_quantum_kinetic([crystal], tmp_path, skip=20.0)
    assert {Path(f).name for f in result["files"]} == {f"quantum-kinetic.{s}" for s in ("csv", "json", "png", "svg")}
    for file in result["files"]:
        assert Path(file).stat().st_size > 0
    rows = (tmp_path / "quantum-kinetic.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows] == [["element", "atoms"], ["H", "4"], ["O", "4"]]
    numbers = json.loads((tmp_path / "quantum-kinetic.json").read_text())
    assert numbers["elements"]["H"]["kinetic_energy_meV"] == pytest.approx(float(rows[1].split(",")[2]))
    assert any("H: kinetic energy" in line and "classical 38.78 meV" in line for line in result["report"])


def test_trajectories_are_told_by_what_they_hold(crystal: Path) -> None:
    kinds = {path.name: file_kind(path) for path in crystal.glob("run.*xyz")}
    assert kinds["run.kin.xyz"] == "kinetic_cv"
    assert kinds["run.rg.xyz"] == "r_gyration"
    assert kinds["run.pos_0.xyz"] == "positions"
    with pytest.raises(InputError, match="holds positions; give the trajectory of kinetic_cv or r_gyration"):
        next(read_vectors(crystal / "run.pos_0.xyz"))


def test_what_cannot_be(crystal: Path, tmp_path: Path) -> None:
    for name in ("run.out", "start.xyz", "run.pos_0.xyz"):
        shutil.copy(crystal / name, tmp_path)
    with pytest.raises(InputError, match="temperature is not known; give --temperature KELVIN"):
        analyze_quantum_kinetic([tmp_path])
    text = (tmp_path / "run.out").read_text()
    (tmp_path / "run.out").write_text(text.replace("kinetic_cv", "kinetic_xy").replace("r_gyration", "other"))
    with pytest.raises(
        InputError, match=r"no kinetic energies and no beads; add <properties> \[step, .*kinetic_cv\(H\)"
    ):
        analyze_quantum_kinetic([tmp_path], temperature=300.0)
