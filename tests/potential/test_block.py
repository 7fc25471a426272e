"""The factorised electrode block and the pairs without shells: the same answers as the plain ways to them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms

from voltpi.potential.electrostatics.ewald import CoulombOperator
from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.pairs import RigidPairState
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, FixedCharges, PQEq
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems

ETA = 1.8
WATER = Atoms("OH2", [[0, 0, 0], [0.76, 0.1, 0.58], [-0.72, 0.15, 0.55]])


def plates(layers: int = 2, rows: int = 3) -> Atoms:
    """Two plates of gold, 8 Å apart, in a cell of 8.7 × 8.4 Å."""
    grid = [[i + 0.5 * k, j + 0.5 * k, k] for k in range(layers) for i in range(rows) for j in range(rows)]
    one = np.array(grid) * [2.9, 2.8, 2.0] + [0, 0, 1.0]
    other = one + np.array([0.3, 0.2, 2.0 * (layers - 1) + 8.0])
    rng = np.random.default_rng(3)
    positions = np.concatenate([one, other])
    atoms = Atoms(f"Au{len(positions)}", positions + rng.normal(0, 0.04, positions.shape))
    atoms.set_cell([2.9 * rows, 2.8 * rows, float(positions[:, 2].max()) + 1.1])
    return atoms


def capacitor(
    electrolyte: str = "ions",
    *,
    boundary: str = "slab",
    control: tuple[str, str] = ("potential", "potential"),
    values: tuple[float, float] = (-0.4, 0.9),
    shift: float = 0.0,
    **settings: object,
) -> tuple[PQEq, Systems]:
    """A model and a prepared structure; ``shift`` (Å) moves the electrolyte."""
    atoms = plates()
    n = len(atoms)
    if electrolyte == "ions":
        inside = Atoms("NaClNaCl", [[1.2, 1.0, 5.6], [4.1, 4.0, 6.4], [5.9, 1.5, 8.0], [1.8, 5.5, 7.2]])
    else:
        first, second = WATER.copy(), WATER.copy()
        first.translate([1.5, 1.5, 5.8])
        second.translate([5.0, 4.4, 7.4])
        inside = first + second
    inside.translate([shift, -shift, 0.5 * shift])
    atoms += inside
    atoms.pbc = [True, True, boundary == "finite-field"]
    electrodes = tuple(Electrode(f"e{k}", c, eta=ETA) for k, c in enumerate(control))
    system = assign_electrodes(Systems.from_atoms(atoms), electrodes, [np.arange(n // 2), np.arange(n // 2, n)], values)
    options = {
        "electrodes": electrodes,
        "finite_field": 2 if boundary == "finite-field" else None,
        "tolerance": 1e-10,
        **settings,
    }
    if electrolyte == "ions":
        charges = torch.tensor([0.0] * n + [1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        return FixedCharges(**options), system.replace(carried=charges)
    model = PQEq(**{"conserve": "fragments", **options})
    return model, Potential(charges=dataclasses.replace(model)).prepare(system)


CASES = {
    "ions, slab": {},
    "ions, finite field": {"boundary": "finite-field"},
    "ions, at charges": {"control": ("charge", "charge"), "values": (-0.3, 0.3)},
    "ions, charge and potential": {"control": ("charge", "potential"), "values": (-0.3, 0.2)},
    "water, fragments": {"electrolyte": "water"},
    "water, finite field": {"electrolyte": "water", "boundary": "finite-field"},
    "water, charge flows": {"electrolyte": "water", "conserve": "total", "values": (0.1, 0.4)},
    "water, charge flows, at a charge": {
        "electrolyte": "water",
        "conserve": "total",
        "control": ("charge", "potential"),
        "values": (0.1, 0.4),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_block_gives_the_charges_of_the_iterative_solver(case):
    model, system = capacitor(**CASES[case])
    iterative = dataclasses.replace(model).solve(system)
    model.solve(system)  # the block is built when a geometry comes back
    assert Functional(model, system).block is not None
    factorised = model.solve(system)
    assert torch.allclose(factorised.charges, iterative.charges, rtol=0, atol=1e-9)
    assert torch.allclose(factorised.forces, iterative.forces, rtol=0, atol=1e-8)
    assert factorised.iterations.item() < iterative.iterations.item()
    for name, answer in factorised.electrodes.items():
        assert answer["potential"].item() == pytest.approx(iterative.electrodes[name]["potential"].item(), abs=1e-8)


@pytest.mark.parametrize("boundary", ["slab", "finite-field"])
def test_frozen_electrodes_among_fixed_charges_take_two_evaluations(boundary):
    model, system = capacitor(boundary=boundary, tolerance=1e-8)
    answer = model.solve(system)
    for shift in (0.01, 0.02, 0.03):
        _, moved = capacitor(boundary=boundary, shift=shift)
        answer = model.solve(moved, start=(answer.charges, answer.shells))
    assert answer.iterations.item() == 2
    assert answer.residual.item() < 1e-8


@pytest.mark.parametrize("electrolyte", ["ions", "water"])
def test_a_block_of_other_positions_still_leads_to_the_same_charges(electrolyte):
    model, system = capacitor(electrolyte)
    model.solve(system)
    model.solve(system)
    rng = np.random.default_rng(5)
    moved = system.replace(positions=system.positions + torch.tensor(rng.normal(0, 0.08, system.positions.shape)))
    assert Functional(model, moved).block is not None
    fresh = dataclasses.replace(model).solve(moved)
    assert torch.allclose(model.solve(moved).charges, fresh.charges, rtol=0, atol=1e-9)


def test_other_electrodes_do_not_take_the_block_of_the_first():
    model, system = capacitor()
    model.solve(system)
    model.solve(system)
    thick = dataclasses.replace(
        model, electrodes=tuple(dataclasses.replace(e, thomas_fermi=1.5) for e in model.electrodes)
    )
    thick.blocks = model.blocks
    assert Functional(thick, system).block is None
    assert Functional(model, system.replace(positions=system.positions + 0.6)).block is None


def test_replicas_at_different_potentials_in_one_batch_with_the_block():
    parts = [capacitor(values=values, shift=shift) for values, shift in (((0, 0), 0.1), ((0, 1), 0.0), ((-1, 1), 0.2))]
    model = parts[0][0]
    batch = Systems.join([system for _, system in parts])
    model.solve(batch)
    assert Functional(model, batch).block is not None
    together = model.solve(batch)
    for k, (single, system) in enumerate(parts):
        alone = single.solve(system)
        own = together.charges.reshape(3, -1)[k]
        assert torch.allclose(own, alone.charges, rtol=0, atol=1e-10)
        assert together.energy[k].item() == pytest.approx(alone.energy.item(), abs=1e-9)


@pytest.mark.parametrize("boundary", ["slab", "finite-field", "open"])
def test_charge_matrix_is_the_operator_column_by_column(boundary):
    atoms = plates()
    atoms.pbc = {"slab": [True, True, False], "finite-field": [True] * 3, "open": [False] * 3}[boundary]
    if boundary == "open":
        atoms.set_cell(np.zeros((3, 3)))
    system = Systems.from_atoms(atoms)
    n = system.n_atoms
    alpha = torch.where(torch.arange(n) % 2 == 0, 3.2, 1.1).to(torch.float64)
    none = torch.zeros(n, dtype=torch.float64)
    options = {"accuracy": 1e-10, "k_e": COULOMB_CONSTANT}
    matrix = CoulombOperator(system, alpha, none, many_products=True, **options).charge_matrix()
    state = CoulombOperator(system, alpha, none, **options).at(none, torch.zeros(n, 3, dtype=torch.float64))
    state.linearize()
    direction = torch.zeros(n, 4, dtype=torch.float64)
    for k in (0, 1, n - 1):
        direction[k, 0] = 1
        assert torch.allclose(matrix[:, k], state.product(direction)[:, 0], rtol=0, atol=1e-8)
        direction[k, 0] = 0


def test_tabulated_pairs_without_shells_are_those_of_the_kernel_itself():
    _, system = capacitor()
    model, _ = capacitor()
    functional = Functional(model, system)
    (mesh, pairs), *_ = functional.operator.rigid
    charges = torch.linspace(-1, 1, system.n_atoms, dtype=torch.float64)
    state = RigidPairState(pairs, charges, 1, COULOMB_CONSTANT)
    felt, pull = state._summed(charges)  # what a GPU does
    assert len(mesh.atoms) == system.n_atoms
    assert torch.allclose(state.potential, felt[:, 0], rtol=0, atol=1e-9)
    assert torch.allclose(state.gradient, felt[:, 1:], rtol=0, atol=1e-8)
    assert torch.allclose(state.virial(), pull, rtol=0, atol=1e-8)


def test_a_kept_list_of_pairs_gives_the_answer_of_a_new_one():
    model, system = capacitor()
    model.solve(system)
    for step in (0.2, 0.39, 0.7):  # within the skin, at its edge, beyond
        moved = capacitor(shift=step)[1]
        kept, new = model.solve(moved), capacitor()[0].solve(moved)
        assert torch.allclose(kept.forces, new.forces, rtol=0, atol=1e-8)
        assert kept.energy.item() == pytest.approx(new.energy.item(), abs=1e-10)
