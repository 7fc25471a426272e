"""Path integrals through the driver: beads in batches, parameters from the XML, extras, and exact thermodynamics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import harmonic
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import read

from voltpi.analysis.fields import field_of
from voltpi.analysis.quantum import quantum_of
from voltpi.analysis.run_inputs import given_to_drivers
from voltpi.analysis.runs import find_run, find_runs
from voltpi.driver import evaluator as evaluator_module
from voltpi.driver import launch, pes
from voltpi.driver.check import check
from voltpi.driver.client import UnixAddress, serve
from voltpi.driver.evaluator import Evaluator
from voltpi.driver.ipi_input import overrides_of, read_input
from voltpi.driver.protocol import encode_extras
from voltpi.driver.run_setup import describe_run
from voltpi.driver.settings import Settings, load_settings
from voltpi.potential.errors import InputError, VoltPIError

from ipi_runs import LIMIT, unix, write_input
from toy import ToyEvaluator

pytestmark = pytest.mark.timeout(240)

BOHR, HARTREE = 0.529177210903, 27.211386245988
KELVIN = 3.1668115634556e-6
"""hartree."""


# a batch is its structures --------------------------------------------------------------------------------------------


def water() -> tuple[Settings, Atoms]:
    box = molecule("H2O", vacuum=2.5)
    other = box.copy()
    other.rotate(70, "x", center="COP")
    other.translate([3.0, 0.7, 0.4])
    box.extend(other)
    box.set_cell([7.0, 6.0, 6.5])
    box.pbc = True
    keys = {"model": "water", "precision": "double", "field": [0.02, 0.0, 0.05], "output.shells": True}
    return load_settings(None, keys), box


def salt() -> tuple[Settings, Atoms]:
    crystal = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    pair = {"set": "nacl"}
    return load_settings(None, {"short_range": {"pair": pair}, "precision": "double", "field": [0, 0, 0.03]}), crystal


@pytest.mark.parametrize("system", [water, salt])
def test_a_batch_of_32_beads_is_32_single_ones(system) -> None:
    """Energy, forces, virial, dipole and charges to 1e-10, also when both have a past to start from."""
    settings, atoms = system()
    rng = np.random.default_rng(4)
    beads = 32
    cells = np.repeat(np.asarray(atoms.cell).T[None] / BOHR, beads, axis=0)
    spread = rng.normal(scale=0.06, size=(beads, len(atoms), 3))
    velocity = rng.normal(scale=0.01, size=spread.shape)
    together, alone = (Evaluator.from_settings(settings, atoms) for _ in range(2))
    for step in range(2):
        positions = atoms.positions / BOHR + spread + step * velocity
        batch = together.evaluate(cells, positions, list(range(beads)))
        single = [alone.evaluate(cells[i : i + 1], positions[i : i + 1], [i])[0] for i in range(beads)]
        for one, other in zip(batch, single, strict=True):
            assert one.energy == pytest.approx(other.energy, rel=0, abs=1e-10)
            np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=1e-10)
            np.testing.assert_allclose(one.virial, other.virial, rtol=0, atol=1e-10)
            assert one.extras.keys() == other.extras.keys()
            for key in ("dipole", "charges"):
                np.testing.assert_allclose(one.extras[key], other.extras[key], rtol=0, atol=1e-10)
        assert np.ptp([r.energy for r in batch]) > 1e-4


def test_a_large_batch_is_evaluated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, in order, the rest last; messages count in the whole batch, and bad ones stop it at once."""
    settings, atoms = salt()
    cells = np.repeat(np.asarray(atoms.cell).T[None] / BOHR, 5, axis=0)
    positions = atoms.positions / BOHR + np.random.default_rng(1).normal(scale=0.05, size=(5, len(atoms), 3))
    whole = Evaluator.from_settings(settings, atoms).evaluate(cells, positions)
    monkeypatch.setattr(evaluator_module, "_ATOMS_AT_ONCE", 2 * len(atoms) + 1)
    evaluator = Evaluator.from_settings(settings, atoms)
    sizes: list[int] = []
    potential = evaluator.potential.__class__.__call__

    def counted(self: Any, systems: Any, **options: Any) -> Any:
        sizes.append(systems.n_systems)
        return potential(self, systems, **options)

    monkeypatch.setattr(evaluator.potential.__class__, "__call__", counted)
    parts = evaluator.evaluate(cells, positions)
    assert sizes == [2, 2, 1]
    for one, other in zip(parts, whole, strict=True):
        assert one.energy == pytest.approx(other.energy, rel=0, abs=1e-10)
        np.testing.assert_allclose(one.forces, other.forces, rtol=0, atol=1e-10)
        np.testing.assert_allclose(one.extras["charges"], other.extras["charges"], rtol=0, atol=1e-10)
    positions[3, 2] = np.nan
    with pytest.raises(VoltPIError, match="the position of atom 2 of structure 3 is not a finite number"):
        evaluator.evaluate(cells, positions)
    assert sizes == [2, 2, 1]


