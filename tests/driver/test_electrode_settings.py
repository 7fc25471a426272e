"""Electrodes and fixed charges from the settings to the answers: selections, boundaries, overrides, extras, check."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.io import write
from numpy.typing import NDArray

from voltpi.driver import pes
from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.check import check
from voltpi.driver.cli import main
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator, Result, build_potential
from voltpi.driver.frames import evaluate_frames
from voltpi.driver.settings import Settings, load_settings
from voltpi.driver.structures import prepare_frame
from voltpi.potential.electrostatics.pqeq import FixedCharges, PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.external.electrodes import Electrode

ETA = 1.805132
LEFT: dict[str, Any] = {"name": "left", "atoms": "element Au and z < 10", "potential": -0.5, "eta": ETA}
RIGHT: dict[str, Any] = {"name": "right", "atoms": "element Au and z >= 10", "potential": 0.5, "eta": ETA}
FIXED: dict[str, Any] = {"charges": {"model": "fixed"}, "electrodes": [LEFT, RIGHT], "precision": "double"}
FINITE: dict[str, Any] = {**FIXED, "coulomb": {"boundary": "finite-field-z"}}


def capacitor(*, ions: bool = True, height: float = 30.0, pbc: Sequence[bool] | bool = (True, True, False)) -> Atoms:
    """Two gold electrodes of two layers, 2 × 2 atoms each, 16 Å apart at z = 2 … 22 Å; Na⁺ and Cl⁻ between them."""
    a = 2.88
    square = np.array([[x, y, 0.0] for x in (0, a) for y in (0, a)])
    layers = [2.0, 4.04, 20.04, 22.08]
    positions = np.concatenate(
        [square + np.array([k % 2, k % 2, 0]) * 0.5 * a + [0, 0, z] for k, z in enumerate(layers)]
    )
    metal = Atoms("Au16", positions, cell=[2 * a, 2 * a, height], pbc=pbc)
    metal.set_initial_charges(np.zeros(16))
    if ions:
        metal += Atoms("NaCl", [[1.3, 2.1, 8.2], [4.0, 1.7, 14.9]], charges=[1, -1])
    return metal


def settings(base: dict[str, Any] = FIXED, **more: Any) -> Settings:
    keys = {key.replace("__", "."): value for key, value in more.items()}
    return load_settings(overrides={**base, **keys})


def record(tree: Settings, atoms: Atoms) -> dict[str, Any]:
    return next(evaluate_frames(tree, [atoms], "the capacitor"))


def result(tree: Settings, atoms: Atoms) -> Result:
    """As i-PI gets it."""
    cell, positions = np.asarray(atoms.cell).T[None] / BOHR, atoms.positions[None] / BOHR
    return Evaluator.from_settings(tree, atoms).evaluate(cell, positions)[0]


def with_electrodes(*electrodes: dict[str, Any], base: dict[str, Any] = FIXED) -> dict[str, Any]:
    return {**base, "electrodes": list(electrodes)}


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"electrodes": [{**LEFT, "eta": None, "hardness": 2}]}, "electrodes.0: hardness needs eta"),
        ({"electrodes": [{**LEFT, "atom_volume": 17}]}, "electrodes.0: atom_volume belongs to thomas_fermi"),
        (
            {"electrodes": [{**LEFT, "thomas_fermi": 1, "atom_volume": 0}]},
            "atom_volume is 0; it must be greater than 0",
        ),
        ({"electrodes": [{**LEFT, "atoms": "element Au and"}]}, "'element Au and', character 15: expected element"),
        ({"electrodes": [{**LEFT, "name": "1"}]}, "electrodes.0.name is '1'; expected a word"),
        ({"electrodes": [{**LEFT, "name": "a.b"}]}, "electrodes.0.name is 'a.b'; expected a word"),
        ({"electrodes": [LEFT, LEFT]}, "two electrodes are called left"),
        ({"electrodes": LEFT}, "expected a list such as"),
        ({"electrodes": [LEFT], "charges": {"model": "none"}}, "electrodes need charges; set charges.model"),
        ({"electrodes": [LEFT], "coulomb": {"method": "taper"}}, "coulomb.method: taper has no electrodes"),
        ({"electrodes": [{**LEFT, "polarizable": True}], "charges": {"model": "qeq"}}, "left cannot be polarizable"),
        (with_electrodes({**LEFT, "polarizable": True}), "left cannot be polarizable with charges.model: fixed"),
        (
            {"charges": {"model": "fixed", "limiter": "none"}},
            "charges.limiter has no meaning with charges.model: fixed",
        ),
        ({"charges": {"model": "fixed", "carried": "q"}}, "charges.carried has no meaning with charges.model: fixed"),
        ({**FIXED, "charges.parameters": "mine.csv"}, "charges.parameters has no meaning with charges.model: fixed"),
        ({"charges": {"model": "fixed"}, "coulomb": {"method": "taper"}}, "taper is for charges.model: pqeq or qeq"),
        ({"coulomb": {"boundary": "finite-field-x"}}, "finite-field-x needs two electrodes, both at potentials"),
        (with_electrodes(LEFT, base=FINITE), "of 1 electrodes 1 are at potentials; give two, or use slab-z"),
        (
            with_electrodes(LEFT, {**RIGHT, "potential": None, "charge": 0}, base=FINITE),
            "of 2 electrodes 1 are at potentials",
        ),
        (
            {**FINITE, "charges": {"response": "shells"}},
            "charges.response has no meaning with coulomb.boundary: finite-field-z",
        ),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        load_settings(overrides=keys)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_line_of_a_wrong_selection_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("electrodes:\n- name: left\n  atoms: element Au and z < ten\n  potential: 1\n")
    with pytest.raises(InputError, match=r"s.yaml, line 3: electrodes.0.atoms .* character 20: expected a number"):
        load_settings(path)


def test_an_electrode_goes_by_its_name_in_overrides(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(FIXED))
    for overrides in (
        ["electrodes.right.potential=2", "electrodes.left.thomas_fermi=0.5"],
        {"electrodes.right.potential": 2.0, "electrodes.left.thomas_fermi": "0.5"},
        ["electrodes.1.potential=2", "electrodes.0.thomas_fermi=0.5"],
    ):
        tree = load_settings(path, overrides)
        assert [e.potential for e in tree.electrodes] == [-0.5, 2.0]
        assert [e.thomas_fermi for e in tree.electrodes] == [0.5, 0.0]
    charged = load_settings(path, ["electrodes.right.potential=null", "electrodes.right.charge=0.1"])
    assert (charged.electrodes[1].potential, charged.electrodes[1].charge) == (None, 0.1)
    assert charged.where("electrodes.1.charge") == "--set electrodes.right.charge=0.1"
    with pytest.raises(InputError, match=r"electrodes.1: give exactly one of potential \(V\) and charge \(e\)"):
        load_settings(path, ["electrodes.right.charge=0.1"])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("electrodes.middle.potential=1", "there is no electrode middle; the settings have left, right"),
        ("electrodes.left.potental=1", "did you mean electrodes.0.potential?"),
        ("electrodes.left.potential=high", "electrodes.0.potential is 'high'; expected a number"),
    ],
)
def test_wrong_overrides_name_themselves(tmp_path: Path, assignment: str, words: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(FIXED))
    with pytest.raises(InputError) as raised:
        load_settings(path, [assignment])
    assert words in str(raised.value)
    assert f"--set {assignment}" in str(raised.value)


def test_an_override_of_electrodes_that_are_not_there() -> None:
    with pytest.raises(InputError, match="there is no electrode left; the settings have none"):
        load_settings(overrides=["electrodes.left.potential=1"])


# -- settings -> potential --------------------------------------------------------------------------------------------


def test_all_that_an_electrode_may_be_reaches_the_potential() -> None:
    given = {**LEFT, "hardness": 3, "thomas_fermi": 1.5, "atom_volume": 16.9, "chi": 0.2, "polarizable": True}
    held = {"name": "held", "atoms": [4], "charge": 0.25}
    charges = build_potential(load_settings(overrides={"electrodes": [given, held]})).charges
    assert charges is not None
    assert charges.finite_field is None
    assert charges.electrodes == (
        Electrode("left", "potential", ETA, 3.0, 1.5, 0.2, True, 16.9),
        Electrode("held", "charge"),
    )


def test_fixed_charges_and_the_finite_field_reach_the_potential() -> None:
    keys = {"charges.width": {"Na": 1.1, "Cl": 0.9}, "coulomb.accuracy": 1e-8, "coulomb.coulomb_constant": 14.399645}
    charges = build_potential(load_settings(overrides={**FINITE, **keys})).charges
    assert isinstance(charges, FixedCharges)
    assert charges.finite_field == 2
    assert [e.name for e in charges.electrodes] == ["left", "right"]
    assert charges.widths == {"Na": 1.1, "Cl": 0.9}
    assert (charges.accuracy, charges.coulomb_constant, charges.tolerance) == (1e-8, 14.399645, 1e-10)
    points = build_potential(settings()).charges
    assert isinstance(points, FixedCharges)
    assert points.widths is None
    with pytest.raises(InputError, match=r"charges\.width: Qq is not an element"):
        build_potential(settings(charges__width={"Qq": 1.0}))


def test_a_trained_model_gets_electrodes_too(tmp_path: Path) -> None:
    from voltpi.potential.checkpoints import save_potential
    from voltpi.potential.dispersion import D3
    from voltpi.potential.model import Potential

    trained = PQEq(conserve="fragments", accuracy=1e-7)
    save_potential(tmp_path / "m.safetensors", Potential(charges=trained), {})
    save_potential(tmp_path / "d.safetensors", Potential(dispersion=D3()), {})
    by_parts = {"electrodes": [LEFT, RIGHT], "charges": {"conserve": "fragments"}, "coulomb": {"accuracy": 1e-7}}
    by_model = {"electrodes": [LEFT, RIGHT], "model": str(tmp_path / "m.safetensors")}
    atoms = capacitor()
    first, other = (record(load_settings(overrides=keys), atoms) for keys in (by_model, by_parts))
    for name, values in other["electrodes"].items():
        assert first["electrodes"][name] == pytest.approx(values, abs=1e-7)
    assert first["electrodes"]["right"]["charge"] > 0.01
    without = load_settings(overrides={**by_model, "model": str(tmp_path / "d.safetensors")})
    with pytest.raises(InputError, match=r"electrodes need charges but model d.safetensors has none"):
        build_potential(without)


# -- structures -------------------------------------------------------------------------------------------------------


def prepared_electrodes(tree: Settings, atoms: Atoms) -> list[list[int]]:
    systems = prepare_frame(atoms, tree, build_potential(tree))
    assert systems.electrode is not None
    label = systems.electrode.numpy()
    return [np.flatnonzero(label == k).tolist() for k in range(len(tree.electrodes))]


def test_selections_are_those_of_the_start_structure() -> None:
    assert prepared_electrodes(settings(), capacitor()) == [list(range(8)), list(range(8, 16))]
    by_index = with_electrodes({**LEFT, "atoms": [0, 1, 2, 3]}, {**RIGHT, "atoms": "index 12:16"})
    assert prepared_electrodes(load_settings(overrides=by_index), capacitor()) == [[0, 1, 2, 3], [12, 13, 14, 15]]


def test_an_atom_that_leaves_its_window_stays_in_its_electrode() -> None:
    atoms = capacitor()
    tree = with_electrodes({**LEFT, "atoms": "element Au and z < 4.1"}, RIGHT)
    evaluator = Evaluator.from_settings(load_settings(overrides=tree), atoms)
    cell = np.asarray(atoms.cell)[None]
    before = evaluator.evaluate_systems(cell, atoms.positions[None])
    atoms.positions[4, 2] += 0.3  # now at 4.34 Å
    after = evaluator.evaluate_systems(cell, atoms.positions[None])
    for response in (before, after):
        assert float(response.charges[:8].sum()) == pytest.approx(float(response.electrodes["left"]["charge"][0]))
    assert abs(float(after.charges[4] - before.charges[4])) > 1e-4


@pytest.mark.parametrize(
    ("electrodes", "words"),
    [
        ([LEFT, {**RIGHT, "atoms": "element Au and z > 4"}], ["atom 4 (Au)", "electrodes.left", "electrodes.right"]),
        ([LEFT, {**RIGHT, "atoms": "element Pt"}], ["electrodes.right has no atoms", "its selection, element Pt"]),
        ([LEFT, {**RIGHT, "atoms": "index 16:19"}], ["electrode right", "index 16:19 is beyond", "18 atoms"]),
        ([LEFT, {**RIGHT, "atoms": [3, 18]}], ["electrode right", "index 18 is no atom"]),
        ([LEFT, {**RIGHT, "atoms": "tag 1"}], ["electrode right", "has no tags"]),
        ([{**LEFT, "atoms": "element Au Na and z < 10"}, RIGHT], ["atom 16 (Na) 1 e", "electrode left", "write 0"]),
    ],
)
def test_wrong_electrodes_are_one_sentence_with_the_line(
    tmp_path: Path, electrodes: list[dict[str, Any]], words: list[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(with_electrodes(*electrodes)))
    tree = load_settings(tmp_path / "s.yaml")
    with pytest.raises(InputError, match=r"s.yaml, line \d+: ") as raised:
        prepare_frame(capacitor(), tree, build_potential(tree))
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_fixed_charges_come_from_the_file(tmp_path: Path) -> None:
    atoms = capacitor()
    expected = record(settings(), atoms)
    np.testing.assert_array_equal(expected["charges"][16:], [1, -1])
    for name in ("q", "charges"):  # ASE takes a column `charges` for the results of a calculation
        named = atoms.copy()
        named.set_initial_charges(None)
        named.new_array(name, atoms.get_initial_charges())
        write(tmp_path / "c.xyz", named, format="extxyz", columns=["symbols", "positions", name])
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({**FIXED, "charges": {"model": "fixed", "values": name}}))
        arguments = ["evaluate", str(tmp_path / "c.xyz"), "--settings", str(tmp_path / "s.yaml"), "--json"]
        assert main(arguments) == 0, name


def test_fixed_charges_that_are_wrong_are_refused() -> None:
    atoms = capacitor()
    atoms.set_initial_charges(None)
    with pytest.raises(InputError, match=r"charges\.values is 'initial_charges' but .* has no such per-atom"):
        record(settings(), atoms)
    salt = Atoms("NaCl", [[0, 0, 0], [0, 0, 2.4]], charges=[1, -0.9])
    fixed = load_settings(overrides={"charges.model": "fixed"})
    with pytest.raises(InputError, match=r"charges.values of .* add up to 0.1 e but charges.net_charge is 0 e"):
        record(fixed, salt)
    salt.set_initial_charges([1, -1])
    assert record(fixed, salt)["energy"] == pytest.approx(-14.3996454784255 / 2.4)  # two points
    with pytest.raises(InputError, match=r"charges\.width has no Cl"):
        record(load_settings(overrides={"charges.model": "fixed", "charges.width": {"Na": 1.0}}), salt)


def test_metal_alone_needs_no_charges_in_the_file() -> None:
    atoms = capacitor(ions=False)
    atoms.set_initial_charges(None)
    answer = record(settings(), atoms)["electrodes"]
    assert answer["right"]["charge"] == pytest.approx(-answer["left"]["charge"])
    assert answer["right"]["charge"] > 0.005


def test_frames_with_other_fixed_charges_start_anew() -> None:
    one, other = capacitor(), capacitor()
    other.set_initial_charges([*np.zeros(16), 0.5, -0.5])
    answers = list(evaluate_frames(settings(), [one, other, one], "frames"))
    assert [answer["charges"][16] for answer in answers] == [1, 0.5, 1]
    calculator = VoltPICalculator(settings())
    for atoms, answer in zip((one, other), answers, strict=False):
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(answer["energy"], abs=1e-8)
        assert calculator.results["electrodes"]["left"]["charge"] == pytest.approx(
            answer["electrodes"]["left"]["charge"], abs=1e-8
        )


def test_ase_notices_fixed_charges_that_change_under_any_name() -> None:
    salt = Atoms("NaCl", [[0, 0, 0], [0, 0, 2.4]])
    salt.new_array("q", np.array([1.0, -1.0]))
    salt.calc = VoltPICalculator({"charges.model": "fixed", "charges.values": "q"})
    one = salt.get_potential_energy()
    salt.arrays["q"][:] = [2, -2]
    assert salt.get_potential_energy() == pytest.approx(4 * one)


# -- cells ------------------------------------------------------------------------------------------------------------


def test_electrodes_back_to_back_in_a_cell_without_vacuum_are_not_cut() -> None:
    whole = record(settings(), capacitor())
    tight = record(settings(), capacitor(height=22.08))  # 2.0 Å from one electrode to the other, across the open face
    assert tight["electrodes"]["left"] == pytest.approx(whole["electrodes"]["left"], abs=1e-7)
    assert tight["energy"] == pytest.approx(whole["energy"], abs=1e-6)
    wrapped = capacitor()
    wrapped.positions[:, 2] -= 3
    wrapped.wrap(pbc=[False, False, True])  # the left electrode's layers are now at both faces
    tree = with_electrodes({**LEFT, "atoms": "index 0:8"}, {**RIGHT, "atoms": "index 8:16"})
    with pytest.raises(InputError, match=r"is cut by its cell: atoms .*Au"):
        record(load_settings(overrides=tree), wrapped)


def test_a_finite_field_cell_gives_what_the_slab_gives() -> None:
    atoms = capacitor(height=40)
    slab = record(settings(), atoms)
    closed = record(load_settings(overrides=FINITE), atoms)  # the file's pbc along z does not matter
    for name, values in slab["electrodes"].items():
        assert closed["electrodes"][name]["charge"] == pytest.approx(values["charge"], rel=5e-3)
        assert closed["electrodes"][name]["potential"] == values["potential"]
    np.testing.assert_allclose(closed["forces"], slab["forces"], atol=5e-3)
    assert np.any(closed["stress"])  # periodic throughout, so it has a volume


@pytest.mark.parametrize("shift", [0.1, 0.5])
def test_a_finite_field_cell_that_cuts_an_electrode_names_the_shift(shift: float) -> None:
    """0.1: the left electrode is cut; 0.5: both are whole, but the ions lie across the face."""
    whole = capacitor(pbc=True)
    expected = record(load_settings(overrides=FINITE), whole)["electrodes"]
    by_index = with_electrodes({**LEFT, "atoms": "index 0:8"}, {**RIGHT, "atoms": "index 8:16"}, base=FINITE)
    moved = whole.copy()
    moved.positions[:, 2] -= shift * 30
    moved.wrap()
    with pytest.raises(InputError) as raised:
        record(load_settings(overrides=by_index), moved)
    message = str(raised.value)
    assert ("electrode left is cut by" if shift == 0.1 else "most atoms between the electrodes lie across") in message
    advice = float(message.partition("shift all atoms along c by ")[2].split()[0])
    moved.positions[:, 2] += advice * 30
    moved.wrap()
    mended = record(load_settings(overrides=by_index), moved)["electrodes"]
    for name, values in expected.items():
        assert mended[name] == pytest.approx(values, abs=1e-6)


def test_a_finite_field_in_the_plane_of_the_electrodes_is_refused() -> None:
    tree = load_settings(overrides={**FINITE, "coulomb": {"boundary": "finite-field-x"}})
    with pytest.raises(InputError, match=r"electrodes lie side by side along a"):
        record(tree, capacitor(pbc=True))


def test_an_electrode_that_comes_in_two_pieces_is_refused_at_any_step() -> None:
    """As when positions come wrapped, the template's not."""
    atoms = capacitor(pbc=True)
    atoms.positions[:, 2] -= 2.5  # the back layer is at −0.5 Å
    tree = with_electrodes({**LEFT, "atoms": "index 0:8"}, {**RIGHT, "atoms": "index 8:16"}, base=FINITE)
    evaluator = Evaluator.from_settings(load_settings(overrides=tree), atoms)
    h = np.asarray(atoms.cell).T[None] / BOHR
    with pytest.raises(InputError, match=r"electrodes\.left lies at both ends of the cell"):
        evaluator.evaluate(h, atoms.get_positions(wrap=True)[None] / BOHR)
    whole = Evaluator.from_settings(load_settings(overrides=tree), atoms)
    first = whole.evaluate(h, atoms.positions[None] / BOHR)[0]
    later = whole.evaluate(h, atoms.get_positions(wrap=True)[None] / BOHR)[0]  # followed from the first step on
    assert later.energy == pytest.approx(first.energy, abs=1e-10)


