"""What i-PI writes: properties, trajectories (its own XYZ and extended XYZ) and extras, in Å, eV, e, fs and K.

Formats as i-PI 3.3 writes them (``ipi/engine/outputs.py``). A restarted run appends: where a step comes twice the later
record counts. A last record cut short by a killed run is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.io import iread
from ipi.utils.io.backends.io_xyz import read_xyz
from ipi.utils.units import unit_to_internal, unit_to_user
from numpy.typing import NDArray
from scipy import constants

from voltpi.potential.errors import InputError

__all__ = [
    "Extras",
    "Forces",
    "Frame",
    "Properties",
    "Vectors",
    "Velocities",
    "convert",
    "file_kind",
    "iter_extras",
    "read_extras",
    "read_forces",
    "read_properties",
    "read_trajectory",
    "read_vectors",
    "read_velocities",
]

Array = NDArray[np.float64]

_COLUMN = re.compile(r"#\s*(?:column|cols\.)\s+(\d+)(?:-(\d+))?\s*-->\s*([^\s:]+)")
_UNIT = re.compile(r"\{([^}]*)\}")
_EXTRAS = re.compile(r"^\s*#EXTRAS(?:_BIAS)?\(([^)]*)\)#\s*Step:\s*(\d+)")
_STEP = re.compile(r"Step:\s*(\d+)")
_QUANTITY = re.compile(r"(\w+)\{(\w+)\}\s+cell\{(\w+)\}")
# as i-PI writes them
_NAMES = {
    "positions": ("positions",),
    "velocities": ("velocities", "v_centroid"),
    "forces": ("forces",),
    "kinetic_cv": ("kinetic_cv",),
    "r_gyration": ("r_gyration",),
}
_ATOMIC_VELOCITY = constants.value("atomic unit of velocity") * 1e-5
"""Å/fs in one atomic unit of velocity."""


def convert(value: Array | float, family: str, unit: str, to: str) -> Array:
    """Converts between two of i-PI's units of one family (``energy``, ``time``, ``length``, ``temperature`` …)."""
    factor = unit_to_user(family, to, unit_to_internal(family, unit or "atomic_unit", 1.0))
    return np.asarray(value, dtype=float) * factor


@dataclass(frozen=True)
class Properties:
    """A properties file: columns [f] or [f, k] by name, in the units the file names ("" is atomic units)."""

    path: Path
    columns: dict[str, Array]
    units: dict[str, str]

    def get(self, name: str, family: str = "undefined", to: str = "") -> Array:
        """A column, converted to unit ``to``. Raises InputError when the file lacks it."""
        if name not in self.columns:
            raise InputError(f"{self.path}: no column '{name}'; add it to <properties> in the i-PI input")
        if not to:
            return self.columns[name]
        try:
            return convert(self.columns[name], family, self.units[name], to)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.path}: column '{name}' has the unit '{self.units[name]}', which is no {family}"
            ) from None


def read_properties(path: str | Path) -> Properties:
    """Reads a properties file with its ``# column 1 --> step : …`` header.

    Raises InputError for a file without header or without a complete line.
    """
    path = Path(path)
    slots: dict[str, tuple[int, int]] = {}
    units: dict[str, str] = {}
    rows: list[list[float]] = []
    for line in _lines(path):
        if not line.startswith("#"):
            rows.append(_numbers(line))
            continue
        match = _COLUMN.match(line)
        if match:
            first, last, title = int(match[1]), int(match[2] or match[1]), match[3]
            unit = _UNIT.search(title)
            name = _UNIT.sub("", title)
            slots[name], units[name] = (first - 1, last), unit[1] if unit else ""
    if not slots:
        raise InputError(f"{path}: no header '# column 1 --> …'; give a file that <properties> of i-PI wrote")
    width = max(last for _, last in slots.values())
    rows = [row for row in rows if len(row) == width]
    if not rows:
        raise InputError(f"{path}: no complete line of numbers; let the run write at least one step")
    table = np.array(rows)
    if "step" in slots:
        table = table[_last_of_each(table[:, slots["step"][0]].astype(int))]
    columns = {n: table[:, a] if b - a == 1 else table[:, a:b] for n, (a, b) in slots.items()}
    return Properties(path, columns, units)


@dataclass(frozen=True)
class Extras:
    """One quantity that a driver sent along: ``values`` [f, …] at ``steps`` [f], in the driver's units (atomic)."""

    path: Path
    name: str
    steps: NDArray[np.int64]
    values: Array


