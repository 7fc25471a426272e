"""Constant electric displacement: one functional with its derivatives, against an independent numpy solution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.units import fs
from uniform_fields import APPLIED, MODELS, NAN, Crystal, salt, slope

from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, FixedCharges, PQEq, read_parameters
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import InputError, NoStablePointError
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.pair import BornMayerHuggins, PairPotential, read_set
from voltpi.potential.systems import Systems

from brute_force import BruteForce
from structures import water_box

DISPLACED = [name for name in APPLIED if name != "field"]


@pytest.mark.parametrize("applied", DISPLACED)
@pytest.mark.parametrize("model", MODELS)
def test_forces_are_exact_derivatives(model, applied):
    crystal = Crystal(model, applied)
    answer = crystal.solve()
    direction = np.random.default_rng(1).normal(size=(len(crystal.atoms), 3))

    def moved(step):
        atoms = crystal.atoms.copy()
        atoms.positions += step * direction
        return crystal.solve(atoms).energy.item()

    work = -(answer.forces.numpy() * direction).sum()
    assert work == pytest.approx(slope(moved, 5e-4), rel=1e-7, abs=1e-7)
    total = sum(term.item() for term in answer.terms.values())
    assert answer.energy.item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("applied", DISPLACED)
@pytest.mark.parametrize("model", MODELS)
def test_derivatives_in_field_and_displacement(model, applied):
    """∂U/∂D_a = V ε_a/(4πk_e) and ∂U/∂ε_b = −M_b, with ε = D − 4πk_e M/V."""
    crystal = Crystal(model, applied)
    answer = crystal.solve()
    held = ~np.isnan(crystal.displacement)
    field, dipole = answer.field[0].numpy(), answer.dipole[0].numpy()
    given = np.where(held, np.array(crystal.displacement) - dipole / crystal.room, crystal.field)
    assert field == pytest.approx(given, abs=1e-12)
    for axis in range(3):
        step = np.eye(3)[axis]
        if held[axis]:
            found, key, start = crystal.room * field[axis], "displacement", np.array(crystal.displacement)
        else:
            found, key, start = -dipole[axis], "field", np.array(crystal.field)
        energy = slope(lambda x, k=key, s=start, d=step: crystal.solve(**{k: s + x * d}).energy.item(), 1e-3)
        assert found == pytest.approx(energy, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("applied", DISPLACED)
@pytest.mark.parametrize("model", ["shells", "fragments, all", "given charges"])
def test_the_field_that_the_displacement_leaves_gives_the_same(model, applied):
    """Charges, shells and forces are those at constant ε = D − 4πk_e M/V; energies differ by what is held."""
    crystal = Crystal(model, applied)
    answer = crystal.solve()
    other = crystal.solve(field=answer.field[0].numpy(), displacement=None)
    for name in ("charges", "shells", "forces", "dipole", "field"):
        assert torch.allclose(getattr(other, name), getattr(answer, name), atol=1e-9), name
    held = torch.tensor(crystal.displacement).isnan().logical_not()
    field, dipole = answer.field[0][held], answer.dipole[0][held]
    exchanged = 0.5 * crystal.room * field.square().sum() + (field * dipole).sum()
    assert answer.energy.item() == pytest.approx(float(other.energy[0] + exchanged), abs=1e-9)


def solved_densely(crystal):
    """Energy, q, Δ and M of U(D) by Newton's method in numpy, from the reciprocal sum of the Gaussians.

    The Hessian of the zero-field energy comes from differences of its gradient, that of the polarization is added.
    """
    atoms, n = crystal.atoms, len(crystal.atoms)
    table = np.array([crystal.model.parameters[s] for s in atoms.symbols])
    parts = BruteForce(atoms.positions, atoms.cell.array, *table.T, (0, 0, 0), crystal.model.limiter)
    carried = None if crystal.carried is None else crystal.carried.numpy()
    system = crystal.system()
    groups = np.zeros(n, dtype=int) if system.fragments is None else system.fragments.numpy()
    kept = np.eye(groups.max() + 1)[groups].T
    free = np.linalg.svd(kept)[2][len(kept) :].T  # charges that flow within a group
    basis = np.zeros((4 * n, free.shape[1] + 3 * n))
    basis[:n, : free.shape[1]], basis[n:, free.shape[1] :] = free, np.eye(3 * n)
    lever = np.zeros((4 * n, 3))  # ∂M/∂(q, Δ)
    if carried is None:
        lever[:n] = atoms.positions
    for a in range(3):
        lever[n + a :: 3, a] = -table[:, 2]
    constant = np.zeros(3) if carried is None else carried @ atoms.positions
    held = ~np.isnan(crystal.displacement)
    given = np.where(held, crystal.displacement, crystal.field)

    def gradient(y):
        energy, g_q, g_shell, _ = parts(y[:n], y[n:].reshape(n, 3), None if carried is None else np.zeros(n))
        return energy, np.concatenate([g_q, g_shell.ravel()])

    y = np.zeros(4 * n)
    for _ in range(12):
        energy, slope_0 = gradient(y)
        dipole = constant + lever.T @ y
        field = given - held * dipole / crystal.room
        full = basis.T @ (slope_0 - lever @ field)
        if np.abs(full).max() < 1e-9:
            break
        step = 1e-5
        columns = [(gradient(y + step * d)[1] - gradient(y - step * d)[1]) / (2 * step) for d in basis.T]
        hessian = basis.T @ np.array(columns).T + basis.T @ lever @ np.diag(held / crystal.room) @ lever.T @ basis
        move = -basis @ np.linalg.solve(hessian, full)
        y = y + move * min(1.0, 0.1 / np.abs(move[n:]).max())
    energy += (0.5 * crystal.room * held * field**2 - ~held * field * dipole).sum()
    return energy, y[:n], y[n:].reshape(n, 3), dipole, field


@pytest.mark.parametrize(
    ("model", "applied"), [("shells", "D"), ("shells", "mixed"), ("flat left-handed cell, all", "D")]
)
def test_agrees_with_an_independent_dense_solution(model, applied):
    crystal = Crystal(model, applied)
    answer = crystal.solve()
    energy, q, shells, dipole, field = solved_densely(crystal)
    assert answer.energy.item() == pytest.approx(energy, abs=1e-7)
    assert answer.charges.numpy() == pytest.approx(q, abs=1e-7)
    assert answer.shells.numpy() == pytest.approx(shells, abs=1e-7)
    assert answer.dipole[0].numpy() == pytest.approx(dipole, abs=1e-7)
    assert answer.field[0].numpy() == pytest.approx(field, abs=1e-7)


@pytest.mark.parametrize("model", ["shells", "fragments, all", "flat left-handed cell, all"])
def test_response_of_clamped_nuclei(model):
    """dM/dD = (V/4πk_e)(1 − ε∞⁻¹) with ε∞ = 1 + 4πα/V; charges and polarizability stay those at fixed field."""
    crystal = Crystal(model, "D")
    answer = crystal.solve(born_charges=True, polarizability=True)
    infinity = np.eye(3) + 4 * math.pi * answer.polarizability[0].numpy() / crystal.atoms.get_volume()
    held, h = np.array(crystal.displacement), 1e-3

    def moved(step):
        return crystal.solve(displacement=held + step).dipole[0].numpy()

    for axis in range(3):
        step = h * np.eye(3)[axis]
        change = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * h)
        assert change == pytest.approx(crystal.room * (np.eye(3) - np.linalg.inv(infinity))[:, axis], abs=2e-7)
    at_field = crystal.solve(field=answer.field[0].numpy(), displacement=None, born_charges=True, polarizability=True)
    assert torch.allclose(answer.polarizability, at_field.polarizability, atol=1e-6)
    assert torch.allclose(answer.born_charges, at_field.born_charges, atol=1e-7)
    # at fixed D the nuclei see the charges Z* screened by ε∞
    atoms = crystal.atoms.copy()
    atoms.positions[1, 2] += 1e-4
    up = crystal.solve(atoms).dipole[0].numpy()
    atoms.positions[1, 2] -= 2e-4
    change = (up - crystal.solve(atoms).dipole[0].numpy()) / 2e-4
    assert change == pytest.approx(np.linalg.inv(infinity) @ answer.born_charges[1, :, 2].numpy(), abs=2e-6)


def test_stable_at_constant_displacement_only():
    """NaCl with springs so soft that no field holds the shells but a displacement does (ε∞ < 0)."""
    table = read_parameters()
    rows = {s: table[s]._replace(K=0.147 * table[s].K) for s in ("Na", "Cl")}
    crystal = Crystal("no limiter", "D")
    crystal.atoms = salt()
    crystal.model = PQEq(rows, limiter="none", accuracy=1e-6, tolerance=1e-9)
    crystal.carried = crystal.tensor(crystal.atoms.get_initial_charges())
    assert float(crystal.solve(displacement=(0, 0, 0)).residual) < 1e-9
    with pytest.raises(NoStablePointError, match="stable at the constant displacement only"):
        crystal.solve(displacement=(0, 0, 0), polarizability=True)


def test_displacement_takes_few_more_products():
    """The term of rank three costs the solver next to nothing."""
    crystal = Crystal("fragments, all", "D", accuracy=1e-6, tolerance=1e-8)
    held = crystal.solve()
    free = crystal.solve(field=held.field[0].numpy(), displacement=None)
    assert int(held.iterations) <= int(free.iterations) + 12


def test_batch_of_displacements_equals_its_parts():
    parts = [Crystal("fragments, all", name) for name in APPLIED] + [Crystal("flat left-handed cell, all", "D")]
    systems = [part.system() for part in parts]
    together = parts[0].model.solve(Systems.join(systems), born_charges=True, polarizability=True)
    first = 0
    for b, system in enumerate(systems):
        alone = parts[0].model.solve(system, born_charges=True, polarizability=True)
        own = slice(first, first + system.n_atoms)
        first += system.n_atoms
        for name in ("energy", "virial", "field", "dipole", "polarizability"):
            assert torch.allclose(getattr(together, name)[b], getattr(alone, name)[0], atol=2e-8), name
        for name in ("forces", "charges", "shells", "born_charges"):
            assert torch.allclose(getattr(together, name)[own], getattr(alone, name), atol=2e-8), name
    again = Systems.join(systems).split()
    assert all(torch.equal(a.displacement.nan_to_num(7), Systems.join(systems).displacement[b : b + 1].nan_to_num(7))
               for b, a in enumerate(again))  # fmt: skip


def test_origin_shifts_the_dipole_and_what_the_displacement_leaves():
    plain, shifted = Crystal("shells", "D"), Crystal("shells", "D", origin=(0.5, 0.0, -1.0))
    offset = np.array([0.5, 0.0, -1.0]) @ plain.atoms.cell.array
    other = plain.solve(displacement=np.array(plain.displacement) + offset / plain.room)
    answer = shifted.solve()
    assert answer.dipole[0].numpy() == pytest.approx(other.dipole[0].numpy() - offset, abs=1e-9)
    for name in ("energy", "forces", "field"):
        assert torch.allclose(getattr(answer, name), getattr(other, name), atol=1e-9), name


# trajectories --------------------------------------------------------------------------------------------------------


class Salt:
    """NaCl of Tosi and Fumi with PQEq shells, 8 atoms, in a displacement along z."""

    masses = np.array([22.98977, 35.453])

    def __init__(self, **changes):
        self.crystal = crystal = Crystal("shells", **{"accuracy": 1e-8, **changes})
        crystal.atoms = salt().repeat((1, 1, 2))
        crystal.atoms.set_array("initial_charges", None)
        self.potential = Potential(PairPotential([BornMayerHuggins(read_set("nacl"))], 5.0), crystal.model)
        ions = np.where(crystal.atoms.symbols == "Na", 1.0, -1.0)
        rock_salt = bulk("NaCl", "rocksalt", 5.64, orthorhombic=True).repeat((1, 1, 2))
        crystal.carried = crystal.tensor(ions)
        crystal.origin = crystal.tensor(ions @ rock_salt.get_scaled_positions())[None]
        self.held = (NAN, NAN, 0.1)
        self.mass = np.where(crystal.atoms.symbols == "Na", *self.masses)[:, None]
        self.velocity = 4e-3 * np.random.default_rng(2).normal(size=(len(crystal.atoms), 3))
        self.start = None

    def at(self, positions, *, field=(0, 0, 0), displacement=None):
        atoms = self.crystal.atoms.copy()
        atoms.positions = positions
        system = self.crystal.system(atoms, field=field, displacement=displacement)
        self.start = self.potential(system, start=self.start)
        return self.start

    def run(self, steps, timestep, answer_at):
        """Velocity Verlet; the answers, and the kinetic energies (eV)."""
        r, v = self.crystal.atoms.positions.copy(), self.velocity.copy()
        answers, kinetic = [answer_at(r)], [0.5 * float((self.mass * v**2).sum())]
        for _ in range(steps):
            v = v + 0.5 * timestep * answers[-1].forces.numpy() / self.mass
            r = r + timestep * v
            answers.append(answer_at(r))
            v = v + 0.5 * timestep * answers[-1].forces.numpy() / self.mass
            kinetic.append(0.5 * float((self.mass * v**2).sum()))
        return answers, np.array(kinetic)


@pytest.fixture(scope="module")
def trajectory():
    case = Salt()
    return case.run(60, 2 * fs, lambda r: case.at(r, displacement=case.held))


def test_trajectory_at_the_field_that_the_displacement_leaves(trajectory):
    """Step by step: the field that was reported gives the same forces, and so the same trajectory."""
    held, case = trajectory[0], Salt()
    fields = iter([a.field[0].numpy() for a in held])
    free, _ = case.run(60, 2 * fs, lambda r: case.at(r, field=next(fields)))
    for one, two in zip(held, free, strict=True):
        assert torch.allclose(one.forces, two.forces, atol=1e-7)
    assert np.ptp([float(a.field[0, 2]) for a in held]) > 1e-2


def test_trajectory_that_finds_its_field_itself(trajectory):
    """ε = D − 4πk_e M(ε)/V by the secant rule at constant field, knowing nothing of U(D)."""
    case = Salt()
    room = case.crystal.room

    def self_consistent(r):
        trials = [0.0, 1e-3]
        missing = []
        for _ in range(12):
            answer = case.at(r, field=(0, 0, trials[len(missing)]))
            missing.append(case.held[2] - float(answer.dipole[0, 2]) / room - trials[len(missing)])
            if abs(missing[-1]) < 1e-9:
                return answer
            if len(missing) > 1:
                slope_0 = (missing[-1] - missing[-2]) / (trials[-1] - trials[-2])
                trials.append(trials[-1] - missing[-1] / slope_0)
        raise AssertionError("no field found")

    found, _ = case.run(5, 2 * fs, self_consistent)
    for one, two in zip(trajectory[0], found, strict=False):
        assert torch.allclose(one.forces, two.forces, atol=1e-7)
        assert torch.allclose(one.field, two.field, atol=1e-8)


def test_energy_is_conserved_at_constant_displacement():
    drift = {}
    for timestep in (4.0, 2.0):
        case = Salt(accuracy=1e-6, tolerance=1e-9)
        answers, kinetic = case.run(int(400 / timestep), timestep * fs, lambda r, c=case: c.at(r, displacement=c.held))
        total = np.array([float(a.energy[0]) for a in answers]) + kinetic
        drift[timestep] = np.ptp(total)
        assert kinetic.max() - kinetic.min() > 0.05
    assert drift[2.0] < 2e-3
    assert drift[2.0] == pytest.approx(drift[4.0] / 4, rel=0.3)  # velocity Verlet: of second order, no more


# refusals ------------------------------------------------------------------------------------------------------------


def refused(model, system, message):
    with pytest.raises(InputError, match=message):
        model.solve(system)


def test_displacements_that_are_not_defined_are_refused():
    crystal = Crystal("shells", "D along z")
    refused(crystal.model, crystal.system(field=(0, 0, 0.1)), "both set along z")
    for pbc in ((True, True, False), (False, False, False)):
        atoms = water_box()
        atoms.pbc = pbc
        slab = Crystal("fragments, shells", "D along z")
        slab.atoms = atoms
        refused(slab.model, slab.system(), "not periodic in all three directions")
    charged = crystal.system().replace(net_charge=torch.ones(1, dtype=torch.float64))
    refused(crystal.model, charged, "depends on where it is counted from")
    flows = Crystal("shells", "D along z")
    refused(PQEq(response="all"), flows.system(), "conserve to fragments or charges.response to shells")
    refused(TaperedPQEq(), crystal.system(), "displacement is not available with coulomb.method: taper")
    refused(crystal.model, crystal.system().replace(carried=None), "carries no charges")


def test_displacement_with_electrodes_is_refused():
    crystal = Crystal("given charges", "D along z")
    electrode = Electrode("metal", "potential", eta=1.0)
    model = FixedCharges(electrodes=(electrode,))
    system = assign_electrodes(crystal.system(), (electrode,), [[0]], [0.0])
    refused(model, system, "displacement with electrodes")


def test_displacement_without_charges_is_refused():
    potential = Potential(PairPotential([BornMayerHuggins(read_set("nacl"))], 5.0))
    with pytest.raises(InputError, match="no charges to feel it"):
        potential(Crystal("shells", "D").system())


def test_carried_charges_are_those_of_zero_field():
    crystal = Crystal("shells", "D")
    potential = Potential(charges=crystal.model)
    prepared = potential.prepare(crystal.system().replace(carried=None))
    assert torch.allclose(prepared.carried, crystal.carried, atol=1e-9)
    functional = Functional(crystal.model, prepared)
    assert functional.displaced
    assert float(functional.screening[0, 0]) == pytest.approx(
        4 * math.pi * COULOMB_CONSTANT / crystal.atoms.get_volume()
    )
