"""The Coulomb sum of one structure as matrices, through which latent charges are trained.

A training sees every structure a thousand times with other charges at the same positions, so the sum is done once:
with A [n, n] (V/e) the energy is ½ qᵀAq − ε·M, the force at fixed charges −q_i (∂A_ij/∂r_i) q_j + √ε∞ q_i ε, and a
product of matrices has exact gradients of any order. A, its derivatives and the shift of the charges are those of the
operator and the model that run (:mod:`voltpi.potential.electrostatics.latent`), column by column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from ase.data import atomic_numbers
from rich.progress import track
from torch import Tensor

from voltpi.potential.electrostatics.ewald import CoulombOperator
from voltpi.potential.electrostatics.latent import LatentCharges, even_shift
from voltpi.potential.electrostatics.pqeq import read_parameters
from voltpi.potential.errors import VoltPIError
from voltpi.potential.fragments import assign_fragments, whole_positions
from voltpi.potential.shortrange.nequip import NequIP
from voltpi.potential.systems import Systems

if TYPE_CHECKING:
    from voltpi.potential.training.dataset import Sample

__all__ = [
    "Interaction",
    "LongRangePart",
    "begin_charges",
    "interaction",
    "long_range_of",
    "set_sign",
    "with_interactions",
]

_STRAIN = 1e-4
_CHARGE_PER_VOLT = 0.06  # e/V
_MOST = 200  # samples of which the sign of the charges is judged


class Interaction(NamedTuple):
    """What charges of one structure of n atoms do to each other.

    potential [n, n] V/e · gradient [n, n, 3] of potential[i, j] with r_i, V/(e Å) · strain [n, n, 3, 3] its derivative
    with a symmetric strain, V/e, or None without a stress label · lever [n, 3] ∂M/∂q, Å · scale √ε∞ · field [3] V/Å ·
    group [n] and totals [groups] (e) of what the charges add up to · hardness [n] eV/e² where charges relax, else None
    · exchanged: an empty tensor where charges are exchanged between neighbours (no shift), else None
    """

    potential: Tensor
    gradient: Tensor
    strain: Tensor | None
    lever: Tensor
    scale: Tensor
    field: Tensor
    group: Tensor
    totals: Tensor
    hardness: Tensor | None = None
    exchanged: Tensor | None = None

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Interaction:
        """The same in another precision, elsewhere."""
        moved = [None if t is None else t.to(device) if t.dtype == torch.int64 else t.to(device, dtype) for t in self]
        return Interaction(*moved)  # type: ignore[arg-type]


def interaction(model: LatentCharges, systems: Systems, *, stress: bool = False) -> Interaction:
    """The interaction of one structure (a batch of one), float64; ``stress``: with its derivative with strain.

    Raises InputError for a field that the model does not couple to in this cell, and fragments that do not add up.
    """
    if model.conserve == "fragments" and systems.fragments is None:
        systems = assign_fragments(systems)
    model.check_field(systems)
    operator = _operator(model, systems)
    potential = operator.charge_matrix()
    strain = None
    if stress:
        strain = torch.zeros(*potential.shape, 3, 3, dtype=torch.float64)
        for a in range(3):
            for b in range(a + 1):
                ends = []
                for sign in (1, -1):
                    by = torch.eye(3, dtype=torch.float64)
                    by[a, b] += 0.5 * sign * _STRAIN
                    by[b, a] += 0.5 * sign * _STRAIN
                    strained = systems.replace(positions=systems.positions @ by, cell=systems.cell @ by)
                    ends.append(_operator(model, strained).charge_matrix())
                strain[:, :, a, b] = strain[:, :, b, a] = (ends[0] - ends[1]) / (2 * _STRAIN)
    group, totals = model.groups(systems)
    scale = torch.tensor(model.screening, dtype=torch.float64)
    return Interaction(
        potential=potential,
        gradient=_gradient(operator),
        strain=strain,
        lever=model.screening * whole_positions(systems),
        scale=scale,
        field=systems.field[0],
        group=group,
        totals=totals,
        hardness=model.hardness(systems),
        exchanged=torch.zeros(0, dtype=torch.float64) if model.exchanges else None,
    )


def with_interactions(samples: Sequence[Sample], model: LatentCharges, *, progress: bool = True) -> list[Sample]:
    """Samples with their interaction. Raises as :func:`interaction`, with file and frame named."""
    out = []
    for sample in track(samples, description="interaction of latent charges", disable=not progress):
        systems = sample.molecules if model.conserve == "fragments" else sample.systems
        try:
            own = interaction(model, systems, stress=sample.stress is not None)
        except VoltPIError as error:
            raise type(error)(f"{sample.path}, frame {sample.frame}: {error}") from error
        out.append(dataclasses.replace(sample, latent=own))
    return out


def _operator(model: LatentCharges, systems: Systems) -> CoulombOperator:
    table = model.tensors(systems.replace(carried=torch.zeros_like(systems.positions[:, 0])))
    return CoulombOperator(
        systems, table["alpha"], -table["Z"], accuracy=model.accuracy, k_e=model.coulomb_constant, cache=model.kernels
    )


def _gradient(operator: CoulombOperator) -> Tensor:
    """[n, n, 3] of the charge matrix with the position of its row, column by column."""
    n = operator.n_atoms
    gradient = torch.zeros(n, n, 3, dtype=torch.float64)
    one, shells = torch.zeros(n, dtype=torch.float64), torch.zeros(n, 3, dtype=torch.float64)
    for j in range(n):
        one[j] = 1.0
        gradient[:, j] = operator.at(one, shells).core_gradient
        one[j] = 0.0
    return gradient


class LongRangePart(NamedTuple):
    """energy [b] (eV) · forces [n, 3] (eV/Å) and strain ∂E/∂strain [b, 3, 3] (eV) at fixed charges · excess [b] (e²):
    what had to be shifted, Σ over groups of (sum − total)².

    The energy carries the graph through which the charges' own change adds the rest.
    """

    energy: Tensor
    forces: Tensor
    strain: Tensor
    excess: Tensor


def long_range_of(latent: Tensor, interactions: tuple[Interaction, ...]) -> LongRangePart:
    """What a network's latent charges [n] do in a batch of structures."""
    energies, forces, strains, excess = [], [], [], []
    first = 0
    for part in interactions:
        n = len(part.group)
        q = latent[first : first + n]
        first += n
        shift = even_shift(q if part.exchanged is None else torch.zeros_like(q), part.group, part.totals)
        missing = torch.zeros_like(part.totals).index_add(0, part.group, shift)
        excess.append(missing.square().sum() if part.exchanged is None else latent.new_zeros(()))
        q = q + shift
        bare, q = q, q if part.hardness is None else _relaxed(q, part)
        # of exchanged charges the network gives the moment, but for that of the net charge
        seen = q if part.exchanged is None else shift
        energy = 0.5 * q @ (part.potential @ q) - (part.lever * part.field).sum(1) @ seen
        if part.hardness is not None:
            energy = energy + 0.5 * (part.hardness * (q - bare).square()).sum()
        energies.append(energy)
        push = torch.einsum("ijc,j->ic", part.gradient, q)
        forces.append(seen[:, None] * (part.scale * part.field) - q[:, None] * push)
        if part.strain is None:
            strains.append(latent.new_zeros(3, 3))
        else:
            moment = (seen[:, None] * part.lever).sum(0)
            turned = part.field[:, None] * moment
            strains.append(0.5 * torch.einsum("i,ijab,j->ab", q, part.strain, q) - 0.5 * (turned + turned.T))
    return LongRangePart(torch.stack(energies), torch.cat(forces), torch.stack(strains), torch.stack(excess))


