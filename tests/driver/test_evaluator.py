"""The evaluator: units, i-PI's conventions, continuity, extras, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ipi.pes._ase import ASEDriver
from numpy.typing import NDArray

from voltpi.driver.ase import VoltPICalculator
from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator, build_potential
from voltpi.driver.settings import load_settings
from voltpi.driver.structures import read_structures
from voltpi.driver.unwrap import Unwrapper
from voltpi.driver.warm_start import Solutions
from voltpi.potential.electrostatics.pqeq import read_parameters
from voltpi.potential.errors import InputError, VoltPIError

# a left-handed triclinic cell (Å, rows): a transposed or mirrored matrix gives other numbers
CELL = np.array([[0.6, 6.5, 0.4], [6.8, 0.2, -0.9], [1.1, 0.7, 6.1]])
FIELD = (0.05, -0.03, 0.08)
FRAGMENTS = {"charges.conserve": "fragments"}


def water(pbc: bool = True) -> Atoms:
    """Two distorted water molecules."""
    positions = [
        [0.10, 0.05, -0.02],
        [0.86, 0.60, 0.05],
        [-0.66, 0.61, 0.08],
        [2.9, 3.1, 2.7],
        [3.66, 3.67, 2.8],
        [2.17, 3.66, 2.55],
    ]
    return Atoms("OHHOHH", positions, cell=CELL, pbc=pbc)


def evaluator(atoms: Atoms | None = None, /, **settings: Any) -> Evaluator:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    return Evaluator.from_settings(load_settings(overrides=keys), water() if atoms is None else atoms)


def wire(atoms: Atoms) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cells and positions as i-PI sends them: h = cellᵀ, bohr."""
    return np.asarray(atoms.cell).T[None] / BOHR, atoms.get_positions()[None] / BOHR


def energy(e: Evaluator, h: NDArray[np.float64], r: NDArray[np.float64]) -> float:
    return e.evaluate(h[None], r[None])[0].energy


# -- units and conventions --------------------------------------------------------------------------------------------


def test_constants_are_codata_2018() -> None:
    # the product is e²/4πε0, which fixes the Coulomb constant of the potential
    assert pytest.approx(14.3996454784255, rel=1e-11) == BOHR * HARTREE


def test_same_numbers_as_ipis_own_driver_around_the_ase_calculator(tmp_path: Path) -> None:
    atoms = water()
    atoms.write(tmp_path / "t.xyz", format="extxyz")
    settings = load_settings(overrides={"field": FIELD, "charges.conserve": "fragments", "dispersion.damping": "bj"})
    theirs = ASEDriver(str(tmp_path / "t.xyz"))
    theirs.ase_calculator = VoltPICalculator(settings)
    h, r = wire(atoms)
    energy_, forces, virial, _ = theirs.compute_structure(h[0], r[0])
    ours = Evaluator.from_settings(settings, atoms).evaluate(h, r)[0]
    # i-PI takes 0.036749326 hartree for an eV, 1e-7 off
    assert ours.energy == pytest.approx(float(energy_), rel=5e-7)
    np.testing.assert_allclose(ours.forces, forces, rtol=1e-6, atol=1e-9)
    # ASE's stress is symmetric, and a field distinguishes directions
    np.testing.assert_allclose(0.5 * (ours.virial + ours.virial.T), virial.reshape(3, 3), rtol=1e-6, atol=1e-9)


def test_forces_and_virial_are_derivatives_in_atomic_units() -> None:
    e = evaluator(field=FIELD, charges__conserve="fragments", coulomb__accuracy=1e-8)
    h, r = (x[0] for x in wire(water()))
    result = e.evaluate(h[None], r[None])[0]
    step = 1e-4
    for atom, axis in ((0, 1), (4, 2)):
        plus, minus = r.copy(), r.copy()
        plus[atom, axis] += step
        minus[atom, axis] -= step
        slope = (energy(e, h, plus) - energy(e, h, minus)) / (2 * step)
        assert result.forces[atom, axis] == pytest.approx(-slope, rel=1e-6, abs=1e-9)
    for a, b in ((0, 0), (0, 2), (1, 2), (2, 1)):
        strain = np.zeros((3, 3))
        strain[a, b] += step
        up, down = np.eye(3) + strain, np.eye(3) - strain
        # lattice vectors are columns of h and rows of r
        slope = (energy(e, up @ h, r @ up.T) - energy(e, down @ h, r @ down.T)) / (2 * step)
        assert result.virial[a, b] == pytest.approx(-slope, rel=1e-6, abs=1e-9)
    # a field distinguishes directions, and i-PI's cells have an upper triangle only
    assert abs(result.virial[1, 2] - result.virial[2, 1]) > 1e-4


