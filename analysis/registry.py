"""What ``voltpi analyze WHAT FILES…`` knows: every analysis by name, with its options."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voltpi.potential.errors import InputError

__all__ = ["ANALYSES", "Analysis", "Option", "analyze_field_response", "analyze_polarization"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


@dataclass(frozen=True)
class Option:
    """An option of an analysis: ``--name`` followed by ``count`` numbers."""

    name: str
    help: str
    count: int = 1
    default: float | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Analysis:
    """An analysis: ``run(paths, out, **options)`` writes CSV, JSON and figures and returns a JSON-able dict.

    The dict holds ``report`` (lines for a person), ``figure`` and ``files`` (paths) beside the numbers. With ``out``
    None the files go beside the run. Wrong input raises InputError.
    """

    name: str
    summary: str
    run: Callable[..., dict[str, Any]]
    options: tuple[Option, ...] = ()


def analyze_polarization(
    paths: Sequence[Path], out: Path | None = None, *, field: Sequence[float] | None = None, skip: float = 0.0
) -> dict[str, Any]:
    """Dipole and polarization along one run, its mean induced dipole per molecule, temperature and drift.

    ``paths``: one run's folder or files. ``field`` (V/Å) replaces that of the run's files; the first ``skip`` fs are
    left out of everything. Writes polarization.csv, .json, .png and .svg.
    """
    from voltpi.analysis.field_response import summarize
    from voltpi.analysis.figures import draw_polarization
    from voltpi.analysis.runs import find_runs

    runs = find_runs(list(paths), field)
    if len(runs) != 1:
        raise InputError(f"polarization is of one run, but {len(runs)} were given: call it for each")
    summary = summarize(runs[0], _checked(skip))
    p = summary.polarization
    stem = _stem(out, runs[0].folder, "polarization")
    table = np.column_stack([p.steps, p.time, p.dipole, p.density, p.volume])
    header = ["step", "time_fs", *(f"M{c}_eA" for c in "xyz"), *(f"P{c}_C_per_m2" for c in "xyz"), "volume_A3"]
    return _write(stem, summary.numbers(), summary.report(), header, table, draw_polarization(summary, stem))


def analyze_field_response(paths: Sequence[Path], out: Path | None = None, *, skip: float = 0.0) -> dict[str, Any]:
    """Mean dipole per molecule against field over several runs, and the dielectric constant from the slope.

    ``paths``: two or more folders, each with the settings of its run. Writes field-response.csv, .json, .png and .svg.
    """
    from voltpi.analysis.field_response import field_response, summarize
    from voltpi.analysis.figures import draw_field_response
    from voltpi.analysis.runs import find_runs

    files = [path for path in paths if not path.is_dir()]
    if files or len(paths) < 2:
        wrong = f"{files[0]} is no folder" if files else "only one was given"
        raise InputError(f"field-response takes two or more folders of runs at different fields, but {wrong}")
    summaries = [summarize(run, _checked(skip)) for run in find_runs(list(paths))]
    response = field_response(summaries)
    stem = _stem(out, paths[0].resolve().parent, "field-response")
    numbers = response.numbers() | {"runs": [summary.numbers() for summary in summaries]}
    table = np.column_stack([response.fields, response.dipoles, response.errors])
    header = ["field_V_per_A", "dipole_per_molecule_eA", "error_eA"]
    return _write(stem, numbers, response.report(), header, table, draw_field_response(response, stem))


def _checked(skip: float) -> float:
    if not skip >= 0.0:
        raise InputError(f"skip is {skip}: give the time to leave out in fs, zero or more")
    return skip


def _stem(out: Path | None, beside: Path, name: str) -> Path:
    folder = beside if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another folder with --out") from None
    return folder / name


def _write(
    stem: Path, numbers: dict[str, Any], report: list[str], header: list[str], table: np.ndarray, figures: list[Path]
) -> dict[str, Any]:
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{x:.10g}" for x in row] for row in table)
    numbers = _finite(numbers)
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    files = [stem.with_suffix(".csv"), stem.with_suffix(".json"), *figures]
    return numbers | {"report": report, "figure": str(figures[0]), "files": [str(path) for path in files]}


def _finite(value: Any) -> Any:
    """The same tree with None for numbers that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


_SKIP = Option("skip", "time at the start to leave out, fs", default=0.0)
_FIELD = Option("field", "the field in V/Å, where the run's files do not say it", count=3)

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "polarization",
            "dipole and polarization along a run; induced dipole per molecule, temperature, drift",
            analyze_polarization,
            (_FIELD, _SKIP),
        ),
        Analysis(
            "field-response",
            "mean dipole against field over several runs; dielectric constant",
            analyze_field_response,
            (_SKIP,),
        ),
    )
}
