"""Figures of the dielectric constant, of polarization loops and of the energy against D."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voltpi.analysis.dielectric import FOUR_PI_K_E, Dielectric, Slope
from voltpi.analysis.double_well import DoubleWell
from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.analysis.hysteresis import Loop
from voltpi.analysis.polarization import E_PER_A2
from voltpi.analysis.statistics import plus_minus

__all__ = ["draw_dielectric", "draw_double_well", "draw_loop"]

_TEXT = {"field": "field ε (V/Å)", "displacement": "displacement D (V/Å)"}
_COLOR = {"field": COLORS[0], "displacement": COLORS[1]}


def draw_dielectric(result: Dielectric, stem: Path) -> list[Path]:
    """4πk_e⟨P⟩ against ε and against D with the lines, and the estimates side by side."""
    n = len(result.slopes) + 1
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * n, 2.7), layout="constrained")
        panels = list(np.atleast_1d(figure.subplots(1, n)))
        for axes, slope in zip(panels, result.slopes, strict=False):
            _draw_slope(axes, slope)
        _draw_estimates(panels[-1], result)
        return save_figure(figure, stem)


def _draw_slope(axes: Axes, slope: Slope) -> None:
    color = _COLOR[slope.kind]
    for chosen, face in ((slope.used, color), (~slope.used, "none")):
        error = np.nan_to_num(slope.error[chosen])
        axes.errorbar(
            slope.control[chosen], slope.polarized[chosen], error, fmt="o", ms=4, capsize=2, color=color, mfc=face
        )
    x = np.array([min(0.0, slope.control.min()), max(0.0, slope.control.max())])
    label = f"slope {plus_minus(slope.line.slope, slope.line.slope_error, '.3f')}"
    axes.plot(x, slope.line.intercept + slope.line.slope * x, color="black", lw=1.0, label=label)
    axes.set(xlabel=_TEXT[slope.kind], ylabel="4π$k_e$⟨P⟩ (V/Å)")
    axes.legend(loc="upper left")


def _draw_estimates(axes: Axes, result: Dielectric) -> None:
    low, high = (end if np.isfinite(end) else np.nan for end in result.combined[1:])
    if np.isfinite(low) and np.isfinite(high):
        axes.axvspan(low, high, color="black", alpha=0.12, lw=0)
    if np.isfinite(result.combined[0]):
        axes.axvline(result.combined[0], color="black", lw=0.8)
    widest = max(e.value + 3.0 * (e.value - e.low) for e in result.estimates)
    for k, e in enumerate(result.estimates):
        right = e.high if np.isfinite(e.high) else widest
        error = np.nan_to_num([[max(e.value - e.low, 0.0)], [max(right - e.value, 0.0)]])
        axes.errorbar(e.value, -k, xerr=error, fmt="o", ms=4, capsize=2, color=_COLOR[e.kind])
    axes.set_yticks([-k for k in range(len(result.estimates))], [e.name[:3] for e in result.estimates])
    axes.set(xlabel="ε$_r$", ylim=(-len(result.estimates) + 0.4, 0.6))


def draw_loop(loop: Loop, stem: Path) -> list[Path]:
    """P against ε, and against D where that is imposed; cycles in colour over all of the run."""
    x = [(loop.field, loop.averaged[0], _TEXT["field"])]
    if loop.kind == "displacement":
        x.append((loop.displacement, loop.averaged[2], _TEXT["displacement"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(x), 2.9), layout="constrained")
        for axes, (every, mean, name) in zip(np.atleast_1d(figure.subplots(1, len(x))), x, strict=True):
            axes.plot(every, loop.polarization * E_PER_A2, color="0.8", lw=0.5)
            axes.plot(mean, loop.averaged[1] * E_PER_A2, color=COLORS[0], lw=1.2)
            axes.axhline(0.0, color="black", lw=0.5)
            axes.axvline(0.0, color="black", lw=0.5)
            axes.set(xlabel=name, ylabel="polarization (C/m²)")
        if loop.cycles:
            value, error = (x * E_PER_A2 for x in loop.mean("remanent"))
            figure.suptitle(f"$P_r$ = {plus_minus(value, error, '.3f')} C/m²", fontsize=9, x=0.02, ha="left")
        return save_figure(figure, stem)


def draw_double_well(well: DoubleWell, stem: Path) -> list[Path]:
    """ε and U against D."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        error = np.nan_to_num(well.error)
        left.errorbar(well.displacement, well.field, error, fmt="o", ms=4, capsize=2, color=COLORS[0])
        left.plot(well.grid, well.grid_field, color="black", lw=1.0)
        left.axhline(0.0, color="black", lw=0.5)
        left.set(xlabel=_TEXT["displacement"], ylabel="field ε (V/Å)")
        energy, spread = 1000.0 * well.grid_energy, 1000.0 * np.nan_to_num(well.grid_error)
        right.fill_between(well.grid, energy - spread, energy + spread, color=COLORS[0], alpha=0.25, lw=0)
        right.plot(well.grid, energy, color=COLORS[0], lw=1.2)
        for s in well.stationary:
            right.plot(s.displacement, 1000.0 * s.energy, "o" if s.stable else "x", color="black", ms=4)
        right.set(xlabel=_TEXT["displacement"], ylabel="U (meV per cell)")
        top = right.secondary_xaxis("top", functions=(_to_polarization, _to_displacement))
        top.set_xlabel("D/4π$k_e$ (C/m²)")
        return save_figure(figure, stem)


def _to_polarization(displacement: np.ndarray) -> np.ndarray:
    return displacement / FOUR_PI_K_E * E_PER_A2


def _to_displacement(polarization: np.ndarray) -> np.ndarray:
    return polarization * FOUR_PI_K_E / E_PER_A2
