"""The solver on functionals whose answers are known, and charge equilibration that relies on it.

Every boundary of the Coulomb sum: derivatives, batches, symmetries of slabs, the cost of large cells.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal

from voltpi.potential.electrostatics import ewald, kernel_cache, solver
from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, PQEq, read_parameters
from voltpi.potential.electrostatics.solver import Segments, conjugate_gradients, linear_solve, minimize
from voltpi.potential.errors import InputError, NoStablePointError, NotConvergedError
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.systems import Systems

from structures import one_atom_cell, rattled_salt, water_box, water_dimer

FIELD = (0.05, -0.1, 0.07)
TABLE = read_parameters()


# -- functionals with known answers ----------------------------------------------------------------------------------


class Landscape:
    """Σ over structures of ½ yᵀ H y − bᵀ y + ¼ c Σ y⁴ with a dense H of each; the first column keeps its sum.

    ``wrong`` is the relative error of ``product``. The functional is defined where all of Δ is less than ``bound``.
    ``dense``: the Hessian itself is at hand.
    """

    def __init__(self, hessians, forces, quartic=0.0, wrong=0.0, bound=math.inf, dense=False):
        counts = [len(f) for f in forces]
        batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.segments = Segments(batch, len(counts))
        self.hessians, self.force = hessians, torch.cat(forces)
        self.sizes = counts
        self.quartic = torch.as_tensor(quartic, dtype=torch.float64).expand(len(counts))[batch][:, None]
        self.bound, self.dense, self.evaluations = bound, dense, 0
        self.diagonal = torch.cat([h.diagonal() for h in hessians]).reshape(-1, 4).abs().clamp(min=1e-3)
        generator, self.errors = torch.Generator().manual_seed(1), []
        for h, d in zip(hessians, self.diagonal.split(counts), strict=True):
            noise = torch.randn(h.shape, generator=generator, dtype=torch.float64)
            scale = d.reshape(-1).sqrt()
            self.errors.append(wrong * 0.5 * (noise + noise.T) * scale[:, None] * scale)

    def at(self, y):
        assert not bool((y[:, 1:].abs() >= self.bound).any())
        self.evaluations += 1
        return LandscapePoint(self, y)

    def times(self, matrices, y):
        """Every structure's matrix times its part of y."""
        parts = zip(matrices, y.split(self.sizes), strict=True)
        return torch.cat([(m @ part.reshape(-1)).reshape(part.shape) for m, part in parts])

    def _mean(self, values):
        weight = 1 / self.diagonal[:, 0]
        return self.segments.spread(self.segments.sum(weight * values) / self.segments.sum(weight))[:, 0]

    def project(self, gradient):
        out = gradient.clone()
        out[:, 0] -= self._mean(gradient[:, 0])
        return out

    def precondition(self, residual):
        out = residual / self.diagonal
        out[:, 0] = (residual[:, 0] - self._mean(residual[:, 0])) / self.diagonal[:, 0]
        return out

    def constraints(self):
        rows = torch.zeros(self.segments.count, len(self.force), 4, dtype=torch.float64)
        rows[self.segments.batch, torch.arange(len(self.force)), 0] = 1
        return rows.reshape(self.segments.count, -1)

    def scale(self, direction):
        return self.diagonal * direction

    def largest_step(self, y, direction):
        d = direction[:, 1:]
        room = torch.where(d > 0, self.bound - y[:, 1:], self.bound + y[:, 1:])
        return self.segments.smallest((room / d.abs().clamp(min=1e-300)).amin(1))

    def start(self):
        return torch.zeros_like(self.force)


class LandscapePoint:
    """Energy and derivatives of a ``Landscape``."""

    def __init__(self, landscape, y):
        self.landscape, self.y = landscape, y
        hy = landscape.times(landscape.hessians, y)
        values = 0.5 * y * hy - landscape.force * y + 0.25 * landscape.quartic * y**4
        self.energy = landscape.segments.sum(values)
        self.gradient = hy - landscape.force + landscape.quartic * y**3

    def linearize(self):
        self.curved = 3 * self.landscape.quartic * self.y**2

    def product(self, direction):
        return self.exact_product(direction) + self.landscape.times(self.landscape.errors, direction)

    def exact_product(self, direction):
        return self.landscape.times(self.landscape.hessians, direction) + self.curved * direction

    def matrix(self):
        if not self.landscape.dense:
            return None
        return torch.block_diag(*self.landscape.hessians) + torch.diag(self.curved.reshape(-1))


