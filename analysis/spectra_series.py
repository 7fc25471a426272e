"""Time series for spectra from the files of a run: dipole or charge current, polarizability, velocities.

Beads of a ring polymer are averaged, as centroid and ring-polymer dynamics ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase.data import atomic_masses
from numpy.typing import NDArray

from voltpi.analysis.charges_of import charges_of_beads
from voltpi.analysis.fields import Applied, applied_of
from voltpi.analysis.ipi_files import convert, iter_extras, read_extras, read_trajectory, read_velocities
from voltpi.analysis.molecules import molecules_of
from voltpi.analysis.polarization import Follower, polarization_of
from voltpi.analysis.run_inputs import ensemble_temperature, given_to_drivers
from voltpi.analysis.runs import Run, find_runs
from voltpi.analysis.spectra import LIGHT, Series
from voltpi.potential.errors import InputError

__all__ = [
    "SOURCES",
    "atom_velocities",
    "common_axes",
    "dipole_series",
    "free_axes",
    "masses_of",
    "polarizability_series",
    "sampling_cautions",
    "spectral_runs",
    "temperature_of",
]

Array = NDArray[np.float64]
Steps = NDArray[np.int64]

SOURCES = ("auto", "dipole", "current")
_FASTEST_HYDROGEN = 4200.0  # cm⁻¹, above every X–H stretch


def spectral_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs among ``paths``; which field they were done in is asked by ``common_axes`` alone."""
    return find_runs(list(paths), [0.0, 0.0, 0.0])