def read_extras(path: str | Path) -> Extras:
    """Reads ``<trajectory extra_type='NAME'> extras </trajectory>``: one line (vector) or several (matrix) a step.

    Raises InputError for a file of another kind, with raw text (``extra_type='raw'``) or without a complete record.
    """
    path = Path(path)
    steps: list[int] = []
    records: list[list[list[float]]] = []
    name = ""
    for name, step, rows in _records(path):  # noqa: B007 (the last one is used)
        steps.append(step)
        records.append(rows)
    if not records:
        raise InputError(f"{path}: no '#EXTRAS(…)# Step:' line; give a file of <trajectory extra_type='…'> extras")
    shapes = [(len(record), *{len(row) for row in record}) for record in records]
    good = [i for i, shape in enumerate(shapes) if shape == shapes[0] and len(shape) == 2 and shape[1] > 0]
    if not good or len(good) < len(records) - 1:
        raise InputError(
            f"{path}: extras '{name}' are no numbers of one shape; print one quantity, such as extra_type='dipole'"
        )
    values = np.array([records[i] for i in good])
    values = values[:, 0] if values.shape[1] == 1 else values
    kept = np.array([steps[i] for i in good])
    order = _last_of_each(kept)
    return Extras(path, name, kept[order], values[order])


def iter_extras(path: str | Path) -> Iterator[tuple[int, Array]]:
    """Steps and values of a file of extras one by one, as ``read_extras`` reads them all at once.

    Records that were cut short, and steps that go back in time (a restart that wrote them again), are left out.
    """
    latest, shape = -1, None
    for _, step, rows in _records(Path(path)):
        if step <= latest or not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            continue
        values = np.array(rows[0] if len(rows) == 1 else rows)
        shape = values.shape if shape is None else shape
        if values.shape == shape:
            latest = step
            yield step, values


def _records(path: Path) -> Iterator[tuple[str, int, list[list[float]]]]:
    """Name, step and lines of numbers of every record of extras."""
    name, step, rows = "", -1, list[list[float]]()
    for line in _lines(path):
        match = _EXTRAS.match(line)
        if match:
            if name:
                yield name, step, rows
            name, step, rows = match[1], int(match[2]), []
        elif name:
            rows.append(_numbers(line))
    if name:
        yield name, step, rows


@dataclass(frozen=True)
class Frame:
    """One frame of positions: ``step`` (None where the file does not say), ``atoms`` in Å (not wrapped).

    What is no element, such as the particle of a potentiostat, is ASE's dummy element X.
    """

    step: int | None
    atoms: Atoms


def read_trajectory(path: str | Path) -> Iterator[Frame]:
    """Frames of positions one by one: i-PI's XYZ (units in the comment), or extended XYZ.

    Frames that go back in time (a restart that wrote steps again) are left out. Raises InputError for a file that holds
    no positions.
    """
    for frame, _ in _forwards(Path(path), "positions"):
        yield frame


@dataclass(frozen=True)
class Velocities:
    """One frame of velocities: ``step``, atomic ``numbers`` [n] and ``values`` [n, 3] in Å/fs."""

    step: int | None
    numbers: NDArray[np.int64]
    values: Array


def read_velocities(path: str | Path) -> Iterator[Velocities]:
    """Frames of ``<trajectory> velocities </trajectory>`` (or ``v_centroid``), as ``read_trajectory`` reads positions.

    Raises InputError for a file that holds something else.
    """
    for frame, unit in _forwards(Path(path), "velocities"):
        values = convert(frame.atoms.arrays["velocities"], "velocity", unit, "atomic_unit")
        yield Velocities(frame.step, frame.atoms.numbers, values * _ATOMIC_VELOCITY)


@dataclass(frozen=True)
class Forces:
    """One frame of forces: ``step``, ``symbols`` [n] of the elements and ``values`` [n, 3] in eV/Å."""

    step: int | None
    symbols: list[str]
    values: Array


def read_forces(path: str | Path) -> Iterator[Forces]:
    """Frames of ``<trajectory> forces </trajectory>``, as ``read_trajectory`` reads positions.

    Raises InputError for a file that holds something else.
    """
    for frame, unit in _forwards(Path(path), "forces"):
        values = convert(frame.atoms.arrays["forces"], "force", unit, "ev/ang")
        yield Forces(frame.step, list(frame.atoms.symbols), values)


@dataclass(frozen=True)
class Vectors:
    """One frame of another quantity that i-PI knows of each atom: ``symbols`` [n], ``values`` [n, 3] in ``unit``."""

    step: int | None
    symbols: list[str]
    values: Array
    unit: str

    def in_unit(self, family: str, to: str) -> Array:
        """The values in another unit of their family (``energy``, ``length``)."""
        return convert(self.values, family, self.unit, to)


