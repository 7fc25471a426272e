"""The accuracy asked of the Coulomb sum is the accuracy got, over cells, densities, elements and boundaries.

The reference is :mod:`exact_sums`, which is good to rounding (1e-12 and better) in all these cases.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.cell import Cell
from numpy.typing import NDArray

from voltpi.potential.electrostatics import ewald
from voltpi.potential.electrostatics.pqeq import read_parameters
from voltpi.potential.systems import Systems

from brute_force import K_E, LAMBDA
from exact_sums import site_sums

Array = NDArray[np.float64]

ACCURACIES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
TABLE = read_parameters()
SHELL_CHARGE = -1.0
SHELL_RMS = 0.05  # Å
CHARGE_RMS = 0.5  # e

CUBIC = (1, 1, 1, 90, 90, 90)
ALL_30 = (1, 1, 1, 30, 30, 30)  # 0.22 of the volume of a cube
SKEWED = (1, 2, 1.5, 30, 45, 60)
LONG = (1, 1, 20, 90, 90, 90)
FLAT = (20, 20, 1, 90, 90, 90)
SLAB, PERIODIC, OPEN = (True, True, False), (True, True, True), (False, False, False)


class Case(NamedTuple):
    """One structure of the sweep, by what it is made from."""

    symbols: str  # repeated up to n
    n: int
    shape: tuple[float, ...]  # ratios of the edges, angles (degrees)
    density: float  # atoms/Å^3
    net: float = 0.0  # e
    pbc: tuple[bool, bool, bool] = PERIODIC


RANDOM = {
    "liquid of H and O": Case("OHH", 48, CUBIC, 0.1),
    "H to Cs, charged": Case("HCsNaOHCl", 42, CUBIC, 0.05, 1.0),
    "Pu and O": Case("PuOO", 36, CUBIC, 0.07),
    "Cs alone": Case("Cs", 20, CUBIC, 0.009),
    "dilute": Case("OHNa", 21, CUBIC, 0.005),
    "dilute, charged": Case("OHCs", 21, CUBIC, 0.005, -2.0),
    "dense": Case("CHONCsPu", 60, CUBIC, 0.15),
    "dense, narrow, charged": Case("H", 40, CUBIC, 0.15, 2.0),
    "30 degrees": Case("LiPON", 40, ALL_30, 0.09),
    "30 degrees, H and Cs, charged": Case("HCs", 30, ALL_30, 0.03, 1.0),
    "skewed": Case("BaTiOOO", 40, SKEWED, 0.08),
    "long": Case("TiOOHK", 40, LONG, 0.08),
    "long, dilute, charged": Case("HCs", 24, LONG, 0.01, 1.0),
    "flat": Case("LiPONCs", 60, FLAT, 0.1),
    "flat, charged": Case("HPuO", 48, FLAT, 0.04, -1.0),
    "one atom, H": Case("H", 1, CUBIC, 0.05, 0.5),
    "one atom, Cs": Case("Cs", 1, ALL_30, 0.01, 0.5),
    "one neutral atom, Pu": Case("Pu", 1, SKEWED, 0.05),
    "two atoms, Na and Cl": Case("NaCl", 2, ALL_30, 0.045),
    "two atoms, H and Cs, charged": Case("HCs", 2, CUBIC, 0.02, 0.4),
    "two atoms, flat": Case("HPu", 2, FLAT, 0.005),
    "cluster": Case("OHHCs", 40, CUBIC, 0.06, pbc=OPEN),
    "long cluster, charged": Case("HOCsPu", 32, LONG, 0.03, 1.0, OPEN),
    "slab": Case("OHH", 36, CUBIC, 0.09, pbc=SLAB),
    "slab, H and Cs, charged": Case("HCsO", 30, CUBIC, 0.03, 1.0, SLAB),
    "slab, 30 degrees, open along b": Case("LiPON", 32, ALL_30, 0.08, pbc=(True, False, True)),
    "thin slab": Case("PuOH", 30, FLAT, 0.05, pbc=SLAB),
    "thick slab, charged": Case("TiOOK", 32, (1, 1, 8, 90, 90, 90), 0.08, -1.0, SLAB),
    "slab of one atom": Case("Na", 1, SKEWED, 0.04, 0.5, SLAB),
    "large": Case("LiPONCsH", 400, CUBIC, 0.08),
    "large cluster, charged": Case("LiPONCsH", 200, CUBIC, 0.05, 2.0, OPEN),
    "large slab": Case("LiPONCsH", 100, SKEWED, 0.06, pbc=SLAB),
}  # fmt: skip
GRID = {
    f"{shape_name}, {symbols}, {density} per A^3": Case(symbols, n, shape, density, net)
    for shape_name, shape, n in (("cubic", CUBIC, 20), ("all 30", ALL_30, 20), ("long", LONG, 24), ("flat", FLAT, 48))
    for symbols, net in (("H", 1.0), ("HCs", 0.0), ("CsOPuH", -1.0), ("PuO", 0.0))
    for density in (0.005, 0.02, 0.06, 0.15)
}


def cases() -> Iterator[tuple[str, Atoms, Array, Array, Array]]:
    """(name, atoms, α [n] Å⁻², q [n] e of core and shell together, shells [n, 3] Å) of the sweep."""
    yield from _cases()


@functools.cache
def _cases() -> list[tuple[str, Atoms, Array, Array, Array]]:
    out = []
    for seed, (name, case) in enumerate({**RANDOM, **GRID}.items()):
        rng = np.random.default_rng(seed)
        atoms = scattered(case, rng)
        out.append((name, atoms, table_alpha(atoms), *charges_and_shells(len(atoms), case.net, rng)))
    rng = np.random.default_rng(1000)
    for name, atoms in (("CsPbI3", perovskite(rng)), ("water vapour", vapour(rng))):
        out.append((name, atoms, table_alpha(atoms), *charges_and_shells(len(atoms), 0.0, rng)))
    for name, case in (
        ("almost points", Case("LiCl", 30, CUBIC, 0.06)),
        ("almost points and Cs, charged", Case("LiCs", 30, SKEWED, 0.03, 1.0)),
        ("almost points, slab", Case("LiClCs", 30, CUBIC, 0.05, pbc=SLAB)),
    ):
        atoms = scattered(case, rng)
        alpha = table_alpha(atoms)
        points = np.array(atoms.get_chemical_symbols()) != "Cs"
        alpha[points] = rng.choice([4.0, 20.0], points.sum())
        out.append((name, atoms, alpha, *charges_and_shells(len(atoms), case.net, rng)))
    return out


def scattered(case: Case, rng: np.random.Generator) -> Atoms:
    """Random places, no two atoms closer than 0.6 ρ^(−1/3), nor than the 0.9 Å of a bond to hydrogen."""
    unit = Cell.new(case.shape)
    cell = Cell(unit.array * (case.n / case.density / unit.volume) ** (1 / 3))
    nearest = max(0.9, 0.6 * case.density ** (-1 / 3))
    images = np.array(list(itertools.product(*((-1, 0, 1) if p else (0,) for p in case.pbc))))
    places = np.zeros((0, 3))  # in units of the cell
    while len(places) < case.n:
        new = rng.random(3)
        apart = new - places
        apart -= np.round(apart) * case.pbc
        if not len(places) or np.linalg.norm((apart + images[:, None]) @ cell.array, axis=-1).min() > nearest:
            places = np.concatenate([places, [new]])
    kinds = Atoms(case.symbols).get_chemical_symbols()
    symbols = [kinds[i % len(kinds)] for i in range(case.n)]
    return Atoms(symbols, scaled_positions=places, cell=cell, pbc=case.pbc)


def perovskite(rng: np.random.Generator) -> Atoms:
    """Two cells of cubic CsPbI₃, rattled, left-handed."""
    a = 6.29
    at = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    atoms = Atoms("CsPbI3", scaled_positions=at, cell=a * np.eye(3), pbc=True) * (2, 1, 1)
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    return atoms


def vapour(rng: np.random.Generator) -> Atoms:
    """Eight water molecules on the sites of a wide lattice."""
    atoms = Atoms(cell=np.diag([15.0, 16.0, 17.0]), pbc=True)
    for centre in bulk("Po", "sc", a=1.0).repeat(2).positions * [7.5, 8.0, 8.5]:
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        atoms += Atoms("OH2", centre + np.array([[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]) @ turn)
    return atoms


def table_alpha(atoms: Atoms) -> Array:
    """α of the shipped parameters, Å⁻²."""
    radius = np.array([TABLE[s].R for s in atoms.get_chemical_symbols()])
    return 0.5 * LAMBDA / radius**2


def charges_and_shells(n: int, net: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """q [n] with the net charge given, its spread as large as in a PQEq solution, and shells [n, 3]."""
    q = rng.normal(size=n)
    q -= q.mean()
    q = CHARGE_RMS * q / max(q.std(), 1e-3) + net / n
    return q, rng.normal(0, SHELL_RMS / math.sqrt(3), (n, 3))


class Exact(NamedTuple):
    """What the operator should have answered."""

    energy: float
    potential: Array  # [2, n]
    gradient: Array  # [2, n, 3]


_KNOWN: dict[bytes, Exact] = {}


def exact(atoms: Atoms, alpha: Array, q: Array, shells: Array) -> Exact:
    """The exact sums; kept, because every request of a case is held against the same numbers."""
    charges = np.stack([q - SHELL_CHARGE, np.full_like(q, SHELL_CHARGE)])
    parts = (atoms.positions, atoms.cell.array, atoms.pbc, alpha, charges, shells)
    key = b"".join(np.ascontiguousarray(p).tobytes() for p in parts)
    if key not in _KNOWN:
        _KNOWN[key] = Exact(
            *site_sums(atoms.positions, atoms.cell.array, tuple(atoms.pbc), alpha, charges, shells, K_E)
        )
    return _KNOWN[key]


def answered(
    atoms: Atoms, alpha: Array, q: Array, shells: Array, accuracy: float, **operator_options: Any
) -> ewald.CoulombState:
    """The operator's state."""
    operator = ewald.CoulombOperator(
        Systems.from_atoms(atoms, net_charge=float(q.sum())),
        torch.tensor(alpha),
        torch.full((len(atoms),), SHELL_CHARGE, dtype=torch.float64),
        accuracy=accuracy,
        k_e=K_E,
        **operator_options,
    )
    return operator.at(torch.tensor(q), torch.tensor(shells))


