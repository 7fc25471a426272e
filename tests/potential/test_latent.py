"""Latent charges: exact derivatives everywhere, the published sum and Born charges computed anew; training."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.special import erf

from voltpi.potential.checkpoints import load_potential, save_potential
from voltpi.potential.electrostatics.latent import LatentCharges
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT, FixedCharges, PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.external.electrodes import Electrode, assign_electrodes
from voltpi.potential.model import Potential
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.pair import ZBL, PairPotential
from voltpi.potential.systems import Systems
from voltpi.potential.training.dataset import Sample
from voltpi.potential.training.latent import begin_charges, interaction, set_sign
from voltpi.potential.training.loss import Loss, collate, pack, predict

from structures import water_box, water_dimer

CUTOFF = 3.5
METALS = (Electrode("low", "potential", eta=1.6), Electrode("high", "potential", eta=1.6))


@pytest.fixture(scope="module")
def network() -> NequIP:
    torch.manual_seed(3)
    out = NequIP([1, 8], hidden_irreps="8x0e+4x1o", layers=2, r_max=CUTOFF, n_neighbors=8, latent=True).double()
    with torch.no_grad():
        out.latent_readout[1] *= 20  # charges of some 0.2 e
    return out


def slab():
    atoms = water_box()
    cell = atoms.cell.array
    cell[2] = 0, 0, 30
    cell[0, 2] = cell[1, 2] = 0
    atoms.set_cell(cell)
    atoms.pbc = True, True, False
    return atoms


def capacitor():
    """Two molecules between two plates of gold."""
    rng = np.random.default_rng(4)
    grid = np.array([[i, j] for i in range(2) for j in range(2)]) * 2.9
    plates = [np.c_[grid, np.full(4, z)] + rng.normal(0, 0.05, (4, 3)) for z in (1.0, 11.0)]
    atoms = water_dimer()
    atoms.positions += (0.5, 0.5, 4.5)
    atoms += Atoms("Au8", np.concatenate(plates))
    atoms.set_cell([5.8, 5.8, 25.0])
    atoms.pbc = True, True, False
    return atoms


STRUCTURES = {"cell": water_box, "slab": slab, "open": water_dimer, "capacitor": capacitor}
NAN = math.nan
# structure, conserve, field, displacement
MODES = {
    "open": ("open", "total", (0.1, -0.2, 0.15), None),
    "cell": ("cell", "total", (0, 0, 0), None),
    "cell in a field": ("cell", "fragments", (0.1, -0.2, 0.15), None),
    "cell at a displacement": ("cell", "fragments", (0, -0.2, 0), (0.3, NAN, 0.1)),
    "slab": ("slab", "total", (0, 0, 0.2), None),
    "slab in a field": ("slab", "fragments", (0.1, -0.2, 0.15), None),
    "capacitor": ("capacitor", "total", (0, 0, 0.1), None),
    "capacitor, molecules": ("capacitor", "fragments", (0, 0, 0), None),
    "open, neighbors": ("open", "neighbors", (0.1, -0.2, 0.15), None),
    "cell, neighbors": ("cell", "neighbors", (0, 0, 0), None),
    "cell in a field, neighbors": ("cell", "neighbors", (0.1, -0.2, 0.15), None),
    "slab in a field, neighbors": ("slab", "neighbors", (0.1, -0.2, 0.15), None),
    "capacitor, neighbors": ("capacitor", "neighbors", (0, 0, 0.1), None),
    "open, relaxing": ("open", "total", (0.1, -0.2, 0.15), None),
    "cell, relaxing": ("cell", "total", (0, 0, 0), None),
    "cell in a field, relaxing": ("cell", "fragments", (0.1, -0.2, 0.15), None),
    "cell at a displacement, relaxing": ("cell", "fragments", (0, -0.2, 0), (0.3, NAN, 0.1)),
    "slab in a field, relaxing": ("slab", "fragments", (0.1, -0.2, 0.15), None),
    "capacitor, relaxing molecules": ("capacitor", "fragments", (0, 0, 0.1), None),
}
RELAXING = [mode for mode in MODES if "relaxing" in mode]


def prepared(network, mode, **changes):
    structure, conserve, field, displacement = MODES[mode]
    metals = METALS if structure == "capacitor" else ()
    charges = LatentCharges(
        **{
            "conserve": conserve,
            "epsilon_infinity": 1.0 if mode in RELAXING else 1.8,
            "relaxation": mode in RELAXING,
            "accuracy": 1e-10,
            "tolerance": 1e-11,
            "electrodes": metals,
            **changes,
        }
    )
    walls = PairPotential([ZBL()], 5.0) if metals else None
    potential = Potential(network, charges, walls=walls, precision="double")
    systems = Systems.from_atoms(STRUCTURES[structure](), field=field)
    if displacement is not None:
        systems = systems.replace(displacement=torch.tensor([displacement], dtype=torch.float64))
    if metals:
        systems = assign_electrodes(systems, metals, [range(6, 10), range(10, 14)], (-0.6, 0.9))
    return potential, potential.prepare(systems)


def slope(value, step):
    """d/dx at 0 from five points."""
    return (value(-2 * step) - 8 * value(-step) + 8 * value(step) - value(2 * step)) / (12 * step)


def direction(systems, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=systems.positions.shape))


@pytest.mark.parametrize("mode", MODES)
def test_forces_are_exact_derivatives(network, mode):
    potential, systems = prepared(network, mode)
    answer, along = potential(systems), direction(systems)
    assert answer.charges.abs().max() > 0.02
    work = slope(lambda x: potential(systems.replace(positions=systems.positions + x * along)).energy.item(), 1e-3)
    assert -float((answer.forces * along).sum()) == pytest.approx(work, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("mode", [m for m in MODES if "open" not in m])
def test_virial_is_an_exact_derivative(network, mode):
    potential, systems = prepared(network, mode)
    strain = torch.from_numpy(np.random.default_rng(2).normal(size=(3, 3)))
    if not bool(systems.pbc.all()):  # a slab stays in its plane
        strain[2, :2] = 0

    def strained(x):
        by = torch.eye(3, dtype=torch.float64) + x * strain
        return potential(systems.replace(positions=systems.positions @ by.T, cell=systems.cell @ by.T)).energy.item()

    work = slope(strained, 2e-4)
    assert -float((potential(systems).virial[0] * strain).sum()) == pytest.approx(work, rel=1e-7, abs=1e-8)


WITH_DIPOLE = ["open", "cell in a field", "cell at a displacement", "slab in a field"]


NEIGHBORS = [mode for mode in MODES if "neighbors" in mode and "capacitor" not in mode]


@pytest.mark.parametrize("mode", [*WITH_DIPOLE, *(f"{mode}, relaxing" for mode in WITH_DIPOLE), *NEIGHBORS])
def test_born_charges_are_derivatives_of_the_dipole(network, mode):
    potential, systems = prepared(network, mode)
    fixed = systems.replace(displacement=None, field=potential(systems).field)  # Born charges are at fixed field
    along = direction(systems)
    born = potential(systems, born_charges=True).born_charges
    for a in range(3):
        change = slope(
            lambda x, a=a: potential(fixed.replace(positions=fixed.positions + x * along)).dipole[0, a].item(), 3e-4
        )
        assert float((born[:, a] * along).sum()) == pytest.approx(change, rel=1e-7, abs=1e-9)
    assert born.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize(
    "mode", ["capacitor", "capacitor, molecules", "capacitor, neighbors", "capacitor, relaxing molecules"]
)
def test_born_charges_between_electrodes_are_forces_per_field(network, mode):
    """∂F/∂ε across the plates, where charge on the metal follows."""
    potential, systems = prepared(network, mode)
    step = torch.tensor([[0.0, 0.0, 0.01]], dtype=torch.float64)
    up, down = (potential(systems.replace(field=systems.field + sign * step)).forces for sign in (1, -1))
    born = potential(systems, born_charges=True).born_charges[:, 2]
    assert torch.allclose(born, (up - down) / 0.02, atol=1e-8)


def test_electrodes_that_the_network_knows_keep_their_charge(network):
    """No walls: the network sees the metal, but exchanges charge and spreads the net charge among the rest only."""
    torch.manual_seed(5)
    knowing = NequIP([1, 8, 79], hidden_irreps="8x0e+4x1o", layers=2, r_max=5.0, n_neighbors=8, latent=True).double()
    with torch.no_grad():
        knowing.latent_readout[1] *= 20
    charges = LatentCharges(conserve="neighbors", accuracy=1e-10, tolerance=1e-11, electrodes=METALS)
    potential = Potential(knowing, charges, precision="double")
    systems = Systems.from_atoms(capacitor(), field=(0, 0, 0.1), net_charge=0.5)
    systems = assign_electrodes(systems, METALS, [range(6, 10), range(10, 14)], (-0.6, 0.9))
    answer, along = potential(potential.prepare(systems)), direction(systems)
    assert answer.charges[:6].sum().item() == pytest.approx(0.5, abs=1e-12)
    assert answer.charges.sum().item() == pytest.approx(0.5, abs=1e-9)
    work = slope(lambda x: potential(systems.replace(positions=systems.positions + x * along)).energy.item(), 1e-3)
    assert -float((answer.forces * along).sum()) == pytest.approx(work, rel=1e-7, abs=1e-8)


def test_the_potential_difference_does_work_on_the_charges(network):
    """dΩ/dψ = −Q of the electrode."""
    potential, systems = prepared(network, "capacitor")

    def energy(x):
        return potential(systems.replace(applied=systems.applied + x * torch.tensor([[0.0, 1.0]]))).energy.item()

    charge = potential(systems).electrodes["high"]["charge"].item()
    assert charge == pytest.approx(-slope(energy, 0.1), rel=1e-7)


@pytest.mark.parametrize("mode", [m for m in RELAXING if m != "cell, relaxing"])
def test_polarizability_is_the_derivative_of_the_dipole(network, mode):
    potential, systems = prepared(network, mode)
    systems = systems.replace(displacement=None)
    step = 1e-3 * torch.eye(3, dtype=torch.float64)[2:]
    up, down = (potential(systems.replace(field=systems.field + sign * step)).dipole[0] for sign in (1, -1))
    found = potential(systems, polarizability=True).polarizability[0, :, 2] / COULOMB_CONSTANT
    assert torch.allclose(found, (up - down) / 2e-3, atol=1e-7)
    assert found[2] > 1e-3


def test_charges_relax_to_the_minimum_of_their_energy(network):
    """½ Σ η (q − q⁰)² + Coulomb − ε·M, by numpy, for a molecule in a field."""
    potential, systems = prepared(network, "open, relaxing")
    rigid, _ = prepared(network, "open", epsilon_infinity=1.0)
    answer, bare = potential(systems), rigid(systems).charges.numpy()
    eta = potential.charges.hardness(systems).numpy()
    assert set(np.round(eta, 3)) == {round(potential.charges.parameters[s].eta, 3) for s in "OH"}
    r = np.linalg.norm(systems.positions.numpy()[:, None] - systems.positions.numpy(), axis=2)
    np.fill_diagonal(r, 1.0)
    pairs = COULOMB_CONSTANT * erf(r / math.sqrt(2)) / r
    np.fill_diagonal(pairs, 0.0)
    push = systems.positions.numpy() @ systems.field[0].numpy()
    n = len(eta)
    matrix = np.block([[pairs + np.diag(eta), np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    q = np.linalg.solve(matrix, np.append(eta * bare + push, 0.0))[:n]
    assert answer.charges.numpy() == pytest.approx(q, abs=1e-9)
    energy = 0.5 * (eta * (q - bare) ** 2).sum() + 0.5 * q @ pairs @ q - push @ q
    total = answer.energy.item() - answer.energy_terms["short_range"].item()
    assert total == pytest.approx(energy, abs=1e-9)


def published_sum(atoms, charges, sigma):
    """Energy (eV) by Cheng (2025), eq. 6, less the self-interaction; in the open by pairs."""
    positions = atoms.positions
    own = (charges**2).sum() / (sigma * math.sqrt(2 * math.pi))
    if not atoms.pbc.any():
        r = np.linalg.norm(positions[:, None] - positions, axis=2)
        np.fill_diagonal(r, 1.0)
        pairs = erf(r / (math.sqrt(2) * sigma)) / r
        np.fill_diagonal(pairs, 0.0)
        return 0.5 * COULOMB_CONSTANT * charges @ pairs @ charges
    reciprocal = 2 * math.pi * np.linalg.inv(atoms.cell.array).T
    n = np.array(np.meshgrid(*[np.arange(-14, 15)] * 3)).reshape(3, -1).T
    k = n[np.any(n != 0, axis=1)] @ reciprocal
    k2 = (k**2).sum(1)
    structure = np.exp(1j * k @ positions.T) @ charges
    energy = 2 * math.pi / atoms.cell.volume * (np.exp(-0.5 * sigma**2 * k2) / k2 * np.abs(structure) ** 2).sum()
    return COULOMB_CONSTANT * (energy - own)


@pytest.mark.parametrize("structure", ["cell", "open"])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.6])
def test_the_sum_is_the_published_one(network, structure, sigma):
    potential, systems = prepared(network, structure, sigma=sigma)
    answer = potential(systems)
    expected = published_sum(STRUCTURES[structure](), answer.charges.numpy(), sigma)
    assert answer.energy_terms["coulomb"].item() == pytest.approx(expected, rel=1e-8)


def test_born_charges_in_a_cell_are_the_published_ones(network):
    """Zhong et al. (2025): Re exp(−ik r_i) ∂P_a(k)/∂r_i, P_a = √ε∞ Σ q_j exp(ik r_j)/(ik), in a rectangular cell."""
    atoms = water_box()
    atoms.set_cell(np.diag([6.5, 6.0, 5.5]))
    potential, systems = prepared(network, "cell")
    systems = potential.prepare(Systems.from_atoms(atoms))
    n = len(atoms)
    jacobian = np.zeros((n, n, 3))  # ∂q_j/∂r_i
    for i in range(n):
        for b in range(3):

            def moved(x, i=i, b=b):
                positions = systems.positions.clone()
                positions[i, b] += x
                return potential(systems.replace(positions=positions)).charges.numpy()

            jacobian[:, i, b] = slope(moved, 1e-3)
    charges = potential(systems).charges.numpy()
    expected = np.zeros((n, 3, 3))
    for a in range(3):
        k = 2 * math.pi / atoms.cell.array[a, a]
        phase = np.exp(1j * k * atoms.positions[:, a])
        change = np.einsum("j,jib->ib", phase, jacobian) / (1j * k)
        change[:, a] += charges * phase
        expected[:, a] = math.sqrt(1.8) * (change * phase.conj()[:, None]).real
    expected -= expected.mean(0)  # the acoustic sum rule
    born = potential(systems, born_charges=True).born_charges.numpy()
    assert np.abs(born - expected).max() < 1e-8
    assert np.abs(born).max() > 0.1


def test_born_charges_in_a_large_cell_are_those_of_the_molecules(network):
    """What is left of the form factor falls with the square of the cell's edge."""
    potential, systems = prepared(network, "open", epsilon_infinity=1.0)
    exact = potential(systems.replace(field=torch.zeros_like(systems.field)), born_charges=True).born_charges
    left = []
    for edge in (30.0, 60.0, 120.0):
        atoms = water_dimer()
        atoms.set_cell([edge] * 3)
        atoms.pbc = True
        in_cell = potential(potential.prepare(Systems.from_atoms(atoms)), born_charges=True).born_charges
        left.append(float((in_cell - exact).abs().max()))
    assert left[0] < 0.02
    assert [a / b for a, b in itertools.pairwise(left)] == pytest.approx([4, 4], rel=0.05)


