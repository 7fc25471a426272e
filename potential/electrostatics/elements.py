"""Element parameters of charge equilibration: tables as CSV, checked as they are read."""

from __future__ import annotations

import csv
import math
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from ase.data import atomic_numbers

from voltpi.potential.errors import InputError

__all__ = ["ElementParameters", "check_parameters", "read_parameters"]


class ElementParameters(NamedTuple):
    """χ, η (eV), shell charge Z (e), Gaussian radius R (Å), spring constant K (kcal/mol/Å² for Z = 1)."""

    chi: float
    eta: float
    Z: float
    R: float
    K: float


def read_parameters(path: str | Path = "default") -> dict[str, ElementParameters]:
    """Element parameters from a CSV; ``default``: the shipped table.

    The columns are symbol, chi, eta, Z, R, K; '#' starts a comment.
    Raises InputError for a file that cannot be read, other columns, a table without rows, an element that is unknown or
    there twice, and a number that cannot be.
    """
    if str(path) == "default":
        text = resources.files("voltpi.potential.parameters").joinpath("pqeq.csv").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(f"{path}: cannot read the PQEq parameters ({reason}); give an existing CSV") from None
    rows = csv.DictReader(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    columns = [name.strip() for name in rows.fieldnames or ()]
    if sorted(columns) != sorted(("symbol", *ElementParameters._fields)):
        raise InputError(f"{path}: the columns are '{','.join(columns)}'; give symbol,chi,eta,Z,R,K, each once")
    rows.fieldnames = columns
    table: dict[str, ElementParameters] = {}
    for row in rows:
        symbol = (row.get("symbol") or "").strip()
        if symbol not in atomic_numbers:
            raise InputError(f"{path}: '{symbol}' is not an element; the columns are symbol,chi,eta,Z,R,K")
        if symbol in table:
            raise InputError(f"{path}: {symbol} has two rows; keep one")
        try:
            table[symbol] = ElementParameters(*(float(row[k]) for k in ElementParameters._fields))
        except (TypeError, ValueError):
            raise InputError(f"{path}: the row of {symbol} needs the numbers chi,eta,Z,R,K") from None
        if None in row:
            raise InputError(f"{path}: the row of {symbol} has more than the numbers chi,eta,Z,R,K")
        check_parameters(str(path), symbol, table[symbol])
    if not table:
        raise InputError(f"{path}: the table has no rows; give symbol,chi,eta,Z,R,K of every element")
    return table


def check_parameters(source: str, symbol: str, p: ElementParameters) -> None:
    """Raises InputError for numbers that no atom can have."""
    if not all(math.isfinite(value) for value in p):
        raise InputError(f"{source}: chi, eta, Z, R and K of {symbol} must be finite numbers")
    if p.R <= 0 or p.eta <= 0 or (p.Z and p.K <= 0):
        raise InputError(f"{source}: eta, R and K of {symbol} must be positive")