def test_an_open_template_ignores_the_cell_that_ipi_always_sends() -> None:
    e = evaluator(water(pbc=False))
    h, r = wire(water())
    first, other = e.evaluate(h, r)[0], e.evaluate(7 * h, r)[0]
    assert other.energy == pytest.approx(first.energy, abs=1e-12)
    np.testing.assert_allclose(other.forces, first.forces, atol=1e-10)
    assert first.energy != pytest.approx(evaluator().evaluate(h, r)[0].energy, abs=1e-6)


def test_the_boundary_setting_overrides_the_file() -> None:
    h, r = wire(water())
    opened = evaluator(water(), coulomb__boundary="open").evaluate(h, r)[0].energy
    assert opened == pytest.approx(evaluator(water(pbc=False)).evaluate(h, r)[0].energy, abs=1e-12)
    closed = evaluator(water(pbc=False), coulomb__boundary="periodic").evaluate(h, r)[0].energy
    assert closed == pytest.approx(evaluator(water()).evaluate(h, r)[0].energy, abs=1e-12)


# -- batches, warm starts, continuity ---------------------------------------------------------------------------------


def test_a_batch_is_its_structures_one_by_one() -> None:
    rng = np.random.default_rng(3)
    h, r = wire(water())
    beads = r + rng.normal(scale=0.05, size=(4, 6, 3))
    cells = np.repeat(h, 4, axis=0)
    batch = evaluator(field=FIELD).evaluate(cells, beads)
    single = evaluator(field=FIELD)
    for i, result in enumerate(batch):
        alone = single.evaluate(cells[:1], beads[i : i + 1], [i])[0]
        assert result.energy == pytest.approx(alone.energy, abs=1e-11)
        np.testing.assert_allclose(result.forces, alone.forces, atol=1e-9)
        np.testing.assert_allclose(result.extras["charges"], alone.extras["charges"], atol=1e-8)


def test_a_warm_start_saves_work_and_changes_nothing() -> None:
    e = evaluator()
    atoms = water()
    first = e.evaluate_systems(np.asarray(atoms.cell)[None], atoms.get_positions()[None], [7])
    again = e.evaluate_systems(np.asarray(atoms.cell)[None], atoms.get_positions()[None], [7])
    assert int(again.iterations[0]) < int(first.iterations[0])
    assert float(again.energy[0]) == pytest.approx(float(first.energy[0]), abs=1e-11)


def test_beads_that_come_one_by_one_under_one_name_keep_their_own_start() -> None:
    """Over plain sockets every bead is replica 0; each must go on from its own path, as with a driver of its own."""
    cell, rng = np.asarray(water().cell)[None], np.random.default_rng(8)
    beads = water().positions + rng.normal(scale=0.1, size=(4, 6, 3))
    velocities = rng.normal(scale=0.01, size=beads.shape)
    shared, own = evaluator(), [evaluator() for _ in beads]
    iterations = np.zeros((2, 8, 4), dtype=int)
    for step in range(8):
        for i, bead in enumerate(beads + 3 * np.sin(step / 3) * velocities):
            for way, e in enumerate((shared, own[i])):
                iterations[way, step, i] = int(e.evaluate_systems(cell, bead[None], [0]).iterations[0])
    assert iterations[0].sum() <= iterations[1].sum()
    assert iterations[1, 0].sum() > 1.2 * iterations[1, -1].sum()  # a start does save work here


