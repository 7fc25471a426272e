"""Charges of the atoms of a run, whoever made it: sent by the driver, given in a file, or fixed in the settings."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.io import read
from numpy.typing import ArrayLike, NDArray

from voltpi.analysis.ipi_files import extras_by_step, read_trajectory
from voltpi.analysis.run_inputs import Given, given_to_drivers
from voltpi.analysis.runs import Run
from voltpi.potential.errors import InputError

__all__ = ["AtomCharges", "charges_of", "charges_of_beads", "has_fixed_charges", "read_charges"]

Array = NDArray[np.float64]

_NEED = (
    "add <trajectory extra_type='charges'> extras </trajectory> to the run, or give --charges FILE (CSV with the "
    "columns element,charge, or extended XYZ with initial_charges)"
)


class AtomCharges:
    """Charges (e) of the atoms of one bead along a run; ``source`` says where they come from.

    ``constant`` [n]: the same at every step, or None where the driver sent them step by step.
    """

    def __init__(self, source: str, constant: ArrayLike | None = None, records: Path | None = None) -> None:
        self.source = source
        self.constant: Array | None = None if constant is None else np.asarray(constant, dtype=float)
        self._path = records
        self._records = None if records is None else extras_by_step(records)

    def at(self, step: int | None, n: int) -> Array | None:
        """Charges [n] at a step; None where none were written.

        Only one record is kept in memory: going back to an earlier step reads the file again. Raises InputError when
        there are not ``n`` of them.
        """
        if self.constant is not None:
            return self._checked(self.constant, n)
        assert self._records is not None
        if step is None:
            raise InputError(f"{self._path}: charges have steps but the frames have none; {_NEED}")
        found = self._records.at(step)
        return None if found is None else self._checked(found, n)

    def _checked(self, values: Array, n: int) -> Array:
        if values.shape != (n,):
            raise InputError(f"{self.source}: {values.size} charges but {n} atoms; give the charges of this run")
        return values


def charges_of(run: Run, given: str | Path | None = None, *, bead: int = 0) -> AtomCharges:
    """Charges of a run's atoms: of the file ``given``, or what the driver sent, or fixed ones of the settings.

    ``given``: see ``read_charges``. Raises InputError where none of the three says them, or where they do not fit.
    """
    if given is not None:
        return AtomCharges(str(given), read_charges(given, _first_frame(run)))
    files = run.extras.get("charges", ())
    if files:
        if len(files) not in (1, len(run.positions)):
            raise InputError(
                f"{run.folder}: charges of {len(files)} beads but positions of {len(run.positions)}; "
                "print both for the same beads"
            )
        return AtomCharges("charges that the run wrote", records=files[bead if len(files) > 1 else 0])
    fixed = [_fixed(driver) for driver in given_to_drivers(run.folder, run.outputs)]
    found = [(source, values) for source, values in fixed if values is not None]
    if not found:
        why = f" ({fixed[0][0]})" if fixed else ""
        raise InputError(f"{run.folder}: no charges of atoms{why}; {_NEED}")
    source, values = found[0]
    for other, more in found[1:]:
        if not np.array_equal(values, more):
            raise InputError(f"{run.folder}: {source} and {other} differ; give --charges FILE")
    n = len(_first_frame(run))
    if len(values) != n:
        raise InputError(f"{source}: {len(values)} charges but the run has {n} atoms; give --charges FILE")
    return AtomCharges(source, values)


def charges_of_beads(run: Run, given: str | Path | None = None) -> list[AtomCharges]:
    """The same for every bead of which the run wrote positions."""
    return [charges_of(run, given, bead=k) for k in range(len(run.positions))]


def has_fixed_charges(run: Run) -> bool:
    """Whether the settings of the run's drivers hold charges that do not change."""
    return any(_fixed(driver)[1] is not None for driver in given_to_drivers(run.folder, run.outputs))


