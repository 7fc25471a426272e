"""Displacement, reference of the polarization, reduced fields, fields that change with time: from the settings on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk

from voltpi.driver import pes
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.check import check
from voltpi.driver.cli import main
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator
from voltpi.driver.frames import evaluate_frames
from voltpi.driver.ipi_input import read_input
from voltpi.driver.launch import run
from voltpi.driver.potentiostat import run_evaluator
from voltpi.driver.schedule import refusals, settings_at
from voltpi.driver.settings import Settings, load_settings
from voltpi.potential.errors import InputError, VoltPIError

from ipi_runs import XML

K_E = 14.3996454784255
SALT: dict[str, Any] = {
    "short_range": {"pair": {"set": "nacl", "cutoff": 5.0}},
    "charges": {"model": "fixed"},
}
RAMP = {"ramp": {"start": 0.0, "rate": 5.0, "until": 0.06}}


def crystal(rattle: float = 0.1) -> Atoms:
    """Two formula units of rock salt in a cell as i-PI has it, rattled."""
    atoms = bulk("NaCl", "rocksalt", 5.64, orthorhombic=True)
    atoms.set_initial_charges(np.where(atoms.symbols == "Na", 1.0, -1.0))
    atoms.positions += rattle * np.random.default_rng(3).normal(size=(4, 3))
    return atoms


def tree(**keys: Any) -> Settings:
    return load_settings(overrides={**SALT, **keys})


def evaluator(atoms: Atoms | None = None, **keys: Any) -> Evaluator:
    return Evaluator.from_settings(tree(**keys), crystal() if atoms is None else atoms)


def wire(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(atoms.cell).T[None] / BOHR, atoms.positions[None] / BOHR


def answered(atoms: Atoms, **keys: Any) -> Any:
    return evaluator(atoms, **keys).evaluate(*wire(atoms))[0]


@pytest.fixture
def reference(tmp_path: Path) -> str:
    path = tmp_path / "reference.xyz"
    crystal(0.0).write(path, format="extxyz")
    return str(path)


# what is read --------------------------------------------------------------------------------------------------------


def test_axes_with_null_keep_the_field() -> None:
    settings = tree(displacement="[null, 0.1, null]", field="[0.02, null, 0]")
    assert settings.displacement == (None, 0.1, None)
    assert settings.field == (0.02, 0.0, 0.0)
    assert settings.in_field
    assert not tree(displacement=[None, None, None]).in_field
    held = tree(displacement=[None, None, 0.1], field=[0, 0, None])
    assert load_settings(overrides={**SALT, "displacement": [0, 0, 1], "displacement.2": 0.2}).displacement == (
        0,
        0,
        0.2,
    )
    assert held.field_under_strain == "uniform"


def test_parameters_of_ipi_override(tmp_path: Path) -> None:
    """A sweep in one XML: i-PI splits parameters at commas, so vectors have blanks."""
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**SALT, "displacement": [None, None, 0.0]}))
    atoms = crystal()
    atoms.write(tmp_path / "start.xyz", format="extxyz")
    fields = []
    for value in (0.0, 0.3):
        surface = pes.VoltPI(
            settings=str(tmp_path / "settings.yaml"),
            template=str(tmp_path / "start.xyz"),
            displacement=f"null null {value}",
            field_under_strain="reduced",
        )
        h, r = wire(atoms)
        fields.append(json.loads(surface.compute(h[0], r[0])[3])["field"])
    assert np.subtract(*fields[::-1]) * HARTREE / BOHR == pytest.approx([0, 0, 0.3], abs=1e-12)


def test_paths_are_relative_to_the_settings(tmp_path: Path, reference: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        yaml.safe_dump({**SALT, "displacement": [None, None, 0.1], "polarization_reference": "reference.xyz"})
    )
    assert load_settings(file).polarization_reference == reference


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"displacement": [0, 0, 0.1], "field": [0, 0, 0.1]}, "displacement and field are both set along z"),
        ({"displacement": [None, None, RAMP], "field": [0, 0, RAMP]}, "both set along z"),
        ({"displacement": [0, 0, 0.1], "field": "from-frame"}, "displacement excludes field: from-frame"),
        ({"displacement": [0, 0.1]}, "expected null or three entries"),
        ({"displacement": [0, 0, "up"]}, "displacement.2 is 'up'; expected a number (V/Å), or one of ramp"),
        ({"field": [0, 0, {"ramp": {"start": 0, "rate": -1, "until": 1}}]}, "field.2.ramp.rate is -1"),
        ({"field": [0, 0, {"saw": {}}]}, "unknown key field.2.saw"),
        ({"displacement": [0, 0, {"cyclic": {"low": 1, "high": 0, "rate": 1}}]}, "low must lie below high"),
        ({"field_under_strain": "reduced", "field": "from-frame"}, "brings one with every frame"),
        ({"field_under_strain": "reduced"}, "is for a field or displacement, and there is none"),
        ({"field_under_strain": "fixed", "field": [0, 0, 1]}, "field_under_strain"),
        ({"charges": {"model": "none"}, "displacement": [0, 0, 0.1]}, "a displacement needs charges that feel it"),
    ],
)
def test_mistakes_are_one_sentence(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as raised:
        tree(**keys)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"coulomb.boundary": "slab-z"}, "not periodic in all three directions"),
        ({"coulomb.boundary": "open"}, "not periodic in all three directions"),
        ({"charges": {"model": "pqeq", "response": "all"}}, "charge would flow across the cell without end"),
        (
            {"charges": {"model": "pqeq"}, "coulomb.method": "taper"},
            "displacement is not available with coulomb.method",
        ),
        ({"charges": {"model": "pqeq", "net_charge": 1.0}}, "depends on where it is counted from"),
        (
            {"electrodes": [{"name": "m", "atoms": "index 0", "eta": 1.0, "potential": 0.0}]},
            "displacement with electrodes",
        ),
    ],
)
def test_structures_without_a_displacement(keys: dict[str, Any], words: str) -> None:
    atoms = crystal()
    if "electrodes" in keys:
        atoms.set_initial_charges([0.0, -1.0, 1.0, 0.0])
    with pytest.raises(InputError, match=re.escape(words)):
        answered(atoms, **{"displacement": [None, None, 0.1], **keys})


def test_voltages_to_keep_need_a_cell() -> None:
    with pytest.raises(InputError, match="field_under_strain is reduced"):
        answered(crystal(), **{"field": [0.1, 0, 0], "field_under_strain": "reduced", "coulomb.boundary": "slab-z"})


# what is answered ----------------------------------------------------------------------------------------------------


def test_the_field_that_acts() -> None:
    atoms = crystal()
    extras = answered(atoms, displacement=[None, 0.2, 0.1], field=[0.03, 0, 0]).extras
    moment, field = np.array(extras["dipole"]) * BOHR, np.array(extras["field"]) * HARTREE / BOHR
    inside = 4 * math.pi * K_E / atoms.get_volume() * moment
    assert field == pytest.approx([0.03, 0.2 - inside[1], 0.1 - inside[2]], abs=1e-12)
    assert extras["energy_displacement"] * HARTREE == pytest.approx(
        atoms.get_volume() / (8 * math.pi * K_E) * (field[1:] ** 2).sum(), abs=1e-12
    )
    assert "field" not in answered(atoms).extras
    (record,) = evaluate_frames(tree(displacement=[None, 0.2, 0.1], field=[0.03, 0, 0]), [atoms], "start.xyz")
    assert record["field"] == pytest.approx(field, abs=1e-12)
    assert np.array(record["stress"]) == pytest.approx(np.array(record["stress"]).T, abs=1e-15)
    atoms.calc = VoltPICalculator(tree(displacement=[None, 0.2, 0.1], field=[0.03, 0, 0]))
    atoms.get_potential_energy()
    assert atoms.calc.results["field"] == pytest.approx(field, abs=1e-12)


def test_each_structure_of_a_batch_in_its_own_displacement() -> None:
    atoms = crystal()
    h, r = wire(atoms)
    held = np.array([[np.nan, np.nan, 0.1], [0.2, np.nan, 0.0]])
    fields = np.array([[0.05, 0, 0], [0, 0.02, 0]])
    many = evaluator(atoms).evaluate(np.repeat(h, 2, 0), np.repeat(r, 2, 0), fields=fields, displacements=held)
    for b, result in enumerate(many):
        own = [None if np.isnan(d) else d for d in held[b]]
        alone = answered(atoms, displacement=own, field=fields[b].tolist())
        assert result.energy == pytest.approx(alone.energy, abs=1e-11)
        assert result.forces == pytest.approx(alone.forces, abs=1e-10)
        assert result.extras["field"] == pytest.approx(alone.extras["field"], abs=1e-10)


def test_wrapped_atoms_do_not_matter_beside_a_reference(reference: str) -> None:
    atoms, moved = crystal(), crystal()
    moved.positions += np.array([[1, 0, -2], [0, 0, 1], [3, 0, 0], [0, -1, 0]]) @ atoms.cell.array
    displacement = [0.05, 0.0, 0.1]
    keys = {"displacement": displacement, "polarization_reference": reference}
    one, two = answered(atoms, **keys), answered(moved, **keys)
    assert two.energy == pytest.approx(one.energy, abs=1e-10)
    assert two.extras["dipole"] == pytest.approx(one.extras["dipole"], abs=1e-9)
    charges = atoms.get_initial_charges()
    off = charges @ (atoms.positions - crystal(0.0).positions)
    assert np.array(one.extras["dipole"]) * BOHR == pytest.approx(off, abs=1e-9)
    # without a reference the start structure's own images count
    assert (
        abs(answered(moved, displacement=displacement).energy - answered(atoms, displacement=displacement).energy) > 1
    )


def test_reference_of_molecules_whose_charges_flow(tmp_path: Path) -> None:
    """Neutral molecules have their dipole whatever the reference; ions count from their places in it."""
    water = Atoms("OH2Na", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0], [3, 3, 3]], cell=[6, 6, 6], pbc=True)
    chloride = Atoms("Cl", [[3.0, 3.0, 0.3]])
    atoms = water + chloride
    atoms.set_initial_charges([0, 0, 0, 1.0, -1.0])
    atoms.write(tmp_path / "reference.xyz", format="extxyz")
    moved = atoms.copy()
    moved.positions[3] += [0.0, 0.1, 0.0]
    keys = {
        "short_range": None,
        "charges": {"model": "pqeq", "conserve": "fragments", "response": "all"},
        "displacement": [None, 0.1, None],
        "polarization_reference": str(tmp_path / "reference.xyz"),
    }
    one = answered(moved, **keys)
    moved.positions[3] -= [0, 6, 12]
    two = answered(moved, **keys)
    assert two.energy == pytest.approx(one.energy, abs=1e-9)
    assert two.extras["dipole"] == pytest.approx(one.extras["dipole"], abs=1e-7)
    assert np.abs(np.array(one.extras["dipole"]) * BOHR).max() < 1.0


def test_references_that_do_not_fit(tmp_path: Path) -> None:
    other = crystal()[[1, 0, 2, 3]]
    other.write(tmp_path / "other.xyz", format="extxyz")
    with pytest.raises(InputError, match="give one with the same atoms in the same order"):
        evaluator(displacement=[0, 0, 0], polarization_reference=str(tmp_path / "other.xyz"))
    with pytest.raises(InputError, match="there is no such structure file"):
        evaluator(displacement=[0, 0, 0], polarization_reference=str(tmp_path / "nowhere.xyz"))
    bare = crystal()
    bare.set_cell(None)
    bare.write(tmp_path / "bare.xyz", format="extxyz")
    with pytest.raises(InputError, match="must be periodic in all three directions"):
        evaluator(displacement=[0, 0, 0], polarization_reference=str(tmp_path / "bare.xyz"))


@pytest.mark.parametrize("stays", ["uniform", "reduced"])
@pytest.mark.parametrize(
    "outside", [{"field": [0.05, -0.02, 0.08]}, {"displacement": [0.1, 0.2, -0.1]}, {"displacement": [None, None, 0.2]}]
)
def test_virial_is_what_ipi_strains(outside: dict[str, Any], stays: str, reference: str) -> None:
    """Upper triangle, as i-PI's cells: −∂E/∂s_ab of h -> (1 + s) h, q -> (1 + s) q."""
    e = evaluator(**outside, polarization_reference=reference, field_under_strain=stays, coulomb={"accuracy": 1e-9})
    h, r = (x[0] for x in wire(crystal()))
    virial = e.evaluate(h[None], r[None])[0].virial

    def energy(step: float, a: int, b: int) -> float:
        strain = np.eye(3)
        strain[a, b] += step
        return e.evaluate((strain @ h)[None], (r @ strain.T)[None])[0].energy

    for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        one, two = ((energy(x, a, b) - energy(-x, a, b)) / (2 * x) for x in (5e-4, 1e-3))
        assert virial[a, b] == pytest.approx((two - 4 * one) / 3, rel=1e-7, abs=1e-8)


