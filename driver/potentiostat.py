"""The charge on two electrodes as one more degree of freedom, which i-PI integrates and thermostats.

A charge n on the second electrode, and −n on the first, moves in the potential of mean force that the voltage ψ (second
against first) and everything else give it (Bonnet, Morishita, Sugino & Otani, Phys. Rev. Lett. 109, 266101 (2012)):

    H = Σ p²/2m + p_n²/2M + E(R, n) − ψ n,        force on n: −(∂E/∂n − ψ) = ψ − (ψ_second − ψ_first)

with E(R, n) the energy at constant charge. To i-PI n is the x coordinate, n·scale, of one more atom, the last one: a
*ghost* with the label ``X``, at y = z = 0. The canonical ensemble has ⟨ψ_second − ψ_first⟩ = ψ and, where E is
quadratic in n, var n = kT C, with C the capacitance.

i-PI knows nothing of this, and its input must say so (``refusals`` names what is missing):

    <masses mode='manual' index='N' units='dalton'> [M] </masses>     ``X`` weighs one electron otherwise
    <fixcom> False </fixcom>                                          the centre of mass would tie n to the atoms
    <fixatoms_dof> [3N+1, 3N+2] </fixatoms_dof>                       its y and z; frozen atoms are listed here too
    a thermostat of each degree of freedom (langevin, pile_l, …), or none

with N the number of atoms before it. M sets how fast the charge moves: with the ions held, its period is
2π·scale·√(M C) (``period``).

Path integrals: every bead has an x of its own. A ring polymer of charges is a quantum particle, which a charge on a
battery is not: its variance is larger by ħω/(2kT)·coth(ħω/(2kT)). There are two ways out. ``beads: P`` (the number of
beads): all beads are evaluated at the mean of their charges, and the ghosts share the mean force, so that the charge is
classical whatever its mass; the whole ring polymer must come in one batch (``<ffdirect>``). Or ``beads: 1`` (default)
with M so heavy that ħω ≪ kT, which ``voltpi check`` looks after. Either way the extras of a bead hold its own
coordinate as ``potentiostat_charge``, and what it was evaluated at in ``electrode_charges``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from voltpi.driver.evaluator import BOHR, HARTREE, Evaluator, Result
from voltpi.driver.ipi_input import DirectForceField, RunInput, SocketForceField
from voltpi.driver.schedule import (
    Scheduled,
    Steps,
    applied_at,
    once_a_step,
    outside_at,
    refuse_later,
    settings_at,
    value_at,
)
from voltpi.driver.settings import Settings
from voltpi.potential.errors import InputError, VoltPIError

__all__ = ["Potentiostat", "describe_ghost", "period", "refusals", "run_evaluator", "settings_of", "without_ghost"]

Array = NDArray[np.float64]

# fs, √(amu Å²/eV)
_TIME_UNIT = 10.180505717871193
_HBAR = 0.6582119569  # eV fs
_KELVIN = 8.617333262e-5  # eV
# e; small enough for any capacitor, large beside the error of a potential
_STEP = 1e-2
_GLOBAL_THERMOSTATS = ("svr", "pile_g", "nm_gle_g")
# of a variance; a quantum charge may have so much more than a classical one
_QUANTUM = 0.01
_SHORTEST_PERIOD = 20  # timesteps: velocity Verlet then has its variance right to 2.5%
_FEWEST_PERIODS = 20  # in a run


def run_evaluator(settings: Settings, template: Atoms) -> Evaluator | Scheduled | Potentiostat:
    """What answers i-PI, as the settings say: with a potentiostat, with potentials that change with time, or plain.

    Raises InputError as ``Evaluator.from_settings`` does, and for a template without the potentiostat's ghost.
    """
    if settings.potentiostat is not None:
        return Potentiostat(settings, template)
    if settings.scheduled:
        return Scheduled(Evaluator.from_settings(settings_at(settings), template), settings)
    return Evaluator.from_settings(settings, template)


def without_ghost(template: Atoms, settings: Settings) -> Atoms:
    """The atoms of a structure file for a potentiostat: all but the last.

    Raises InputError where the last one is no ``X`` on the x axis.
    """
    if template.numbers[-1] != 0:
        raise settings.refusal(
            "potentiostat",
            "potentiostat: the last atom of the start structure is the electrodes' charge, with the label X, but here "
            f"it is {template.symbols[-1]}; add a line 'X x 0 0', with x the charge (e) times potentiostat.scale (Å/e)",
        )
    if np.any(template.positions[-1, 1:] != 0):
        y, z = template.positions[-1, 1:]
        raise InputError(f"the potentiostat's X is at y = {y:g} and z = {z:g} Å; put it at y = z = 0")
    atoms = template[:-1]
    for name, value in ({} if template.calc is None else template.calc.results).items():
        if np.shape(value)[:1] == (len(template),) and name not in atoms.arrays:
            atoms.set_array(name, np.asarray(value)[:-1])  # ASE takes a column like `charges` for results
    return atoms


def settings_of(settings: Settings, template: Atoms) -> Settings:
    """The settings of a single structure of the run, the start: its charge on the electrodes, and no potentiostat."""
    own = settings.potentiostat
    assert own is not None
    n = template.positions[-1, 0] / own.scale
    charges = dict(zip(own.electrodes, (-n, n), strict=True))
    fixed = settings_at(settings)
    electrodes = [e.model_copy(update={"charge": charges.get(e.name, e.charge)}) for e in fixed.electrodes]
    return fixed.model_copy(update={"electrodes": tuple(electrodes), "potentiostat": None})


class Potentiostat:
    """Evaluates structures whose last atom is the electrodes' charge.

    ``template``: the start structure, ``X`` last. Raises InputError as ``run_evaluator`` says.

    Extras are those of the atoms, with zeros for the ghost in whatever has one entry an atom, and
    ``potentiostat_charge`` (e, the bead's own coordinate), ``potentiostat_target`` (hartree/e, what the electrodes'
    potentials ought to differ by) and, where a potential changes with time, ``step``.
    """

    def __init__(self, settings: Settings, template: Atoms) -> None:
        assert settings.potentiostat is not None
        self._settings, self._own = settings, settings.potentiostat
        atoms = without_ghost(template, settings)
        self.evaluator = Evaluator.from_settings(settings_of(settings, template), atoms)
        refuse_later(self.evaluator, settings)
        names = [e.name for e in settings.electrodes]
        self._first, self._second = (names.index(name) for name in self._own.electrodes)
        self._steps = Steps(settings.clock) if settings.scheduled else None

    @property
    def counts_structures(self) -> bool:
        """Whether a batch must hold each structure once."""
        return self._steps is not None or self._own.beads > 1

    @property
    def n_atoms(self) -> int:
        """Atoms of the template, the ghost among them."""
        return self.evaluator.n_atoms + 1

    def evaluate(self, cells: Array, positions: Array, replicas: Sequence[int] | None = None) -> list[Result]:
        """As ``Evaluator.evaluate``: energy E − ψ n, its forces, and its virial as i-PI scales the ghost with the cell.

        Raises as that does, and VoltPIError for a batch that does not hold whole ring polymers.
        """
        positions = np.asarray(positions, dtype=float)
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise InputError(
                f"positions have shape {positions.shape} but the template has {self.n_atoms} atoms, the potentiostat's "
                "X among them: give the structure file that the run was started from"
            )
        b, beads = len(positions), self._own.beads
        if b % beads:
            raise VoltPIError(
                f"potentiostat.beads is {beads} but a batch of {b} came: all beads share one charge, so they must come "
                f"together; use <ffdirect> with <batch_size>{beads}</batch_size>"
            )
        own = positions[:, -1, 0] * BOHR / self._own.scale
        if not np.isfinite(own).all():
            raise VoltPIError("the potentiostat's charge is not finite: the run has exploded; use a shorter timestep")
        n = _mean(own, beads)
        steps = None if self._steps is None else self._steps.of(b)
        times = np.zeros(b) if self._steps is None or steps is None else self._steps.times(steps)
        target = np.array([value_at(self._own.potential, float(time)) for time in times]) / HARTREE
        outside = outside_at(self._settings, times)
        applied = outside["applied"]
        applied[:, self._first] = -n
        applied[:, self._second] = n
        results = self.evaluator.evaluate(cells, positions[:, :-1], replicas, **outside)
        potentials = np.array([r.extras["electrode_potentials"] for r in results])
        push = _mean(target - (potentials[:, self._second] - potentials[:, self._first]), beads)
        out = [self._with_ghost(r, *values) for r, *values in zip(results, own, n, target, push, strict=True)]
        if self._steps is not None and steps is not None:
            self._steps.count(steps)
            for result, step in zip(out, steps, strict=True):
                result.extras["step"] = int(step)
        return out

    def capacitance(self, cell: Array, positions: Array) -> float:
        """dn/dψ (e/V) with all atoms held, at a structure's charge: cell [3, 3] (Å, rows), positions [n, 3] (Å)."""
        n = positions[-1, 0] / self._own.scale
        applied = applied_at(self._settings, np.zeros(2))
        applied[:, self._second] = n + np.array([-_STEP, _STEP])
        applied[:, self._first] = -applied[:, self._second]
        pair = np.repeat(positions[None, :-1], 2, axis=0)
        response = self.evaluator.evaluate_systems(np.repeat(cell[None], 2, axis=0), pair, applied=applied)
        first, second = (response.electrodes[name]["potential"] for name in self._own.electrodes)
        low, high = (second - first).tolist()
        return 2 * _STEP / (high - low)

    def _with_ghost(self, result: Result, own: float, n: float, target: float, push: float) -> Result:
        scale = self._own.scale / BOHR  # bohr/e
        ghost = push / scale
        virial = result.virial.copy()
        virial[0, 0] += own * scale * ghost  # i-PI scales x with the cell as if it were a length
        extras = {key: _one_more(key, value, self.evaluator.n_atoms) for key, value in result.extras.items()}
        _add_to_members(extras, result, energy=-target * n, force=ghost, virial=own * scale * ghost)
        extras |= {"potentiostat_charge": float(own), "potentiostat_target": float(target)}
        return Result(
            energy=result.energy - target * n,
            forces=np.vstack([result.forces, [ghost, 0.0, 0.0]]),
            virial=virial,
            extras=extras,
        )


