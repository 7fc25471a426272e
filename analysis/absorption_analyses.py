"""What ``voltpi analyze absorption`` does with a run that a field in time drives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voltpi.analysis.kinds import SKIP, Analysis
from voltpi.analysis.output import checked_skip, output_stem, write_results
from voltpi.potential.errors import InputError

if TYPE_CHECKING:
    from voltpi.analysis.absorption import Absorption

__all__ = ["ABSORPTION", "analyze_absorption"]

# matplotlib, SciPy and ASE are imported inside the functions: listing the analyses costs nothing


def analyze_absorption(paths: Sequence[Path], out: Path | None = None, *, skip: float = 0.0) -> dict[str, Any]:
    """Work of the field against the energy absorbed in one run of driven dynamics (``voltpi.analysis.absorption``).

    ``paths``: one run's folder or files, with its i-PI input beside them. Writes absorption.csv, .json, .png and .svg.
    """
    from voltpi.analysis.absorption import absorption_of
    from voltpi.analysis.runs import find_runs

    # a static field of the driver is part of the energy, whatever it is
    runs = find_runs(list(paths), (0.0, 0.0, 0.0))
    if len(runs) != 1:
        raise InputError(f"absorption is of one run, but {len(runs)} were given: call it for each")
    absorption = absorption_of(runs[0], skip=checked_skip(skip))
    stem = output_stem(out, runs[0].folder, "absorption")
    return write_results(stem, absorption.numbers(), absorption.report(), *absorption.table(), _draw(absorption, stem))


def _draw(a: Absorption, stem: Path) -> list[Path]:
    """The field and the dipole along it, work and energy absorbed, and their difference, along time."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from voltpi.analysis.figures import COLORS, STYLE, save_figure

    along = np.array(a.driving.amplitude) / a.driving.strength
    dipole = a.dipole @ along
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 5.0), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.0, 1.2, 0.8))
        top.plot(a.time, a.field @ along, color="black", lw=1.0)
        top.set(ylabel="field (V/Å)")
        beside = top.twinx()
        beside.plot(a.time, dipole - dipole[0], color=COLORS[0], lw=0.9)
        beside.set_ylabel("change of M (e·Å)", color=COLORS[0])
        beside.spines["right"].set_visible(True)
        middle.plot(a.time, a.absorbed, color=COLORS[1], lw=1.6, label="energy absorbed")
        middle.plot(a.time, a.work, color="black", lw=0.8, ls="--", label="work of the field")
        middle.set(ylabel="energy (eV)")
        middle.legend()
        bottom.plot(a.time, 1e3 * (a.absorbed - a.work), color=COLORS[2], lw=0.8)
        bottom.set(xlabel="time (fs)", ylabel="difference (meV)")
        bottom.margins(x=0.01)
        return save_figure(figure, stem)


ABSORPTION = (
    Analysis(
        "absorption",
        "work of a field in time (driven dynamics) against the energy absorbed",
        analyze_absorption,
        (SKIP,),
    ),
)
