"""Results on disk: a table as CSV, numbers as JSON, beside the figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voltpi.potential.errors import InputError

__all__ = ["beside", "checked_skip", "output_stem", "write_results", "write_table"]


def checked_skip(skip: float) -> float:
    """The time to leave out, fs. Raises InputError for one that is negative or no number."""
    if not skip >= 0.0:
        raise InputError(f"skip is {skip}: give the time to leave out in fs, zero or more")
    return skip


def beside(paths: Sequence[Path]) -> Path:
    """Where results of several runs go: the one folder given, else that which holds the first of several, or files."""
    return paths[0] if len(paths) == 1 and paths[0].is_dir() else paths[0].resolve().parent


def output_stem(out: Path | None, folder: Path, name: str) -> Path:
    """Path of results without suffix, in ``out`` (made if need be) or ``folder``. Raises InputError."""
    folder = folder if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another folder with --out") from None
    return folder / name


def write_results(
    stem: Path,
    numbers: dict[str, Any],
    report: list[str],
    header: list[str],
    table: Iterable[Sequence[float | str]] | np.ndarray,
    figures: list[Path],
) -> dict[str, Any]:
    """Writes STEM.csv and STEM.json; the numbers with ``report``, ``figure`` and ``files`` beside them."""
    table_file = write_table(stem, header, table)
    numbers = _finite(numbers)
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    files = [table_file, stem.with_suffix(".json"), *figures]
    return numbers | {"report": report, "figure": str(figures[0]), "files": [str(path) for path in files]}


def write_table(stem: Path, header: list[str], table: Iterable[Sequence[float | str]] | np.ndarray) -> Path:
    """Writes STEM.csv, numbers with ten digits."""
    path = stem.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([x if isinstance(x, str) else f"{x:.10g}" for x in row] for row in table)
    return path


def _finite(value: Any) -> Any:
    """The same tree with None for numbers that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