def test_a_start_is_extrapolated_where_positions_go_on_and_nearest_where_they_jump() -> None:
    known = Solutions(most=6)
    path = [np.full((20, 3), 1 + 0.1 * t + 0.02 * t**2) for t in range(5)]
    for r in path[:4]:
        known.add(r, torch.tensor(2 * r))
        known.add(-r, torch.tensor(5 * r))  # another path, in between
    np.testing.assert_allclose(known.guess(path[4]), 2 * path[4], rtol=1e-12)
    np.testing.assert_allclose(known.guess(-path[4]), 5 * path[4], rtol=1e-12)
    np.testing.assert_allclose(known.guess(path[3] - 0.1), 2 * path[3], rtol=1e-12)  # it turned back
    for far in np.random.default_rng(0).normal(scale=100, size=(7, 20, 3)):
        known.add(far, torch.zeros(20, 3))
    assert float(known.guess(path[4]).abs().max()) == 0  # the oldest have been forgotten


@pytest.mark.parametrize("conserve", ["total", "fragments"])
def test_dipole_and_energy_do_not_jump_when_atoms_are_wrapped(conserve: str) -> None:
    """An atom that leaves the cell comes back on the other side; nothing may notice, field and net charge included."""
    keys: dict[str, Any] = {"field": FIELD, "charges.conserve": conserve}
    if conserve == "total":
        keys["charges.net_charge"] = 1.0
    settings = load_settings(overrides=keys)
    free, wrapped = (Evaluator.from_settings(settings, water()) for _ in range(2))
    atoms = water()
    for step in range(6):
        other = atoms.copy()
        if step:  # the first positions are taken as they come
            other.wrap()
        left, right = free.evaluate(*wire(atoms))[0], wrapped.evaluate(*wire(other))[0]
        assert right.energy == pytest.approx(left.energy, abs=1e-10)
        np.testing.assert_allclose(right.extras["dipole"], left.extras["dipole"], atol=1e-8)
        np.testing.assert_allclose(right.forces, left.forces, atol=1e-9)
        atoms.positions += [1.3, 0.9, -1.1]
    assert np.abs(other.positions - atoms.positions).max() > 5  # it did wrap


def test_unwrapper_follows_through_many_cells_while_the_cell_changes() -> None:
    rng = np.random.default_rng(0)
    follow = Unwrapper(np.ones(3, dtype=bool))
    fractional = rng.random((5, 3))
    drift = rng.uniform(-0.3, 0.3, size=(5, 3))
    for step in range(20):
        cell = CELL * (1 + 0.01 * step)
        true = fractional + step * drift
        seen = follow((true - np.floor(true)) @ cell, cell) if step else follow(true @ cell, cell)
        np.testing.assert_allclose(seen, true @ cell, atol=1e-9)
    assert np.abs(step * drift).max() > 2


def test_unwrapper_touches_only_periodic_directions_and_its_own_replica() -> None:
    cell = np.diag([10.0, 10.0, 10.0])
    slab = Unwrapper(np.array([True, True, False]))
    slab(np.array([[9.5, 9.5, 9.5]]), cell, "a")
    np.testing.assert_allclose(slab(np.array([[0.2, 0.2, 0.2]]), cell, "a"), [[10.2, 10.2, 0.2]])
    np.testing.assert_allclose(slab(np.array([[0.2, 0.2, 0.2]]), cell, "b"), [[0.2, 0.2, 0.2]])
    free = Unwrapper(np.zeros(3, dtype=bool))
    free(np.array([[9.5, 9.5, 9.5]]), np.zeros((3, 3)))
    np.testing.assert_array_equal(free(np.array([[0.2, 0.2, 0.2]]), np.zeros((3, 3))), [[0.2, 0.2, 0.2]])


# -- extras -----------------------------------------------------------------------------------------------------------


def test_extras_hold_what_was_asked_and_nothing_else() -> None:
    always = {"dipole", "residual"}
    plain = evaluator(output__charges=False).evaluate(*wire(water()))[0].extras
    assert {key for key in plain if not key.startswith("energy_")} == always
    everything = evaluator(output__born_charges=True, output__polarizability=True).evaluate(*wire(water()))[0]
    extras = everything.extras
    asked = always | {"charges", "BEC", "polarizability"}
    assert {key for key in extras if not key.startswith("energy_")} == asked
    assert np.shape(extras["BEC"]) == (18, 3)
    assert np.shape(extras["charges"]) == (6,)
    terms = sum(value for key, value in extras.items() if key.startswith("energy_"))
    assert terms == pytest.approx(everything.energy, abs=1e-12)


