"""Electrodes: derivatives of the grand potential in every mode, equivalences, an independent solution, refusals."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from dataclasses import field as default

import numpy as np
import pytest
import scipy.linalg
import torch
from ase import Atoms

from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, FixedCharges, PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems

from exact_sums import site_sums

VACUUM_PERMITTIVITY = 1 / (4 * math.pi * COULOMB_CONSTANT)
"""e²/(eV Å)."""
METAL = Electrode("metal", "potential", eta=1.6)
SHARP = {"accuracy": 1e-10, "tolerance": 1e-11}


# -- small capacitors -------------------------------------------------------------------------------------------------


def plate(z, seed, rows=2):
    """Two rattled layers of ``rows`` × ``rows`` gold atoms above ``z`` (Å), in the oblique cell of ``capacitor``."""
    rng = np.random.default_rng(seed)
    grid = np.array(
        [[i + 0.5 * layer, j + 0.5 * layer, layer] for layer in (0, 1) for i in range(rows) for j in range(rows)]
    )
    positions = grid @ np.array([[2.9, 0.0, 0.0], [0.45, 2.8, 0.0], [0.0, 0.0, 2.0]])
    return Atoms("Au" * len(grid), positions + np.array([0.0, 0.0, z]) + rng.normal(0, 0.05, positions.shape))


def water(x, y, z):
    """One molecule with its oxygen there (Å)."""
    return Atoms("OH2", np.array([x, y, z]) + np.array([[0, 0, 0], [0.76, 0.1, 0.58], [-0.72, 0.15, 0.55]]))


ELECTROLYTES = {
    "vacuum": Atoms(),
    "ions": Atoms("NaClClNa", [[1.0, 1.2, 5.5], [3.6, 3.9, 6.2], [1.5, 1.0, 9.2], [4.4, 3.8, 9.9]]),
    "water": water(1.2, 1.2, 5.6) + water(3.9, 3.6, 8.5),
    "salt water": Atoms("Li", [[1.0, 1.2, 5.6]]) + water(3.9, 3.6, 7.6) + Atoms("Cl", [[1.4, 1.0, 9.6]]),
    "one ion": Atoms("Li", [[1.0, 1.2, 6.6]]) + water(3.9, 3.6, 7.6),
    "soft salt": Atoms("Na", [[1.0, 1.2, 5.6]]) + Atoms("Cl", [[1.4, 1.0, 9.6]]),
}
CHARGES = {"Na": 1.0, "Cl": -1.0, "O": -0.8476, "H": 0.4238}
"""e, of atoms with fixed charges."""
IONS = {"Li": 1.0, "Na": 1.0, "Cl": -1.0}


@dataclass
class Capacitor:
    """A capacitor and how it is solved.

    ``boundary``: slab | finite-field | open | periodic; ``across``: the cell vector that crosses it.
    """

    electrolyte: str = "vacuum"
    boundary: str = "slab"
    electrodes: tuple[Electrode, ...] = (METAL, METAL)
    values: tuple[float, ...] = (-0.7, 1.1)
    fixed: bool | dict[str, float] = False
    charges: dict[str, object] = default(default_factory=dict)
    field: tuple[float, float, float] = (0.0, 0.0, 0.0)
    net_charge: float = 0.0
    height: float = 26.0
    gap: float = 11.0
    across: int = 2
    settings: dict[str, float] = default(default_factory=lambda: dict(SHARP))

    def __post_init__(self):
        self.electrodes = tuple(replace(e, name=f"{e.name} {k}") for k, e in enumerate(self.electrodes))
        half = len(ELECTROLYTES[self.electrolyte]) // 2
        liquid = ELECTROLYTES[self.electrolyte]
        parts = [liquid[:half], plate(0.0, 1), liquid[half:], plate(2.0 + self.gap, 2)]
        if len(self.electrodes) == 3:
            parts.append(Atoms("Au2", [[4.6, 0.9, 7.3], [1.4, 3.9, 7.6]]))
        atoms = Atoms()
        for part in parts:
            atoms += part
        starts = np.cumsum([0, *(len(p) for p in parts)])
        self.members = [np.arange(starts[k], starts[k + 1]) for k in (1, 3, 4)[: len(self.electrodes)]]
        cell = np.array([[5.8, 0.0, 0.0], [0.9, 5.6, 0.0], [0.0, 0.0, self.height]])
        periodic = {"slab": (1, 1, 0), "open": (0, 0, 0)}.get(self.boundary, (1, 1, 1))
        if self.boundary in ("finite-field", "periodic"):
            cell[2, :2] = 0.7, -0.5
        shift = self.across - 2
        cell, periodic = np.roll(np.roll(cell, shift, 0), shift, 1), np.roll(periodic, shift)
        atoms.set_positions(np.roll(atoms.positions + np.array([0.0, 0.0, 0.8]), shift, 1))
        if self.boundary == "open":
            cell[:] = 0
        atoms.set_cell(cell)
        atoms.pbc = periodic
        self.atoms = atoms
        keywords = {**self.settings, **self.charges, "electrodes": self.electrodes}
        if self.boundary == "finite-field":
            keywords["finite_field"] = self.across
        if self.fixed:
            widths = self.fixed if isinstance(self.fixed, dict) else None
            model = FixedCharges(widths=widths, **keywords)
        else:
            model = PQEq(**keywords)
        self.potential = Potential(charges=model)
        self.system = self.prepared()

    @property
    def liquid(self):
        """[n] bool: atoms of no electrode."""
        out = np.ones(len(self.atoms), dtype=bool)
        out[np.concatenate(self.members)] = False
        return out

    def prepared(self):
        """The structure with electrodes, fragments and carried charges."""
        system = Systems.from_atoms(self.atoms, field=self.field, net_charge=self.net_charge)
        system = assign_electrodes(system, self.electrodes, self.members, self.values)
        symbols = self.atoms.get_chemical_symbols()
        if self.fixed:
            given = [CHARGES[s] if free else 0.0 for s, free in zip(symbols, self.liquid, strict=True)]
            system = system.replace(carried=torch.tensor(given, dtype=torch.float64))
        ions = [IONS.get(s, 0.0) * free for s, free in zip(symbols, self.liquid, strict=True)]
        return self.potential.prepare(system, initial_charges=torch.tensor(ions, dtype=torch.float64))

    @functools.cached_property
    def answer(self):
        return self.potential(self.system)

    def solve(self, *systems, **keywords):
        """A batch of structures that hardly differ from this one, from its charges on."""
        count = len(systems)
        start = replace(
            self.answer, charges=self.answer.charges.repeat(count), shells=self.answer.shells.repeat(count, 1)
        )
        return self.potential(Systems.join(systems), start=start, **keywords)

    def normal(self):
        """Unit vector across the two periodic directions in the plane."""
        a, b = (self.atoms.cell.array[k] for k in range(3) if k != self.across)
        out = np.cross(a, b)
        return out / np.linalg.norm(out)


def tensor(values):
    return torch.tensor(np.asarray(values, dtype=float), dtype=torch.float64)


def slope(case, change, step):
    """dΩ/dx of the structures ``change(x)``: five points, one batch."""
    points = (-2, -1, 1, 2)
    energies = case.solve(*(change(k * step) for k in points)).energy
    weights = tensor([1, -8, 8, -1]) / (12 * step)
    return float(energies @ weights)


# -- derivatives in every mode ----------------------------------------------------------------------------------------

POTENTIAL, CHARGE = METAL, replace(METAL, control="charge")
PQEQ_METAL = Electrode("metal", "potential")
SHELLS = {"polarizable": True}
KEEP = {"conserve": "fragments"}
WIDTHS = {"Na": 1.2, "Cl": 0.9, "O": 1.1, "H": 1.4}
THREE = (POTENTIAL, POTENTIAL, CHARGE)

kind = functools.partial(functools.partial, Capacitor)
MODES = {
    # what the electrodes are held at
    "slab, two potentials, points": kind("ions", fixed=True),
    "slab, two charges, points": kind("ions", fixed=True, electrodes=(CHARGE, CHARGE), values=(-0.4, 0.4)),
    "slab, charge and potential, Gaussians": kind(
        "water", fixed=WIDTHS, electrodes=(CHARGE, POTENTIAL), values=(-0.3, 0.8)
    ),
    "slab, three electrodes, points": kind("ions", fixed=True, electrodes=THREE, values=(-0.7, 1.1, 0.0)),
    "slab, three electrodes, salt water": kind(
        "salt water", charges=KEEP, electrodes=(CHARGE, POTENTIAL, CHARGE), values=(-0.7, 1.1, 0.0)
    ),
    "slab, one potential, net charge": kind("one ion", charges=KEEP, values=(-0.7, 1.1), net_charge=0.3),
    # electrolytes
    "slab, vacuum": kind("vacuum"),
    "slab, soft salt": kind("soft salt", charges=KEEP),
    "slab, water": kind("water", charges=KEEP),
    "slab, water, all": kind("water", charges={**KEEP, "response": "all"}),
    "slab, salt water": kind("salt water", charges=KEEP),
    "slab, total": kind("water", charges={"conserve": "total"}),
    "slab, total, two charges": kind(
        "water", charges={"conserve": "total"}, electrodes=(CHARGE, CHARGE), values=(-0.4, 0.3), net_charge=0.2
    ),
    "slab, bare spring": kind("water", charges={**KEEP, "limiter": "none"}),
    # finite field
    "finite field, vacuum": kind("vacuum", "finite-field"),
    "finite field, points": kind("ions", "finite-field", fixed=True),
    "finite field, Gaussians": kind("water", "finite-field", fixed=WIDTHS),
    "finite field, water": kind("water", "finite-field", charges=KEEP),
    "finite field, salt water": kind("salt water", "finite-field", charges=KEEP),
    "finite field, frozen": kind("water", "finite-field", charges={**KEEP, "response": "frozen"}),
    "finite field, polarizable": kind(
        "water", "finite-field", charges=KEEP, electrodes=(replace(METAL, **SHELLS), METAL)
    ),
    "finite field along a": kind("salt water", "finite-field", charges=KEEP, across=0),
    # metals
    "slab, polarizable": kind(
        "water", charges=KEEP, electrodes=(METAL, replace(PQEQ_METAL, **SHELLS))
    ),
    "slab, PQEq metal": kind("water", charges=KEEP, electrodes=(PQEQ_METAL, PQEQ_METAL)),
    "slab, Thomas–Fermi, hardness, chi": kind(
        "ions",
        fixed=True,
        electrodes=(
            replace(METAL, thomas_fermi=0.8, chi=0.4),
            replace(METAL, hardness=2.5, thomas_fermi=0.5, atom_volume=15.0),
        ),
    ),
    # fields and other boundaries
    "slab, field, points": kind("ions", fixed=True, field=(0, 0, 0.08)),
    "slab, field, water": kind("water", charges=KEEP, field=(0, 0, 0.08)),
    "slab, field, water, all": kind("water", charges={**KEEP, "response": "all"}, field=(0, 0, -0.06)),
    "slab, field, charge": kind(
        "salt water", charges=KEEP, electrodes=(CHARGE, POTENTIAL), values=(-0.3, 0.8), field=(0, 0, 0.08)
    ),
    "slab along b, field": kind("one ion", charges=KEEP, field=(0, 0.05, 0), across=1),
    "open, points": kind("ions", "open", fixed=True),
    "open, field, water": kind("water", "open", charges=KEEP, field=(0.03, -0.05, 0.04)),
    "open, field, total, net charge": kind(
        "water", "open", charges={"conserve": "total", "response": "all"}, field=(0.03, -0.05, 0.04), net_charge=-0.5
    ),
    "periodic, salt water": kind("salt water", "periodic", charges=KEEP),
    "periodic, two charges, net charge": kind(
        "ions", "periodic", fixed=True, electrodes=(CHARGE, CHARGE), values=(-0.3, 0.5), net_charge=0.2
    ),
}  # fmt: skip


@functools.cache
def built(name):
    """Shared by all tests, which change nothing of it."""
    return MODES[name]()


@pytest.fixture(params=MODES)
def mode(request):
    return built(request.param)


def test_forces_are_exact_derivatives(mode):
    """Electrolyte and metal atoms along two random directions."""
    answer, size = mode.answer, (len(mode.atoms), 3)
    liquid = torch.tensor(mode.liquid)
    for seed, moving in enumerate((liquid, ~liquid)):
        if not bool(moving.any()):
            continue
        direction = tensor(np.random.default_rng(seed).normal(size=size)) * moving[:, None]
        direction /= direction.norm()
        numeric = -slope(
            mode, lambda x, d=direction: mode.system.replace(positions=mode.system.positions + x * d), 2e-3
        )
        typical = float(answer.forces.norm()) / math.sqrt(3 * len(mode.atoms))
        assert float((answer.forces * direction).sum()) == pytest.approx(numeric, rel=1e-7, abs=1e-7 * typical)


def strains(case):
    """Strains [3, 3] of rows that leave a field along an open direction where it is."""
    n = case.normal() if case.boundary != "open" else np.zeros(3)
    random = np.random.default_rng(5).normal(size=(3, 3))
    if case.boundary != "periodic":  # what is open has axes of its own
        random = random + random.T
    if case.boundary == "slab" and any(case.field):  # the normal must not turn
        across = np.outer(n, n)
        plane = np.eye(3) - across
        random = plane @ random @ plane + across @ random @ across
    return random / np.linalg.norm(random)


def test_virial_is_the_exact_derivative(mode):
    strain = tensor(strains(mode))

    def deformed(x):
        change = torch.eye(3, dtype=torch.float64) + x * strain
        return mode.system.replace(positions=mode.system.positions @ change, cell=mode.system.cell @ change)

    virial = mode.answer.virial[0]
    numeric = -slope(mode, deformed, 5e-4)
    assert float((virial * strain.T).sum()) == pytest.approx(numeric, rel=1e-7, abs=1e-7 * float(virial.norm()))


def test_charges_and_potentials_are_exact_derivatives(mode):
    """dΩ = −Σ Q dψ over electrodes at potentials, + Σ ψ dQ over those at charges; − M·dε where a jump is a field."""
    answer = mode.answer
    at_charge = [e.control == "charge" for e in mode.electrodes]
    change = np.random.default_rng(3).normal(size=len(at_charge))
    if all(at_charge):  # what one gives up another takes
        change -= change.mean()
    change = tensor(change)
    numeric = slope(mode, lambda x: mode.system.replace(applied=mode.system.applied + x * change), 2e-3)
    expected = sum(
        float(dx * (told["potential"] if charged else -told["charge"]))
        for dx, charged, told in zip(change, at_charge, answer.electrodes.values(), strict=True)
    )
    if mode.boundary == "finite-field":
        dual = torch.linalg.inv(mode.system.cell[0])[:, mode.across]
        expected += float((change[1] - change[0]) * (dual @ answer.dipole[0]))
    assert expected == pytest.approx(numeric, rel=1e-7, abs=1e-8)


def test_dipole_is_the_exact_derivative(mode):
    if mode.boundary in ("finite-field", "periodic"):
        pytest.skip("no field along periodic directions of a metal")
    answer = mode.answer
    along = tensor(mode.normal() if mode.boundary == "slab" else [0.5, -0.7, 0.5])
    numeric = -slope(mode, lambda x: mode.system.replace(field=mode.system.field + x * along), 4e-4)
    assert float(answer.dipole[0] @ along) == pytest.approx(numeric, rel=1e-7, abs=1e-7)


def test_terms_constraints_and_equipotentials(mode):
    answer = mode.answer
    assert float(sum(answer.energy_terms.values())) == pytest.approx(float(answer.energy), rel=1e-13)
    assert float(answer.charges.sum()) == pytest.approx(mode.net_charge, abs=1e-10)
    assert float(answer.residual) < 1e-11
    work = 0.0
    for electrode, members, value in zip(mode.electrodes, mode.members, mode.values, strict=True):
        told = answer.electrodes[electrode.name]
        assert float(answer.charges[members].sum()) == pytest.approx(float(told["charge"]), abs=1e-12)
        assert float(told["residual"]) < 1e-9
        if electrode.control == "potential":
            assert float(told["potential"]) == value
            work -= value * float(told["charge"])
        else:
            assert float(told["charge"]) == pytest.approx(value, abs=1e-11)
    assert float(answer.energy_terms["electrodes"]) == pytest.approx(work, abs=1e-11)
    if mode.boundary != "slab" or not any(mode.field):
        net = mode.net_charge * tensor(mode.field)
        assert float((answer.forces.sum(0) - net).abs().max()) < 1e-8


RESPONSES = [
    "slab, water, all",
    "slab, field, charge",
    "slab, total",
    "slab, field, points",
    "slab along b, field",
    "slab, Thomas–Fermi, hardness, chi",
    "finite field, salt water",
    "finite field, points",
    "finite field along a",
    "open, field, total, net charge",
]


@pytest.mark.parametrize("name", RESPONSES)
def test_born_charges_and_polarizability_are_derivatives_of_the_dipole(name):
    """Z*_iab = ∂M_a/∂r_ib at fixed potentials (or charges) of the electrodes."""
    case = built(name)
    answer = case.solve(case.system, born_charges=True, polarizability=True)
    direction = tensor(np.random.default_rng(7).normal(size=(len(case.atoms), 3)))
    direction /= direction.norm()
    h, points = 2e-3, (-2, -1, 1, 2)
    weights = tensor([1, -8, 8, -1]) / (12 * h)
    moved = [case.system.replace(positions=case.system.positions + k * h * direction) for k in points]
    numeric = weights @ case.solve(*moved).dipole
    assert torch.einsum("nab,nb->a", answer.born_charges, direction).numpy() == pytest.approx(numeric.numpy(), abs=1e-8)
    if case.boundary == "finite-field":
        return
    along = tensor(case.normal() if case.boundary == "slab" else [0.5, -0.7, 0.5])
    h = 4e-4
    weights = tensor([1, -8, 8, -1]) / (12 * h)
    pulled = case.solve(*(case.system.replace(field=case.system.field + k * h * along) for k in points))
    numeric = weights @ pulled.dipole * COULOMB_CONSTANT
    assert (answer.polarizability[0] @ along).numpy() == pytest.approx(numeric.numpy(), rel=1e-7, abs=1e-6)
    forces = torch.einsum("k,kna->na", weights, pulled.forces.reshape(4, -1, 3))
    assert torch.einsum("nab,a->nb", answer.born_charges, along).numpy() == pytest.approx(forces.numpy(), abs=1e-7)


@pytest.mark.parametrize("name", [*RESPONSES, "slab, three electrodes, salt water"])
def test_capacitance_is_the_derivative_of_the_charges(name):
    """C_ab = ∂Q_a/∂ψ_b at fixed nuclei."""
    case = built(name)
    applied = [k for k, e in enumerate(case.electrodes) if e.control == "potential"]
    found = case.potential(case.system, capacitance=True).capacitance[0]
    assert torch.allclose(found, found.T, rtol=0, atol=1e-12)
    h, points = 2e-3, (-2, -1, 1, 2)
    weights = tensor([1, -8, 8, -1]) / (12 * h)
    for k in range(len(case.electrodes)):
        step = torch.zeros_like(case.system.applied)
        step[:, k] = h
        if k not in applied:
            assert not found[:, k].any()
            continue
        answer = case.solve(*(case.system.replace(applied=case.system.applied + m * step) for m in points))
        for a, electrode in enumerate(case.electrodes):
            slope = float(weights @ answer.electrodes[electrode.name]["charge"])
            assert float(found[a, k]) == pytest.approx(slope, rel=1e-7, abs=1e-8)


def test_capacitance_needs_a_potential():
    case = built("slab, field, charge")
    held = tuple(replace(e, control="charge") for e in case.electrodes)
    system = case.system.replace(applied=torch.zeros_like(case.system.applied))
    with pytest.raises(InputError, match=r"output.capacitance needs electrodes at potentials"):
        replace(case.potential.charges, electrodes=held).solve(system, capacitance=True)


def test_labels_that_join_electrodes_do_not_matter():
    """Atoms of an electrode are no part of a fragment, and stay where they are in a finite-field cell."""
    case = built("finite field, salt water")
    bare = case.system.replace(fragments=None, fragment_charges=None, parents=None)
    labels = case.system.fragments.clone()
    labels[case.system.electrode >= 0] = int(labels[case.system.electrode < 0][0])
    initial = tensor([IONS.get(symbol, 0.0) for symbol in case.atoms.symbols])
    joined = case.potential.prepare(bare, labels=labels, initial_charges=initial)
    assert torch.allclose(case.potential(joined).charges, case.answer.charges, rtol=0, atol=1e-9)


def test_smallest_curvature_is_that_of_the_dense_hessian():
    """Of shells, with charges that follow on the constraint surface."""
    case = Capacitor("water", "finite-field", charges=KEEP, electrodes=(replace(METAL, polarizable=True), METAL))
    answer = case.solve(case.system, smallest_curvature=True)
    functional = Functional(case.potential.charges, case.system)
    y = torch.cat([answer.charges[:, None], answer.shells], dim=1)
    columns = []
    for k in range(y.numel()):
        step = torch.zeros_like(y).reshape(-1)
        step[k] = 1e-4
        step = step.reshape(y.shape)
        columns.append(((functional.at(y + step).gradient - functional.at(y - step).gradient) / 2e-4).reshape(-1))
    hessian = torch.stack(columns).numpy().reshape(len(y), 4, len(y), 4)
    charges = scipy.linalg.null_space(group_rows(case))
    moving = functional.z.numpy() != 0
    stiff = hessian[moving, 1:][:, :, moving, 1:].reshape(3 * moving.sum(), -1)
    mixed = np.einsum("iajb,ik->ajbk", hessian[:, :1, moving, 1:][:, 0][:, None], charges)[0]
    mixed = mixed.reshape(-1, charges.shape[1])
    reduced = stiff - mixed @ np.linalg.solve(charges.T @ hessian[:, 0, :, 0] @ charges, mixed.T)
    lowest = np.linalg.eigvalsh(0.5 * (reduced + reduced.T))[0]
    assert float(answer.smallest_curvature) == pytest.approx(lowest, rel=1e-3)


# -- an independent solution ------------------------------------------------------------------------------------------


def group_rows(case):
    """[groups, n]: rows whose products with the charges are fixed, put together from the case alone."""
    n = len(case.atoms)
    rows, reservoir = [], np.zeros(n)
    for electrode, members in zip(case.electrodes, case.members, strict=True):
        row = np.zeros(n)
        row[members] = 1
        if electrode.control == "charge":
            rows.append(row)
        else:
            reservoir += row
    liquid, symbols = np.flatnonzero(case.liquid), case.atoms.get_chemical_symbols()
    first = 0
    while first < len(liquid):
        size = 3 if symbols[liquid[first]] == "O" else 1
        row = np.zeros(n)
        row[liquid[first : first + size]] = 1
        rows.append(row)
        first += size
    return np.array([*rows, reservoir] if reservoir.any() else rows)


def independent(case):
    """Charges, shells and grand potential from exact Coulomb sums, a dense charge matrix and KKT: numpy alone.

    The charge matrix is that of shells at their cores; it and the springs precondition a plain iteration on the exact
    gradients. Molecules keep their charge; ions and electrodes as ``case`` says.
    """
    model, n = case.potential.charges, len(case.atoms)
    positions, cell = case.atoms.positions, case.atoms.cell.array
    symbols, k_e = case.atoms.get_chemical_symbols(), COULOMB_CONSTANT
    chi, hard, z, spring, alpha, psi = (np.zeros(n) for _ in range(6))
    for i, symbol in enumerate(symbols):
        row = model.parameters[symbol]
        chi[i], hard[i], z[i], spring[i], alpha[i] = (
            row.chi,
            row.eta,
            row.Z,
            row.K / 23.060547830619,
            0.23138500 / row.R**2,
        )
    for electrode, members, value in zip(case.electrodes, case.members, case.values, strict=True):
        if electrode.eta is not None:
            chi[members], alpha[members] = 0.0, electrode.eta**2
            hard[members] = k_e * math.sqrt(2 / math.pi) * electrode.eta + electrode.hardness
        if not electrode.polarizable:
            z[members] = 0.0
        if electrode.thomas_fermi:
            hard[members] += 4 * math.pi * k_e * electrode.thomas_fermi**2 / electrode.atom_volume
        if electrode.control == "potential":
            psi[members] = value
    spring[z == 0] = 1.0
    eps = np.zeros(3)
    if case.boundary == "finite-field":
        eps = -(case.values[1] - case.values[0]) * np.linalg.inv(cell)[:, case.across]
    rows = group_rows(case)
    given = [v for e, v in zip(case.electrodes, case.values, strict=True) if e.control == "charge"]
    molecules = len(rows) - len(given) - any(e.control == "potential" for e in case.electrodes)
    liquid = [symbols[int(np.flatnonzero(r)[0])] for r in rows[len(given) : len(given) + molecules]]
    fixed = [*given, *(IONS.get(s, 0.0) for s in liquid)]
    fixed = np.array([*fixed, case.net_charge - sum(fixed)][: len(rows)])
    pbc = tuple(bool(p) for p in case.atoms.pbc)

    def sums(q, shells):
        return site_sums(positions, cell, pbc, alpha, np.stack([q + z, -z]), shells, k_e)

    still = np.zeros((n, 3))
    bare = site_sums(positions, cell, pbc, alpha, np.stack([z, -z]), still, k_e)[1][0]
    matrix = np.stack([sums(row, still)[1][0] - bare for row in np.eye(n)]) + np.diag(hard)
    kkt = np.block([[matrix, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
    q, shells = np.linalg.solve(kkt, np.concatenate([psi - chi + positions @ eps - bare, fixed]))[:n], still.copy()
    limit = model.shell_limit**2
    past: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(200):
        coulomb, potential, gradient = sums(q, shells)
        room = 1 - (shells**2).sum(1) / limit
        g_q = chi + hard * q + potential[0] - positions @ eps - psi
        g_shell = (spring / room)[:, None] * shells - z[:, None] * gradient[1] + z[:, None] * eps
        step = np.linalg.solve(kkt, np.concatenate([-g_q, 0 * fixed]))[:n]
        if max(np.abs(matrix @ step).max(), np.abs(g_shell).max()) < 1e-10:
            break
        # Anderson's mixing of the latest steps
        change = np.concatenate([step, -(g_shell * (room / spring)[:, None]).reshape(-1)])
        place = np.concatenate([q, shells.reshape(-1)])
        past = [*past[-12:], (place, change)]
        dx, df = (np.array([p[k] - past[-1][k] for p in past[:-1]]).T for k in (0, 1))
        if len(past) > 1:
            mix = np.linalg.lstsq(df, -change, rcond=1e-12)[0]
            place, change = place + dx @ mix, change + df @ mix
        target = place + (0.5 if len(past) < 3 else 1.0) * change
        q, shells = target[:n], target[n:].reshape(n, 3)
        length = np.linalg.norm(shells, axis=1, keepdims=True)
        shells = shells * np.minimum(1, 0.95 * model.shell_limit / np.maximum(length, 1e-12))
    else:
        raise AssertionError("the independent iteration did not converge")
    energy = chi @ q + 0.5 * hard @ q**2 - 0.5 * limit * spring @ np.log(room) + coulomb - psi @ q
    return q, shells, energy - eps @ (q @ positions - z @ shells)


SCREENED = replace(METAL, thomas_fermi=0.6, atom_volume=16.9)


@pytest.mark.parametrize(
    "case",
    [
        kind("salt water", charges=KEEP, electrodes=(SCREENED, METAL)),
        kind("one ion", charges=KEEP, electrodes=(CHARGE, PQEQ_METAL), values=(-0.4, 0.9), net_charge=0.4),
        kind("salt water", "finite-field", charges=KEEP, electrodes=(METAL, replace(METAL, hardness=1.5))),
    ],
    ids=["slab", "slab, charge and PQEq metal, net charge", "finite field"],
)
def test_agrees_with_an_independent_dense_solution(case):
    case = case()
    charges, shells, energy = independent(case)
    assert case.answer.charges.numpy() == pytest.approx(charges, abs=1e-8)
    assert case.answer.shells.numpy() == pytest.approx(shells, abs=1e-8)
    assert float(case.answer.energy) == pytest.approx(energy, abs=1e-8)


# -- the empty capacitor ----------------------------------------------------------------------------------------------


def sheets(separation, layers=1, spacing=4.0, height=None, **electrode):
    """Two stacks of square layers of one atom (Å); returns the capacitance (e/V) and the response at 1 V."""
    side = 2.9
    depth = np.arange(layers) * spacing
    z = np.concatenate([-depth, separation + depth])
    atoms = Atoms("Au" * len(z), [[0.3, 0.4, h] for h in z], cell=[side, side, height or 1.0], pbc=[1, 1, 0])
    metal = Electrode("low", "potential", **{"eta": 1.6, "atom_volume": side**2 * spacing, **electrode})
    electrodes = (metal, replace(metal, name="high"))
    system = assign_electrodes(
        Systems.from_atoms(atoms), electrodes, [np.arange(layers), np.arange(layers, 2 * layers)], [-0.5, 0.5]
    )
    answer = Potential(charges=PQEq(electrodes=electrodes, **SHARP))(system)
    return float(answer.electrodes["high"]["charge"]), answer


AREA = 2.9**2


def test_capacitance_follows_the_distance():
    """1/C is linear in d with slope 1/(ε0 A), and Q/V = ε0 A/d_eff with d_eff between the centres of charge."""
    distances = np.array([8.0, 11.0, 16.0, 31.0])
    inverse = []
    for d in distances:
        capacitance, answer = sheets(d, layers=3, spacing=2.0)
        centres = float(answer.dipole[0, 2]) / capacitance  # M/Q
        assert d - 2.0 < centres < d
        assert capacitance == pytest.approx(VACUUM_PERMITTIVITY * AREA / centres, rel=1e-2)
        inverse.append(1 / capacitance)
    slopes = np.diff(inverse) / np.diff(distances)
    assert slopes == pytest.approx(1 / (VACUUM_PERMITTIVITY * AREA), rel=1e-6)


def test_one_layer_in_series_with_its_own_hardness():
    """All atoms carry Q/n: 1/C grows by twice what is added to the diagonal, be it Thomas–Fermi or hardness."""
    plain = 1 / sheets(10.0)[0]
    assert 1 / sheets(10.0, hardness=3.0)[0] - plain == pytest.approx(2 * 3.0, rel=1e-7)
    by_parameters = 1 / sheets(10.0, eta=None)[0]
    for length in (0.5, 1.5, 3.0):
        added = 4 * math.pi * COULOMB_CONSTANT * length**2 / (AREA * 4.0)
        assert 1 / sheets(10.0, thomas_fermi=length)[0] - plain == pytest.approx(2 * added, rel=1e-7)
        screened = 1 / sheets(10.0, eta=None, thomas_fermi=length)[0]
        assert screened - by_parameters == pytest.approx(2 * added, rel=1e-7)


@pytest.mark.parametrize("length", [2.0, 4.0, 8.0])
def test_thomas_fermi_metal_of_layers(length):
    """Layers a apart in a screened metal: charges fall as exp(−κn) with 2 cosh κ − 2 = a²/l².

    1/C = d/(ε0 A) + 2 l²/a (1 − exp(−κ))/(ε0 A), with l² that of the whole diagonal: what Gaussians and lattice add to
    the Thomas–Fermi term is taken from a single layer. l ≫ a: 2 l/(ε0 A) (Scalfi et al., J. Chem. Phys. 153, 174704
    (2020)).
    """
    spacing, distance = 4.0, 10.0
    unit = 1 / (VACUUM_PERMITTIVITY * AREA)
    own = 0.5 * (1 / sheets(distance)[0] - distance * unit) / unit * spacing  # Å²
    squared = length**2 + own
    kappa = math.acosh(1 + spacing**2 / (2 * squared))
    expected = unit * (distance + 2 * squared / spacing * (1 - math.exp(-kappa)))
    capacitance, answer = sheets(distance, layers=14, spacing=spacing, thomas_fermi=length)
    assert 1 / capacitance == pytest.approx(expected, rel=3e-3)
    profile = answer.charges[14:18].numpy()
    assert profile[1:] / profile[:-1] == pytest.approx(math.exp(-kappa), rel=1e-2)
    if length == 8.0:  # the continuum, whose metal begins half a layer before its first atoms; its error is (a/l)²
        assert 1 / capacitance == pytest.approx(unit * (distance - spacing + 2 * length), rel=3e-2)


def test_thomas_fermi_length_lowers_the_capacitance():
    values = [sheets(10.0, layers=6, spacing=2.0, thomas_fermi=x)[0] for x in (0.0, 1e-4, 0.3, 0.6, 1.2, 2.4)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert all(b < a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("electrolyte", ["vacuum", "ions"])
def test_finite_field_from_the_slab_exactly(electrolyte):
    """The two differ by one uniform field, e = ε + 4π k_e M/V, which is that of a slab with potentials and a field.

    Ω is quadratic, so Q and M of a slab are affine in jump and field: M = M0 + m V + a e, Q = Q0 + C V + m e, and the
    finite-field cell follows from three slabs. What is left is the field of images across the vacuum, exp(−Gh).
    """
    height, jump = 48.0, 1.8
    common = {"electrolyte": electrolyte, "fixed": True, "height": height}
    rest = Capacitor(values=(0.0, 0.0), **common)
    slab = Capacitor(values=(-0.5 * jump, 0.5 * jump), **common)
    pulled = Capacitor(values=(0.0, 0.0), field=(0, 0, 0.1), **common)
    dipole = [float(c.answer.dipole[0, 2]) for c in (rest, slab, pulled)]
    charge = [float(c.answer.electrodes["metal 1"]["charge"]) for c in (rest, slab, pulled)]
    m, a = (dipole[1] - dipole[0]) / jump, (dipole[2] - dipole[0]) / 0.1
    assert (charge[2] - charge[0]) / 0.1 == pytest.approx(m, rel=1e-8)  # Maxwell
    tilted = np.array([[5.8, 0, 0], [0.9, 5.6, 0], [0, 0, height]])
    per_dipole = 4 * math.pi * COULOMB_CONSTANT / np.linalg.det(tilted)
    e = (-jump / height + per_dipole * (dipole[0] + m * jump)) / (1 - per_dipole * a)
    expected = charge[1] + m * e
    across = Capacitor(boundary="finite-field", values=(-0.5 * jump, 0.5 * jump), **common)
    straight = across.system.replace(cell=tensor(tilted)[None])
    answer = across.solve(straight)
    assert float(answer.electrodes["metal 1"]["charge"]) == pytest.approx(expected, abs=1e-9)
    assert float(answer.dipole[0, 2]) == pytest.approx(dipole[1] + a * e, abs=1e-8)
    assert expected == pytest.approx(charge[1], rel=1e-3)
    assert abs(expected - charge[1]) > 1e-7
    sheared = across.answer  # moves images sideways, and the field with c*
    assert float(sheared.electrodes["metal 1"]["charge"]) == pytest.approx(expected, abs=1e-9)
    assert (sheared.forces - answer.forces).abs().max() < 1e-8


# -- the same thing in other words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("electrolyte", "leak"), [("water", 1e-3), ("salt water", 5e-3)])
def test_finite_field_is_a_slab_in_the_field_that_leaks(electrolyte, leak):
    """Exactly, with e = ε + 4π k_e M/V of its own M, shells and all; and without that field but for the leak.

    The field of ions goes through two layers of atoms more than that of an empty gap.
    """
    across = Capacitor(electrolyte, "finite-field", charges=KEEP, height=44.0)
    volume = abs(float(torch.linalg.det(across.system.cell[0])))
    inside = 4 * math.pi * COULOMB_CONSTANT * float(across.answer.dipole[0, 2]) / volume
    e = inside - (across.values[1] - across.values[0]) / across.height
    for field, tolerance in ((e, 1e-9), (0.0, leak)):
        slab = Capacitor(electrolyte, charges={**KEEP, "response": "all"}, height=44.0, field=(0, 0, field))
        error = (slab.answer.charges - across.answer.charges).abs().max()
        assert error < 10 * tolerance * across.answer.charges.abs().max()
        for name, told in across.answer.electrodes.items():
            assert float(slab.answer.electrodes[name]["charge"]) == pytest.approx(float(told["charge"]), rel=tolerance)
        if field:
            assert (slab.answer.forces - across.answer.forces).abs().max() < 1e-8


@pytest.mark.parametrize(
    "name",
    [
        "slab, two potentials, points",
        "slab, water",
        "slab, total",
        "slab, one potential, net charge",
        "slab, field, water, all",
        "slab, Thomas–Fermi, hardness, chi",
        "slab, polarizable",
        "open, points",
        "open, field, total, net charge",
        "periodic, salt water",
    ],
)
@pytest.mark.parametrize("held", [(0,), (1,), (0, 1)], ids=["low", "high", "both"])
def test_electrode_held_at_the_charge_that_its_potential_gave(name, held):
    case = built(name)
    found = case.answer
    charge = [float(told["charge"]) for told in found.electrodes.values()]
    electrodes = tuple(replace(e, control="charge") if k in held else e for k, e in enumerate(case.electrodes))
    values = [charge[k] if k in held else v for k, v in enumerate(case.values)]
    model = replace(case.potential.charges, electrodes=electrodes)
    system = case.system.replace(applied=tensor([values]))
    answer = Potential(charges=model)(system)
    assert answer.charges.numpy() == pytest.approx(found.charges.numpy(), abs=1e-8)
    assert answer.forces.numpy() == pytest.approx(found.forces.numpy(), abs=1e-8)
    assert answer.virial.numpy() == pytest.approx(found.virial.numpy(), abs=1e-8)
    told = [float(t["potential"]) for t in answer.electrodes.values()]
    assert told[1] - told[0] == pytest.approx(case.values[1] - case.values[0], abs=1e-8)
    if len(held) < 2:
        assert told == pytest.approx(case.values, abs=1e-8)
    legendre = sum(case.values[k] * charge[k] for k in held)
    assert float(answer.energy) == pytest.approx(float(found.energy) + legendre, abs=1e-9)


@pytest.mark.parametrize("name", ["slab, three electrodes, points", "slab, three electrodes, salt water"])
def test_reference_electrode_without_charge(name):
    """Turned into one at the potential it reports, it stays without charge."""
    case = built(name)
    told = case.answer.electrodes["metal 2"]
    assert float(told["charge"]) == pytest.approx(0, abs=1e-11)
    electrodes = (*case.electrodes[:2], replace(case.electrodes[2], control="potential"))
    system = case.system.replace(applied=tensor([[*case.values[:2], float(told["potential"])]]))
    answer = Potential(charges=replace(case.potential.charges, electrodes=electrodes))(system)
    assert float(answer.electrodes["metal 2"]["charge"]) == pytest.approx(0, abs=1e-9)
    assert float(answer.energy) == pytest.approx(float(case.answer.energy), abs=1e-9)


SYMMETRIC = [
    "slab, charge and potential, Gaussians",
    "slab, three electrodes, salt water",
    "slab, field, water, all",
    "slab, total, two charges",
    "slab, polarizable",
    "finite field, points",
    "finite field, water",
    "finite field along a",
    "open, field, total, net charge",
    "periodic, two charges, net charge",
]


def moved(case, positions):
    return case.solve(case.system.replace(positions=positions))


def test_translation_changes_nothing(mode):
    """But in a field, where the total charge is pulled along."""
    answer = moved(mode, mode.system.positions + tensor([0.313, -0.271, 0.159]))
    if not mode.net_charge or not any(mode.field):
        assert float(answer.energy) == pytest.approx(float(mode.answer.energy), abs=1e-8)
    assert answer.charges.numpy() == pytest.approx(mode.answer.charges.numpy(), abs=1e-8)
    assert answer.forces.numpy() == pytest.approx(mode.answer.forces.numpy(), abs=1e-7)


def test_wrapping_changes_nothing(mode):
    """Atoms one by one, metal too; across a finite-field cell electrolyte alone, where an ion changes Ω by q ΔV."""
    if mode.boundary == "open":
        pytest.skip("nothing to wrap")
    rng = np.random.default_rng(11)
    images = rng.integers(-2, 3, size=(len(mode.atoms), 3))
    images[:, mode.across] = 0
    if mode.boundary == "periodic":
        images[:, mode.across] = rng.integers(-2, 3, size=len(mode.atoms))
    jump = 0.0
    if mode.boundary == "finite-field":
        free = np.flatnonzero(mode.liquid)
        images[free, mode.across] = rng.integers(-2, 3, size=len(free))
        jump = (mode.values[1] - mode.values[0]) * float(
            sum(images[k, mode.across] * charge for k, charge in zip(free, kept_charges(mode), strict=True))
        )
    answer = moved(mode, mode.system.positions + tensor(images) @ mode.system.cell[0])
    assert float(answer.energy) == pytest.approx(float(mode.answer.energy) + jump, abs=1e-8)
    assert answer.charges.numpy() == pytest.approx(mode.answer.charges.numpy(), abs=1e-8)
    assert answer.forces.numpy() == pytest.approx(mode.answer.forces.numpy(), abs=1e-7)


def kept_charges(case):
    """Charges (e) that electrolyte atoms carry across the cell: fixed ones each, molecules at their first atom."""
    symbols = [case.atoms.get_chemical_symbols()[k] for k in np.flatnonzero(case.liquid)]
    return [(CHARGES if case.fixed else IONS).get(s, 0.0) for s in symbols]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_of_atoms_changes_nothing(name):
    mode = built(name)
    order = np.random.default_rng(3).permutation(len(mode.atoms))
    place = np.argsort(order)
    other = object.__new__(Capacitor)
    other.__dict__.update({k: v for k, v in mode.__dict__.items() if k not in ("answer", "system")})
    other.atoms = mode.atoms[order]
    other.members = [place[m] for m in mode.members]
    other.system = other.prepared()
    if mode.system.carried is not None:
        assert other.system.carried.numpy() == pytest.approx(mode.system.carried.numpy()[order], abs=1e-8)
    assert float(other.answer.energy) == pytest.approx(float(mode.answer.energy), abs=1e-8)
    assert other.answer.charges.numpy() == pytest.approx(mode.answer.charges.numpy()[order], abs=1e-8)
    assert other.answer.forces.numpy() == pytest.approx(mode.answer.forces.numpy()[order], abs=1e-7)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_of_electrodes_changes_nothing(name):
    mode = built(name)
    label = mode.system.electrode
    count = len(mode.electrodes)
    system = mode.system.replace(
        electrode=torch.where(label >= 0, count - 1 - label, label), applied=mode.system.applied.flip(1)
    )
    model = replace(mode.potential.charges, electrodes=mode.electrodes[::-1])
    answer = Potential(charges=model)(system)
    assert list(answer.electrodes) == list(mode.answer.electrodes)[::-1]
    for electrode, told in mode.answer.electrodes.items():
        for key in ("charge", "potential"):
            assert float(answer.electrodes[electrode][key]) == pytest.approx(float(told[key]), abs=1e-8)
    assert float(answer.energy) == pytest.approx(float(mode.answer.energy), abs=1e-8)
    assert answer.virial.numpy() == pytest.approx(mode.answer.virial.numpy(), abs=1e-7)


def test_only_differences_of_potentials_count(mode):
    """Where the total charge of the electrodes is given; Ω then changes by −ψ Q."""
    if mode.charges.get("conserve") == "total" or not any(e.control == "potential" for e in mode.electrodes):
        pytest.skip("the electrolyte sets the zero, or nothing is at a potential")
    shift = tensor([0.35 * (e.control == "potential") for e in mode.electrodes])
    answer = mode.solve(mode.system.replace(applied=mode.system.applied + shift))
    taken = sum(
        float(told["charge"])
        for e, told in zip(mode.electrodes, mode.answer.electrodes.values(), strict=True)
        if e.control == "potential"
    )
    assert answer.charges.numpy() == pytest.approx(mode.answer.charges.numpy(), abs=1e-8)
    assert float(answer.energy) == pytest.approx(float(mode.answer.energy) - 0.35 * taken, abs=1e-8)
    for e in mode.electrodes:  # potentials of those at a charge move along
        told, before = answer.electrodes[e.name]["potential"], mode.answer.electrodes[e.name]["potential"]
        assert float(told - before) == pytest.approx(0.35, abs=1e-8)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_warm_start_from_another_potential(name):
    """A first guess that breaks the constraints of electrodes at a charge is no harm."""
    mode = built(name)
    other = replace(mode.answer, charges=mode.answer.charges + 0.05 * torch.sin(torch.arange(len(mode.atoms))).double())
    answer = mode.potential(mode.system, start=other)
    assert float(answer.energy) == pytest.approx(float(mode.answer.energy), abs=1e-9)
    assert answer.charges.numpy() == pytest.approx(mode.answer.charges.numpy(), abs=1e-9)


BATCHES = [
    "slab, charge and potential, Gaussians",
    "slab, field, charge",
    "finite field, salt water",
    "open, field, total, net charge",
]


@pytest.mark.parametrize("name", BATCHES)
def test_batches_equal_single_structures(name):
    """Other positions, potentials, charges and fields in each; the cells alike (beads) or not."""
    case = built(name)
    rng = np.random.default_rng(2)
    parts = []
    for k in range(3):
        part = case.system.replace(positions=case.system.positions + tensor(rng.normal(0, 0.02, (len(case.atoms), 3))))
        change = rng.normal(0, 0.2, len(case.electrodes))
        if not any(e.control == "potential" for e in case.electrodes):
            change -= change.mean()
        change = tensor(change)
        if len(change) == 3:
            change[2] = 0
        part = part.replace(applied=part.applied + change, field=part.field * (1 - 0.5 * k))
        if k == 2 and case.boundary != "open":
            stretch = torch.eye(3, dtype=torch.float64) * 1.01
            part = part.replace(positions=part.positions @ stretch, cell=part.cell @ stretch)
        parts.append(part)
    wanted = {"born_charges": name in ("finite field, salt water", "open, field, total, net charge")}
    together = case.solve(*parts, **wanted)
    first = 0
    for b, part in enumerate(parts):
        alone = case.solve(part, **wanted)
        own = slice(first, first + part.n_atoms)
        first += part.n_atoms
        assert float(together.energy[b]) == pytest.approx(float(alone.energy), abs=1e-10)
        assert together.virial[b].numpy() == pytest.approx(alone.virial[0].numpy(), abs=1e-9)
        assert together.dipole[b].numpy() == pytest.approx(alone.dipole[0].numpy(), abs=1e-9)
        for key in ("charges", "shells", "forces", *(key for key, asked in wanted.items() if asked)):
            found, expected = getattr(together, key)[own], getattr(alone, key)
            assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-9), key
        for electrode, told in alone.electrodes.items():
            for key in ("charge", "potential"):
                assert float(together.electrodes[electrode][key][b]) == pytest.approx(float(told[key]), abs=1e-10)
    again = Systems.join(parts).split()
    for part, back in zip(parts, again, strict=True):
        assert torch.equal(part.electrode, back.electrode)
        assert torch.equal(part.applied, back.applied)


def test_chi_is_a_shift_of_the_potential():
    plain = Capacitor("ions", fixed=True, values=(-0.7, 0.7))
    shifted = Capacitor("ions", fixed=True, electrodes=(METAL, replace(METAL, chi=0.4)), values=(-0.7, 1.1))
    assert shifted.answer.charges.numpy() == pytest.approx(plain.answer.charges.numpy(), abs=1e-9)
    assert float(shifted.answer.energy) == pytest.approx(float(plain.answer.energy), abs=1e-10)


@pytest.mark.parametrize("boundary", ["slab", "finite-field", "open"])
def test_what_is_kept_from_step_to_step_changes_nothing(boundary):
    """One potential through a history of moves against a new one at every step; metal frozen, then not."""
    case = Capacitor("ions", boundary, fixed=True)
    rng = np.random.default_rng(4)
    liquid = tensor(case.liquid)[:, None]
    base = case.system
    noise = [tensor(rng.normal(0, 0.1, (len(case.atoms), 3))) for _ in range(4)]
    one = torch.zeros_like(base.positions)
    one[case.members[1][3], 1] = 1.0
    shear = torch.eye(3, dtype=torch.float64)
    shear[0, 0] = 1 + 1e-5
    history = [
        base,
        base.replace(positions=base.positions + noise[0] * liquid),
        base.replace(positions=base.positions + noise[1] * liquid, applied=tensor([[0.4, -0.3]])),
        base.replace(positions=base.positions + 1e-6 * one),
        base.replace(positions=base.positions + noise[2] * liquid + 1e-3 * one),
        base.replace(positions=base.positions @ shear, cell=base.cell @ shear),
        base.replace(positions=base.positions + tensor([0.2, 0.1, -0.3])),
        Systems.join([base, base.replace(positions=base.positions + noise[3], applied=tensor([[1.0, 0.0]]))]),
        base.replace(electrode=torch.where(base.electrode >= 0, 1 - base.electrode, -1)),
        base.replace(carried=-base.carried),
        base,
    ]
    previous = None
    for step, system in enumerate(history):
        fresh = Potential(charges=replace(case.potential.charges))(system)
        answer = case.potential(system, start=previous)
        previous = answer
        for key, tolerance in (("charges", 1e-9), ("energy", 1e-9), ("forces", 1e-8), ("virial", 1e-8)):
            found, expected = getattr(answer, key), getattr(fresh, key)
            assert found.numpy() == pytest.approx(expected.numpy(), abs=tolerance), (step, key)


@pytest.mark.parametrize("boundary", ["slab", "periodic", "open"])
def test_fixed_charges_alone(boundary):
    """Without electrodes there is nothing to solve: the exact sum over points and Gaussians, in a field."""
    case = Capacitor("ions", boundary)
    atoms = case.atoms[case.liquid]
    given = np.array([CHARGES[s] for s in atoms.get_chemical_symbols()])
    along = np.array([0.0, 0.0, 0.0 if boundary == "periodic" else 0.07])
    model = FixedCharges(widths=WIDTHS, **SHARP)
    system = Systems.from_atoms(atoms, field=along).replace(carried=tensor(given))
    potential = Potential(charges=model)
    answer = potential(potential.prepare(system), born_charges=True, polarizability=True)
    alpha = np.array([WIDTHS[s] ** 2 for s in atoms.get_chemical_symbols()])
    still = np.zeros((len(atoms), 3))
    pbc = tuple(bool(p) for p in atoms.pbc)
    energy, _, gradient = site_sums(
        atoms.positions, atoms.cell.array, pbc, alpha, np.stack([given, 0 * given]), still, COULOMB_CONSTANT
    )
    assert float(answer.energy) == pytest.approx(energy - along @ (given @ atoms.positions), abs=1e-8)
    forces = given[:, None] * (along - gradient[0])
    assert answer.forces.numpy() == pytest.approx(forces, abs=1e-8)
    assert answer.charges.tolist() == given.tolist()
    assert answer.born_charges.numpy() == pytest.approx(given[:, None, None] * np.eye(3), abs=1e-10)
    assert float(answer.polarizability.abs().max()) < 1e-12
    assert float(answer.residual) == 0


# -- refusals ---------------------------------------------------------------------------------------------------------


def assign(members, values=(0.0, 1.0)):
    case = built("slab, two potentials, points")
    return assign_electrodes(Systems.from_atoms(case.atoms), case.electrodes, members, values)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ([2, 3, 4], [4, 15]),
            r"atom 4 \(Au\) belongs to electrodes.metal 0 and to electrodes.metal 1: make their sel",
        ),
        (([2, 3], []), r"electrodes.metal 1 has no atoms: correct its selection"),
        (([2, 3], [12, 20]), r"electrodes.metal 1 has atom 20 but the structure has atoms 0 to 19: correct its list"),
        (([-1, 3], [12]), r"electrodes.metal 0 has atom -1 but the structure has atoms 0 to 19: correct its list"),
    ],
    ids=["overlap", "empty", "beyond", "negative"],
)
def test_atoms_that_do_not_fit_are_refused(members, message):
    with pytest.raises(InputError, match=message):
        assign(members)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(
        InputError, match=r"the electrodes' potentials and charges are \[0.0, nan\]: give finite numbers"
    ):
        assign(([2, 3], [12]), (0.0, math.nan))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"control": "voltage"}, r"electrodes.A: control is 'voltage': choose potential \| charge"),
        ({"eta": -1.0}, r"electrodes.A.eta is -1: give a number that is positive"),
        ({"eta": math.nan}, r"electrodes.A.eta is nan: give a number that is positive"),
        ({"eta": 1.6, "thomas_fermi": -0.5}, r"electrodes.A.thomas_fermi is -0.5: give a number that is 0 or positive"),
        ({"eta": 1.6, "atom_volume": 0.0}, r"electrodes.A.atom_volume is 0: give a number that is positive"),
        ({"eta": 1.6, "hardness": -2.0}, r"electrodes.A.hardness is -2: give a number that is 0 or positive"),
        ({"hardness": 1.0}, r"electrodes.A.hardness is 1 but the electrode has no eta: give eta"),
        ({"eta": 1.6, "chi": math.inf}, r"electrodes.A.chi is inf: give a finite number"),
    ],
)
def test_electrodes_that_cannot_be_are_refused(keywords, message):
    with pytest.raises(InputError, match=message):
        Electrode(**{"name": "A", "control": "potential", **keywords})


FEW = {**KEEP, "parameters": {k: v for k, v in PQEq().parameters.items() if k in "OH"}}
BAD = {
    "finite field and a charge": (
        kind("ions", "finite-field", fixed=True, electrodes=(METAL, CHARGE)),
        "coulomb.boundary is finite-field with 2 electrodes, 1 of them at a charge: give two electrodes at potentials",
    ),
    "finite field and three": (
        kind("ions", "finite-field", fixed=True, electrodes=(METAL,) * 3, values=(0.0, 1.0, 0.5)),
        "coulomb.boundary is finite-field with 3 electrodes",
    ),
    "charges that do not add up": (
        kind("ions", fixed=True, electrodes=(CHARGE, CHARGE), values=(0.1, 0.3), net_charge=0.5),
        r"charges.net_charge is 0.5 e but the charges that are given .* add up to 0.4 e .*: make them equal",
    ),
    "molecules and charges that do not add up": (
        kind("one ion", charges=KEEP, electrodes=(CHARGE, CHARGE), values=(0.1, 0.3)),
        r"charges.net_charge is 0 e but the charges that are given .* add up to 1.4 e .*: make them equal",
    ),
    "field in the plane": (
        kind("ions", fixed=True, field=(0.1, 0, 0)),
        "field along a periodic direction with electrodes: .* set that component of field to 0",
    ),
    "field on a finite-field cell": (
        kind("water", "finite-field", charges=KEEP, field=(0, 0, 0.1)),
        "field along a periodic direction with electrodes: .* set that component of field to 0",
    ),
    "metal without parameters": (
        kind("water", charges=FEW, electrodes=(METAL, PQEQ_METAL)),
        "electrodes.metal 1 needs PQEq parameters of Au: give it eta .* or add a row to charges.parameters",
    ),
    "shells without parameters": (
        kind("water", charges=FEW, electrodes=(replace(METAL, polarizable=True), METAL)),
        "electrodes.metal 0 needs PQEq parameters of Au: give it eta .* or add a row to charges.parameters",
    ),
    "electrolyte without parameters": (
        kind("salt water", charges=FEW),
        r"no PQEq parameters for .*Cl: add a row to charges.parameters \(this model knows H, O\)",
    ),
    "width missing": (
        kind("ions", fixed={"Na": 1.0}),
        r"charges.width has no Cl \(it has Na\): give its eta \(1/Å\), or charges.width: point",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_do_not_fit_are_refused(name):
    case, message = BAD[name]
    with pytest.raises(InputError, match=message):
        _ = case().answer


def test_metal_with_eta_needs_no_parameters():
    assert float(Capacitor("water", charges=FEW).answer.residual) < 1e-11


def test_electrode_cut_by_the_face_of_the_cell_is_refused():
    case = built("finite field, points")
    positions = case.system.positions.clone()
    positions[case.members[0][-1]] += case.system.cell[0, 2]
    with pytest.raises(InputError, match=r"electrodes.metal 0 .*along c .*1.08 of it.*: shift the structure"):
        case.potential.prepare(case.system.replace(positions=positions))


def test_finite_field_needs_three_periodic_directions():
    case = built("slab, two potentials, points")
    with pytest.raises(InputError, match=r"coulomb.boundary finite-field needs a structure that is periodic in all"):
        Potential(charges=replace(case.potential.charges, finite_field=2)).prepare(case.system)


def test_other_electrodes_than_the_structure_has_are_refused():
    case = built("slab, two potentials, points")
    for electrodes in ((), case.electrodes[:1]):
        model = replace(case.potential.charges, electrodes=electrodes)
        with pytest.raises(InputError, match=f"2 electrodes but the potential {len(electrodes)}: assign them anew"):
            Potential(charges=model).prepare(case.system)
    with pytest.raises(InputError, match="the structure has 0 electrodes but the potential 2"):
        case.potential(case.system.replace(electrode=None, applied=None))


def test_no_volume_is_tabulated_for_every_element():
    metal = Electrode("A", "potential", eta=1.6, thomas_fermi=0.5)
    atoms = Atoms("Au2", [[0, 0, 0], [0, 0, 5]])
    system = assign_electrodes(Systems.from_atoms(atoms), (metal,), [[0, 1]], [0.0])
    model = PQEq(electrodes=(metal,))
    tabulated = float(model.tensors(system)["eta"][0])
    own = COULOMB_CONSTANT * math.sqrt(2 / math.pi) * 1.6
    assert tabulated - own == pytest.approx(4 * math.pi * COULOMB_CONSTANT * 0.25 / (4.08**3 / 4), rel=1e-12)
    oxygen = system.replace(numbers=torch.tensor([8, 8]))
    with pytest.raises(InputError, match="no bulk atomic volume is tabulated for O: give the electrode's atom_volume"):
        model.tensors(oxygen)


# -- faults found -----------------------------------------------------------------------------------------------------


def test_finite_field_refuses_charges_that_flow_freely():
    """pqeq.check_field: with conserve total an atom's charge changes when it is wrapped, and Ω by more than an eV."""
    with pytest.raises(InputError, match=r"charges.conserve to fragments"):
        _ = Capacitor("water", "finite-field", charges={"conserve": "total"}).answer


