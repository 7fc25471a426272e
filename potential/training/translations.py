"""Frames that repeat themselves under a fraction of a lattice vector, cut down to their primitive cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial import cKDTree

from voltpi.potential.errors import InputError
from voltpi.potential.training.labels import label

__all__ = ["reduce_translations"]


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
            images = _images(atoms, label(atoms, forces_key), axis, n, position_tolerance, force_tolerance)
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
