"""CHGNet on our neighbour lists: Deng et al., Nat. Mach. Intell. 5, 1031 (2023); package ``chgnet``.

The network's own layers run on a graph that is made here, from arrays instead of pymatgen structures, for a batch at
once and in float32 or float64: directed bonds are all pairs within 6 Å, undirected ones these pairs and their reverses
together, angles all ordered pairs of different bonds shorter than 3 Å at one atom. Its wheel carries the weights.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.foundation import EdgeModel, import_package

__all__ = ["CHGNet"]

_WEIGHTS = {"chgnet": "0.3.0", "chgnet-r2scan": "r2scan"}


class CHGNet(EdgeModel):
    """A published CHGNet with energies of single atoms (``mlp_first``)."""

    def __init__(self, name: str, network: Any, dtype: torch.dtype) -> None:
        elements = network.model_args.get("max_num_elements", 94)
        super().__init__(
            name, float(network.graph_converter.atom_graph_cutoff), dtype, frozenset(range(1, elements + 1))
        )
        self.angle_cutoff = float(network.graph_converter.bond_graph_cutoff)
        self.network = network.to(dtype).eval().requires_grad_(False)

    @classmethod
    def load(cls, name: str, dtype: torch.dtype) -> CHGNet:
        """The model with the weights of the wheel. Raises InputError where the package is missing."""
        package = import_package("chgnet.model.model", "chgnet", "chgnet", name)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
            network = package.CHGNet.load(model_name=_WEIGHTS[name], use_device="cpu", verbose=False)
        if not (network.mlp_first and network.is_intensive):
            raise InputError(f"{name}: this CHGNet has no energies of single atoms; use another version of chgnet")
        return cls(name, network, dtype)

    def atomic_energies(self, numbers: Tensor, index: Tensor, vectors: Tensor, shift: Tensor) -> Tensor:
        """Atomic energies [n] (eV); see EdgeModel."""
        net = self.network
        undirected, first = _undirected(index, shift, len(numbers))
        lengths = vectors.norm(dim=1)
        bases = net.bond_basis_expansion
        weights_of_atoms = net.bond_weights_ag(bases.rbf_expansion_ag(lengths[first]))
        bonds = net.bond_embedding(bases.rbf_expansion_ag(lengths[first]))
        weights_of_bonds = net.bond_weights_bg(bases.rbf_expansion_bg(lengths[first]))
        one, two = _angles(index[0], (lengths < self.angle_cutoff).nonzero()[:, 0])
        angle_graph = torch.stack([index[0][one], undirected[one], undirected[two]], dim=1)
        angles = None
        if len(one):
            directions = vectors / lengths[:, None]
            angles = net.angle_embedding(net.angle_basis_expansion(directions[one], directions[two]))
        atoms = net.atom_embedding(numbers - 1)
        graph = {"bond_weights": weights_of_atoms, "atom_graph": index.T, "directed2undirected": undirected}
        for atom_layer, bond_layer, angle_layer in zip(
            net.atom_conv_layers[:-1], net.bond_conv_layers, net.angle_layers, strict=False
        ):
            atoms = atom_layer(atom_feas=atoms, bond_feas=bonds, **graph)
            if angles is None or bond_layer is None:
                continue
            bonds = bond_layer(
                atom_feas=atoms,
                bond_feas=bonds,
                bond_weights=weights_of_bonds,
                angle_feas=angles,
                bond_graph=angle_graph,
            )
            if angle_layer is not None:
                angles = angle_layer(atom_feas=atoms, bond_feas=bonds, angle_feas=angles, bond_graph=angle_graph)
        atoms = net.atom_conv_layers[-1](atom_feas=atoms, bond_feas=bonds, **graph)
        if net.readout_norm is not None:
            atoms = net.readout_norm(atoms)
        energies = net.mlp(atoms)[:, 0]
        if net.composition_model is not None:  # a sum over elements
            energies = energies + net.composition_model.fc.weight[0][numbers - 1]
        return energies


def _undirected(index: Tensor, shift: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The undirected bond of every directed one [e], and one directed bond of each undirected one."""
    i, j = index
    # of a pair and its reverse, (j, i, −shift), the one that comes first in this order names the bond
    sign = torch.sign(shift)
    leading = sign[:, 0] * 9 + sign[:, 1] * 3 + sign[:, 2]
    reverse = (j < i) | ((j == i) & (leading < 0))
    low, high = torch.where(reverse, j, i), torch.where(reverse, i, j)
    image = torch.where(reverse[:, None], -shift, shift)
    span = int(image.abs().max()) + 1 if len(image) else 1
    width = 2 * span + 1
    key = (low * n + high) * width**3
    for axis, scale in enumerate((width * width, width, 1)):
        key = key + (image[:, axis] + span) * scale
    _, undirected = torch.unique(key, return_inverse=True)
    first = torch.zeros(int(undirected.max()) + 1 if len(key) else 0, dtype=torch.int64, device=key.device)
    first[undirected] = torch.arange(len(key), device=key.device)
    return undirected, first


def _angles(centre: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different short bonds at one atom, as directed bonds (two tensors [a])."""
    order = short[torch.argsort(centre[short], stable=True)]
    owner = centre[order]
    _, count = torch.unique_consecutive(owner, return_counts=True)
    own = torch.repeat_interleave(count, count)  # bonds at the atom of every bond
    start = torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
    one = torch.repeat_interleave(torch.arange(len(order), device=order.device), own)
    within = torch.arange(len(one), device=order.device) - torch.repeat_interleave(torch.cumsum(own, 0) - own, own)
    two = start[one] + within
    different = one != two
    return order[one[different]], order[two[different]]
