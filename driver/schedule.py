"""Voltages, fields and displacements as functions of time, and the clock behind them.

    electrodes:
      - {name: left, atoms: index 0:16, potential: 0.0}
      - {name: right, atoms: index 16:32, potential: {ramp: {start: 0, rate: 0.1, until: 1.0}}}      # V, V/ps
    field: [0, 0, {cyclic: {low: -0.1, high: 0.1, start: 0, rate: 0.01}}]                            # V/Å, V/Å/ps

or ``{square: {low, high, period}}``, ``{cyclic: {low, high, rate}}``, ``{table: {times, values}}``; a potentiostat's
potential and every component of a displacement too. Time is the number of i-PI's step times the timestep of the input,
as in i-PI's property ``time``: the structure that i-PI prints at a step was evaluated at that step's potential or
field, in the first part of a run and after a restart alike.

i-PI tells its drivers no time. Inside i-PI (``<ffdirect>``) its own step is read. A driver behind a socket counts the
structures it evaluates, from a first step that ``voltpi run`` gives it (key ``clock``); for that it must be the only
driver, be asked once a step and bead, and never be asked twice. Whatever breaks this is refused by ``refusals``, or by
the driver itself: batches over sockets, which i-PI fills up with copies; a second connection, which begins in the
middle of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from voltpi.driver.ipi_input import DirectForceField, RunInput, SocketForceField
from voltpi.driver.settings import Clock, Cyclic, Ramp, Schedule, Settings, Square, Table
from voltpi.potential.errors import InputError, VoltPIError

if TYPE_CHECKING:
    from voltpi.driver.evaluator import Evaluator, Result

__all__ = [
    "Scheduled",
    "Steps",
    "applied_at",
    "clock_settings",
    "extreme_times",
    "outside_at",
    "refusals",
    "refuse_later",
    "settings_at",
    "value_at",
]

Array = NDArray[np.float64]

# of a period: a step at which a square wave jumps is not to be missed by rounding
_ROUNDING = 1e-9


def value_at(value: float | Schedule, time: float) -> float:
    """V or V/Å at ``time`` (ps)."""
    if not isinstance(value, Schedule):
        return value
    shape = value.ramp or value.square or value.cyclic or value.table
    match shape:
        case Ramp():
            distance = min(shape.rate * time, abs(shape.until - shape.start))
            return shape.start + math.copysign(distance, shape.until - shape.start)
        case Square():
            return shape.high if math.floor(2 * time / shape.period + _ROUNDING) % 2 else shape.low
        case Cyclic():
            width = shape.high - shape.low
            begun = 0.0 if shape.start is None else shape.start - shape.low
            along = (begun + shape.rate * time) % (2 * width)
            return shape.low + min(along, 2 * width - along)
        case Table():
            return float(np.interp(time, shape.times, shape.values))
    raise AssertionError("a schedule has one shape")


def settings_at(settings: Settings, time: float = 0.0) -> Settings:
    """The settings with what acts at that time (ps): nothing in them changes any more, and there is no clock."""
    electrodes = tuple(
        e if e.potential is None else e.model_copy(update={"potential": value_at(e.potential, time)})
        for e in settings.electrodes
    )
    update: dict[str, Any] = {"electrodes": electrodes, "clock": None}
    if settings.field != "from-frame":
        update["field"] = tuple(value_at(component, time) for component in settings.field)
    if settings.displacement is not None:
        update["displacement"] = tuple(None if d is None else value_at(d, time) for d in settings.displacement)
    return settings.model_copy(update=update)


def applied_at(settings: Settings, times: Array) -> Array:
    """What the electrodes are held at, [b, electrodes] (V or e), at ``times`` [b] (ps)."""
    return np.array([[e.value for e in settings_at(settings, float(time)).electrodes] for time in times], dtype=float)


def outside_at(settings: Settings, times: Array) -> dict[str, Array]:
    """What acts at ``times`` [b] (ps), as ``Evaluator.evaluate`` takes it.

    ``fields`` [b, 3] and ``displacements`` [b, 3] (V/Å, nan: a field) where they change, and ``applied`` [b,
    electrodes] (V or e) where there are electrodes.
    """
    now = [settings_at(settings, float(time)) for time in times]
    out: dict[str, Array] = {}
    if settings.electrodes:
        out["applied"] = applied_at(settings, times)
    if any(key.startswith("field") for key in settings.scheduled):
        out["fields"] = np.array([s.field for s in now], dtype=float)
    if any(key.startswith("displacement") for key in settings.scheduled):
        out["displacements"] = np.array([s.displacement for s in now], dtype=float)  # None is nan
    return out


def extreme_times(settings: Settings) -> list[float]:
    """Times (ps) at which a voltage, or a component of field or displacement, is largest in size, but for the start."""
    values = [e.potential for e in settings.electrodes]
    for components in (settings.field, settings.displacement):
        values += [] if components is None or components == "from-frame" else components
    times = set()
    for value in values:
        if isinstance(value, Schedule):
            turns = _turns(value)
            sizes = [abs(value_at(value, time)) for time in turns]
            times.add(turns[sizes.index(max(sizes))])  # the first of equals: the start, if that is one
    return sorted(times - {0.0})


def _turns(value: Schedule) -> list[float]:
    """Times (ps), the start first, between which a value is monotonic or constant."""
    shape = value.ramp or value.square or value.cyclic or value.table
    match shape:
        case Ramp():
            return [0.0, abs(shape.until - shape.start) / shape.rate]
        case Square():
            return [0.0, shape.period / 2]
        case Cyclic():
            up = (shape.high - (shape.low if shape.start is None else shape.start)) / shape.rate
            return [0.0, up, up + (shape.high - shape.low) / shape.rate]
        case Table():
            return [0.0, *(time for time in shape.times if time > 0)]
    raise AssertionError("a schedule has one shape")


def refuse_later(evaluator: Evaluator, settings: Settings) -> None:
    """Raises InputError where the structure allows the field or displacement of the start but not a later one."""
    charges, prepared = evaluator.potential.charges, evaluator.prepared
    if charges is None:
        return
    for time in extreme_times(settings):
        outside = outside_at(settings, np.array([time]))
        for key, name in (("fields", "field"), ("displacements", "displacement")):
            if key in outside:
                prepared = prepared.replace(**{name: prepared.positions.new_tensor(outside[key])})
        try:
            charges.check_field(prepared)
        except InputError as error:
            key = "field" if settings.displacement is None else "displacement"
            raise settings.refusal(key, f"at {time:g} ps: {error}") from None


class Steps:
    """Which step each structure belongs to that i-PI hands over.

    Inside i-PI that is the step it is at; anywhere else structures are counted, as ``clock`` says.
    Raises VoltPIError (at the first structure) where there is neither, or both.
    """

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self._seen = 0
        self._first: int | None = None
        self._simulation: Any = None

    def of(self, b: int) -> NDArray[np.int64]:
        """Steps [b] of the next ``b`` structures; asking does not count."""
        simulation = self._inside()
        if simulation is not None and self._clock is not None:
            raise VoltPIError("clock is given in the settings but i-PI's own is read here; remove it")
        beads = _beads(simulation) if simulation is not None else self._counted().beads
        begun = (self._seen + np.arange(b)) // beads
        if simulation is None:
            return begun + self._counted().first_step
        # the first structures are those that the run starts from; afterwards i-PI is on its way to the next step
        now = max(int(simulation.step), 0)
        first = now if self._first is None else self._first
        return np.where(begun == 0, first, now + 1)

    def times(self, steps: NDArray[np.int64]) -> Array:
        """ps."""
        simulation = self._inside()
        timestep = self._counted().timestep if simulation is None else _timestep(simulation)
        return np.asarray(1e-3 * timestep * steps)

    def count(self, steps: NDArray[np.int64]) -> None:
        """These structures, of ``steps`` [b], were evaluated."""
        if self._first is None:
            self._first = int(steps[0])
        self._seen += len(steps)

    def _inside(self) -> Any:
        """i-PI's Simulation where this process is i-PI, else None; kept, as i-PI forgets it at its end."""
        self._simulation = self._simulation or _simulation()
        return self._simulation

    def _counted(self) -> Clock:
        if self._clock is None:
            raise VoltPIError(
                "a potential or field changes with time and this driver has no clock: start the run with `voltpi run`, "
                "or give --set clock.timestep=FS --set clock.first_step=N (of the RESTART; 0 at the start) --set "
                "clock.beads=P"
            )
        return self._clock