def free_axes(applied: Applied, where: str, what: str) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Cartesian axes [3] at a constant field, and a caution where these are not all.

    Along them M fluctuates as in tin-foil boundaries; at constant D the field that M makes pulls it back. Raises
    InputError where there is none; ``what``: the quantity that then has no formula.
    """
    free = ~(applied.held | applied.changing)
    if free.all():
        return free, ()
    if not free.any():
        raise InputError(
            f"{where}: {applied}: {what} takes an axis at constant field, and there is none; run with a constant field "
            "along one or more (displacement: null there)"
        )
    axes = ", ".join(axis for axis, kept in zip("xyz", free, strict=True) if kept)
    caution = (
        f"{where}: {applied}: {what} is that along {axes} alone, at constant field there; in an isotropic material it "
        "holds for all axes"
    )
    return free, (caution,)


def common_axes(runs: Sequence[Run], what: str) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """``free_axes`` of all runs together, from what their folders say. Raises InputError as it does."""
    common, cautions = np.ones(3, dtype=bool), list[str]()
    for run in runs:
        try:
            known = given_to_drivers(run.folder, run.outputs)
            applied = applied_of(run.folder, run.outputs) if known else Applied()
        except InputError as error:
            reason = str(error).split("; ")[0]
            cautions.append(f"whether an axis was at constant displacement is not known ({reason}): taken as none")
            continue
        free, more = free_axes(applied, str(run.folder), what)
        common &= free
        cautions += more
    if not common.any():
        raise InputError(f"{what}: these runs share no axis at constant field; analyse them one by one")
    return common, tuple(cautions)


def temperature_of(run: Run, skip: float, given: float | None) -> float:
    """K: the one ``given``, the mean of the run's ``temperature`` column, or that of its i-PI input.

    With several beads the input's first: their kinetic energy fluctuates much more. Raises InputError where none of
    the three is known.
    """
    if given is not None:
        if not given > 0.0:
            raise InputError(f"temperature is {given:g}: give a positive number in K")
        return given
    asked = ensemble_temperature(run.folder, run.outputs)
    if len(run.positions) > 1 and asked:
        return asked
    table = run.properties
    if table is not None and "temperature" in table.columns:
        kelvin, late = table.get("temperature", "temperature", "kelvin"), run.after(skip)
        kept = np.array([late(int(step)) for step in table.get("step")])
        return float(kelvin[kept if kept.any() else slice(None)].mean())
    if asked:
        return asked
    raise InputError(f"{run.folder}: nothing says the temperature; print temperature{{kelvin}} or give --temperature T")


def dipole_series(
    run: Run, source: str, *, skip: float, temperature: float, charges: str | None = None
) -> tuple[Series, float, int, str]:
    """M or Ṁ of a run in e·Å (per fs), the mean volume (Å³), the number of molecules and where it comes from.

    source : ``dipole``: M that the driver sent, or of charges and positions, on one continuous branch; ``current``:
        Ṁ_a = Σ_ib Z*_iab v_ib of the driver's Born charges, or charges, and velocities; ``auto``: the dipole where
        one was written, else the current, else charges and positions

    Raises InputError where files lack.
    """
    if source not in SOURCES:
        raise InputError(f"source is {source}: give one of {', '.join(SOURCES)}")
    sent = run.extras.get("dipole") and charges is None
    if source == "current" or (source == "auto" and not sent and run.velocities and "BEC" in run.extras):
        return _current(run, skip, temperature, charges)
    p = polarization_of(run, charges).after(skip)
    series = _series(run, p.steps, p.time, p.dipole, False, temperature)
    return series, float(p.volume.mean()), p.n_molecules, p.source


def _current(run: Run, skip: float, temperature: float, charges: str | None) -> tuple[Series, float, int, str]:
    if not run.velocities:
        raise InputError(f"{run.folder}: no velocities for the current; add <trajectory> velocities </trajectory>")
    born = run.extras.get("BEC", ()) if charges is None else ()
    if born and len(born) != len(run.velocities):
        raise InputError(
            f"{run.folder}: Born charges of {len(born)} beads but velocities of {len(run.velocities)}; "
            "print both for the same beads"
        )
    if born:
        beads = [_born_current(z, v) for z, v in zip(born, run.velocities, strict=True)]
        source = "Born charges and velocities"
    else:
        atoms = charges_of_beads(run, charges)
        if len(run.velocities) not in (1, len(atoms)):
            raise InputError(
                f"{run.folder}: charges of {len(atoms)} beads but velocities of {len(run.velocities)}; "
                "print both for the same beads"
            )
        beads = []
        for q, path in zip(atoms, run.velocities, strict=False):
            found = [(v.step, q.at(v.step, len(v.values)), v.values) for v in read_velocities(path)]
            kept = [(step, q_now @ v) for step, q_now, v in found if q_now is not None and step is not None]
            beads.append((np.array([step for step, _ in kept], dtype=np.int64), np.array([j for _, j in kept])))
        source = f"{atoms[0].source} and velocities"
    steps, current = _bead_mean(run, "velocities and charges", beads)
    kept_steps, time, current = _late(run, steps, current, skip)
    series = _series(run, kept_steps, time, current, True, temperature)
    volume, molecules = _box(run)
    return series, volume, molecules, source


def _born_current(born: Path, velocities: Path) -> tuple[Steps, Array]:
    """Steps [f] and Ṁ [f, 3] (e·Å/fs) of one bead."""
    steps, out = [], []
    charges = iter_extras(born)
    step, z = next(charges, (None, np.zeros(0)))
    for v in read_velocities(velocities):
        while step is not None and v.step is not None and step < v.step:
            step, z = next(charges, (None, z))
        if step is None:
            break
        if step != v.step:
            continue
        if z.shape != (v.values.size, 3):
            raise InputError(f"{born}: {len(z)} rows of Born charges but {velocities.name} has {len(v.values)} atoms")
        steps.append(step)
        out.append(v.values.ravel() @ z)
    return np.array(steps, dtype=np.int64), np.array(out)


def polarizability_series(run: Run, *, skip: float, temperature: float) -> Series:
    """Polarizability [f, 9] (Å³) of a run. Raises InputError when it wrote none."""
    files = run.extras.get("polarizability", ())
    if not files:
        raise InputError(
            f"{run.folder}: no polarizabilities; set output.polarizability: true and add "
            "<trajectory extra_type='polarizability'> extras </trajectory>"
        )
    beads = []
    for path in files:
        extras = read_extras(path)
        if extras.values.shape[1:] != (3, 3):
            raise InputError(f"{path}: a polarizability has the shape {extras.values.shape[1:]}, not (3, 3)")
        values = convert(convert(convert(extras.values, *_BOHR), *_BOHR), *_BOHR)  # bohr³ to Å³
        beads.append((extras.steps, values.reshape(-1, 9)))
    steps, values = _bead_mean(run, "polarizability", beads)
    kept, time, values = _late(run, steps, values, skip)
    return _series(run, kept, time, values, False, temperature)


_BOHR = ("length", "atomic_unit", "angstrom")


def atom_velocities(run: Run, *, skip: float, temperature: float) -> tuple[Series, NDArray[np.int64], str]:
    """Velocities [f, 3n] (Å/fs) or, where none were written, positions (Å) of the atoms; their numbers [n]; the source.

    Positions are followed across the faces of the cell. Raises InputError when the run wrote neither.
    """
    if run.velocities:
        numbers = next(read_velocities(run.velocities[0])).numbers
        beads = []
        for path in run.velocities:
            frames = [(v.step, v.values.ravel()) for v in read_velocities(path) if v.step is not None]
            beads.append((np.array([step for step, _ in frames], dtype=np.int64), np.array([v for _, v in frames])))
    elif run.positions:
        beads, numbers = [], np.zeros(0, dtype=np.int64)
        for path in run.positions:
            follow: Follower | None = None
            recorded: list[int] = []
            places: list[Array] = []
            for frame in read_trajectory(path):
                follow, numbers = follow or Follower(frame.atoms.pbc), frame.atoms.numbers
                if frame.step is not None:
                    recorded.append(frame.step)
                    places.append(follow(frame.atoms.positions, np.asarray(frame.atoms.cell)).ravel())
            beads.append((np.array(recorded, dtype=np.int64), np.array(places)))
    else:
        raise InputError(f"{run.folder}: no trajectory; add <trajectory> velocities </trajectory>")
    steps, values = _bead_mean(run, "the trajectory", beads)
    kept, time, values = _late(run, steps, values, skip)
    source = "velocities" if run.velocities else "differences of positions"
    return _series(run, kept, time, values, bool(run.velocities), temperature), numbers, source


def masses_of(numbers: NDArray[np.int64]) -> Array:
    """amu."""
    return np.asarray(atomic_masses[numbers], dtype=float)


def sampling_cautions(run: Run, nyquist: float) -> tuple[str, ...]:
    """What is wrong with the sampling of a run that has hydrogen."""
    numbers = _numbers(run)
    if numbers is None or 1 not in numbers or nyquist > _FASTEST_HYDROGEN:
        return ()
    return (
        f"{run.folder}: with hydrogen there are vibrations up to 4000 cm⁻¹, which fold down below the Nyquist "
        f"wavenumber of {nyquist:.4g} cm⁻¹: print at every {0.5 / (LIGHT * 2.0 * _FASTEST_HYDROGEN):.1f} fs",
    )


def _numbers(run: Run) -> NDArray[np.int64] | None:
    if run.positions:
        frame = next(read_trajectory(run.positions[0]), None)
        return None if frame is None else frame.atoms.numbers
    first = next(read_velocities(run.velocities[0]), None) if run.velocities else None
    return None if first is None else first.numbers


def _box(run: Run) -> tuple[float, int]:
    """Mean volume (Å³) and number of molecules."""
    if not run.positions:
        raise InputError(
            f"{run.folder}: no trajectory of positions, which gives the volume; add <trajectory> positions"
        )
    frames = read_trajectory(run.positions[0])
    first = next(frames, None)
    if first is None:
        raise InputError(f"{run.positions[0]}: no complete frame; let the run write at least one")
    volumes = [first.atoms.get_volume(), *(frame.atoms.get_volume() for frame in frames)]
    return float(np.mean(volumes)), int(molecules_of(first.atoms).max()) + 1


def _bead_mean(run: Run, what: str, beads: Sequence[tuple[Steps, Array]]) -> tuple[Steps, Array]:
    """Mean over beads at the steps that all of them have. Raises InputError without any."""
    common = beads[0][0]
    for steps, _ in beads[1:]:
        common = np.intersect1d(common, steps)
    if len(common) == 0:
        raise InputError(f"{run.folder}: {what} have no step in common; print them with one stride")
    return common, np.mean([values[np.isin(steps, common)] for steps, values in beads], axis=0)


def _late(run: Run, steps: Steps, values: Array, skip: float) -> tuple[Steps, Array, Array]:
    """Steps, times (fs) and values without the first ``skip`` fs."""
    time = run.times(steps)
    kept = time >= time[0] + skip
    if not kept.any():
        raise InputError(f"skip is {skip:g} fs but the run is {np.ptp(time):g} fs long: skip less")
    return steps[kept], time[kept], values[kept]


def _series(run: Run, steps: Steps, time: Array, values: Array, rates: bool, temperature: float) -> Series:
    """Raises InputError for fewer than eight records and for records that are not equally spaced."""
    if len(steps) < 8:
        raise InputError(
            f"{run.folder}: {len(steps)} records are no time series; let it run longer or print more often"
        )
    strides = np.diff(steps)
    if np.ptp(strides) != 0:
        gap = int(np.flatnonzero(strides != strides[0])[0])
        raise InputError(
            f"{run.folder}: records are not equally spaced: after step {steps[gap]} comes {steps[gap + 1]}; "
            "print with one stride, and skip what was printed with another"
        )
    spacing = float((time[-1] - time[0]) / (len(time) - 1))
    return Series(str(run.folder), values, spacing, rates, spacing / int(strides[0]), temperature)
