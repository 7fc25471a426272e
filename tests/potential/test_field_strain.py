"""The virial in a field: −∂E/∂strain for all nine strains, whatever stays while the cell changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from uniform_fields import APPLIED, MODELS, Crystal, skew, slope

from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

from structures import water_box

ORIGIN = (0.3, -1.2, 0.7)


def strained(system, strain):
    """r -> r + strain·r of atoms and cell."""
    rows = np.eye(3) + strain.T
    turn = torch.from_numpy(rows)
    return system.replace(positions=system.positions @ turn, cell=system.cell @ turn)


def slopes(crystal, seed, step=1e-3):
    """−∂E along a random strain of nine components: what the virial says, and differences."""
    system = crystal.system()
    virial = crystal.model.solve(system).virial[0].numpy()
    strain = np.random.default_rng(seed).normal(size=(3, 3))
    strain /= np.linalg.norm(strain)
    return (virial * strain).sum(), -slope(lambda x: energy(crystal, strained(system, x * strain)), step)


def energy(crystal, system):
    return crystal.model.solve(system).energy.item()


@pytest.mark.parametrize("stays", ["uniform", "reduced"])
@pytest.mark.parametrize("applied", APPLIED)
@pytest.mark.parametrize("model", MODELS)
def test_virial_is_the_exact_derivative(model, applied, stays):
    origin = ORIGIN if model in ("shells", "fragments, all") else None
    crystal = Crystal(model, applied, reduced=stays == "reduced", origin=origin)
    found, numeric = slopes(crystal, seed=100 * list(MODELS).index(model) + 10 * list(APPLIED).index(applied))
    assert found == pytest.approx(numeric, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("applied", APPLIED)
def test_only_a_field_that_stays_knows_directions(applied):
    """Turning everything against a field in V/Å takes the work of its torque; voltages and fluxes turn along."""
    answer = Crystal("shells", applied, origin=ORIGIN).solve()
    torque = torch.outer(answer.field[0], answer.dipole[0])
    assert float((torque - torque.T).abs().max()) > 1e-2
    virial = answer.virial[0]
    assert torch.allclose(virial - virial.T, torque - torque.T, atol=1e-8)
    if applied in ("field", "D"):  # along all axes alike
        virial = Crystal("shells", applied, reduced=True, origin=ORIGIN).solve().virial[0]
        assert torch.allclose(virial, virial.T, atol=1e-9)


@pytest.mark.parametrize("boundary", [(True, True, False), (False, False, False)])
def test_virial_of_open_directions_in_a_field(boundary):
    """Atoms strained along open directions too; the plane of a slab stays."""
    crystal = Crystal("fragments, all", "field")
    crystal.field = (0.0, 0.0, 0.07) if any(boundary) else (0.05, -0.1, 0.07)
    crystal.atoms.pbc = boundary
    crystal.atoms.set_cell(np.where(np.array(boundary)[:, None], crystal.atoms.cell.array, 0.0))
    system = crystal.system()
    virial = crystal.model.solve(system).virial[0].numpy()
    strain = np.random.default_rng(3).normal(size=(3, 3))
    if any(boundary):
        strain[2, :2] = strain[:2, 2] = 0
    numeric = -slope(lambda x: energy(crystal, strained(system, x * strain)), 1e-3)
    assert (virial * strain).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-6)


def test_batch_of_everything_equals_its_parts():
    parts = []
    for applied in APPLIED:
        crystal = Crystal("shells", applied, reduced=True, origin=ORIGIN)
        system = crystal.system()
        parts += [system, strained(system, 0.02 * skew())]
    parts[1] = parts[1].replace(origin=None)
    together = crystal.model.solve(Systems.join(parts))
    for b, part in enumerate(parts):
        alone = crystal.model.solve(part)
        for name in ("energy", "virial", "field", "dipole"):
            assert torch.allclose(getattr(together, name)[b], getattr(alone, name)[0], atol=1e-9), name
        assert torch.allclose(together.forces[4 * b : 4 * b + 4], alone.forces, atol=1e-9)
    again = Systems.join(Systems.join(parts).split())
    for name in ("displacement", "field_cell", "origin"):
        assert torch.equal(getattr(again, name).nan_to_num(9.0), getattr(Systems.join(parts), name).nan_to_num(9.0))
    with pytest.raises(ValueError, match="field_cell"):
        Systems.join([parts[0], parts[1].replace(field_cell=None)])


def test_reduced_field_keeps_voltages_and_fluxes():
    """ε·a over every lattice vector a, and D through every face, are those of the cell they were given in."""
    for applied in ("field", "D"):
        crystal = Crystal("shells", applied, reduced=True)
        cell, given = crystal.atoms.cell.array, crystal.field_cell[0].numpy()
        answer = crystal.solve()
        if applied == "field":
            assert cell @ answer.field[0].numpy() == pytest.approx(given @ np.array(crystal.field), abs=1e-12)
            continue
        held = answer.field[0].numpy() + answer.dipole[0].numpy() / crystal.room
        for d in range(3):
            a, b = (d + 1) % 3, (d + 2) % 3
            through = np.cross(cell[a], cell[b]) @ held
            assert through == pytest.approx(np.cross(given[a], given[b]) @ np.array(crystal.displacement), abs=1e-10)


def test_voltages_need_a_cell():
    atoms = water_box()
    atoms.pbc = [True, True, False]
    crystal = Crystal("fragments, shells")
    crystal.atoms, crystal.field_cell = atoms, crystal.tensor(atoms.cell.array)[None]
    with pytest.raises(InputError, match="set it to uniform"):
        crystal.solve()
