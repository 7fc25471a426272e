"""Labelled structures for training: read, check, build graphs, subtract the long-range part.

A network is fitted to what the physics leaves: label − baseline (charges, field, dispersion) − reference energies of
the atoms. All subtraction is done in float64. Units: eV, Å, e, V/Å; stress eV/Å³ in ASE's sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ase.db
import numpy as np
import torch
from ase import Atoms
from ase.io import iread
from ase.io.formats import UnknownFileTypeError
from scipy.spatial import cKDTree
from torch import Tensor

from voltpi.potential.errors import InputError
from voltpi.potential.fragments import assign_fragments
from voltpi.potential.neighbors import MINIMUM_DISTANCE, check_geometry, neighbor_list
from voltpi.potential.systems import Systems
from voltpi.potential.training.labels import AUTO, KINDS, Source, checked, detect, label
from voltpi.potential.training.latent import Interaction
from voltpi.potential.training.translations import reduce_translations

__all__ = ["Sample", "make_samples", "read_frames", "read_source"]


@dataclass(frozen=True)
class Sample:
    """One structure with its graph and what the network is to reproduce.

    Attributes
    ----------
    dataset, path, frame : where it comes from
    systems : the structure (a batch of one)
    edge_index : [2, e] int64, centre i and neighbour j
    vectors : [e, 3] float64, r_j + shift − r_i, Å
    energy : eV, label − baseline (− references)
    forces : [n, 3] float64, eV/Å, label − baseline
    weight : of its data set
    stress : [3, 3] float64 or None, eV/Å³, label − baseline
    group : what kind of structure it is, by the label that says so
    observed : dipole [3] (e·Å), polarizability [3, 3] (Å³), born_charges [n, 3, 3] (e) as labelled
    latent : what latent charges do to each other here, where they are trained
    initial_charges : [n] e, as the file has them: which ions molecules are, where they keep their charges
    """

    dataset: str
    path: str
    frame: int
    systems: Systems
    edge_index: Tensor
    vectors: Tensor
    energy: float
    forces: Tensor
    weight: float = 1.0
    stress: Tensor | None = None
    group: str = ""
    observed: Mapping[str, np.ndarray] = field(default_factory=dict)
    latent: Interaction | None = None
    initial_charges: Tensor | None = None

    @property
    def molecules(self) -> Systems:
        """The structure with its molecules and ions. Raises InputError, with file and frame, where they cannot be."""
        try:
            return assign_fragments(self.systems, initial_charges=self.initial_charges)
        except InputError as error:
            raise InputError(
                f"{self.path}, frame {self.frame}: {error}; or remove the frame, or use charges.conserve: total"
            ) from None

    @property
    def volume(self) -> float:
        """Å³, 0 where the structure is not periodic in all directions."""
        return _volume(self.systems)


def _volume(systems: Systems) -> float:
    return abs(float(torch.linalg.det(systems.cell[0]))) if bool(systems.pbc.all()) else 0.0


def read_source(source: Source) -> tuple[Source, list[Atoms]]:
    """The frames of one file with checked labels, and the source with its ``auto`` keys settled.

    Positions are in Å; labels stay as they are in the file. Raises InputError for unreadable files and for labels that
    are missing, misshapen or not finite.
    """
    frames = _read(source)
    for i, atoms in enumerate(frames):
        _check_atoms(source, i, atoms)
    if any(source.key(kind) == AUTO for kind in KINDS):
        source = detect(source, frames)
    scale = source.units.factor("length")
    for i, atoms in enumerate(frames):
        if scale != 1:
            atoms.set_cell(atoms.cell.array * scale, scale_atoms=False)
            atoms.positions *= scale
        _check_labels(source, i, atoms)
    if source.reduce:
        frames = [
            reduce_translations(
                a, energy_key=source.energy_key, forces_key=source.forces_key, extensive=source.extensive
            )
            for a in frames
        ]
    return source, frames


def read_frames(source: Source) -> list[Atoms]:
    """The frames of one file with checked labels, reduced to primitive cells where the source asks for it."""
    return read_source(source)[1]


def _read(source: Source) -> list[Atoms]:
    path = Path(source.path)
    frames: list[Atoms] = []
    try:
        if path.suffix == ".db":
            frames = _from_database(path, source.frames)
        else:
            # read by content only where the name does not say it: an ".xyz" with labels is extended XYZ
            known = "extxyz" if path.suffix in (".xyz", ".extxyz") else None
            if known:
                _require_no_gaps(path)
            for atoms in iread(path, index=source.frames, format=known):
                frames.append(atoms)  # one by one: their number says where reading failed
    except (OSError, ValueError, KeyError, IndexError, AssertionError, UnknownFileTypeError) as error:
        where = f"{path}, frame {len(frames)}" if frames else f"{path}"
        reason = f"{error} is not a known element or column" if isinstance(error, KeyError) else str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise InputError(f"{where}: cannot be read ({reason}): give an extended XYZ file or an ASE database") from error
    if not frames:
        raise InputError(f"{path}: no frames for index '{source.frames}': give a file that holds structures")
    return frames


def _require_no_gaps(path: Path) -> None:
    """ASE takes a blank line between frames for the end of the file, and would leave out what follows."""
    with path.open() as lines:
        row = 0
        while line := lines.readline():
            row += 1
            if not line.strip():
                if any(rest.strip() for rest in lines):
                    raise InputError(f"{path}, line {row}: blank, where reading ends: remove it to keep the rest")
                return
            if not line.strip().isdigit():
                return  # not a number of atoms: for the reader to say
            for _ in range(int(line) + 1):
                lines.readline()
            row += int(line) + 1


def _from_database(path: Path, index: str) -> list[Atoms]:
    """Rows of an ASE database; its key-value pairs and data (which ``ase.io.read`` leaves out) go to ``info``."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    frames = []
    with ase.db.connect(path) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info |= {**row.key_value_pairs, **row.data}
            frames.append(atoms)
    start, stop, step = (int(x) if x else None for x in (*index.split(":"), "", "")[:3])
    return frames[start:stop:step] if ":" in index else [frames[int(index)]]


