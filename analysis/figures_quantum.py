"""Figure of the quantum kinetic energies and radii of gyration."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.analysis.quantum import Quantum, Series
from voltpi.analysis.statistics import plus_minus

__all__ = ["draw_quantum"]


def draw_quantum(quantum: Quantum, stem: Path) -> list[Path]:
    """Both along time for each element, thin, with the mean so far; classical values dashed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for k, s in enumerate(quantum.species):
            color = COLORS[k % len(COLORS)]
            for axes, series, scale, form in ((left, s.kinetic, 1e3, ".1f"), (right, s.gyration, 1.0, ".4f")):
                if series is None:
                    continue
                time = series.times / 1000.0
                mean = series.mean
                axes.plot(time, scale * series.values, color=color, lw=0.5, alpha=0.4)
                label = f"{s.element} {plus_minus(scale * mean.value, scale * mean.error, form)}"
                axes.plot(time, scale * _mean_so_far(series), color=color, lw=1.4, label=label)
            if s.gyration is not None:
                right.axhline(s.free, color=color, lw=0.8, ls="--")
        left.axhline(1e3 * quantum.classical, color="black", lw=0.8, ls="--", label="classical")
        left.set(xlabel="time (ps)", ylabel="kinetic energy of an atom (meV)")
        right.set(xlabel="time (ps)", ylabel="radius of gyration (Å)")
        right.set_title("dashed: free particle", loc="left", fontsize=8)
        for axes in (left, right):
            axes.margins(x=0.01)
            axes.set_ylim(bottom=0.0)
            axes.legend(fontsize=7.5)
        return save_figure(figure, stem)


def _mean_so_far(series: Series) -> np.ndarray:
    return np.cumsum(series.values) / np.arange(1, len(series.values) + 1)