def test_a_field_along_a_periodic_direction_is_refused() -> None:
    with pytest.raises(InputError, match="field along a periodic direction with electrodes"):
        record(settings(field=[0.1, 0, 0]), capacitor())
    assert record(settings(field=[0, 0, 0.01]), capacitor())["energy"]  # across the slab it is allowed


# -- answers ----------------------------------------------------------------------------------------------------------


def test_the_ase_calculator_passes_on_what_output_asks_for() -> None:
    atoms = capacitor()
    atoms.calc = VoltPICalculator(settings(output__capacitance=True))
    atoms.get_potential_energy()
    found = atoms.calc.results["capacitance"]
    moved = [record(settings(with_electrodes(LEFT, {**RIGHT, "potential": v})), atoms) for v in (0.0, 1.0)]
    charges = [[answer["electrodes"][name]["charge"] for name in ("left", "right")] for answer in moved]
    np.testing.assert_allclose(found[:, 1], np.subtract(charges[1], charges[0]), atol=1e-9)  # linear


def test_extras_are_in_atomic_units_and_in_the_order_of_the_settings() -> None:
    tree = settings(with_electrodes(RIGHT, LEFT), output__shells=True)
    extras = result(tree, capacitor()).extras
    np.testing.assert_allclose(np.multiply(extras["electrode_potentials"], HARTREE), [0.5, -0.5])
    charges = np.array(extras["charges"])
    np.testing.assert_allclose(extras["electrode_charges"], [charges[8:16].sum(), charges[:8].sum()], atol=1e-12)
    assert extras["electrode_charges"][0] > 0.01
    expected = 0.5 * np.dot(extras["electrode_charges"], extras["electrode_potentials"])
    assert extras["capacitive_energy"] == pytest.approx(expected)
    assert 0 <= extras["electrode_residual"] < 1e-8 / HARTREE
    assert extras["energy_electrodes"] == pytest.approx(-2 * expected)
    assert np.shape(extras["shells"]) == (18, 3)
    json.dumps(extras)