# what <parameters> say ------------------------------------------------------------------------------------------------

SWEEP = """<simulation verbosity='quiet' floatformat='%24.17e'>
  <output prefix='run'>
    <properties stride='1' filename='out'> [ step, time{{femtosecond}}, potential{{electronvolt}} ] </properties>
    <trajectory filename='pos' stride='1' format='ase'> positions </trajectory>
    <trajectory filename='dipole' stride='1' extra_type='dipole'> extras </trajectory>
    <trajectory filename='charges' stride='1' extra_type='charges'> extras </trajectory>
  </output>
  <total_steps>2</total_steps>
  <prng><seed>5</seed></prng>
  {forcefields}
  <system_template>
    <labels> [ FIELD ] </labels>
    <instance> [ 0 ] </instance> <instance> [ 0.02 ] </instance>
    <template>
      <system prefix='FIELD'>
        <initialize nbeads='1'>
          <file mode='ase'> start.xyz </file> <velocities mode='thermal' units='kelvin'> 100 </velocities>
        </initialize>
        <forces> <force forcefield='ff-FIELD'/> </forces>
        <ensemble> <temperature units='kelvin'> 100 </temperature> </ensemble>
        <motion mode='dynamics'>
          <dynamics mode='nve'> <timestep units='femtosecond'> 1 </timestep> </dynamics>
        </motion>
      </system>
    </template>
  </system_template>
</simulation>
"""


def socket(field: str) -> str:
    return (
        f"<ffsocket name='ff-{field}' mode='unix'> <address>ff-{field}</address> <latency>1e-3</latency> "
        f"<parameters>{{field: {field} 0 0, output.charges: True}}</parameters> </ffsocket>"
    )


def test_one_xml_holds_a_sweep(tmp_path: Path) -> None:
    """Each replica its own field from <parameters>, through drivers of its own; the analyses tell them apart."""
    start = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    start.rattle(0.05, seed=1)
    start.write(tmp_path / "start.xyz")
    (tmp_path / "settings.yaml").write_text(
        "short_range: {pair: {set: nacl}}\nfield: [0.5, 0, 0]\noutput: {charges: false}\n"
    )
    xml = tmp_path / "in.xml"
    xml.write_text(SWEEP.format(forcefields=socket("0") + socket("0.02")))
    plan = read_input(xml)
    assert plan.n_systems == 2
    assert [ff.overrides["field"] for ff in plan.sockets] == [[0, 0, 0], [0.02, 0, 0]]
    assert [path.name for path in plan.properties] == ["0_run.out", "0.02_run.out"]
    assert not [f.sentence for f in check(xml) if not f.ok]
    assert launch.run(xml, quiet=True) == 0
    runs = find_runs([tmp_path])
    assert [run.field.tolist() for run in runs] == [[0, 0, 0], [0.02, 0, 0]]
    for run in runs:
        assert field_of(tmp_path, run.outputs).tolist() == run.field.tolist()
        settings = load_settings(None, {"short_range": {"pair": {"set": "nacl"}}, "field": run.field.tolist()})
        evaluator = Evaluator.from_settings(settings, start)
        cell = np.asarray(start.cell).T[None] / BOHR
        (expected,) = evaluator.evaluate(cell, start.positions[None] / BOHR)
        assert run.table().get("potential")[0] == pytest.approx(expected.energy * HARTREE, abs=1e-6)
        assert set(run.extras) == {"dipole", "charges"}
    assert runs[0].table().get("potential")[0] != pytest.approx(runs[1].table().get("potential")[0], abs=1e-6)