def rms(x: Array) -> float:
    """Root of the mean square norm over atoms: [n] or [n, 3]."""
    return math.sqrt(float((x**2).sum() / len(x)))


def relative_errors(
    atoms: Atoms,
    q: Array,
    shells: Array,
    accuracy: float,
    *,
    alpha: Array | None = None,
    **operator_options: Any,
) -> dict[str, float]:
    """Errors of the operator asked for ``accuracy``, each relative to the exact answer.

    ``force``: rms of the error of −Σ_sites Q·gradient over the rms force. ``shell field``: the same for the gradient at
    the shells. ``core potential``: rms error over the standard deviation of the potential at the cores. ``energy``:
    error over ½ Σ |Qφ|.

    One atom in a cell feels no force, hardly a field, and its potential has no spread; nor do two wide atoms. With one
    or two atoms the force, field and potential of two charges of 0.5 e, one mean distance apart, are what an error is
    relative to, where the exact ones are smaller.

    α of the shipped parameters is taken where none is given; further options go to the operator.
    """
    alpha = table_alpha(atoms) if alpha is None else alpha
    reference = exact(atoms, alpha, q, shells)
    state = answered(atoms, alpha, q, shells, accuracy, **operator_options)
    potential, gradient = state.potential.numpy(), state.gradient.numpy()
    charges = np.stack([q - SHELL_CHARGE, np.full_like(q, SHELL_CHARGE)])
    forces, exact_forces = (-(charges[..., None] * g).sum(0) for g in (gradient, reference.gradient))
    core, exact_core = potential[0], reference.potential[0]
    few = len(atoms) <= 2
    distance = (atoms.cell.volume / len(atoms)) ** (1 / 3)
    least = K_E * CHARGE_RMS / distance if few else 0.0
    return {
        "force": rms(forces - exact_forces) / max(rms(exact_forces), CHARGE_RMS * least / distance),
        "shell field": rms(gradient[1] - reference.gradient[1]) / max(rms(reference.gradient[1]), least / distance),
        "core potential": rms(core - exact_core) / max(float(exact_core.std()), least),
        "energy": abs(float(state.energy.sum()) - reference.energy)
        / float(0.5 * np.abs(charges * reference.potential).sum()),
    }


