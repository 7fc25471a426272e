"""What i-PI writes: properties, trajectories (its own XYZ and extended XYZ) and extras, in Å, eV, e, fs and K.

Formats as i-PI 3.3 writes them (``ipi/engine/outputs.py``). A restarted run appends, and its steps go back to the last
checkpoint: the later branch replaces all that was written before from its first step on, so that of every step the last
record counts and records of an abandoned branch are left out, in each kind of file alike. A record cut short by a
killed run is left out, also where the next one follows on its line.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.io import read
from ipi.utils.io.backends.io_xyz import read_xyz
from ipi.utils.units import unit_to_internal, unit_to_user
from numpy.typing import NDArray
from scipy import constants

from voltpi.potential.errors import InputError

__all__ = [
    "ByStep",
    "Extras",
    "Forces",
    "Frame",
    "Properties",
    "Vectors",
    "Velocities",
    "convert",
    "extras_by_step",
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
T = TypeVar("T")

_COLUMN = re.compile(r"#\s*(?:column|cols\.)\s+(\d+)(?:-(\d+))?\s*-->\s*([^\s:]+)")
_UNIT = re.compile(r"\{([^}]*)\}")
_EXTRAS = re.compile(r"^\s*#EXTRAS(?:_BIAS)?\(([^)]*)\)#")
_QUANTITY = re.compile(r"(\w+)\{([^}]*)\}\s+cell\{([^}]*)\}")
# Lines that tell a record. Where a killed run cut such a line in its step the number could be any: then no blank
# follows it (XYZ), or a second header does before the end of the line (extras).
_EXTRAS_LINE = re.compile(rb"#EXTRAS(?:_BIAS)?\([^()#\n]*\)#[ \t]*Step:[ \t]*(\d+)\b[^#\n]*\n")
_XYZ_COMMENT = re.compile(rb"Step:[ \t]*(\d+)[ \t\"'][^\n]*\n")
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
    width = 0
    for line in _lines(path):
        if not line.startswith("#"):
            words = line.split()
            # a row cut short has no end of its line, or the next row behind it
            row = _numbers(words[-width:]) if 0 < width <= len(words) and line.endswith("\n") else []
            if row:
                rows.append(row)
            continue
        match = _COLUMN.match(line)
        if match:
            first, last, title = int(match[1]), int(match[2] or match[1]), match[3]
            unit = _UNIT.search(title)
            name = _UNIT.sub("", title)
            slots[name], units[name] = (first - 1, last), unit[1] if unit else ""
            width = max(width, last)
    if not slots:
        raise InputError(f"{path}: no header '# column 1 --> …'; give a file that <properties> of i-PI wrote")
    if not rows:
        raise InputError(f"{path}: no complete line of numbers; let the run write at least one step")
    table = np.array(rows)
    if "step" in slots:
        table = table[_last_branch(table[:, slots["step"][0]])]
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
    name = ""
    steps: list[int] = []
    records: list[list[list[float]]] = []
    for name, step, rows in _records(path):  # noqa: B007 (the last one is used)
        if rows:
            steps.append(step)
            records.append(rows)
    if not name:
        raise InputError(f"{path}: no '#EXTRAS(…)# Step:' line; give a file of <trajectory extra_type='…'> extras")
    shapes = [(len(record), *{len(row) for row in record}) for record in records]
    good = [i for i, shape in enumerate(shapes) if shape == shapes[0] and len(shape) == 2 and shape[1] > 0]
    if not good or len(good) < len(records) - 1:
        raise InputError(
            f"{path}: extras '{name}' are no numbers of one shape; print one quantity, such as extra_type='dipole'"
        )
    values = np.array([records[i] for i in good])
    values = values[:, 0] if values.shape[1] == 1 else values
    return Extras(path, name, np.array([steps[i] for i in good]), values)


def iter_extras(path: str | Path) -> Iterator[tuple[int, Array]]:
    """Steps (ascending) and values of a file of extras one by one, as ``read_extras`` reads them all at once."""
    shape = None
    for _, step, rows in _records(Path(path)):
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            continue
        values = np.array(rows[0] if len(rows) == 1 else rows)
        shape = values.shape if shape is None else shape
        if values.shape == shape:
            yield step, values


def _records(path: Path) -> Iterator[tuple[str, int, list[list[float]]]]:
    """Name, step and lines of numbers of every record of extras; no lines where it was cut short."""
    for step, text, _ in _last_records(path, _EXTRAS_LINE):
        header, *lines = _decoded(path, text).splitlines(keepends=True)
        match = _EXTRAS.match(header)
        assert match is not None
        if lines and lines[-1].lstrip()[:1] in ("", "#"):
            lines.pop()  # the beginning of the next header
        complete = lines and lines[-1].endswith("\n")
        yield match[1], step, [_numbers(line.split()) for line in lines if line.strip()] if complete else []


class ByStep(Generic[T]):
    """What a reader yields, with steps in ascending order, asked for by step. One value is kept in memory.

    ``read`` begins to read; it is called again when an earlier step is asked for.
    """

    def __init__(self, read: Callable[[], Iterator[tuple[int, T]]]) -> None:
        self._read = read
        self._rest: Iterator[tuple[int, T]] | None = None
        self._next: tuple[int, T] | None = None
        self._asked = -1

    def at(self, step: int) -> T | None:
        """The value of a step; None where there is none."""
        if self._rest is None or step < self._asked:
            self._rest = self._read()
            self._next = next(self._rest, None)
        self._asked = step
        while self._next is not None and self._next[0] < step:
            self._next = next(self._rest, None)
        return self._next[1] if self._next is not None and self._next[0] == step else None


def extras_by_step(path: Path) -> ByStep[Array]:
    """The records of a file of extras."""
    return ByStep(lambda: iter_extras(path))


@dataclass(frozen=True)
class Frame:
    """One frame of positions: ``step`` (None where the file does not say), ``atoms`` in Å (not wrapped).

    What is no element, such as the particle of a potentiostat, is ASE's dummy element X.
    """

    step: int | None
    atoms: Atoms


def read_trajectory(path: str | Path) -> Iterator[Frame]:
    """Frames of positions one by one: i-PI's XYZ (units in the comment), or extended XYZ.

    Steps ascend. Raises InputError for a file that holds no positions.
    """
    for frame, _ in _frames(Path(path), "positions"):
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
    for frame, unit in _frames(Path(path), "velocities"):
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
    for frame, unit in _frames(Path(path), "forces"):
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
    for frame, unit in _frames(path, what):
        yield Vectors(frame.step, list(frame.atoms.symbols), frame.atoms.arrays[what], unit)


def _frames(path: Path, what: str) -> Iterator[tuple[Frame, str]]:
    """Frames of positions, velocities or forces, each with its unit."""
    head = _head(path)
    if not head:
        raise InputError(f"{path}: is empty; let the run write at least one frame")
    extended = path.suffix == ".extxyz" or "Properties=" in head
    for step, lines in _blocks(path):
        quantity = _QUANTITY.search(lines[1])
        if quantity or what != "positions" or not extended:
            _check(path, quantity, what)
        try:
            atoms = _extended(lines) if extended else _plain(lines, what)
        except (OSError, ValueError, KeyError, IndexError, StopIteration, EOFError):
            continue  # cut short
        yield Frame(step, atoms), quantity[2] if quantity else "ase"


def _extended(lines: Sequence[str]) -> Atoms:
    """The structure of a block of extended XYZ."""
    atoms = read(StringIO("".join(lines)), format="extxyz")
    assert isinstance(atoms, Atoms)
    return atoms


def _plain(lines: Sequence[str], what: str) -> Atoms:
    """The structure of a block of i-PI's XYZ; what are no positions is an array in the unit of the file."""
    comment, h, values, names, _ = read_xyz(iter(lines))
    quantity = _QUANTITY.search(comment)
    assert quantity is not None
    symbols = [str(name) if name in atomic_numbers else "X" for name in names]
    atoms = Atoms(symbols, cell=convert(h.T, "length", quantity[3], "angstrom"), pbc=True)
    if what == "positions":
        atoms.positions = convert(values.reshape(-1, 3), "length", quantity[2], "angstrom")
    else:
        atoms.new_array(what, values.reshape(-1, 3))
    return atoms