def random_hessian(n, stiffness, condition, seed):
    """Symmetric and positive, [4n, 4n], eigenvalues from ``stiffness`` to ``condition`` times that."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(4 * n, 4 * n, generator=generator, dtype=torch.float64))
    return (turn * torch.logspace(0, math.log10(condition), 4 * n, dtype=torch.float64)) @ turn.T * stiffness


def random_forces(n, size, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return size * torch.randn(n, 4, generator=generator, dtype=torch.float64)


def constrained(hessian, right):
    """x [n, 4] of H x = right on the surface where the first column sums to zero, and the multiplier, directly."""
    n = len(right)
    bordered = torch.zeros(4 * n + 1, 4 * n + 1, dtype=torch.float64)
    bordered[:-1, :-1] = hessian
    bordered[-1, :-1:4] = bordered[:-1:4, -1] = 1
    solved = torch.linalg.solve(bordered, torch.cat([right.reshape(-1), right.new_zeros(1)]))
    return solved[:-1].reshape(n, 4)


STIFFNESS = (1e-2, 1.0, 300.0)  # of three structures in one batch
SIZES = (2, 5, 3)


def quadratic(wrong=0.0):
    hessians = [random_hessian(n, k, 30.0, s) for s, (n, k) in enumerate(zip(SIZES, STIFFNESS, strict=True))]
    forces = [random_forces(n, k, s) for s, (n, k) in enumerate(zip(SIZES, STIFFNESS, strict=True))]
    return hessians, forces, Landscape(hessians, forces, wrong=wrong)


def test_a_quadratic_functional_of_three_stiffnesses():
    hessians, forces, landscape = quadratic()
    found = minimize(landscape, landscape.start(), tolerance=1e-11)
    assert found.converged.tolist() == [True] * 3
    assert float(found.residual.max()) < 1e-11
    for k, y in enumerate(found.y.split(SIZES)):
        assert torch.allclose(y, constrained(hessians[k], forces[k]), atol=1e-11 / STIFFNESS[k] * 3)
        assert float(y[:, 0].sum()) == pytest.approx(0.0, abs=1e-13)
        alone = Landscape(hessians[k : k + 1], forces[k : k + 1])
        one = minimize(alone, alone.start(), tolerance=1e-11)
        assert torch.allclose(one.y, y, atol=1e-14)
        assert abs(int(one.products) - int(found.products[k])) <= 2
    assert not bool(found.negative_curvature.any())


@pytest.mark.parametrize("structure", range(3))
def test_a_hessian_at_hand_gives_the_same(structure):
    """Newton steps by a factor of the bordered Hessian: one product each; the same point, and the same response."""
    hessians, forces, _ = quadratic()
    found = {}
    for dense in (False, True):
        landscape = Landscape(
            hessians[structure : structure + 1], forces[structure : structure + 1], quartic=STIFFNESS[structure],
            dense=dense,
        )  # fmt: skip
        answer = minimize(landscape, landscape.start(), tolerance=1e-11)
        assert answer.converged.tolist() == [True]
        assert answer.negative_curvature.tolist() == [False]
        right = random_forces(SIZES[structure], 1.0, 7)
        solved = linear_solve(answer.point, landscape, right, tolerance=1e-11)
        assert solved.converged.tolist() == [True]
        assert float(solved.x[:, 0].sum()) == pytest.approx(0.0, abs=1e-12 / STIFFNESS[structure])
        found[dense] = answer.y, solved.x, int(answer.products)
    scale = 1 / STIFFNESS[structure]
    assert torch.allclose(found[True][0], found[False][0], atol=1e-10 * scale)
    assert torch.allclose(found[True][1], found[False][1], atol=1e-9 * scale)
    assert found[True][2] < found[False][2]


@pytest.mark.parametrize("soft", [1e-6, -1e-6])
def test_a_hessian_at_hand_tells_a_saddle_from_a_minimum(soft):
    """A mode that is barely stable, or barely not: by its factor or by what is tried without one."""
    hessian, force = double_well(depth=-soft, quartic=1e-4)
    landscape = Landscape([hessian], [force], quartic=1e-4, dense=True)
    landscape.diagonal[1, 2] = 1e-6
    found = minimize(landscape, landscape.start(), tolerance=1e-13)
    assert found.converged.tolist() == [True]
    assert abs(float(found.y[1, 2])) == pytest.approx(0.0 if soft > 0 else 0.1, abs=1e-6)


def test_a_batch_takes_as_many_evaluations_as_its_slowest_member():
    hessians, forces, landscape = quadratic()
    minimize(landscape, landscape.start(), tolerance=1e-11)
    alone = []
    for h, f in zip(hessians, forces, strict=True):
        single = Landscape([h], [f])
        minimize(single, single.start(), tolerance=1e-11)
        alone.append(single.evaluations)
    assert landscape.evaluations == max(alone)


def test_converged_structures_stay_where_they_are():
    hessians, forces, landscape = quadratic()
    known = [constrained(h, f) for h, f in zip(hessians, forces, strict=True)]
    start = torch.cat([known[0], torch.zeros_like(known[1]), known[2]])
    found = minimize(landscape, start, tolerance=1e-9, check=False)
    assert bool(found.converged.all())
    y = found.y.split(SIZES)
    assert torch.equal(y[0], known[0])
    assert torch.equal(y[2], known[2])
    assert found.products.tolist()[::2] == [0, 0]
    assert torch.allclose(y[1], known[1], atol=1e-8)


def test_quartic_functionals_from_far_away():
    """Stationary, each with its own stiffness, and never outside of where the functional is defined."""
    hessians, forces, _ = quadratic()
    landscape = Landscape(hessians, [5 * f for f in forces], quartic=[0.1, 10.0, 0.0], bound=40.0)
    start = landscape.start()
    start[:, 1:] = 39.0
    found = minimize(landscape, start, tolerance=1e-10)
    assert found.converged.tolist() == [True] * 3
    gradient = landscape.project(found.point.gradient)
    assert float(gradient.abs().max()) < 1e-10
    assert found.residual.tolist() == landscape.segments.largest(gradient).tolist()


class Chain:
    """Σ √(1 + y²) − b y over shells of structures of one atom each: Newton's full step runs away from |y| > 1."""

    def __init__(self, slopes):
        self.slopes = torch.tensor(slopes, dtype=torch.float64)
        self.segments = Segments(torch.arange(len(slopes)), len(slopes))

    def at(self, y):
        return ChainPoint(self, y)

    def project(self, gradient):
        out = gradient.clone()
        out[:, 0] = 0
        return out

    precondition = project

    def scale(self, direction):
        return direction

    def largest_step(self, y, direction):
        return torch.full((len(y),), torch.inf, dtype=torch.float64)


