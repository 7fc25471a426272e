"""A whole potential as a metatomic model: one TorchScript file that LAMMPS, ASE, i-PI and TorchSim run without VoltPI.

What is exported is what :class:`~voltpi.potential.model.Potential` computes without field, electrodes and
displacement: network, reference energies, stationary PQEq charges with their shells, and D3. The outputs are ``energy``
(eV; an engine differentiates it for forces and stress) and, where there are charges, ``charge`` (e, per atom).

An exported model differs from a run of VoltPI in two ways: charges are found from scratch in every call, and molecules
(``conserve: fragments``) are read off the bonds of every structure anew, not kept from the first one.
"""

# No `from __future__ import annotations` here: TorchScript reads the annotations of these classes.
import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035 (metatomic asks for these annotations)

import torch
from ase.data import chemical_symbols, covalent_radii
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
)
from torch import Tensor, nn

from voltpi.potential.electrostatics.ewald import DIRECT_BELOW
from voltpi.potential.electrostatics.pqeq import PQEq
from voltpi.potential.errors import InputError
from voltpi.potential.export.charges import ScriptedPQEq
from voltpi.potential.export.dispersion import ScriptedD3
from voltpi.potential.export.network import ScriptedMean, networks_of
from voltpi.potential.fragments import BOND_TOLERANCE, IONS
from voltpi.potential.model import Potential

__all__ = ["MetatomicPotential", "export_metatomic"]


# Terms are called through interfaces, which TorchScript does not inline: as one graph the whole potential takes its
# optimiser minutes at the second call.


@torch.jit.interface
class _PairTerm(nn.Module):
    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        pass