def _check_atoms(source: Source, frame: int, atoms: Atoms) -> None:
    where = f"{source.path}, frame {frame}"
    if not len(atoms):
        raise InputError(f"{where}: has no atoms: remove the frame")
    if (atoms.numbers == 0).any():
        atom = int(np.argmin(atoms.numbers))
        raise InputError(f"{where}: atom {atom} is the dummy element X: give real elements, or remove the frame")
    if not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
        raise InputError(f"{where}: positions or cell are not finite: correct or remove the frame")


def _check_labels(source: Source, frame: int, atoms: Atoms) -> None:
    checked(source, frame, atoms, "energy", ())
    checked(source, frame, atoms, "forces", (len(atoms), 3))
    if source.field_key is not None:
        checked(source, frame, atoms, "field", (3,))
    elif np.any(np.asarray(atoms.info.get("electric_field", 0.0), dtype=float)):
        raise InputError(
            f"{source.path}, frame {frame}: has an electric_field but no field label was given: "
            "set labels.field (field_key) to electric_field"
        )
    if source.charge_key is not None:
        checked(source, frame, atoms, "charge", ())


def make_samples(source: Source, frames: Sequence[Atoms], cutoff: float) -> list[Sample]:
    """Samples of frames that :func:`read_source` gave, with neighbours within ``cutoff`` (Å).

    Raises InputError that names file and frame for a geometry that no potential takes (overlapping atoms, no cell).
    """
    return [_sample(source, i, atoms, cutoff) for i, atoms in enumerate(frames)]


def _sample(source: Source, frame: int, atoms: Atoms, cutoff: float) -> Sample:
    field_ = None if source.field_key is None else checked(source, frame, atoms, "field", (3,))
    charge = 0.0 if source.charge_key is None else float(checked(source, frame, atoms, "charge", ()))
    systems = Systems.from_atoms(atoms, field=field_, net_charge=charge)
    try:
        check_geometry(systems)
    except InputError as error:
        unit = ", as where positions in nm are read as Å: set units.length to nm" if _crowded(atoms) else ""
        raise InputError(f"{source.path}, frame {frame}: {error}{unit}") from None
    neighbors = neighbor_list(systems, cutoff)
    given = atoms.get_initial_charges() if atoms.has("initial_charges") else np.zeros(0)
    group = None if source.group_key is None else label(atoms, source.group_key)
    shapes = {"dipole": (3,), "polarizability": (3, 3), "born_charges": (len(atoms), 3, 3)}
    return Sample(
        dataset=source.name,
        path=str(source.path),
        frame=frame,
        systems=systems,
        edge_index=neighbors.index,
        vectors=neighbors.vectors,
        energy=float(checked(source, frame, atoms, "energy", ())),
        forces=torch.as_tensor(checked(source, frame, atoms, "forces", (len(atoms), 3))),
        weight=source.weight,
        stress=_stress(source, frame, atoms, _volume(systems)),
        group="" if group is None else str(group),
        observed={
            kind: checked(source, frame, atoms, kind, shape)
            for kind, shape in shapes.items()
            if source.key(kind) is not None and label(atoms, str(source.key(kind))) is not None
        },
        initial_charges=torch.as_tensor(given, dtype=torch.float64) if np.any(given) else None,
    )


def _crowded(atoms: Atoms) -> bool:
    """Whether most atoms are as close to another one as bonded atoms are in nm (H2: 0.074)."""
    nearest = cKDTree(atoms.positions).query(atoms.positions, k=2)[0][:, 1]
    return 0.06 < float(np.median(nearest)) < MINIMUM_DISTANCE


def _stress(source: Source, frame: int, atoms: Atoms, volume: float) -> Tensor | None:
    """The stress of a frame that has the label and is periodic in all directions."""
    for kind, divisor in (("stress", 1.0), ("virial", -volume)):
        key = source.key(kind)
        if key is not None and volume and label(atoms, key) is not None:
            stress = checked(source, frame, atoms, kind, (3, 3)) / divisor
            return torch.as_tensor(0.5 * (stress + stress.T))
    return None