class ChainPoint:
    def __init__(self, chain, y):
        root = (1 + y.square()).sqrt()
        self.energy = chain.segments.sum((root - chain.slopes[:, None] * y)[:, 1:])
        self.gradient, self.second = y / root - chain.slopes[:, None], root**-3

    def linearize(self):
        pass

    def product(self, direction):
        return self.second * direction

    exact_product = product

    def matrix(self):
        return None


def test_the_line_search_holds_newton_back():
    chain = Chain([0.0, 0.5, -0.9, 0.0])
    start = torch.zeros(4, 4, dtype=torch.float64)
    start[:, 1:] = torch.tensor([[2.0], [-4.0], [3.0], [0.0]])
    found = minimize(chain, start, tolerance=1e-11)
    assert bool(found.converged.all())
    expected = chain.slopes / (1 - chain.slopes.square()).sqrt()
    assert torch.allclose(found.y[:, 1:], expected[:, None].expand(-1, 3), atol=1e-9)


def double_well(depth=1.0, quartic=4.0, atoms=3):
    """−½ depth y² + ¼ quartic y⁴ in one shell coordinate (minima at ±√(depth/quartic)), convex in all others."""
    hessian = torch.eye(4 * atoms, dtype=torch.float64) * 2.0
    hessian[6, 6] = -depth
    return hessian, torch.zeros(atoms, 4, dtype=torch.float64)


def test_a_saddle_point_is_left_and_only_there():
    """A double well on its ridge, where the gradient vanishes, next to a convex structure at its minimum."""
    hessian, force = double_well()
    convex = torch.eye(8, dtype=torch.float64)
    landscape = Landscape([hessian, convex], [force, force[:2]], quartic=[4.0, 1.0])
    ridge = minimize(landscape, landscape.start(), tolerance=1e-10, check=False)
    assert bool(ridge.converged.all())  # the gradient vanishes
    assert not ridge.y.any()
    found = minimize(landscape, landscape.start(), tolerance=1e-10)
    assert found.converged.tolist() == [True, True]
    assert abs(float(found.y[1, 2])) == pytest.approx(0.5, abs=1e-9)
    assert found.point.energy.tolist() == pytest.approx([-0.0625, 0.0], abs=1e-12)
    assert not found.y[3:].any()
    assert float(found.y.abs().sum()) == pytest.approx(0.5, abs=1e-8)


def test_the_last_saddle_point_that_may_be_left_counts(monkeypatch):
    """With one escape allowed, the minimum behind the only saddle point is an answer."""
    monkeypatch.setattr(solver, "_ESCAPES", 1)
    hessian, force = double_well()
    landscape = Landscape([hessian], [force], quartic=4.0)
    found = minimize(landscape, landscape.start(), tolerance=1e-10)
    assert abs(float(found.y[1, 2])) == pytest.approx(0.5, abs=1e-9)
    assert found.converged.tolist() == [True]


def test_negative_curvature_that_only_the_approximation_sees():
    """A soft but positive mode that ``product`` makes negative: no direction leads down, the point stands."""
    hessian, force = double_well(depth=-1e-4)
    landscape = Landscape([hessian], [force])
    landscape.errors[0][6, 6] = -2e-4
    landscape.diagonal[1, 2] = 2.0
    found = minimize(landscape, landscape.start(), tolerance=1e-10)
    assert found.converged.tolist() == [True]
    assert not found.y.any()


@pytest.mark.parametrize("force", [0.0, 0.3], ids=["at the saddle", "on the slope"])
def test_an_indefinite_functional_is_reported(force):
    """Without a quartic term nothing ends the way down; the structure beside it is answered."""
    hessian, zero = double_well()
    landscape = Landscape([hessian, torch.eye(8, dtype=torch.float64)], [zero + force, zero[:2] + 0.1])
    found = minimize(landscape, landscape.start(), tolerance=1e-10)
    assert found.converged.tolist() == [False, True]
    assert found.negative_curvature.tolist() == [True, False]
    expected = constrained(torch.eye(8, dtype=torch.float64), zero[:2] + 0.1)
    assert torch.allclose(found.y[3:], expected, atol=1e-10)


