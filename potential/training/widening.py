"""A wider network that gives what a trained one gives, to be trained further (Chen, Goodfellow & Shlens, "Net2Net",
arXiv:1511.05641).

Channels are added to every irrep. What they give to channels that were there is zero, until training changes it; what
they receive is drawn at random, so that gradients reach them from the first step on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from e3nn import o3
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.nequip import NequIP

__all__ = ["widen"]


def widen(network: NequIP, hidden_irreps: str, n_basis: int | None = None) -> NequIP:
    """A NequIP with more channels of the same irreps (and more Bessel functions) and the energies of ``network``.

    New weights are drawn from torch's global generator. Equal but for rounding; latent charges are equal as well.

    Raises InputError where ``hidden_irreps`` are not those of ``network`` with larger or equal multiplicities in the
    same order, and where ``n_basis`` is smaller.
    """
    before, after = (o3.Irreps(x) for x in (network.config["hidden_irreps"], hidden_irreps))
    same = [ir for _, ir in before] == [ir for _, ir in after]
    if not same or any(a.mul > b.mul for a, b in zip(before, after, strict=True)):
        raise InputError(f"hidden_irreps is {hidden_irreps}: to widen {before}, give the same irreps with more of each")
    functions = len(network.basis.frequencies)
    n_basis = functions if n_basis is None else n_basis
    if n_basis < functions:
        raise InputError(f"n_basis is {n_basis}: to widen the network give at least its {functions}")
    changes: dict[str, Any] = {"hidden_irreps": hidden_irreps, "n_basis": n_basis}
    wide = NequIP(**{**network.config, **changes}).to(network.embedding)
    with torch.no_grad():
        wide.shift.copy_(network.shift)
        wide.scale.copy_(network.scale)
        wide.embedding[:, : network.embedding.shape[1]] = network.embedding
        wide.basis.frequencies[:functions] = network.basis.frequencies
        for old, new in zip(network.convolutions, wide.convolutions, strict=True):
            _widen_layer(old, new)
        _widen_dense(network.readout, wide.readout)
        if network.latent_readout is not None:
            assert wide.latent_readout is not None
            wide.latent_shift.copy_(network.latent_shift)
            _widen_dense(network.latent_readout, wide.latent_readout)
    return wide


def _widen_layer(old: Any, new: Any) -> None:
    """Weights of a convolution into the places that its channels have in a wider one."""
    first, *others = new.radial.kernels[:-1]
    first.zero_()
    first[: len(old.radial.kernels[0])] = old.radial.kernels[0]
    for kernel, wider in zip(list(old.radial.kernels)[1:-1], others, strict=True):
        wider.copy_(kernel)
    places = _places([p.mul for p in old.paths], [p.mul for p in new.paths])
    new.radial.kernels[-1][:, places] = old.radial.kernels[-1]
    for ir, weights in old.before.weights.items():
        _put(weights, new.before.weights[ir], *map(torch.arange, weights.shape))
    for ir, weights in old.after.weights.items():
        summed = ([p.mul for p in layer.paths if str(p.out) == ir] for layer in (old, new))
        out = _outputs(old.irreps_out, new.irreps_out, o3.Irrep(ir))
        _put(weights, new.after.weights[ir], _places(*summed), out)
        if old.self_connection is not None and ir in old.self_connection.weights:
            own = old.self_connection.weights[ir]
            _put(own, new.self_connection.weights[ir], torch.arange(own.shape[0]), out)


def _widen_dense(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for weights, wider in zip(old, new, strict=True):
        _put(weights, wider, *map(torch.arange, weights.shape))


def _places(old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Where the channels of blocks of ``old`` sizes lie among those of blocks of ``new`` sizes."""
    starts = itertools.accumulate(new[:-1], initial=0)
    return torch.cat([start + torch.arange(size) for start, size in zip(starts, old, strict=True)])


def _outputs(old: o3.Irreps, new: o3.Irreps, ir: o3.Irrep) -> Tensor:
    """Places of the outputs of one irrep: its features, and behind the scalars the gates of the other irreps."""
    blocks = [[mul for mul, other in irreps if other == ir] for irreps in (old, new)]
    if ir == o3.Irrep("0e"):
        for sizes, irreps in zip(blocks, (old, new), strict=True):
            sizes += [mul for mul, other in irreps if other.l > 0]
    return _places(*blocks)


def _put(old: Tensor, new: Tensor, rows: Tensor, columns: Tensor) -> None:
    """``old`` into ``new`` [inputs, ..., outputs], which is divided by the root of its number of inputs.

    Other inputs give nothing to these outputs.
    """
    kept = torch.zeros_like(new.index_select(-1, columns))
    kept[rows] = old * (new.shape[0] / old.shape[0]) ** 0.5
    new.index_copy_(new.dim() - 1, columns, kept)
