"""A widened network gives the same energies and forces, and its new channels learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.training.widening import widen


def _structure() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    positions = 6.0 * torch.rand(24, 3, dtype=torch.float64)
    numbers = torch.tensor([1, 8, 6]).repeat(8)
    vectors = positions[None] - positions[:, None]
    distance = vectors.norm(dim=2)
    centre, neighbour = ((distance < 4.0) & (distance > 0)).nonzero().T
    return numbers, torch.stack([centre, neighbour]), vectors[centre, neighbour]


def _network(irreps: str, **changes: object) -> NequIP:
    torch.manual_seed(1)
    config = {"sh_irreps": "1x0e+1x1o+1x2e", "layers": 3, "r_max": 4.0, "n_basis": 6, "n_neighbors": 4.0, "scale": 1.7}
    return NequIP([1, 6, 8], irreps, **{**config, **changes}).double()


@pytest.mark.parametrize(
    ("narrow", "wide", "changes"),
    [
        ("8x0e+6x1o+4x2e", "12x0e+7x1o+4x2e", {}),
        ("8x0e+8x1o", "9x0e+16x1o", {"use_sc": False, "radial_layers": 1}),
        ("8x0e+4x0o+4x1o+4x1e", "16x0e+5x0o+6x1o+7x1e", {"latent": True}),
    ],
)
def test_energies_and_charges_stay(narrow: str, wide: str, changes: dict[str, object]) -> None:
    network = _network(narrow, **changes)
    with torch.no_grad():
        network.scale.mul_(1.3)  # not what the configuration says: a training refits it
    numbers, edges, vectors = _structure()
    grown = widen(network, wide, n_basis=9)
    assert grown.config["hidden_irreps"] == wide
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in network.parameters())
    before, after = network(numbers, edges, vectors), grown(numbers, edges, vectors)
    assert float(before.detach().abs().max()) > 1e-3
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    if network.latent_readout is not None:
        torch.testing.assert_close(
            grown.with_charges(numbers, edges, vectors)[1], network.with_charges(numbers, edges, vectors)[1]
        )


def test_new_channels_learn() -> None:
    network = _network("8x0e+6x1o")
    grown = widen(network, "12x0e+9x1o")
    numbers, edges, vectors = _structure()
    grown(numbers, edges, vectors).square().sum().backward()
    gradient = grown.convolutions[1].after.weights["1o"].grad
    assert gradient is not None
    # rows of new channels within the first path that ends in 1o, which give nothing yet to the old outputs
    path = next(p for p in grown.convolutions[1].paths if str(p.out) == "1o")
    assert bool((gradient[8 : path.mul, :6].abs().sum(1) > 0).all())


@pytest.mark.parametrize(("irreps", "n_basis"), [("4x0e+6x1o", 6), ("8x0e+6x1o+2x2e", 6), ("8x0e+6x1o", 5)])
def test_only_wider(irreps: str, n_basis: int) -> None:
    with pytest.raises(InputError, match="to widen"):
        widen(_network("8x0e+6x1o"), irreps, n_basis=n_basis)