def test_born_charges_are_rows_of_displacements_and_columns_of_the_dipole() -> None:
    e = evaluator(output__born_charges=True, field=FIELD)
    h, r = wire(water())
    born = np.array(e.evaluate(h, r)[0].extras["BEC"])
    step = 1e-3
    for atom, axis in ((0, 2), (4, 0)):
        shift = np.zeros_like(r)
        shift[0, atom, axis] = step
        up, down = (np.array(e.evaluate(h, r + s)[0].extras["dipole"]) for s in (shift, -shift))
        np.testing.assert_allclose(born[3 * atom + axis], (up - down) / (2 * step), atol=1e-6)


def test_polarizability_is_the_slope_of_the_dipole_in_atomic_units() -> None:
    h, r = wire(water())
    alpha = np.array(evaluator(output__polarizability=True).evaluate(h, r)[0].extras["polarizability"])
    step = 1e-3  # V/Å
    atomic = step * BOHR / HARTREE  # hartree/(e·bohr)
    dipoles = [np.array(evaluator(field=(0, s, 0)).evaluate(h, r)[0].extras["dipole"]) for s in (step, -step)]
    np.testing.assert_allclose(alpha[:, 1], (dipoles[0] - dipoles[1]) / (2 * atomic), rtol=1e-4, atol=1e-4)


# -- pair potentials --------------------------------------------------------------------------------------------------


def test_pair_potentials_charges_and_dispersion_add_up() -> None:
    lj = {"O": {"epsilon": 0.0067, "sigma": 3.17}, "H": {"epsilon": 0.002, "sigma": 1.2}}
    exponentials = {
        "born_mayer": {"O-H": {"A": 100.0, "rho": 0.25}},
        "buckingham": {"O-O": {"A": 1000.0, "rho": 0.3, "C": 20.0}},
        "born_mayer_huggins": {"H-H": {"A": 0.1, "rho": 0.3, "sigma": 1.0, "C": 0.0, "D": 0.0}},
    }
    kinds = {"lennard_jones": lj, "zbl": True, "cutoff": 7.0, **exponentials}
    rest: dict[str, Any] = {"dispersion": {"functional": "pbe"}, **FRAGMENTS, "precision": "double"}
    h, r = wire(water())
    answers = [
        Evaluator.from_settings(load_settings(overrides=keys), water()).evaluate(h, r)[0]
        for keys in (
            {"short_range": {"pair": kinds}, **rest},
            {"short_range": {"pair": kinds}, "charges.model": "none", "precision": "double"},
            rest,
        )
    ]
    assert answers[0].energy == pytest.approx(answers[1].energy + answers[2].energy, rel=1e-12)
    np.testing.assert_allclose(answers[0].forces, answers[1].forces + answers[2].forces, atol=1e-8)
    assert np.abs(answers[1].forces).max() > 0.1
    # each kind has its part in it
    for kind in ("lennard_jones", "zbl", *exponentials):
        fewer = {key: value for key, value in kinds.items() if key != kind}
        other = load_settings(overrides={"short_range": {"pair": fewer}, "charges.model": "none"})
        without = Evaluator.from_settings(other, water()).evaluate(h, r)[0].energy
        assert abs(without - answers[1].energy) > 1e-6


def test_missing_pairs_are_named() -> None:
    lj = {"O": {"epsilon": 0.0067, "sigma": 3.17}}
    e = evaluator(short_range__pair__lennard_jones=lj)
    with pytest.raises(VoltPIError, match="no parameters for H-H, H-O"):
        e.evaluate(*wire(water()))


# -- wrong input ------------------------------------------------------------------------------------------------------


