"""Loops of polarization P against field ε, of runs in which a schedule slowly changes the field or the displacement D.

P = M/V and the field that acts come from the driver (``dipole``, ``field``), D = ε + 4πk_e P, all along the axis of
what changes. A cycle is what lies between two turning points of what is imposed that have the same value; what comes
before the first (the virgin curve) belongs to none. Of each cycle, with its two branches:

remanent polarization  P_r = half the difference of P at the first ε = 0 of either branch
coercive field         ε_c = half the difference of ε at the first P = 0 of either branch; where D is imposed, P and ε
                       vanish together, and it is half the difference of the largest fields against P, the limits of
                       stability on the way (intrinsic coercive field)
loss                   w = −∮P dε = ∮ε dP, the energy per volume that the source gives and the medium turns into heat;
                       where D is imposed w = ∮ε dD/4πk_e, the same over a closed cycle (L. D. Landau, E. M. Lifshitz,
                       Electrodynamics of Continuous Media, sec. 10): the integral is over what is imposed, which has
                       no thermal noise

P_r and ε_c are from means over short intervals of time with straight lines between, w from all records. With several
cycles: means with the standard error from their scatter. P counts from where the run's M counts
(``polarization_reference``), or from half way between its ends (``centred``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.dielectric import FOUR_PI_K_E
from voltpi.analysis.ipi_files import read_extras
from voltpi.analysis.polarization import E_PER_A2, polarization_of
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import plus_minus
from voltpi.potential.errors import InputError

__all__ = ["Cycle", "FieldSeries", "Loop", "field_series", "loop_of"]

Array = NDArray[np.float64]
Kind = Literal["field", "displacement"]

V_PER_A = constants.value("atomic unit of electric field") * constants.angstrom
"""V/Å in one atomic unit of field."""
MJ_PER_M3 = constants.e / constants.angstrom**3 * 1e-6
"""MJ/m³ in 1 eV/Å³."""
_TURNING = 0.05  # of the span: smaller swings are noise, and ends closer than that are one


@dataclass(frozen=True)
class FieldSeries:
    """Along a run: time [f] fs · field [f, 3] V/Å · polarization [f, 3] e/Å² · volume [f] Å³; beads are averaged."""

    time: Array
    field: Array
    polarization: Array
    volume: Array

    @property
    def displacement(self) -> Array:
        """D [f, 3], V/Å."""
        return self.field + FOUR_PI_K_E * self.polarization


def field_series(run: Run, skip: float = 0.0) -> FieldSeries:
    """Field and polarization of a run without its first ``skip`` fs.

    Raises InputError when the run wrote no dipoles or fields, or never both at one step.
    """
    files = run.extras.get("field")
    if not files:
        raise InputError(
            f"{run.folder}: no field; add <trajectory extra_type='field'> extras </trajectory> with the stride of the "
            "dipole"
        )
    p = polarization_of(run).after(skip)
    if "driver" not in p.source:
        raise InputError(
            f"{run.folder}: no dipole; add <trajectory extra_type='dipole'> extras </trajectory> with the stride of "
            "the field"
        )
    beads = [read_extras(path) for path in files]
    n = min(len(bead.steps) for bead in beads)
    field = np.mean([bead.values[:n] for bead in beads], axis=0) * V_PER_A
    _, ours, theirs = np.intersect1d(p.steps, beads[0].steps[:n], return_indices=True)
    if not len(ours):
        raise InputError(f"{run.folder}: dipole and field have no step in common; print both with one stride")
    density = p.dipole / p.volume[:, None]
    return FieldSeries(p.time[ours], field[theirs], density[ours], p.volume[ours])


@dataclass(frozen=True)
class Cycle:
    """One cycle: records ``first`` to ``last``, P_r (e/Å²), ε_c (V/Å), each nan where it is not reached, w (eV/Å³)."""

    first: int
    last: int
    remanent: float
    coercive: float
    loss: float


@dataclass(frozen=True)
class Loop:
    """P against ε of one run along ``axis`` [3]; ``kind``: what is imposed.

    time [f] fs · field, displacement [f] V/Å · polarization [f] e/Å² · averaged: (field, polarization, displacement)
    [g] of intervals of ``interval`` fs · cycles · volume Å³
    """

    run: Run
    kind: Kind
    axis: Array
    time: Array
    field: Array
    displacement: Array
    polarization: Array
    averaged: tuple[Array, Array, Array]
    interval: float
    cycles: tuple[Cycle, ...]
    volume: float
    rate: float

    def mean(self, name: str) -> tuple[float, float]:
        """Mean over the cycles of ``remanent``, ``coercive`` or ``loss``, with its standard error (nan from one)."""
        values = np.array([getattr(cycle, name) for cycle in self.cycles])
        values = values[np.isfinite(values)]
        if not len(values):
            return float("nan"), float("nan")
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        return float(values.mean()), error

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        out: dict[str, Any] = {
            "run": str(self.run.folder),
            "imposed": self.kind,
            "axis": self.axis.tolist(),
            "cycles": len(self.cycles),
            "length_ps": float(np.ptp(self.time)) / 1000.0,
            "rate_V_per_A_ps": self.rate,
            "volume_A3": self.volume,
            "interval_fs": self.interval,
        }
        for name, unit, factor in (
            ("remanent", "polarization_C_per_m2", E_PER_A2),
            ("coercive", "field_V_per_A", 1.0),
            ("loss", "eV_per_A3", 1.0),
            ("loss", "MJ_per_m3", MJ_PER_M3),
        ):
            value, error = self.mean(name)
            out |= {f"{name}_{unit}": value * factor, f"{name}_error_{unit}": error * factor}
        out["each_cycle"] = [
            {
                "from_ps": float(self.time[cycle.first]) / 1000.0,
                "until_ps": float(self.time[cycle.last]) / 1000.0,
                "remanent_polarization_C_per_m2": cycle.remanent * E_PER_A2,
                "coercive_field_V_per_A": cycle.coercive,
                "loss_eV_per_A3": cycle.loss,
            }
            for cycle in self.cycles
        ]
        return out

    def report(self) -> list[str]:
        """Lines for a person."""
        if not self.cycles:
            return ["no closed cycle: what is imposed never turns twice and comes back"]
        remanent, coercive, loss = (self.mean(name) for name in ("remanent", "coercive", "loss"))
        word = "coercive field" if self.kind == "field" else "intrinsic coercive field"
        return [
            f"cycles                    {len(self.cycles)}, {self.rate:.3g} V/Å/ps",
            f"remanent polarization     {plus_minus(remanent[0] * E_PER_A2, remanent[1] * E_PER_A2, '.4f')} C/m²",
            f"{word:<26}{plus_minus(*coercive, '.4f')} V/Å",
            f"loss per cycle            {plus_minus(loss[0] * MJ_PER_M3, loss[1] * MJ_PER_M3, '.3f')} MJ/m³",
        ]

    def table(self) -> tuple[list[str], Array]:
        """Header and one row for every record."""
        header = ["time_fs", "field_V_per_A", "displacement_V_per_A", "polarization_C_per_m2"]
        return header, np.column_stack([self.time, self.field, self.displacement, self.polarization * E_PER_A2])


def loop_of(run: Run, skip: float = 0.0, *, average: float | None = None, centred: bool = False) -> Loop:
    """The loop of a run without its first ``skip`` fs; ``average``: fs of an interval (absent: 1/200 of a cycle).

    Raises InputError when neither field nor displacement changes with time, both do, they keep no axis, or the run's
    files do not hold what is needed.
    """
    applied = run.applied
    if not applied.changing.any():
        raise InputError(
            f"{run.folder}: its field does not change with time ({applied}); give a schedule, or use voltpi analyze "
            "double-well for runs at constant D"
        )
    held = applied.held[applied.changing]
    if held.any() and not held.all():
        raise InputError(f"{run.folder}: field and displacement both change with time; let one of them do so")
    kind: Kind = "displacement" if held.all() else "field"
    series = field_series(run, skip)
    imposed = np.where(applied.changing, series.displacement if kind == "displacement" else series.field, 0.0)
    axis = _axis(run, imposed)
    control, field, p = imposed @ axis, series.field @ axis, series.polarization @ axis
    if centred:
        p = p - 0.5 * (p.max() + p.min())
    displacement = field + FOUR_PI_K_E * p
    turns = _turning_points(control)
    found = _closed(control, turns)
    spacing = float(np.ptp(series.time)) / max(len(series.time) - 1, 1)
    length = (found[0][2] - found[0][0]) * spacing if found else float(np.ptp(series.time))
    if average is not None and not average > 0.0:
        raise InputError(f"average is {average:g}: give the length of an interval in fs")
    width = max(round((average or length / 200.0) / spacing), 1)
    cycles = tuple(_cycle(kind, control, field, p, places, width) for places in found)
    rate = float(np.abs(np.diff(control)).sum() / max(np.ptp(series.time), 1e-12)) * 1000.0
    return Loop(
        run,
        kind,
        axis,
        series.time,
        field,
        displacement,
        p,
        (_averaged(field, width), _averaged(p, width), _averaged(displacement, width)),
        width * spacing,
        cycles,
        float(series.volume.mean()),
        rate,
    )


def _axis(run: Run, imposed: Array) -> Array:
    """The direction along which it changes, its largest component positive."""
    moved = imposed - imposed.mean(axis=0)
    _, sizes, directions = np.linalg.svd(moved, full_matrices=False)
    if len(imposed) < 3 or sizes[0] < 1e-9:
        raise InputError(f"{run.folder}: the field did not change in the part of the run that is kept; skip less")
    if sizes[1] > _TURNING * sizes[0]:
        raise InputError(f"{run.folder}: the field turns around; a loop needs one that changes along one axis")
    axis: Array = directions[0] * np.sign(directions[0][np.abs(directions[0]).argmax()])
    return axis


def _turning_points(control: Array) -> list[int]:
    """Records at which it turns, with the first and the last."""
    threshold = _TURNING * np.ptp(control)
    turns, extreme, rising = [0], 0, 0
    for k, value in enumerate(control):
        if rising == 0:
            if abs(value - control[0]) > threshold:
                rising, extreme = (1 if value > control[0] else -1), k
        elif (value - control[extreme]) * rising > 0:
            extreme = k
        elif (control[extreme] - value) * rising > threshold:
            turns.append(extreme)
            rising, extreme = -rising, k
    last = len(control) - 1
    # the end of a branch counts where it stops at its extreme
    return turns + ([extreme] if extreme not in turns and (extreme == last or rising) else [])


def _closed(control: Array, turns: list[int]) -> list[tuple[int, int, int]]:
    """Cycles as records of their beginning, turn and end."""
    near = _TURNING * np.ptp(control)
    cycles, k = [], 0
    while k + 2 < len(turns):
        first, middle, last = turns[k : k + 3]
        if abs(control[last] - control[first]) <= near:
            cycles.append((first, middle, last))
            k += 2
        else:
            k += 1
    return cycles


def _cycle(kind: Kind, control: Array, field: Array, p: Array, places: tuple[int, int, int], width: int) -> Cycle:
    first, middle, last = places
    whole = slice(first, last + 1)
    x = np.append(control[whole], control[first])
    y = np.append((p if kind == "field" else field)[whole], (p if kind == "field" else field)[first])
    area = float(np.trapezoid(y, x))
    branches = [
        (_averaged(field[part], width), _averaged(p[part], width))
        for part in (slice(first, middle + 1), slice(middle, last + 1))
    ]
    remanent = [_first_crossing(e, q) for e, q in branches]
    if kind == "field":
        coercive = [_first_crossing(q, e) for e, q in branches]
    else:
        coercive = [_largest_against(e, q) for e, q in branches]
    return Cycle(
        first,
        last,
        0.5 * abs(remanent[1] - remanent[0]),
        0.5 * abs(coercive[1] - coercive[0]),
        -area if kind == "field" else area / FOUR_PI_K_E,
    )


def _averaged(series: Array, width: int) -> Array:
    """Means of consecutive intervals of ``width`` records."""
    whole = len(series) // width * width
    means: Array = series[:whole].reshape(-1, width).mean(axis=1)
    return means if len(means) > 1 else series


def _first_crossing(zero: Array, other: Array) -> float:
    """``other`` where ``zero`` first changes its sign; nan where it never does."""
    places = np.flatnonzero(np.sign(zero[:-1]) * np.sign(zero[1:]) <= 0)
    if not len(places):
        return float("nan")
    k = places[0]
    share = zero[k] / (zero[k] - zero[k + 1]) if zero[k] != zero[k + 1] else 0.0
    return float(other[k] + share * (other[k + 1] - other[k]))


def _largest_against(field: Array, p: Array) -> float:
    """The largest field against P before P changes its sign; nan where the field never is."""
    before = np.flatnonzero(np.sign(p) != np.sign(p[0]))
    part = slice(0, before[0] if len(before) else len(p))
    against = -field[part] * np.sign(p[0])
    return float(field[part][against.argmax()]) if against.max() > 0.0 else float("nan")
