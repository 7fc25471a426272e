"""Reading what the real i-PI wrote, and what a killed or restarted run leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

from voltpi.analysis.ipi_files import convert, file_kind, iter_extras, read_extras, read_properties, read_trajectory
from voltpi.potential.errors import InputError

BOHR = 0.529177210903  # Å, CODATA 2018
HARTREE = 27.211386245988  # eV


def test_properties(nvt_run: Path) -> None:
    table = read_properties(nvt_run / "run.out")
    np.testing.assert_array_equal(table.get("step"), np.arange(0, 201, 4))
    np.testing.assert_allclose(table.get("time", "time", "femtosecond"), 0.5 * table.get("step"), rtol=1e-9)
    np.testing.assert_allclose(table.get("time", "time", "picosecond"), 0.0005 * table.get("step"), rtol=1e-9)
    assert table.units["conserved"] == "electronvolt"
    np.testing.assert_allclose(
        table.get("conserved", "energy", "atomic_unit") * HARTREE, table.get("conserved"), rtol=2e-7
    )
    with pytest.raises(InputError, match=r"run\.out: no column 'volume'; add it to <properties>"):
        table.get("volume")
    with pytest.raises(InputError, match="column 'time' has the unit 'femtosecond', which is no energy"):
        table.get("time", "energy", "electronvolt")


def test_vector_columns(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text(
        "# column   1     --> step : The current simulation time step.\n"
        "# cols.    2-4   --> dipole{debye}(0) : a vector\n# column 5 --> temperature(O){kelvin} : of oxygen\n"
        "0 1 2 3 300\n1 4 5 6 310\n"
    )
    table = read_properties(path)
    np.testing.assert_array_equal(table.get("dipole(0)"), [[1, 2, 3], [4, 5, 6]])
    assert table.units["temperature(O)"] == "kelvin"


def test_cut_and_repeated_lines(tmp_path: Path, nvt_run: Path) -> None:
    text = (nvt_run / "run.out").read_text()
    lines = text.splitlines()
    again = re.sub(r"\d", "7", lines[-1].split()[3])
    repeated = lines[-1].replace(lines[-1].split()[3], again)
    path = tmp_path / "run.out"
    path.write_text("\n".join([*lines, repeated, "   2.04e+02  1.0"]))
    table = read_properties(path)
    assert len(table.get("step")) == len(lines) - 7
    assert table.get("temperature")[-1] == float(again)


def test_extras(nvt_run: Path) -> None:
    dipole, charges = read_extras(nvt_run / "run.dipole_0"), read_extras(nvt_run / "run.charges_0")
    assert (dipole.name, charges.name) == ("dipole", "charges")
    assert dipole.values.shape == (51, 3)
    assert charges.values.shape == (11, 192)
    np.testing.assert_array_equal(charges.values[4, :3], [-0.8, 0.4, 0.4])
    positions = next(read_trajectory(nvt_run / "run.pos_0.extxyz")).atoms.positions
    np.testing.assert_allclose(dipole.values[0] * BOHR, charges.values[0] @ positions, atol=1e-5)


def test_matrix_extras_and_a_cut_record(tmp_path: Path) -> None:
    path = tmp_path / "run.polarizability_0"
    record = " #EXTRAS(polarizability)# Step:  {:9d} \n 1 0 0\n 0 2 0\n 0 0 {}\n"
    path.write_text(
        record.format(0, 3) + record.format(2, 4) + record.format(2, 5) + " #EXTRAS(polarizability)# Step: 4\n 1 0"
    )
    extras = read_extras(path)
    np.testing.assert_array_equal(extras.steps, [0, 2])
    np.testing.assert_array_equal(extras.values, [np.diag([1, 2, 3]), np.diag([1, 2, 5])])


def test_raw_extras_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.raw_0"
    path.write_text(" #EXTRAS(raw)# Step: 0 \n{'dipole': [1, 2]}\n #EXTRAS(raw)# Step: 1 \n{'dipole': [1, 2]}\n")
    with pytest.raises(InputError, match="extras 'raw' are no numbers"):
        read_extras(path)


def test_trajectories(nvt_run: Path, bead_run: Path) -> None:
    start = read(nvt_run / "start.xyz")
    frames = list(read_trajectory(nvt_run / "run.pos_0.extxyz"))
    assert [frame.step for frame in frames] == list(range(0, 201, 20))
    np.testing.assert_allclose(frames[0].atoms.positions, start.positions, atol=1e-6)
    for bead in range(4):
        frames = list(read_trajectory(bead_run / f"run.pos_{bead}.xyz"))
        assert [frame.step for frame in frames] == [0, 20, 40]
        assert frames[0].atoms.get_chemical_symbols() == start.get_chemical_symbols()
        np.testing.assert_allclose(frames[0].atoms.positions, start.positions, atol=2e-4)
        np.testing.assert_allclose(np.array(frames[-1].atoms.cell), np.array(start.cell), atol=1e-5)


def test_cut_trajectory(tmp_path: Path, nvt_run: Path, bead_run: Path) -> None:
    for run, name in ((nvt_run, "run.pos_0.extxyz"), (bead_run, "run.pos_0.xyz")):
        text = (run / name).read_text()
        path = tmp_path / name
        path.write_text(text[: int(0.9 * len(text))])
        whole = list(read_trajectory(run / name))
        assert len(list(read_trajectory(path))) == len(whole) - (1 if "ext" not in name else 2)


def test_other_trajectories_are_refused(tmp_path: Path, bead_run: Path) -> None:
    path = tmp_path / "run.vel_0.xyz"
    path.write_text((bead_run / "run.pos_0.xyz").read_text().replace("positions{", "velocities{"))
    with pytest.raises(InputError, match="holds velocities, not positions"):
        list(read_trajectory(path))


def test_kinds(nvt_run: Path) -> None:
    kinds = {path.name: file_kind(path) for path in nvt_run.iterdir()}
    assert {name: kind for name, kind in kinds.items() if kind} == {
        "run.out": "properties",
        "run.pos_0.extxyz": "positions",
        "run.dipole_0": "extras:dipole",
        "run.charges_0": "extras:charges",
    }


def test_units() -> None:
    # i-PI's table has the bohr to eight digits and the hartree of CODATA 2006
    assert convert(1.0, "length", "atomic_unit", "angstrom") == pytest.approx(BOHR, rel=2e-8)
    assert convert(1.0, "energy", "", "electronvolt") == pytest.approx(HARTREE, rel=2e-7)


def test_extras_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "run.shells_0"
    record = " #EXTRAS(shells)# Step:  {:10d} \n{}\n{}\n"
    path.write_text(
        record.format(0, "1 2 3", "4 5 6")
        + record.format(10, "1 2 4", "4 5")  # killed here, and restarted from the step before
        + record.format(10, "1 2 5", "4 5 6")
        + record.format(0, "9 9 9", "9 9 9")
        + record.format(20, "1 2 6", "4 5 6")
        + " #EXTRAS(shells)# Step:          30 \n1 2"
    )
    read = list(iter_extras(path))
    assert [step for step, _ in read] == [0, 10, 20]
    assert [values[0, 2] for _, values in read] == [3, 5, 6]
    assert read[0][1].shape == (2, 3)


def test_extras_one_by_one_are_those_of_the_whole_file(nvt_run: Path) -> None:
    for name in ("run.charges_0", "run.dipole_0"):
        whole, one_by_one = read_extras(nvt_run / name), list(iter_extras(nvt_run / name))
        np.testing.assert_array_equal([step for step, _ in one_by_one], whole.steps)
        np.testing.assert_array_equal([values for _, values in one_by_one], whole.values)


def test_what_is_no_element_is_x(tmp_path: Path) -> None:
    path = tmp_path / "run.pos_0.xyz"
    comment = "# CELL(abcABC): 9 9 9 90 90 90 Step: 4 Bead: 0 positions{angstrom} cell{angstrom}"
    path.write_text(f"2\n{comment}\nAu 1 2 3\nQel 4 5 6\n")
    (frame,) = read_trajectory(path)
    assert frame.atoms.numbers.tolist() == [79, 0]