def test_a_field_pulls_with_the_born_charges(network):
    potential, systems = prepared(network, "cell in a field")
    free = systems.replace(field=torch.zeros_like(systems.field))
    born = potential(free, born_charges=True).born_charges
    pull = potential(systems).forces - potential(free).forces
    assert torch.allclose(pull, torch.einsum("nab,a->nb", born, systems.field[0]), atol=1e-10)


def test_exchanged_charges_have_one_moment_in_any_cell(network):
    """Half a cell's atoms moved by a lattice vector: another Σ q r, the same M; in the open M is Σ q r."""
    potential, systems = prepared(network, "cell in a field, neighbors")
    shifted = systems.positions.clone()
    shifted[::2] += systems.cell[0, 1]
    one, two = potential(systems), potential(systems.replace(positions=shifted))
    assert torch.allclose(one.dipole, two.dipole, atol=1e-12)
    assert one.energy.item() == pytest.approx(two.energy.item(), abs=1e-10)
    free, systems = prepared(network, "open, neighbors", epsilon_infinity=1.0)
    answer = free(systems)
    assert torch.allclose(answer.dipole[0], answer.charges @ systems.positions, atol=1e-12)


def test_a_net_charge_feels_a_field(network):
    potential, systems = prepared(network, "open, neighbors", epsilon_infinity=1.0)
    charged = systems.replace(net_charge=torch.ones(1, dtype=torch.float64))
    answer = potential(charged)
    assert torch.allclose(answer.forces.sum(0), systems.field[0], atol=1e-9)
    assert torch.allclose(answer.dipole[0], answer.charges @ systems.positions, atol=1e-12)
    along = direction(systems)
    work = slope(lambda x: potential(charged.replace(positions=charged.positions + x * along)).energy.item(), 1e-3)
    assert -float((answer.forces * along).sum()) == pytest.approx(work, rel=1e-7)