def exact_virial(atoms: Atoms, alpha: Array, q: Array, shells: Array) -> Array:
    """−∂E/∂s_ab, [3, 3] eV, r_a -> r_a + s_ab r_b, by central differences (fourth order) at fixed q and Δ."""
    charges = np.stack([q - SHELL_CHARGE, np.full_like(q, SHELL_CHARGE)])
    h, out = 2e-3, np.zeros((3, 3))

    def energy(strain: Array) -> float:
        turn = np.eye(3) + strain.T
        return site_sums(
            atoms.positions @ turn, atoms.cell.array @ turn, tuple(atoms.pbc), alpha, charges, shells, K_E
        )[0]

    for x, y in np.ndindex(3, 3):
        unit = np.zeros((3, 3))
        unit[x, y] = 1.0
        near, far = (energy(s * unit) - energy(-s * unit) for s in (h, 2 * h))
        out[x, y] = -(8 * near - far) / (12 * h)
    return out


SWEEP = [case[0] for case in _cases()]


def case(name: str) -> tuple[Atoms, Array, Array, Array]:
    return _cases()[SWEEP.index(name)][1:]


@pytest.fixture
def on_a_mesh(monkeypatch):
    """Clusters on the mesh, however few their atoms."""
    monkeypatch.setattr(ewald, "DIRECT_BELOW", 0)


