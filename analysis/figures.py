"""Figures: drawn without a screen, written as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voltpi.analysis.field_response import FieldResponse, RunSummary
from voltpi.analysis.polarization import E_PER_A2
from voltpi.analysis.statistics import block_averages, plus_minus

__all__ = ["COLORS", "STYLE", "draw_field_response", "draw_polarization", "save_figure"]

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.dpi": 100,
}
COLORS = ("#0072b2", "#d55e00", "#009e73")  # Okabe–Ito: told apart by all


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.svg."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1])
    return paths


def draw_polarization(summary: RunSummary, stem: Path) -> list[Path]:
    """Components of M per molecule along time with the mean, and the blocked error of that mean."""
    p, field = summary.polarization, summary.run.field
    strength = float(np.linalg.norm(field))
    time = p.time / 1000.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2.6, 1.0))
        for k, name in enumerate("xyz"):
            left.plot(time, p.dipole[:, k] / p.n_molecules, color=COLORS[k], lw=0.8, label=f"$M_{name}$")
        series = p.dipole @ (field / strength if strength > 0 else np.array([1.0, 0.0, 0.0])) / p.n_molecules
        if summary.induced is not None:
            value, error = summary.induced.value, summary.induced.error
            left.axhline(value, color="black", lw=1.0, label=f"mean along field {plus_minus(value, error, '.3f')}")
            if np.isfinite(error):
                left.axhspan(value - error, value + error, color="black", alpha=0.12, lw=0)
        left.set(xlabel="time (ps)", ylabel="dipole per molecule (e·Å)")
        left.set_title(f"field ({', '.join(f'{x:g}' for x in field)}) V/Å", loc="left", fontsize=9)
        left.margins(x=0.01)
        left.legend(ncols=4, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=1.2)
        _density_axis(left, p.n_molecules / float(p.volume.mean()))
        blocks = block_averages(series)
        spacing = float(np.ptp(p.time)) / max(len(p.time) - 1, 1)
        lengths = blocks.size * spacing
        right.errorbar(lengths, blocks.error, blocks.uncertainty, fmt="o", ms=3, lw=0.8, color="black")
        if len(lengths) > 1:
            right.set_xscale("log")
            shown = lengths[:: 1 + len(lengths) // 4]
            right.set_xticks(shown, [f"{x:.3g}" for x in shown])
            right.set_xticks([], minor=True)
        right.set(xlabel="block length (fs)", ylabel="error of the mean (e·Å)", ylim=(0.0, None))
        return save_figure(figure, stem)


def _density_axis(axes: Axes, molecules_per_volume: float) -> None:
    factor = molecules_per_volume * E_PER_A2
    second = axes.secondary_yaxis("right", functions=(lambda m: m * factor, lambda d: d / factor))
    second.set_ylabel("polarization (C/m²)")


def draw_field_response(response: FieldResponse, stem: Path) -> list[Path]:
    """⟨M⟩ per molecule against the field with the fitted line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.9), layout="constrained")
        axes = figure.subplots()
        finite = np.where(np.isfinite(response.errors), response.errors, 0.0)
        axes.errorbar(response.fields, response.dipoles, finite, fmt="o", ms=4, capsize=2, color=COLORS[0])
        x = np.linspace(min(0.0, response.fields.min()), max(0.0, response.fields.max()), 2)
        axes.plot(
            x,
            response.line.intercept + response.line.slope * x,
            color="black",
            lw=1.0,
            label=f"ε$_r$ = {plus_minus(response.permittivity, response.permittivity_error, '.1f')}",
        )
        axes.set(xlabel="field (V/Å)", ylabel="dipole per molecule (e·Å)")
        axes.legend(loc="upper left")
        return save_figure(figure, stem)
