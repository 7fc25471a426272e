"""A run as a file for chemiscope (chemiscope.org): structures to turn, properties to plot against each other.

    G. Fraux, R. K. Cersonsky, M. Ceriotti, J. Open Source Softw. 5, 2117 (2020)

The format is JSON (chemiscope.org/docs, "Input file format"), written here: the package of that name brings a
notebook's widgets along, and is not needed. One structure is one frame; each has its properties (time, what the
properties file says, volume, dipole, field), each atom its own (charge, shell displacement, force, Born charge). What
is a vector is an arrow as well.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from voltpi.analysis.charges_of import charges_of
from voltpi.analysis.ipi_files import Properties, convert, iter_extras, read_forces
from voltpi.analysis.polarization import E_PER_A2
from voltpi.analysis.runs import Run
from voltpi.analysis.trajectory import frames_of
from voltpi.potential.errors import InputError

__all__ = ["Collected", "collect", "content_of", "write_chemiscope"]

Array = NDArray[np.float64]

_ENVIRONMENT = 3.5  # Å, the sphere drawn around an atom that is picked
_ARROW = {"baseRadius": 0.06, "headRadius": 0.12, "headLength": 0.2}
_LONGEST = 2.0  # Å, to which the longest arrow of a kind is scaled
_STEP = re.compile(r"Step:\s*(\d+)")
_SHOWN = ("dipole", "field", "charges", "shells", "BEC")
_FAMILIES = {  # of the columns of a properties file, and the unit that they are shown in
    "time": ("time", "femtosecond", "fs"),
    "temperature": ("temperature", "kelvin", "K"),
    "potential": ("energy", "electronvolt", "eV"),
    "conserved": ("energy", "electronvolt", "eV"),
    "kinetic_md": ("energy", "electronvolt", "eV"),
    "kinetic_cv": ("energy", "electronvolt", "eV"),
    "pressure_md": ("pressure", "megapascal", "MPa"),
    "pressure_cv": ("pressure", "megapascal", "MPa"),
}


@dataclass
class Collected:
    """Frames of one bead with what is known about them.

    structures: property name -> (values [f], unit, description) · atoms: name -> (values [f, n], unit, description) ·
    arrows: name -> (vectors [f, n, 3], unit) of atoms, or (vectors [f, 1, 3], unit) of structures
    """

    steps: list[int]
    frames: list[Atoms]
    structures: dict[str, tuple[Array, str, str]] = field(default_factory=dict)
    atoms: dict[str, tuple[Array, str, str]] = field(default_factory=dict)
    arrows: dict[str, tuple[Array, str]] = field(default_factory=dict)


def collect(run: Run, *, frames: int = 200, skip: float = 0.0, bead: int = 0, charges: str | None = None) -> Collected:
    """``frames`` frames or fewer, evenly spread over a run, with all that was written at their steps.

    Steps at which every output was written come first. ``bead``: of a ring polymer; ``charges``: a file
    (``voltpi.analysis.charges_of``). What was not written at one of the steps is left out. Raises InputError for a bead
    that is not there, or fewer than one frame.
    """
    if frames < 1:
        raise InputError(f"frames is {frames}: give the greatest number of frames, one or more")
    if not 0 <= bead < max(len(run.positions), 1):
        raise InputError(f"bead is {bead}: the run wrote positions of {len(run.positions)} beads, counted from 0")
    steps = _common([step for step, _ in frames_of(run, skip)], run)
    # as many as allowed at one and the same stride
    wanted = set(steps[:: max(1, -(-len(steps) // frames))])
    done = Collected([], [])
    for step, beads in frames_of(run, skip):
        if step in wanted:
            done.steps.append(step)
            done.frames.append(beads[bead])
    if len({len(atoms) for atoms in done.frames}) > 1:
        raise InputError(f"{run.positions[bead]}: the number of atoms changes; give a trajectory of one system")
    _structure_properties(run, done, bead)
    _atom_properties(run, done, bead, charges)
    return done


def _common(steps: list[int], run: Run) -> list[int]:
    """Those of ``steps`` at which the other outputs were written as well, as far as there are any."""
    tables = [] if run.properties is None else [{int(step) for step in run.properties.get("step")}]
    files = [files[0] for name, files in run.extras.items() if name in _SHOWN] + [*run.forces[:1]]
    for written in [*tables, *(_written(path) for path in files)]:
        steps = [step for step in steps if step in written] or steps
    return steps


def _written(path: Path) -> set[int]:
    """Steps of a file of extras or a trajectory."""
    with path.open() as file:
        return {int(match[1]) for match in map(_STEP.search, file) if match}


def _structure_properties(run: Run, done: Collected, bead: int) -> None:
    steps = np.array(done.steps)
    done.structures["step"] = (steps.astype(float), "", "step of i-PI")
    done.structures["time"] = (run.times(steps), "fs", "time")
    if run.properties is not None:
        for name, values, unit in _columns(run.properties, steps):
            done.structures[name] = (values, unit, f"{name} as in {run.properties.path.name}")
    volume = np.array([abs(float(np.linalg.det(np.asarray(atoms.cell)))) for atoms in done.frames])
    periodic = bool(np.all([atoms.pbc.all() for atoms in done.frames]))
    if periodic:
        done.structures["volume"] = (volume, "Å^3", "volume of the cell")
    dipole = _at(run.extras.get("dipole", ()), bead, done.steps)
    if dipole is not None and dipole.shape[1:] == (3,):
        dipole = convert(dipole, "length", "atomic_unit", "angstrom")
        for k, axis in enumerate("xyz"):
            done.structures[f"dipole_{axis}"] = (dipole[:, k], "eÅ", "dipole of the cell, as the driver sent it")
            if periodic:
                done.structures[f"polarization_{axis}"] = (
                    dipole[:, k] / volume * E_PER_A2,
                    "C/m^2",
                    "dipole per volume",
                )
        done.arrows["dipole"] = (dipole[:, None], "eÅ")
    applied = _at(run.extras.get("field", ()), bead, done.steps)
    if applied is not None and applied.shape[1:] == (3,):
        # hartree/(e bohr)
        applied = convert(applied, "energy", "atomic_unit", "electronvolt") / convert(
            1.0, "length", "atomic_unit", "angstrom"
        )
        for k, axis in enumerate("xyz"):
            done.structures[f"field_{axis}"] = (applied[:, k], "V/Å", "field that acts")


def _columns(table: Properties, steps: NDArray[np.int64]) -> Iterator[tuple[str, Array, str]]:
    """Scalar columns at ``steps``, those that have a row for each of them."""
    rows = {int(step): k for k, step in enumerate(table.get("step"))}
    if not all(int(step) in rows for step in steps):
        return
    picked = [rows[int(step)] for step in steps]
    for name, values in table.columns.items():
        if name in ("step", "time") or values.ndim != 1:
            continue
        family, to, unit = _FAMILIES.get(name, ("", "", table.units[name]))
        yield name, (table.get(name, family, to) if to else values)[picked], unit


def _atom_properties(run: Run, done: Collected, bead: int, given: str | None) -> None:
    n = len(done.frames[0])
    try:
        source = charges_of(run, given, bead=bead)
        charges = [source.at(step, n) for step in done.steps]
    except InputError:
        if given is not None:
            raise
        charges = [None]
    known = [q for q in charges if q is not None]
    if len(known) == len(done.steps):
        done.atoms["charge"] = (np.array(known), "e", source.source)
    shells = _at(run.extras.get("shells", ()), bead, done.steps)
    if shells is not None and shells.shape[1:] == (n, 3):
        shells = convert(shells, "length", "atomic_unit", "angstrom")
        done.atoms["shell"] = (np.linalg.norm(shells, axis=2), "Å", "length of the shell's displacement")
        done.arrows["shell"] = (shells, "Å")
    if len(run.forces) > bead:
        found = {frame.step: frame.values for frame in read_forces(run.forces[bead])}
        if all(step in found for step in done.steps):
            forces = np.array([found[step] for step in done.steps])
            done.atoms["force"] = (np.linalg.norm(forces, axis=2), "eV/Å", "length of the force")
            done.arrows["force"] = (forces, "eV/Å")
    born = _at(run.extras.get("BEC", ()), bead, done.steps)
    if born is not None and born.shape[1:] == (3 * n, 3):
        z = born.reshape(len(done.steps), n, 3, 3)
        done.atoms["born"] = (np.trace(z, axis1=2, axis2=3) / 3.0, "e", "a third of the Born charge's trace")
        for k, axis in enumerate("xyz"):
            done.atoms[f"born_{axis}{axis}"] = (z[:, :, k, k], "e", f"Born charge, dipole and motion along {axis}")


def _at(files: tuple[Path, ...], bead: int, steps: list[int]) -> Array | None:
    """Extras [f, …] at ``steps``; None where one of them lacks."""
    if not files:
        return None
    wanted = set(steps)
    found = {step: values for step, values in iter_extras(files[min(bead, len(files) - 1)]) if step in wanted}
    return np.array([found[step] for step in steps]) if len(found) == len(wanted) else None


def write_chemiscope(done: Collected, path: Path, name: str, description: str) -> Path:
    """Writes ``path``, gzipped JSON."""
    content = content_of(done, name, description)
    with gzip.GzipFile(path, "wb", mtime=0) as file:  # the same run, the same bytes
        file.write(json.dumps(content, allow_nan=False, separators=(",", ":")).encode())
    return path


def content_of(done: Collected, name: str, description: str) -> dict[str, Any]:
    """The file's content."""
    properties = {
        key: {"target": "structure", "values": _numbers(values), "units": unit, "description": text}
        for key, (values, unit, text) in done.structures.items()
    } | {
        key: {"target": "atom", "values": _numbers(values.ravel()), "units": unit, "description": text}
        for key, (values, unit, text) in done.atoms.items()
    }
    usable = {k: v for k, v in properties.items() if None not in v["values"]}
    energies = [key for key in ("potential", "temperature", "volume", "step") if key in usable]
    return {
        "meta": {"name": name, "description": description},
        "settings": {
            "target": "structure",
            "map": {"x": {"property": "time"}, "y": {"property": energies[0]}},
            "structure": [{"unitCell": True, "keepOrientation": True, "playbackDelay": 50}],
        },
        "structures": [_structure(atoms) for atoms in done.frames],
        "properties": usable,
        "environments": [
            {"structure": k, "center": atom, "cutoff": _ENVIRONMENT}
            for k, atoms in enumerate(done.frames)
            for atom in range(len(atoms))
        ],
    } | ({"shapes": {key: _arrows(*value) for key, value in done.arrows.items()}} if done.arrows else {})


def _structure(atoms: Atoms) -> dict[str, Any]:
    wrapped = atoms.copy()
    wrapped.wrap()
    x, y, z = wrapped.positions.T
    content = {"size": len(atoms), "names": list(atoms.symbols), "x": _numbers(x), "y": _numbers(y), "z": _numbers(z)}
    return content | ({"cell": _numbers(np.asarray(atoms.cell).ravel())} if atoms.pbc.any() else {})


def _arrows(vectors: Array, unit: str) -> dict[str, Any]:
    longest = float(np.linalg.norm(vectors, axis=2).max())
    scale = _LONGEST / longest if longest > 0.0 else 1.0
    each = [{"vector": _numbers(v)} for v in (scale * vectors).reshape(-1, 3)]
    where = "structure" if vectors.shape[1] == 1 else "atom"
    return {"kind": "arrow", "parameters": {"global": dict(_ARROW), where: each}}


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Six significant digits; None for what is not finite."""
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in values]
