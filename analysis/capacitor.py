"""A capacitor as analyses see it: what its settings mean for the start structure, and its charges in every frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from voltpi.analysis.ipi_files import convert, extras_by_step, read_trajectory
from voltpi.analysis.planar import Grid
from voltpi.analysis.run_inputs import Given, given_to_drivers
from voltpi.analysis.runs import Run
from voltpi.analysis.site_sum import Sites, SiteSum
from voltpi.potential.errors import InputError

__all__ = ["ChargeFrame", "Describe", "Electrode", "Setup", "charge_frames", "frames_after", "setup_of"]

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Electrode:
    """``atoms`` [k] at a ``potential`` (V) or with a ``charge`` (e) as the settings say.

    The other is None, and both where a potentiostat moves its charge, or its potential changes with time.
    """

    name: str
    atoms: Ints
    potential: float | None = None
    charge: float | None = None


@dataclass(frozen=True)
class Setup:
    """What settings and start structure say about the charges of a run.

    start : the start structure; cell in Å, rows
    axis : the cell vector across which profiles are taken; heights are along the normal of the other two
    boundary : along ``axis``: ``open`` (slab), ``periodic`` (tin-foil) or ``finite-field`` (periodic, and the potential
        jumps across the cell by the difference of the first two electrodes)
    alpha : [n] Å⁻², every charge is ∝ exp(−alpha r²) around its atom; inf: a point
    shell_charge : [n] e, Z: a charge −Z at the shell and q + Z at the core; 0: no shell
    chi, hardness : [n] V, V/e of electrode atoms (else unused): ∂E/∂q = chi + hardness q + potential of all others;
        an ideal conductor has the hardness k_e √(2 alpha/π), its Gaussian's own potential
    potentiostat : None, or two electrodes (their places) between which the charge is a degree of freedom of its own,
        and the voltage of the second against the first (V, nan: changes with time)
    responding : whether charges other than the electrodes' are solved for, or have shells
    field : [3] V/Å, of the settings
    k_e : eV·Å/e²
    """

    start: Atoms
    axis: int
    boundary: Literal["open", "periodic", "finite-field"]
    electrodes: tuple[Electrode, ...]
    alpha: Array
    shell_charge: Array
    chi: Array
    hardness: Array
    potentiostat: tuple[int, int, float] | None
    responding: bool
    field: Array
    k_e: float

    @property
    def periodic(self) -> bool:
        """Whether ``axis`` is a period."""
        return self.boundary != "open"

    @property
    def labels(self) -> Ints:
        """Electrode [n] of every atom, −1: none."""
        out = np.full(len(self.start), -1, dtype=np.int64)
        for k, electrode in enumerate(self.electrodes):
            out[electrode.atoms] = k
        return out

    @property
    def species(self) -> list[tuple[str, Ints]]:
        """Name and atoms of every species: elements of the electrolyte, then electrodes."""
        free = self.labels < 0
        symbols = np.array(self.start.get_chemical_symbols())
        elements = [(str(s), np.flatnonzero(free & (symbols == s))) for s in dict.fromkeys(symbols[free].tolist())]
        return elements + [(electrode.name, electrode.atoms) for electrode in self.electrodes]

    def sum_over(self, cell: Array) -> SiteSum:
        """The Coulomb sum in this ``cell`` [3, 3] (Å)."""
        return SiteSum(cell, self.axis, self.periodic, self.k_e)

    def across(self, potentials: Array, cell: Array) -> float:
        """The field (V/Å) along the normal, from the settings and from a jump between ``potentials`` (V)."""
        geometry = self.sum_over(cell)
        field = float(self.field @ geometry.normal)
        if self.boundary != "finite-field" or geometry.period is None:
            return field
        low, high = sorted((0, 1), key=lambda k: self._height(k, geometry))
        return field - float(potentials[high] - potentials[low]) / geometry.period

    @property
    def targets(self) -> Array:
        """[e] V that are applied to the electrodes for the whole run; nan: none, or not a constant."""
        out = np.array([np.nan if e.potential is None else e.potential for e in self.electrodes])
        if self.potentiostat is not None:
            first, second, voltage = self.potentiostat
            out[first], out[second] = -0.5 * voltage, 0.5 * voltage
        return out

    def in_order(self) -> list[int]:
        """Places of the electrodes in ``electrodes``, from the lowest to the highest in the start structure."""
        geometry = self.sum_over(np.asarray(self.start.cell))
        return sorted(range(len(self.electrodes)), key=lambda k: self._height(k, geometry))

    def pair(self) -> tuple[int, int]:
        """Places of the two electrodes between which the voltage is, the lower one first.

        Those of the potentiostat, or the two that are not at a charge where there are exactly two, or else the lowest
        and the highest. Raises ValueError for fewer than two electrodes.
        """
        order = self.in_order()
        if len(order) < 2:
            raise ValueError("a pair needs two electrodes")
        if self.potentiostat is not None:
            driven = [k for k in order if k in self.potentiostat[:2]]
        else:
            driven = [k for k in order if self.electrodes[k].charge is None]
        low, high = driven if len(driven) == 2 else (order[0], order[-1])
        return low, high

    def _height(self, electrode: int, geometry: SiteSum) -> float:
        return float((self.start.positions[self.electrodes[electrode].atoms] @ geometry.normal).mean())

    def heights(self, positions: Array, geometry: SiteSum) -> Array:
        """Heights [k] (Å) along the normal; along a period in the one that begins between the outer electrodes.

        That is half-way between the highest electrode and the next image of the lowest in the start structure, so that
        neither is cut, and nothing is between them where the potential jumps.
        """
        z = positions @ geometry.normal
        if geometry.period is None:
            return z
        start = self._cut(geometry)
        return start + (z - start) % geometry.period

    def _cut(self, geometry: SiteSum) -> float:
        if not self.electrodes or geometry.period is None:
            return 0.0
        z, order = self.start.positions @ geometry.normal, self.in_order()
        lowest, highest = (z[self.electrodes[k].atoms] for k in (order[0], order[-1]))
        return 0.5 * (float(lowest.min()) + float(highest.max()) - geometry.period)

    def grid(self, width: float, cell: Array | None = None, margin: float = 3.0) -> Grid:
        """Bins of about ``width`` (Å) across the start structure, as many in any other ``cell``.

        Open: over its atoms and ``margin`` beyond. Periodic: over the period that ``heights`` takes.
        """
        known = self.sum_over(np.asarray(self.start.cell))
        if known.period is None:
            z = self.start.positions @ known.normal
            low, high = float(z.min()) - margin, float(z.max()) + margin
            return Grid(low, width, max(int(np.ceil((high - low) / width)), 1), False)
        n = max(int(np.rint(known.period / width)), 1)
        geometry = known if cell is None else self.sum_over(cell)
        assert geometry.period is not None
        return Grid(self._cut(geometry), geometry.period / n, n, True)


Describe = Callable[[Given], Setup]
"""What the driver hands to the analyses: reads a run's settings and selects the electrodes' atoms."""


def setup_of(run: Run, describe: Describe) -> Setup:
    """The setup of a run. Raises InputError without settings, and what ``describe`` refuses."""
    given = given_to_drivers(run.folder, run.outputs)
    if not given:
        raise InputError(f"{run.folder}: no settings.yaml that says what the electrodes are; put it beside the outputs")
    return describe(given[0])


@dataclass(frozen=True)
class ChargeFrame:
    """A structure with its charges: cell [3, 3] (Å, rows), positions and shells [n, 3] (Å), charges [n] (e)."""

    cell: Array
    positions: Array
    charges: Array
    shells: Array | None

    def sites(self, setup: Setup) -> tuple[Sites, Array]:
        """Where charge is, and how much [s] (e): cores of all atoms first, then shells that are known."""
        shelled = np.flatnonzero(setup.shell_charge) if self.shells is not None else np.zeros(0, dtype=np.int64)
        if self.shells is None or len(shelled) == 0:
            return Sites(self.positions, setup.alpha), self.charges
        z = setup.shell_charge
        places = np.concatenate([self.positions, (self.positions + self.shells)[shelled]])
        return (
            Sites(places, np.concatenate([setup.alpha, setup.alpha[shelled]])),
            np.concatenate([self.charges + z, -z[shelled]]),
        )


def charge_frames(run: Run, setup: Setup) -> Iterator[tuple[int, list[ChargeFrame]]]:
    """Steps with one frame for every bead, where positions, charges and (if written) shells are all known.

    Raises InputError when the run wrote no positions or charges, other atoms than the start structure's, or different
    numbers of beads.
    """
    positions, charges, shells = run.positions, run.extras.get("charges", ()), run.extras.get("shells", ())
    if not positions:
        raise InputError(f"{run.folder}: no trajectory of positions; add <trajectory> positions </trajectory>")
    if not charges:
        raise InputError(f"{run.folder}: no charges; add <trajectory extra_type='charges'> extras </trajectory>")
    if len({len(positions), len(charges), len(shells) or len(charges)}) > 1:
        raise InputError(
            f"{run.folder}: positions of {len(positions)} beads but charges of {len(charges)} and shells of "
            f"{len(shells)}; print all for the same beads"
        )
    no_shells = (None,) * len(charges)
    beads = [_bead(setup, *files) for files in zip(positions, charges, shells or no_shells, strict=True)]
    empty = True
    for frames in zip(*beads, strict=False):
        step = frames[0][0]
        if any(other != step for other, _ in frames):
            raise InputError(f"{run.folder}: the beads were not written at the same steps; print all with one stride")
        empty = False
        yield step, [frame for _, frame in frames]
    if empty:
        raise InputError(f"{run.folder}: charges and positions have no step in common; print both with one stride")


def frames_after(run: Run, setup: Setup, skip: float) -> Iterator[tuple[int, list[ChargeFrame]]]:
    """``charge_frames`` without those of the first ``skip`` fs. Raises InputError, also when nothing is left."""
    late, any_left = run.after(skip), False
    for step, beads in charge_frames(run, setup):
        if late(step):
            any_left = True
            yield step, beads
    if not any_left:
        raise InputError(f"{run.folder}: skip is {skip:g} fs but its charges are over by then: skip less")


def _bead(setup: Setup, positions: Path, charges: Path, shells: Path | None) -> Iterator[tuple[int, ChargeFrame]]:
    """Frames of one bead whose step is in all its files."""
    n = len(setup.start)
    others = [extras_by_step(path) for path in (charges, shells) if path]
    for frame in read_trajectory(positions):
        atoms = frame.atoms[frame.atoms.numbers > 0]  # without the potentiostat's particle
        if len(atoms) != n or (atoms.numbers != setup.start.numbers).any():
            raise InputError(f"{positions}: has other atoms than the start structure of the run; give that one")
        values = [None if frame.step is None else other.at(frame.step) for other in others]
        if frame.step is None or any(value is None for value in values):
            continue
        q = values[0]
        if q is None or q.shape[0] < n or q.ndim != 1:
            raise InputError(f"{charges}: {0 if q is None else q.size} charges but {positions.name} has {n} atoms")
        delta = None
        if shells is not None:
            delta = np.zeros(0) if values[1] is None else values[1]
            if delta.shape[0] < n or delta.shape[1:] != (3,):
                raise InputError(f"{shells}: shells of shape {delta.shape} but {positions.name} has {n} atoms")
            delta = convert(delta[:n], "length", "atomic_unit", "angstrom")
        yield frame.step, ChargeFrame(np.asarray(atoms.cell), atoms.positions, q[:n], delta)
