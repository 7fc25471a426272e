"""Labelled structures for training: read, check, subtract the long-range part, reduce, split.

A network is fitted to what the physics leaves: label − baseline (charges, field, dispersion) − reference energies of
the atoms. All subtraction is done here, in float64. Units: eV, Å, e, V/Å.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read
from ase.io.formats import UnknownFileTypeError
from rich.progress import track
from scipy.spatial import cKDTree
from torch import Tensor

from voltpi.potential.errors import InputError, VoltPIError
from voltpi.potential.neighbors import neighbor_list
from voltpi.potential.systems import Systems

__all__ = [
    "Baseline",
    "Sample",
    "Source",
    "Summary",
    "check_disjoint",
    "load_dataset",
    "read_frames",
    "reduce_translations",
    "reference_energies",
    "split",
    "structure_hash",
    "subtract_references",
    "summarize",
]

Baseline = Callable[[Systems], tuple[Tensor, Tensor]]
"""Long-range part that the network does not learn: systems -> (energy [b] eV, forces [n, 3] eV/Å)."""


@dataclass(frozen=True)
class Source:
    """One file of labelled structures, and how its labels are called.

    Attributes
    ----------
    path : extended XYZ (or anything ASE reads)
    name : data set; files of one level of theory share a name, and so their reference energies
    energy_key, forces_key : labels (eV, eV/Å), in ``info``/``arrays`` or among the results of an ASE calculator
    field_key : uniform field in ``info`` ([3], V/Å), or None for no field
    charge_key : net charge in ``info`` (e), or None for neutral
    weight : of the data set in the loss
    reduce : cut frames that repeat themselves down to their primitive cell (:func:`reduce_translations`)
    extensive : further names in ``info`` that scale with the size of the cell
    frames : ASE index of the frames to take
    """

    path: str | Path
    name: str
    energy_key: str = "REF_energy"
    forces_key: str = "REF_forces"
    field_key: str | None = None
    charge_key: str | None = None
    weight: float = 1.0
    reduce: bool = False
    extensive: tuple[str, ...] = ()
    frames: str = ":"


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


@dataclass(frozen=True)
class Summary:
    """What a network needs to know of its data: elements, RMS of the target forces (eV/Å), neighbours per atom."""

    species: tuple[int, ...]
    force_rms: float
    average_neighbors: float


def load_dataset(
    sources: Source | Sequence[Source],
    cutoff: float,
    *,
    baseline: Baseline | None = None,
    baseline_key: str = "",
    cache: str | Path | None = None,
    progress: bool = True,
) -> list[Sample]:
    """Read, check and prepare all frames of ``sources`` with neighbours within ``cutoff`` (Å).

    ``baseline`` is evaluated once per frame and subtracted. With a ``cache`` folder its values are kept in
    ``NAME-HASH.npz``, found again by structure, file and ``baseline_key``: a string that names the baseline and all
    its settings, to be changed whenever the baseline changes.

    Raises InputError for unreadable files and for labels that are missing, misshapen or not finite.
    """
    samples: list[Sample] = []
    for source in [sources] if isinstance(sources, Source) else sources:
        loaded = [_sample(source, i, atoms, cutoff) for i, atoms in enumerate(read_frames(source))]
        if baseline is not None:
            loaded = _subtract_baseline(loaded, source, baseline, baseline_key, cache, progress)
        samples += loaded
    return samples


def read_frames(source: Source) -> list[Atoms]:
    """The frames of one file with checked labels, reduced to primitive cells where the source asks for it."""
    path = Path(source.path)
    try:
        # read by content only where the name does not say it: an ".xyz" with labels is extended XYZ
        kind = "extxyz" if path.suffix in (".xyz", ".extxyz") else None
        frames = read(path, index=source.frames, format=kind)
    except (OSError, ValueError, KeyError, IndexError, UnknownFileTypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): give an extended XYZ file that ASE reads") from error
    frames = [frames] if isinstance(frames, Atoms) else list(frames)
    if not frames:
        raise InputError(f"{path}: no frames for index '{source.frames}': give a file that holds structures")
    for i, atoms in enumerate(frames):
        _check_labels(source, i, atoms)
    if source.reduce:
        frames = [
            reduce_translations(
                a, energy_key=source.energy_key, forces_key=source.forces_key, extensive=source.extensive
            )
            for a in frames
        ]
    return frames


def _label(atoms: Atoms, key: str) -> object | None:
    """A label by name: per-atom arrays, then info, then the results that ASE keeps in a calculator."""
    results = {} if atoms.calc is None else atoms.calc.results
    for place in (atoms.arrays, atoms.info, results):
        if key in place:
            return place[key]
    return None


def _checked(source: Source, frame: int, atoms: Atoms, option: str, shape: tuple[int, ...]) -> np.ndarray:
    key = getattr(source, option)
    value = _label(atoms, key)
    where = f"{source.path}, frame {frame}: {option} '{key}'"
    if value is None:
        known = sorted(set(atoms.arrays) | set(atoms.info) | set(atoms.calc.results if atoms.calc else ()))
        raise InputError(f"{where} is missing: name one of {', '.join(known)}, or remove the frame")
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{where} is {value!r}, not numbers: correct or remove the frame") from None
    if array.shape != shape:
        raise InputError(f"{where} has shape {list(array.shape)}, expected {list(shape)}: correct or remove the frame")
    if not np.isfinite(array).all():
        bad = "" if not shape else f" at index {np.argwhere(~np.isfinite(array))[0].tolist()}"
        raise InputError(f"{where} is not finite{bad}: correct or remove the frame")
    return array


def _check_labels(source: Source, frame: int, atoms: Atoms) -> None:
    _checked(source, frame, atoms, "energy_key", ())
    _checked(source, frame, atoms, "forces_key", (len(atoms), 3))
    if not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
        raise InputError(f"{source.path}, frame {frame}: positions or cell are not finite: correct or remove the frame")
    if source.field_key is not None:
        _checked(source, frame, atoms, "field_key", (3,))
    elif np.any(np.asarray(atoms.info.get("electric_field", 0.0), dtype=float)):
        raise InputError(
            f"{source.path}, frame {frame}: has an electric_field but no field_key was given: "
            "set field_key='electric_field' (V/Å)"
        )
    if source.charge_key is not None:
        _checked(source, frame, atoms, "charge_key", ())


def _sample(source: Source, frame: int, atoms: Atoms, cutoff: float) -> Sample:
    field = None if source.field_key is None else _checked(source, frame, atoms, "field_key", (3,))
    charge = 0.0 if source.charge_key is None else float(_checked(source, frame, atoms, "charge_key", ()))
    systems = Systems.from_atoms(atoms, field=field, net_charge=charge)
    neighbors = neighbor_list(systems, cutoff)
    return Sample(
        dataset=source.name,
        path=str(source.path),
        frame=frame,
        systems=systems,
        edge_index=neighbors.index,
        vectors=neighbors.vectors,
        energy=float(_checked(source, frame, atoms, "energy_key", ())),
        forces=torch.as_tensor(_checked(source, frame, atoms, "forces_key", (len(atoms), 3)).copy()),
        weight=source.weight,
    )


def structure_hash(systems: Systems, *, field: bool = True) -> str:
    """SHA-256 of numbers, positions, cell, periodicity (rounded to 1e-6 Å) and, with ``field``, field and charge."""
    digest = hashlib.sha256(systems.numbers.cpu().numpy().astype("<i8").tobytes())
    digest.update(systems.pbc.cpu().numpy().tobytes())
    for tensor in (systems.positions, systems.cell, *((systems.field, systems.net_charge) if field else ())):
        # + 0.0 turns −0.0 into 0.0
        digest.update((np.round(tensor.cpu().numpy().astype("<f8"), 6) + 0.0).tobytes())
    return digest.hexdigest()


def _subtract_baseline(
    samples: list[Sample],
    source: Source,
    baseline: Baseline,
    key: str,
    cache: str | Path | None,
    progress: bool,
) -> list[Sample]:
    if cache is not None and not key:
        raise InputError("baseline_key is empty: name the baseline and its settings, so that its cache can be trusted")
    name = hashlib.sha256(f"{Path(source.path).name}\n{key}".encode()).hexdigest()[:16]
    store = None if cache is None else Path(cache) / f"{source.name}-{name}.npz"
    known = _read_cache(store)
    hashes = [structure_hash(s.systems) for s in samples]
    wanted = [i for i, h in enumerate(hashes) if f"{h}.energy" not in known]
    saved = time.monotonic()
    try:
        for i in track(wanted, description=f"baseline of {source.name}", disable=not progress or not wanted):
            if f"{hashes[i]}.energy" in known:  # the same structure twice in one file
                continue
            energy, forces = _evaluate(baseline, samples[i])
            known[f"{hashes[i]}.energy"], known[f"{hashes[i]}.forces"] = energy, forces
            if time.monotonic() - saved > 60:
                _write_cache(store, known)
                saved = time.monotonic()
    finally:  # also when interrupted: what was computed is kept
        if wanted:
            _write_cache(store, known)
    return [
        replace(
            sample,
            energy=sample.energy - float(known[f"{h}.energy"]),
            forces=sample.forces - torch.as_tensor(known[f"{h}.forces"]),
        )
        for sample, h in zip(samples, hashes, strict=True)
    ]


def _evaluate(baseline: Baseline, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    where = f"{sample.path}, frame {sample.frame}"
    try:
        energy, forces = baseline(sample.systems)
    except VoltPIError as error:
        raise type(error)(f"{where}: {error}") from error
    e, f = energy.detach().cpu().double().reshape(()).numpy(), forces.detach().cpu().double().numpy()
    if f.shape != tuple(sample.forces.shape):
        raise ValueError(f"{where}: baseline gave forces {f.shape}, expected {tuple(sample.forces.shape)}")
    if not np.isfinite(e) or not np.isfinite(f).all():
        raise VoltPIError(f"{where}: the baseline gave numbers that are not finite: remove the frame")
    return e, f


def _read_cache(store: Path | None) -> dict[str, np.ndarray]:
    if store is None or not store.exists():
        return {}
    try:
        with np.load(store, allow_pickle=False) as data:
            return dict(data)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{store}: not a baseline cache ({error}): delete it") from error


def _write_cache(store: Path | None, known: Mapping[str, np.ndarray]) -> None:
    if store is None:
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    partial = store.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez(file, **known)  # type: ignore[arg-type]
    partial.replace(store)


def reduce_translations(
    atoms: Atoms,
    *,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    extensive: Sequence[str] = (),
    position_tolerance: float = 1e-3,
    force_tolerance: float = 1e-3,
) -> Atoms:
    """The primitive cell of a frame that repeats exactly under a fraction a/n of a lattice vector, else ``atoms``.

    Positions must repeat within ``position_tolerance`` (Å) and force labels within ``force_tolerance`` (eV/Å). The
    first atom of every set of images is kept, where it is. The energy label and the ``info`` entries named in
    ``extensive`` are divided by the number of repetitions. (A dipole, known modulo e·b in the large cell, is then
    known modulo e·b/n.) Other labels of a calculator are kept for the forces only.
    """
    for axis in range(3):
        if not atoms.pbc[axis]:
            continue
        most = math.gcd(*np.unique(atoms.numbers, return_counts=True)[1].tolist())
        for n in (n for n in range(most, 1, -1) if most % n == 0):
            images = _images(atoms, _label(atoms, forces_key), axis, n, position_tolerance, force_tolerance)
            if images is not None:
                atoms = _primitive(atoms, images, axis, n, (energy_key, *extensive), forces_key)
                break
    return atoms


def _images(
    atoms: Atoms, forces: object, axis: int, n: int, position_tolerance: float, force_tolerance: float
) -> np.ndarray | None:
    """For every atom the one that lies at a/n from it, or None where that is not a symmetry."""
    scaled = atoms.get_scaled_positions(wrap=False) % 1.0
    scaled[scaled >= 1.0] = 0.0
    moved = scaled.copy()
    moved[:, axis] = (moved[:, axis] + 1.0 / n) % 1.0
    moved[moved >= 1.0] = 0.0
    tree = cKDTree(scaled, boxsize=1.0)
    if not _matches(atoms, scaled, moved[:1], tree.query(moved[:1])[1], position_tolerance):
        return None  # ordinary structures leave here, cheaply
    images = tree.query(moved)[1]
    if len(np.unique(images)) != len(atoms) or not _matches(atoms, scaled, moved, images, position_tolerance):
        return None
    same_species = bool(np.array_equal(atoms.numbers[images], atoms.numbers))
    labels = np.asarray(forces, dtype=float)
    same_forces = bool((np.abs(labels[images] - labels) <= force_tolerance).all())
    return images if same_species and same_forces else None


def _matches(atoms: Atoms, scaled: np.ndarray, moved: np.ndarray, images: np.ndarray, tolerance: float) -> bool:
    apart = scaled[images] - moved
    apart -= np.round(apart)
    return bool((np.linalg.norm(apart @ atoms.cell.array, axis=1) <= tolerance).all())


def _primitive(atoms: Atoms, images: np.ndarray, axis: int, n: int, extensive: Sequence[str], forces_key: str) -> Atoms:
    first: np.ndarray = np.arange(len(atoms))
    step = first
    for _ in range(n - 1):
        step = images[step]
        first = np.minimum(first, step)
    keep = np.unique(first)
    small = atoms[keep]
    cell = atoms.cell.array.copy()
    cell[axis] /= n
    small.set_cell(cell)
    small.info = dict(atoms.info)
    results = {} if atoms.calc is None else atoms.calc.results
    kept: dict[str, object] = {forces_key: np.asarray(results[forces_key])[keep]} if forces_key in results else {}
    for key in extensive:
        if key in small.info:
            small.info[key] = _divided(small.info[key], n)
        elif key in results:
            kept[key] = _divided(results[key], n)
        else:
            raise InputError(f"extensive label '{key}' is missing from the frame: correct its name")
    if kept:
        small.calc = SinglePointCalculator(small, **kept)
    return small


def _divided(value: object, n: int) -> object:
    array = np.asarray(value, dtype=float) / n
    return array if array.ndim else float(array)


def split(samples: Sequence[Sample], fraction: float, *, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(training, validation), decided for each structure by its hash, so that added data move nothing.

    The hash leaves out the field: one geometry under several fields stays on one side. Raises InputError where one
    side would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation fraction is {fraction}: give a number between 0 and 1")
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        digest = hashlib.sha256(f"{seed} {structure_hash(sample.systems, field=False)}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(sample)
    if not all(sides):
        raise InputError(
            f"validation fraction {fraction} of {len(samples)} frames leaves one side empty: "
            "change it or give a validation file"
        )
    return sides


def check_disjoint(train: Sequence[Sample], validation: Sequence[Sample]) -> None:
    """Raise InputError where a structure (with its field) is in both sets."""
    seen = {structure_hash(s.systems): s for s in train}
    for sample in validation:
        twin = seen.get(structure_hash(sample.systems))
        if twin is not None:
            raise InputError(
                f"{sample.path}, frame {sample.frame} is also in training ({twin.path}, frame {twin.frame}): "
                "remove it from one of them"
            )


def reference_energies(samples: Sequence[Sample]) -> dict[str, dict[int, float]]:
    """Energies of the atoms (eV) by data set and atomic number, from least squares on the energies per atom.

    Where the compositions do not tell the elements apart (frames that all are water) the solution is the one of
    smallest norm: its sum over a frame is right, its parts have no meaning.
    """
    references: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(s.dataset for s in samples):
        own = [s for s in samples if s.dataset == name]
        species = sorted({int(z) for s in own for z in s.systems.numbers.unique()})
        fractions = np.array([[float((s.systems.numbers == z).double().mean()) for z in species] for s in own])
        energies = np.array([s.energy / s.systems.n_atoms for s in own])
        solution = np.linalg.lstsq(fractions, energies, rcond=1e-8)[0]
        references[name] = dict(zip(species, solution.tolist(), strict=True))
    return references


def subtract_references(samples: Sequence[Sample], references: Mapping[str, Mapping[int, float]]) -> list[Sample]:
    """Samples whose energies count from the atoms' ``references``; what the network then has to learn.

    Raises InputError for a data set or element that has no reference (validation files need the ``name`` of the
    training data of their level of theory).
    """
    result = []
    for sample in samples:
        own = references.get(sample.dataset)
        if own is None:
            raise InputError(
                f"{sample.path}: data set '{sample.dataset}' has no reference energies: "
                f"name it as training data of the same level of theory ({', '.join(references)})"
            )
        missing = set(sample.systems.numbers.tolist()) - set(own)
        if missing:
            raise InputError(
                f"{sample.path}, frame {sample.frame}: no reference energy for atomic number {min(missing)}: "
                f"add training data with it to '{sample.dataset}'"
            )
        total = math.fsum(own[z] for z in sample.systems.numbers.tolist())
        result.append(replace(sample, energy=sample.energy - total))
    return result


def summarize(samples: Sequence[Sample]) -> Summary:
    """Elements, RMS of the target forces and average number of neighbours over all samples."""
    atoms = sum(s.systems.n_atoms for s in samples)
    square = sum(float(s.forces.square().sum()) for s in samples)
    return Summary(
        species=tuple(sorted({int(z) for s in samples for z in s.systems.numbers.unique()})),
        force_rms=math.sqrt(square / (3 * atoms)),
        average_neighbors=sum(s.edge_index.shape[1] for s in samples) / atoms,
    )