def test_check_says_what_the_displacement_leaves(tmp_path: Path, reference: str) -> None:
    crystal().write(tmp_path / "start.xyz", format="extxyz")
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({**SALT, "displacement": [None, None, 0.1]}))
    sentences = [f.sentence for f in check(settings)]
    assert any("which leaves the field [" in s for s in sentences)
    assert any("give polarization_reference: FILE" in s for s in sentences)
    with settings.open("a") as file:
        file.write("polarization_reference: reference.xyz\n")
    found = list(check(settings))
    assert all(f.ok for f in found)
    assert not any("give polarization_reference" in f.sentence for f in found)


def test_whole_molecules_need_no_reference(tmp_path: Path) -> None:
    water = Atoms("OH2", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]], cell=[5, 5, 5], pbc=True)
    water.write(tmp_path / "start.xyz", format="extxyz")
    charges = {"model": "pqeq", "conserve": "fragments"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"charges": charges, "displacement": [None, None, 0.1]}))
    found = list(check(tmp_path / "settings.yaml"))
    assert any("which leaves the field" in f.sentence for f in found)
    assert not any("give polarization_reference" in f.sentence for f in found)


# fields that change with time ----------------------------------------------------------------------------------------


def test_every_structure_at_the_field_of_its_step() -> None:
    wave = {"square": {"low": 0.0, "high": 0.1, "period": 0.004}}
    settings = tree(field=[0.01, 0, RAMP], displacement=[None, wave, None], clock={"timestep": 2.0})
    assert settings.scheduled == ["field.2", "displacement.1"]
    driver = run_evaluator(settings, crystal())
    h, r = wire(crystal())
    inside = 4 * math.pi * K_E / crystal().get_volume()
    for step in range(9):
        (result,) = driver.evaluate(h, r)
        field = np.array(result.extras["field"]) * HARTREE / BOHR
        moment = np.array(result.extras["dipole"]) * BOHR
        assert result.extras["step"] == step
        assert field[[0, 2]] == pytest.approx([0.01, min(5.0 * 2e-3 * step, 0.06)], abs=1e-12)
        assert field[1] + inside * moment[1] == pytest.approx(0.1 * (step % 2), abs=1e-12)
    with pytest.raises(InputError, match=r"field\.2 is for a run in i-PI; for single structures give numbers"):
        Evaluator.from_settings(settings, crystal())


