"""NequIP: an E(3)-equivariant message-passing network for atomic energies.

Batzner et al., Nat. Commun. 13, 2453 (2022), in the form of jax-md and ReaxNet, number for number: Bessel radial basis
with a smooth switch over the last 0.5 Å, radial networks without bias, linear maps normalised by the multiplicity of
their input, self-connections by species, gates. Irreps, Clebsch–Gordan coefficients and spherical harmonics are e3nn's.

The convolution is our own (``messages.py``). Against ``e3nn.o3.TensorProduct`` ('uvu', gather and index_add included;
192 water atoms, 40 neighbours each, float32, one CPU thread) it is faster by these factors:
32x0e+32x1o: 3.2 forward, 2.6 with forces, 2.5 with a force loss; 32x0e+32x1o+32x2e: 5.9, 3.8, 4.4.

Weights of the published form go into this one as they are, with three remarks. Weights that end in the same irrep lie
side by side (``after.weights.0e`` is w[0,0], w[0,1], … along the last axis: scalars, then gates). What cannot reach the
energy is left out: the last layer has scalars only, and of the last radial kernel a layer has the columns
``convolutions[k].columns``. The order of ``species`` is that of the rows, with 0 for a row that no element uses:

    Linear_0                          embedding             NequIPConvolution_k/Linear_0   convolutions.k.before.weights
    Linear_1, Linear_2                readout.0, readout.1  NequIPConvolution_k/Linear_1   convolutions.k.after.weights
    BesselEmbedding_0/frequencies     basis.frequencies     NequIPConvolution_k/MLP_0      convolutions.k.radial.kernels
    NequIPConvolution_k/FullyConnectedTensorProductE3nn_0   convolutions.k.self_connection.weights
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from e3nn import o3
from torch import Tensor, nn

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.messages import Blocks, Coupling, make_blocks, sum_blocks
from voltpi.potential.shortrange.pair import nuclear_repulsion

__all__ = ["NequIP"]

# Factors that give swish and tanh a unit second moment under a normal distribution, as e3nn-jax computes them.
_EVEN_GAIN = 1.6765620560798837
_ODD_GAIN = 1.5925386426301726
_SWITCH_WIDTH = 0.5  # Å
_LATENT_INIT = 0.02  # e, about the size of what the surroundings add to latent charges before training
_RADIAL_INIT_VARIANCE = 4.0
_SCALAR, _PSEUDOSCALAR = o3.Irrep("0e"), o3.Irrep("0o")


class _Path(NamedTuple):
    """One coupling: features of irrep ``source`` ⊗ chunk ``sh`` of the harmonics -> irrep ``out``."""

    source: o3.Irrep
    sh: int
    out: o3.Irrep
    mul: int


def _paths(irreps_in: o3.Irreps, irreps_sh: o3.Irreps, targets: Sequence[o3.Irrep]) -> list[_Path]:
    """All couplings in the order (features, harmonics, output) that the published weights follow."""
    return [
        _Path(ir_in, j, ir, mul)
        for mul, ir_in in irreps_in
        for j, (_, ir_sh) in enumerate(irreps_sh)
        for ir in ir_in * ir_sh
        if ir in targets
    ]


def _needed(hidden: o3.Irreps, harmonics: o3.Irreps, layers: int, use_sc: bool) -> list[set[o3.Irrep]]:
    """Irreps that each layer has to give out; the energy is read from the scalars of the last."""
    needed = [{_SCALAR}]
    for _ in range(layers - 1):
        later = needed[0]
        feeds = {p.source for p in _paths(hidden, harmonics, list(later))}
        needed.insert(0, feeds | (later if use_sc else set()))
    return needed


class _Bessel(nn.Module):
    """b_k(r) = (2/r_c) sin(f_k r/r_c)/r × switch(r), with trained frequencies f_k (initially kπ)."""

    def __init__(self, n_basis: int, r_max: float) -> None:
        super().__init__()
        self.r_max = r_max
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, n_basis + 1, dtype=torch.get_default_dtype()))
        # The published code holds this prefactor in single precision whatever the precision of the rest.
        self.prefactor = float(np.float32(2.0 / r_max))

    def forward(self, r: Tensor) -> Tensor:
        """[e] Å -> [e, n_basis]; zero with zero slope from the cutoff on."""
        outer, inner = self.r_max**2, (self.r_max - _SWITCH_WIDTH) ** 2
        # The polynomial is 1 with zero slope at the inner and 0 with zero slope at the outer radius.
        x = (r * r).clamp(inner, outer)
        switch = (outer - x) ** 2 * (outer + 2.0 * x - 3.0 * inner) * (1.0 / (outer - inner) ** 3)
        radial = self.prefactor * switch / r
        return torch.sin((r / self.r_max)[:, None] * self.frequencies) * radial[:, None]


class _RadialNetwork(nn.Module):
    """Dense layers without bias, swish between them; ``kernels`` have shape [in, out]."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        last = len(widths) - 2
        self.kernels = nn.ParameterList(
            torch.randn(a, b) * math.sqrt((1.0 if k == last else _RADIAL_INIT_VARIANCE) / a)
            for k, (a, b) in enumerate(itertools.pairwise(widths))
        )

    def forward(self, basis: Tensor) -> Tensor:
        """[e, n_basis] -> [e, widths[-1]]."""
        *hidden, last = self.kernels
        h = basis
        for kernel in hidden:
            h = nn.functional.silu(h @ kernel)
        return h @ last


