"""The command line as a contract: exit status, one line on stderr, keys of the JSON, and every wrong input tried."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from voltpi.driver import uses
from voltpi.driver.check import check
from voltpi.driver.cli import main

KEYS = {
    "energy",
    "energy_terms",
    "forces",
    "stress",
    "charges",
    "shells",
    "dipole",
    "electrodes",
    "residual",
    "iterations",
    "seconds",
}
FRAGMENTS = ["--set", "charges.conserve=fragments"]
XML = """<simulation verbosity='low'>
  <output prefix='run'> <properties stride='1' filename='out'> [step, potential] </properties> </output>
  <total_steps>4</total_steps>
  <prng><seed>5</seed></prng>
  {forcefield}
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nve'> <timestep units='femtosecond'> {timestep} </timestep> </dynamics>
    </motion>
  </system>
</simulation>
"""
SOCKET = "<ffsocket name='ff' mode='unix'> <address>voltpi-test</address> </ffsocket>"


def water(pbc: bool = True) -> Atoms:
    positions = [[0.1, 0.0, 0.1], [0.86, 0.6, 0.0], [-0.66, 0.6, 0.0], [3, 3, 3], [3.76, 3.6, 3], [2.24, 3.6, 3]]
    return Atoms("OHHOHH", positions, cell=[7, 7.5, 8], pbc=pbc)


@pytest.fixture
def structure(tmp_path: Path) -> Path:
    path = tmp_path / "w.xyz"
    write(path, water(), format="extxyz")
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A complete run: input, settings, start structure."""
    write(tmp_path / "start.xyz", water(), format="extxyz")
    (tmp_path / "settings.yaml").write_text("charges: {conserve: fragments}\nfield: [0, 0, 0.05]\n")
    (tmp_path / "input.xml").write_text(XML.format(forcefield=SOCKET, timestep=0.25))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """Runs a command that must fail with one line on stderr and nothing on stdout; returns the line."""
    assert main([*map(str, arguments)]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_prints_the_contract(structure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--set", "output.born_charges=true", "--set", "output.polarizability=true", "--set", "field=[0,0,0.1]"]
    assert main(["evaluate", str(structure), *FRAGMENTS, *more, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    record = json.loads(line)
    assert set(record) == KEYS | {"field", "born_charges", "polarizability"}
    assert record["field"] == [0, 0, 0.1]
    assert np.shape(record["forces"]) == np.shape(record["shells"]) == (6, 3)
    assert np.shape(record["stress"]) == np.shape(record["polarizability"]) == (3, 3)
    assert np.shape(record["born_charges"]) == (6, 3, 3)
    assert np.shape(record["charges"]) == (6,)
    assert np.shape(record["dipole"]) == (3,)
    assert record["electrodes"] == {}
    assert sum(record["energy_terms"].values()) == pytest.approx(record["energy"], abs=1e-10)
    assert 0 <= record["residual"] < 1e-6
    assert record["iterations"] >= 1
    np.testing.assert_allclose(np.sum(record["forces"], axis=0), 0, atol=1e-7)


def test_evaluate_without_response_properties_leaves_them_out(
    structure: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(structure), *FRAGMENTS, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == KEYS


def test_every_frame_has_its_line_and_its_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = []
    for strength in (0.0, 0.1, -0.1):
        frame = water()
        frame.info["electric_field"] = [0, strength, 0]
        frames.append(frame)
    other = water()[:3]
    other.info["electric_field"] = [0, 0, 0]
    write(tmp_path / "f.xyz", [*frames, other], format="extxyz")
    assert main(["evaluate", str(tmp_path / "f.xyz"), *FRAGMENTS, "--set", "field=from-frame", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(record["charges"]) for record in records] == [6, 6, 6, 3]
    none, up, down, _ = records
    assert none["energy_terms"]["field"] == 0
    # carried charges are those of the first frame at zero field, so ±ε induce opposite dipoles to first order
    induced = np.array([np.subtract(r["dipole"], none["dipole"]) for r in (up, down)])
    assert induced[0, 1] > 0.005
    np.testing.assert_allclose(induced[0, 1], -induced[1, 1], rtol=0.05)


def test_a_wrapped_trajectory_keeps_its_dipole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [water() for _ in range(5)]
    for step, frame in enumerate(frames):
        frame.positions += 1.7 * step
        frame.wrap()
    write(tmp_path / "t.xyz", frames, format="extxyz")
    keys = ["--set", "charges.net_charge=1", "--set", "field=[0,0,0.05]"]
    assert main(["evaluate", str(tmp_path / "t.xyz"), *keys, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # charge 1 e moves by 1.7 Å a frame, through the cell's faces
    steps = np.diff([record["dipole"] for record in records], axis=0)
    np.testing.assert_allclose(steps, 1.7, atol=1e-5)


def test_a_table_for_people_says_the_same(structure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(structure), *FRAGMENTS, "--json"]) == 0
    energy = json.loads(capsys.readouterr().out)["energy"]
    assert main(["evaluate", str(structure), *FRAGMENTS]) == 0
    out = capsys.readouterr().out
    assert f"{energy:.6f} eV" in out
    assert "residual" in out


def test_born_charges_are_in_the_table_where_they_are_asked_for(
    structure: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*FRAGMENTS, "--set", "charges.response=all", "--set", "output.born_charges=true"]
    assert main(["evaluate", str(structure), *asked, "--json"]) == 0
    born = np.array(json.loads(capsys.readouterr().out)["born_charges"])
    assert main(["evaluate", str(structure), *asked]) == 0
    out = capsys.readouterr().out
    thirds = np.trace(born, axis1=1, axis2=2) / 3
    assert re.search(rf"Born charges +│ O {thirds[[0, 3]].mean():.4f}, H {thirds[[1, 2, 4, 5]].mean():.4f} e", out)
    rows = re.findall(r"^│ (\d \w+|sum) +│ ([^│]*)│ ([^│]*)│ ([\d.]+) +│$", out, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == ["0 O", "1 H", "2 H", "3 O", "4 H", "5 H", "sum"]
    for (_, mean, diagonal, _), own in zip(rows, [*born, born.sum(0)], strict=True):
        assert float(mean) == pytest.approx(np.trace(own) / 3, abs=1e-4)
        assert [float(x) for x in diagonal.split()] == pytest.approx(np.diag(own).tolist(), abs=1e-4)


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to compute", "--set model=water"]),
        (["--set", "charges.modl=pqeq"], ["--set charges.modl=pqeq", "did you mean charges.model?"]),
        (["--set", "coulomb.accuracy=high"], ["coulomb.accuracy is 'high'", "expected a number"]),
        (["--set", "field=[0,0,0.1]", "--set", "charges.response=all"], ["w.xyz", "field", "periodic"]),
        (["--set", "model=no-such"], ["no-such"]),
        (["--set", "model=./no.safetensors"], ["no.safetensors"]),
        (["--set", "charges.model=none"], ["nothing to compute"]),
        (["--set", "coulomb.boundary=finite-field-z"], ["needs two electrodes, both at potentials", "slab-z"]),
        (["--set", "coulomb.method=direct"], ["direct is for open boundaries"]),
        (["--settings", "no.yaml"], ["no.yaml", "no such settings file"]),
        (["--settings"], ["--settings"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_wrong_settings_exit_2(
    structure: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    line = refused(capsys, "evaluate", str(structure), *arguments)
    for word in words:
        assert word in line


def test_malformed_yaml_names_file_and_line(
    structure: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text("charges:\n  model: [pqeq\n")
    assert "s.yaml, line" in refused(capsys, "evaluate", str(structure), "--settings", str(tmp_path / "s.yaml"))
    (tmp_path / "s.yaml").write_text("charges: {conserve: fragments}\nfield: 3\n")
    line = refused(capsys, "evaluate", str(structure), "--settings", str(tmp_path / "s.yaml"))
    assert "s.yaml, line 2: field is 3" in line


def test_wrong_structures_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.xyz"
    options = ["--set", "charges.model=pqeq"]

    def line_for(atoms: Atoms) -> str:
        write(path, atoms, format="extxyz")
        line = refused(capsys, "evaluate", str(path), *options)
        assert "bad.xyz" in line
        return line

    overlapping = water()
    overlapping.positions[3] = overlapping.positions[0]
    assert "atoms 0 (O) and 3 (O)" in line_for(overlapping)
    assert "Og" in line_for(Atoms("OgH", [[0, 0, 0], [1.5, 0, 0]]))
    no_cell = water()
    no_cell.set_cell(None)
    assert "no cell" in line_for(no_cell)
    nan = water(pbc=False)
    nan.positions[1, 2] = np.nan
    assert "atom 1" in line_for(nan)
    path.write_text("not a structure\n")
    assert "cannot be read as a structure" in refused(capsys, "evaluate", str(path), *options)
    assert "no such structure file" in refused(capsys, "evaluate", str(tmp_path / "none.xyz"), *options)


def test_a_wrong_frame_among_good_ones_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = water()
    bad.positions[3] = bad.positions[0]
    write(tmp_path / "f.xyz", [water(), bad], format="extxyz")
    assert main(["evaluate", str(tmp_path / "f.xyz"), *FRAGMENTS, "--json"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1  # the good frame was answered
    assert "f.xyz, frame 1: " in err
    assert err.count("\n") == 1


def test_no_stable_point_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a spring four hundred times softer and no limiter, oxygen's shells run away."""
    write(tmp_path / "w.xyz", water(), format="extxyz")
    (tmp_path / "soft.csv").write_text("symbol,chi,eta,Z,R,K\nO,8.30811,14.66128,1,0.66900,1.0\n")
    keys = ["--set", "charges.limiter=none", "--set", f"charges.parameters={tmp_path / 'soft.csv'}"]
    line = refused(capsys, "evaluate", str(tmp_path / "w.xyz"), *keys, status=1)
    assert "w.xyz: " in line
    assert "(O)" in line


def test_unknown_commands_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "evaluat" in refused(capsys, "evaluat")
    assert "STRUCTURE" in refused(capsys, "evaluate")


def test_an_unforeseen_error_is_one_line_too(
    structure: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("voltpi.driver.structures.read_structures", broken)
    assert "ZeroDivisionError: oh" in refused(capsys, "evaluate", str(structure), *FRAGMENTS, status=1)
    monkeypatch.setenv("VOLTPI_DEBUG", "1")
    assert main(["evaluate", str(structure), *FRAGMENTS]) == 1
    assert "Traceback" in capsys.readouterr().err


# -- drive, run -------------------------------------------------------------------------------------------------------


def test_a_dead_socket_exits_1_and_does_not_hang(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    options = ["--unix", "nobody", "--socket-prefix", str(run_folder / "s_"), "--wait", "0.3"]
    assert main(["drive", "--settings", str(run_folder / "settings.yaml"), *options]) == 1
    assert time.monotonic() - began < 20
    err = capsys.readouterr().err
    assert "nobody listens at unix socket" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --unix NAME"),
        (["--unix", "a", "--host", "b"], "give --unix NAME"),
        (["--host", "b"], "--port"),
        (["--port", "70000"], "1…65535"),
        (["--port", "40000", "--shm"], "--unix NAME"),
        (["--unix", "a", "--template", "none.xyz"], "none.xyz"),
        (["--unix", "a", "--set", "charges.response=all"], "field along a periodic direction"),
        (["--unix", "a", "--set", "fild=1"], "did you mean field?"),
    ],
)
def test_drive_refuses_before_it_connects(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    keys = ["--set", "charges.conserve=total"]
    assert words in refused(capsys, "drive", "--settings", str(run_folder / "settings.yaml"), *keys, *arguments)


def test_drive_asks_for_the_start_structure(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "start.xyz").unlink()
    line = refused(capsys, "drive", "--settings", str(run_folder / "settings.yaml"), "--unix", "a")
    assert "--template FILE" in line


def test_run_refuses_a_missing_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no.xml" in refused(capsys, "run", "no.xml")


# -- check ------------------------------------------------------------------------------------------------------------


def problems(path: Path) -> list[str]:
    return [finding.sentence for finding in check(path) if not finding.ok]


def test_a_complete_run_has_no_problem(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run_folder / "input.xml")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "6 atoms" in out
    assert main(["check", str(run_folder / "settings.yaml")]) == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("input.xml", "</system>", "</sistem>", "not well-formed"),
        ("input.xml", "timestep", "timestp", "timestp"),
        ("input.xml", "start.xyz", "begin.xyz", "begin.xyz"),
        ("input.xml", "> 0.25 <", "> 4 <", "<timestep> is 4 fs"),
        ("settings.yaml", "field", "feld", "did you mean field?"),
        ("settings.yaml", "fragments", "total, response: all", "field along a periodic direction"),
        ("settings.yaml", "charges:", "model: none-such\ncharges:", "none-such"),
        ("start.xyz", 'pbc="T T T"', 'pbc="T F F"', "periodic in one direction only"),
        ("start.xyz", "O  ", "Og ", "Og"),
        ("start.xyz", "6\n", "7\n", "start.xyz"),
    ],
)
def test_check_finds_it(run_folder: Path, file: str, old: str, new: str, words: str) -> None:
    text = (run_folder / file).read_text()
    assert old in text
    (run_folder / file).write_text(text.replace(old, new))
    found = problems(run_folder / "input.xml")
    assert any(words in sentence for sentence in found), found
    assert main(["check", str(run_folder / "input.xml")]) == 2


NVE = "<dynamics mode='nve'>"
NO_TEMPERATURE = ("<temperature units='kelvin'> 300 </temperature>", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([(NVE, "<dynamics mode='nvt'>"), NO_TEMPERATURE], "<dynamics mode='nvt'> needs a temperature"),
        ([("nbeads='1'", "nbeads='4'"), NO_TEMPERATURE], "with 4 beads needs a temperature"),
        ([("forcefield='ff'", "forcefield='fff'")], "<force forcefield='fff'> names no forcefield; did you mean ff?"),
        ([(NVE, "<dynamics mode='npt'>")], "<dynamics mode='npt'> has no <barostat>; give it a <barostat mode='iso"),
        ([(NVE, "<dynamics mode='npt'> <barostat> </barostat>")], "has a <barostat> without mode"),
        ([(NVE, "<dynamics mode='nst'> <barostat mode='flexible'> </barostat>")], "a <barostat mode='anisotropic'>"),
        ([("units='femtosecond'", "units='fs'")], "unit 'fs' is unknown; write femtosecond"),
    ],
)
def test_what_ipi_would_stop_at_is_found_and_not_started(
    run_folder: Path, capsys: pytest.CaptureFixture[str], changes: list[tuple[str, str]], words: str
) -> None:
    text = (run_folder / "input.xml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (run_folder / "input.xml").write_text(text)
    assert len([sentence for sentence in problems(run_folder / "input.xml") if words in sentence]) == 1
    assert capsys.readouterr().out == ""  # i-PI prints a table of units
    assert words in refused(capsys, "run", str(run_folder / "input.xml"))
    assert not list(run_folder.glob("*.log"))


def test_a_motion_at_constant_energy_needs_no_temperature(run_folder: Path) -> None:
    text = (run_folder / "input.xml").read_text()
    (run_folder / "input.xml").write_text(text.replace(*NO_TEMPERATURE))
    assert problems(run_folder / "input.xml") == []


@pytest.mark.parametrize("way", ["socket", "direct"])
@pytest.mark.parametrize(("name", "package"), [("sevennet-0", "sevenn"), ("chgnet", "chgnet")])
def test_run_starts_nothing_where_the_package_of_a_model_is_missing(
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    name: str,
    package: str,
) -> None:
    from voltpi.driver import pes

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find_spec(module))
    if way == "direct":
        direct = (
            f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> "
            "<parameters>{settings: settings.yaml, template: start.xyz}</parameters> </ffdirect>"
        )
        (run_folder / "input.xml").write_text(XML.format(forcefield=direct, timestep=0.25))
    (run_folder / "settings.yaml").write_text(f"short_range: {{foundation: {name}}}\n")
    sentence = refused(capsys, "run", str(run_folder / "input.xml"))
    assert f"name='ff'>: short_range.foundation is {name}, which needs the package {package} (" in sentence
    assert not list(run_folder.glob("*.log"))


@pytest.mark.parametrize(("step", "offered"), [(0, False), (2, True), (4, False)])
def test_a_run_is_only_continued_from_where_it_got_on(run_folder: Path, step: int, offered: bool) -> None:
    from voltpi.driver import launch

    plan = launch.read_input(run_folder / "input.xml")
    session = launch._Session(plan, launch.RunRecord.of(plan), 1, {}, run_folder, True)
    (run_folder / "RESTART").write_text(f"<simulation> <step>{step}</step> </simulation>")
    hint = session._how_to_continue()
    assert (f"the state of step {step} of 4 is kept, continue with `voltpi run" in hint) == offered
    assert bool(hint) == offered


def test_check_finds_several_problems_at_once(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "input.xml").write_text(XML.format(forcefield=SOCKET, timestep=9))
    (run_folder / "settings.yaml").write_text("feld: 1\n")
    assert main(["check", str(run_folder / "input.xml")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert all(line.startswith("error: ") for line in err)


def test_check_finds_a_structure_that_would_explode(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # charges alone give no large force at any distance that is allowed
    monkeypatch.setattr("voltpi.driver.check._LARGEST_FORCE", 0.01)
    assert any("would explode" in sentence for sentence in problems(run_folder / "input.xml"))


@pytest.mark.parametrize("way", ["socket", "direct"])
def test_a_cell_that_ipi_would_turn_is_found_before_the_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    from voltpi.driver import pes

    if way == "direct":
        direct = (
            f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> "
            "<parameters>{settings: settings.yaml, template: start.xyz}</parameters> </ffdirect>"
        )
        (run_folder / "input.xml").write_text(XML.format(forcefield=direct, timestep=0.25))
    turned = water()
    turned.rotate(30, "z", rotate_cell=True)
    write(run_folder / "start.xyz", turned, format="extxyz")
    (sentence,) = problems(run_folder / "input.xml")
    assert "i-PI turns the cell" in sentence
    assert "name='ff'" in sentence
    assert "i-PI turns the cell" in refused(capsys, "run", str(run_folder / "input.xml"))
    assert not list(run_folder.glob("*.log"))  # nothing was started
    (run_folder / "settings.yaml").write_text("charges: {conserve: fragments}\n")
    assert problems(run_folder / "input.xml") == []  # without a field it does not matter


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cell_that_ipi_keeps_is_no_problem(run_folder: Path, sign: int) -> None:
    """Triclinic, in either handedness: i-PI turns but does not mirror."""
    from ipi.utils.io import read_file

    kept = water()
    kept.set_cell([[7, 0, 0], [0.4, 7.5, 0], [0.3, -0.5, 8 * sign]])
    write(run_folder / "start.xyz", kept, format="extxyz")
    with (run_folder / "start.xyz").open() as file:
        h = read_file("ase", file)["cell"].h
    np.testing.assert_allclose(h.T * 0.529177210903, kept.cell, atol=1e-6)
    assert problems(run_folder / "input.xml") == []


def test_check_compares_the_template_of_ffdirect_with_the_start(run_folder: Path) -> None:
    from voltpi.driver import pes

    direct = (
        f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> "
        "<parameters>{settings: settings.yaml, template: other.xyz, field: 0 0 0.02}</parameters> </ffdirect>"
    )
    (run_folder / "input.xml").write_text(XML.format(forcefield=direct, timestep=0.25))
    write(run_folder / "other.xyz", water(), format="extxyz")
    assert problems(run_folder / "input.xml") == []
    write(run_folder / "other.xyz", water()[:3], format="extxyz")
    (sentence,) = problems(run_folder / "input.xml")
    assert "3 atoms" in sentence
    assert "6" in sentence


@pytest.mark.parametrize("with_start", [True, False])
def test_settings_that_no_potential_can_be_built_from_are_not_called_valid(run_folder: Path, with_start: bool) -> None:
    settings = run_folder / "settings.yaml"
    settings.write_text("charges: {model: latent}\n")
    if not with_start:
        (run_folder / "start.xyz").unlink()
    (finding,) = check(settings)
    assert not finding.ok
    assert finding.sentence.startswith(f"{settings}, line 1: charges.model: latent needs a network")


def test_ions_and_radicals_are_told_from_molecules(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A proton that the file puts with the other molecule: refused without charges, as one radical a hint."""
    atoms = water()
    atoms.positions[2] = atoms.positions[3] + [-0.2, -0.5, 0.8]
    write(run_folder / "start.xyz", atoms, format="extxyz")
    (sentence,) = problems(run_folder / "settings.yaml")
    assert "2 fragments would be neutral with an odd number of electrons, such as HO of atom 0 (O) and H3O" in sentence
    assert "give every ion its charge as initial_charges" in sentence
    atoms.set_initial_charges([-1, 0, 0, 1, 0, 0])
    write(run_folder / "start.xyz", atoms, format="extxyz")
    assert [f.ok for f in check(run_folder / "settings.yaml")] == [True, True]
    write(run_folder / "start.xyz", water()[:5], format="extxyz")
    hints = [f.sentence for f in check(run_folder / "settings.yaml") if "hint" in f.sentence]
    assert len(hints) == 1
    assert "1 fragments have an odd number of electrons with the charge they keep (HO of atom 3 (O))" in hints[0]


def test_check_of_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "nothing.xml"]) == 2
    assert "nothing.xml" in capsys.readouterr().err


# -- analyze ----------------------------------------------------------------------------------------------------------


def test_analyze_hands_its_options_to_the_analysis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from voltpi.analysis import ANALYSES, Analysis, Option

    seen: dict[str, object] = {}

    def run(paths: list[Path], out: Path | None = None, **options: object) -> dict[str, object]:
        seen.update(paths=paths, out=out, **options)
        return {"slope": 2.5, "report": ["slope 2.5"], "figure": "f.png", "files": ["f.png", "f.csv"]}

    options = (Option("skip", "fs", default=0.0), Option("field", "V/Å", count=3))
    monkeypatch.setitem(ANALYSES, "toy", Analysis("toy", "a toy", run, options))
    arguments = ["analyze", "toy", str(tmp_path), "--out", str(tmp_path / "o"), "--field", "0", "0", "-0.05"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == ["wrote f.png", "wrote f.csv", "slope 2.5", "figure: f.png"]
    assert seen == {"paths": [tmp_path], "out": tmp_path / "o", "skip": 0.0, "field": [0, 0, -0.05]}
    assert main(["analyze", "toy", str(tmp_path), "--json", "--skip", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["slope"] == 2.5
    assert seen["skip"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["polarization"], "FILES"),
        (["polarization", "no-such-folder"], "no-such-folder"),
        (["polarization", ".", "--skip", "x"], "--skip"),
        (["polarization", ".", "--nonsense"], "--nonsense"),
    ],
)
def test_analyze_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refused(capsys, "analyze", *arguments)


# -- new, models, help ------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-in for the inputs that ship."""
    use = tmp_path / "inputs" / "salt-field"
    use.mkdir(parents=True)
    (use / "README.md").write_text("# Salt in a field\n\nMore.\n")
    (use / "input.xml").write_text("<simulation/>\n")
    (tmp_path / "inputs" / "__pycache__").mkdir()
    monkeypatch.setattr(uses.resources, "files", lambda _: tmp_path / "inputs")
    return tmp_path


def test_new_copies_a_use(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new"]) == 0
    listed = capsys.readouterr().out
    assert "salt-field" in listed
    assert "Salt in a field" in listed
    (shipped / "inputs" / "salt-field" / "README.md").rename(shipped / "inputs" / "salt-field" / "settings.yaml")
    assert uses.describe_uses() == {"salt-field": "Salt in a field"}
    assert "pycache" not in listed
    target = shipped / "mine"
    assert main(["new", "salt-field", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["input.xml", "settings.yaml"]


def test_new_overwrites_nothing(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = shipped / "mine"
    target.mkdir()
    (target / "input.xml").write_text("precious")
    assert "nothing is overwritten" in refused(capsys, "new", "salt-field", str(target))
    assert (target / "input.xml").read_text() == "precious"
    assert sorted(path.name for path in target.iterdir()) == ["input.xml"]
    assert "did you mean salt-field?" in refused(capsys, "new", "salt-fild", str(shipped / "other"))


def test_models_are_listed_with_their_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    from voltpi.potential import checkpoints

    errors = {"force RMSE": "0.01 eV/Å", "rmse": 0.012345678, "shift": -2081.44}
    card = {"data": "melts", "frames": 12345, "errors": errors}
    monkeypatch.setattr(checkpoints, "list_models", lambda: ["salt"])
    monkeypatch.setattr(checkpoints, "read_card", lambda _: card)
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for word in ("salt", "melts", "force RMSE: 0.01 eV/Å", "rmse: 0.0123", "shift: -2080", "frames 12345"):
        assert f"{word} " in " ".join(out.replace("│", " ").split()) + " "


def test_help_and_version_are_quick_and_exit_0() -> None:
    for option in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "voltpi.driver.cli", option],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0
        assert "voltpi" in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "ase", "ipi", "scipy"}  # what makes a start slow


def test_the_process_exits_with_the_status(structure: Path) -> None:
    command = [sys.executable, "-m", "voltpi.driver.cli", "evaluate", str(structure), "--set", "a.b=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --set a.b=1: unknown key a;")
