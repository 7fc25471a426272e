"""QET: numbers of matgl, charges that follow net charge and voltages, exact derivatives of both."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal
from scipy.spatial.transform import Rotation

from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator, build_potential
from voltpi.driver.settings import load_settings
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.shortrange.foundation import load_foundation
from voltpi.potential.shortrange.qet import QET, LinearQEq
from voltpi.potential.systems import Systems

from random_qet import ELEMENTS, random_qet, save_random_qet
from structures import water_box, water_dimer

DATA = Path(__file__).parent / "data"
LITHIUM = (Electrode("lithium", "potential"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_qet(tmp_path_factory.mktemp("qet"))


@pytest.fixture(scope="module")
def qet(folder):
    return load_foundation(f"qet:{folder}", precision="double")


def periodic_structures():
    """Ten: crystals, strained and rattled, ions, molecules in boxes, a slab, one atom a cell."""
    random = np.random.default_rng(7)
    frames = [
        bulk("NaCl", "rocksalt", 5.6, cubic=True),
        bulk("MgO", "rocksalt", 4.2) * (2, 2, 1),
        bulk("Li", "bcc", 3.4, cubic=True),
        bulk("Mg", "hcp", a=3.2, c=5.2),
        bulk("ZnO", "wurtzite", a=3.25, c=5.2),
        bulk("LiCl", "cesiumchloride", 3.2),
        bulk("CaS", "rocksalt", 5.7),
        bulk("Ca", "fcc", 5.5),
        water_box(),
    ]
    slab = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    slab.center(vacuum=5.0, axis=2)
    for atoms in [*frames, slab]:
        atoms.rattle(0.05, rng=random)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.02 * random.normal(size=(3, 3))), scale_atoms=True)
    return [*frames, slab]


def staggered(n):
    """A potential (V) for every other atom, and another for the rest."""
    return torch.tensor(np.where(np.arange(n) % 2 == 0, 0.7, -0.4))


def of_matgl(potential, atoms, net_charge, potentials):
    """Energy, forces, stress (eV/Å³) and charges by matgl itself."""
    from matgl.ext.ase import Atoms2Graph

    converter = Atoms2Graph(potential.model.element_types, potential.model.cutoff)
    graph, _, _ = converter.get_graph(atoms)
    graph.frac_coords = torch.tensor(atoms.get_scaled_positions(wrap=False))
    energy, forces, stress, _, charges = potential(
        graph,
        torch.tensor(np.asarray(atoms.cell))[None],
        total_charge=torch.tensor(net_charge, dtype=torch.float64),
        ext_pot=-potentials,  # it is added to the electronegativities
    )
    return float(energy.detach()), forces.numpy(), stress.detach().numpy() / 160.21766208, charges.detach().numpy()


def test_matgl_on_ten_structures(qet):
    reference = random_qet().double().eval()
    frames = periodic_structures()
    net = torch.linspace(-1, 1, len(frames), dtype=torch.float64)
    systems = Systems.from_atoms(frames).replace(net_charge=net)
    potentials = staggered(systems.n_atoms)
    for voltage in (torch.zeros_like(potentials), potentials):
        answer = qet.answer(systems, voltage)
        first = 0
        for k, atoms in enumerate(frames):
            here = slice(first, first + len(atoms))
            first = here.stop
            energy, forces, stress, charges = of_matgl(reference, atoms, float(net[k]), voltage[here])
            assert float(answer.energy[k]) == pytest.approx(energy, rel=1e-12)
            np.testing.assert_allclose(answer.forces[here], forces, atol=1e-11)
            np.testing.assert_allclose(answer.charges[here], charges, atol=1e-12)
            np.testing.assert_allclose(-answer.virial[k] / atoms.get_volume(), stress, atol=1e-12)


def test_float32_is_close(qet, folder):
    systems = Systems.from_atoms(periodic_structures())
    single = load_foundation(f"qet:{folder}").answer(systems)
    double = qet.answer(systems)
    assert torch.allclose(single.energy, double.energy, rtol=1e-6)
    assert torch.allclose(single.forces, double.forces, atol=1e-4)
    assert torch.allclose(single.charges, double.charges, atol=1e-5)
    assert not torch.equal(single.forces, double.forces)


def atoms_of(row):
    return Atoms(row["symbols"], row["positions"], cell=row["cell"], pbc=True)


def by_matgl(row, model, *, charged=True):
    """The answer under the potentials of the stored numbers (matgl's sign)."""
    atoms = atoms_of(row)
    if not charged:
        return model.answer(Systems.from_atoms(atoms)), atoms.get_volume()
    potentials = torch.tensor(np.where(np.arange(len(atoms)) % 2 == 0, -1.0, 0.3))
    return model.answer(Systems.from_atoms(atoms, net_charge=0.5), potentials), atoms.get_volume()


def test_rule_of_matgl_2(tmp_path, folder):
    """Numbers of matgl 2.0.3; where its constants are float32, so are its digits."""
    name = save_random_qet(tmp_path / "old", dgl=True)
    model = load_foundation(f"qet-matgl2:{name}", precision="double")
    with pytest.warns(UserWarning, match=r"use short_range\.foundation qet-matgl2"):
        today = load_foundation(f"qet:{name}", precision="double")
    for row in json.loads((DATA / "qet_matgl2.json").read_text())["structures"]:
        answer, volume = by_matgl(row, model)
        assert float(answer.energy) == pytest.approx(row["energy"], rel=1e-7)
        np.testing.assert_allclose(answer.forces, row["forces"], atol=2e-6)
        np.testing.assert_allclose(answer.charges, row["charges"], atol=1e-7)
        np.testing.assert_allclose(-answer.virial[0] / volume, row["stress"], atol=2e-7)
        assert float((by_matgl(row, today)[0].charges - answer.charges).abs().max()) > 1e-3
    with pytest.raises(InputError, match=r"written by matgl 3 or later: use short_range\.foundation qet:"):
        load_foundation(f"qet-matgl2:{folder}")


@pytest.mark.skipif("VOLTPI_QET" not in os.environ, reason="VOLTPI_QET does not name the folder of QET-MatQ-PES")
@pytest.mark.filterwarnings("ignore:.*DGL backend")
@pytest.mark.parametrize("kind", ["qet", "qet-matgl2"])
def test_published_weights(kind):
    pytest.importorskip("matgl.models")
    model = load_foundation(f"{kind}:{os.environ['VOLTPI_QET']}", precision="double")
    for row in json.loads((DATA / "qet_published.json").read_text())["structures"]:
        for case, charged in (("plain", False), ("charged", True)):
            answer, volume = by_matgl(row, model, charged=charged)
            expected = row[kind][case]
            assert float(answer.energy) == pytest.approx(expected["energy"], rel=1e-7)
            np.testing.assert_allclose(answer.forces, expected["forces"], atol=1e-6)
            np.testing.assert_allclose(answer.charges, expected["charges"], atol=1e-6)
            np.testing.assert_allclose(-answer.virial[0] / volume, expected["stress"], atol=1e-7)


def lithium_on_argyrodite():
    """Li6PS5Cl, one cubic cell, and 3 x 3 x 2 cells of lithium; 88 atoms, and which of them are the metal."""
    argyrodite = crystal(
        ("Li", "P", "S", "S", "Cl"),
        [(0.25, 0.017, 0.25), (0.5, 0.5, 0.5), (0.618, 0.618, 0.618), (0.25, 0.25, 0.75), (0, 0, 0)],
        spacegroup=216,
        cellpar=[9.86, 9.86, 9.86, 90, 90, 90],
    )
    argyrodite.wrap()
    metal = bulk("Li", "bcc", 9.86 / 3, cubic=True) * (3, 3, 2)
    atoms = argyrodite + metal
    metal_atoms = np.arange(len(argyrodite), len(atoms))
    atoms.positions[metal_atoms, 2] += argyrodite.positions[:, 2].max() + 2.2
    atoms.cell[2, 2] = atoms.positions[:, 2].max() + 2.2
    atoms.rattle(0.05, seed=4)
    return atoms, metal_atoms


def at_volts(model, atoms, members, volts, net_charge=0.0, **wanted):
    """The whole potential's answer with the metal at a voltage."""
    potential = Potential(charges=LinearQEq(model, LITHIUM))
    systems = Systems.from_atoms(atoms, net_charge=net_charge)
    return potential(potential.prepare(assign_electrodes(systems, LITHIUM, [members], [volts])), **wanted)


def check_voltage(model):
    atoms, metal = lithium_on_argyrodite()
    answers = {volts: at_volts(model, atoms, metal, volts, net_charge=0.3) for volts in (-1.0, 0.0, 1.0)}
    charges = {}
    for volts, answer in answers.items():
        assert float(answer.charges.sum()) == pytest.approx(0.3, abs=1e-10)
        held = answer.electrodes["lithium"]
        charges[volts] = float(held["charge"])
        assert charges[volts] == pytest.approx(float(answer.charges[metal].sum()), abs=1e-10)
        assert float(held["potential"]) == volts
        assert float(answer.energy_terms["short_range"]) == float(answer.energy)
    assert charges[1.0] > charges[0.0] > charges[-1.0]
    assert bool((answers[1.0].charges[metal] > answers[-1.0].charges[metal]).all())
    assert float((answers[1.0].forces - answers[-1.0].forces).abs().max()) > 1e-3
    return charges


def test_a_voltage_draws_charge_to_the_lithium(qet):
    check_voltage(qet)


@pytest.mark.skipif("VOLTPI_QET" not in os.environ, reason="VOLTPI_QET does not name the folder of QET-MatQ-PES")
def test_a_voltage_on_lithium_with_the_published_weights():
    pytest.importorskip("matgl.models")
    model = load_foundation(f"qet-matgl2:{os.environ['VOLTPI_QET']}", precision="double")
    check_voltage(model)
    atoms, metal = lithium_on_argyrodite()
    check_derivatives(model, atoms, metal, (60, 10))


def room(model, atoms):
    """Å between the cutoff and the pair that is nearest to it: second derivatives jump where one crosses."""
    pairs = neighbor_list(Systems.from_atoms(atoms), model.cutoff + 0.5)
    return float((pairs.vectors.norm(dim=1) - model.cutoff).abs().min())


def central(energy, step):
    """Sixth-order central difference of −E."""
    one, two, three = ((energy(-k * step) - energy(k * step)) / (2 * k * step) for k in (1, 2, 3))
    return (15 * one - 6 * two + three) / 10


def check_derivatives(model, atoms, metal, moved_atoms):
    answer = at_volts(model, atoms, metal, 1.0, net_charge=0.2)
    scale = float(answer.forces.abs().max())
    step = min(1e-3, room(model, atoms) / 4)
    for atom, axis in ((moved_atoms[0], 2), (moved_atoms[1], 0)):

        def moved(step, atom=atom, axis=axis):
            there = atoms.copy()
            there.positions[atom, axis] += step
            return float(at_volts(model, there, metal, 1.0, net_charge=0.2).energy)

        assert float(answer.forces[atom, axis]) == pytest.approx(central(moved, step), rel=1e-7, abs=1e-8 * scale)

    def strained(step):
        strain = np.eye(3)
        strain[2, 0] += step
        strain[2, 2] += step
        there = atoms.copy()
        there.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        return float(at_volts(model, there, metal, 1.0, net_charge=0.2).energy)

    along = float(answer.virial[0, 0, 2] + answer.virial[0, 2, 2])
    assert along == pytest.approx(central(strained, step / 10), rel=1e-7, abs=1e-7 * scale)


def salt_and_metal():
    atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    metal = bulk("Li", "bcc", 2.8, cubic=True) * (2, 2, 1)
    metal.positions[:, 2] += 6.5
    atoms += metal
    atoms.set_cell([5.6, 5.6, 12.0])
    atoms.rattle(0.1, seed=1)
    return atoms, np.arange(8, 16)


def test_derivatives_at_a_voltage(qet):
    check_derivatives(qet, *salt_and_metal(), (9, 3))


def test_symmetries_and_batches_at_a_voltage(qet):
    atoms, metal = salt_and_metal()
    one = at_volts(qet, atoms, metal, 0.8, capacitance=True)
    turn = Rotation.from_euler("xyz", [0.4, -1.1, 2.3]).as_matrix()
    turned = atoms.copy()
    turned.positions = atoms.positions @ turn.T
    turned.set_cell(atoms.cell.array @ turn.T)
    two = at_volts(qet, turned, metal, 0.8)
    assert torch.allclose(two.energy, one.energy, atol=1e-11)
    assert torch.allclose(two.forces, one.forces @ torch.as_tensor(turn).T, atol=1e-11)
    assert torch.allclose(two.charges, one.charges, atol=1e-12)
    order = np.random.default_rng(0).permutation(len(atoms))
    two = at_volts(qet, atoms[order], np.flatnonzero(np.isin(order, metal)), 0.8)
    assert torch.allclose(two.forces, one.forces[order], atol=1e-11)
    assert torch.allclose(two.charges, one.charges[order], atol=1e-12)
    moved = atoms.copy()
    moved.positions += np.random.default_rng(5).integers(-2, 3, size=(len(atoms), 3)) @ atoms.cell.array
    two = at_volts(qet, moved, metal, 0.8)
    assert torch.allclose(two.energy, one.energy, atol=1e-11)
    assert torch.allclose(two.forces, one.forces, atol=1e-11)
    potential = Potential(charges=LinearQEq(qet, LITHIUM))
    shaken = atoms.copy()
    shaken.rattle(0.05, seed=3)
    frames = ((atoms, 0.8, 0.0), (shaken, -0.5, 1.0))
    parts = [
        assign_electrodes(Systems.from_atoms(frame, net_charge=net), LITHIUM, [metal], [volts])
        for frame, volts, net in frames
    ]
    together = potential(potential.prepare(Systems.join(parts)))
    alone = [at_volts(qet, frame, metal, volts, net) for frame, volts, net in frames]
    for name in ("energy", "forces", "virial", "charges"):
        apart = torch.cat([getattr(answer, name) for answer in alone])
        assert torch.allclose(getattr(together, name), apart, atol=1e-11), name
    step = 1e-3
    more, less = (at_volts(qet, atoms, metal, 0.8 + s).electrodes["lithium"]["charge"] for s in (step, -step))
    assert float(one.capacitance) == pytest.approx(float(more - less) / (2 * step), rel=1e-9)


def test_dipole_along_open_directions_only(qet):
    charges = LinearQEq(qet)
    molecule = Systems.from_atoms(water_dimer())
    answer = charges.solve(molecule)
    assert torch.allclose(answer.dipole[0], answer.charges @ molecule.positions, atol=1e-12)
    assert float(answer.dipole.norm()) > 1e-3
    atoms = water_box()
    assert float(charges.solve(Systems.from_atoms(atoms)).dipole.abs().max()) < 1e-12
    atoms.pbc = [True, True, False]
    slab = charges.solve(Systems.from_atoms(atoms)).dipole[0]
    across = torch.as_tensor(np.cross(*atoms.cell.array[:2]))
    assert float(torch.linalg.cross(slab, across).abs().max()) < 1e-9
    assert float(slab.norm()) > 1e-3


def test_beside_response_only_charges(qet):
    """PQEq takes the field, QET the energy at zero field, with its own charges at the net charge."""
    systems = Systems.from_atoms(bulk("NaCl", "rocksalt", 5.6, cubic=True))
    potential = Potential(qet, PQEq(shell_limit=0.5), response_only=True, precision="double")
    still = potential(potential.prepare(systems))
    assert float(still.energy) == pytest.approx(float(qet.answer(systems).energy), abs=1e-10)
    field = torch.tensor([[0.0, 0.02, 0.05]], dtype=torch.float64)
    pushed = potential(potential.prepare(systems.replace(field=field)))
    assert float((pushed.forces - still.forces).abs().max()) > 0.01


def test_settings_reach_the_charges(qet, folder):
    atoms, metal = salt_and_metal()
    keys = {
        "short_range.foundation": f"qet:{folder}",
        "charges.model": "linear-qeq",
        "charges.net_charge": 0.4,
        "electrodes": [{"name": "lithium", "atoms": metal.tolist(), "potential": 0.5}],
        "precision": "double",
        "device": "cpu",
    }
    evaluator = Evaluator.from_settings(load_settings(overrides=keys), atoms)
    result = evaluator.evaluate(atoms.cell.array.T[None] / BOHR, atoms.positions[None] / BOHR)[0]
    expected = at_volts(qet, atoms, metal, 0.5, net_charge=0.4)
    assert result.energy * HARTREE == pytest.approx(float(expected.energy), abs=1e-9)
    np.testing.assert_allclose(result.forces * HARTREE / BOHR, expected.forces, atol=1e-8)
    assert result.extras["electrode_charges"] == pytest.approx([float(expected.electrodes["lithium"]["charge"])])
    assert sum(result.extras["charges"]) == pytest.approx(0.4, abs=1e-10)
    held = {**keys, "electrodes": [{"name": "lithium", "atoms": metal.tolist(), "charge": 0.5}]}
    with pytest.raises(InputError, match="linear-qeq charges take potentials only"):
        Evaluator.from_settings(load_settings(overrides=held), atoms)
    with pytest.raises(InputError, match="field with charges"):
        Evaluator.from_settings(load_settings(overrides={**keys, "field": [0, 0, 0.1]}), atoms)


def test_paths_count_from_the_settings_file(folder, tmp_path):
    (tmp_path / "s.yaml").write_text("short_range: {foundation: 'qet-matgl2:weights'}\ncharges: {model: linear-qeq}\n")
    settings = load_settings(tmp_path / "s.yaml")
    assert settings.short_range.foundation == f"qet-matgl2:{tmp_path / 'weights'}"
    with pytest.raises(InputError, match=r"there is no model\.json; short_range\.foundation is qet-matgl2:PATH"):
        build_potential(settings)


@pytest.mark.parametrize("atoms", [Atoms("H", [[0, 0, 0]]), bulk("Ca", "fcc", 9.0)])
def test_an_atom_alone(qet, atoms):
    answer = qet.answer(Systems.from_atoms(atoms, net_charge=1.0))
    assert float(answer.charges) == pytest.approx(1.0, abs=1e-12)
    assert float(answer.forces.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("electrode", "said"),
    [
        (Electrode("left", "charge"), "linear-qeq charges take potentials only"),
        (Electrode("left", "potential", eta=1.8), "has parameters of its own"),
        (Electrode("left", "potential", polarizable=True), "has parameters of its own"),
    ],
)
def test_electrodes_that_it_does_not_honour(qet, electrode, said):
    with pytest.raises(InputError, match=said):
        LinearQEq(qet, (electrode,))


def test_what_it_does_not_have_is_refused(qet):
    charges = LinearQEq(qet)
    systems = Systems.from_atoms(water_box())
    up = torch.tensor([[0.0, 0.0, 0.1]], dtype=torch.float64)
    with pytest.raises(InputError, match=r"field with charges\.model linear-qeq"):
        charges.solve(systems.replace(field=up))
    with pytest.raises(InputError, match=r"displacement with charges\.model linear-qeq"):
        charges.solve(systems.replace(displacement=up))
    for key in ("born_charges", "polarizability", "smallest_curvature"):
        with pytest.raises(InputError, match=rf"output\.{key} is not defined with"):
            charges.solve(systems, **{key: True})
    with pytest.raises(InputError, match="needs electrodes"):
        charges.solve(systems, capacitance=True)
    with pytest.raises(InputError, match="does not know Fe"):
        charges.solve(Systems.from_atoms(bulk("Fe")))
    with pytest.raises(InputError, match="the structure has 0 electrodes but the potential 1"):
        LinearQEq(qet, LITHIUM).solve(systems)


def changed(folder, tmp_path, change):
    """A copy of the model with other arguments."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ("model.json", "model.pt", "state.pt"):
        (copy / file).write_bytes((Path(folder) / file).read_bytes())
    change(copy)
    return copy


def with_settings(**settings):
    def change(folder):
        arguments = torch.load(folder / "model.pt", weights_only=True)
        arguments["model"]["init_args"].update(settings)
        torch.save(arguments, folder / "model.pt")

    return change


class Harmful:
    """What an attacker would pickle."""

    def __reduce__(self):
        return (os.mkdir, ("harmed",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "state.pt").unlink(), "there is no state.pt"),
        (lambda folder: (folder / "model.pt").write_bytes(b"nonsense"), "cannot be read as a model of matgl"),
        (lambda folder: torch.save({"model": Harmful()}, folder / "model.pt"), "cannot be read as a model of matgl"),
        (lambda folder: torch.save({}, folder / "state.pt"), "state.pt has no"),
        (lambda folder: (folder / "model.json").write_text('{"@class": "QET"}'), "matgl's class QET, not Potential"),
        (lambda folder: torch.save({"model": {"@class": "Popen"}}, folder / "model.pt"), "holds a Popen, not a QET"),
        (with_settings(include_state=True), "features of the state"),
        (with_settings(units=8), "state.pt does not fit model.pt"),
    ],
)
def test_files_that_cannot_be(folder, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        load_foundation(f"qet:{changed(folder, tmp_path, change)}")
    assert not (tmp_path / "harmed").exists()


def test_loading_says_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_foundation(f"qet:{folder}")
    assert isinstance(model, QET)
    assert len(model.elements) == len(ELEMENTS)