def test_a_driver_started_by_hand_takes_the_parameters_that_ipi_sends(tmp_path: Path, processes, reference) -> None:
    """The evaluator that answers is the one they describe; a driver that knows none of them says so."""
    write_input(tmp_path, unix("<parameters>{field: 0 0 0.1, charges.net_charge: 1.0}</parameters>"))
    ipi = processes.ipi(tmp_path / "in.xml")
    told: list[dict[str, str]] = []

    def with_parameters(parameters: dict[str, str]) -> ToyEvaluator:
        told.append(parameters)
        return ToyEvaluator(8)

    wrong = ToyEvaluator(8, raise_at=1)
    address = UnixAddress("argon", processes.prefix)
    assert serve(wrong, address, wait=LIMIT, with_parameters=with_parameters, report=lambda _: None) == 0
    assert told == [{"field": "0 0 0.1", "charges.net_charge": "1.0"}]
    assert wrong.structures == 0
    assert ipi.wait(LIMIT) == 0


def write_two(folder: Path, xml: str) -> list[Atoms]:
    """Two systems: rattled rock salt, and the same atoms in reverse order."""
    one = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    one.rattle(0.05, seed=1)
    starts = [one, one[::-1]]
    for name, start in zip(("0", "0.02"), starts, strict=True):
        start.write(folder / f"start-{name}.xyz")
    (folder / "settings.yaml").write_text("short_range: {pair: {set: nacl}}\n")
    (folder / "in.xml").write_text(xml.replace(" start.xyz ", " start-FIELD.xyz "))
    return starts


def test_each_system_has_a_driver_of_its_own_start(tmp_path: Path) -> None:
    starts = write_two(tmp_path, SWEEP.format(forcefields=socket("0") + socket("0.02")))
    xml = tmp_path / "in.xml"
    plan = read_input(xml)
    assert {name: path.name for name, path in plan.templates.items()} == {
        "ff-0": "start-0.xyz",
        "ff-0.02": "start-0.02.xyz",
    }
    assert not [f.sentence for f in check(xml) if not f.ok]
    assert launch.run(xml, quiet=True) == 0
    restart = tmp_path / "RESTART"
    restart.write_text(restart.read_text().replace("<total_steps>2<", "<total_steps>3<"))
    assert not [f.sentence for f in check(restart) if not f.ok]
    assert launch.run(restart, quiet=True) == 0
    for run, start, field in zip(find_runs([tmp_path]), starts, (0.0, 0.02), strict=True):
        (given,) = given_to_drivers(tmp_path, run.outputs)
        assert given.template is not None
        assert list(read(given.template).symbols) == list(start.symbols)
        settings = load_settings(None, {"short_range": {"pair": {"set": "nacl"}}, "field": [field, 0, 0]})
        (expected,) = Evaluator.from_settings(settings, start).evaluate(
            np.asarray(start.cell).T[None] / BOHR, start.positions[None] / BOHR
        )
        potential = run.table().get("potential")
        assert len(potential) == 4
        assert potential[0] == pytest.approx(expected.energy * HARTREE, abs=1e-6)
        # velocities of 100 K move little energy in 3 fs; charges on wrong atoms would move much
        assert potential[-1] == pytest.approx(potential[0], abs=0.2)


def test_systems_of_different_atoms_do_not_share_a_driver(tmp_path: Path) -> None:
    one = "<ffsocket name='ff' mode='unix'> <address>ff</address> </ffsocket>"
    starts = write_two(tmp_path, SWEEP.format(forcefields=one).replace("ff-FIELD", "ff"))
    words = (
        "in.xml: <force forcefield='ff'> stands in systems of different atoms (atom 0 is Na in start-0.xyz and Cl in "
        "start-0.02.xyz), but a driver is prepared for one list of atoms; give each system a forcefield of its own, "
        "or the same atoms in the same order"
    )
    (finding,) = check(tmp_path / "in.xml")
    assert finding.sentence == words
    starts[1][:-1].write(tmp_path / "start-0.02.xyz")
    with pytest.raises(InputError, match=r"8 atoms in start-0\.xyz and 7 in start-0\.02\.xyz"):
        launch.run(tmp_path / "in.xml", quiet=True)
    starts[0].write(tmp_path / "start-0.02.xyz")
    assert read_input(tmp_path / "in.xml").template_of("ff") == tmp_path / "start-0.xyz"