def test_shells_of_a_polarizable_electrolyte_are_in_bohr() -> None:
    tree = load_settings(overrides={"electrodes": [LEFT, RIGHT], "charges": {"conserve": "fragments"}})
    atoms = capacitor()
    shells = np.array(record(tree, atoms)["shells"])
    assert np.abs(shells[16:]).max() > 1e-4
    np.testing.assert_allclose(shells[:16], 0)  # metal with eta, not polarizable
    extras = result(settings({**tree.given(), "electrodes": [LEFT, RIGHT]}, output__shells=True), atoms).extras
    np.testing.assert_allclose(np.multiply(extras["shells"], BOHR), shells, atol=1e-7)
    assert "shells" not in result(tree, atoms).extras


def test_without_electrodes_there_are_no_extras_of_electrodes() -> None:
    salt = Atoms("NaCl", [[0, 0, 0], [0, 0, 2.4]], charges=[1, -1])
    extras = result(load_settings(overrides={"charges.model": "fixed"}), salt).extras
    assert not [key for key in extras if "electrode" in key or "capacitive" in key]


def test_an_electrode_at_a_charge_answers_with_its_potential() -> None:
    atoms = capacitor()
    at_potentials = record(settings(), atoms)["electrodes"]
    charge = at_potentials["right"]["charge"]
    held = with_electrodes(LEFT, {**RIGHT, "potential": None, "charge": charge})
    answer = record(load_settings(overrides=held), atoms)["electrodes"]
    assert answer["right"] == pytest.approx({"charge": charge, "potential": 0.5, "residual": 0.0}, abs=1e-7)
    doubled = result(settings(held, **{"electrodes.right.charge": 2 * charge}), atoms).extras
    assert doubled["electrode_charges"] == pytest.approx([-2 * charge, 2 * charge], abs=1e-9)
    assert doubled["electrode_potentials"][1] > 0.5 / HARTREE


