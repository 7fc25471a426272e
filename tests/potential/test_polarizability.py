"""Polarizabilities and Born charges of molecules: against PBE, sum rules and central differences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, PQEq

_PATH = Path(__file__).parents[1] / "benchmarks" / "polarizability.py"
_SPEC = importlib.util.spec_from_file_location("polarizability_benchmark", _PATH)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

DATA = benchmark.reference()
MOLECULES = DATA["molecules"]
TIGHT = {"tolerance": 1e-12}


def answer(name, response, field=(0.0, 0.0, 0.0), moved=None, carried=None, derivatives=False):
    """PQEq's answer for a molecule, with atom and direction ``moved`` by a length (Å)."""
    atoms = benchmark.molecule(MOLECULES[name])
    if moved is not None:
        atom, direction, length = moved
        atoms.positions[atom, direction] += length
    return benchmark.solve(PQEq(response=response, **TIGHT), atoms, field, carried=carried, derivatives=derivatives)


def test_springs_alone_come_close_to_pbe_and_flowing_charge_counts_twice():
    """2.54 a.u. with ``shells`` and 9.36 with ``all``, over 15 molecules without a metal."""
    names = benchmark.without_metals()
    assert len(names) == 15
    shells = benchmark.polarizabilities("shells", limiter="none")
    everything = benchmark.polarizabilities("all", limiter="none")
    assert benchmark.mean_absolute_error(shells, names) == pytest.approx(2.535, abs=0.01)
    assert benchmark.mean_absolute_error(shells, names, basis="aug-cc-pVDZ") == pytest.approx(2.21, abs=0.01)
    assert benchmark.mean_absolute_error(everything, names) == pytest.approx(9.36, abs=0.02)


def test_the_limiter_stiffens_molecules_a_little():
    """2.79 a.u. with 0.25 Å, 2.61 with 0.5 Å: shells at rest are 0.03 to 0.07 Å long."""
    names = benchmark.without_metals()
    errors = [
        benchmark.mean_absolute_error(benchmark.polarizabilities("shells", limiter="fene", shell_limit=limit), names)
        for limit in (0.25, 0.5, 2.0)
    ]
    assert errors[:2] == pytest.approx([2.793, 2.607], abs=0.01)
    free = benchmark.mean_absolute_error(benchmark.polarizabilities("shells", limiter="none"), names)
    assert errors[2] == pytest.approx(free, abs=0.01)


def test_alkali_metals_have_the_springs_of_other_oxidation_states():
    """What users must know: Na in NaCl is as soft as the neutral atom (24 Å³), Li as stiff as the ion."""
    found = benchmark.polarizabilities("shells", limiter="none")
    expected = {name: benchmark.isotropic(np.array(MOLECULES[name]["polarizability"])) for name in ("NaCl", "LiH")}
    assert benchmark.isotropic(found["NaCl"]) > 4 * expected["NaCl"]
    assert benchmark.isotropic(found["LiH"]) < 0.2 * expected["LiH"]


@pytest.mark.parametrize("response", ["shells", "all"])
@pytest.mark.parametrize("name", list(MOLECULES))
def test_born_charges_add_up_to_the_net_charge(name, response):
    born = answer(name, response, derivatives=True).born_charges
    one_element = len(set(MOLECULES[name]["symbols"])) == 1
    assert born.abs().max() < 1e-8 if one_element else born.abs().max() > 0.01
    assert born.sum(0).abs().max() < 1e-8


@pytest.mark.parametrize("field", [(0.0, 0.0, 0.0), (0.1, -0.2, 0.15)], ids=["no field", "field"])
@pytest.mark.parametrize("response", ["shells", "all"])
@pytest.mark.parametrize("name", ["H2O", "formamide"])
def test_born_charges_are_the_derivatives_of_dipole_and_forces(name, response, field):
    """∂M_a/∂r_ib = Z*_iab = ∂F_ib/∂ε_a and ∂M_a/∂ε_b = α_ab/k_e, with the same carried charges throughout."""
    carried = answer(name, response).charges
    here = answer(name, response, field, carried=carried, derivatives=True)
    n, h = len(carried), 1e-4
    by_dipole = np.empty((n, 3, 3))
    for atom in range(n):
        for b in range(3):
            up, down = (answer(name, response, field, (atom, b, s * h), carried).dipole[0].numpy() for s in (0.5, -0.5))
            by_dipole[atom, :, b] = (up - down) / h
    by_force, alpha = np.empty((n, 3, 3)), np.empty((3, 3))
    for a in range(3):
        shift = 0.5 * h * np.eye(3)[a]
        up, down = (answer(name, response, np.add(field, s * shift), carried=carried) for s in (1, -1))
        by_force[:, a] = ((up.forces - down.forces) / h).numpy()
        alpha[a] = ((up.dipole - down.dipole)[0] / h).numpy()
    assert np.abs(here.born_charges.numpy() - by_dipole).max() < 1e-6
    assert np.abs(here.born_charges.numpy() - by_force).max() < 1e-6
    assert here.polarizability[0].numpy() == pytest.approx(alpha * COULOMB_CONSTANT, abs=1e-5)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_water_in_a_field_gains_what_its_polarizability_says(axis):
    """½[E(ε) + E(−ε)] − E(0) → −½ α ε²/k_e; PBE's energies are consistent with its own tensor in the same way."""
    water = DATA["water_in_a_field"]
    atoms = benchmark.molecule(water)
    model = PQEq(**TIGHT)
    zero = benchmark.solve(model, atoms, derivatives=True)
    k = "xyz".index(axis)
    strength = 0.01
    both = [float(benchmark.solve(model, atoms, s * strength * np.eye(3)[k]).energy) for s in (1, -1)]
    gained = 0.5 * sum(both) - float(zero.energy)
    alpha = float(zero.polarizability[0, k, k])
    assert gained == pytest.approx(-0.5 * alpha * strength**2 / COULOMB_CONSTANT, rel=1e-3)
    energies = dict(water["energies"][axis])
    from_pbe = -0.5 * (energies[0.2] + energies[-0.2]) * 2 * COULOMB_CONSTANT / 0.2**2
    assert from_pbe == pytest.approx(MOLECULES["H2O"]["polarizability"][k][k], rel=0.05)
    assert 0.6 < alpha / from_pbe < 0.8  # softer than no response, stiffer than PBE