def test_another_number_of_atoms_is_named() -> None:
    h, r = wire(water())
    with pytest.raises(InputError, match=r"\(1, 3, 3\).*template has 6 atoms"):
        evaluator().evaluate(h, r[:, :3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_positions_that_are_not_finite_stop_the_run(bad: float) -> None:
    h, r = wire(water())
    r[0, 4, 1] = bad
    with pytest.raises(VoltPIError, match="position of atom 4") as raised:
        evaluator().evaluate(h, r)
    assert not isinstance(raised.value, InputError)  # failed while running, not bad input
    h[0, 0, 0] = bad
    with pytest.raises(VoltPIError, match="cell is not finite"):
        evaluator().evaluate(h, wire(water())[1])


LINEAR = {"charges.model": "linear-qeq", "short_range": {"foundation": "qet:folder"}}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"charges.model": "none"}, "there is nothing to compute"),
        ({"device": "cuda:99"}, "device is cuda:99 but"),
        ({"charges.model": "linear-qeq"}, "linear-qeq are the charges inside a QET"),
        ({**LINEAR, "charges.limiter": "none"}, "charges.limiter has no meaning with charges.model: linear-qeq"),
        ({**LINEAR, "coulomb.accuracy": 1e-5}, "coulomb.accuracy has no meaning with charges.model: linear-qeq"),
        ({**LINEAR, "charges.conserve": "fragments"}, "charges.conserve: fragments is not available with"),
        ({**LINEAR, "output.born_charges": True}, "output.born_charges is not defined with"),
        ({"field": FIELD, "charges.response": "all"}, "field along a periodic direction"),
        ({"coulomb.method": "direct"}, "direct is for open boundaries"),
        ({"charges.carried": "q"}, "charges.carried is 'q' but"),
        ({"charges.carried": [0.1, 0.2]}, "has 6 atoms"),
        ({"charges.fragments": [0, 0, 0, 1, 1, 1]}, "needs charges.conserve: fragments"),
        ({"charges.fragments": "mol", **FRAGMENTS}, "charges.fragments is 'mol' but"),
        ({"charges.net_charge": 1, **FRAGMENTS}, "charges.net_charge is 1"),
        ({"field": "from-frame"}, "no electric_field"),
        ({"charges.parameters": "no.csv"}, "no.csv"),
        (
            {"short_range.pair.buckingham.O-Q": {"A": 1, "rho": 1, "C": 0}},
            "buckingham: 'O-Q' is not a pair of elements",
        ),
        ({"short_range.pair.lennard_jones.O": {"epsilon": -1, "sigma": 1}}, "pair.lennard_jones: O has epsilon -1"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"model": "./no.safetensors"}, "no.safetensors"),
    ],
)
def test_wrong_settings_are_one_sentence(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as raised:
        Evaluator.from_settings(load_settings(overrides=keys), water())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_periodic_structure_without_a_cell_is_refused() -> None:
    atoms = water()
    atoms.set_cell(None)
    with pytest.raises(InputError, match="periodic but has no cell"):
        evaluator(atoms)


def test_a_field_is_allowed_with_response_all_where_it_is_well_defined() -> None:
    h, r = wire(water())
    for keys in ({"charges.conserve": "fragments"}, {"coulomb.boundary": "open"}):
        settings = load_settings(overrides={"field": FIELD, "charges.response": "all", **keys})
        assert np.isfinite(Evaluator.from_settings(settings, water()).evaluate(h, r)[0].energy)


def test_fragments_and_carried_charges_come_from_the_file(tmp_path: Path) -> None:
    atoms = water()
    atoms.new_array("mol", np.array([4, 4, 4, 9, 9, 9]))
    atoms.new_array("q", np.array([-0.6, 0.3, 0.3, 0.6, 0.2, 0.2]))
    atoms.set_initial_charges([0, 0, 0, 1, 0, 0])
    atoms.write(tmp_path / "t.xyz", format="extxyz")
    keys = {"charges.fragments": "mol", "charges.carried": "q", "charges.net_charge": 1, **FRAGMENTS}
    read = read_structures(tmp_path / "t.xyz")[0]
    e = Evaluator.from_settings(load_settings(overrides=keys), read)
    charges = np.array(e.evaluate(*wire(atoms))[0].extras["charges"])
    np.testing.assert_allclose(charges.reshape(2, 3).sum(1), [0, 1], atol=1e-9)
    assert e.prepared.carried is not None
    np.testing.assert_allclose(e.prepared.carried, [-0.6, 0.3, 0.3, 0.6, 0.2, 0.2])


# -- trained models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model file of charges and dispersion (no network: what is tested here is who may override what)."""
    from voltpi.potential.checkpoints import save_potential
    from voltpi.potential.dispersion import D3
    from voltpi.potential.electrostatics.pqeq import PQEq
    from voltpi.potential.model import Potential

    path = tmp_path_factory.mktemp("model") / "mine.safetensors"
    trained = Potential(charges=PQEq(conserve="fragments", accuracy=1e-5), dispersion=D3("pbe", "bj"))
    save_potential(path, trained, {"name": "mine"})
    return str(path)


def test_a_model_brings_its_own_charges_and_dispersion(checkpoint: str) -> None:
    h, r = wire(water())
    parts = {"charges.conserve": "fragments", "coulomb.accuracy": 1e-5, "dispersion.damping": "bj"}
    by_parts = Evaluator.from_settings(load_settings(overrides=parts), water()).evaluate(h, r)[0]
    by_model = evaluator(model=checkpoint).evaluate(h, r)[0]
    assert by_model.energy == pytest.approx(by_parts.energy, abs=1e-12)
    repeated = load_settings(overrides={"model": checkpoint, "charges.model": "pqeq", **parts})  # agrees, so allowed
    assert Evaluator.from_settings(repeated, water()).evaluate(h, r)[0].energy == pytest.approx(by_parts.energy)


def test_accuracy_boundary_field_and_output_of_a_model_may_be_chosen(checkpoint: str) -> None:
    keys = {"model": checkpoint, "coulomb.accuracy": 1e-9, "field": FIELD, "output.polarizability": True}
    e = Evaluator.from_settings(load_settings(overrides={**keys, "coulomb.boundary": "open"}), water())
    assert e.potential.charges is not None
    assert e.potential.charges.accuracy == 1e-9
    assert "polarizability" in e.evaluate(*wire(water()))[0].extras
    closed, coarse, trained = (
        Evaluator.from_settings(load_settings(overrides={**keys, **more}), water()).evaluate(*wire(water()))[0].energy
        for more in ({}, {"coulomb.accuracy": 1e-3}, {"coulomb.accuracy": 1e-5})
    )
    assert abs(coarse - closed) > 3 * abs(trained - closed)
    assert abs(closed - e.evaluate(*wire(water()))[0].energy) > 100 * abs(coarse - closed)  # the boundary counts too


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("charges.model", "qeq"),
        ("charges.conserve", "total"),
        ("charges.response", "all"),
        ("charges.limiter", "none"),
        ("charges.shell_limit", 0.3),
        ("charges.parameters", "other.csv"),
        ("coulomb.coulomb_constant", 14.4),
        ("dispersion.damping", "zero"),
        ("dispersion.functional", "rpbe"),
        ("dispersion", "none"),
    ],
)
def test_the_physics_of_a_trained_model_is_not_overridden(checkpoint: str, key: str, value: Any) -> None:
    settings = load_settings(overrides={"model": checkpoint, key: value})
    with pytest.raises(InputError, match=rf"{key}: .* contradicts model mine.safetensors.*; remove {key}"):
        Evaluator.from_settings(settings, water())