def test_screening_scales_the_dipole_and_nothing_else(network):
    potential, systems = prepared(network, "cell in a field")
    free = systems.replace(field=torch.zeros_like(systems.field))
    bare, _ = prepared(network, "cell in a field", epsilon_infinity=1.0)
    one, two = potential(free), bare(free)
    assert one.energy.item() == pytest.approx(two.energy.item(), abs=1e-12)
    assert torch.allclose(one.dipole, math.sqrt(1.8) * two.dipole, atol=1e-12)


@pytest.mark.parametrize("mode", ["open", "cell", "cell in a field", "slab", "open, neighbors", "cell, neighbors"])
def test_charges_add_up_and_batches_equal_singles(network, mode):
    potential, systems = prepared(network, mode)
    charged = systems
    if "fragments" not in MODES[mode]:
        charged = systems.replace(net_charge=torch.ones(1, dtype=torch.float64))
    moved = charged.replace(positions=charged.positions + 0.05 * direction(charged))
    both = potential(Systems.join([charged, moved]), born_charges=True)
    n = systems.n_atoms
    for k, one in enumerate((charged, moved)):
        alone = potential(one, born_charges=True)
        own = slice(k * n, (k + 1) * n)
        assert alone.charges.sum().item() == pytest.approx(one.net_charge.item(), abs=1e-12)
        assert both.energy[k].item() == pytest.approx(alone.energy.item(), abs=1e-10)
        assert torch.allclose(both.forces[own], alone.forces, atol=1e-10)
        assert torch.allclose(both.born_charges[own], alone.born_charges, atol=1e-9)
        assert torch.allclose(both.virial[k], alone.virial[0], atol=1e-9)
    if MODES[mode][1] == "fragments":
        sums = torch.zeros(3, dtype=torch.float64).index_add_(0, systems.fragments, alone.charges)
        assert sums.abs().max() < 1e-12