def _simulation() -> Any:
    """i-PI's Simulation, which has registered itself to be saved at a soft exit, or None."""
    from ipi.utils.softexit import softexit

    owners = (getattr(entry[0], "__self__", None) for entry in softexit.flist)
    return next((owner for owner in owners if hasattr(owner, "syslist") and hasattr(owner, "step")), None)


def _beads(simulation: Any) -> int:
    return int(simulation.syslist[0].beads.nbeads)


def _timestep(simulation: Any) -> float:
    """fs."""
    from ipi.utils.units import unit_to_user

    return float(unit_to_user("time", "femtosecond", simulation.syslist[0].motion.dt))


class Scheduled:
    """An evaluator whose electrodes' potentials or field change with time; extras say the ``step`` counted.

    Raises InputError as ``refuse_later`` does.
    """

    counts_structures = True

    def __init__(self, evaluator: Evaluator, settings: Settings) -> None:
        refuse_later(evaluator, settings)
        self._evaluator, self._settings = evaluator, settings
        self._steps = Steps(settings.clock)

    @property
    def n_atoms(self) -> int:
        """Atoms of the template."""
        return self._evaluator.n_atoms

    def evaluate(self, cells: Array, positions: Array, replicas: Sequence[int] | None = None) -> list[Result]:
        """As ``Evaluator.evaluate``, each structure at what acts at its step. Raises as that does."""
        steps = self._steps.of(len(positions))
        outside = outside_at(self._settings, self._steps.times(steps))
        results = self._evaluator.evaluate(cells, positions, replicas, **outside)
        self._steps.count(steps)
        return [r._replace(extras={**r.extras, "step": int(step)}) for r, step in zip(results, steps, strict=True)]