def test_a_ramp_from_zero_knows_about_turned_cells(tmp_path: Path) -> None:
    """At its first step there is no field yet, but i-PI would have turned the cell already."""
    atoms = crystal()
    atoms.rotate(30, "z", rotate_cell=True)
    driver = run_evaluator(tree(field=[0, 0, RAMP], clock={"timestep": 2.0}), atoms)
    straight = crystal()
    with pytest.raises(InputError, match="i-PI turns the cell"):
        driver.evaluate(*wire(straight))


FLOWING = {"short_range": {"pair": {"set": "nacl", "cutoff": 5.0}}, "charges": {"model": "pqeq", "response": "all"}}


def test_a_ramp_that_the_charges_do_not_allow_is_refused_before_the_run(tmp_path: Path) -> None:
    """At step 0 there is no field, and charge flows across the cell only from step 1 on."""
    words = r"at 0\.012 ps.*charge would flow across the cell without end"
    xml = write_run(tmp_path, SOCKET, field=[0, 0, RAMP], **FLOWING)
    settings = load_settings(tmp_path / "settings.yaml")
    Evaluator.from_settings(settings_at(settings), crystal())
    with pytest.raises(InputError, match=r"settings\.yaml, line \d+: " + words):
        run_evaluator(settings, crystal())
    (finding,) = (f for f in check(xml) if not f.ok)
    assert re.search(words, finding.sentence)
    xml = write_run(tmp_path, SOCKET, field=[0, 0, RAMP])
    assert [f.sentence for f in check(xml) if f.ok and "at 0.012 ps, when what changes is largest" in f.sentence]


