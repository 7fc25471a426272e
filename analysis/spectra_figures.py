"""Figures of spectra."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.analysis.spectra_kinds import Spectrum

__all__ = ["draw_spectrum"]

_NAMED = 6  # peaks


def draw_spectrum(spectrum: Spectrum, stem: Path, others: int = 0) -> list[Path]:
    """The first column with its error band and its highest peaks, and ``others`` more columns as lines."""
    plan, x = spectrum.activity.plan, spectrum.wavenumbers
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.0), layout="constrained")
        axes = figure.subplots()
        for k, (name, y) in enumerate(list(spectrum.columns.items())[: 1 + others]):
            label = name.split("_")[0] if k == 0 or not name.startswith("modes") else name.split("_")[1]
            color = "black" if k == 0 else COLORS[(k - 1) % len(COLORS)]
            axes.plot(x, y, color=color, lw=1.0, label={"modes": "all"}.get(label, label))
            if k == 0 and np.isfinite(spectrum.errors[name]).any():
                error = spectrum.errors[name]
                axes.fill_between(x, y - error, y + error, color="black", alpha=0.2, lw=0)
        for peak in sorted(spectrum.peaks, key=lambda p: -p.height)[:_NAMED]:
            axes.annotate(
                f"{peak.place:.0f}",
                (peak.place, peak.height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        if others:
            axes.legend(fontsize=7.5, loc="upper right")
        corrected = f", quantum correction: {spectrum.corrected}" if spectrum.corrected else ""
        axes.set_title(
            f"{spectrum.activity.temperature:.4g} K, window: {plan.window}, {plan.resolution:.3g} cm⁻¹{corrected}",
            loc="left",
            fontsize=8,
        )
        axes.set(xlabel="wavenumber (cm⁻¹)", ylabel=spectrum.label, xlim=(0.0, float(x[-1])))
        axes.margins(y=0.12)
        axes.set_ylim(0.0, None)
        return save_figure(figure, stem)
