"""One suite for every potential and setting: symmetries, batches, derivatives, in and out of a field.

Potentials run in double precision; the network's weights are random, which is the sharper test of its symmetries, and
the shipped model runs too.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from voltpi.potential.checkpoints import load_potential
from voltpi.potential.dispersion import D3
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.model import Potential
from voltpi.potential.shortrange.foundation import load_foundation
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.qet import LinearQEq
from voltpi.potential.systems import Systems

from random_mace import save_random_mace
from random_qet import save_random_qet
from structures import water_box, water_dimer

FIELD = np.array([0.05, -0.1, 0.07])
TIGHT = {"accuracy": 1e-8, "tolerance": 1e-11}
CN_CUTOFF = 10.294
"""Å, no pair of ``water_box`` is near: the library's coordination numbers jump by 1e-7 when one crosses the cutoff."""


def foundation(name, package):
    pytest.importorskip(package, reason=f"needs the extra for {name}")
    charges = PQEq(conserve="fragments", response="all", **TIGHT)
    model = qet() if name is None else load_foundation(name, precision="double")
    return Potential(model, charges, response_only=True, precision="double")


def qet():
    with tempfile.TemporaryDirectory() as folder:
        return load_foundation(f"qet:{save_random_qet(Path(folder))}", precision="double")


def mace():
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that mace imports
        file = save_random_mace(Path(folder) / "mace.model")
        model = load_foundation(f"mace:{file}", precision="double")
    charges = PQEq(conserve="fragments", response="all", **TIGHT)
    return Potential(model, charges, response_only=True, precision="double")


def network(**options):
    torch.manual_seed(3)
    return NequIP([1, 8], hidden_irreps="8x0e+4x1o+2x2e", sh_irreps="1x0e+1x1o+1x2e", layers=2, r_max=3.5, **options)


BUILDERS = {
    "network": lambda: Potential(network(), precision="double"),
    "D3": lambda: Potential(dispersion=D3("pbe", "zero", cn_cutoff=CN_CUTOFF), precision="double"),
    "shells": lambda: Potential(charges=PQEq(response="shells", **TIGHT)),
    "fragments all": lambda: Potential(charges=PQEq(conserve="fragments", response="all", **TIGHT)),
    "frozen": lambda: Potential(charges=PQEq(conserve="fragments", response="frozen", **TIGHT)),
    "all terms": lambda: Potential(
        network(),
        PQEq(conserve="fragments", response="all", **TIGHT),
        D3("pbe", "bj", cn_cutoff=CN_CUTOFF),
        reference_energies={1: -3.0, 8: -400.0},
        precision="double",
    ),
    "water": lambda: tightened(load_potential("water", precision="double")),
    "response only": lambda: Potential(
        network(), PQEq(conserve="fragments", **TIGHT), response_only=True, precision="double"
    ),
    "latent": lambda: Potential(
        network(latent=True), LatentCharges(conserve="fragments", epsilon_infinity=1.7, **TIGHT), precision="double"
    ),
    "sevennet-0": lambda: foundation("sevennet-0", "sevenn"),
    "chgnet": lambda: foundation("chgnet", "chgnet"),
    "mace": mace,
    "qet": lambda: foundation(None, "matgl"),
    "linear-qeq": lambda: Potential(charges=LinearQEq(qet())),
}
POLARIZABLE = [name for name in BUILDERS if name not in ("network", "D3", "latent")]
WITH_CHARGES = [name for name in BUILDERS if name not in ("network", "D3", "linear-qeq")]
SETTINGS = [(name, False) for name in BUILDERS] + [(name, True) for name in WITH_CHARGES]


def tightened(potential):
    potential.charges = PQEq.from_config({**potential.charges.config, **TIGHT})
    potential.dispersion = D3(**{**potential.dispersion.config, "cn_cutoff": CN_CUTOFF})
    return potential


class Potentials(dict):
    """Built when first asked for."""

    def __missing__(self, name):
        self[name] = BUILDERS[name]()
        return self[name]


@pytest.fixture(scope="module")
def potentials():
    return Potentials()


def evaluate(potential, atoms, field, carried=None, **keywords):
    systems = Systems.from_atoms(atoms, field=field)
    if carried is not None:
        systems = systems.replace(carried=carried)
    return potential(potential.prepare(systems), **keywords)


def carried_by(potential, atoms):
    return potential.prepare(Systems.from_atoms(atoms)).carried


@pytest.fixture(params=["periodic", "slab", "open"])
def atoms(request):
    if request.param == "open":
        return water_dimer()
    atoms = water_box()
    atoms.pbc = [True, True, request.param == "periodic"]
    return atoms