class _Linear(nn.Module):
    """Σ_u w[u, v] x_u / √(multiplicity of the input), per irrep; features are {irrep: [n, 2l+1, mul]}."""

    def __init__(self, mul_in: dict[o3.Irrep, int], mul_out: dict[o3.Irrep, int]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {str(ir): torch.randn(mul_in[ir], mul) for ir, mul in mul_out.items() if ir in mul_in}
        )

    def forward(self, x: dict[o3.Irrep, Tensor]) -> dict[o3.Irrep, Tensor]:
        out = {}
        for ir, features in x.items():
            if str(ir) in self.weights:
                w = self.weights[str(ir)]
                out[ir] = features @ (w * w.shape[0] ** -0.5)
        return out


class _SelfConnection(nn.Module):
    """Σ_u w[u, species, v] x_u / √(multiplicity × number of species), per irrep."""

    def __init__(self, mul_in: dict[o3.Irrep, int], mul_out: dict[o3.Irrep, int], n_species: int) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {str(ir): torch.randn(mul_in[ir], n_species, mul) for ir, mul in mul_out.items() if ir in mul_in}
        )

    def forward(self, x: dict[o3.Irrep, Tensor], counts: Sequence[int]) -> dict[o3.Irrep, Tensor]:
        """``counts``: atoms of each species; atoms are sorted by species."""
        out = {}
        for ir, features in x.items():
            if str(ir) in self.weights:
                w = self.weights[str(ir)]
                w = w * (w.shape[0] * w.shape[1]) ** -0.5
                parts = features.split(list(counts))
                out[ir] = torch.cat([part @ w[:, s] for s, part in enumerate(parts) if counts[s]])
        return out