def _mean(values: Array, beads: int) -> Array:
    """Each value [b] replaced by the mean over its ring polymer of so many beads."""
    return np.repeat(values.reshape(-1, beads).mean(axis=1), beads)


def _one_more(key: str, value: object, n_atoms: int) -> object:
    """Extras that have one entry (``BEC``: three) an atom, with zeros for the ghost."""
    rows = {"charges": 1, "shells": 1, "BEC": 3, "forces_uncertainty": 1}.get(key, 0)
    if not rows:
        return value
    array = np.asarray(value)
    return np.concatenate([array, np.zeros((rows, *array.shape[1:]))]).tolist()


def _add_to_members(extras: dict[str, Any], result: Result, *, energy: float, force: float, virial: float) -> None:
    """What the ghost adds to the answer of every member of a committee: they share the charges."""
    for key, change in (("committee_pot", energy), ("committee_virial", np.eye(1, 9)[0] * virial)):
        if key in result.extras:
            extras[key] = (np.asarray(result.extras[key]) + change).tolist()
    if "committee_force" in result.extras:
        extras["committee_force"] = [[*own, force, 0.0, 0.0] for own in result.extras["committee_force"]]


def period(capacitance: float, mass: float, scale: float) -> float:
    """Period (fs) of the charge with the atoms held: 2π·scale·√(M C) of e/V, amu, Å/e."""
    return 2 * math.pi * _TIME_UNIT * scale * math.sqrt(mass * capacitance)