@pytest.mark.parametrize(("name", "in_field"), SETTINGS)
def test_rotation(potentials, name, in_field, atoms):
    potential, field = potentials[name], FIELD * in_field
    turn = Rotation.from_euler("xyz", [0.4, -1.1, 2.3]).as_matrix()
    turned = atoms.copy()
    turned.positions = atoms.positions @ turn.T
    turned.set_cell(atoms.cell.array @ turn.T)
    keywords = {"born_charges": name in WITH_CHARGES, "polarizability": name in POLARIZABLE}
    one, two = evaluate(potential, atoms, field, **keywords), evaluate(potential, turned, turn @ field, **keywords)
    turn = torch.as_tensor(turn)
    assert two.energy.item() == pytest.approx(one.energy.item(), abs=1e-9)
    assert torch.allclose(two.forces, one.forces @ turn.T, atol=1e-9)
    assert torch.allclose(two.virial[0], turn @ one.virial[0] @ turn.T, atol=1e-8)
    assert torch.allclose(two.dipole[0], turn @ one.dipole[0], atol=1e-9)
    if name in WITH_CHARGES:
        assert torch.allclose(two.born_charges, turn @ one.born_charges @ turn.T, atol=1e-8)
    if name in POLARIZABLE:
        assert torch.allclose(two.polarizability, turn @ one.polarizability @ turn.T, atol=1e-7)


@pytest.mark.parametrize(("name", "in_field"), SETTINGS)
def test_permutation(potentials, name, in_field, atoms):
    potential, field = potentials[name], FIELD * in_field
    order = np.random.default_rng(0).permutation(len(atoms))
    born = {"born_charges": name in WITH_CHARGES}
    one, two = evaluate(potential, atoms, field, **born), evaluate(potential, atoms[order], field, **born)
    assert two.energy.item() == pytest.approx(one.energy.item(), abs=1e-10)
    assert torch.allclose(two.forces, one.forces[order], atol=1e-10)
    assert torch.allclose(two.charges, one.charges[order], atol=1e-10)
    assert torch.allclose(two.shells, one.shells[order], atol=1e-10)
    assert torch.allclose(two.virial, one.virial, atol=1e-9)
    assert torch.allclose(two.dipole, one.dipole, atol=1e-9)
    if name in WITH_CHARGES:
        assert torch.allclose(two.born_charges, one.born_charges[order], atol=1e-8)


@pytest.mark.parametrize(("name", "in_field"), SETTINGS)
def test_wrapping(potentials, name, in_field):
    """Neutral fragments are made whole: nothing changes.

    Without fragments the atoms stay where they are put, and M moves by their charges times the lattice vectors.
    """
    potential, field = potentials[name], torch.as_tensor(FIELD * in_field)
    atoms = water_box()
    moved = atoms.copy()
    images = np.random.default_rng(5).integers(-2, 3, size=(len(atoms), 3)) @ atoms.cell.array
    moved.positions += images
    carried = carried_by(potential, atoms)
    one, two = (evaluate(potential, a, field, carried) for a in (atoms, moved))
    jump = torch.zeros(3, dtype=torch.float64)
    if name == "shells":
        jump = carried @ torch.as_tensor(images)
        assert float(jump.norm()) > 0.1
    assert torch.allclose(two.charges, one.charges, atol=1e-10)
    assert torch.allclose(two.shells, one.shells, atol=1e-10)
    assert torch.allclose(two.forces, one.forces, atol=1e-10)
    assert torch.allclose(two.dipole[0], one.dipole[0] + jump, atol=1e-9)
    assert two.energy.item() == pytest.approx(float(one.energy[0] - field @ jump), abs=1e-9)
    work = torch.outer(field, jump)
    assert torch.allclose(two.virial[0], one.virial[0] + work, atol=1e-9)


@pytest.mark.parametrize(("name", "in_field"), SETTINGS)
def test_a_batch_equals_its_parts(potentials, name, in_field, atoms):
    potential, field = potentials[name], FIELD * in_field
    shaken = atoms.copy()
    shaken.rattle(0.03, seed=7)
    small = water_dimer()
    frames = [atoms, shaken, small] if not atoms.pbc.any() else [atoms, shaken]
    together = evaluate(potential, frames, field)
    alone = [evaluate(potential, frame, field) for frame in frames]
    assert together.energy.tolist() == pytest.approx([a.energy.item() for a in alone], abs=1e-10)
    assert torch.allclose(together.forces, torch.cat([a.forces for a in alone]), atol=1e-10)
    assert torch.allclose(together.virial, torch.cat([a.virial for a in alone]), atol=1e-10)
    assert torch.allclose(together.dipole, torch.cat([a.dipole for a in alone]), atol=1e-10)