def test_a_structure_that_turns_to_nan_leaves_the_others_alone():
    hessians, forces, _ = quadratic()
    for broken in (0, 1, 2):
        spoilt = [f.clone() for f in forces]
        spoilt[broken][1, 2] = math.nan
        landscape = Landscape(hessians, spoilt)
        found = minimize(landscape, landscape.start(), tolerance=1e-9)
        assert found.converged.tolist() == [k != broken for k in range(3)]
        assert math.isnan(float(found.residual[broken]))
        for k, y in enumerate(found.y.split(SIZES)):
            if k != broken:
                assert torch.allclose(y, constrained(hessians[k], forces[k]), atol=1e-6)


def test_conjugate_gradients_stop_where_the_curvature_turns():
    """At the first step the direction itself is handed back, later the iterate so far; both lead downhill."""
    hessian, zero = double_well()
    right = zero.clone()
    right[1, 2] = 1.0  # straight along the negative mode
    landscape = Landscape([hessian, torch.eye(8, dtype=torch.float64)], [zero, zero[:2]])
    point = landscape.at(landscape.start())
    point.linearize()
    both = torch.cat([right, zero[:2] + 1.0])
    for size in (1.0, 1e-3):
        answer = conjugate_gradients(point, landscape, size * both, torch.tensor([1e-12, 1e-12], dtype=torch.float64))
        assert answer.negative_curvature.tolist() == [True, False]
        assert answer.converged.tolist() == [False, True]
        assert float((answer.x * size * both).sum()) > 0
        assert torch.allclose(answer.x[:3], landscape.precondition(size * both)[:3])
    mixed = right.clone()
    mixed[0, 1:] = 5.0
    later = conjugate_gradients(point, landscape, torch.cat([mixed, zero[:2]]), both.new_tensor([1e-12, 1e-12]))
    assert bool(later.negative_curvature[0])
    assert int(later.products[0]) > 1
    assert float((later.x * torch.cat([mixed, zero[:2]])).sum()) > 0


@pytest.mark.parametrize("wrong", [0.0, 1e-3])
def test_linear_equations_are_solved_to_the_end_with_an_approximate_hessian(wrong):
    """A product that is wrong by 1e-3 costs rounds, not digits."""
    hessians, _, landscape = quadratic(wrong)
    right = torch.cat([random_forces(n, 1.0, 50 + n) for n in SIZES])
    point = landscape.at(landscape.start())
    point.linearize()
    answer = linear_solve(point, landscape, right, tolerance=1e-12)
    assert answer.converged.tolist() == [True] * 3
    for k, (x, r) in enumerate(zip(answer.x.split(SIZES), right.split(SIZES), strict=True)):
        assert torch.allclose(x, constrained(hessians[k], r), rtol=1e-9, atol=3e-12 / STIFFNESS[k])
    if wrong:
        once = conjugate_gradients(point, landscape, right, torch.full((3,), 1e-12, dtype=torch.float64))
        off = landscape.segments.largest(landscape.project(right - point.exact_product(once.x)))
        assert float(off.min()) > 1e-6  # conjugate gradients alone keep the product's error


def test_linear_equations_of_a_saddle_point_are_refused_for_it_alone():
    hessian, zero = double_well()
    landscape = Landscape([hessian, torch.eye(8, dtype=torch.float64)], [zero, zero[:2]])
    point = landscape.at(landscape.start())
    point.linearize()
    right = torch.cat([zero, zero[:2]])
    right[:, 1:] = torch.linspace(0.1, 1, 15, dtype=torch.float64).reshape(5, 3)
    answer = linear_solve(point, landscape, right, tolerance=1e-11)
    assert answer.negative_curvature.tolist() == [True, False]
    assert answer.converged.tolist() == [False, True]
    assert torch.allclose(answer.x[3:, 1:], right[3:, 1:], atol=1e-10)


# -- derivatives of the equilibrated energy --------------------------------------------------------------------------


def slab_of(atoms, axis=2):
    """The same cell, open along one of its vectors."""
    atoms = atoms.copy()
    atoms.pbc = [d != axis for d in range(3)]
    return atoms


def magnesia_cell():
    """Two atoms in a cell of 2.98 Å, smaller than the window."""
    atoms = bulk("MgO", "rocksalt", 4.21)
    atoms.rattle(0.1, seed=3)
    return atoms


BUILT = {
    "periodic": (water_box, 0.0),
    "periodic, charged": (rattled_salt, 0.5),
    "slab": (lambda: slab_of(water_box()), 0.0),
    "slab, charged": (lambda: slab_of(water_box(), 0), 1.0),
    "slab of one atom": (lambda: slab_of(one_atom_cell()), 0.4),
    "cluster": (water_dimer, 0.0),
    "cluster, charged": (water_dimer, -1.0),
    "smaller than the window": (magnesia_cell, 0.0),
    "one atom": (one_atom_cell, 1.0),
}
SETTINGS = [
    ("periodic", "total", "shells", True),
    ("periodic", "total", "shells", False),
    ("periodic", "total", "all", False),
    ("periodic", "total", "frozen", True),
    ("periodic", "fragments", "all", True),
    ("periodic, charged", "total", "shells", True),
    ("slab", "total", "all", True),
    ("slab", "total", "shells", False),
    ("slab", "fragments", "all", True),
    ("slab", "fragments", "shells", True),
    ("slab, charged", "total", "shells", True),
    ("slab, charged", "total", "all", True),
    ("slab of one atom", "total", "shells", True),
    ("cluster", "total", "all", True),
    ("cluster", "fragments", "shells", True),
    ("cluster, charged", "total", "all", False),
    ("smaller than the window", "total", "shells", True),
    ("one atom", "total", "shells", True),
]


