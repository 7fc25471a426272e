"""Electrodes: sets of atoms that share one potential, as terms and constraints of the one charge functional.

An electrode at the potential ψ (V) adds −ψ Q, so that the energy is the grand potential Ω = E − Σ_a ψ_a Q_a; all its
charges, and those of all other electrodes at potentials, are free under the total charge of the structure. An
electrode at a charge keeps it, spread such that it is an equipotential; its potential is an answer.

The diagonal of the charge matrix of an electrode atom (Siepmann & Sprik, J. Chem. Phys. 102, 511 (1995); Reed, Lanning
& Madden, J. Chem. Phys. 126, 084704 (2007); Scalfi et al., J. Chem. Phys. 153, 174704 (2020)) is

    with ``eta``     k_e √(2/π) η + hardness + 4π k_e l_TF²/v
    without          the element's PQEq hardness (which already holds its self-energy) + 4π k_e l_TF²/v

with η the Gaussian's width parameter, density ∝ exp(−η² r²), l_TF the Thomas–Fermi length and v the volume per atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from ase.data import chemical_symbols, reference_states
from torch import Tensor

from voltpi.potential.electrostatics.elements import ElementParameters
from voltpi.potential.errors import InputError
from voltpi.potential.systems import Systems

__all__ = ["Electrode", "assign_electrodes", "bulk_atom_volume", "check_electrodes", "electrode_rows"]


@dataclass(frozen=True)
class Electrode:
    """What an electrode is; its atoms and its potential or charge belong to a structure (``Systems``).

    Attributes
    ----------
    name : what outputs call it
    control : ``potential`` (V) or ``charge`` (e): what ``Systems.applied`` holds
    eta : 1/Å, Gaussian charges ∝ exp(−eta² r²) of an ideal conductor; None: the element's PQEq parameters
    hardness : eV/e², added to the Gaussian's self-energy; 0: ideal conductor. Only with ``eta``
    thomas_fermi : Å, screening length of the metal
    chi : V, electronegativity; None: 0 with ``eta``, else the element's
    polarizable : whether its atoms have PQEq shells
    atom_volume : Å³ for ``thomas_fermi``; None: that of the element's bulk crystal
    """

    name: str
    control: Literal["potential", "charge"]
    eta: float | None = None
    hardness: float = 0.0
    thomas_fermi: float = 0.0
    chi: float | None = None
    polarizable: bool = False
    atom_volume: float | None = None

    def __post_init__(self) -> None:
        where = f"electrodes.{self.name}"
        if self.control not in ("potential", "charge"):
            raise InputError(f"{where}: control is '{self.control}': choose potential | charge")
        for key, value, least in (
            ("eta", self.eta, "positive"),
            ("atom_volume", self.atom_volume, "positive"),
            ("hardness", self.hardness, "0 or positive"),
            ("thomas_fermi", self.thomas_fermi, "0 or positive"),
        ):
            if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and least != "positive"))):
                raise InputError(f"{where}.{key} is {value:g}: give a number that is {least}")
        if self.chi is not None and not math.isfinite(self.chi):
            raise InputError(f"{where}.chi is {self.chi}: give a finite number (V)")
        if self.hardness and self.eta is None:
            raise InputError(
                f"{where}.hardness is {self.hardness:g} but the electrode has no eta: give eta (1/Å) as well, or "
                "remove hardness, which its PQEq parameters bring"
            )


def bulk_atom_volume(number: int) -> float:
    """Å³ per atom of the element's bulk crystal, as ASE tabulates it.

    Raises InputError for an element whose crystal is not sc, bcc, fcc, diamond or hcp.
    """
    state = reference_states[number] if number < len(reference_states) else None
    kind = (state or {}).get("symmetry")
    per_cell = {"sc": 1, "bcc": 2, "fcc": 4, "diamond": 8}
    if state is not None and kind in per_cell:
        return float(state["a"] ** 3 / per_cell[kind])
    if state is not None and kind == "hcp":
        return float(math.sqrt(3) / 4 * state["a"] ** 3 * state["c/a"])
    raise InputError(
        f"no bulk atomic volume is tabulated for {chemical_symbols[number]}: give the electrode's atom_volume (Å³), or "
        "thomas_fermi 0"
    )


def assign_electrodes(
    systems: Systems,
    electrodes: Sequence[Electrode],
    atoms: Sequence[Sequence[int] | np.ndarray],
    values: Sequence[float],
) -> Systems:
    """One structure with its electrodes filled in.

    Parameters
    ----------
    atoms : indices of the atoms of every electrode
    values : V of every electrode at a potential, e of every one at a charge

    Raises InputError for an electrode without atoms, an atom in two electrodes, an index that is no atom, other numbers
    of electrodes, atoms and values, or several structures.
    """
    if systems.n_systems != 1:
        raise InputError(
            f"electrodes are assigned to one structure but {systems.n_systems} were given: join them after"
        )
    if not len(electrodes) == len(atoms) == len(values):
        raise InputError(
            f"there are {len(electrodes)} electrodes, {len(atoms)} lists of atoms and {len(values)} potentials or "
            "charges: give one of each"
        )
    label = torch.full((systems.n_atoms,), -1, dtype=torch.int64)
    for k, (electrode, indices) in enumerate(zip(electrodes, atoms, strict=True)):
        if np.asarray(indices).dtype == bool:
            indices = np.flatnonzero(indices)
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        if index.numel() == 0:
            raise InputError(f"electrodes.{electrode.name} has no atoms: correct its selection")
        if int(index.min()) < 0 or int(index.max()) >= systems.n_atoms:
            worst = int(index.max()) if int(index.max()) >= systems.n_atoms else int(index.min())
            raise InputError(
                f"electrodes.{electrode.name} has atom {worst} but the structure has atoms 0 to {systems.n_atoms - 1}: "
                "correct its list"
            )
        taken = index[label[index] >= 0]
        if len(taken):
            other = electrodes[int(label[taken[0]])].name
            raise InputError(
                f"{systems.name(int(taken[0]))} belongs to electrodes.{other} and to electrodes.{electrode.name}: make "
                "their selections exclude each other"
            )
        label[index] = k
    if not all(math.isfinite(v) for v in values):
        raise InputError(f"the electrodes' potentials and charges are {list(values)}: give finite numbers")
    applied = torch.tensor([list(values)], dtype=torch.float64, device=systems.device)
    return systems.replace(electrode=label.to(systems.device), applied=applied)


def check_electrodes(systems: Systems, electrodes: Sequence[Electrode], finite_field: int | None) -> None:
    """Refuses electrodes that do not fit the structure.

    Raises InputError where the structure has other electrodes than the model, is not periodic where the potential jumps
    across the cell, or the cell's face along that direction cuts an electrode: its atoms would lie at both ends of the
    jump.
    """
    if systems.applied is None or systems.applied.shape[1] != len(electrodes):
        held = 0 if systems.applied is None else systems.applied.shape[1]
        raise InputError(f"the structure has {held} electrodes but the potential {len(electrodes)}: assign them anew")
    if finite_field is None:
        return
    assert systems.electrode is not None
    if not bool(systems.pbc.all()):
        raise InputError("coulomb.boundary finite-field needs a structure that is periodic in all three directions")
    dual = torch.linalg.inv(systems.cell)[:, :, finite_field]
    along = (systems.positions * dual[systems.batch]).sum(-1)
    for k, electrode in enumerate(electrodes):
        for b in range(systems.n_systems):
            own = along[(systems.electrode == k) & (systems.batch == b)].sort().values
            span = float(own[-1] - own[0])
            if len(own) > 1 and float(own.diff().max()) > 1 - span:
                raise InputError(
                    f"electrodes.{electrode.name} lies at both ends of the cell along {'abc'[finite_field]} (its atoms "
                    f"span {span:.2f} of it): shift the structure so that no electrode is cut by the cell's face"
                )


def electrode_rows(
    system: Systems,
    electrodes: Sequence[Electrode],
    parameters: Mapping[str, ElementParameters],
    k_e: float,
    alpha_of: Callable[[ElementParameters], tuple[float, float]],
) -> tuple[Tensor, Tensor]:
    """Parameters of electrode atoms: their places [m] in the batch, and rows (chi, eta, Z, K, alpha) [m, 5].

    ``parameters``: PQEq's, in kcal/mol/Å² for K; ``alpha_of`` turns one of its rows into (K in eV/Å², alpha in Å⁻²).
    Units of the rows: V, eV/e², e, eV/Å², Å⁻². Raises InputError for an element without parameters that needs them.
    """
    assert system.electrode is not None
    places = (system.electrode >= 0).nonzero()[:, 0]
    label, number = system.electrode[places].cpu(), system.numbers[places].cpu()
    kinds, which = torch.unique(torch.stack([label, number], dim=1), dim=0, return_inverse=True)
    rows = torch.zeros(len(kinds), 5, dtype=torch.float64)
    for k, (e, z) in enumerate(kinds.tolist()):
        electrode, symbol = electrodes[e], chemical_symbols[z]
        own = parameters.get(symbol)
        if own is None and (electrode.eta is None or electrode.polarizable):
            raise InputError(
                f"electrodes.{electrode.name} needs PQEq parameters of {symbol}: give it eta (an ideal conductor, not "
                "polarizable), or add a row to charges.parameters"
            )
        chi, eta, shell, spring, alpha = 0.0, 0.0, 0.0, 1.0, 0.0
        if own is not None:
            spring, alpha = alpha_of(own)
            chi, eta = own.chi, own.eta
            shell = own.Z if electrode.polarizable else 0.0
        if electrode.eta is not None:
            alpha = electrode.eta**2
            chi, eta = 0.0, k_e * math.sqrt(2 / math.pi) * electrode.eta + electrode.hardness
        if electrode.chi is not None:
            chi = electrode.chi
        if electrode.thomas_fermi:
            volume = electrode.atom_volume or bulk_atom_volume(z)
            eta += 4 * math.pi * k_e * electrode.thomas_fermi**2 / volume
        rows[k] = torch.tensor([chi, eta, shell, spring if shell else 1.0, alpha], dtype=torch.float64)
    return places, rows[which].to(system.device)
