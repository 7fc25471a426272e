"""Charge equilibration against a brute-force sum, analytic limits, published numbers and its own derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms

from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, ElementParameters, PQEq, read_parameters
from voltpi.potential.errors import InputError, NoStablePointError
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.systems import Systems

from brute_force import BruteForce
from structures import (
    flat_cell,
    hydroxide_in_water,
    one_atom_cell,
    rattled_salt,
    reference_structures,
    sodium_in_water,
    water_box,
    water_dimer,
)

TABLE = read_parameters()
FIELD = (0.05, -0.1, 0.07)
REFERENCES = reference_structures()


def brute(atoms, model, field=(0, 0, 0), periodic=True):
    table = np.array([model.parameters[s] for s in atoms.get_chemical_symbols()])
    cell = atoms.cell.array if periodic else None
    return BruteForce(atoms.positions, cell, *table.T, field, model.limiter, model.shell_limit)


# the 2160 atoms of LiPON are a crystal; as a cluster they would only take minutes
COMPARED = [(n, b) for b in ("open", "periodic") for n in REFERENCES if (n, b) != ("lipon_2160", "open")]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "boundary"), COMPARED)
def test_agrees_with_brute_force_on_the_reference_structures(name, boundary):
    atoms, net = REFERENCES[name]
    if name == "water_monomer" and boundary == "periodic":
        atoms.set_cell(np.diag([12.0] * 3))  # the brute-force sum over a 40 Å box would be needlessly long
    if name in ("water_dimer_3A", "na9cl8_plus") and boundary == "periodic":
        atoms.set_cell(np.diag([16.0] * 3))
    atoms.pbc = boundary == "periodic"
    model = PQEq(accuracy=1e-8)
    answer = model.solve(Systems.from_atoms(atoms, net_charge=net))
    energy, g_q, g_shell, forces = brute(atoms, model, periodic=atoms.pbc.all())(
        answer.charges.numpy(), answer.shells.numpy()
    )
    assert answer.energy.item() == pytest.approx(energy, abs=1e-7 * len(atoms))
    assert np.abs(answer.forces.numpy() - forces).max() < 1e-6 * max(1.0, np.abs(forces).max())
    assert answer.charges.sum().item() == pytest.approx(net, abs=1e-10)
    # stationary in the brute-force functional: one chemical potential, no force on any shell
    assert np.ptp(g_q) < 1e-6
    assert np.abs(g_shell).max() < 1e-6


def with_fragments(system, atoms):
    """Fragments by connectivity, with the initial charges of ``atoms`` where there are any."""
    initial = torch.tensor(atoms.get_initial_charges(), dtype=torch.float64)
    return assign_fragments(system, initial_charges=initial if bool(initial.any()) else None)


@pytest.mark.parametrize("limiter", ["fene", "none"])
@pytest.mark.parametrize("response", ["all", "shells"])
@pytest.mark.parametrize("build", [sodium_in_water, water_dimer], ids=["periodic with an ion", "open"])
def test_agrees_with_brute_force_for_fragments_in_a_field(build, response, limiter):
    atoms = build()
    net = float(atoms.get_initial_charges().sum())
    model = PQEq(conserve="fragments", response=response, limiter=limiter, accuracy=1e-9, tolerance=1e-10)
    system = with_fragments(Systems.from_atoms(atoms, field=FIELD, net_charge=net), atoms)
    carried = None
    if response == "shells":
        carried = model.solve(system.replace(field=torch.zeros(1, 3, dtype=torch.float64))).charges
    answer = model.solve(system.replace(carried=carried))
    energy, g_q, g_shell, forces = brute(atoms, model, FIELD, periodic=atoms.pbc.all())(
        answer.charges.numpy(), answer.shells.numpy(), None if carried is None else carried.numpy()
    )
    assert answer.energy.item() == pytest.approx(energy, abs=1e-8 * len(atoms))
    assert np.abs(answer.forces.numpy() - forces).max() < 1e-8
    assert np.abs(g_shell).max() < 1e-8
    kept = answer.charges.new_zeros(len(system.fragment_charges)).index_add_(0, system.fragments, answer.charges)
    assert kept.tolist() == pytest.approx(system.fragment_charges.tolist(), abs=1e-12)
    for fragment in range(len(kept)):  # one chemical potential in each fragment, not one for all
        assert np.ptp(g_q[system.fragments == fragment]) < 1e-8
    assert np.ptp(g_q) > 1e-3


@pytest.mark.parametrize(("build", "net"), [(rattled_salt, 0.5), (water_box, 0.0)])
def test_splitting_and_accuracy_change_nothing_but_the_error(build, net):
    """``accuracy`` is the RMS error of forces over the RMS force.

    A single component may be off by three times that, as of some thirty random errors one is.
    """
    atoms = build()
    system = Systems.from_atoms(atoms, net_charge=net)
    model = PQEq(accuracy=1e-12, tolerance=1e-11)
    exact = model.solve(system)
    energy, *_ = brute(atoms, model)(exact.charges.numpy(), exact.shells.numpy())
    assert exact.energy.item() == pytest.approx(energy, abs=1e-9)
    rms = float(exact.forces.square().mean().sqrt())
    for accuracy in (1e-4, 1e-6, 1e-8):
        error = PQEq(accuracy=accuracy, tolerance=1e-11).solve(system).forces - exact.forces
        assert float(error.square().mean().sqrt()) < accuracy * rms
        assert float(error.abs().max()) < 3 * accuracy * rms
        assert float(error.abs().max()) > 0.01 * accuracy * rms, "the sum must not take more work than asked for"


IN_FRAGMENTS = {"conserve": "fragments"}
CASES = {
    "periodic fragments all": (water_box, 0.0, True, {"conserve": "fragments", "response": "all"}),
    "periodic fragments shells": (water_box, 0.0, True, {"conserve": "fragments", "response": "shells"}),
    "periodic charged shells": (water_box, 1.0, False, {"response": "shells"}),
    "periodic frozen": (water_box, 0.0, False, {"response": "frozen"}),
    "open all": (water_dimer, 0.0, False, {"response": "all"}),
    "open anion all": (water_dimer, -1.0, False, {"response": "all"}),
    "open fragments shells": (water_dimer, 0.0, True, {"conserve": "fragments", "response": "shells"}),
    "salt charged": (rattled_salt, 0.5, False, {"response": "shells"}),
    "salt coarse sum": (rattled_salt, 0.0, False, {"response": "shells", "accuracy": 1e-4}),
    "water without limiter": (water_box, 0.0, False, {"response": "shells", "limiter": "none"}),
    "cation fragments all": (sodium_in_water, 1.0, True, {**IN_FRAGMENTS, "response": "all"}),
    "cation fragments shells": (sodium_in_water, 1.0, True, {**IN_FRAGMENTS, "response": "shells"}),
    "anion fragments all": (hydroxide_in_water, -1.0, True, {**IN_FRAGMENTS, "response": "all"}),
    "flat left-handed cell": (flat_cell, 0.0, True, {**IN_FRAGMENTS, "response": "all"}),
    "one atom in the cell": (one_atom_cell, 1.0, False, {"response": "shells"}),
}


class Case:
    """Solves one case for displaced atoms, strained cells and other fields, charges carried from the start."""

    def __init__(self, name, field):
        build, self.net, self.fragments, keywords = CASES[name]
        self.atoms, self.field = build(), np.asarray(field, dtype=float)
        self.model = PQEq(**{"accuracy": 1e-8, "tolerance": 1e-11, **keywords})
        self.carried = None
        self.carried = self.solve(self.atoms, np.zeros(3)).charges

    def solve(self, atoms, field, **keywords):
        system = Systems.from_atoms(atoms, field=field, net_charge=self.net)
        if self.fragments:
            system = with_fragments(system, atoms)
        return self.model.solve(system.replace(carried=self.carried), **keywords)


def central(energy, step):
    return -(energy(step) - energy(-step)) / (2 * step)


@pytest.mark.parametrize("field", [(0.0, 0.0, 0.0), FIELD], ids=["no field", "field"])
@pytest.mark.parametrize("name", CASES)
def test_forces_virial_dipole_are_exact_derivatives(name, field):
    case = Case(name, field)
    answer = case.solve(case.atoms, case.field)
    h = 1e-4
    for atom, axis in ((0, 0), (0, 2), (len(case.atoms) // 2, 1)):

        def moved(step, atom=atom, axis=axis):
            atoms = case.atoms.copy()
            atoms.positions[atom, axis] += step
            return case.solve(atoms, case.field).energy.item()

        assert answer.forces[atom, axis].item() == pytest.approx(central(moved, h), rel=1e-7, abs=1e-7)
    for a, b in ((0, 0), (2, 1), (0, 2)) if case.atoms.pbc.any() else ():

        def strained(step, a=a, b=b):
            strain = np.eye(3)
            strain[b, a] += step  # r_a -> r_a + step r_b, of rows
            atoms = case.atoms.copy()
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            return case.solve(atoms, case.field).energy.item()

        assert answer.virial[0, a, b].item() == pytest.approx(central(strained, h), rel=1e-7, abs=1e-7)
    for axis in range(3):

        def in_field(step, axis=axis):
            return case.solve(case.atoms, case.field + step * np.eye(3)[axis]).energy.item()

        # 4th order: the shells' response is not linear in the field
        slope = (4 * central(in_field, 2e-4) - central(in_field, 4e-4)) / 3
        assert answer.dipole[0, axis].item() == pytest.approx(slope, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "periodic fragments all",
        "periodic charged shells",
        "open all",
        "periodic frozen",
        "cation fragments all",
        "anion fragments all",
    ],
)
def test_born_charges_and_polarizability_are_derivatives_of_the_dipole(name):
    case = Case(name, FIELD)
    answer = case.solve(case.atoms, case.field, born_charges=True, polarizability=True)
    h = 1e-4
    for atom, axis in ((0, 0), (1, 2), (4, 1)):
        dipoles = []
        for sign in (1, -1):
            atoms = case.atoms.copy()
            atoms.positions[atom, axis] += sign * h
            dipoles.append(case.solve(atoms, case.field).dipole[0])
        numeric = ((dipoles[0] - dipoles[1]) / (2 * h)).numpy()
        assert answer.born_charges[atom, :, axis].numpy() == pytest.approx(numeric, abs=2e-8)
    for axis in range(3):
        shift = 2e-4 * np.eye(3)[axis]
        up, down = case.solve(case.atoms, case.field + shift), case.solve(case.atoms, case.field - shift)
        numeric = ((up.dipole - down.dipole)[0] / 4e-4).numpy() * COULOMB_CONSTANT
        assert answer.polarizability[0, :, axis].numpy() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["periodic fragments all", "cation fragments all"])
def test_acoustic_sum_rule(name):
    """Born charges sum to the net charge."""
    case = Case(name, FIELD)
    answer = case.solve(case.atoms, case.field, born_charges=True)
    assert answer.born_charges.sum(0).numpy() == pytest.approx(case.net * np.eye(3), abs=1e-9)


def test_one_atom_polarizes_like_a_spring():
    """α = k_e Z²/K, isotropic, from one shell on its spring."""
    model = PQEq(limiter="none")
    system = Systems.from_atoms(Atoms("Cl"), field=(0.01, 0, 0)).replace(carried=torch.zeros(1, dtype=torch.float64))
    answer = model.solve(system, polarizability=True)
    spring = TABLE["Cl"].K / 23.060547830619
    assert answer.polarizability[0].numpy() == pytest.approx(np.eye(3) * COULOMB_CONSTANT / spring, abs=1e-9)
    assert answer.energy.item() == pytest.approx(-0.5 * 0.01**2 / spring, abs=1e-12)


def test_two_distant_ions_attract_like_points():
    """At 60 Å Gaussians are points: E → Σ(χq + ½ηq²) − k_e q²/r with q fixed by fragments."""
    atoms = Atoms("NaCl", [[0, 0, 0], [60, 0, 0]])
    system = assign_fragments(Systems.from_atoms(atoms), initial_charges=torch.tensor([1.0, -1.0], dtype=torch.float64))
    answer = PQEq(conserve="fragments").solve(system)
    na, cl = TABLE["Na"], TABLE["Cl"]
    isolated = na.chi + 0.5 * na.eta - cl.chi + 0.5 * cl.eta
    assert answer.energy.item() - isolated == pytest.approx(-COULOMB_CONSTANT / 60, rel=1e-3)
    assert answer.charges.tolist() == pytest.approx([1.0, -1.0], abs=1e-12)


def test_madelung_constant_of_rock_salt():
    """Charges ±1, narrow Gaussians, no shells: −1.747564594633 k_e/d per pair (Mamode 2017, to its digits)."""
    bare = ElementParameters(0.0, 10.0, 0.0, 0.05, 1.0)
    model = PQEq(parameters={"Na": bare, "Cl": bare}, conserve="fragments", accuracy=1e-12)
    atoms = Atoms("NaCl", [[0, 0, 0], [2.82, 0, 0]], cell=2.82 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]), pbc=True)
    labels = torch.tensor([0, 1])
    system = assign_fragments(
        Systems.from_atoms(atoms), labels=labels, initial_charges=torch.tensor([1.0, -1.0], dtype=torch.float64)
    )
    answer = model.solve(system)
    assert answer.terms["coulomb"].item() == pytest.approx(-1.747564594633182 * COULOMB_CONSTANT / 2.82, rel=1e-10)


def test_water_monomer_is_close_to_the_published_code():
    """ReaxNet's own number (taper at 12.5 Å, converged): −0.7433675 eV.

    Without taper the same parameters differ by 1 meV.
    """
    atoms, _ = REFERENCES["water_monomer"]
    atoms.pbc = False
    energy = PQEq(limiter="none").solve(Systems.from_atoms(atoms)).energy.item()
    assert energy == pytest.approx(-0.7433675150182957, abs=1.5e-3)


def test_shells_stay_within_the_limit_where_the_bare_spring_breaks():
    """Springs thirty times too soft: the bare spring has no stable point, the limited one has, with exact forces."""
    soft = {k: p._replace(K=0.03 * p.K) for k, p in TABLE.items() if k in "OH"}
    system = Systems.from_atoms(water_dimer())
    limited = PQEq(parameters=soft).solve(system)
    assert 0.1 < float(limited.shells.norm(dim=1).max()) < 0.25
    assert limited.residual < 1e-8
    with pytest.raises(NoStablePointError, match=r"polarization catastrophe at atom \d+ \(\w+\).*limiter"):
        PQEq(parameters=soft, limiter="none").solve(system)


def test_warm_start_gives_the_same_answer():
    system = Systems.from_atoms(water_box())
    model = PQEq()
    cold = model.solve(system)
    moved = system.replace(positions=system.positions + 0.01 * torch.sin(torch.arange(27.0).reshape(9, 3)).double())
    warm, fresh = model.solve(moved, start=(cold.charges, cold.shells)), model.solve(moved)
    assert warm.energy.item() == pytest.approx(fresh.energy.item(), abs=1e-10)
    assert float((warm.forces - fresh.forces).abs().max()) < 1e-8
    assert warm.iterations < fresh.iterations


def test_fragments_keep_their_charge_and_total_lets_it_flow():
    atoms = water_box()
    kept = PQEq(conserve="fragments").solve(assign_fragments(Systems.from_atoms(atoms)))
    per_molecule = kept.charges.reshape(3, 3).sum(1)
    assert per_molecule.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    free = PQEq().solve(Systems.from_atoms(atoms))
    assert float(free.charges.reshape(3, 3).sum(1).abs().max()) > 1e-3
    assert free.energy.item() < kept.energy.item()


def test_field_energy_contains_the_dipole():
    case = Case("periodic fragments all", FIELD)
    answer = case.solve(case.atoms, case.field)
    expected = -float((answer.dipole * torch.tensor(FIELD, dtype=torch.float64)).sum())
    assert answer.terms["field"].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("keywords", "field", "message"),
    [
        ({"response": "all"}, (0.1, 0, 0), "charge would flow across the cell"),
        ({"conserve": "atoms"}, (0, 0, 0), "charges.conserve is 'atoms'"),
        ({"accuracy": 1.0}, (0, 0, 0), "coulomb.accuracy is 1"),
        ({"accuracy": math.nan}, (0, 0, 0), "coulomb.accuracy is nan"),
        ({"shell_limit": 0.0}, (0, 0, 0), "charges.shell_limit is 0: give the largest core-shell distance"),
        ({"shell_limit": math.nan}, (0, 0, 0), "charges.shell_limit is nan"),
        ({"tolerance": -1e-8}, (0, 0, 0), "charges.tolerance is -1e-08: give the largest residual"),
        ({"tolerance": math.inf}, (0, 0, 0), "charges.tolerance is inf"),
        ({"coulomb_constant": 0.0}, (0, 0, 0), "coulomb.coulomb_constant is 0: give eV Å/e², 14.399645 in vacuum"),
        ({"coulomb_constant": math.nan}, (0, 0, 0), "coulomb.coulomb_constant is nan"),
        ({"parameters": {"O": TABLE["O"]._replace(eta=math.nan)}}, (0, 0, 0), "of O must be finite numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keywords, field, message):
    system = Systems.from_atoms(water_box(), field=field)
    with pytest.raises(InputError, match=message):
        PQEq(**keywords).check_field(system)


def test_field_across_a_percolating_fragment_is_refused():
    from ase.build import bulk

    system = assign_fragments(Systems.from_atoms(bulk("Cu", cubic=True), field=(0.1, 0, 0)))
    with pytest.raises(InputError, match="bonded to its own image"):
        PQEq(conserve="fragments", response="all").check_field(system)


def test_one_periodic_direction_is_refused():
    atoms = water_box()
    atoms.pbc = (True, False, False)
    with pytest.raises(InputError, match="periodic in one direction only"):
        PQEq().solve(Systems.from_atoms(atoms))


def test_unknown_element_names_the_known_ones():
    model = PQEq(parameters={"O": TABLE["O"]})
    with pytest.raises(InputError, match=r"no PQEq parameters for H.*knows O"):
        model.solve(Systems.from_atoms(water_box()))


def test_parameter_files(tmp_path):
    assert TABLE["O"].R == 0.669
    assert "Lr" not in TABLE
    path = tmp_path / "own.csv"
    path.write_text("# mine\nsymbol,chi,eta,Z,R,K\nO,8.3,14.6,1,0.67,414\n")
    assert read_parameters(path) == {"O": ElementParameters(8.3, 14.6, 1, 0.67, 414)}
    path.write_text("symbol,chi,eta,Z,R,K\nQq,1,1,1,1,1\n")
    with pytest.raises(InputError, match="'Qq' is not an element"):
        read_parameters(path)
    path.write_text("symbol,chi,eta,Z,R,K\nO,8.3,14.6,1,0,414\n")
    with pytest.raises(InputError, match="R and K of O must be positive"):
        read_parameters(path)
    with pytest.raises(InputError, match="cannot read the PQEq parameters"):
        read_parameters(tmp_path / "absent.csv")


HEADER = "symbol,chi,eta,Z,R,K\n"
OXYGEN = "O,8.3,14.6,1,0.67,414\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + OXYGEN.replace("14.6", "nan"), "of O must be finite numbers"),
        (HEADER + OXYGEN.replace("8.3", "inf"), "of O must be finite numbers"),
        (HEADER + OXYGEN.replace("414", "NaN"), "of O must be finite numbers"),
        (HEADER + OXYGEN.replace("8.3", "big"), "the row of O needs the numbers"),
        (HEADER + "O,8.3,14.6\n", "the row of O needs the numbers"),
        (HEADER + OXYGEN + "H,4.7,15.5,1,0.37,2037\n" + OXYGEN, "O has two rows"),
        (HEADER + OXYGEN.replace("414", "414,5"), "the row of O has more than the numbers"),
        ("symbol,chi,eta,Z,R,K,Q\nO,8.3,14.6,1,0.67,414,5\n", "the columns are 'symbol,chi,eta,Z,R,K,Q'"),
        ("symbol,chi,eta,Z,R,R\n" + OXYGEN, "the columns are 'symbol,chi,eta,Z,R,R'"),
        ("symbol,chi,Z,R,K\nO,8.3,1,0.67,414\n", "the columns are 'symbol,chi,Z,R,K'"),
        (HEADER, "the table has no rows"),
        ("# nothing\n", "the columns are ''"),
    ],
)
def test_parameter_files_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="own.csv: .*" + message):
        read_parameters(path)


def test_parameter_files_in_other_encodings(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("\ufeff" + HEADER + OXYGEN, encoding="utf-8")
    assert list(read_parameters(path)) == ["O"]
    path.write_bytes("# Å\n".encode("latin-1") + (HEADER + OXYGEN).encode())
    with pytest.raises(InputError, match=r"own.csv: cannot read the PQEq parameters .it is not UTF-8 text"):
        read_parameters(path)


def test_config_round_trip():
    model = PQEq(conserve="fragments", response="all", accuracy=1e-5)
    again = PQEq.from_config(model.config)
    assert again == model
    assert math.isclose(again.coulomb_constant, COULOMB_CONSTANT)


def test_a_saddle_point_hidden_by_symmetry_is_left():
    """Ideal LiF with springs 50 times too soft: zero shells are stationary by symmetry, but no minimum."""
    from ase.build import bulk

    soft = {k: p._replace(K=0.02 * p.K) for k, p in TABLE.items() if k in ("Li", "F")}
    system = Systems.from_atoms(bulk("LiF", "rocksalt", 4.03, cubic=True))
    with pytest.raises(NoStablePointError, match="polarization catastrophe"):
        PQEq(parameters=soft, limiter="none").solve(system)
    limited = PQEq(parameters=soft).solve(system)
    assert float(limited.shells.norm(dim=1).max()) > 0.05
    rattled = system.replace(positions=system.positions + 1e-4 * torch.sin(torch.arange(24.0).reshape(8, 3)).double())
    assert limited.energy.item() == pytest.approx(PQEq(parameters=soft).solve(rattled).energy.item(), abs=0.05)


def test_virial_at_a_wave_vector_on_the_edge_of_the_sum():
    """Cells in which a wave vector sits where the switch is nearly zero: the virial stays what its neighbours have."""
    molecule = water_dimer()[:3]
    virials = []
    for edge in np.linspace(8.5965, 8.5975, 41):
        molecule.set_cell([edge] * 3)
        molecule.pbc = True
        virials.append(PQEq().solve(Systems.from_atoms(molecule)).virial.numpy())
    assert np.ptp(virials, axis=0).max() < 1e-2


def test_a_fragment_that_comes_apart_is_refused_in_a_field():
    atoms = Atoms("NaCl", [[0, 0, 0], [5.6, 0, 0]], cell=[12, 12, 12], pbc=True)
    system = assign_fragments(Systems.from_atoms(atoms, field=(0.05, 0, 0)), labels=torch.tensor([0, 0]))
    with pytest.raises(InputError, match=r"atoms 0 \(Na\) and 1 \(Cl\) belong to one fragment but are 5.60 Å apart"):
        PQEq(conserve="fragments", response="all").solve(system)


@pytest.mark.parametrize("build", [water_dimer, rattled_salt, water_box])
def test_smallest_curvature_is_that_of_the_dense_hessian(build):
    system, model = Systems.from_atoms(build()), PQEq(tolerance=1e-9, accuracy=1e-9)
    answer = model.solve(system, smallest_curvature=True)
    functional = Functional(model, system)
    point = functional.at(torch.cat([answer.charges[:, None], answer.shells], dim=1))
    point.linearize()
    n = system.n_atoms
    columns = [point.exact_product(e.reshape(n, 4)).reshape(-1) for e in torch.eye(4 * n, dtype=torch.float64)]
    hessian = torch.stack(columns, dim=1).numpy()
    q = 4 * np.arange(n)
    shells = np.setdiff1d(np.arange(4 * n), q)
    flow = np.linalg.svd(np.ones((1, n)))[2][1:].T  # charges that add up to nothing
    qq, qs = flow.T @ hessian[np.ix_(q, q)] @ flow, flow.T @ hessian[np.ix_(q, shells)]
    relaxed = hessian[np.ix_(shells, shells)] - qs.T @ np.linalg.solve(qq, qs)
    assert answer.smallest_curvature.item() == pytest.approx(np.linalg.eigvalsh(relaxed)[0], rel=1e-3)