def test_mixed_precision_is_near_double(network):
    double, systems = prepared(network, "cell in a field")
    copy = NequIP(**network.config)
    copy.load_state_dict(network.state_dict())
    mixed = Potential(copy, double.charges, precision="mixed")
    one, two = double(systems), mixed(systems)
    assert two.energy.item() == pytest.approx(one.energy.item(), abs=2e-5)
    assert torch.allclose(one.forces, two.forces, atol=2e-5)


@pytest.mark.parametrize("mode", ["cell in a field", "cell in a field, relaxing"])
def test_a_file_brings_everything_back(network, tmp_path, mode):
    potential, systems = prepared(network, mode, sigma=1.3)
    save_potential(tmp_path / "m.safetensors", potential, {"name": "latent"})
    again = load_potential(tmp_path / "m.safetensors", precision="double")
    assert again.charges.config == potential.charges.config
    assert again(systems).energy.item() == pytest.approx(potential(systems).energy.item(), abs=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(network):
    potential, systems = prepared(network, "cell")
    in_field = systems.replace(field=torch.full_like(systems.field, 0.1))
    with pytest.raises(InputError, match=r"trained with charges\.conserve: fragments"):
        potential(in_field)
    with pytest.raises(InputError, match=r"output\.polarizability"):
        potential(systems, polarizability=True)
    plain = NequIP([1, 8], hidden_irreps="8x0e+4x1o", layers=1, r_max=3.0)
    with pytest.raises(InputError, match="latent needs a network that gives latent charges"):
        Potential(plain, LatentCharges())
    with pytest.raises(InputError, match=r"charges\.model: latent"):
        plain.with_charges(torch.tensor([8]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3))
    local, systems = prepared(network, "cell in a field, neighbors")
    held = torch.full_like(systems.field, 0.1)
    with pytest.raises(InputError, match=r"displacement is not available with charges\.conserve: neighbors"):
        local(systems.replace(displacement=held, field=torch.zeros_like(held)))
    with pytest.raises(InputError, match="reduced is not available"):
        local(systems.replace(field_cell=systems.cell))
    with pytest.raises(InputError, match="net charge without end: set charges"):
        local(systems.replace(net_charge=torch.ones(1, dtype=torch.float64)))
    with pytest.raises(InputError, match="total or fragments"):
        LatentCharges(relaxation=True, conserve="neighbors")
    with pytest.raises(InputError, match=r"charges\.conserve is 'neighbors': choose total \| fragments"):
        PQEq(conserve="neighbors")
    relaxing, systems = prepared(network, "cell, relaxing")
    with pytest.raises(InputError, match=r"output\.born_charges with charges\.relaxation"):
        relaxing(systems, born_charges=True)
    with pytest.raises(InputError, match="which screens by itself"):
        LatentCharges(relaxation=True, epsilon_infinity=2.0)
    for key in ("sigma", "epsilon_infinity"):
        with pytest.raises(InputError, match=f"charges.{key} is -1"):
            LatentCharges(**{key: -1.0})


# -- training --------------------------------------------------------------------------------------------------------


def sample(potential, systems):
    pairs = neighbor_list(systems, CUTOFF)
    stress = torch.zeros(3, 3, dtype=torch.float64) if bool(systems.pbc.all()) else None
    own = interaction(potential.charges, systems, stress=stress is not None)
    forces = torch.zeros_like(systems.positions)
    return Sample("a", "a.xyz", 0, systems, pairs.index, pairs.vectors, 0.0, forces, stress=stress, latent=own)


@pytest.mark.parametrize(
    "mode",
    [
        *("open", "cell", "cell in a field", "slab", "open, relaxing", "cell, relaxing", "cell in a field, relaxing"),
        *NEIGHBORS,
    ],
)
def test_what_is_trained_is_what_runs(network, mode):
    potential, systems = prepared(network, mode)
    expected, labelled = potential(systems), sample(potential, systems)
    batch = collate([pack(labelled, dtype=torch.float64)] * 2)
    answer = predict(network, batch, create_graph=False)
    n = systems.n_atoms
    for k in range(2):
        assert answer.energy[k].item() == pytest.approx(expected.energy.item(), abs=1e-10)
        assert torch.allclose(answer.forces[k * n : (k + 1) * n], expected.forces, atol=1e-10)
    if labelled.stress is not None:
        virial = 0.5 * (expected.virial[0] + expected.virial[0].T)
        assert torch.allclose(-labelled.volume * answer.stress[1], virial, atol=1e-6)


@pytest.mark.parametrize(
    "mode", ["open", "open, neighbors", "open, relaxing", "cell", "cell, neighbors", "cell, relaxing"]
)
def test_with_a_net_charge_too(network, mode):
    """In a field where there is one; and then the energy knows the sign of the charges."""
    potential, systems = prepared(network, mode)
    systems = systems.replace(net_charge=torch.ones(1, dtype=torch.float64))
    expected, labelled = potential(systems), sample(potential, systems)
    answer = predict(network, pack(labelled, dtype=torch.float64), create_graph=False)
    assert answer.energy.item() == pytest.approx(expected.energy.item(), abs=1e-10)
    assert torch.allclose(answer.forces, expected.forces, atol=1e-10)
    assert not set_sign(network, [labelled])


@pytest.mark.parametrize("mode", ["open", "cell in a field", "cell in a field, relaxing", "cell in a field, neighbors"])
def test_the_loss_has_an_exact_gradient(network, mode):
    potential, systems = prepared(network, mode)
    batch = pack(sample(potential, systems), dtype=torch.float64)
    trained = NequIP(**network.config).double()
    trained.load_state_dict(network.state_dict())

    def loss():
        answer = predict(trained, batch, create_graph=True)
        stress = 0.0 if answer.stress is None else 1e3 * answer.stress.square().sum()
        return answer.forces.square().sum() + answer.energy.sum() ** 2 + stress

    for name in ("latent_readout.0", "latent_readout.1", "convolutions.0.radial.kernels.0"):
        weight = trained.get_parameter(name)
        trained.zero_grad()
        loss().backward()
        along = torch.from_numpy(np.random.default_rng(5).normal(size=tuple(weight.shape)))
        kept = weight.detach().clone()

        def at(x, weight=weight, kept=kept, along=along):
            with torch.no_grad():
                weight.copy_(kept + x * along)
            return loss().item()

        found = float((weight.grad * along).sum())
        assert found == pytest.approx(slope(at, 1e-4), rel=1e-7)
        at(0.0)


@pytest.mark.parametrize("first", [1, -1])
def test_electronegative_elements_are_made_negative(network, first):
    """The energy knows no sign; labels in a field do, and then it stays."""
    potential, systems = prepared(network, "open", epsilon_infinity=1.0)
    free = systems.replace(field=torch.zeros_like(systems.field))
    turned = NequIP(**network.config).double()
    turned.load_state_dict(network.state_dict())
    with torch.no_grad():
        turned.latent_readout[1] *= first
        turned.latent_shift *= first
    taught = sample(potential, systems)  # in a field
    assert not set_sign(turned, [taught])
    changed = set_sign(turned, [sample(potential, free)])
    answer = Potential(turned, potential.charges, precision="double")(free)
    assert answer.charges[free.numbers == 8].sum() < 0
    assert answer.energy.item() == pytest.approx(potential(free).energy.item(), abs=1e-12)
    sign = torch.sign(potential(free).charges[free.numbers == 8].sum()).item()
    assert changed == (first * sign > 0)


@pytest.mark.parametrize("mode", ["open", "cell in a field", "open, neighbors"])
def test_what_does_not_add_up_by_itself_is_in_the_loss(network, mode):
    potential, systems = prepared(network, mode)
    labelled = sample(potential, systems)
    batch = pack(labelled, dtype=torch.float64)
    raw = network.with_charges(systems.numbers, labelled.edge_index, labelled.vectors)[1].detach()
    group = systems.fragments if "field" in mode else torch.zeros_like(systems.batch)
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, raw)
    expected = 0.0 if "neighbors" in mode else sums.square().sum().item()
    answer = predict(network, batch, create_graph=True)
    assert answer.excess.item() == pytest.approx(expected, rel=1e-12)
    added = Loss(neutrality=0.3)(answer, batch) - Loss()(answer, batch)
    assert added.item() == pytest.approx(0.3 * expected, rel=1e-9, abs=1e-12)