def read_charges(path: str | Path, atoms: Atoms) -> Array:
    """Charges [n] (e) for ``atoms`` from a CSV file (columns ``element,charge``) or extended XYZ (``initial_charges``).

    Raises InputError for a file of another kind, one that lacks an element of ``atoms``, or holds other atoms.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give --charges FILE (CSV or extended XYZ)")
    if path.suffix.lower() == ".csv":
        table = _by_element(path)
        missing = sorted({str(s) for s in atoms.symbols} - set(table))
        if missing:
            raise InputError(f"{path}: no charge of {', '.join(missing)}; add a line '{missing[0]},CHARGE' (e)")
        return np.array([table[str(symbol)] for symbol in atoms.symbols])
    structure = _structure(path)
    if len(structure) != len(atoms) or (structure.numbers != atoms.numbers).any():
        raise InputError(
            f"{path}: {_formula(structure)}, but the run has {_formula(atoms)}; give the same atoms in order"
        )
    return _array(structure, "initial_charges", path)


def _by_element(path: Path) -> dict[str, float]:
    table: dict[str, float] = {}
    try:
        rows = list(csv.reader(path.read_text().splitlines(), skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a CSV file with the columns element,charge") from None
    lines = [(k, [word.strip() for word in row]) for k, row in enumerate(rows, 1) if row and not row[0].startswith("#")]
    if not lines or [word.lower() for word in lines[0][1]] != ["element", "charge"]:
        raise InputError(f"{path}: the first line is not 'element,charge'; give a CSV file with these two columns")
    for number, row in lines[1:]:
        try:
            element, charge = row[0], float(row[1])
        except (IndexError, ValueError):
            element, charge = "", np.nan
        if element not in atomic_numbers or len(row) != 2 or not np.isfinite(charge):
            raise InputError(
                f"{path}, line {number}: {','.join(row)!r}; give an element and its charge, such as 'O,-0.8'"
            )
        if table.setdefault(element, charge) != charge:
            raise InputError(f"{path}, line {number}: a second charge of {element}; remove one of the two")
    return table


def _fixed(driver: Given) -> tuple[str, Array | None]:
    """Where one driver's charges are, and its fixed charges; None where they are not fixed."""
    charges = _charges_in(driver)
    model = charges.get("model", "pqeq")
    if model != "fixed":
        return f"{driver.source} has charges.model: {model}, whose charges follow the atoms", None
    if _settings(driver).get("electrodes"):
        return f"{driver.source} has electrodes, whose charges follow the atoms", None
    if driver.template is None or not driver.template.is_file():
        return f"{driver.source} has fixed charges, but the start structure that holds them is not there", None
    name = str(charges.get("values", "initial_charges"))
    return f"fixed charges of {driver.template.name}", _array(_structure(driver.template), name, driver.template)


def _settings(driver: Given) -> dict[str, Any]:
    try:
        content = yaml.safe_load(driver.settings.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _charges_in(driver: Given) -> dict[str, Any]:
    charges = _settings(driver).get("charges")
    over = {k.removeprefix("charges."): v for k, v in driver.overrides.items() if k.startswith("charges.")}
    return (charges if isinstance(charges, dict) else {}) | over


def _structure(path: Path) -> Atoms:
    try:
        atoms = read(str(path), index=0, format="extxyz")
    except Exception as error:  # ase raises whatever its parser stumbles over
        raise InputError(f"{path}: no extended XYZ ({type(error).__name__}); give CSV or extended XYZ") from None
    assert isinstance(atoms, Atoms)
    return atoms


def _array(atoms: Atoms, name: str, path: Path) -> Array:
    values = atoms.arrays.get(name)
    if values is None and name == "initial_charges" and atoms.calc is not None:
        values = atoms.calc.results.get("charges")  # how ASE files a column that is called charges
    if values is None or np.ndim(values) != 1:
        raise InputError(f"{path}: no per-atom array '{name}'; add it (e), or give CSV with the columns element,charge")
    return np.asarray(values, dtype=float)


def _first_frame(run: Run) -> Atoms:
    if not run.positions:
        raise InputError(f"{run.folder}: no trajectory of positions; add <trajectory> positions </trajectory>")
    frame = next(read_trajectory(run.positions[0]), None)
    if frame is None:
        raise InputError(f"{run.positions[0]}: no complete frame; let the run write at least one")
    return frame.atoms


def _formula(atoms: Atoms) -> str:
    counts = [(chemical_symbols[z], int((atoms.numbers == z).sum())) for z in sorted(set(atoms.numbers.tolist()))]
    return " ".join(f"{n} {symbol}" for symbol, n in counts) or "no atoms"