def normal_of(atoms):
    """Unit vector along the open direction of a slab."""
    out = np.cross(*atoms.cell.array[atoms.pbc])
    return out / np.linalg.norm(out)


@pytest.fixture
def on_a_mesh(monkeypatch):
    """Clusters on the mesh, however few their atoms."""
    monkeypatch.setattr(ewald, "DIRECT_BELOW", 0)


@pytest.mark.usefixtures("on_a_mesh")
@pytest.mark.parametrize(("name", "conserve", "response", "in_field"), SETTINGS)
def test_every_answer_is_a_derivative(name, conserve, response, in_field):
    """Forces, virial, dipole, Born charges and polarizability along random directions, by differences of 4th order."""
    build, net = BUILT[name]
    atoms = build()
    model = PQEq(conserve=conserve, response=response, accuracy=1e-10, tolerance=1e-11)
    field = np.array(FIELD) * in_field
    directions = np.ones((3, 3))
    bound = response == "all" and conserve == "total"  # charge must not flow along a periodic direction
    if bound and atoms.pbc.any():
        across = normal_of(atoms) if not atoms.pbc.all() else np.zeros(3)
        field, directions = (field @ across) * across, np.tile(across, (3, 1))
    system = Systems.from_atoms(atoms, field=field, net_charge=net)
    if conserve == "fragments":
        system = assign_fragments(system)
    if response != "all":
        system = system.replace(carried=model.solve(system.replace(field=0 * system.field)).charges)
    answer = model.solve(system, born_charges=True, polarizability=True)
    start = (answer.charges, answer.shells)
    rng = np.random.default_rng(0)

    def slopes(change, h):
        """Derivatives of energy and dipole with the step of ``change``."""
        ends = [model.solve(change(k * h), start=start) for k in (-2, -1, 1, 2)]
        pairs = [(e.energy[0], e.dipole[0]) for e in ends]
        return [(8 * (c - b) - (d - a)) / (12 * h) for a, b, c, d in zip(*pairs, strict=True)]

    step = torch.tensor(rng.normal(size=(len(atoms), 3)))
    energy, dipole = slopes(lambda h: system.replace(positions=system.positions + h * step), 2e-3)
    force = float((answer.forces * step).sum())
    assert -energy.item() == pytest.approx(force, rel=1e-7, abs=1e-8)
    born = torch.einsum("nab,nb->a", answer.born_charges, step)
    assert dipole.tolist() == pytest.approx(born.tolist(), rel=1e-7, abs=1e-7)
    if atoms.pbc.any():
        strain = torch.tensor(rng.normal(size=(3, 3)))
        strain = 0.5 * (strain + strain.T)
        if bound and in_field and not atoms.pbc.all():  # the field must stay normal to the slab
            away = torch.tensor(np.eye(3) - np.outer(across, across))
            strain = away @ strain @ away + 0.3 * (torch.eye(3, dtype=torch.float64) - away)

        def strained(h):
            turn = torch.eye(3, dtype=torch.float64) + h * strain
            return system.replace(positions=system.positions @ turn, cell=system.cell @ turn)

        energy, _ = slopes(strained, 1e-3)
        virial = float((answer.virial[0] * strain).sum())
        assert -energy.item() == pytest.approx(virial, rel=1e-7, abs=1e-7)
    if not bound or not atoms.pbc.all():
        push = torch.tensor(directions[0] * rng.normal(size=3) if not bound else directions[0])
        energy, dipole = slopes(lambda h: system.replace(field=system.field + h * push), 5e-4)
        assert -energy.item() == pytest.approx(float(answer.dipole[0] @ push), rel=1e-7, abs=1e-8)
        moved = answer.polarizability[0] @ push
        found = dipole * COULOMB_CONSTANT
        if bound:  # other components of a dipole that charge flow would make infinite
            moved, found = moved @ push, found @ push
        assert found.tolist() == pytest.approx(moved.tolist(), rel=1e-7, abs=1e-6)
    # the sum rule: all atoms together move as the net charge does
    total = net * np.eye(3) if response == "all" else system.carried.sum().item() * np.eye(3)
    assert answer.born_charges.sum(0).numpy() == pytest.approx(total, abs=1e-8)


# -- slabs -----------------------------------------------------------------------------------------------------------


def solved(atoms, net, accuracy=1e-8):
    return PQEq(accuracy=accuracy, tolerance=1e-10).solve(Systems.from_atoms(atoms, net_charge=net))


def assert_same(one, two, accuracy=1e-8, turn=None):
    """Energy, forces, charges and virial, to what the accuracy allows; ``turn`` permutes the axes of the second."""
    turn = np.eye(3) if turn is None else turn
    forces = one.forces.numpy()
    scale = np.sqrt((forces**2).sum(1).mean())
    assert two.energy.item() == pytest.approx(one.energy.item(), abs=accuracy * max(1.0, abs(one.energy.item())))
    assert np.sqrt(((two.forces.numpy() @ turn - forces) ** 2).sum(1).mean()) < 2 * accuracy * scale
    assert two.charges.numpy() == pytest.approx(one.charges.numpy(), abs=10 * accuracy)
    virial = one.virial[0].numpy()
    assert turn.T @ two.virial[0].numpy() @ turn == pytest.approx(virial, abs=10 * accuracy * np.abs(virial).max())