@pytest.mark.parametrize("base", [FIXED, FINITE], ids=["slab", "finite-field"])
def test_forces_are_derivatives_of_the_energy_that_ipi_gets(base: dict[str, Any]) -> None:
    tree = settings(base, coulomb__accuracy=1e-8)
    atoms = capacitor(pbc=True if base is FINITE else (True, True, False))
    evaluator = Evaluator.from_settings(tree, atoms)
    h, r = np.asarray(atoms.cell).T / BOHR, atoms.positions / BOHR

    def energy(positions: NDArray[np.float64]) -> float:
        return evaluator.evaluate(h[None], positions[None])[0].energy

    forces = evaluator.evaluate(h[None], r[None])[0].forces
    for atom, axis in ((16, 2), (5, 2), (12, 0)):
        step = np.zeros_like(r)
        step[atom, axis] = 2e-3
        slope = (energy(r + step) - energy(r - step)) / 4e-3
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-7)


def test_a_batch_is_its_structures_one_by_one() -> None:
    atoms = capacitor()
    evaluator = Evaluator.from_settings(settings(), atoms)
    h = np.repeat(np.asarray(atoms.cell).T[None] / BOHR, 3, axis=0)
    beads = atoms.positions[None] / BOHR + np.random.default_rng(2).normal(scale=0.05, size=(3, 18, 3))
    together = evaluator.evaluate(h, beads)
    for k, bead in enumerate(together):
        alone = Evaluator.from_settings(settings(), atoms).evaluate(h[:1], beads[k : k + 1])[0]
        assert bead.energy == pytest.approx(alone.energy, abs=1e-9)
        for key in ("electrode_charges", "electrode_potentials", "capacitive_energy"):
            assert bead.extras[key] == pytest.approx(alone.extras[key], abs=1e-8)
    assert together[0].extras["electrode_charges"] != pytest.approx(together[1].extras["electrode_charges"], abs=1e-5)


