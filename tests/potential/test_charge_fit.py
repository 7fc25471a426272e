"""Derivatives of charge equilibration with its parameters, and fits of these to dipoles and polarizabilities."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from voltpi.potential.electrostatics.explicit import ExplicitFunctional
from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.implicit import DifferentiablePQEq
from voltpi.potential.electrostatics.pqeq import ElementParameters, PQEq, read_parameters
from voltpi.potential.errors import InputError, NoStablePointError
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.systems import Systems
from voltpi.potential.training.charge_fit import ChargeFit, ElementTable, Target, make_targets, write_table
from voltpi.potential.training.dataset import Sample

TABLE = {symbol: row for symbol, row in read_parameters().items() if symbol in ("H", "C", "N", "O", "Na", "Cl")}
FIELD = [0.1, 0.05, -0.07]


def dimer(*, cell: bool) -> Atoms:
    positions = [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [2.5, 0.8, 1.9], [3.1, 1.3, 2.5], [2.6, -0.1, 2.2]]
    box = {"cell": [[5, 0, 0], [0.5, 5.2, 0], [0, 0.3, 4.8]], "pbc": True} if cell else {}
    return Atoms("OHHOHH", positions=positions, **box)


def answers(problem: DifferentiablePQEq) -> dict[str, torch.Tensor]:
    polarizability, born = problem.responses(born_charges=True)
    assert born is not None
    return {
        "energy": problem.energy,
        "forces": problem.forces,
        "virial": problem.forces_and_virial()[1],
        "dipole": problem.dipole,
        "polarizability": polarizability,
        "born_charges": born,
    }


CASES = {
    "cluster, fragments, fene, field": (False, "fragments", "fene", FIELD),
    "cluster, total, none": (False, "total", "none", [0, 0, 0]),
    "cell, fragments, none, field": (True, "fragments", "none", FIELD),
    "cell, total, fene": (True, "total", "fene", [0, 0, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_solver(case: str) -> None:
    """Every answer, and its gradient with χ, η, R and K of oxygen, against PQEq.solve and differences of it."""
    cell, conserve, limiter, field = CASES[case]
    model = PQEq(parameters=TABLE, conserve=conserve, response="all", limiter=limiter, tolerance=1e-11, accuracy=1e-11)
    systems = assign_fragments(Systems.from_atoms(dimer(cell=cell), field=np.array(field)))
    elements = ElementTable(TABLE, ["H", "O"])
    found = answers(DifferentiablePQEq(model, systems, elements.table(), elements.rows(systems.numbers)))
    exact = model.solve(systems, polarizability=True, born_charges=True)
    weights = {}
    for kind, value in found.items():
        torch.testing.assert_close(value.detach(), getattr(exact, kind), rtol=0, atol=2e-8)
        weights[kind] = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = list(elements.free)
    free = [elements.free[name] for name in names]
    gradients = {k: torch.autograd.grad((found[k] * w).sum(), free, retain_graph=True) for k, w in weights.items()}
    oxygen = TABLE["O"]
    steps = {"chi": 2e-3, "eta": 2e-3, "R": 2e-4, "K": 0.1}
    for k, name in enumerate(names):
        sums = []
        for times in (-2, -1, 1, 2):
            row = oxygen._replace(**{name: getattr(oxygen, name) + times * steps[name]})
            moved = dataclasses.replace(model, parameters={**TABLE, "O": row})
            there = moved.solve(systems, polarizability=True, born_charges=True)
            sums.append({kind: float((getattr(there, kind) * w).sum()) for kind, w in weights.items()})
        slope = torch.autograd.grad(elements.value(name)[1], free[k])[0][1]  # of the parameter with the free number
        for kind in weights:
            numeric = (8 * (sums[2][kind] - sums[1][kind]) - (sums[3][kind] - sums[0][kind])) / (12 * steps[name])
            gradient = float(gradients[kind][k][1] / slope)
            assert gradient == pytest.approx(numeric, rel=2e-7, abs=2e-8), (kind, name)


@pytest.mark.parametrize(("wide", "in_real_space"), [(2.085, False), (0.9, True)])
def test_explicit_sum_is_the_operator_in_a_charged_crystal(wide: float, in_real_space: bool) -> None:
    """Energy and its gradient in q and Δ for wide and sharp Gaussians, with and without a part in real space."""
    rng = np.random.default_rng(3)
    atoms = Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=np.eye(3) * 3.4, pbc=True).repeat(
        (2, 1, 1)
    )
    atoms.rattle(0.1, rng=rng)
    table = {"Na": TABLE["Na"]._replace(R=wide), "Cl": TABLE["Cl"]._replace(R=0.3)}
    model = PQEq(parameters=table, response="all", accuracy=1e-12)
    systems = Systems.from_atoms(atoms, net_charge=1.0)
    functional = Functional(model, systems)
    y = torch.tensor(rng.normal(scale=[0.5, 0.05, 0.05, 0.05], size=(4, 4)))
    explicit = ExplicitFunctional(functional)
    assert (explicit.cells[0].pairs.first.numel() > 0) == in_real_space
    rows = ElementTable(model.parameters, ["Na", "Cl"]).rows(systems.numbers)
    y.requires_grad_()
    energy = explicit.energy(y, systems.positions, rows)
    point = functional.at(y.detach())
    torch.testing.assert_close(energy.detach(), point.energy, rtol=0, atol=1e-9)
    gradient = torch.autograd.grad(energy.sum(), y)[0]
    torch.testing.assert_close(gradient, point.gradient, rtol=0, atol=1e-9)


# -- fits --------------------------------------------------------------------------------------------------------------

HIDDEN = {
    "H": ElementParameters(4.2, 22.0, 1.0, 0.45, 1500.0),
    "O": ElementParameters(10.5, 18.0, 1.0, 0.55, 500.0),
}
"""Parameters that are to be found again."""
START = {symbol: TABLE[symbol] for symbol in ("H", "O")}


def molecules() -> list[Atoms]:
    """Water, hydrogen peroxide and the water dimer, each rattled a few times."""
    rng = np.random.default_rng(11)
    out = []
    for atoms in (molecule("H2O"), molecule("H2O2"), dimer(cell=False)):
        for _ in range(2):
            out.append(atoms.copy())
            out[-1].rattle(0.08, rng=rng)
    return out


def charges(table: dict[str, ElementParameters]) -> PQEq:
    return PQEq(parameters=table, response="all")


def synthetic(table: dict[str, ElementParameters] = HIDDEN) -> list[Target]:
    """Molecules with the dipoles and polarizabilities that a table gives them."""
    out = []
    for atoms in molecules():
        systems = Systems.from_atoms(atoms)
        answer = charges(table).solve(systems, polarizability=True)
        assert answer.polarizability is not None
        labels = {"dipole": answer.dipole[0], "polarizability": answer.polarizability[0]}
        out.append(Target(systems, labels, torch.zeros(0, 3, dtype=torch.float64)))
    return out


WEIGHTS = {"dipole": 1.0, "polarizability": 1.0, "born_charges": 0.0}


def test_parameters_are_found_again() -> None:
    start = {symbol: row._replace(chi=START[symbol].chi, K=START[symbol].K) for symbol, row in HIDDEN.items()}
    fit = ChargeFit(charges(start), synthetic(), WEIGHTS, trained=["chi", "K"], prior=0.0)
    assert min(fit(gradient=False)[1].values()) > 0.01
    found = fit.fit(steps=40, tolerance=1e-3).table
    assert max(fit(gradient=False)[1].values()) < 1e-3
    # where charges add up to nothing only differences of χ count
    assert found["O"].chi - found["H"].chi == pytest.approx(HIDDEN["O"].chi - HIDDEN["H"].chi, rel=0.01)
    for symbol, row in HIDDEN.items():
        assert pytest.approx(row.K, rel=0.02) == found[symbol].K


def test_only_what_is_trained_changes() -> None:
    result = ChargeFit(charges(START), synthetic()[::2], WEIGHTS, trained=["K"]).fit(steps=3)
    for symbol, row in START.items():
        assert result.table[symbol] == row._replace(K=result.table[symbol].K)
        assert abs(result.table[symbol].K / row.K - 1) > 1e-3


def test_a_prior_holds_the_table() -> None:
    free, held = (ChargeFit(charges(START), synthetic()[::2], WEIGHTS, prior=p).fit(steps=15) for p in (0.0, 100.0))
    moved = [abs(np.log(np.array(r.table["O"][1:]) / START["O"][1:])).max() for r in (free, held)]
    assert moved[1] < 0.02 < moved[0]


def test_a_fit_goes_on_where_it_stopped(tmp_path: Path) -> None:
    targets = synthetic()[::2]
    whole = ChargeFit(charges(START), targets, WEIGHTS).fit(steps=6)
    ChargeFit(charges(START), targets, WEIGHTS, folder=tmp_path).fit(steps=3)
    kept = read_parameters(tmp_path / "charges.csv")
    second = ChargeFit(charges(START), targets, WEIGHTS, folder=tmp_path)
    steps: list[int] = []
    result = second.fit(steps=6, report=lambda step, loss, errors: steps.append(step))
    assert steps == [4, 5, 6]
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    for symbol, row in whole.table.items():
        np.testing.assert_allclose(result.table[symbol], row, rtol=1e-5)
        assert kept[symbol] != row
    with pytest.raises(InputError, match=r"begun with other charges\.fit\.prior: give another output folder"):
        ChargeFit(charges(START), targets, WEIGHTS, prior=1.0, folder=tmp_path).fit()


def test_steps_to_where_nothing_is_stable_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ChargeFit(charges(START), synthetic()[::2], WEIGHTS)
    plain, calls = ChargeFit.__call__, []

    def sometimes(self: ChargeFit, *, gradient: bool = True) -> tuple[float, dict[str, float]]:
        calls.append(1)
        if len(calls) == 2:
            raise NoStablePointError("polarization catastrophe")
        return plain(self, gradient=gradient)

    before = fit(gradient=False)[0]
    monkeypatch.setattr(ChargeFit, "__call__", sometimes)
    result = fit.fit(steps=2)
    assert result.steps == 2
    assert result.gradients > 3
    assert result.loss < before


def sample(systems: Systems, **observed: np.ndarray) -> Sample:
    empty = torch.zeros(2, 0, dtype=torch.int64)
    forces = torch.zeros_like(systems.positions)
    return Sample("data", "set.xyz", 0, systems, empty, forces[:0], 0.0, forces, observed=observed)


def test_labels_of_cells_charged_frames_and_fields() -> None:
    """A dipole counts modulo e times lattice vectors, not at all where it depends on the origin."""
    model = PQEq(parameters=START, conserve="fragments", response="all")
    systems = Systems.from_atoms(dimer(cell=True))
    dipole = model.solve(assign_fragments(systems)).dipole[0].numpy()
    label = dipole + 0.01 + 3 * systems.cell[0, 1].numpy() - systems.cell[0, 2].numpy()
    (target,) = make_targets(model, [sample(systems, dipole=label), sample(systems)])
    fit = ChargeFit(model, [target], {"dipole": 1.0}, prior=0.0)
    error = fit(gradient=False)[1]["dipole"] * np.linalg.norm(label)
    assert error == pytest.approx(0.01 * np.sqrt(3), rel=1e-5)
    ion = Systems.from_atoms(dimer(cell=False), net_charge=1.0)
    assert make_targets(charges(START), [sample(ion, dipole=dipole)]) == []
    (only,) = make_targets(charges(START), [sample(ion, dipole=dipole, polarizability=np.eye(3))])
    assert list(only.labels) == ["polarizability"]
    field = sample(Systems.from_atoms(dimer(cell=False), field=[0.0, 0.0, 0.1]), dipole=dipole)
    with pytest.raises(InputError, match=r"set\.xyz, frame 0: is in a field, but charges\.response is shells"):
        make_targets(PQEq(parameters=START), [field])


def test_what_cannot_be_fitted_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no frame has such a label"):
        ChargeFit(charges(START), synthetic(), {"born_charges": 1.0})
    with pytest.raises(InputError, match="no PQEq parameters for O: add a row"):
        ElementTable({"H": START["H"]}, ["H", "O"])
    with pytest.raises(InputError, match="R of H is 5, and a fit keeps it between"):
        ElementTable({"H": START["H"]._replace(R=5.0)}, ["H"])
    slab = Systems.from_atoms(Atoms("OHH", molecule("H2O").positions, cell=[6, 6, 0], pbc=[True, True, False]))
    with pytest.raises(InputError, match="clusters and to cells periodic in all three directions"):
        ExplicitFunctional(Functional(charges(START), slab))
    write_table(tmp_path / "table.csv", HIDDEN)
    assert read_parameters(tmp_path / "table.csv") == HIDDEN