@pytest.mark.parametrize("net", [0.0, 1.0])
def test_a_slab_does_not_know_its_third_vector(net):
    atoms = slab_of(water_box())
    reference = solved(atoms, net)
    for third in ([0, 0, 30.0], [3.0, -4.0, 7.0], [20.0, 1.0, 0.3], [0.1, 0.0, -9.0]):
        other = atoms.copy()
        other.cell[2] = third
        assert_same(reference, solved(other, net))


@pytest.mark.parametrize("net", [0.0, -1.0])
def test_a_slab_may_be_anywhere_along_its_normal(net):
    atoms = slab_of(water_box(), 1)
    reference = solved(atoms, net)
    for shift in (0.37, -8.1, 1234.5):
        other = atoms.copy()
        other.positions += shift * normal_of(atoms)
        assert_same(reference, solved(other, net))


@pytest.mark.parametrize("net", [0.0, 1.0])
def test_a_strongly_oblique_cell_of_a_slab_is_the_same_slab(net):
    """b + 4a spans the same lattice at 13° to a; an atom may be in any of its cells."""
    atoms = slab_of(water_box())
    other = atoms.copy()
    other.cell[1] = other.cell[1] + 4 * other.cell[0]
    angle = np.degrees(np.arccos(other.cell[0] @ other.cell[1] / np.prod(np.linalg.norm(other.cell[:2], axis=1))))
    assert angle < 15
    assert_same(solved(atoms, net), solved(other, net))
    images = np.random.default_rng(1).integers(-3, 4, size=(len(atoms), 2)) @ other.cell.array[:2]
    other.positions += images
    assert_same(solved(atoms, net), solved(other, net))


@pytest.mark.parametrize("net", [0.0, 1.0])
def test_slabs_open_along_any_axis_agree(net):
    atoms = slab_of(water_box())
    reference = solved(atoms, net)
    for order in ([1, 2, 0], [2, 0, 1], [0, 2, 1]):  # the last one is a reflection
        turn = np.eye(3)[order]
        other = atoms.copy()
        other.positions = atoms.positions @ turn.T
        other.set_cell((atoms.cell.array @ turn.T)[order])
        other.pbc = atoms.pbc[order]
        assert_same(reference, solved(other, net), turn=turn)


def test_a_slab_is_the_limit_of_a_cell_with_much_vacuum():
    """Against three periodic directions with the field between images of the dipole taken off (Yeh and Berkowitz).

    Neutral: E(slab) = E(periodic) + 2π k_e M_z²/V, as all but the dipole's terms fall off exponentially.
    """
    atoms = slab_of(water_box())
    atoms.set_cell(np.diag([6.5, 6.0, 45.0]))
    system = Systems.from_atoms(atoms)
    model = PQEq(accuracy=1e-9, tolerance=1e-11)
    slab = model.solve(system)
    operators = [
        ewald.CoulombOperator(s, model.tensors(s)["alpha"], -model.tensors(s)["Z"], accuracy=1e-9, k_e=COULOMB_CONSTANT)
        for s in (system, system.replace(pbc=torch.ones_like(system.pbc)))
    ]
    energies = [o.at(slab.charges, slab.shells).energy.item() for o in operators]
    correction = 2 * math.pi * COULOMB_CONSTANT * float(slab.dipole[0, 2]) ** 2 / atoms.get_volume()
    assert abs(correction) > 1e-4
    assert energies[0] == pytest.approx(energies[1] + correction, abs=1e-7)


# -- batches ---------------------------------------------------------------------------------------------------------


def mixed_batch(conserve="total", field=None):
    """An open molecule, two cells of different shape, a slab, and three replicas of one cell."""
    replicas = []
    for seed in range(3):
        replicas.append(water_box())
        replicas[-1].rattle(0.05, seed=seed)
    frames = [water_dimer(), rattled_salt(), slab_of(water_box(), 1), *replicas, one_atom_cell()]
    nets = [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0]
    if conserve == "fragments":
        frames, nets = frames[:1] + frames[2:6], nets[:1] + nets[2:6]
    parts = [Systems.from_atoms(a, net_charge=q, field=field) for a, q in zip(frames, nets, strict=True)]
    if conserve == "fragments":
        parts = [assign_fragments(p) for p in parts]
    return parts


PER_ATOM = ("forces", "charges", "shells", "born_charges")
PER_STRUCTURE = ("energy", "virial", "dipole", "polarizability")


def assert_batch(together, alone, tolerance=1e-10):
    for name in (*PER_ATOM, *PER_STRUCTURE):
        found, expected = getattr(together, name), torch.cat([getattr(a, name) for a in alone])
        assert float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max())), name
    for name, term in together.terms.items():
        assert term.tolist() == pytest.approx([a.terms[name].item() for a in alone], abs=tolerance)


