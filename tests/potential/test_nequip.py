"""NequIP: symmetry, derivatives, smoothness, and the published code's numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list
from e3nn import o3
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.reaxnet import read_reaxnet, reaxnet_network
from voltpi.potential.shortrange import messages
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.shortrange.pair import ZBL

FULL: dict[str, object] = {"hidden_irreps": "6x0e+2x0o+4x1o+3x1e+2x2e", "sh_irreps": "0e+1o+2e", "layers": 4}
DEEP: dict[str, object] = {**FULL, "layers": 6}  # deep enough for pseudoscalars to reach the energy
EVEN: dict[str, object] = {"hidden_irreps": "8x0e+4x1e", "sh_irreps": "0e+1e"}
COMMON = {"species": [1, 8, 11], "layers": 3, "r_max": 3.5, "radial_hidden": 16, "n_neighbors": 5.0}


def network(irreps: dict[str, object] = FULL, dtype: torch.dtype = torch.float64, **changes: object) -> NequIP:
    torch.manual_seed(3)
    return NequIP(**{**COMMON, "shift": [-1.0, -5.0, -2.0], "scale": [0.5, 2.0, 1.0], **irreps, **changes}).to(dtype)  # type: ignore[arg-type]


def structure(n: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Atoms at least 0.8 Å apart in a box of 4.5 Å."""
    rng = np.random.default_rng(seed)
    positions: list[np.ndarray] = []
    while len(positions) < n:
        trial = rng.uniform(0, 4.5, 3)
        if all(np.linalg.norm(trial - p) > 0.8 for p in positions):
            positions.append(trial)
    return torch.tensor(rng.choice([1, 8, 11], n)), torch.tensor(np.array(positions))