def test_a_run_with_such_a_ramp_does_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    xml = write_run(tmp_path, SOCKET, field=[0, 0, RAMP], **FLOWING)
    assert run(xml, quiet=True) == 2
    assert "charge would flow across the cell without end" in capfd.readouterr().err


EXTRAS = "".join(
    f"<trajectory filename='{name}' stride='1' extra_type='{name}'> extras </trajectory>"
    for name in ("field", "dipole", "step")
)
SOCKET = "<ffsocket name='ff' mode='unix'> <address>displaced</address> </ffsocket>"
DIRECT = (
    f"<ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> "
    "<parameters>{settings: settings.yaml, template: start.xyz}</parameters> </ffdirect>"
)


def write_run(folder: Path, forcefield: str, steps: int = 6, **keys: Any) -> Path:
    crystal().write(folder / "start.xyz", format="extxyz")
    (folder / "settings.yaml").write_text(yaml.safe_dump({**SALT, **keys}))
    text = XML.format(steps=steps, beads=1, forcefield=forcefield).replace("</output>", EXTRAS + "</output>")
    path = folder / "input.xml"
    path.write_text(text)
    return path


def printed(folder: Path, name: str) -> np.ndarray:
    return np.loadtxt(next(folder.glob(f"run.{name}_0")), ndmin=2)