@pytest.mark.parametrize(
    ("charges", "key", "value"),
    [
        ({"response": "all"}, "charges.carried", [-0.8, 0.4, 0.4, -0.8, 0.4, 0.4]),
        ({"coulomb_constant": 14.4}, "coulomb.coulomb_constant", "codata"),
        (None, "charges.net_charge", 1.0),
        (None, "coulomb.accuracy", 1e-5),
    ],
)
def test_what_a_trained_model_cannot_take_up_is_not_ignored(
    tmp_path: Path, charges: dict[str, Any] | None, key: str, value: Any
) -> None:
    from voltpi.potential.checkpoints import save_potential
    from voltpi.potential.dispersion import D3
    from voltpi.potential.electrostatics.pqeq import PQEq
    from voltpi.potential.model import Potential

    save_potential(tmp_path / "m.safetensors", Potential(charges=charges and PQEq(**charges), dispersion=D3()), {})
    overrides = {"model": str(tmp_path / "m.safetensors"), "coulomb.boundary": "open"}
    Evaluator.from_settings(load_settings(overrides=overrides), water())
    with pytest.raises(InputError, match=rf"{key}: .* contradicts model m.safetensors.*; remove {key}"):
        Evaluator.from_settings(load_settings(overrides={**overrides, key: value}), water())


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_in_yaml_are_put_over_the_table(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("O: {K: 500}\nLr: {chi: 5, eta: 10, Z: 1, R: 1.2, K: 1e3}\n")
    (tmp_path / "s.yaml").write_text("charges: {parameters: p.yaml}\n")
    built = build_potential(load_settings(tmp_path / "s.yaml")).charges
    assert built is not None
    table, shipped = built.parameters, read_parameters("default")
    assert table["O"] == shipped["O"]._replace(K=500.0)
    assert table["H"] == shipped["H"]
    assert table["Lr"].K == 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("O: {k: 4}", "p.yaml, line 1: O needs some of chi, eta, Z, R, K"),
        ("H: {K: 4}\nO: 4", "p.yaml, line 2: O needs some of"),
        ("Ox: {K: 4}", "Ox is not an element"),
        ("O: {K: soft}", "expected a number for each parameter of O"),
        ("O: {K: -4}", "K of O must be positive"),
        ("Lr: {K: 4}", "Lr is not in the shipped table; give chi, eta, Z, R as well"),
        ("O: {K: 4}\nO: {K: 5}", "given twice"),
        ("O: [", "not valid YAML"),
    ],
)
def test_parameters_in_yaml_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError) as raised:
        build_potential(load_settings(overrides={"charges.parameters": str(tmp_path / "p.yaml")}))
    assert words in str(raised.value)
    with pytest.raises(InputError, match=r"no\.yaml: there is no such file"):
        build_potential(load_settings(overrides={"charges.parameters": "no.yaml"}))