def test_finite_field_refuses_fragments_that_cross_the_cell():
    """pqeq.check_field: check_whole and percolating are only asked where ``system.field`` is along."""
    case = Capacitor("vacuum", "finite-field", charges=KEEP)
    case.atoms += Atoms("C18", [0.9, 0.6, 0.0] + np.arange(18)[:, None] / 18 * case.atoms.cell.array[2])
    case.system = case.prepared()
    with pytest.raises(InputError, match=r"bonded to its own image"):
        _ = case.answer


def test_finite_field_refuses_a_net_charge():
    """pqeq/check_electrodes: −ε·M of a charged cell changes when everything is translated (and the cell is pulled)."""
    case = Capacitor("ions", "finite-field", fixed=True, net_charge=0.3)
    try:
        first = float(case.answer.energy)
    except InputError as error:
        assert "net_charge" in str(error)  # noqa: PT017
        return
    second = float(moved(case, case.system.positions + tensor([0.0, 0.0, 1.0])).energy)
    assert first == pytest.approx(second, abs=1e-8)


def test_fixed_charges_without_charges_name_the_fix():
    """functional._held_charges, reached from Potential.prepare: says 'prepare it first'."""
    case = built("slab, two potentials, points")
    with pytest.raises(InputError, match=r"(initial_charges|charges\.)(?!.*prepare it first)"):
        case.potential.prepare(case.system.replace(carried=None))


def test_two_electrodes_of_one_name_are_refused():
    """PQEq.__post_init__: Response.electrodes is a dictionary by name."""
    with pytest.raises(InputError, match="metal"):
        FixedCharges(electrodes=(METAL, METAL))


def test_mask_of_atoms_is_refused_or_understood():
    """external.electrodes.assign_electrodes: np.asarray(mask, dtype=int64) makes indices 0 and 1 of it."""
    case = built("slab, two potentials, points")
    mask = np.isin(np.arange(len(case.atoms)), case.members[0])
    try:
        found = assign_electrodes(Systems.from_atoms(case.atoms), case.electrodes[:1], [mask], [0.0])
    except InputError:
        return
    assert torch.equal(found.electrode == 0, case.system.electrode == 0)


def test_a_batch_cannot_be_assigned_at_once():
    """external.electrodes.assign_electrodes: leaves ``applied`` [1, e] on a batch of two."""
    case = built("slab, two potentials, points")
    with pytest.raises(InputError, match="one structure"):
        assign_electrodes(Systems.from_atoms([case.atoms] * 2), case.electrodes, case.members, case.values)
