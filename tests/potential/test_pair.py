"""Pair potentials: formulae by hand, the alkali chlorides as they are known, derivatives, the smooth ends, images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers
from scipy.optimize import minimize_scalar
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.pair import (
    ZBL,
    BMHParameters,
    BornMayerHuggins,
    LennardJones,
    LJParameters,
    PairPotential,
    list_sets,
    read_set,
)
from voltpi.potential.systems import Systems

from structures import flat_cell, one_atom_cell, water_box

K_E = 14.3996454784255
ROCKSALT_MADELUNG = 1.7475645946331822
GPA = 160.21766208  # 1 eV/Å³
SALTS = {"nacl": "NaCl", "licl": "LiCl", "kcl": "KCl"}

NACL = read_set("nacl")
WATER = {"O": LJParameters(0.0067, 3.17), "H": LJParameters(0.002, 1.2), "H-O": LJParameters(0.004, 1.9)}


def potential(
    *terms: BornMayerHuggins | LennardJones | ZBL, cutoff: float = 10.0, precision: str = "double"
) -> Potential:
    return Potential(PairPotential(terms, cutoff), precision=precision)


def energy(potential: Potential, atoms: Atoms) -> float:
    return float(potential(Systems.from_atoms(atoms)).energy[0])


def dimer_energy(potential: Potential, pair: str, r: float) -> float:
    return energy(potential, Atoms(pair.split("-"), [[0.1, 0.2, -0.3], [0.1 + 0.6 * r, 0.2, -0.3 + 0.8 * r]]))


def curve(term: BornMayerHuggins | LennardJones | ZBL | PairPotential, pair: str, r: Tensor) -> list[Tensor]:
    """Energy of a pair and its first and second derivative at distances ``r``."""
    z = torch.tensor([atomic_numbers[s] for s in pair.split("-")])
    r = r.clone().requires_grad_()
    if isinstance(term, PairPotential):
        vectors = torch.stack([r, torch.zeros_like(r), torch.zeros_like(r)], dim=1)
        # every distance is a molecule of its own: atom 2k with its neighbour 2k + 1
        first = torch.arange(0, 2 * len(r), 2)
        index = torch.cat([torch.stack([first, first + 1]), torch.stack([first + 1, first])], dim=1)
        value = term(z.repeat(len(r)), index, torch.cat([vectors, -vectors])).view(-1, 2).sum(1)
    else:
        value = term(z[0].expand(len(r)), z[1].expand(len(r)), r * r)
    (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    return [value.detach(), slope.detach(), curvature]


def grid(start: float, end: float, n: int = 400) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


# -- by hand ----------------------------------------------------------------------------------------------------------


def bmh(r: float, a: float, rho: float, sigma: float, c: float, d: float) -> float:
    return a * math.exp((sigma - r) / rho) - c / r**6 - d / r**8


def lennard_jones(r: float, epsilon: float, sigma: float) -> float:
    return 4 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6)


def switch(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return 1 - 10 * x**3 + 15 * x**4 - 6 * x**5


def zbl(r: float, z1: int, z2: int, end: float) -> float:
    x = r * (z1**0.23 + z2**0.23) / (0.8854 * 0.529177)
    phi = 0.1818 * math.exp(-3.2 * x) + 0.5099 * math.exp(-0.9423 * x)
    phi += 0.2802 * math.exp(-0.4029 * x) + 0.02817 * math.exp(-0.2016 * x)
    return K_E * z1 * z2 / r * phi * switch(r * r / end**2)


@pytest.mark.parametrize("pair", ["Na-Cl", "Cl-Na", "Na-Na", "Cl-Cl"])
def test_tosi_fumi_nacl_is_the_published_formula(pair: str) -> None:
    published = {  # eV, Å, as commonly listed
        "Na-Na": (0.2637, 0.317, 2.340, 1.0486, 0.4993),
        "Na-Cl": (0.21096, 0.317, 2.755, 6.9906, 8.6758),
        "Cl-Na": (0.21096, 0.317, 2.755, 6.9906, 8.6758),
        "Cl-Cl": (0.158221, 0.317, 3.170, 72.402, 145.43),
    }
    nacl = potential(BornMayerHuggins(NACL))
    for r in (1.9, 2.5, 3.3, 5.0, 7.9):  # 8 Å is where the switch begins
        assert dimer_energy(nacl, pair, r) == pytest.approx(bmh(r, *published[pair]), rel=1e-4, abs=1e-6)


def test_the_sets_are_tosi_and_fumis_numbers_in_ev() -> None:
    # sigma (Å) of the ions, rho (Å), C (1e-79 J m⁶) and D (1e-99 J m⁸) of ++, +-, --; electrons n in Pauling's factor
    published = {
        "nacl": ("Na", 1.170, 8, 0.317, (1.68, 11.2, 116.0), (0.8, 13.9, 233.0)),
        "licl": ("Li", 0.816, 2, 0.342, (0.073, 2.0, 111.0), (0.03, 2.4, 223.0)),
        "kcl": ("K", 1.463, 8, 0.337, (24.3, 48.0, 124.5), (24.0, 73.0, 250.0)),
    }
    joule = 1 / 1.602176634e-19
    assert sorted(list_sets()) == sorted(published)
    for name, (metal, sigma, electrons, rho, c, d) in published.items():
        rows = read_set(name)
        assert list(rows) == [f"{metal}-{metal}", f"{metal}-Cl", "Cl-Cl"]
        for k, row in enumerate(rows.values()):
            charges, shells, radii = ((1, 1), (1, -1), (-1, -1))[k], (electrons, 8), (sigma, 1.585)
            ends = ((0, 0), (0, 1), (1, 1))[k]
            pauling = 1 + sum(q / shells[e] for q, e in zip(charges, ends, strict=True))
            expected = (
                pauling * 0.338e-19 * joule,
                rho,
                sum(radii[e] for e in ends),
                c[k] * 1e-79 * 1e60 * joule,
                d[k] * 1e-99 * 1e80 * joule,
            )
            assert tuple(row) == pytest.approx(expected, rel=1e-5)


def test_buckingham_and_born_mayer_are_special_cases() -> None:
    # silica (van Beest, Kramer, van Santen, Phys. Rev. Lett. 64, 1955 (1990))
    bks = potential(BornMayerHuggins({"Si-O": BMHParameters(18003.7572, 1 / 4.87318, C=133.5381)}))
    alone = potential(BornMayerHuggins({"Si-O": BMHParameters(18003.7572, 1 / 4.87318)}))
    with pytest.raises(InputError, match="no parameters for O-O, Si-Si"):
        dimer_energy(bks, "Si-O", 1.6)
    assert curve(bks.short_range.terms[0], "O-Si", grid(1.6, 1.6, 1))[0].item() == pytest.approx(
        18003.7572 * math.exp(-4.87318 * 1.6) - 133.5381 / 1.6**6, rel=1e-12
    )
    # nothing but an exponential, and that down to r = 0
    value, slope, _ = curve(alone.short_range.terms[0], "O-Si", grid(1e-3, 8.0))
    expected = 18003.7572 * torch.exp(-4.87318 * grid(1e-3, 8.0))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, -4.87318 * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("mixing", "sigma"), [("lorentz-berthelot", (2.35 + 4.40) / 2), ("geometric", math.sqrt(2.35 * 4.40))]
)
def test_lennard_jones_mixes_and_has_its_minimum_at_epsilon(mixing: str, sigma: float) -> None:
    rows = {"Na": LJParameters(0.0056, 2.35), "Cl": LJParameters(0.0043, 4.40)}
    lj = potential(LennardJones(rows, mixing))
    epsilon = math.sqrt(0.0056 * 0.0043)
    assert dimer_energy(lj, "Na-Cl", 2 ** (1 / 6) * sigma) == pytest.approx(-epsilon, rel=1e-12)
    assert dimer_energy(lj, "Cl-Na", sigma) == pytest.approx(0, abs=1e-12)
    assert dimer_energy(lj, "Cl-Cl", 4.1) == pytest.approx(lennard_jones(4.1, 0.0043, 4.40), rel=1e-12)
    # a pair that is given comes before the rule, whatever the order in which it is named, and leaves the others alone
    given = potential(LennardJones({"Cl-Na": LJParameters(0.01, 3.0), **rows}, mixing))
    assert dimer_energy(given, "Na-Cl", 2 ** (1 / 6) * 3.0) == pytest.approx(-0.01, rel=1e-12)
    assert dimer_energy(given, "Na-Na", 2 ** (1 / 6) * 2.35) == pytest.approx(-0.0056, rel=1e-12)


def test_zbl_is_the_universal_potential_inside_the_covalent_radii() -> None:
    wall = potential(ZBL())
    for pair, end in {"Na-Cl": 1.66 + 1.02, "O-H": 0.66 + 0.31, "Cs-I": 2.44 + 1.39}.items():
        z1, z2 = (atomic_numbers[s] for s in pair.split("-"))
        for r in (0.31, 0.5, 0.9):
            assert dimer_energy(wall, pair, r) == pytest.approx(zbl(r, z1, z2, end), rel=2e-3)
        assert dimer_energy(wall, pair, end) == 0.0
    near = grid(1e-5, 1e-5, 1)  # two bare nuclei
    assert curve(ZBL(), "Na-Cl", near)[0].item() == pytest.approx(K_E * 11 * 17 / 1e-5, rel=1e-3)
    assert potential(ZBL()).short_range.cutoff < 5.5  # no neighbours are listed that feel nothing


def test_zbl_of_chosen_pairs_ends_where_it_is_told() -> None:
    wall = ZBL({"H-H": 1.2})
    assert int((wall.reach > 0).sum()) == 1
    for r in (0.3, 0.8, 1.15):
        numbers = torch.tensor([1, 1])
        index, vectors = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[r, 0.0, 0.0], [-r, 0.0, 0.0]]).double()
        energies = wall.atomic(numbers, index, vectors)
        assert energies[0] == energies[1]
        assert float(energies.sum()) == pytest.approx(zbl(r, 1, 1, 1.2), rel=2e-3)
    assert wall.atomic(torch.tensor([1, 8]), index, 0.1 * vectors).tolist() == [0.0, 0.0]


def test_terms_add_up() -> None:
    parts = [BornMayerHuggins(NACL), ZBL(), LennardJones({s: LJParameters(0.01, 2.5) for s in ("Na", "Cl")})]
    for r in (1.5, 2.8):
        together = dimer_energy(potential(*parts), "Na-Cl", r)
        alone = [dimer_energy(potential(part), "Na-Cl", r) for part in parts]
        assert together == pytest.approx(sum(alone), rel=1e-12)
        assert (alone[1] != 0) == (r < 2.68)


# -- known crystals ---------------------------------------------------------------------------------------------------

# Lattice constants at room temperature (Å); lattice energies from the Born–Fajans–Haber cycle (kJ/mol; CRC Handbook of
# Chemistry and Physics); bulk moduli (C11 + 2 C12)/3 (GPa) from elastic constants at 4 K (NaCl, KCl: Lewis et al.,
# Phys. Rev. 161, 877 (1967)) and extrapolated to 0 K (LiCl: Marshall et al., J. Phys. Chem. Solids 28, 1061 (1967)).
MEASURED = {"nacl": (5.640, 786.0, 26.6), "licl": (5.130, 853.0, 35.4), "kcl": (6.293, 715.0, 19.7)}


@pytest.mark.parametrize("name", MEASURED)
def test_static_crystals_with_formal_charges_are_those_that_are_measured(name: str) -> None:
    salt = potential(BornMayerHuggins(read_set(name)), cutoff=16.0)  # cells of two ions, 4 Å wide

    def static(a: float) -> float:
        return energy(salt, bulk(SALTS[name], "rocksalt", a)) - ROCKSALT_MADELUNG * K_E / (a / 2)

    lattice, cohesion, modulus = MEASURED[name]
    a = minimize_scalar(static, bounds=(0.9 * lattice, 1.1 * lattice), method="bounded").x
    h = 0.02
    second = (static(a + h) - 2 * static(a) + static(a - h)) / h**2
    assert a == pytest.approx(lattice, rel=0.012)  # no zero-point motion and no thermal expansion
    assert -static(a) * 96.4853 == pytest.approx(cohesion, rel=0.015)
    assert 4 / (9 * a) * second * GPA == pytest.approx(modulus, rel=0.04)


# -- derivatives ------------------------------------------------------------------------------------------------------


def salt_cell() -> Atoms:
    """Rock salt, shaken and strained, 5.6 Å wide and periodic in two directions."""
    atoms = bulk("NaCl", "rocksalt", 5.64, cubic=True)
    atoms.rattle(0.15, seed=4)
    atoms.set_cell(atoms.cell.array @ [[1.0, 0.05, 0.0], [-0.02, 0.97, 0.1], [0.03, 0.0, 1.04]], scale_atoms=True)
    atoms.pbc = (True, False, True)
    return atoms


def close_ions() -> Atoms:
    """A cluster so dense that walls, levelled dispersion and ZBL all act."""
    return Atoms("NaClNaCl", [[0, 0, 0], [0.9, 0.3, 0], [0.2, 1.3, 0.4], [1.1, 1.2, -0.6]])


def water_with_open_direction() -> Atoms:
    atoms = water_box()
    atoms.pbc = (True, True, False)
    return atoms


CASES = {
    "salt": (salt_cell, [BornMayerHuggins(NACL), ZBL()], 7.0),
    "dense": (close_ions, [BornMayerHuggins(NACL), ZBL()], 6.0),
    "one atom": (one_atom_cell, [BornMayerHuggins(NACL)], 7.5),
    "flat": (flat_cell, [LennardJones(WATER)], 6.5),
    "water": (water_with_open_direction, [LennardJones(WATER, "geometric")], 9.0),
}


@pytest.mark.parametrize("case", CASES)
def test_forces_and_virial_are_derivatives(case: str) -> None:
    make, terms, cutoff = CASES[case]
    atoms, model, h = make(), potential(*terms, cutoff=cutoff), 2e-5
    answer = model(Systems.from_atoms(atoms))

    def moved(positions: np.ndarray, cell: np.ndarray) -> float:
        other = atoms.copy()
        other.set_cell(cell)
        other.positions = positions
        return energy(model, other)

    x, cell = atoms.positions, atoms.cell.array
    scale = max(1.0, float(answer.forces.abs().max()))
    forces = np.empty_like(x)
    for i, a in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i, a] = h
        forces[i, a] = -(moved(x + step, cell) - moved(x - step, cell)) / (2 * h)
    np.testing.assert_allclose(answer.forces.numpy(), forces, atol=1e-7 * scale, rtol=0)
    virial = np.empty((3, 3))
    for a, b in np.ndindex(3, 3):
        strain = np.zeros((3, 3))
        strain[a, b] += h / 2
        strain[b, a] += h / 2
        up, down = np.eye(3) + strain, np.eye(3) - strain
        virial[a, b] = -(moved(x @ up, cell @ up) - moved(x @ down, cell @ down)) / (2 * h)
    np.testing.assert_allclose(
        answer.virial[0].detach().numpy(), virial, atol=1e-7 * max(scale, np.abs(virial).max()), rtol=0
    )


# -- smooth ends ------------------------------------------------------------------------------------------------------


def assert_smooth(term: BornMayerHuggins | LennardJones | ZBL | PairPotential, pair: str, r: float) -> None:
    """Energy, slope and curvature come to the same from both sides of ``r``, as fast as the sides come together."""
    far, near = (
        torch.stack(
            [side[1] - side[0] for side in curve(term, pair, torch.tensor([r - d, r + d], dtype=torch.float64))]
        ).abs()
        for d in (1e-3, 1e-5)
    )
    scale = torch.stack([side.abs().max() for side in curve(term, pair, grid(0.9 * r, 1.1 * r))])
    assert bool((near < 2e-3 * scale).all())
    assert bool((near <= 0.05 * far + 1e-12 * scale).all())


@pytest.mark.parametrize(
    ("terms", "pair"),
    [([BornMayerHuggins(NACL)], "Cl-Cl"), ([LennardJones(WATER)], "O-O"), ([BornMayerHuggins(NACL), ZBL()], "Na-Cl")],
)
def test_the_cutoff_is_smooth_to_second_order(terms: list[BornMayerHuggins | LennardJones | ZBL], pair: str) -> None:
    model = PairPotential(terms, 6.0)
    assert_smooth(model, pair, 0.8 * 6.0)
    assert_smooth(model, pair, 6.0)
    beyond = curve(model, pair, grid(6.0, 7.0))
    assert all(bool((part == 0).all()) for part in beyond)
    left = curve(model, pair, grid(4.8, 6.0))[0] / curve(terms[0], pair, grid(4.8, 6.0))[0]
    assert left[0] == pytest.approx(1)
    assert left[-1] == 0
    assert bool((left[1:] <= left[:-1] + 1e-15).all())


def test_zbl_ends_smoothly_at_the_covalent_radii() -> None:
    assert_smooth(ZBL(), "Na-Cl", 1.66 + 1.02 - 1.1e-3)  # a term alone is defined within its reach
    assert_smooth(PairPotential([ZBL()], 8.0), "Na-Cl", 1.66 + 1.02)
    value, slope, _ = curve(ZBL(), "Na-Cl", grid(0.05, 2.67))
    assert bool((value > 0).all())
    assert bool((slope < 0).all())


@pytest.mark.parametrize(("name", "pair"), [(name, pair) for name in list_sets() for pair in read_set(name)])
def test_no_pair_falls_into_the_hole_of_its_dispersion(name: str, pair: str) -> None:
    term = BornMayerHuggins(read_set(name))
    row = read_set(name)[pair]
    # where the published form has its largest repulsive force
    r = np.linspace(0.3, 2.5, 220001)
    force = row.A / row.rho * np.exp((row.sigma - r) / row.rho) - 6 * row.C / r**7 - 8 * row.D / r**9
    inner = math.sqrt(term.table[*(atomic_numbers[s] for s in pair.split("-")), -1])
    assert inner == pytest.approx(r[force.argmax()], abs=3e-4)
    assert 0.7 < inner < 1.7
    assert_smooth(term, pair, inner)
    value, slope, _ = curve(term, pair, grid(0.01, inner))
    assert bool((slope <= 1e-3 * slope[-1]).all())  # repulsive all the way
    assert float(value[0]) > 2 * float(value[-1])
    outside = grid(inner + 1e-3, 5.0)
    expected = [bmh(float(x), row.A, row.rho, row.sigma, row.C, row.D) for x in outside]
    torch.testing.assert_close(curve(term, pair, outside)[0], torch.tensor(expected, dtype=torch.float64))


# -- images -----------------------------------------------------------------------------------------------------------


def image_sum(atoms: Atoms, cutoff: float, pair_energy: dict[tuple[str, str], tuple[float, ...]]) -> float:
    """Half the sum over all images in range, in numpy; rows of two numbers are Lennard-Jones, of five BMH."""
    heights = np.abs(np.linalg.inv(atoms.cell.complete().array)).max(0)  # enough images for any shape
    reach = [int(np.ceil(cutoff * h * 2)) + 2 if p else 0 for h, p in zip(heights, atoms.pbc, strict=True)]
    total = 0.0
    for shift in itertools.product(*(range(-n, n + 1) for n in reach)):
        for i, j in np.ndindex(len(atoms), len(atoms)):
            r = float(np.linalg.norm(atoms.positions[j] + shift @ atoms.cell.array - atoms.positions[i]))
            if (i == j and not any(shift)) or r >= cutoff:
                continue
            row = pair_energy[tuple(sorted((atoms[i].symbol, atoms[j].symbol)))]
            value = bmh(r, *row) if len(row) == 5 else lennard_jones(r, *row)
            total += 0.5 * value * switch((r * r - (0.8 * cutoff) ** 2) / (cutoff**2 * (1 - 0.64)))
    return total


@pytest.mark.parametrize("case", ["salt", "one atom", "flat", "water"])
def test_cells_smaller_than_the_cutoff_and_mixed_periodicity(case: str) -> None:
    make, terms, cutoff = CASES[case]
    rows: dict[tuple[str, str], tuple[float, ...]] = {
        ("Na", "Na"): (0.263704, 0.317, 2.340, 1.04857, 0.499321),
        ("Cl", "Na"): (0.210963, 0.317, 2.755, 6.99049, 8.67570),
        ("Cl", "Cl"): (0.158222, 0.317, 3.170, 72.4015, 145.427),
        ("O", "O"): (0.0067, 3.17),
        ("H", "H"): (0.002, 1.2),
        ("H", "O"): (0.004, 1.9),
    }
    terms = [term for term in terms if not isinstance(term, ZBL)]
    assert energy(potential(*terms, cutoff=cutoff), make()) == pytest.approx(image_sum(make(), cutoff, rows), rel=1e-10)


def test_a_batch_is_its_structures_and_images_do_not_matter() -> None:
    model = potential(BornMayerHuggins(NACL), ZBL(), cutoff=7.0)
    first, second = salt_cell(), salt_cell()
    second.rattle(0.1, seed=8)
    second.positions[0] += second.cell[0] - 2 * second.cell[2]
    both = model(Systems.from_atoms([first, second]))
    for k, atoms in enumerate((first, second)):
        alone = model(Systems.from_atoms(atoms))
        torch.testing.assert_close(both.energy[k], alone.energy[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.forces.view(2, -1, 3)[k], alone.forces, rtol=0, atol=1e-12)
    second.wrap()
    assert energy(model, second) == pytest.approx(float(both.energy[1]), abs=1e-10)
    assert float(both.forces.sum(0).abs().max()) < 1e-10


@pytest.mark.parametrize("precision", ["mixed", "single"])
def test_pair_terms_keep_float64(precision: str) -> None:
    terms = [BornMayerHuggins(NACL), ZBL()]
    answer = potential(*terms, precision=precision)(Systems.from_atoms(salt_cell()))
    exact = potential(BornMayerHuggins(NACL), ZBL())(Systems.from_atoms(salt_cell()))
    torch.testing.assert_close(answer.energy, exact.energy, rtol=1e-14, atol=0)
    torch.testing.assert_close(answer.forces, exact.forces, rtol=0, atol=1e-12)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: BornMayerHuggins({"Na-Xx": BMHParameters(1, 1)}), "'Na-Xx' is not a pair of elements"),
        (lambda: BornMayerHuggins({"Na": BMHParameters(1, 1)}), "write it like Na-Cl"),
        (lambda: BornMayerHuggins({"X-X": BMHParameters(1, 1)}), "'X-X' is not a pair"),
        (lambda: BornMayerHuggins({"Na-Cl": BMHParameters(1, 0)}), "Na-Cl has A 1, rho 0"),
        (lambda: BornMayerHuggins({"Na-Cl": BMHParameters(1, 1, C=-1)}), "A, C and D positive or 0"),
        (lambda: BornMayerHuggins({"Na-Cl": BMHParameters(math.nan, 1)}), "give finite numbers"),
        (lambda: BornMayerHuggins({"Na-Cl": BMHParameters(1, 0.1, C=100)}), "Na-Cl attracts at every distance"),
        (
            lambda: BornMayerHuggins({"Na-Cl": BMHParameters(1, 1), "Cl-Na": BMHParameters(1, 1)}),
            "Na-Cl and Cl-Na are the same pair",
        ),
        (lambda: LennardJones({"Kl": LJParameters(1, 1)}), "'Kl' is not an element or a pair of elements"),
        (lambda: LennardJones({"K": LJParameters(1, 0)}), "K has epsilon 1, sigma 0"),
        (lambda: LennardJones({"K": LJParameters(-1, 1)}), "epsilon positive or 0"),
        (lambda: LennardJones({"K": LJParameters(1, 1)}, "arithmetic"), "lorentz-berthelot or geometric"),
        (lambda: read_set("naf"), "there is no set 'naf': choose nacl or licl or kcl"),
        (lambda: PairPotential([], 10.0), "has no pairs"),
        (lambda: PairPotential([BornMayerHuggins({})], 10.0), "has no pairs"),
        (lambda: PairPotential([ZBL()], 0.0), "cutoff is 0.0 Å"),
    ],
)
def test_mistakes_are_one_sentence(build: object, words: str) -> None:
    with pytest.raises(InputError) as raised:
        build()  # type: ignore[operator]
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_pairs_are_named_even_with_zbl() -> None:
    atoms = Atoms("NaClK", [[0, 0, 0], [2.8, 0, 0], [0, 0, 30.0]])  # out of range, but it may come
    for terms in ([BornMayerHuggins(NACL)], [BornMayerHuggins(NACL), ZBL()]):
        with pytest.raises(InputError, match="no parameters for Na-K, Cl-K, K-K: give each pair"):
            energy(potential(*terms), atoms)
    pairs = {f"{s}-K": BMHParameters(0.0, 1.0) for s in ("Na", "Cl", "K")}
    assert energy(potential(BornMayerHuggins(NACL), BornMayerHuggins(pairs)), atoms) == pytest.approx(
        energy(potential(BornMayerHuggins(NACL)), atoms[:2]), rel=1e-12
    )
    assert energy(potential(ZBL()), atoms) == 0.0
    with pytest.raises(InputError, match="no parameters for Bk-Bk"):
        energy(potential(ZBL()), Atoms("Bk"))
