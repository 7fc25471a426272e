"""A NequIP in TorchScript: the same weights and numbers, in operations that need no Python.

The trained network (:mod:`voltpi.potential.shortrange.nequip`) keeps its features in dictionaries and sums its messages
in compiled chunks with derivatives of their own, which TorchScript cannot read. Here features are lists in the order of
the irreps, and the sums over neighbours are plain matrix products over the same blocks of edges.
"""

# No `from __future__ import annotations` here: TorchScript reads the annotations of these classes.

from collections.abc import Sequence
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from voltpi.potential.committee import LastLayers, Seeds
from voltpi.potential.electrostatics.pqeq import COULOMB_CONSTANT
from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.messages import BLOCK, make_blocks
from voltpi.potential.shortrange.nequip import _EVEN_GAIN, _ODD_GAIN, _PSEUDOSCALAR, _SCALAR, _SWITCH_WIDTH, NequIP
from voltpi.potential.shortrange.pair import ZBL

__all__ = ["ScriptedMean", "ScriptedNequIP", "networks_of"]


class _Harmonics(nn.Module):
    """Real spherical harmonics of unit vectors, component normalisation: Y_l by coupling Y_{l−1} with Y_1."""

    def __init__(self, degrees: list[int]) -> None:
        super().__init__()
        self.degrees = degrees
        self.highest = max(degrees)
        sample = torch.nn.functional.normalize(torch.randn(8, 3, dtype=torch.float64), dim=1)
        first = o3.spherical_harmonics(1, sample, normalize=False, normalization="component")
        lower = torch.ones(8, 1, dtype=torch.float64)
        steps = []
        for degree in range(1, self.highest + 1):
            coupling = o3.wigner_3j(degree - 1, 1, degree, dtype=torch.float64).flatten(0, 1)
            wanted = o3.spherical_harmonics(degree, sample, normalize=False, normalization="component")
            found = (lower[:, :, None] * first[:, None, :]).flatten(1) @ coupling
            steps.append(_Weight(coupling * ((found * wanted).sum() / found.square().sum())))
            lower = wanted
        self.steps = nn.ModuleList(steps)
        # e3nn's Y_1 is √3 times a fixed order of x, y, z
        axes = o3.spherical_harmonics(1, torch.eye(3, dtype=torch.float64), normalize=False, normalization="component")
        self.register_buffer("axes", axes)

    def forward(self, unit: Tensor) -> Tensor:
        """[e, 3] -> [e, Σ (2l + 1)]."""
        first = unit @ self.axes
        lower = torch.ones_like(unit[:, :1])
        found = [lower]
        for step in self.steps:
            lower = step((lower.unsqueeze(2) * first.unsqueeze(1)).flatten(1))
            found.append(lower)
        return torch.cat([found[degree] for degree in self.degrees], dim=1)


class _Weight(nn.Module):
    """x @ w."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _OwnWeight(nn.Module):
    """x @ w[species] of atoms sorted by species."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().transpose(0, 1).clone())  # [species, in, out]

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        parts: list[Tensor] = []
        for s, part in enumerate(x.split(counts)):
            parts.append(part @ self.weight[s])
        return torch.cat(parts)


class _PathSum(nn.Module):
    """One coupling of one irrep of the sender."""

    def __init__(self, matrix: Tensor, harmonics: slice, columns: slice, rows: int, scalar: bool, out: int) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.detach().clone())
        self.first, self.last = harmonics.start, harmonics.stop
        self.start, self.stop = columns.start, columns.stop
        self.rows, self.scalar, self.out = rows, scalar, out
        self.block = BLOCK

    def forward(self, sent: Tensor, harmonics: Tensor, weights: Tensor) -> Tensor:
        """``sent`` [slots, 2l+1, mul] -> messages [blocks, 2l_out+1, mul]."""
        values = sent * weights[:, self.start : self.stop].unsqueeze(1)
        m, mul = sent.size(1), sent.size(2)
        if self.scalar:
            return values.view(-1, self.block, m, mul).sum(1)
        angular = (harmonics[:, self.first : self.last] @ self.matrix).view(-1, self.block * m, self.rows)
        return angular.transpose(1, 2) @ values.view(-1, self.block * m, mul)