@pytest.mark.parametrize("forcefield", [SOCKET, DIRECT], ids=["socket", "direct"])
def test_a_displacement_that_rises_in_ipi_also_after_a_restart(tmp_path: Path, forcefield: str) -> None:
    xml = write_run(tmp_path, forcefield, displacement=[None, None, RAMP])
    assert main(["run", str(xml), "--quiet"]) == 0
    restart = tmp_path / "RESTART"
    restart.write_text(restart.read_text().replace("<total_steps>6<", "<total_steps>9<"))
    assert main(["run", str(restart), "--quiet"]) == 0
    field, moment = printed(tmp_path, "field") * HARTREE / BOHR, printed(tmp_path, "dipole") * BOHR
    held = field + 4 * math.pi * K_E / crystal().get_volume() * moment
    assert held[:, 2] == pytest.approx(np.minimum(5.0 * 4e-3 * np.arange(10), 0.06), abs=1e-9)
    assert field[:, :2] == pytest.approx(np.zeros((10, 2)), abs=1e-15)
    assert printed(tmp_path, "step")[:, 0].tolist() == list(range(10))


def test_inputs_in_which_no_driver_could_count(tmp_path: Path) -> None:
    batched = SOCKET.replace("</address>", "</address> <batch_size>4</batch_size>")
    xml = write_run(tmp_path, batched, field=[0, 0, RAMP])
    plan = read_input(xml)
    problems = list(refusals(plan, plan.sockets[0], load_settings(tmp_path / "settings.yaml")))
    assert any("field.2" in problem and "fills batches up with copies" in problem for problem in problems)
    with pytest.raises(InputError, match=r"field\.2"):
        run(xml)


def test_folded_atoms_need_a_reference(tmp_path: Path) -> None:
    wrapping = SOCKET.replace("mode='unix'", "mode='unix' pbc='True'")
    xml = write_run(tmp_path, wrapping, displacement=[None, None, 0.1])
    assert any(not f.ok and "or give polarization_reference" in f.sentence for f in check(xml))


def test_a_clock_is_missing() -> None:
    driver = run_evaluator(tree(displacement=[None, None, RAMP]), crystal())
    with pytest.raises(VoltPIError, match="this driver has no clock"):
        driver.evaluate(*wire(crystal()))