class _Convolution(nn.Module):
    """Messages x_j ⊗ Y(r_ij) weighted by the radial network, summed over neighbours, mixed, and gated.

    Parameters: ``radial.kernels``, ``before`` and ``after`` (linear maps), ``self_connection``.
    """

    def __init__(
        self,
        irreps_in: o3.Irreps,
        irreps_sh: o3.Irreps,
        irreps_hidden: o3.Irreps,
        *,
        needed: set[o3.Irrep],
        n_species: int,
        widths: Sequence[int],
        n_neighbors: float,
        use_sc: bool,
    ) -> None:
        super().__init__()
        self.n_neighbors = n_neighbors
        # The published form has radial weights for every coupling among the hidden irreps, in each layer.
        all_paths = _paths(irreps_hidden, irreps_sh, [ir for _, ir in irreps_hidden])
        inputs = {ir for _, ir in irreps_in}
        used = [p.source in inputs and p.out in needed for p in all_paths]
        self.paths = [p for p, is_used in zip(all_paths, used, strict=True) if is_used]
        columns = torch.arange(sum(p.mul for p in all_paths)).split([p.mul for p in all_paths])
        # Which of those columns this layer has: what cannot reach the energy is left out.
        self.columns: list[int] = torch.cat([c for c, is_used in zip(columns, used, strict=True) if is_used]).tolist()
        self.sources = [(mul, ir) for mul, ir in irreps_in if any(p.source == ir for p in self.paths)]
        reached = {p.out for p in self.paths}
        self.irreps_out = o3.Irreps([(mul, ir) for mul, ir in irreps_hidden if ir in reached])
        n_gates = sum(mul for mul, ir in self.irreps_out if ir.l > 0)
        mul_in = {ir: mul for mul, ir in irreps_in}
        mul_out = {ir: mul + (n_gates if ir == _SCALAR else 0) for mul, ir in self.irreps_out}
        mul_summed: dict[o3.Irrep, int] = {}
        for p in self.paths:
            mul_summed[p.out] = mul_summed.get(p.out, 0) + p.mul
        self.radial = _RadialNetwork([*widths, len(self.columns)])
        self.before = _Linear(mul_in, {ir: mul for mul, ir in self.sources})
        self.after = _Linear(mul_summed, mul_out)
        self.self_connection = _SelfConnection(mul_in, mul_out, n_species) if use_sc else None
        self.couplings = self._couplings(irreps_sh)
        self._cast: dict[tuple[torch.dtype, torch.device], list[Coupling]] = {}

    def _couplings(self, irreps_sh: o3.Irreps) -> list[Coupling]:
        """The paths of each input irrep, in float64."""
        sh_slices = irreps_sh.slices()
        couplings = []
        for _, ir_in in self.sources:
            coupling, row = Coupling([], [], [], []), 0
            for p in self.paths:
                if p.source != ir_in:
                    continue
                cg = o3.wigner_3j(ir_in.l, irreps_sh[p.sh].ir.l, p.out.l, dtype=torch.float64)
                coupling.matrices.append(math.sqrt(p.out.dim) * cg.transpose(0, 1).flatten(1))
                coupling.harmonics.append(sh_slices[p.sh])
                coupling.scalar.append(irreps_sh[p.sh].ir == _SCALAR)
                coupling.rows.append(slice(row, row + p.out.dim))
                row += p.out.dim
            couplings.append(coupling)
        return couplings

    def _couplings_like(self, like: Tensor) -> list[Coupling]:
        # Cast on demand from float64, so that .double() after .float() loses nothing.
        key = (like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = [c._replace(matrices=[m.to(like) for m in c.matrices]) for c in self.couplings]
        return self._cast[key]

    def _sum_messages(
        self, x: dict[o3.Irrep, Tensor], harmonics: Tensor, basis: Tensor, blocks: Blocks
    ) -> dict[o3.Irrep, Tensor]:
        """Messages of all neighbours / n_neighbors: {irrep: [n, 2l+1, Σ mul over the paths that end in it]}."""
        n_atoms = next(iter(x.values())).shape[0]
        paths = [[p for p in self.paths if p.source == ir] for _, ir in self.sources]
        weights = self.radial(basis).split([sum(p.mul for p in group) for group in paths], dim=1)
        summed: dict[o3.Irrep, list[Tensor]] = {}
        for (_, ir), group, w, coupling in zip(self.sources, paths, weights, self._couplings_like(basis), strict=True):
            messages = sum_blocks(x[ir], harmonics, w, blocks.sender, coupling)
            total = messages.new_zeros(n_atoms, *messages.shape[1:]).index_add(0, blocks.receiver, messages)
            for p, part in zip(group, total.split([p.out.dim for p in group], dim=1), strict=True):
                summed.setdefault(p.out, []).append(part)
        return {ir: torch.cat(parts, dim=2) * (1.0 / self.n_neighbors) for ir, parts in summed.items()}

    def forward(
        self,
        x: dict[o3.Irrep, Tensor],
        harmonics: Tensor,
        basis: Tensor,
        blocks: Blocks,
        counts: Sequence[int],
    ) -> dict[o3.Irrep, Tensor]:
        """Features {irrep: [n, 2l+1, mul]} -> features of the next layer."""
        h = self.after(self._sum_messages(self.before(x), harmonics, basis, blocks))
        if self.self_connection is not None:
            own = self.self_connection(x, counts)
            h = {ir: features + own[ir] if ir in own else features for ir, features in h.items()}
        return self._gate(h)

    def _gate(self, h: dict[o3.Irrep, Tensor]) -> dict[o3.Irrep, Tensor]:
        gated = [(mul, ir) for mul, ir in self.irreps_out if ir.l > 0]
        n_scalars = h[_SCALAR].shape[2] - sum(mul for mul, _ in gated)
        scalars, *gates = (nn.functional.silu(h[_SCALAR]) * _EVEN_GAIN).split(
            [n_scalars] + [m for m, _ in gated], dim=2
        )
        out = {_SCALAR: scalars}
        if _PSEUDOSCALAR in h:
            out[_PSEUDOSCALAR] = torch.tanh(h[_PSEUDOSCALAR]) * _ODD_GAIN
        for (_, ir), gate in zip(gated, gates, strict=True):
            out[ir] = h[ir] * gate
        return out


class NequIP(nn.Module):
    """Atomic energies from species and neighbour vectors.

    Parameters
    ----------
    species : atomic numbers the network knows. Their order is that of the weights; 0 may stand for an unused slot.
    hidden_irreps : features of an atom; full O(3) (``32x0e+32x1o``) or all even (SO(3) only: ``16x0e+16x1e``).
    sh_irreps : spherical harmonics of the edges, multiplicity 1 each.
    layers : number of convolutions.
    r_max : cutoff, Å.
    n_basis, radial_layers, radial_hidden : Bessel functions, hidden layers and width of the radial networks.
    n_neighbors : summed messages are divided by it.
    shift, scale : eV, one value or one per species: E_i = scale·network + shift.
    use_sc : self-connections by species.
    edge_sign : +1 (vectors from receiver to neighbour) or −1. With all-even irreps −1 gives the energy of the
        inverted structure.
    latent : whether it gives latent charges too, by a second readout (one hidden layer, swish) of the last scalars, and
        a charge by species, which trainings start from electronegativities (``training.latent.begin_charges``).
    repulsion : screened nuclear repulsion (:class:`~voltpi.potential.shortrange.pair.ZBL`) that the network does not
        have to learn: ``covalent`` for all pairs inside the sum of their covalent radii, or where it ends (Å) by pair
        (``{"H-H": 1.2}``). In FIREANN's water, whose hydrogens come as near as 0.38 Å, the latter takes the RMS of the
        forces that are left after charges and dispersion from 2.1 to 0.95 eV/Å.

    Raises InputError where these cannot be right. Parameters are drawn from torch's global generator.
    """

    def __init__(
        self,
        species: Sequence[int],
        hidden_irreps: str = "32x0e+32x1o",
        sh_irreps: str = "1x0e+1x1o",
        layers: int = 3,
        r_max: float = 5.0,
        n_basis: int = 8,
        radial_layers: int = 2,
        radial_hidden: int = 64,
        n_neighbors: float = 30.0,
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        use_sc: bool = True,
        edge_sign: int = 1,
        latent: bool = False,
        repulsion: str | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.species = [int(z) for z in species]
        self.cutoff = float(r_max)
        hidden, harmonics = _checked_irreps(hidden_irreps, sh_irreps)
        if edge_sign not in (1, -1):
            raise InputError(f"edge_sign is {edge_sign}: give 1 or -1")
        known = range(len(chemical_symbols))
        if len(set(self.species)) != len(self.species) or not self.species or any(z not in known for z in self.species):
            raise InputError(f"species {self.species} must name each element once, by atomic number")
        if layers < 1 or self.cutoff <= _SWITCH_WIDTH:
            raise InputError(f"layers={layers}, r_max={r_max}: at least one layer and a cutoff above {_SWITCH_WIDTH} Å")
        self.edge_sign = edge_sign
        n_species = len(self.species)
        lookup = torch.full((len(chemical_symbols),), -1, dtype=torch.int64)
        lookup[torch.tensor(self.species)] = torch.arange(n_species)
        self.register_buffer("lookup", lookup, persistent=False)
        self.register_buffer("shift", _per_species("shift", shift, n_species))
        self.register_buffer("scale", _per_species("scale", scale, n_species))
        self.config: dict[str, Any] = {
            "species": self.species,
            "hidden_irreps": str(hidden_irreps),
            "sh_irreps": str(sh_irreps),
            "layers": layers,
            "r_max": self.cutoff,
            "n_basis": n_basis,
            "radial_layers": radial_layers,
            "radial_hidden": radial_hidden,
            "n_neighbors": float(n_neighbors),
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "use_sc": use_sc,
            "edge_sign": edge_sign,
            "latent": latent,
            "repulsion": repulsion if repulsion is None or isinstance(repulsion, str) else dict(repulsion),
        }
        self.repulsion = nuclear_repulsion(repulsion, self.cutoff)
        scalars = hidden.count("0e")
        self.sh_degrees = [ir.l for _, ir in harmonics]
        self.embedding = nn.Parameter(torch.randn(n_species, scalars))
        self.basis = _Bessel(n_basis, self.cutoff)
        widths = [n_basis] + [radial_hidden] * radial_layers
        self.convolutions = nn.ModuleList()
        irreps = o3.Irreps([(scalars, "0e")])
        for needed in _needed(hidden, harmonics, layers, use_sc):
            layer = _Convolution(
                irreps,
                harmonics,
                hidden,
                needed=needed,
                n_species=n_species,
                widths=widths,
                n_neighbors=float(n_neighbors),
                use_sc=use_sc,
            )
            self.convolutions.append(layer)
            irreps = layer.irreps_out
        self.readout = nn.ParameterList([torch.randn(scalars, scalars // 2), torch.randn(scalars // 2, 1)])
        self.latent_readout: nn.ParameterList | None = None
        if latent:
            self.latent_shift = nn.Parameter(torch.zeros(n_species))
            last = _LATENT_INIT * torch.randn(scalars // 2, 1)
            self.latent_readout = nn.ParameterList([torch.randn(scalars, scalars // 2), last])

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [n] in eV, in the precision of ``vectors``; differentiable any number of times.

        ``numbers`` [n] atomic numbers; ``edge_index`` [2, e] (receiver i, neighbour j), each pair in both directions;
        ``vectors`` [e, 3] = r_j + shift − r_i in Å (edges beyond the cutoff contribute nothing and cost little).
        Raises InputError for an element that the network does not know.
        """
        energies = self.energies(numbers, self.scalars(numbers, edge_index, vectors)).to(vectors.dtype)
        return self.with_repulsion(energies, numbers, edge_index, vectors)

    def with_charges(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic energies [n] (eV) as ``forward`` gives them, and latent charges [n] (e), which add up to nothing yet.

        Raises InputError for a network without latent charges, and as ``forward``.
        """
        if self.latent_readout is None:
            raise InputError("the network has no latent charges: train one with charges.model: latent")
        scalars = self.scalars(numbers, edge_index, vectors)
        hidden, last = self.latent_readout
        h = nn.functional.silu(scalars @ (hidden * hidden.shape[0] ** -0.5)) * _EVEN_GAIN
        charges = (h @ (last * last.shape[0] ** -0.5)).squeeze(1) + self.latent_shift[self.lookup[numbers]]
        energies = self.energies(numbers, scalars).to(vectors.dtype)
        return self.with_repulsion(energies, numbers, edge_index, vectors), charges.to(vectors.dtype)

    def with_repulsion(self, energies: Tensor, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [n] (eV) with the screened nuclear repulsion added, where there is one."""
        if self.repulsion is None:
            return energies
        return energies + self.repulsion.atomic(numbers, edge_index, vectors)

    def energies(self, numbers: Tensor, scalars: Tensor) -> Tensor:
        """Atomic energies [n] (eV) from the scalars of the last layer, without repulsion."""
        energy = scalars
        for w in self.readout:
            energy = energy @ (w * w.shape[0] ** -0.5)
        species = self.lookup[numbers]
        return energy.squeeze(1) * self.scale[species] + self.shift[species]

    def scalars(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Scalars of the last layer [n, multiplicity], from which everything is read; arguments as of ``forward``."""
        dtype = self.embedding.dtype
        species = self.lookup[numbers]
        counts = torch.bincount(species + 1, minlength=len(self.species) + 1).tolist()
        if counts[0]:
            raise InputError(self._unknown(int(numbers[species < 0][0])))
        # Inside, atoms are sorted by species: each species is one slice.
        species, order = torch.sort(species, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        blocks = make_blocks(position[edge_index], vectors.to(dtype), len(order), self.cutoff)
        r = torch.linalg.vector_norm(blocks.vectors, dim=1)
        unit = blocks.vectors * (self.edge_sign / r)[:, None]
        harmonics = o3.spherical_harmonics(self.sh_degrees, unit, normalize=False, normalization="component")
        basis = self.basis(r)
        x = {_SCALAR: (self.embedding * len(self.species) ** -0.5)[species].unsqueeze(1)}
        for layer in self.convolutions:
            x = layer(x, harmonics, basis, blocks, counts[1:])
        return x[_SCALAR].squeeze(1)[position]

    def _unknown(self, number: int) -> str:
        symbol = chemical_symbols[number] if 0 < number < len(chemical_symbols) else f"atomic number {number}"
        known = ", ".join(chemical_symbols[z] for z in self.species if z)
        return (
            f"the short-range network does not know {symbol} (for an electrode of it, give short_range.pair beside "
            f"the model): it was trained for {known}"
        )


def _checked_irreps(hidden_irreps: str, sh_irreps: str) -> tuple[o3.Irreps, o3.Irreps]:
    """Hidden irreps sorted by degree, each once, and harmonics of multiplicity 1; InputError otherwise."""
    try:
        hidden, harmonics = o3.Irreps(hidden_irreps), o3.Irreps(sh_irreps)
    except (ValueError, AssertionError) as error:
        raise InputError(f"irreps '{hidden_irreps}' or '{sh_irreps}' cannot be read: write e.g. 32x0e+32x1o") from error
    hidden = hidden.sort().irreps.simplify()
    if hidden.count("0e") < 2:
        raise InputError(f"hidden_irreps '{hidden_irreps}' need at least 2x0e, from which the energy is read")
    if any(mul != 1 for mul, _ in harmonics) or len({ir for _, ir in harmonics}) != len(harmonics):
        raise InputError(f"sh_irreps '{sh_irreps}' must name each irrep once with multiplicity 1")
    if _SCALAR not in harmonics:
        raise InputError(f"sh_irreps '{sh_irreps}' must contain 0e, which carries scalars from atom to atom")
    return hidden, harmonics


def _per_species(name: str, value: float | Sequence[float], n_species: int) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if values.ndim > 0 and values.shape != (n_species,):
        raise InputError(f"{name} has shape {tuple(values.shape)}: give one value or {n_species}, one per species")
    return values.expand(n_species).clone()