# -- structure files --------------------------------------------------------------------------------------------------


def test_ipis_own_xyz_is_read_in_its_units(tmp_path: Path) -> None:
    path = tmp_path / "ipi.xyz"
    path.write_text(
        "2\n# CELL(abcABC): 10.0 11.0 12.0 90.0 90.0 90.0 cell{angstrom} Traj: positions{angstrom} Step: 0\n"
        "O 0.0 0.0 0.0\nH 1.0 0.0 0.0\n"
        "2\n# CELL(abcABC): 20.0 20.0 20.0 90.0 90.0 90.0 cell{atomic_unit} Traj: positions{atomic_unit}\n"
        "O 0.0 0.0 0.0\nH 2.0 0.0 0.0\n"
    )
    first, second = read_structures(path)
    np.testing.assert_allclose(first.cell.lengths(), [10, 11, 12], rtol=1e-6)
    assert first.pbc.all()
    np.testing.assert_allclose(first.positions[1], [1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(second.cell.lengths(), 20 * BOHR, rtol=1e-6)
    np.testing.assert_allclose(second.positions[1], [2 * BOHR, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("this is no structure\n", "cannot be read as a structure"),
        ("1\n\nXx 0 0 0\n", "not a known element"),
        ("1\n\nX 0 0 0\n", "dummy element"),
        ("", "t.xyz"),
    ],
)
def test_unreadable_structures_are_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.xyz").write_text(content)
    with pytest.raises(InputError) as raised:
        read_structures(tmp_path / "t.xyz")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cell_that_ipi_has_turned_is_refused_in_a_field() -> None:
    """The cell is turned by 30° in the file, but has a along x over the wire."""
    template = water()
    template.rotate(30, "z", rotate_cell=True)
    turned = evaluator(template, field=FIELD)
    h, r = wire(water())
    with pytest.raises(InputError, match="i-PI turns the cell"):
        turned.evaluate(h, r)
    without_field = evaluator(template)
    assert np.isfinite(without_field.evaluate(h, r)[0].energy)
