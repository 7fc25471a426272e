"""Reading what the real i-PI wrote, and what a killed or restarted run leaves behind."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

from voltpi.analysis.ipi_files import (
    convert,
    extras_by_step,
    file_kind,
    iter_extras,
    read_extras,
    read_forces,
    read_properties,
    read_trajectory,
    read_velocities,
)
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
        + record.format(20, "9 9 9", "9 9 9")
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


def xyz(step: int, value: float, quantity: str = "positions{angstrom}") -> str:
    comment = f"# CELL(abcABC):    9.0    9.0    9.0   90.0   90.0   90.0  Step:  {step:10d}  Bead:       0 {quantity}"
    return f"3\n{comment}  cell{{angstrom}}\n" + "".join(
        f"       H {k:12.5e} 1.0e+00 {value:12.5e}\n" for k in range(3)
    )


def extended(step: int, value: float) -> str:
    comment = f'ipi_comment="Step:  {step:10d}  Bead:       0 positions{{ase}}  cell{{ase}}" pbc="T T T"'
    rows = "".join(f"H        {k:.8f}       1.00000000       {value:.8f}\n" for k in range(3))
    return f'3\nLattice="9.0 0.0 0.0 0.0 9.0 0.0 0.0 0.0 9.0" Properties=species:S:1:pos:R:3 {comment}\n{rows}'


def positions_of(path: Path) -> list[tuple[float, float]]:
    return [(frame.step or 0, frame.atoms.positions[2, 2]) for frame in read_trajectory(path)]


def vectors_of(read: Callable, factor: float) -> Callable[[Path], list[tuple[float, float]]]:
    return lambda path: [(frame.step, frame.values[2, 2] / factor) for frame in read(path)]


def one_by_one(path: Path) -> list[tuple[float, float]]:
    return [(step, values[-1]) for step, values in iter_extras(path)]


def all_at_once(path: Path) -> list[tuple[float, float]]:
    extras = read_extras(path)
    return list(zip(extras.steps, extras.values[:, -1], strict=True))


def table(path: Path) -> list[tuple[float, float]]:
    properties = read_properties(path)
    return list(zip(properties.get("step"), properties.get("potential"), strict=True))


HEADER = "# column   1     --> step : The step.\n# column   2     --> potential{electronvolt} : The energy.\n"
FORMATS = {
    "properties": (HEADER, lambda step, value: f"   {step:.8e}    {value:.8e}   \n", table),
    "extras": ("", lambda step, value: f" #EXTRAS(q)# Step:  {step:10d} \n{1.0:.8e} {value:.8e}\n", one_by_one),
    "all extras": ("", lambda step, value: f" #EXTRAS(q)# Step:  {step:10d} \n{1.0:.8e} {value:.8e}\n", all_at_once),
    "positions": ("", xyz, positions_of),
    "extended": ("", extended, positions_of),
    "velocities": ("", lambda s, v: xyz(s, v, "velocities{m/s}"), vectors_of(read_velocities, 1e-5)),
    "forces": ("", lambda s, v: xyz(s, v, "forces{ev/ang}"), vectors_of(read_forces, 1.0)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_later_branch_counts(tmp_path: Path, kind: str) -> None:
    """Killed behind step 120 wherever it was in its record of step 140, restarted behind 80, killed and restarted."""
    start, record, read_file = FORMATS[kind]
    first = start + "".join(record(step, 1.0 + step) for step in range(0, 121, 20))
    second = "".join(record(step, 2.0 + step) for step in (100, 120, 140))
    third = record(140, 3.5)
    kept = [(step, 1.0 + step) for step in range(0, 81, 20)] + [(100, 102.0), (120, 122.0)]
    path = tmp_path / "run"
    cut = record(140, 7.0)
    for length in range(len(cut) + 1):
        path.write_text(first + cut[:length] + second + third)
        np.testing.assert_allclose(read_file(path), [*kept, (140, 3.5)], rtol=1e-5, err_msg=repr(cut[:length]))
    path.write_text(first + second[: len(record(100, 2.0)) + len(record(120, 2.0)) // 2])
    np.testing.assert_allclose(read_file(path), kept[:-1], rtol=1e-5)  # nothing of the first run after 100


@pytest.mark.parametrize("kind", FORMATS)
def test_a_last_record_cut_anywhere_is_left_out(tmp_path: Path, kind: str) -> None:
    start, record, read_file = FORMATS[kind]
    path = tmp_path / "run"
    whole, cut = start + record(0, 1.25) + record(20, 1.5), record(40, 1.75)
    for length in range(len(cut)):
        path.write_text(whole + cut[:length])
        found = read_file(path)
        np.testing.assert_allclose(found, [(0, 1.25), (20, 1.5)], rtol=1e-5, err_msg=repr(cut[:length]))
    path.write_text(whole + cut)
    np.testing.assert_allclose(read_file(path), [(0, 1.25), (20, 1.5), (40, 1.75)], rtol=1e-5)


def test_a_long_trajectory_is_read_frame_by_frame(tmp_path: Path) -> None:
    path = tmp_path / "run.pos_0.xyz"
    rows = "".join(f"       H {k:12.5e} {k:12.5e} {k:12.5e}\n" for k in range(200))
    comment = "# CELL(abcABC): 9 9 9 90 90 90 Step: {:10d} Bead: 0 positions{{angstrom}}  cell{{angstrom}}\n"
    with path.open("w") as file:
        for step in [*range(400), *range(250, 500)]:
            file.write("200\n" + comment.format(step) + rows)
    assert path.stat().st_size > 4e6
    read_few = read_trajectory(path)
    tracemalloc.start()
    try:
        steps = [next(read_few).step for _ in range(5)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert steps == list(range(5))
    assert peak < 0.5e6


def test_frames_without_steps(tmp_path: Path) -> None:
    path = tmp_path / "run.extxyz"
    frame = '2\nLattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:pos:R:3\nH 0 0 0\nH 0 0 {}\n'
    path.write_text(frame.format(1) + frame.format(2) + frame.format(3)[:-9])
    frames = list(read_trajectory(path))
    assert [(frame.step, frame.atoms.positions[1, 2]) for frame in frames] == [(None, 1.0), (None, 2.0)]


def test_units_with_a_slash(tmp_path: Path) -> None:
    path = tmp_path / "run.for_0.xyz"
    path.write_text(xyz(0, 2.0, "forces{ev/ang}"))
    assert file_kind(path) == "forces"
    (forces,) = read_forces(path)
    np.testing.assert_allclose(forces.values[:, 2], 2.0, rtol=1e-6)
    path.write_text(xyz(0, 2.0, "velocities{m/s}"))
    assert file_kind(path) == "velocities"
    (velocities,) = read_velocities(path)
    np.testing.assert_allclose(velocities.values[:, 2], 2.0e-5, rtol=1e-6)  # Å/fs
    path.write_text(xyz(0, 2.0, "velocities{atomic_unit}"))
    (velocities,) = read_velocities(path)
    np.testing.assert_allclose(velocities.values[:, 2], 2.0 * 21.8769126364, rtol=1e-6)  # CODATA 2018


def test_extras_asked_for_by_step(tmp_path: Path) -> None:
    path = tmp_path / "run.q_0"
    path.write_text("".join(f" #EXTRAS(q)# Step: {step} \n{step + 0.5}\n" for step in (0, 10, 20)))
    records = extras_by_step(path)
    found = [records.at(step) for step in (10, 15, 20, 30, 0)]
    assert [None if value is None else value.item() for value in found] == [10.5, None, 20.5, None, 0.5]
