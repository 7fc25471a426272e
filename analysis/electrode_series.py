"""Charge and potential of every electrode along a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.capacitor import Setup
from voltpi.analysis.ipi_files import convert, iter_extras, read_extras
from voltpi.analysis.runs import Run
from voltpi.potential.errors import InputError

__all__ = ["ElectrodeSeries", "Potentials", "electrode_series"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ElectrodeSeries:
    """steps [f] · time [f] fs · charges [f, e] e · potentials [f, e] V (nan where nothing says them).

    Beads of a ring polymer are averaged. The mean over beads is what a capacitance of a quantum run is made of: its
    Boltzmann weight exp(−β/P Σ_k Ω(R_k)) changes with the voltage by β δψ (1/P) Σ_k Q(R_k).
    """

    steps: NDArray[np.int64]
    time: Array
    charges: Array
    potentials: Array

    def after(self, skip: float) -> ElectrodeSeries:
        """Without the first ``skip`` fs. Raises InputError when nothing is left."""
        kept = self.time >= self.time[0] + skip
        if not kept.any():
            raise InputError(f"skip is {skip:g} fs but the run is {np.ptp(self.time):g} fs long: skip less")
        return ElectrodeSeries(self.steps[kept], self.time[kept], self.charges[kept], self.potentials[kept])


def electrode_series(run: Run, setup: Setup) -> ElectrodeSeries:
    """From ``electrode_charges``, or else the sums of ``charges``.

    Raises InputError when the run wrote neither, or has no electrodes.
    """
    if not setup.electrodes:
        raise InputError(f"{run.folder}: its settings have no electrodes; use profiles for a run without")
    totals, charges = run.extras.get("electrode_charges"), run.extras.get("charges")
    if totals:
        beads = [read_extras(path) for path in totals]
        values = [_by_electrode(bead.values, setup, str(bead.path)) for bead in beads]
        steps = [bead.steps for bead in beads]
    elif charges:
        records = [list(iter_extras(path)) for path in charges]
        steps = [np.array([step for step, _ in bead]) for bead in records]
        values = [
            np.array([[q[electrode.atoms].sum() for electrode in setup.electrodes] for _, q in bead])
            for bead in records
        ]
    else:
        raise InputError(
            f"{run.folder}: no charges of electrodes; add <trajectory extra_type='electrode_charges'> extras "
            "</trajectory>"
        )
    n = min(map(len, steps))
    if n == 0:
        raise InputError(f"{run.folder}: no complete record of charges; let the run write at least one")
    mean = np.mean([v[:n] for v in values], axis=0)
    return ElectrodeSeries(steps[0][:n], run.times(steps[0][:n]), mean, Potentials(run, setup)(steps[0][:n]))


class Potentials:
    """Potentials (V) of the electrodes of a run: what the driver wrote, or else what the settings say, or else nan."""

    def __init__(self, run: Run, setup: Setup) -> None:
        said = np.array([np.nan if e.potential is None else e.potential for e in setup.electrodes])
        self._steps, self._values = np.zeros(1, dtype=np.int64), said[None]
        files = run.extras.get("electrode_potentials", ())
        beads = [read_extras(path) for path in files]
        if beads:
            self._steps = min((bead.steps for bead in beads), key=len)
            tables = [_by_electrode(bead.values[: len(self._steps)], setup, str(bead.path)) for bead in beads]
            self._values = convert(np.mean(tables, axis=0), "energy", "atomic_unit", "electronvolt")

    def __call__(self, steps: ArrayLike) -> Array:
        """[f, e] at ``steps`` [f]; between two records the earlier one."""
        latest = np.searchsorted(self._steps, np.asarray(steps), side="right") - 1
        return self._values[np.clip(latest, 0, None)]

    def stated(self, steps: ArrayLike) -> Array:
        """[f, e] at ``steps`` [f]; nan where potentials change and were not written at that very step."""
        known = np.isin(np.asarray(steps), self._steps)[..., None] | (np.ptp(self._values, axis=0) == 0.0)
        return np.where(known, self(steps), np.nan)


def _by_electrode(values: Array, setup: Setup, path: str) -> Array:
    table = values.reshape(len(values), -1)
    if table.shape[1] != len(setup.electrodes):
        raise InputError(
            f"{path}: {table.shape[1]} values a step but the settings have {len(setup.electrodes)} electrodes; give "
            "the settings of this run"
        )
    return table