def test_each_system_is_compared_with_the_template_of_its_ffdirect(tmp_path: Path) -> None:
    both = "".join(
        f"<ffdirect name='ff-{name}'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path> "
        f"<parameters>{{settings: settings.yaml, template: start-{start}.xyz}}</parameters> </ffdirect>"
        for name, start in (("0", "0"), ("0.02", "0"))
    )
    write_two(tmp_path, SWEEP.format(forcefields=both))
    wrong = [f.sentence for f in check(tmp_path / "in.xml") if not f.ok]
    assert len(wrong) == 1
    assert "<ffdirect name='ff-0.02'>: its template has 8 atoms" in wrong[0]
    with pytest.raises(InputError, match=r"<ffdirect name='ff-0\.02'>: its template has 8 atoms"):
        launch.run(tmp_path / "in.xml", quiet=True)


@pytest.mark.parametrize("key", ["settings", "template"])
def test_a_socket_takes_no_files_in_its_parameters(tmp_path: Path, key: str) -> None:
    """The line is easily copied from an <ffdirect>."""
    xml = write_input(tmp_path, unix(f"<parameters>{{{key}: other.file, field: 0 0 0.1}}</parameters>"))
    with pytest.raises(InputError) as raised:
        read_input(xml)
    assert str(raised.value) == (
        f"in.xml, <ffsocket name='ff'>: <parameters> of an <ffsocket> name the {key} other.file, as those of an "
        "<ffdirect> do; remove it: `voltpi run` takes settings-NAME.yaml (of <ffsocket name='NAME'>) or settings.yaml "
        "beside the XML and the structure of <initialize>, `voltpi drive` what --settings and --template say"
    )
    with pytest.raises(InputError, match=key):  # what i-PI sends to a driver started by hand
        overrides_of({key: "other.file"})


def test_parameters_that_bring_a_schedule_forbid_reconnects(tmp_path: Path, processes) -> None:
    class Counting(ToyEvaluator):
        counts_structures = True

    write_input(tmp_path, unix("<parameters>{field.2.ramp.rate: 0.1}</parameters>"))
    processes.ipi(tmp_path / "in.xml")
    address = UnixAddress("argon", processes.prefix)
    with pytest.raises(InputError, match="would have lost count; leave --reconnects at 0"):
        serve(
            ToyEvaluator(8), address, wait=LIMIT, reconnects=1, with_parameters=lambda _: Counting(8),
            report=lambda _: None,
        )  # fmt: skip


def test_paths_in_parameters_are_relative_to_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parameters = "displacement: null null 0.05, polarization_reference: reference.xyz"
    folder = tmp_path / "run"
    folder.mkdir()
    start = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    start.set_initial_charges([1.0 if s == "Na" else -1.0 for s in start.symbols])
    start.write(folder / "reference.xyz")
    start.rattle(0.05, seed=1)
    start.write(folder / "start.xyz")
    (folder / "settings.yaml").write_text("short_range: {pair: {set: nacl}}\ncharges: {model: fixed}\n")
    xml = write_crystal_input(folder)
    xml.write_text(xml.read_text().replace("</ffsocket>", f"<parameters>{{{parameters}}}</parameters></ffsocket>"))
    monkeypatch.chdir(tmp_path)
    assert not [f.sentence for f in check("run/in.xml") if not f.ok]
    assert launch.run("run/in.xml", quiet=True) == 0
    assert capfd.readouterr().err == ""
    (given,) = given_to_drivers(Path("run"), [Path("run/run.out")])
    assert describe_run(given).start == read(folder / "start.xyz")
    nested = load_settings(None, {"charges": {"parameters": "own.yaml"}}, folder=folder)
    assert nested.charges.parameters == str(folder / "own.yaml")
    assert load_settings(None, ["charges.parameters=own.yaml"]).charges.parameters == "own.yaml"
    assert load_settings(None, ["charges.parameters=default"], folder=folder).charges.parameters == "default"


def test_templates_that_cannot_be(tmp_path: Path) -> None:
    xml = tmp_path / "in.xml"
    xml.write_text(SWEEP.format(forcefields=socket("0")).replace("[ 0.02 ]", "[ 0.02, 3 ]"))
    (finding,) = check(xml)
    assert finding.sentence == (
        "in.xml: <system_template> has 1 labels but an <instance> of 2 words; give each label one"
    )


# extras ---------------------------------------------------------------------------------------------------------------


