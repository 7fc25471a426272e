"""Cell dipole M and polarization P = M/V along a trajectory, on one continuous branch.

In a periodic cell M is defined modulo e times lattice vectors (R. D. King-Smith, D. Vanderbilt, Phys. Rev. B 47, 1651
(1993)), so a recorded M may jump by such a quantum where atoms are wrapped or a run is restarted. Here every record
takes the branch nearest to the one before, in units of the cell (so the cell may change). Valid while M moves by less
than half a quantum, and every atom by less than half a cell, between records.

M comes from the driver's ``dipole`` (e·bohr; charges and shells) or, where that was not written or other charges are
given, from charges (``voltpi.analysis.charges_of``) and positions: M = Σ q_i r_i with molecules made whole in the first
frame and atoms followed from there. The second way lacks the shells' share −Σ Z_i Δ_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.charges_of import AtomCharges, charges_of_beads, has_fixed_charges
from voltpi.analysis.ipi_files import Extras, convert, read_extras, read_trajectory
from voltpi.analysis.molecules import molecules_of, whole
from voltpi.analysis.runs import Run
from voltpi.potential.errors import InputError

__all__ = ["Follower", "Polarization", "continuous_branch", "polarization_of"]

Array = NDArray[np.float64]

E_PER_A2 = constants.e / constants.angstrom**2
"""C/m² in 1 e/Å²."""


class Follower:
    """Picks for every vector [..., 3] the image, modulo lattice vectors, nearest to the one before."""

    def __init__(self, pbc: NDArray[np.bool_] | tuple[bool, bool, bool] = (True, True, True)) -> None:
        self._pbc = np.asarray(pbc, dtype=bool)
        self._last: Array | None = None

    def __call__(self, vectors: Array, cell: Array) -> Array:
        """The same vectors [..., 3] plus whole rows of ``cell`` [3, 3] (one unit for both)."""
        fractional = vectors @ np.linalg.inv(cell)
        images = np.zeros_like(fractional)
        if self._last is not None:
            images = np.where(self._pbc, np.rint(self._last - fractional), 0.0)
        self._last = fractional + images
        return vectors + images @ cell


def continuous_branch(dipoles: Array, cells: Array, pbc: tuple[bool, bool, bool] = (True, True, True)) -> Array:
    """Dipoles [f, 3] (e·Å) without jumps by e times rows of ``cells`` [f, 3, 3] (Å); the first is taken as it comes."""
    follow = Follower(pbc)
    return np.array([follow(dipole, cell) for dipole, cell in zip(dipoles, cells, strict=True)])


@dataclass(frozen=True)
class Polarization:
    """M along a run.

    steps [f] · time [f] fs · dipole [f, 3] e·Å · volume [f] Å³ · n_molecules · source: where M comes from
    """

    steps: NDArray[np.int64]
    time: Array
    dipole: Array
    volume: Array
    n_molecules: int
    source: str

    @property
    def density(self) -> Array:
        """P = M/V [f, 3] in C/m²."""
        return self.dipole / self.volume[:, None] * E_PER_A2

    def after(self, skip: float) -> Polarization:
        """Without the first ``skip`` fs. Raises InputError when nothing is left."""
        kept = self.time >= self.time[0] + skip
        if not kept.any():
            raise InputError(f"skip is {skip:g} fs but the run is {np.ptp(self.time):g} fs long: skip less")
        return Polarization(
            self.steps[kept], self.time[kept], self.dipole[kept], self.volume[kept], self.n_molecules, self.source
        )


def polarization_of(run: Run, charges: str | Path | None = None) -> Polarization:
    """M along a run from its files; beads of a ring polymer are averaged.

    ``charges``: a file of charges (``voltpi.analysis.charges_of.read_charges``), which make M in place of the driver's
    dipole. Raises InputError when the run wrote no positions (which give cell and molecules), or where neither dipoles
    nor charges are known.
    """
    if not run.positions:
        raise InputError(f"{run.folder}: no trajectory of positions; add <trajectory> positions </trajectory>")
    dipoles = run.extras.get("dipole")
    if dipoles and charges is None:
        beads = [_from_dipoles(run, read_extras(path), run.positions[0]) for path in dipoles]
    else:
        if charges is None and not run.extras.get("charges") and not has_fixed_charges(run):
            raise InputError(
                f"{run.folder}: neither dipoles nor charges; add <trajectory extra_type='dipole'> extras "
                "</trajectory>, or give --charges FILE"
            )
        sources = charges_of_beads(run, charges)
        beads = [_from_charges(run, q, r) for q, r in zip(sources, run.positions, strict=True)]
    n = min(len(bead.steps) for bead in beads)
    first = beads[0]
    return Polarization(
        first.steps[:n],
        first.time[:n],
        np.mean([bead.dipole[:n] for bead in beads], axis=0),
        first.volume[:n],
        first.n_molecules,
        first.source,
    )


def _from_dipoles(run: Run, extras: Extras, positions: Path) -> Polarization:
    dipoles = convert(extras.values, "length", "atomic_unit", "angstrom")
    if dipoles.ndim != 2 or dipoles.shape[1] != 3:
        raise InputError(f"{extras.path}: a dipole has {dipoles.shape[1:]} components, not 3")
    steps, cells, first = _cells(positions)
    # the cell is written more rarely than the dipole: the last one known
    cells = cells[np.clip(np.searchsorted(steps, extras.steps, side="right") - 1, 0, None)]
    branch = continuous_branch(dipoles, cells, tuple(first.pbc))
    return Polarization(
        extras.steps,
        run.times(extras.steps),
        branch,
        np.abs(np.linalg.det(cells)),
        int(molecules_of(first).max()) + 1,
        "dipole sent by the driver",
    )


def _from_charges(run: Run, charges: AtomCharges, positions: Path) -> Polarization:
    steps, dipoles, volumes, n_molecules = [], [], [], 0
    follow: Follower | None = None
    for frame in read_trajectory(positions):
        cell = np.asarray(frame.atoms.cell)
        if follow is None:
            follow = Follower(frame.atoms.pbc)
            n_molecules = int(molecules_of(frame.atoms).max()) + 1
            follow(whole(frame.atoms), cell)
        r = follow(frame.atoms.positions, cell)
        q = charges.at(frame.step, len(r))
        if q is None:
            continue
        if frame.step is None:
            raise InputError(f"{positions}: its frames do not say their step; give a trajectory that i-PI wrote")
        steps.append(frame.step)
        dipoles.append(q @ r)
        volumes.append(frame.atoms.get_volume())
    if not steps:
        raise InputError(f"{run.folder}: charges and positions have no step in common; print both with one stride")
    return Polarization(
        np.array(steps),
        run.times(np.array(steps)),
        np.array(dipoles),
        np.array(volumes),
        n_molecules,
        f"{charges.source} and positions (without shells)",
    )


def _cells(positions: Path) -> tuple[NDArray[np.int64], Array, Atoms]:
    """Steps [g], cells [g, 3, 3] (Å) and the first frame of a trajectory."""
    steps: list[int] = []
    cells: list[Array] = []
    first: Atoms | None = None
    for frame in read_trajectory(positions):
        first = frame.atoms if first is None else first
        steps.append(frame.step if frame.step is not None else len(steps))
        cells.append(np.asarray(frame.atoms.cell))
    if first is None:
        raise InputError(f"{positions}: no complete frame; let the run write at least one")
    return np.array(steps), np.array(cells), first