@pytest.mark.parametrize("mesh_everywhere", [False, True], ids=["molecules in pairs", "molecules on the mesh"])
@pytest.mark.parametrize(("conserve", "response"), [("total", "shells"), ("fragments", "all")])
def test_a_batch_of_different_structures_equals_them_one_by_one(conserve, response, mesh_everywhere, monkeypatch):
    if mesh_everywhere:
        monkeypatch.setattr(ewald, "DIRECT_BELOW", 0)
    model = PQEq(conserve=conserve, response=response, tolerance=1e-11)
    parts = mixed_batch(conserve)
    wanted = {"born_charges": True, "polarizability": True}
    cold = model.solve(Systems.join(parts))
    parts = [
        p.replace(carried=q, field=torch.tensor([FIELD], dtype=torch.float64))
        for p, q in zip(parts, cold.charges.split([p.n_atoms for p in parts]), strict=True)
    ]
    together = model.solve(Systems.join(parts), **wanted)
    assert_batch(together, [model.solve(p, **wanted) for p in parts])
    # the other way round, and started from these answers after a small step
    sizes = [p.n_atoms for p in parts]
    moved = [p.replace(positions=p.positions + 2e-3 * torch.sin(17 * p.positions)) for p in parts]
    warm = model.solve(Systems.join(moved), start=(together.charges, together.shells), **wanted)
    starts = zip(together.charges.split(sizes), together.shells.split(sizes), strict=True)
    assert_batch(warm, [model.solve(m, start=s, **wanted) for m, s in zip(moved, starts, strict=True)])
    assert_batch(warm, [model.solve(m, **wanted) for m in moved], tolerance=1e-9)
    assert bool((warm.iterations <= together.iterations).all())
    reverse = model.solve(Systems.join(moved[::-1]), **wanted)
    assert reverse.energy.flip(0).tolist() == pytest.approx(warm.energy.tolist(), abs=1e-9)


def test_replicas_of_one_cell_share_a_mesh_and_differ_in_nothing():
    replicas = []
    for seed in range(8):
        replicas.append(water_box())
        replicas[-1].rattle(0.1, seed=seed)
    system = Systems.from_atoms(replicas)
    model = PQEq(tolerance=1e-11)
    table = model.tensors(system)
    operator = ewald.CoulombOperator(system, table["alpha"], -table["Z"], accuracy=1e-6, k_e=COULOMB_CONSTANT)
    assert len(operator.meshes) == 1
    wanted = {"born_charges": True, "polarizability": True}
    system = system.replace(carried=model.solve(system).charges, field=torch.tensor([FIELD] * 8, dtype=torch.float64))
    assert_batch(model.solve(system, **wanted), [model.solve(s, **wanted) for s in system.split()])


def test_structures_that_share_a_cell_but_not_their_atoms():
    """One mesh for all of them: each to the accuracy asked, whoever is beside it."""
    full, fewer, salt = water_box(), water_box()[:6], Atoms("NaCl", [[0, 0, 0], [2.6, 0.3, 0]])
    salt.set_cell(full.cell)
    salt.pbc = True
    parts = [Systems.from_atoms(a, net_charge=q) for a, q in ((full, 0.0), (fewer, 0.5), (salt, 0.0))]
    model = PQEq(accuracy=1e-9, tolerance=1e-11)
    together = model.solve(Systems.join(parts), born_charges=True, polarizability=True)
    alone = [model.solve(p, born_charges=True, polarizability=True) for p in parts]
    assert_batch(together, alone, tolerance=1e-7)


def test_slabs_that_share_a_cell_but_not_their_height():
    low, high = slab_of(water_box()), slab_of(water_box())
    high.positions[:3, 2] += 12.0
    parts = [Systems.from_atoms(a) for a in (low, high, low)]
    model = PQEq(accuracy=1e-9, tolerance=1e-11)
    together = model.solve(Systems.join(parts), born_charges=True, polarizability=True)
    assert_batch(together, [model.solve(p, born_charges=True, polarizability=True) for p in parts], tolerance=1e-7)


@pytest.mark.parametrize("place", [0, 2])
def test_the_structure_that_cannot_converge_is_named(place):
    """Springs of sulfur thirty times too soft, in one structure of three."""
    soft = {**TABLE, "S": TABLE["O"]._replace(K=0.03 * TABLE["O"].K)}
    spoilt = water_box()
    spoilt.symbols[[0, 3, 6]] = "S"
    frames = [water_dimer(), water_box(), slab_of(water_box())]
    frames.insert(place, spoilt)
    with pytest.raises(NoStablePointError, match=rf"atom \d \(\w+\) of structure {place}, whose") as info:
        PQEq(parameters=soft, limiter="none").solve(Systems.from_atoms(frames))
    assert "charges.limiter" in str(info.value)


def test_a_tolerance_below_rounding_is_reported():
    with pytest.raises(NotConvergedError, match="did not converge: residual"):
        PQEq(tolerance=1e-17).solve(Systems.from_atoms([Atoms("Ar", pbc=False), water_dimer()]))


def test_nan_in_a_start_is_an_answer_or_an_error():
    """Never a crash: what is NaN is found, and the structure is solved from nothing."""
    system = Systems.from_atoms([rattled_salt(), water_box()])
    model = PQEq()
    good = model.solve(system)
    charges, shells = good.charges.clone(), good.shells.clone()
    charges[3], shells[2, 1] = math.nan, math.nan
    again = model.solve(system, start=(charges, shells))
    assert again.energy.tolist() == pytest.approx(good.energy.tolist(), abs=1e-9)