def read_vectors(path: str | Path) -> Iterator[Vectors]:
    """Frames of ``<trajectory> kinetic_cv </trajectory>`` or ``r_gyration``, as ``read_trajectory`` reads positions.

    Raises InputError for a file that holds something else.
    """
    path = Path(path)
    what = file_kind(path)
    if what not in ("kinetic_cv", "r_gyration"):
        raise InputError(f"{path}: holds {what or 'no trajectory'}; give the trajectory of kinetic_cv or r_gyration")
    for frame, unit in _forwards(path, what):
        yield Vectors(frame.step, list(frame.atoms.symbols), frame.atoms.arrays[what], unit)


def _forwards(path: Path, what: str) -> Iterator[tuple[Frame, str]]:
    """Frames of positions, velocities or forces, each with its unit, without those that go back in time."""
    latest = -1
    extended = path.suffix == ".extxyz" or "Properties=" in _head(path)
    for frame, unit in _read_extxyz(path, what) if extended else _read_ipi_xyz(path, what):
        if frame.step is not None:
            if frame.step <= latest:
                continue
            latest = frame.step
        yield frame, unit
    if latest < 0 and not _head(path):
        raise InputError(f"{path}: is empty; let the run write at least one frame")


def _read_extxyz(path: Path, what: str) -> Iterator[tuple[Frame, str]]:
    try:
        for atoms in iread(str(path), index=":", format="extxyz"):
            comment = str(atoms.info.get("ipi_comment", ""))
            quantity = _QUANTITY.search(comment)
            if quantity or what != "positions":
                _check(path, quantity, what)
            yield Frame(_step(comment), atoms), quantity[2] if quantity else "ase"
    except (OSError, ValueError, KeyError, StopIteration) as error:
        if isinstance(error, InputError):
            raise
        return  # the last frame was cut short


def _read_ipi_xyz(path: Path, what: str) -> Iterator[tuple[Frame, str]]:
    with path.open() as file:
        while True:
            try:
                comment, h, values, names, _ = read_xyz(file)
            except (EOFError, StopIteration, IndexError, ValueError):
                return
            if len(names) != np.count_nonzero(names):
                return
            quantity = _check(path, _QUANTITY.search(comment), what)
            symbols = [str(name) if name in atomic_numbers else "X" for name in names]
            atoms = Atoms(symbols, cell=convert(h.T, "length", quantity[3], "angstrom"), pbc=True)
            if what == "positions":
                atoms.positions = convert(values.reshape(-1, 3), "length", quantity[2], "angstrom")
            else:
                atoms.new_array(what, values.reshape(-1, 3))
            yield Frame(_step(comment), atoms), quantity[2]


def _check(path: Path, quantity: re.Match[str] | None, what: str) -> re.Match[str]:
    """The quantity of a frame. Raises InputError for another than ``what``."""
    if quantity is None or quantity[1] not in _NAMES[what]:
        holds = quantity[1] if quantity else f"something without '{what}{{unit}} cell{{unit}}' in its comment"
        raise InputError(f"{path}: holds {holds}, not {what}; give the trajectory of {what}")
    return quantity


def file_kind(path: Path) -> str:
    """``properties``, ``positions``, ``velocities``, ``forces``, ``extras:NAME`` or "" by what the first lines say."""
    head = _head(path)
    extras = _EXTRAS.match(head)
    if extras:
        return f"extras:{extras[1]}"
    if re.search(r"^# *(column|cols\.) +\d", head, re.MULTILINE):
        return "properties"
    trajectory = re.search(r"Step:.*?(\w+)\{\w+\}\s+cell\{", head)
    return next((kind for kind, names in _NAMES.items() if trajectory and trajectory[1] in names), "")


def _head(path: Path) -> str:
    try:
        with path.open() as file:
            return "".join(line for line, _ in zip(file, range(60), strict=False))
    except (OSError, UnicodeDecodeError):
        return ""


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open() as file:
            yield from (line for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file that i-PI wrote") from None


def _numbers(line: str) -> list[float]:
    try:
        return [float(word) for word in line.split()]
    except ValueError:
        return []


def _step(comment: str) -> int | None:
    match = _STEP.search(comment)
    return int(match[1]) if match else None


def _last_of_each(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices that keep the last record of every step, steps ascending."""
    _, from_the_end = np.unique(steps[::-1], return_index=True)
    return len(steps) - 1 - from_the_end