# -- command line and i-PI --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Settings and start structure of a capacitor."""
    write(tmp_path / "start.xyz", capacitor(), format="extxyz")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({k: v for k, v in FIXED.items() if k != "precision"}))
    return tmp_path


def test_evaluate_prints_electrodes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(folder / "start.xyz"), "--settings", str(folder / "settings.yaml")]
    arguments += ["--set", "electrodes.right.potential=1.5"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    electrodes = answer["electrodes"]
    assert list(electrodes) == ["left", "right"]
    assert {name: values["potential"] for name, values in electrodes.items()} == {"left": -0.5, "right": 1.5}
    assert set(electrodes["left"]) == {"charge", "potential", "residual"}
    assert max(abs(values["residual"]) for values in electrodes.values()) < 1e-8
    expected = 0.5 * (1.5 * electrodes["right"]["charge"] - 0.5 * electrodes["left"]["charge"])
    assert answer["capacitive_energy"] == pytest.approx(expected)
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert f"{electrodes['right']['charge']:.6f} e at 1.5000 V" in table


def test_check_says_what_the_electrodes_are(folder: Path) -> None:
    found = [finding.sentence for finding in check(folder / "settings.yaml") if finding.ok]
    charge = record(load_settings(folder / "settings.yaml"), capacitor())["electrodes"]["left"]["charge"]
    assert any(f"electrode left: 8 atoms, -0.5 V, which gives {charge:.6f} e" in sentence for sentence in found)
    assert any("electrodes carry 0.000000 e in all and the other atoms 0.000000 e" in s for s in found), found
    assert any(sentence.endswith("the structure is neutral") for sentence in found)
    assert not any("hint" in sentence for sentence in found)
    write(folder / "start.xyz", capacitor(pbc=True), format="extxyz")
    found = [finding.sentence for finding in check(folder / "settings.yaml") if finding.ok]
    assert any(s.startswith("hint: ") and "coulomb.boundary: slab-z, or finite-field-z" in s for s in found)


def test_check_says_where_charge_is_not_neutral(folder: Path) -> None:
    atoms = capacitor()
    atoms.set_initial_charges([*np.zeros(16), 1.0, -0.7])
    write(folder / "start.xyz", atoms, format="extxyz")
    text = (folder / "settings.yaml").read_text()
    found = [finding.sentence for finding in check(folder / "settings.yaml")]
    assert any("electrodes carry -0.300000 e in all and the other atoms 0.300000 e" in s for s in found), found
    (folder / "settings.yaml").write_text(text.replace("model: fixed", "model: fixed\n  net_charge: 0.1"))
    found = [finding.sentence for finding in check(folder / "settings.yaml")]
    assert any("carry -0.200000 e" in s and s.endswith("net charge of 0.1 e (charges.net_charge)") for s in found), (
        found
    )


def test_check_finds_wrong_electrodes(folder: Path) -> None:
    text = (folder / "settings.yaml").read_text()
    (folder / "settings.yaml").write_text(text.replace("z >= 10", "z > 4"))
    (problem,) = [finding.sentence for finding in check(folder / "settings.yaml") if not finding.ok]
    assert "atom 4 (Au) belongs to electrodes.left and to electrodes.right" in problem


def test_check_refuses_wrapping_across_a_finite_field_cell(folder: Path) -> None:
    write(folder / "start.xyz", capacitor(pbc=True), format="extxyz")
    (folder / "input.xml").write_text(XML.replace("<ffdirect name='ff'>", "<ffdirect name='ff' pbc='True'>"))
    assert [f.sentence for f in check(folder / "input.xml") if not f.ok] == []
    text = (folder / "settings.yaml").read_text()
    (folder / "settings.yaml").write_text(text + "coulomb: {boundary: finite-field-z}\n")
    (problem,) = [f.sentence for f in check(folder / "input.xml") if not f.ok]
    assert "pbc='True' folds atoms over the face of the cell where the potential jumps" in problem


XML = f"""<simulation verbosity='low'>
  <output prefix='run'>
    <trajectory filename='charges' stride='1' extra_type='electrode_charges'> extras </trajectory>
    <trajectory filename='potentials' stride='1' extra_type='electrode_potentials'> extras </trajectory>
    <trajectory filename='capacitive' stride='1' extra_type='capacitive_energy'> extras </trajectory>
    <trajectory filename='residual' stride='1' extra_type='electrode_residual'> extras </trajectory>
    <trajectory filename='shells' stride='1' extra_type='shells'> extras </trajectory>
  </output>
  <total_steps>2</total_steps>
  <ffdirect name='ff'> <pes>custom</pes> <pes_path>{pes.__file__}</pes_path>
    <parameters>{{settings: settings.yaml, template: start.xyz, electrodes.right.potential: 1.0,
                 output.shells: true}}</parameters>
  </ffdirect>
  <system>
    <initialize nbeads='1'>
      <file mode='ase'> start.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='ff'/> </forces>
    <motion mode='dynamics'>
      <dynamics mode='nve'> <timestep units='femtosecond'> 1 </timestep> </dynamics>
    </motion>
  </system>
</simulation>
"""


def test_ipi_prints_the_extras_of_electrodes(folder: Path) -> None:
    (folder / "input.xml").write_text(XML)
    assert [f.sentence for f in check(folder / "input.xml") if not f.ok] == []
    script = Path(sys.executable).with_name("i-pi")
    done = subprocess.run([sys.executable, str(script), "input.xml"], cwd=folder, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout.decode()[-2000:] + done.stderr.decode()[-2000:]
    charges, potentials, capacitive, residual = (
        np.loadtxt(folder / f"run.{name}_0") for name in ("charges", "potentials", "capacitive", "residual")
    )
    assert charges.shape == potentials.shape == (3, 2)
    np.testing.assert_allclose(potentials * HARTREE, [[-0.5, 1.0]] * 3, atol=1e-9)
    np.testing.assert_allclose(charges.sum(1), 0, atol=1e-8)
    np.testing.assert_allclose(capacitive, 0.5 * (charges * potentials).sum(1), atol=1e-9)
    assert (residual < 1e-6 / HARTREE).all()
    tree = load_settings(folder / "settings.yaml", ["electrodes.right.potential=1"])
    start = [values["charge"] for values in record(tree, capacitor())["electrodes"].values()]
    np.testing.assert_allclose(charges[0], start, atol=1e-6)
    assert np.loadtxt(folder / "run.shells_0").shape == (3 * 18, 3)