def _blocks(path: Path) -> Iterator[tuple[int | None, list[str]]]:
    """Step and lines (number of atoms, comment, atoms) of every complete frame of an XYZ file."""
    with path.open("rb") as file:
        first = file.readline()
        n = int(first) if first.strip().isdigit() else 0
    if n == 0:
        return
    stepless = True
    for step, text, last in _last_records(path, _XYZ_COMMENT):
        stepless = False
        lines = text.splitlines(keepends=True)
        # the next frame's number of atoms comes behind; on the line of an atom that was cut it would end its number
        whole = lines[n + 1].strip().isdigit() if len(lines) > n + 1 else last and lines[-1].endswith(b"\n")
        if whole and len(lines) > n:
            yield step, [f"{n}\n", *(_decoded(path, line) for line in lines[: n + 1])]
    if not stepless:
        return
    with path.open() as frames:
        for line in frames:
            block = [line, *islice(frames, int(line) + 1)] if line.strip().isdigit() else []
            if len(block) < 2 or len(block) < int(line) + 2:
                return
            yield None, block


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
    trajectory = re.search(r"Step:.*?(\w+)\{[^}]*\}\s+cell\{", head)
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


def _numbers(words: list[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        return []


def _decoded(path: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file that i-PI wrote") from None


def _last_branch(steps: NDArray[np.int64] | Array) -> NDArray[np.bool_]:
    """Which records [f] count: those whose step no later record reaches or goes back behind."""
    later = np.minimum.accumulate(steps[::-1])[::-1]
    return np.append(steps[:-1] < later[1:], np.ones(min(len(steps), 1), dtype=bool))


def _last_records(path: Path, header: re.Pattern[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Step and bytes of every record that counts, from its ``header`` on, and whether the file ends there."""
    try:
        stat = path.stat()
        index = _index(path.absolute(), stat.st_size, stat.st_mtime_ns, header)
        with path.open("rb") as file:
            for step, begin, end in index:
                file.seek(begin)
                yield int(step), file.read(end - begin), bool(end == stat.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file that i-PI wrote") from None


@lru_cache(maxsize=64)
def _index(path: Path, size: int, _changed: int, header: re.Pattern[bytes]) -> NDArray[np.int64]:
    """Step, begin and end (bytes) [f, 3] of the records that count, without reading their numbers."""
    found: list[tuple[int, int]] = []
    if size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
            for match in header.finditer(content):
                begin = match.start()
                if header is _XYZ_COMMENT:
                    begin = content.rfind(b"\n", 0, begin) + 1
                found.append((int(match[1]), begin))
    table = np.array(found, dtype=np.int64).reshape(-1, 2)
    ends = np.append(table[1:, 1], size)[: len(table)]
    return np.column_stack([table, ends])[_last_branch(table[:, 0])]