def clock_settings(plan: RunInput) -> list[str]:
    """What a driver of this run must be told, as ``key=value`` assignments of the settings."""
    return [
        f"clock.timestep={plan.timestep!r}",
        f"clock.first_step={plan.first_step}",
        f"clock.beads={plan.n_beads}",
    ]


def refusals(plan: RunInput, ff: SocketForceField | DirectForceField, settings: Settings) -> Iterator[str]:
    """Why potentials and fields cannot follow the time in this run, each with its fix."""
    if not settings.scheduled:
        return
    key = settings.scheduled[0]
    if settings.clock is not None:
        yield f"clock is filled in from the input by `voltpi run`, and {key} would follow another; remove it"
    if isinstance(ff, SocketForceField) and ff.batch_size > 1:
        yield (
            f"<batch_size> {ff.batch_size}: i-PI fills batches up with copies over sockets, and a driver that counts "
            f"steps for {key} would count them; use <batch_size>1</batch_size>, or <ffdirect>"
        )
    yield from once_a_step(plan, ff, f"{key} changes with time")
    if plan.timestep is None:
        yield f"{key} changes with time but <timestep> is missing or no number; add it to <dynamics>"
    elif plan.time is not None and abs(plan.time - plan.first_step * plan.timestep) > 0.5 * plan.timestep:
        yield (
            f"{key} changes with time, which is step x timestep, but the checkpoint is at step {plan.first_step} and "
            f"{plan.time:g} fs, so <timestep> {plan.timestep:g} fs is not that of the first part; keep the timestep, "
            "or start anew"
        )


def once_a_step(plan: RunInput, ff: SocketForceField | DirectForceField, why: str) -> Iterator[str]:
    """Where i-PI would not evaluate this forcefield once a step and bead."""
    if plan.n_systems != 1 or plan.moves_systems:
        yield f"{why}, which needs one <system> and no <smotion>; run the systems one by one"
    for motion in plan.motions:
        if motion.mode != "dynamics" or motion.dynamics not in ("nve", "nvt", "npt", "nst"):
            mode = f"<dynamics mode='{motion.dynamics}'>" if motion.dynamics else f"<motion mode='{motion.mode}'>"
            yield f"{why}, which needs one evaluation a step, but {mode} may ask for more; use nve, nvt, npt or nst"
        if motion.multiple_steps:
            yield f"{why}, which needs one evaluation a step, but <nmts> asks for several; remove it"
    if len(plan.motions) > 1:
        yield f"{why}, which needs a single <motion>; remove the others"
    own = [force for force in plan.forces if force.forcefield == ff.name]
    contracted = [force.n_beads for force in own if force.n_beads not in (0, plan.n_beads)]
    if len(own) > 1:
        yield f"{why}, which needs one evaluation a step, but {len(own)} <force> tags ask for it; keep one"
    if contracted:
        yield (
            f"{why}, which needs every bead, but <force nbeads='{contracted[0]}'> evaluates {contracted[0]} of "
            f"{plan.n_beads}; remove that nbeads"
        )
