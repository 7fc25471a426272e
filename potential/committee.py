"""Committees: several short-range networks whose mean is the energy, and whose spread says how far to trust it.

Two kinds. ``Seeds`` are K whole networks, trained apart. ``LastLayers`` share one body and differ in what is read from
its last scalars h: E_k = E + Σ_i s_i d_k·h_i with Σ_k d_k = 0, so that the mean is the network itself, all members cost
one forward pass, and a trained model can be given a committee that leaves its energies as they are (shallow ensembles:
Kellner and Ceriotti, Mach. Learn.: Sci. Technol. 5, 035006 (2024), doi:10.1088/2632-2153/ad594a).

The spread of members trained on much the same data is too small. It is scaled by factors α found on validation data
(Musil et al., J. Chem. Theory Comput. 15, 906 (2019), doi:10.1021/acs.jctc.8b00959), one for energies and one for
forces. Members are given out with the α of energies: E + α (E_k − E), and forces that are derivatives of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from voltpi.potential.errors import InputError
from voltpi.potential.shortrange.nequip import NequIP

__all__ = [
    "FEWEST",
    "Calibration",
    "Committee",
    "LastLayers",
    "Members",
    "Seeds",
    "Uncertainty",
    "committee_of",
    "describe_short_range",
]

Uncertainty = Literal["none", "energy", "forces", "members"]
FEWEST = 4
"""Members; with fewer, the expected ratio of squared error to squared spread, which calibrates, does not exist."""


@dataclass(frozen=True)
class Calibration:
    """Factors α by which the spreads of energies and of forces are scaled to be errors."""

    energy: float = 1.0
    forces: float = 1.0

    def __post_init__(self) -> None:
        for name, alpha in asdict(self).items():
            if not (isinstance(alpha, int | float) and 0 < alpha < float("inf")):
                raise ValueError(f"calibration.{name} is {alpha!r}: give a positive number")


@dataclass(frozen=True)
class Members:
    """What the members of a committee say of ``b`` structures with ``n`` atoms in all.

    Attributes
    ----------
    energies : [k, b], eV
    energy_uncertainty : [b], eV, standard deviation of ``energies`` (of k − 1 degrees of freedom)
    forces : [k, n, 3] or None, eV/Å, exact derivatives of ``energies``
    virials : [k, b, 3, 3] or None, eV
    forces_uncertainty : [n] or None, eV/Å: the root mean square over x, y and z of the components' standard
        deviations, calibrated as forces are, so that it compares with an RMSE of force components
    """

    energies: Tensor
    energy_uncertainty: Tensor
    forces: Tensor | None = None
    virials: Tensor | None = None
    forces_uncertainty: Tensor | None = None


class Committee(nn.Module):
    """What both kinds have in common; called as a network is, it gives the mean.

    ``roots`` are K sets of atomic energies from which mean and members follow by one linear map, ``combine``, so that
    energies, forces and virials of all members cost K derivatives.
    """

    kind: str
    calibration: Calibration

    @property
    def first(self) -> NequIP:
        """The network that says what the members are like: species, cutoff, configuration."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of members K."""
        raise NotImplementedError

    def roots(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """Atomic energies [k, n] (eV); arguments and errors as of ``NequIP.forward``."""
        raise NotImplementedError

    def combine(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [...] and deviations from it [k, ...], not calibrated, from what belongs to the roots [k, ...]."""
        raise NotImplementedError

    @property
    def cutoff(self) -> float:
        """Å."""
        return self.first.cutoff

    @property
    def species(self) -> list[int]:
        """Atomic numbers."""
        return self.first.species

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of one member's network."""
        return self.first.config

    def members(
        self,
        spreads: tuple[Tensor, Tensor | None, Tensor | None],
        mean: tuple[Tensor, Tensor, Tensor],
    ) -> Members:
        """Calibrated members around the energy [b], forces [n, 3] and virial [b, 3, 3] of the whole potential.

        ``spreads`` : deviations of energies [k, b], forces [k, n, 3] and virials [k, b, 3, 3] as ``combine`` gives
        them; the last two may be None.
        """
        energies, forces, virials = spreads
        alpha = self.calibration.energy
        return Members(
            energies=mean[0] + alpha * energies,
            energy_uncertainty=alpha * _deviation(energies),
            forces=None if forces is None else mean[1] + alpha * forces,
            virials=None if virials is None else mean[2] + alpha * virials,
            forces_uncertainty=None if forces is None else self.calibration.forces * force_spread(forces),
        )


class LastLayers(Committee):
    """Members that share ``network`` and differ by ``deviations`` [k, s] of what its last scalars are weighted with.

    The deviations are made to add up to zero. Raises InputError for the wrong shape, or fewer than ``FEWEST`` members.
    """

    kind = "last-layers"
    deviations: Tensor

    def __init__(self, network: NequIP, deviations: Tensor, calibration: Calibration | None = None) -> None:
        super().__init__()
        scalars = network.readout[0].shape[0]
        if deviations.ndim != 2 or deviations.shape[1] != scalars:
            raise InputError(
                f"deviations of last layers have shape {tuple(deviations.shape)}: give [members, {scalars}]"
            )
        _enough(len(deviations))
        self.network = network
        self.register_buffer("deviations", deviations - deviations.mean(0))
        self.calibration = calibration or Calibration()

    @property
    def first(self) -> NequIP:
        """The network that all members share."""
        return self.network

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.deviations)

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """The network's own answer."""
        return self.network(numbers, edge_index, vectors)

    def roots(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """The mean, and all deviations but the last."""
        scalars = self.network.scalars(numbers, edge_index, vectors)
        mean = self.network.energies(numbers, scalars).to(vectors.dtype)
        mean = self.network.with_repulsion(mean, numbers, edge_index, vectors)
        return torch.cat([mean[None], read_scalars(self.network, numbers, scalars, self.deviations[:-1])])

    def combine(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The first of ``values``; the others, and the one that takes their sum to zero."""
        return values[0], torch.cat([values[1:], -values[1:].sum(0, keepdim=True)])


class Seeds(Committee):
    """Whole networks of one configuration, trained apart.

    Raises InputError for networks that differ in configuration or have latent charges, and for fewer than ``FEWEST``.
    """

    kind = "seeds"

    def __init__(self, networks: Sequence[NequIP], calibration: Calibration | None = None) -> None:
        super().__init__()
        _enough(len(networks))
        if any(network.config != networks[0].config for network in networks):
            raise InputError("the members of a committee of seeds differ in their configuration: train them alike")
        if networks[0].latent_readout is not None:
            raise InputError("a committee of seeds cannot have latent charges, of which each member would have its own")
        self.networks = nn.ModuleList(networks)
        self.calibration = calibration or Calibration()

    @property
    def first(self) -> NequIP:
        """The first member."""
        network = self.networks[0]
        assert isinstance(network, NequIP)
        return network

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.networks)

    def forward(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """The mean of the members."""
        return self.roots(numbers, edge_index, vectors).mean(0)

    def roots(self, numbers: Tensor, edge_index: Tensor, vectors: Tensor) -> Tensor:
        """The members."""
        return torch.stack([network(numbers, edge_index, vectors) for network in self.networks])

    def combine(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviations."""
        mean = values.mean(0)
        return mean, values - mean


def read_scalars(network: NequIP, numbers: Tensor, scalars: Tensor, weights: Tensor) -> Tensor:
    """Atomic energies [k, n] of linear readouts ``weights`` [k, s] of the last scalars [n, s]."""
    return (scalars @ weights.T * network.scale[network.lookup[numbers]][:, None]).T


def force_spread(forces: Tensor) -> Tensor:
    """Of deviations [k, n, 3] the root mean square over x, y and z of the standard deviations, [n]."""
    return _deviation(forces).square().mean(1).sqrt()


def committee_of(network: NequIP, description: Mapping[str, Any]) -> Committee:
    """The committee that a model file describes, its tensors still to be filled in; ``network`` is one member.

    Raises KeyError, TypeError, ValueError and InputError for a description that cannot be.
    """
    kind, size = description["kind"], description["members"]
    calibration = Calibration(**description["calibration"])
    if type(size) is not int:
        raise ValueError(f"committee.members is {size!r}: give a whole number")
    if kind == "last-layers":
        return LastLayers(network, torch.zeros(size, network.readout[0].shape[0]), calibration)
    if kind == "seeds":
        return Seeds([network, *(NequIP(**network.config) for _ in range(size - 1))], calibration)
    raise ValueError(f"committee of kind '{kind}', this version reads last-layers and seeds")


def describe_short_range(network: NequIP | Committee) -> dict[str, Any]:
    """What a model file's header says of it (``checkpoints.py``)."""
    description: dict[str, Any] = {"kind": "nequip", "config": network.config}
    if isinstance(network, Committee):
        description["committee"] = {
            "kind": network.kind,
            "members": network.size,
            "calibration": asdict(network.calibration),
        }
    return description


def _enough(members: int) -> None:
    if members < FEWEST:
        raise InputError(f"a committee of {members} members: give at least {FEWEST}, or its spread says little")


def _deviation(deviations: Tensor) -> Tensor:
    """Standard deviation over the first axis of what has mean zero there."""
    return (deviations.square().sum(0) / (len(deviations) - 1)).sqrt()