@torch.jit.interface
class _ChargeTerm(nn.Module):
    def forward(  # type: ignore[empty-body]
        self, positions: Tensor, cell: Tensor, periodic: bool, numbers: Tensor, fragment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pass


class _NoPairTerm(nn.Module):
    def forward(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        return torch.zeros([numbers.size(0)], dtype=vectors.dtype, device=vectors.device)


class _NoCharges(nn.Module):
    def forward(
        self, positions: Tensor, cell: Tensor, periodic: bool, numbers: Tensor, fragment: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(positions[:, 0]), torch.zeros_like(positions[:, 0]), torch.zeros_like(positions)


class MetatomicPotential(nn.Module):
    """The terms of a potential behind metatomic's interface.

    Parameters
    ----------
    potential : what to export
    elements : atomic numbers that it is for
    net_charge : e, of every structure

    Raises InputError for a term that cannot be exported.
    """

    network: _PairTerm
    charges: _ChargeTerm
    dispersion: _PairTerm

    def __init__(self, potential: Potential, elements: list[int], net_charge: float = 0.0) -> None:
        super().__init__()
        networks, charges, dispersion = networks_of(potential.short_range), potential.charges, potential.dispersion
        if charges is not None and (
            type(charges) is not PQEq or charges.electrodes or charges.finite_field is not None
        ):
            raise InputError(
                f"charges of kind {type(charges).__name__} cannot be exported to metatomic: export a model whose "
                "charges are stationary (pqeq or qeq, the whole Coulomb sum) and without electrodes"
            )
        if potential.walls is not None or potential.response_only:
            raise InputError("walls and foundation models cannot be exported to metatomic: export a model file alone")
        reference = torch.zeros(len(chemical_symbols), dtype=torch.float64)
        for number, energy in potential.reference_energies.items():
            reference[number] = energy
        self.register_buffer("reference", reference)
        self.network = torch.jit.script(ScriptedMean(networks).eval()) if networks else _NoPairTerm()
        self.charges = (
            torch.jit.script(ScriptedPQEq(charges, net_charge).eval()) if charges is not None else _NoCharges()
        )
        self.dispersion = (
            torch.jit.script(ScriptedD3(dispersion, elements).eval()) if dispersion is not None else _NoPairTerm()
        )
        self.has_charges = charges is not None
        self.has_fragments = charges is not None and charges.conserve == "fragments"
        radii = torch.tensor(covalent_radii, dtype=torch.float64)
        bonding = [z for z in elements if z not in IONS]
        reach = 2 * BOND_TOLERANCE * max([float(radii[z]) for z in bonding], default=0.0) if self.has_fragments else 0.0
        radii[list(IONS)] = -math.inf  # bonded to nothing
        self.register_buffer("radii", radii)
        self.tolerance = BOND_TOLERANCE
        self.largest_cluster = DIRECT_BELOW
        self.range = max([reach, *(network.cutoff for network in networks)])
        self.dispersion_range = dispersion.cutoff if dispersion is not None else 0.0

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        """A full list for network and bonds, half a list for dispersion."""
        wanted: List[NeighborListOptions] = []  # noqa: UP006
        if self.range > 0.0:
            wanted.append(NeighborListOptions(cutoff=self.range, full_list=True, strict=True))
        if self.dispersion_range > 0.0:
            wanted.append(NeighborListOptions(cutoff=self.dispersion_range, full_list=False, strict=True))
        return wanted

    def _fragments(self, numbers: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        """Molecules [n], numbered from 0 (the bonds of ``fragments.assign_fragments``)."""
        i, j = index[0], index[1]
        radii = self.radii[numbers]
        length = torch.linalg.vector_norm(vectors, dim=1) / (radii[i] + radii[j])
        bonded = (length > 0.0) & (length < self.tolerance)
        # a hydrogen keeps one bond, to a heavier atom where there is one: close contacts of molecules do not join them
        hydrogen = numbers == 1
        rank = length + 10.0 * (hydrogen[i] & hydrogen[j]).to(length.dtype)
        rank = torch.where(bonded, rank, torch.full_like(rank, math.inf))
        first = torch.full_like(radii, math.inf).scatter_reduce(0, i, rank, "amin")
        bonded = bonded & (~hydrogen[i] | (rank <= first[i])) & (~hydrogen[j] | (rank <= first[j]))
        i, j = i[bonded], j[bonded]
        label = torch.arange(numbers.size(0), device=numbers.device)
        changed = True
        while changed:  # the lowest index spreads along the bonds, and along what it has already joined
            new = label.scatter_reduce(0, i, label[j], "amin")
            new = new[new]
            changed = not torch.equal(new, label)
            label = new
        return torch.unique(label, return_inverse=True)[1]

    def _evaluate(self, system: System) -> tuple[Tensor, Tensor]:
        """Energies of atoms [n] (eV) and charges [n] (e)."""
        numbers = system.types.to(torch.int64)
        energy = self.reference[numbers]
        charges = torch.zeros_like(energy)
        index = torch.empty([2, 0], dtype=torch.int64, device=numbers.device)
        vectors = torch.empty([0, 3], dtype=energy.dtype, device=numbers.device)
        if self.range > 0.0:
            pairs = system.get_neighbor_list(NeighborListOptions(cutoff=self.range, full_list=True, strict=True))
            index, vectors = pairs.samples.values[:, :2].t().to(torch.int64), pairs.values.squeeze(2)
        energy = energy + self.network(numbers, index, vectors)
        if self.has_charges:
            periodic = bool(system.pbc.all())
            if not periodic and bool(system.pbc.any()):
                raise RuntimeError(
                    "the structure is periodic in one or two directions only: this exported model sums charges in "
                    "three (put vacuum into a cell) or none"
                )
            if not periodic and numbers.size(0) > self.largest_cluster:
                raise RuntimeError(
                    f"a cluster of {numbers.size(0)} atoms: this exported model sums those of up to "
                    f"{self.largest_cluster} atoms, pair by pair; put a larger one into a periodic cell with vacuum"
                )
            if self.has_fragments:
                fragment = self._fragments(numbers, index, vectors.detach())
            else:
                fragment = torch.zeros_like(numbers)
            own, charges, _ = self.charges(system.positions, system.cell, periodic, numbers, fragment)
            energy = energy + own
        if self.dispersion_range > 0.0:
            options = NeighborListOptions(cutoff=self.dispersion_range, full_list=False, strict=True)
            pairs = system.get_neighbor_list(options)
            energy = energy + self.dispersion(
                numbers, pairs.samples.values[:, :2].t().to(torch.int64), pairs.values.squeeze(2)
            )
        return energy, charges

    def _map(self, name: str, values: Tensor, samples: Labels) -> TensorMap:
        no_components: List[Labels] = []  # noqa: UP006
        one = torch.zeros([1, 1], dtype=torch.int32, device=values.device)
        block = TensorBlock(values.unsqueeze(1), samples, no_components, Labels([name], one))
        return TensorMap(Labels(["_"], one), [block])

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels],  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """``energy`` and ``charge`` of the systems (``metatomic.torch.ModelInterface``)."""
        device = self.reference.device
        energies: List[Tensor] = []  # noqa: UP006
        totals: List[Tensor] = []  # noqa: UP006
        charges: List[Tensor] = []  # noqa: UP006
        samples: List[Tensor] = []  # noqa: UP006
        for k, system in enumerate(systems):
            energy, charge = self._evaluate(system)
            atoms = torch.arange(energy.size(0), device=device)
            if selected_atoms is not None:
                chosen = selected_atoms.values.to(device)
                atoms = chosen[chosen[:, 0] == k, 1].to(torch.int64)
                moving = system.positions.requires_grad or system.cell.requires_grad
                if self.has_charges and moving and atoms.size(0) < energy.size(0):
                    raise RuntimeError(
                        "forces of a part of the structure were asked for, but its charges depend on all atoms: run "
                        "this model in one domain (LAMMPS: one MPI process)"
                    )
            energies.append(energy[atoms])
            totals.append(energy[atoms].sum())
            charges.append(charge[atoms])
            samples.append(torch.stack([torch.full_like(atoms, k), atoms], dim=1).to(torch.int32))
        found: Dict[str, TensorMap] = {}  # noqa: UP006
        per_atom = Labels(["system", "atom"], torch.cat(samples))
        if "energy" in outputs:
            if outputs["energy"].sample_kind == "atom":
                found["energy"] = self._map("energy", torch.cat(energies), per_atom)
            else:
                numbers = torch.arange(len(systems), dtype=torch.int32, device=device).unsqueeze(1)
                found["energy"] = self._map("energy", torch.stack(totals), Labels(["system"], numbers))
        if "charge" in outputs:
            found["charge"] = self._map("charge", torch.cat(charges), per_atom)
        return found


def export_metatomic(
    file: str | Path, potential: Potential, card: dict[str, Any], *, net_charge: float = 0.0
) -> AtomisticModel:
    """Writes a potential as a metatomic model and gives the model.

    ``card`` is the description of its model file. Raises InputError for a potential that cannot be exported, and for a
    file that cannot be written.
    """
    path = Path(file)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; create it, or give another path")
    elements = _elements(potential)
    module = MetatomicPotential(potential.to("cpu"), elements, net_charge).eval()
    outputs = {"energy": ModelOutput(unit="eV", sample_kind="atom", description="energy of atoms")}
    reach = max(module.dispersion_range, 0.0)
    for network in networks_of(potential.short_range):
        reach = max(reach, network.cutoff * len(network.convolutions))
    if module.has_charges:
        outputs["charge"] = ModelOutput(unit="e", sample_kind="atom", description="stationary charges")
        reach = math.inf
    capabilities = ModelCapabilities(
        outputs=outputs,
        atomic_types=elements,
        interaction_range=reach,
        length_unit="angstrom",
        supported_devices=["cpu", "cuda"],
        dtype="float64",
    )
    metadata = ModelMetadata(
        name=str(card.get("name", path.stem)),
        description=f"{card.get('summary', '')}; not for {card.get('not_for', 'what it was not trained on')}",
        extra={"voltpi": json.dumps(card)},
    )
    model = AtomisticModel(module, metadata, capabilities)
    try:
        model.save(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); give a path that can") from None
    return model


def _elements(potential: Potential) -> list[int]:
    """Atomic numbers that every term of the potential knows."""
    known = set(range(1, len(chemical_symbols)))
    for network in networks_of(potential.short_range):
        known &= set(network.species)
    if potential.charges is not None:
        known &= {chemical_symbols.index(symbol) for symbol in potential.charges.parameters}
    if potential.reference_energies:
        known &= set(potential.reference_energies)
    if potential.dispersion is not None:
        known &= set(range(1, 104))
    return sorted(known)