def describe_ghost(plan: RunInput, settings: Settings, capacitance: float, mass: float) -> tuple[bool, str]:
    """Whether a ghost of this mass (amu) is right for the run, and a sentence on it, with a better one."""
    assert settings.potentiostat is not None
    scale, beads = settings.potentiostat.scale, plan.n_beads
    held = f"the capacitance at the start, with all atoms held, is {capacitance:.5g} e/V"
    if not capacitance > 0:
        return False, f"{held}, where no charge is stable; check that potentiostat.electrodes are two plates"
    fs = period(capacitance, mass, scale)
    now = f"{held}, and the potentiostat's charge of {mass:g} amu has a period of {fs:.3g} fs"
    shortest = 0.0
    why = ""
    if plan.timestep is not None:
        shortest, why = _SHORTEST_PERIOD * plan.timestep, f"too short for a timestep of {plan.timestep:g} fs"
    if beads > 1 and settings.potentiostat.beads == 1 and plan.temperature:
        kt = _KELVIN * plan.temperature
        # (y/2) coth(y/2) = 1 + y²/12 …, y = ħω/kT
        classical = 2 * math.pi * _HBAR / (kt * math.sqrt(12 * _QUANTUM))
        if classical > shortest:
            y = 2 * math.pi * _HBAR / (fs * kt)
            excess = y / 2 / math.tanh(y / 2) - 1
            why = f"so that path integrals make its variance {100 * excess:.1f}% too large"
            shortest = classical
    heavy = mass * (shortest / fs) ** 2
    if fs < shortest:
        other = " (or potentiostat.beads)" if beads > 1 and settings.potentiostat.beads == 1 else ""
        return False, f"{now}, {why}; use {_round_up(heavy):g} amu or more{other}"
    if plan.timestep is not None:
        longest = plan.steps * plan.timestep / _FEWEST_PERIODS
        if fs > max(longest, 2 * shortest):
            light = max(mass * (longest / fs) ** 2, 4 * heavy)
            length = 1e-3 * plan.steps * plan.timestep
            return True, f"hint: {now}, slow for a run of {length:g} ps; try {_round_up(light):g} amu, or run longer"
    return True, now