def pairs(positions: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a molecule, also those beyond the cutoff."""
    n = len(positions)
    index = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    return index, positions[index[1]] - positions[index[0]]


def evaluate(net: NequIP, numbers: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    positions = positions.clone().requires_grad_()
    energies = net(numbers, *pairs(positions))
    (gradient,) = torch.autograd.grad(energies.sum(), positions)
    return energies.detach(), -gradient


@pytest.mark.parametrize("irreps", [FULL, DEEP, EVEN])
def test_rotation_rotates_forces(irreps: dict[str, object]) -> None:
    net, (numbers, positions) = network(irreps), structure()
    torch.manual_seed(1)
    rotation = o3.rand_matrix(dtype=torch.float64)
    if irreps is not EVEN:
        rotation = -rotation
    energies, forces = evaluate(net, numbers, positions)
    rotated_energies, rotated_forces = evaluate(net, numbers, positions @ rotation.T)
    torch.testing.assert_close(rotated_energies, energies, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotated_forces, forces @ rotation.T, rtol=1e-10, atol=1e-12)


def test_even_irreps_tell_mirror_images_apart_and_edge_sign_swaps_them() -> None:
    numbers, positions = structure()
    plain, mirrored = (evaluate(network(EVEN), numbers, s * positions)[0].sum() for s in (1.0, -1.0))
    assert abs(plain - mirrored) > 1e-9
    swapped = evaluate(network(EVEN, edge_sign=-1), numbers, -positions)[0].sum()
    torch.testing.assert_close(swapped, plain, rtol=1e-12, atol=0)


def test_translation_permutation_and_edge_order() -> None:
    net, (numbers, positions) = network(), structure()
    energies, forces = evaluate(net, numbers, positions)
    assert forces.abs().max() > 1e-3
    torch.testing.assert_close(forces.sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    shifted = evaluate(net, numbers, positions + torch.tensor([3.0, -2.0, 7.0]))
    torch.testing.assert_close(shifted[0], energies, rtol=1e-12, atol=1e-12)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2))
    permuted = evaluate(net, numbers[order], positions[order])
    torch.testing.assert_close(permuted[0], energies[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted[1], forces[order], rtol=1e-10, atol=1e-12)
    index, vectors = pairs(positions)
    order = torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net(numbers, index[:, order], vectors[order]), energies, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("irreps", [FULL, EVEN])
@pytest.mark.parametrize("sign", [1, -1])
def test_forces_are_the_finite_differences_of_the_energy(irreps: dict[str, object], sign: int) -> None:
    net, (numbers, positions) = network(irreps, edge_sign=sign), structure()
    _, forces = evaluate(net, numbers, positions)
    direction = torch.randn(positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def energy(step: float) -> Tensor:
        return evaluate(net, numbers, positions + step * direction)[0].sum()

    h = 2e-4
    slope = (8 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12 * h)
    assert float(slope) == pytest.approx(-float((forces * direction).sum()), rel=1e-7)


@pytest.mark.parametrize("repulsion", ["covalent", {"H-H": 1.4, "Na-O": 2.5}])
def test_repulsion_is_added_and_has_derivatives(repulsion: str | dict[str, float]) -> None:
    bare, net = network(), network(repulsion=repulsion)
    assert bare.state_dict().keys() == net.state_dict().keys()  # nothing to learn
    numbers, positions = structure(seed=4)
    positions = 0.75 * positions
    wall = ZBL(None if isinstance(repulsion, str) else repulsion)
    distance = torch.cdist(positions, positions)
    near = distance < wall.reach[numbers[:, None], numbers]
    expected = evaluate(bare, numbers, positions)[0].sum()
    for i, j in near.triu(1).nonzero().tolist():
        expected = expected + wall(numbers[i, None], numbers[j, None], distance[i, j, None] ** 2)[0]
    energies, forces = evaluate(net, numbers, positions)
    assert float(energies.sum()) == pytest.approx(float(expected), rel=1e-12)
    assert abs(float(expected) - float(evaluate(bare, numbers, positions)[0].sum())) > 0.1
    direction = torch.randn(positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    h = 1e-4
    e = [float(evaluate(net, numbers, positions + k * h * direction)[0].sum()) for k in (-2, -1, 1, 2)]
    slope = (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)
    assert slope == pytest.approx(-float((forces * direction).sum()), rel=1e-7)


def test_second_derivatives_of_a_tiny_network() -> None:
    net = network(layers=2, hidden_irreps="2x0e+2x1o+1x2e", radial_hidden=3, n_basis=2)
    numbers, positions = structure(4)
    index, vectors = pairs(positions)

    def energy(v: Tensor) -> Tensor:
        return net(numbers, index, v).sum()

    assert torch.autograd.gradcheck(energy, vectors.requires_grad_())
    assert torch.autograd.gradgradcheck(energy, vectors)


@pytest.mark.parametrize("irreps", [FULL, DEEP, EVEN])
def test_gradient_of_a_force_loss_with_respect_to_parameters(irreps: dict[str, object]) -> None:
    """What training needs: d/dθ of a function of forces, against central differences along a random direction in θ.

    No parameter is without effect.
    """
    net, (numbers, positions) = network(irreps), structure(6)
    parameters = list(net.parameters())
    generator = torch.Generator().manual_seed(7)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    index, vectors = pairs(positions)
    vectors.requires_grad_()

    def loss() -> Tensor:
        energy = net(numbers, index, vectors).sum()
        (gradient,) = torch.autograd.grad(energy, vectors, create_graph=True)
        return energy**2 + ((gradient - 0.1) ** 2).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    assert all(g.abs().max() > 0 for g in gradients)

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
        value = loss().item()
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(step * d)
        return value

    h = 1e-5
    slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    exact = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    assert slope == pytest.approx(exact, rel=1e-7)


def test_kernel_derivatives_with_and_without_graph() -> None:
    """The fused second derivative equals the differentiable one, and both equal finite differences."""
    torch.manual_seed(0)
    receiver = torch.tensor([0] * 11 + [2] * 5 + [3])
    edges = torch.stack([receiver, torch.randint(0, 4, (len(receiver),))])
    blocks = messages.make_blocks(edges, torch.rand(len(receiver), 3, dtype=torch.float64) + 0.5, 4, 3.0)
    assert blocks.receiver.tolist() == [0, 0, 2, 3]
    coupling = messages.Coupling(
        matrices=[torch.eye(3, dtype=torch.float64).view(1, 9), torch.randn(3, 15, dtype=torch.float64)],
        harmonics=[slice(0, 1), slice(1, 4)],
        rows=[slice(0, 3), slice(3, 8)],
        scalar=[True, False],
    )
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(blocks.sender), 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(len(blocks.sender), 4, dtype=torch.float64, requires_grad=True)

    def kernel(*inputs: Tensor) -> Tensor:
        return messages.sum_blocks(*inputs, blocks.sender, coupling)  # type: ignore[call-arg]

    assert torch.autograd.gradcheck(kernel, (x, y, w))
    assert torch.autograd.gradgradcheck(kernel, (x, y, w))
    grad = torch.randn(4, 8, 2, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(kernel(x, y, w), (x, y, w), grad, create_graph=True)
    cotangents = [torch.randn_like(t) for t in first]
    inputs = (x, y, w, grad)
    second = [torch.autograd.grad(first, inputs, cotangents, create_graph=c, retain_graph=True) for c in (False, True)]
    for fused, plain in zip(*second, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_energy_and_forces_go_smoothly_to_zero_at_the_cutoff() -> None:
    net = network()
    numbers = torch.tensor([8, 1])
    alone = net(numbers, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64))

    def pair(r: float) -> tuple[float, float]:
        energies, forces = evaluate(net, numbers, torch.tensor([[0.0, 0.0, 0.0], [0.0, r, 0.0]], dtype=torch.float64))
        return (energies - alone).abs().sum().item(), forces[0, 1].item()

    inside, near, at, beyond = pair(3.4), pair(3.5 - 1e-4), pair(3.5), pair(3.6)
    assert inside[0] > 1e-6
    assert near[0] < 1e-5 * inside[0]
    assert abs(near[1]) < 1e-2 * abs(inside[1])
    assert at == (0.0, 0.0) == beyond
    # The switch begins 0.5 Å earlier; the force has no jump there.
    assert pair(3.0 - 1e-7)[1] == pytest.approx(pair(3.0 + 1e-7)[1], rel=1e-4)


def test_batch_equals_single() -> None:
    net = network()
    parts = [structure(n, seed) for n, seed in ((9, 0), (1, 1), (5, 2))]
    edges = [pairs(positions) for _, positions in parts]
    offsets = np.cumsum([0] + [len(z) for z, _ in parts])
    joint = net(
        torch.cat([z for z, _ in parts]),
        torch.cat([index + int(o) for (index, _), o in zip(edges, offsets, strict=False)], dim=1),
        torch.cat([vectors for _, vectors in edges]),
    )
    single = torch.cat([net(z, *edge) for (z, _), edge in zip(parts, edges, strict=True)])
    torch.testing.assert_close(joint, single, rtol=1e-12, atol=1e-12)


def test_isolated_atoms_have_an_energy_and_differentiate() -> None:
    net = network()
    vectors = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    energies = net(torch.tensor([8, 8, 1]), torch.zeros(2, 0, dtype=torch.int64), vectors)
    assert energies[0] == energies[1] != energies[2]
    (gradient,) = torch.autograd.grad(energies.sum(), vectors, create_graph=True)
    (energies.sum() + gradient.sum()).backward()
    assert gradient.shape == (0, 3)
    assert net.embedding.grad is not None


def test_single_precision_follows_double() -> None:
    numbers, positions = structure(20, 4)
    energies, forces = evaluate(network(), numbers, positions)
    low_energies, low_forces = evaluate(network(dtype=torch.float32), numbers, positions)
    assert low_energies.dtype == torch.float64
    torch.testing.assert_close(low_energies, energies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(low_forces, forces, rtol=1e-4, atol=1e-5)


def test_configuration_and_weights_rebuild_the_network() -> None:
    net, (numbers, positions) = network(), structure()
    config = json.loads(json.dumps(net.config))
    copy = NequIP(**config).double()
    copy.load_state_dict(net.state_dict())
    torch.testing.assert_close(evaluate(copy, numbers, positions), evaluate(net, numbers, positions), rtol=0, atol=0)
    assert copy.cutoff == 3.5
    assert copy.species == [1, 8, 11]


def test_shift_and_scale_by_species() -> None:
    numbers, positions = structure()
    index, vectors = pairs(positions)
    bare = network(shift=0.0, scale=1.0)(numbers, index, vectors)
    known = {1: (0.5, -1.0), 8: (2.0, -5.0), 11: (1.0, -2.0)}
    expected = [known[z][0] * e + known[z][1] for z, e in zip(numbers.tolist(), bare.tolist(), strict=True)]
    assert network()(numbers, index, vectors).tolist() == pytest.approx(expected, rel=1e-12)


def test_unknown_element_is_named() -> None:
    net = network(species=[0, 1, 8], shift=0.0, scale=1.0)
    with pytest.raises(InputError, match=r"does not know Na \(for an electrode .*\): it was trained for H, O$"):
        net(torch.tensor([1, 11]), *pairs(torch.rand(2, 3, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_irreps": "nonsense"}, "cannot be read"),
        ({"hidden_irreps": "8x1o"}, "need at least 2x0e"),
        ({"sh_irreps": "2x0e+1o"}, "multiplicity 1"),
        ({"sh_irreps": "1o"}, "must contain 0e"),
        ({"edge_sign": 0}, "edge_sign"),
        ({"species": [1, 1, 8]}, "each element once"),
        ({"shift": [1.0, 2.0]}, "shift has shape"),
        ({"layers": 0}, "at least one layer"),
        ({"r_max": 0.4}, "cutoff above"),
        ({"repulsion": "zbl"}, "repulsion is 'zbl': give covalent"),
        ({"repulsion": {"O-H": 3.6}}, "repulsion ends at 3.6 Å, beyond r_max 3.5"),
        ({"repulsion": {"O-Q": 1.0}}, "'O-Q' is not a pair of elements"),
        ({"repulsion": {"O-H": 0.0}}, "the repulsion of O-H ends at 0.0 Å"),
    ],
)
def test_wrong_configuration_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(**changes)


# ReaxNet's published code on random weights. The checkpoints are larger than what belongs into a test folder.

REFERENCE = os.environ.get("VOLTPI_REFERENCE")


@pytest.mark.skipif(REFERENCE is None, reason="VOLTPI_REFERENCE names no folder with reaxnet_nequip/")
@pytest.mark.parametrize("model", ["nequip_small", "nequip_l2"])
@pytest.mark.parametrize("name", ["lipon24", "v4zn4o8"])
@pytest.mark.parametrize("amplify", [1.0, 20.0])
def test_reproduces_the_published_code(model: str, name: str, amplify: float) -> None:
    assert REFERENCE is not None
    folder = Path(REFERENCE) / "reaxnet_nequip"
    data = json.loads((folder / f"nequip_structures_{name}.json").read_text())
    atoms = ase.Atoms(data["numbers"], data["positions"], cell=data["cell"], pbc=data["pbc"])
    with np.load(folder / model / f"ref_f64_{'amp_' if amplify > 1 else ''}{name}.npz") as file:
        reference = dict(file)
    checkpoint = read_reaxnet(folder / model)
    last = f"/Dense_{checkpoint.config['radial_net_n_layers']}/kernel"
    weights = {key: w * np.float32(amplify if key.endswith(last) else 1.0) for key, w in checkpoint.weights.items()}
    net = reaxnet_network(dataclasses.replace(checkpoint, weights=weights))
    receiver, sender, shift = neighbor_list("ijS", atoms, net.cutoff)
    index = torch.tensor(np.stack([receiver, sender]), dtype=torch.int64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        positions = torch.tensor(atoms.positions, requires_grad=True)
        vectors = positions[index[1]] - positions[index[0]] + torch.tensor(shift @ atoms.cell.array)
        energies = net.to(dtype)(torch.tensor(atoms.numbers), index, vectors)
        (gradient,) = torch.autograd.grad(energies.sum(), positions)
        assert energies.sum().item() == pytest.approx(float(reference["energy"].sum()), rel=tolerance)
        error = np.abs(-gradient.numpy() - reference["forces"]).max()
        assert error < tolerance * np.abs(reference["forces"]).max()
        net.edge_sign = -1
        mirrored = net(torch.tensor(atoms.numbers), index, vectors)
        net.edge_sign = 1
        assert mirrored.sum().item() == pytest.approx(float(reference["energy_inverted_structure"]), rel=tolerance)