class _Source(nn.Module):
    """All couplings of one irrep of the sender."""

    def __init__(self, index: int, before: Tensor, paths: list[_PathSum]) -> None:
        super().__init__()
        self.index = index
        self.before = _Weight(before)
        self.paths = nn.ModuleList(paths)

    def forward(
        self, x: Tensor, harmonics: Tensor, weights: Tensor, sender: Tensor, receiver: Tensor, sums: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Adds the summed messages of its paths to the lists of the irreps they end in."""
        h = self.before(x)
        sent = h.flatten(1).index_select(0, sender).view(-1, h.size(1), h.size(2))
        for path in self.paths:
            messages = path(sent, harmonics, weights)
            empty = torch.zeros([h.size(0), messages.size(1), messages.size(2)], dtype=h.dtype, device=h.device)
            sums[path.out].append(empty.index_add(0, receiver, messages))
        return sums


class _Out(nn.Module):
    """What becomes of the messages of one irrep: linear map, self-connection, gate."""

    def __init__(self, after: Tensor, own: Tensor | None, source: int, kind: int) -> None:
        super().__init__()
        self.after = _Weight(after)
        self.has_own = own is not None
        self.own = _OwnWeight(torch.zeros(1, 1, 1) if own is None else own)
        self.source = source  # place of the same irrep in the features that come in
        self.kind = kind  # 0: scalars and gates, 1: pseudoscalars, 2: gated


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, irreps_in: list[o3.Irrep]) -> None:
        super().__init__()
        self.irreps_out = [ir for _, ir in layer.irreps_out]
        self.factor = 1.0 / layer.n_neighbors
        self.radial = nn.ModuleList([_Weight(kernel) for kernel in layer.radial.kernels])
        sources, column = [], 0
        for (_, ir), coupling in zip(layer.sources, layer.couplings, strict=True):
            group = [p for p in layer.paths if p.source == ir]
            paths = []
            for p, matrix, harmonics, scalar in zip(
                group, coupling.matrices, coupling.harmonics, coupling.scalar, strict=True
            ):
                columns = slice(column, column + p.mul)
                paths.append(_PathSum(matrix, harmonics, columns, p.out.dim, scalar, self.irreps_out.index(p.out)))
                column += p.mul
            before = layer.before.weights[str(ir)]
            sources.append(_Source(irreps_in.index(ir), before * before.shape[0] ** -0.5, paths))
        self.sources = nn.ModuleList(sources)
        outs = []
        gates = 0
        for mul, ir in layer.irreps_out:
            after = layer.after.weights[str(ir)]
            own = None
            if layer.self_connection is not None and ir in irreps_in:
                own = layer.self_connection.weights[str(ir)]
                own = own * (own.shape[0] * own.shape[1]) ** -0.5
            kind = 0 if ir == _SCALAR else 1 if ir == _PSEUDOSCALAR else 2
            source = irreps_in.index(ir) if ir in irreps_in else -1
            outs.append(_Out(after * after.shape[0] ** -0.5, own, source, kind))
            gates += mul if ir.l > 0 else 0
        self.outs = nn.ModuleList(outs)
        self.scalars = self.irreps_out.index(_SCALAR)
        # scalars, and a gate for every irrep of higher degree
        self.widths = [layer.after.weights["0e"].shape[1] - gates, *(mul for mul, ir in layer.irreps_out if ir.l > 0)]
        self.even, self.odd = _EVEN_GAIN, _ODD_GAIN

    def forward(
        self, x: list[Tensor], harmonics: Tensor, basis: Tensor, sender: Tensor, receiver: Tensor, counts: list[int]
    ) -> list[Tensor]:
        weights = basis
        for k, kernel in enumerate(self.radial):
            weights = kernel(weights if k == 0 else nn.functional.silu(weights))
        sums: list[list[Tensor]] = []
        for _ in range(len(self.outs)):
            empty: list[Tensor] = []
            sums.append(empty)
        for source in self.sources:
            sums = source(x[source.index], harmonics, weights, sender, receiver, sums)
        mixed: list[Tensor] = []
        for k, out in enumerate(self.outs):
            h = out.after(torch.cat(sums[k], dim=2) * self.factor)
            if out.has_own:
                h = h + out.own(x[out.source], counts)
            mixed.append(h)
        parts = (nn.functional.silu(mixed[self.scalars]) * self.even).split(self.widths, dim=2)
        result: list[Tensor] = []
        gate = 1
        for k, out in enumerate(self.outs):
            if out.kind == 0:
                result.append(parts[0])
            elif out.kind == 1:
                result.append(torch.tanh(mixed[k]) * self.odd)
            else:
                result.append(mixed[k] * parts[gate])
                gate += 1
        return result


class _Repulsion(nn.Module):
    """Half of the screened nuclear repulsion of its pairs to each atom, in float64; nothing without one."""

    def __init__(self, term: ZBL | None) -> None:
        super().__init__()
        given = ZBL() if term is None else term
        reach = torch.zeros_like(given.reach) if term is None else given.reach
        self.register_buffer("reach", reach.to(torch.float64))
        self.amplitudes, self.exponents = list(given.amplitudes), list(given.exponents)
        self.screening, self.constant = given.screening, COULOMB_CONSTANT

    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        """[n], eV."""
        u = vectors.to(torch.float64).square().sum(1)
        reach = self.reach[numbers[index[0]], numbers[index[1]]]
        here = (u < reach * reach).nonzero().squeeze(1)
        u, reach = u[here], reach[here]
        zi, zj = numbers[index[0]][here].to(u.dtype), numbers[index[1]][here].to(u.dtype)
        r = u.sqrt()
        x = r * (zi**0.23 + zj**0.23) / self.screening
        screened = torch.zeros_like(r)
        for k, amplitude in enumerate(self.amplitudes):
            screened = screened + amplitude * torch.exp(-self.exponents[k] * x)
        t = u / (reach * reach)
        switch = (1.0 - t) ** 3 * (1.0 + 3.0 * t + 6.0 * t * t)
        pair = 0.5 * self.constant * zi * zj / r * screened * switch
        return torch.zeros([numbers.size(0)], dtype=u.dtype, device=u.device).index_add(0, index[0][here], pair)


class ScriptedNequIP(nn.Module):
    """Atomic energies of a trained NequIP; ``forward`` takes and gives what the network's does.

    It computes in the precision that ``network`` has when it is given.
    """

    def __init__(self, network: NequIP) -> None:
        super().__init__()
        dtype = network.embedding.dtype
        self.cutoff = network.cutoff
        self.edge_sign = float(network.edge_sign)
        self.register_buffer("lookup", network.lookup.clone())
        self.register_buffer("shift", network.shift.to(torch.float64))
        self.register_buffer("scale", network.scale.to(torch.float64))
        self.register_buffer("embedding", network.embedding.detach() * len(network.species) ** -0.5)
        self.n_species = len(network.species)
        self.harmonics = _Harmonics(network.sh_degrees)
        self.register_buffer("frequencies", network.basis.frequencies.detach().clone())
        self.prefactor = network.basis.prefactor
        self.outer, self.inner = self.cutoff**2, (self.cutoff - _SWITCH_WIDTH) ** 2
        layers, irreps = [], [_SCALAR]
        for convolution in network.convolutions:
            layer = _Layer(convolution, irreps)
            layers.append(layer)
            irreps = layer.irreps_out
        for layer in layers:
            del layer.irreps_out  # nothing that TorchScript could hold
        self.layers = nn.ModuleList(layers)
        self.scalars = irreps.index(_SCALAR)
        self.readout = nn.ModuleList([_Weight(w * w.shape[0] ** -0.5) for w in network.readout])
        self.repulsion = _Repulsion(network.repulsion)
        self.layers.to(dtype)
        self.harmonics.to(dtype)

    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [n] (eV, float64) of ``numbers`` [n], pairs [2, e] and r_j − r_i [e, 3] (Å)."""
        dtype = self.embedding.dtype
        species = self.lookup[numbers]
        counts: list[int] = torch.bincount(species, minlength=self.n_species).tolist()
        species, order = torch.sort(species, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(order.size(0), device=order.device)
        blocks = make_blocks(position[index], vectors.to(dtype), order.size(0), self.cutoff)
        r = torch.linalg.vector_norm(blocks.vectors, dim=1)
        harmonics = self.harmonics(blocks.vectors * (self.edge_sign / r).unsqueeze(1))
        s = (r * r).clamp(self.inner, self.outer)
        switch = (self.outer - s) ** 2 * (self.outer + 2.0 * s - 3.0 * self.inner)
        radial = self.prefactor * switch / ((self.outer - self.inner) ** 3 * r)
        basis = torch.sin((r / self.cutoff).unsqueeze(1) * self.frequencies) * radial.unsqueeze(1)
        x = [self.embedding[species].unsqueeze(1)]
        for layer in self.layers:
            x = layer(x, harmonics, basis, blocks.sender, blocks.receiver, counts)
        energy = x[self.scalars].squeeze(1)
        for weight in self.readout:
            energy = energy @ weight.weight
        result = energy.squeeze(1).to(torch.float64) * self.scale[species] + self.shift[species]
        return result[position] + self.repulsion(numbers, index, vectors)


class ScriptedMean(nn.Module):
    """Mean of several networks of one configuration; called as one."""

    def __init__(self, networks: Sequence[NequIP]) -> None:
        super().__init__()
        self.members = nn.ModuleList([ScriptedNequIP(network) for network in networks])

    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        """See ``ScriptedNequIP.forward``."""
        total = torch.zeros([numbers.size(0)], dtype=torch.float64, device=vectors.device)
        for member in self.members:
            total = total + member(numbers, index, vectors)
        return total / len(self.members)


def networks_of(short_range: Any) -> list[NequIP]:
    """Networks whose mean a short range is: one, or the members of a committee of seeds; none of no short range.

    The mean of last layers is the network that they share. Raises InputError for a short range of another kind.
    """
    if short_range is None:
        return []
    if isinstance(short_range, NequIP):
        return [short_range]
    if isinstance(short_range, LastLayers):
        return [short_range.network]
    if isinstance(short_range, Seeds):
        return [network for network in short_range.networks if isinstance(network, NequIP)]
    raise InputError(f"a {type(short_range).__name__} cannot be exported to metatomic: export a NequIP model")
