"""D3 against the dftd3 package, published numbers and finite differences."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.units import Bohr, Hartree
from dftd3.interface import DispersionModel, RationalDampingParam, ZeroDampingParam

from voltpi.potential.dispersion import D3
from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

# ReaxNet's published code, float64, PBE zero damping, hard cutoff 12.5 Å (eV, Å).
MONOMER = [
    [20.075695779203055, 19.59154677792692, 20.22968571806642],
    [19.4615310807888, 19.864776184779434, 19.53235824187267],
    [20.538468919211198, 20.40845322207308, 20.467641758127332],
]
MONOMER_ENERGY = -0.00010571157160692945
DIMER = [
    [19.409075707136182, 18.765571594754363, 19.29380542853677],
    [18.794911008721925, 19.038801001606878, 18.596477952343022],
    [19.87184884714432, 19.582478038900526, 19.531761468597683],
    [21.205088991278075, 20.561584878896262, 20.890261681107347],
    [20.733958882092644, 21.234428405245637, 21.403522047656978],
    [21.033415238119552, 20.806760407279555, 19.969101935264945],
]
DIMER_ENERGY = -0.02002190961058293
DIMER_FORCE_ON_FIRST = [0.004275018619261309, 0.005577492234423555, 0.0037693004590068423]


def water_box(pbc: object, seed: int = 0) -> Atoms:
    """Eight randomly turned molecules on a jittered grid in a slightly triclinic cell; no cell where not periodic."""
    rng = np.random.default_rng(seed)
    box = Atoms()
    for corner in np.ndindex(2, 2, 2):
        water = molecule("H2O")
        water.rotate(rng.uniform(0, 180), rng.normal(size=3))
        water.translate(3.1 * np.array(corner) + rng.uniform(-0.1, 0.1, 3))
        box += water
    cell = np.array([[6.3, 0, 0], [0.4, 6.2, 0], [-0.3, 0.5, 6.4]])
    box.cell = cell * np.broadcast_to(pbc, 3)[:, None]
    box.pbc = pbc
    return box


def energy(d3: D3, atoms: Atoms) -> float:
    return d3(Systems.from_atoms(atoms))[0].item()


@pytest.mark.parametrize(("positions", "expected"), [(MONOMER, MONOMER_ENERGY), (DIMER, DIMER_ENERGY)])
def test_published_energies(positions: list[list[float]], expected: float) -> None:
    atoms = Atoms("OHH" * (len(positions) // 3), positions)
    # their conversion factors (0.52917726 Å, 27.21138505 eV) differ from CODATA 2014 in the eighth digit
    assert energy(D3(cutoff=12.5, cn_cutoff=12.5, smoothing_width=0.0), atoms) == pytest.approx(expected, rel=1e-6)


def test_published_forces() -> None:
    _, forces, _ = D3(cutoff=12.5, cn_cutoff=12.5, smoothing_width=0.0)(Systems.from_atoms(Atoms("OHHOHH", DIMER)))
    np.testing.assert_allclose(forces[0], DIMER_FORCE_ON_FIRST, atol=1e-8)


@pytest.mark.parametrize("damping", ["zero", "bj"])
@pytest.mark.parametrize("three_body", [False, True])
@pytest.mark.parametrize("pbc", [False, True, (True, True, False), (False, True, False)])
def test_equals_the_package(damping: str, three_body: bool, pbc: object) -> None:
    atoms = water_box(pbc)
    d3 = D3("pbe", damping, three_body=three_body)
    lattice = None
    if atoms.pbc.any():  # open directions as vacuum: the library's own slabs lose images in skewed cells
        lattice = np.array(atoms.cell.complete()) / Bohr
        lattice[~atoms.pbc] *= 60.0
    model = DispersionModel(atoms.numbers, atoms.positions / Bohr, lattice, np.full(3, atoms.pbc.any()))
    model.set_realspace_cutoff(21.0 / Bohr, 10.0 / Bohr, 10.5 / Bohr, 5.0 / Bohr, 5.0 / Bohr)
    parameters = {"zero": ZeroDampingParam, "bj": RationalDampingParam}[damping](method="pbe", atm=three_body)
    expected = model.get_dispersion(parameters, grad=True)
    e, forces, virial = d3(Systems.from_atoms(atoms))
    assert e.item() == pytest.approx(expected["energy"] * Hartree, abs=1e-12)
    np.testing.assert_allclose(forces, -expected["gradient"] * Hartree / Bohr, atol=1e-12)
    np.testing.assert_allclose(virial[0], -expected["virial"] * Hartree, atol=1e-12)


@pytest.mark.parametrize("damping", ["zero", "bj"])
@pytest.mark.parametrize("pbc", [False, True, (True, False, True)])
def test_forces_and_virial_are_derivatives(damping: str, pbc: object) -> None:
    atoms, d3 = water_box(pbc, seed=1), D3("pbe", damping)
    _, forces, virial = d3(Systems.from_atoms(atoms))
    step = 1e-4
    numerical = np.zeros((4, 3))
    for i, c in np.ndindex(4, 3):
        pair = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[5 * i, c] += sign * step
            pair.append(energy(d3, moved))
        numerical[i, c] = -(pair[0] - pair[1]) / (2 * step)
    scale = forces.abs().max().item()
    np.testing.assert_allclose(forces[[0, 5, 10, 15]], numerical, atol=1e-7 * scale)

    # the strain is so small that no pair crosses the hard cutoff of the coordination numbers
    strain, numerical = 1e-6, np.zeros((3, 3))
    for i, j in np.ndindex(3, 3):
        pair = []
        for sign in (1, -1):
            deformation = np.eye(3)
            deformation[i, j] += sign * strain
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ deformation, scale_atoms=False)
            strained.positions = atoms.positions @ deformation
            pair.append(energy(d3, strained))
        numerical[i, j] = -(pair[0] - pair[1]) / (2 * strain)
    np.testing.assert_allclose(virial[0], numerical, atol=1e-7 * virial.abs().max().item())


def test_coordination_cutoff_leaves_a_small_error_in_large_strains() -> None:
    """What the docstring says about the one hard cutoff: pairs that cross it cost little."""
    atoms, d3 = water_box(True, seed=1), D3()
    virial = d3(Systems.from_atoms(atoms))[2][0]
    pair = []
    for sign in (1, -1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array * (1 + sign * 1e-3), scale_atoms=True)
        pair.append(energy(d3, strained))
    assert -(pair[0] - pair[1]) / 2e-3 == pytest.approx(virial.trace().item(), rel=2e-4)


def test_energy_goes_smoothly_to_zero_at_the_cutoff() -> None:
    d3 = D3(cutoff=8.0, smoothing_width=3.0)
    argon = [energy(d3, Atoms("Ar2", [[0, 0, 0], [r, 0, 0]])) for r in (7.99, 8.0 - 1e-6, 8.0 + 1e-6)]
    assert -1e-6 < argon[0] < 0.0
    assert abs(argon[1]) < 1e-12
    assert argon[2] == 0.0


def test_batch_equals_single_and_models_are_reused() -> None:
    d3 = D3("pbe", "bj")
    frames = [water_box(True, 0), water_box(False, 1), water_box(True, 2), Atoms("NaCl", [[0, 0, 0], [2.4, 0, 0]])]
    together = d3(Systems.from_atoms(frames))
    single = [D3("pbe", "bj")(Systems.from_atoms(a)) for a in frames]
    for a, b in zip(together, (torch.cat(parts) for parts in zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    again = d3(Systems.from_atoms(frames))
    torch.testing.assert_close(again[1], together[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("pbc", [True, (True, False, True)])
def test_wrapping_changes_nothing(pbc: object) -> None:
    atoms, rng = water_box(pbc), np.random.default_rng(5)
    moved = atoms.copy()
    moved.positions += rng.integers(-9, 9, (len(atoms), 3)) @ atoms.cell.array  # zero rows where not periodic
    before, after = (D3()(Systems.from_atoms(a)) for a in (atoms, moved))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_cell_vector_of_an_open_direction_does_not_count() -> None:
    atoms = water_box((True, False, True))
    given = atoms.copy()
    given.set_cell(atoms.cell.array + np.array([[0, 0, 0], [1.0, 9.0, -2.0], [0, 0, 0]]))
    assert energy(D3(), given) == pytest.approx(energy(D3(), atoms), abs=1e-12)


def test_config_rebuilds() -> None:
    d3 = D3("revpbe", "bj", three_body=True, cutoff=15.0)
    rebuilt = D3(**json.loads(json.dumps(d3.config)))
    assert rebuilt.config == d3.config
    assert energy(rebuilt, Atoms("OHHOHH", DIMER)) == energy(d3, Atoms("OHHOHH", DIMER))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functional": "nosuch"}, "dispersion.functional is 'nosuch'"),
        ({"damping": "none"}, "dispersion.damping is 'none': choose one of zero, bj"),
        ({"cutoff": -1.0}, "not positive"),
        ({"smoothing_width": 30.0}, "smoothing_width is 30.0"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        D3(**arguments)


@pytest.mark.parametrize("symbol", ["X", "Og"])
def test_element_without_parameters(symbol: str) -> None:
    with pytest.raises(InputError, match=f"D3 has no parameters for {symbol}"):
        D3()(Systems.from_atoms(Atoms([symbol, "H"], [[0, 0, 0], [2, 0, 0]])))
