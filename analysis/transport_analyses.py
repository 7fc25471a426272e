"""What ``voltpi analyze`` does with structure and transport: rdf, msd, conductivity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from voltpi.analysis.kinds import CHARGES, FIELD, SKIP, TEMPERATURE, Analysis, Option
from voltpi.analysis.output import checked_skip, output_stem, write_results, write_table

__all__ = ["TRANSPORT", "analyze_conductivity", "analyze_msd", "analyze_rdf"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_rdf(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    pairs: str | None = None,
    skip: float = 0.0,
    bin: float = 0.05,
    range: float | None = None,
    molecules: Literal["all", "intra", "inter"] = "all",
) -> dict[str, Any]:
    """Radial distribution functions and coordination numbers of one run (``voltpi.analysis.rdf``).

    ``pairs``: such as ``O-O,O-H``; ``bin`` and ``range`` in Å; the first ``skip`` fs are left out. Writes rdf.csv,
    .json, .png and .svg.
    """
    from voltpi.analysis.figures_transport import draw_rdf
    from voltpi.analysis.rdf import radial_distributions
    from voltpi.analysis.trajectory import one_run

    run = one_run(paths, "rdf", np.zeros(3))
    rdf = radial_distributions(
        run, pairs=pairs, skip=checked_skip(skip), bin_width=bin, farthest=range, molecules=molecules
    )
    stem = output_stem(out, run.folder, "rdf")
    return write_results(stem, rdf.numbers(), rdf.report(), *rdf.table(), draw_rdf(rdf, stem))


def analyze_msd(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    by: Literal["element", "molecule"] = "element",
    hop: float = 3.0,
    upper: float = 0.5,
    viscosity: float | None = None,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Mean squared displacements and diffusion coefficients of one run (``voltpi.analysis.transport``).

    ``hop`` (Å), ``upper``, ``viscosity`` (mPa·s), ``temperature`` (K): see ``diffusion_of``. Writes msd.csv, .json,
    .png and .svg.
    """
    from voltpi.analysis.figures_transport import draw_msd
    from voltpi.analysis.trajectory import one_run
    from voltpi.analysis.transport import diffusion_of

    run = one_run(paths, "msd", np.zeros(3))
    found = diffusion_of(
        run, skip=checked_skip(skip), by=by, hop=hop, upper=upper, viscosity=viscosity, temperature=temperature
    )
    stem = output_stem(out, run.folder, "msd")
    header = ["lag_fs", *(f"msd_{d.name}{axis}_A2" for d in found for axis in ("", "_x", "_y", "_z"))]
    columns = [np.column_stack([d.msd.sum(axis=1), d.msd]) for d in found]
    numbers = {
        "drift_removed": "centre of mass of all atoms, unless atoms are held still",
        "species": {d.name: d.numbers() for d in found},
    }
    table = np.column_stack([found[0].lags, *columns])
    return write_results(stem, numbers, [d.report() for d in found], header, table, draw_msd(found, stem))


def analyze_conductivity(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    skip: float = 0.0,
    charges: str | None = None,
    temperature: float | None = None,
    fit: tuple[float, float] | None = None,
    by: Literal["auto", "element", "molecule"] = "auto",
    hop: float = 3.0,
    field: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Ionic conductivity of one run in all ways that its files allow (``voltpi.analysis.conductivity``).

    ``fit`` (ps): between which times; ``charges``: a file; ``field`` (V/Å) replaces that of the run's files. Writes
    conductivity.csv, .json, .png and .svg, and the running integral as conductivity-green-kubo.csv.
    """
    from voltpi.analysis.conductivity import conductivity_of
    from voltpi.analysis.figures_transport import draw_conductivity
    from voltpi.analysis.trajectory import one_run

    run = one_run(paths, "conductivity", field)
    limits = None if fit is None else (fit[0], fit[1])
    found = conductivity_of(
        run, skip=checked_skip(skip), charges=charges, temperature=temperature, fit=limits, by=by, hop=hop
    )
    stem = output_stem(out, run.folder, "conductivity")
    integral = write_table(
        output_stem(out, run.folder, "conductivity-green-kubo"),
        ["lag_fs", "running_integral_S_per_m"],
        np.column_stack(found.integral),
    )
    answer = write_results(stem, found.numbers(), found.report(), *found.table(), draw_conductivity(found, stem))
    return answer | {"files": [*answer["files"], str(integral)]}


_HOP = Option("hop", "distance between the sites of ions, Å; half its square is where the line begins", default=3.0)

TRANSPORT = (
    Analysis(
        "rdf",
        "radial distribution functions and coordination numbers",
        analyze_rdf,
        (
            Option("pairs", "pairs of elements, such as O-O,O-H (default: all)", kind=str),
            SKIP,
            Option("bin", "width of bins, Å", default=0.05),
            Option("range", "greatest distance, Å (default: half the cell, 10 at most)"),
            Option("molecules", "which pairs", kind=str, default="all", choices=("all", "intra", "inter")),
        ),
    ),
    Analysis(
        "msd",
        "mean squared displacement and diffusion coefficients",
        analyze_msd,
        (
            SKIP,
            Option("by", "what moves", kind=str, default="element", choices=("element", "molecule")),
            _HOP,
            Option("upper", "up to which share of the trajectory the line goes", default=0.5),
            Option("viscosity", "mPa·s; adds the finite-size correction of a cubic cell"),
            TEMPERATURE,
        ),
    ),
    Analysis(
        "conductivity",
        "ionic conductivity: Nernst-Einstein, Einstein-Helfand, Green-Kubo, drift in a field; Haven ratio",
        analyze_conductivity,
        (
            SKIP,
            CHARGES,
            TEMPERATURE,
            Option(
                "fit", "between which times, ps (default: 1/100 and 1/20 of the run, 0.2 and 0.4 at the least)", count=2
            ),
            Option("by", "what moves", kind=str, default="auto", choices=("auto", "element", "molecule")),
            _HOP,
            FIELD,
        ),
    ),
)