def test_long_lists_of_numbers_keep_what_they_say() -> None:
    rng = np.random.default_rng(0)
    extras: dict[str, Any] = {
        "charges": rng.normal(size=300).tolist(),
        "BEC": rng.normal(size=(300, 3)).tolist(),
        "dipole": [0.1, -2e-17, 3.0],
        "steps": list(range(200)),
        "names": ["O"] * 200,
        "step": 7,
        "note": "e·Å",
    }
    text = encode_extras(extras)
    back = json.loads(text)
    for key in ("charges", "BEC"):
        np.testing.assert_allclose(back.pop(key), extras.pop(key), rtol=0, atol=6e-15)
    assert back == extras
    assert text.isascii()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_long_lists_with_what_json_cannot_hold(bad: float) -> None:
    with pytest.raises(Exception, match="extras cannot be written as JSON"):
        encode_extras({"charges": [0.1] * 200 + [bad]})


def test_born_charges_nobody_asked_for_are_pointed_out(tmp_path: Path) -> None:
    start = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat((5, 5, 5))
    start.write(tmp_path / "start.xyz")
    (tmp_path / "settings.yaml").write_text(
        "short_range: {pair: {set: nacl}}\ncharges: {model: fixed}\noutput: {born_charges: true}\n"
    )
    start.set_initial_charges([1.0 if s == "Na" else -1.0 for s in start.symbols])
    start.write(tmp_path / "start.xyz")
    xml = write_crystal_input(tmp_path)
    hints = [f.sentence for f in check(xml) if "output.born_charges" in f.sentence]
    assert len(hints) == 1
    assert "1000 atoms" in hints[0]
    xml.write_text(xml.read_text().replace("</output>", "<trajectory extra_type='BEC'> extras </trajectory></output>"))
    assert not [f.sentence for f in check(xml) if "output.born_charges" in f.sentence]


def write_crystal_input(folder: Path) -> Path:
    xml = folder / "in.xml"
    text = SWEEP.format(forcefields="<ffsocket name='ff' mode='unix'> <address>ff</address> </ffsocket>")
    template = text[text.index("<system prefix") : text.index("</system>") + len("</system>")]
    start, end = text.index("<system_template>"), text.index("</system_template>") + len("</system_template>")
    xml.write_text((text[:start] + template + text[end:]).replace("ff-FIELD", "ff").replace(" prefix='FIELD'", ""))
    return xml


# thermodynamics -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crystal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the harmonic crystal with eight beads, 1 ps, everything of the beads at every tenth step."""
    folder = tmp_path_factory.mktemp("crystal")
    outputs = "".join(
        f"<trajectory filename='{name}' stride='8' format='xyz'> {what} </trajectory>"
        for name, what in (
            ("pos", "positions"), ("for", "forces"), ("kin", "kinetic_cv"), ("rg", "r_gyration")
        )
    )  # fmt: skip
    harmonic.write_crystal(folder, 8, 4000, outputs=outputs)
    script = Path(sys.executable).with_name("i-pi")
    done = subprocess.run([sys.executable, str(script), "in.xml"], cwd=folder, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]
    return folder


def test_kinetic_energy_of_a_harmonic_crystal_is_the_exact_one(crystal: Path) -> None:
    """That of eight beads, within the error of a short run, which tells it from sixteen beads."""
    quantum = quantum_of(find_run(crystal, (0, 0, 0)), skip=100.0)
    exact = {e: k * HARTREE for e, k in harmonic.kinetic_energies(300 * KELVIN, 8).items()}
    more = {e: k * HARTREE for e, k in harmonic.kinetic_energies(300 * KELVIN, 16).items()}
    for s in quantum.species:
        assert s.kinetic is not None
        mean = s.kinetic.mean
        assert mean.reliable
        assert mean.error < 0.015 * mean.value
        assert mean.value == pytest.approx(exact[s.element], abs=3.5 * mean.error)
    assert {s.element: s.n_atoms for s in quantum.species} == {"H": 4, "O": 4}
    (hydrogen,) = (s for s in quantum.species if s.element == "H")
    assert hydrogen.kinetic is not None
    assert more["H"] - hydrogen.kinetic.mean.value > 5 * hydrogen.kinetic.mean.error
    assert quantum.classical == pytest.approx(1.5 * 300 * KELVIN * HARTREE, rel=1e-6)


def test_many_beads_and_none_are_the_limits_of_the_formula() -> None:
    kt = 300 * KELVIN
    one, many, exact = (harmonic.kinetic_energies(kt, beads) for beads in (1, 4096, None))
    for element in "HO":
        assert one[element] == pytest.approx(1.5 * kt, rel=1e-12)
        assert many[element] == pytest.approx(exact[element], rel=1e-4)
