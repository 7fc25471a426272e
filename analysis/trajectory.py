"""Frames of a run: beads together, atoms followed through the cell's faces.

Atoms are followed in scaled coordinates. A displacement between two frames is the change of scaled coordinates,
nearest image, times the mean of the two cells: in a cell at rest that is the atom's own motion, and in one that a
barostat moves it is what is left without the affine motion of the cell (the barostat scales coordinates about the
origin, which would carry an atom the further the further away it is; S. von Bülow, J. T. Bullerjahn, G. Hummer, J.
Chem. Phys. 153, 021101 (2020)). Valid while every atom moves by less than half a cell between frames, whether the run
wrapped them or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.ipi_files import read_trajectory
from voltpi.analysis.run_inputs import given_to_drivers
from voltpi.analysis.runs import Run, find_run
from voltpi.potential.errors import InputError

__all__ = ["Unwrapped", "frames_of", "one_run", "together", "unwrapped"]

Array = NDArray[np.float64]


class _Stepped(Protocol):
    @property
    def step(self) -> int | None: ...


F = TypeVar("F", bound=_Stepped)


def one_run(paths: Sequence[Path], what: str, field: ArrayLike | None = None) -> Run:
    """The run of a folder or of files, also of one that another potential drove: then there is no field.

    Raises InputError for several runs, or for what ``find_run`` refuses.
    """
    folders = [path for path in paths if path.is_dir()]
    if len(folders) > 1 or (folders and len(paths) > 1):
        raise InputError(f"{what} is of one run, but {len(paths)} paths were given: call it for each")
    where = folders[0] if folders else list(paths)
    if field is None:
        plain = find_run(where, field=np.zeros(3))
        if not given_to_drivers(plain.folder, plain.outputs):
            return plain
    return find_run(where, field)


def together(paths: Sequence[Path], read: Callable[[Path], Iterator[F]]) -> Iterator[tuple[int, tuple[F, ...]]]:
    """Step and the beads' frames, one file a bead. Raises InputError where their steps differ or lack."""
    for beads in zip(*(read(path) for path in paths), strict=False):
        step = beads[0].step
        if step is None or any(bead.step != step for bead in beads):
            raise InputError(
                f"{paths[0]}: its frames do not say the same steps as those of the other beads, or none; give "
                "trajectories as i-PI wrote them"
            )
        yield step, beads


def frames_of(run: Run, skip: float = 0.0) -> Iterator[tuple[int, list[Atoms]]]:
    """Step and the beads' structures of every frame later than the first ``skip`` fs.

    Raises InputError when the run wrote no positions, its frames have no steps, or nothing is left.
    """
    if not run.positions:
        raise InputError(f"{run.folder}: no trajectory of positions; add <trajectory> positions </trajectory>")
    late = run.after(skip)
    found = False
    for step, beads in together(run.positions, read_trajectory):
        if late(step):
            found = True
            yield step, [bead.atoms for bead in beads]
    if not found:
        lost = "holds no complete frame; let the run write at least one"
        raise InputError(f"{run.positions[0]}: " + (f"skip is {skip:g} fs, and nothing is left" if skip > 0 else lost))


@dataclass(frozen=True)
class Unwrapped:
    """A run with atoms followed; of a ring polymer the centroids.

    steps [f] · time [f] fs · positions [f, n, 3] Å · volume [f] Å³ · cell [3, 3] Å, mean · first: the first frame
    """

    steps: NDArray[np.int64]
    time: Array
    positions: Array
    volume: Array
    cell: Array
    first: Atoms

    @property
    def still(self) -> NDArray[np.bool_]:
        """Atoms [n] that never moved, such as a frozen electrode."""
        return (np.abs(self.positions - self.positions[0]).max(axis=(0, 2)) < 1e-9) & (len(self.positions) > 1)

    @property
    def spacing(self) -> float:
        """Time between frames, fs. Raises InputError where it is not always the same, or with fewer than two frames."""
        if len(self.time) < 2:
            raise InputError("only one frame; let the run write at least two")
        gaps = np.diff(self.steps)
        if np.ptp(gaps) > 0:
            raise InputError(
                f"frames are {gaps.min()} to {gaps.max()} steps apart; give a trajectory written with one stride"
            )
        return float((self.time[-1] - self.time[0]) / (len(self.time) - 1))

    def without_drift(self) -> Array:
        """Positions [f, n, 3] less the motion of the centre of mass; as they are where atoms are held still."""
        if self.still.any():
            return self.positions
        masses = self.first.get_masses()
        centre = np.einsum("fnk,n->fk", self.positions, masses / masses.sum())
        return self.positions - (centre - centre[0])[:, None]


def unwrapped(run: Run, skip: float = 0.0) -> Unwrapped:
    """Positions of a run's atoms, followed from frame to frame; of a ring polymer the centroids'.

    Raises InputError as ``frames_of`` does.
    """
    steps: list[int] = []
    places: list[Array] = []
    cells: list[Array] = []
    first: Atoms | None = None
    scaled = place = np.zeros(0)
    for step, beads in frames_of(run, skip):
        # beads of one atom lie together, so that their mean is taken about the first one
        h = np.asarray(beads[0].cell)
        inverse = np.linalg.inv(h)
        pbc = beads[0].pbc
        s = beads[0].positions @ inverse
        for bead in beads[1:]:
            away = bead.positions @ inverse - beads[0].positions @ inverse
            s = s + (away - np.where(pbc, np.rint(away), 0.0)) / len(beads)
        if first is None:
            first, place = beads[0].copy(), s @ h
        else:
            moved = s - scaled
            place = place + (moved - np.where(pbc, np.rint(moved), 0.0)) @ (0.5 * (h + cells[-1]))
        scaled = s
        steps.append(step)
        places.append(place)
        cells.append(h)
    assert first is not None
    volume = np.abs(np.linalg.det(np.array(cells)))
    return Unwrapped(np.array(steps), run.times(steps), np.array(places), volume, np.mean(cells, axis=0), first)