def test_a_bad_start_of_one_structure_leaves_the_others_on_their_branch():
    """Of two opposite minima a warm start keeps its own, also beside a structure that must begin again.

    Ideal LiF with springs 33 times too soft: fluorine polarizes along a diagonal, or against it.
    """
    model = PQEq(parameters={k: p._replace(K=0.03 * p.K) for k, p in TABLE.items()})
    system = Systems.from_atoms(bulk("LiF", "rocksalt", 4.03, cubic=True))
    guess = torch.where(system.numbers == 9, -0.6, 0.6).double(), 0.07 * (system.numbers == 9).double()[:, None]
    one = model.solve(system, start=(guess[0], guess[1].expand(-1, 3)))
    assert float(one.dipole.norm()) > 0.3
    pair, expected = Systems.join([system, system]), torch.cat([one.dipole, -one.dipole])
    charges, shells = one.charges.repeat(2), torch.cat([one.shells, -one.shells])
    assert torch.allclose(model.solve(pair, start=(charges, shells)).dipole, expected, atol=1e-6)
    charges[1] = math.nan
    assert torch.allclose(model.solve(pair, start=(charges, shells)).dipole[1], expected[1], atol=1e-6)


def test_kernels_of_a_batch_of_different_cells_are_kept(monkeypatch):
    """A fixed cell costs its kernels once, however many structures are in the batch."""
    frames = []
    for k in range(6):
        frames.append(water_box())
        frames[-1].set_cell(frames[-1].cell.array * (1 + 0.03 * k), scale_atoms=True)
    system, model = Systems.from_atoms(frames), PQEq()
    first = model.solve(system)
    monkeypatch.setattr(kernel_cache, "Mesh", None)  # nothing may be built again
    assert model.solve(system).energy.tolist() == first.energy.tolist()


def test_one_periodic_direction_is_refused():
    atoms = water_box()
    atoms.pbc = [True, False, False]
    with pytest.raises(InputError, match="periodic in one direction only"):
        PQEq().solve(Systems.from_atoms(atoms))


# -- the cost of large cells -----------------------------------------------------------------------------------------


def oxide(kind, repeat, vacuum=0.0):
    """Rattled Li₂O or MgO."""
    if kind == "Li2O":
        atoms = crystal(["Li", "O"], [(0.25, 0.25, 0.25), (0, 0, 0)], spacegroup=225, cellpar=[4.62] * 3 + [90] * 3)
    else:
        atoms = bulk("MgO", "rocksalt", 4.21, cubic=True)
    atoms = atoms * repeat
    atoms.rattle(0.05, seed=1)
    atoms.set_cell(atoms.cell.array + np.diag([0, 0, vacuum]))
    return atoms


def products(atoms):
    """Hessian products of a cold start, and of the check that it is a minimum."""
    system = Systems.from_atoms(atoms)
    functional = Functional(PQEq(), system)
    found = minimize(functional, functional.start(None), tolerance=1e-8, check=False)
    assert bool(found.converged.all())
    return int(found.products)


@pytest.mark.parametrize(("kind", "small", "large"), [("Li2O", 1, 4), ("MgO", 2, 4)])
def test_products_hardly_grow_with_the_cell(kind, small, large):
    """12 and 768 atoms of Li₂O, 64 and 512 of MgO: long waves of charge are no slower than short ones."""
    assert products(oxide(kind, (large,) * 3)) <= 1.5 * products(oxide(kind, (small,) * 3)) + 1


def test_products_do_not_grow_along_a_long_cell():
    assert products(oxide("Li2O", (1, 1, 8))) <= 1.5 * products(oxide("Li2O", (1, 1, 3))) + 1


@pytest.mark.usefixtures("on_a_mesh")
@pytest.mark.parametrize(
    ("repeat", "pbc"),
    [((5, 5, 1), (True, True, False)), ((5, 5, 1), (True, True, True)), ((2, 2, 2), (False, False, False))],
    ids=["slab", "vacuum in the cell", "cluster"],
)
def test_vacuum_does_not_spoil_the_preconditioner(repeat, pbc, monkeypatch):
    """MgO, 21 Å wide under 20 Å of nothing, or in nothing: positive, and hardly slower than without the long waves."""
    atoms = oxide("MgO", repeat, vacuum=20.0)
    atoms.pbc = pbc
    functional = Functional(PQEq(), Systems.from_atoms(atoms))
    n = len(atoms)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        one = torch.zeros(n, 4, dtype=torch.float64)
        one[k, 0] = 1
        matrix[:, k] = functional.precondition(functional.project(one))[:, 0]
    values = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    with_waves = products(atoms)

    def local(functional, residual):
        shells = functional.inverse_shell[:, None] * residual[:, 1:]
        return torch.cat([functional._flow(residual[:, 0])[:, None], shells], dim=1)

    monkeypatch.setattr(Functional, "precondition", local)
    assert with_waves <= 1.3 * products(atoms)
    assert float(values[0]) > -1e-3 * float(values[-1])
