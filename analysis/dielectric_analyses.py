"""What ``voltpi analyze`` does with the dielectric constant, polarization loops and the energy against D."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voltpi.analysis.kinds import CHARGES, FIELD, SKIP, TEMPERATURE, Analysis, Option
from voltpi.analysis.output import beside, checked_skip, output_stem, write_results
from voltpi.potential.errors import InputError

__all__ = ["DIELECTRIC", "analyze_dielectric", "analyze_double_well", "analyze_hysteresis"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_dielectric(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    temperature: float | None = None,
    electronic: float | None = None,
    along: str = "mean",
    field: Sequence[float] | None = None,
    charges: str | None = None,
) -> dict[str, Any]:
    """Static dielectric constant from runs at constant ε and at constant D, by up to four estimates side by side.

    ``paths``: folders of runs, each with its settings, or the files of one. ``temperature`` (K), ``electronic`` (ε∞)
    and ``field`` (V/Å) replace what the runs' files say, ``charges`` (a file) the driver's dipole; the
    first ``skip`` fs of each are left out; ``along``: x, y or z, the component to compare, or the mean of the
    directions. Writes dielectric.csv, .json, .png and .svg.
    """
    from voltpi.analysis.dielectric import dielectric_of, dielectric_run
    from voltpi.analysis.figures_dielectric import draw_dielectric
    from voltpi.analysis.runs import find_runs

    if temperature is not None and not temperature > 0.0:
        raise InputError(f"temperature is {temperature:g}: give a positive number in K")
    if electronic is not None and not electronic >= 1.0:
        raise InputError(f"electronic is {electronic:g}: give ε∞, one or more")
    component = None if along == "mean" else "xyz".index(along)
    runs = [
        dielectric_run(
            run, checked_skip(skip), temperature=temperature, electronic=electronic, along=component, charges=charges
        )
        for run in find_runs(list(paths), field)
    ]
    result = dielectric_of(runs, component)
    stem = output_stem(out, beside(paths), "dielectric")
    return write_results(stem, result.numbers(), result.report(), *result.table(), draw_dielectric(result, stem))


def analyze_hysteresis(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    average: float | None = None,
    centred: bool = False,
) -> dict[str, Any]:
    """Loop of polarization against field of one run whose field or displacement changes slowly.

    ``average`` (fs): length of the intervals that P_r and ε_c are from; ``centred``: P counts from half way between its
    ends. Writes hysteresis.csv, .json, .png and .svg.
    """
    from voltpi.analysis.figures_dielectric import draw_loop
    from voltpi.analysis.hysteresis import loop_of
    from voltpi.analysis.runs import find_runs

    runs = find_runs(list(paths))
    if len(runs) != 1:
        raise InputError(f"hysteresis is of one run, but {len(runs)} were given: call it for each")
    loop = loop_of(runs[0], checked_skip(skip), average=average, centred=centred)
    stem = output_stem(out, runs[0].folder, "hysteresis")
    return write_results(stem, loop.numbers(), loop.report(), *loop.table(), draw_loop(loop, stem))


def analyze_double_well(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    symmetric: bool = False,
    relaxed: bool = False,
    bins: float = 20,
    degree: float = 0,
) -> dict[str, Any]:
    """Internal field and energy against D from runs at constant D, or from one in which D changes slowly.

    ``symmetric``: U(−D) = U(D); ``relaxed``: the last record of each run alone; ``bins``: intervals of a changing D;
    ``degree``: of a polynomial that is fitted to ε(D), 0: a spline through its points.
    Writes double-well.csv, .json, .png and .svg.
    """
    from voltpi.analysis.double_well import double_well, points_of
    from voltpi.analysis.figures_dielectric import draw_double_well
    from voltpi.analysis.runs import find_runs

    if not (bins >= 2 and bins == int(bins)):
        raise InputError(f"bins is {bins:g}: give a whole number, two or more")
    if degree != int(degree):
        raise InputError(f"degree is {degree:g}: give a whole number, 0 for a spline")
    runs = find_runs(list(paths))
    points = [points_of(run, checked_skip(skip), relaxed=relaxed, bins=int(bins)) for run in runs]
    well = double_well(points, symmetric=symmetric, degree=int(degree))
    stem = output_stem(out, beside(paths), "double-well")
    return write_results(stem, well.numbers(), well.report(), *well.table(), draw_double_well(well, stem))


ELECTRONIC = Option("electronic", "ε∞, where the runs did not write the polarizability")
ALONG = Option(
    "along", "component of the tensor, or the mean of the directions", kind=str, choices=("mean", "x", "y", "z"),
    default="mean",
)  # fmt: skip
AVERAGE = Option("average", "length of the intervals that are averaged, fs (default: 1/200 of a cycle)")
CENTRED = Option("centred", "count P from half way between its ends", kind=bool, default=False)
SYMMETRIC = Option("symmetric", "take U(-D) = U(D)", kind=bool, default=False)
RELAXED = Option("relaxed", "the last record of each run alone, of a relaxation", kind=bool, default=False)
BINS = Option("bins", "intervals of a displacement that changes with time", default=20.0)
DEGREE = Option(
    "degree", "fit a polynomial of this degree to the field instead of a spline through its points", default=0.0
)
DIELECTRIC = (
    Analysis(
        "dielectric",
        "static dielectric constant from fluctuations and slopes, at constant field and constant displacement",
        analyze_dielectric,
        (SKIP, TEMPERATURE, ELECTRONIC, ALONG, FIELD, CHARGES),
    ),
    Analysis(
        "hysteresis",
        "polarization against a field or displacement that changes slowly: loop, remanence, coercive field, loss",
        analyze_hysteresis,
        (SKIP, AVERAGE, CENTRED),
    ),
    Analysis(
        "double-well",
        "internal field and energy against the displacement from runs at constant D: barrier, spontaneous polarization",
        analyze_double_well,
        (SKIP, SYMMETRIC, RELAXED, BINS, DEGREE),
    ),
)