def swapped(start):
    """The same answer with the charges and shells of two equally large structures exchanged."""
    half = len(start.charges) // 2
    return replace(start, charges=start.charges.roll(half, 0), shells=start.shells.roll(half, 0))


@pytest.mark.parametrize("name", POLARIZABLE)
def test_every_structure_of_a_batch_starts_from_its_own_answer(potentials, name):
    potential = potentials[name]
    frames = [water_box(), water_box()]
    frames[1].rattle(0.1, seed=11)
    systems = potential.prepare(Systems.from_atoms(frames, field=FIELD))
    generator = torch.Generator().manual_seed(2)
    step = 3e-4 * torch.randn(systems.positions.shape, generator=generator, dtype=torch.float64)
    before = potential(systems.replace(positions=systems.positions + step))
    cold, warm, crossed = (potential(systems, start=start) for start in (None, before, swapped(before)))
    for answer in (warm, crossed):
        assert torch.allclose(answer.energy, cold.energy, atol=1e-9)
        assert torch.allclose(answer.forces, cold.forces, atol=1e-8)
    assert (warm.iterations < cold.iterations).all()
    assert (warm.iterations < crossed.iterations).all()


@pytest.mark.parametrize(("name", "in_field"), SETTINGS)
def test_terms_sum_to_the_energy_and_forces_to_nothing(potentials, name, in_field, atoms):
    answer = evaluate(potentials[name], atoms, FIELD * in_field)
    assert sum(t.item() for t in answer.energy_terms.values()) == pytest.approx(answer.energy.item(), abs=1e-10)
    assert answer.forces.sum(0).numpy() == pytest.approx(np.zeros(3), abs=1e-7)
    work = torch.outer(torch.as_tensor(FIELD * in_field), answer.dipole[0])  # of turning everything against the field
    assert torch.allclose(answer.virial[0] - answer.virial[0].T, work - work.T, atol=1e-7)


def central(energy, step=1e-4):
    """Fourth-order central difference of −E."""
    first = (energy(-step) - energy(step)) / (2 * step)
    second = (energy(-2 * step) - energy(2 * step)) / (4 * step)
    return (4 * first - second) / 3


@pytest.mark.parametrize(("name", "in_field"), SETTINGS)
def test_derivatives(potentials, name, in_field, atoms):
    potential, field = potentials[name], FIELD * in_field
    carried = carried_by(potential, atoms)
    answer = evaluate(potential, atoms, field, carried)
    scale = max(1.0, float(answer.forces.abs().max()))
    for atom, axis in ((0, 0), (1, 2)):

        def moved(step, atom=atom, axis=axis):
            there = atoms.copy()
            there.positions[atom, axis] += step
            return evaluate(potential, there, field, carried).energy.item()

        assert answer.forces[atom, axis].item() == pytest.approx(central(moved), rel=1e-7, abs=1e-7 * scale)
    for a, b in ((1, 1), (2, 0)):

        def strained(step, a=a, b=b):
            strain = np.eye(3)
            strain[b, a] += step  # r_a -> r_a + step r_b, of rows
            there = atoms.copy()
            there.positions = atoms.positions @ strain
            there.set_cell(atoms.cell.array @ strain)
            return evaluate(potential, there, field, carried).energy.item()

        assert answer.virial[0, a, b].item() == pytest.approx(central(strained), rel=1e-7, abs=2e-7 * scale)
    if name in WITH_CHARGES:

        def in_other_field(step):
            return evaluate(potential, atoms, field + step * np.array([0.6, 0.0, 0.8]), carried).energy.item()

        along = float(answer.dipole[0] @ torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64))
        assert along == pytest.approx(central(in_other_field), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", BUILDERS)
def test_one_molecule(potentials, name):
    answer = evaluate(potentials[name], water_dimer()[:3], None)
    assert torch.isfinite(answer.forces).all()
    assert answer.charges.shape == (3,)


def test_a_field_without_charges_is_refused(potentials):
    with pytest.raises(InputError, match="no charges to feel it"):
        evaluate(potentials["D3"], water_dimer(), FIELD)


def test_nothing_to_compute_is_refused():
    with pytest.raises(InputError, match="no terms"):
        Potential()


def test_mixed_precision_is_close_to_double():
    torch.manual_seed(3)
    mixed, double = Potential(network(), precision="mixed"), Potential(network(), precision="double")
    one, two = evaluate(mixed, water_box(), None), evaluate(double, water_box(), None)
    assert torch.allclose(one.forces, two.forces, atol=1e-4, rtol=1e-4)
    assert not torch.equal(one.forces, two.forces)