def _relaxed(bare: Tensor, part: Interaction) -> Tensor:
    """Charges that minimise ½ Σ η (q − q⁰)² + ½ qᵀAq − ε·M with the sums of q⁰ in every group."""
    assert part.hardness is not None
    n, groups = len(bare), len(part.totals)
    matrix = bare.new_zeros(n + groups, n + groups)
    matrix[:n, :n] = part.potential + torch.diag(part.hardness)
    atoms = torch.arange(n, device=bare.device)
    matrix[n + part.group, atoms] = matrix[atoms, n + part.group] = 1.0
    right = torch.cat([part.hardness * bare + (part.lever * part.field).sum(1), part.totals])
    return torch.linalg.solve(matrix, right)[:n]


def begin_charges(network: NequIP) -> None:
    """Lets a network's latent charges start from electronegativities, of the order of 0.2 e.

    The energy of a molecule by itself is the same for −q, so charges that start at random may take one sign in some
    molecules and the other in others, which nothing mends later.
    """
    assert network.latent_readout is not None
    chi = _electronegativities()
    known = torch.tensor([chi[z] for z in network.species if z], dtype=torch.float64)
    with torch.no_grad():
        for k, z in enumerate(network.species):
            network.latent_shift[k] = -_CHARGE_PER_VOLT * float(chi[z] - known.mean()) if z else 0.0


def set_sign(network: NequIP, samples: Sequence[Sample]) -> bool:
    """Gives the network's latent charges the sign that makes electronegative elements negative; whether it turned them.

    Of neutral structures (and fragments) without a field the energy does not know it: −q has the energy of q. The
    charges of ``samples`` are compared with PQEq's electronegativities; others have taught the sign, and then it stays.
    """
    if network.latent_readout is None or any(_knows_sign(s) for s in samples):
        return False
    chi = _electronegativities()
    first = next(network.parameters())
    slope = 0.0
    with torch.no_grad():
        for sample in samples[:_MOST]:
            numbers = sample.systems.numbers.to(first.device)
            vectors = sample.vectors.to(first)
            charges = network.with_charges(numbers, sample.edge_index.to(first.device), vectors)[1].double().cpu()
            drawn = torch.tensor([chi[int(z)] for z in sample.systems.numbers], dtype=torch.float64)
            slope += float((charges * (drawn - drawn.mean())).sum())
        if slope > 0:
            network.latent_readout[-1].neg_()
            network.latent_shift.neg_()
    return slope > 0


def _knows_sign(sample: Sample) -> bool:
    charged = sample.latent is not None and bool((sample.latent.totals != 0).any())
    return charged or bool((sample.systems.net_charge != 0).any()) or bool((sample.systems.field != 0).any())


def _electronegativities() -> dict[int, float]:
    """PQEq's χ (V) by atomic number."""
    return {atomic_numbers[symbol]: row.chi for symbol, row in read_parameters("default").items()}