def test_charges_begin_from_electronegativities(network):
    fresh = NequIP(**network.config)
    begin_charges(fresh)
    oxygen, hydrogen = (fresh.latent_shift[fresh.species.index(z)].item() for z in (8, 1))
    assert -0.5 < oxygen < -0.05 < 0.05 < hydrogen < 0.5
    _, systems = prepared(network, "open")
    answer = Potential(fresh, LatentCharges())(systems)
    assert answer.charges[systems.numbers == 8].max() < 0 < answer.charges[systems.numbers == 1].min()


def test_latent_charges_count_among_electrodes_like_given_ones(network):
    """The same charges as fixed ones of that width: the same energy, and forces without their change."""
    potential, systems = prepared(network, "capacitor")
    answer = potential(systems)
    given = FixedCharges(widths={"O": 1.0, "H": 1.0}, electrodes=METALS, accuracy=1e-10, tolerance=1e-11).solve(
        systems.replace(carried=answer.charges, field=torch.zeros_like(systems.field))
    )
    bare, _ = prepared(network, "capacitor", epsilon_infinity=1.0)
    free = bare(systems.replace(field=torch.zeros_like(systems.field)))
    assert free.electrodes["low"]["charge"].item() == pytest.approx(given.electrodes["low"]["charge"].item(), abs=1e-9)
    assert free.energy_terms["coulomb"].item() == pytest.approx(given.terms["coulomb"].item(), abs=1e-8)