def _round_up(value: float) -> float:
    """To two digits."""
    power = 10 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / power - 1e-9) * power


def refusals(
    plan: RunInput, ff: SocketForceField | DirectForceField, settings: Settings, template: Atoms
) -> Iterator[str]:
    """What i-PI would do to the ghost that it must not, each with its fix."""
    if settings.potentiostat is None:
        return
    try:
        without_ghost(template, settings)
    except InputError as error:
        yield str(error)
        return
    ghost = len(template) - 1
    if ff.wraps:
        yield f"pbc='True' would fold the potentiostat's charge (atom {ghost}) into the cell; remove it"
    yield from once_a_step(plan, ff, "potentiostat")
    for motion in plan.motions:
        if motion.fixes_com:
            yield (
                "<fixcom> is True (as it is where it is not given), which ties the potentiostat's charge to the atoms' "
                "momentum; write <fixcom>False</fixcom> into <motion>"
            )
        if motion.fixed_atoms:
            yield (
                "<fixatoms> excludes <fixatoms_dof>, which the potentiostat needs; list there the degrees of freedom "
                f"3·atom, 3·atom+1, 3·atom+2 of frozen atoms, and {3 * ghost + 1} and {3 * ghost + 2}"
            )
        elif missing := sorted({3 * ghost + 1, 3 * ghost + 2} - motion.fixed_dofs):
            yield (
                f"the potentiostat's X (atom {ghost}) moves along x only, but its degrees of freedom "
                f"{' and '.join(map(str, missing))} (y, z) are free; add them to <fixatoms_dof>"
            )
        if 3 * ghost in motion.fixed_dofs:
            yield f"<fixatoms_dof> holds {3 * ghost}, the potentiostat's charge itself; remove it"
        if motion.dynamics != "nve" and motion.thermostats and set(motion.thermostats) <= set(_GLOBAL_THERMOSTATS):
            yield (
                f"<thermostat mode='{motion.thermostats[0]}'> scales all momenta alike and does not thermalize the "
                "potentiostat's charge; use langevin (one bead), pile_l or gle"
            )
    if plan.mass(ghost) is None:
        yield (
            f"the potentiostat's X (atom {ghost}) would weigh one electron; add <masses mode='manual' index='{ghost}' "
            "units='dalton'> [100] </masses> to <initialize> (`voltpi check` says which mass is good)"
        )
    if plan.barostat is not None and plan.n_beads > 1:
        yield "a barostat together with path integrals is not defined for the potentiostat; use <dynamics mode='nvt'>"
    yield from _shared_charge(plan, ff, settings.potentiostat.beads)


def _shared_charge(plan: RunInput, ff: SocketForceField | DirectForceField, beads: int) -> Iterator[str]:
    if beads == 1:
        return
    if beads != plan.n_beads:
        yield f"potentiostat.beads is {beads} but the run has nbeads='{plan.n_beads}'; make them equal"
    elif isinstance(ff, SocketForceField) or ff.threaded or ff.batch_size != beads:
        yield (
            f"potentiostat.beads: all {beads} beads share one charge and must come together; use <ffdirect> (not "
            f"threaded) with <batch_size>{beads}</batch_size>, or potentiostat.beads: 1 with a heavy X"
        )