@pytest.mark.usefixtures("on_a_mesh")
@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize("name", SWEEP)
def test_accuracy_asked_is_accuracy_got(name, accuracy):
    atoms, alpha, q, shells = case(name)
    errors = relative_errors(atoms, q, shells, accuracy, alpha=alpha)
    assert max(errors.values()) < accuracy, errors


@pytest.mark.usefixtures("on_a_mesh")
@pytest.mark.parametrize(
    "name",
    [
        "dense, narrow, charged",
        "30 degrees, H and Cs, charged",
        "flat, charged",
        "one atom, H",
        "two atoms, Na and Cl",
        "CsPbI3",
        "almost points",
        "cluster",
        "slab, H and Cs, charged",
        "slab, 30 degrees, open along b",
    ],
)
def test_virial(name):
    """Within three times the request, which is for forces; relative to k_e q²/d an atom where the virial is smaller."""
    atoms, alpha, q, shells = case(name)
    expected = exact_virial(atoms, alpha, q, shells)
    pair_energy = K_E * CHARGE_RMS**2 / (atoms.cell.volume / len(atoms)) ** (1 / 3)
    scale = max(np.linalg.norm(expected), len(atoms) * pair_energy)
    for accuracy in ACCURACIES:
        virial = answered(atoms, alpha, q, shells, accuracy).virial().numpy().reshape(3, 3)
        error = np.linalg.norm(virial - expected) / scale
        assert error < 3 * accuracy, (accuracy, error)


def test_clusters_summed_pair_by_pair_are_exact():
    atoms, alpha, q, shells = case("cluster")
    errors = relative_errors(atoms, q, shells, 1e-3, alpha=alpha)
    assert max(errors.values()) < 1e-12, errors
