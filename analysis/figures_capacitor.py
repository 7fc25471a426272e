"""Figures of capacitors: profiles, charge of the electrodes, layers, and all of it on one page."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from voltpi.analysis.capacitance import ChargeSummary
from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.analysis.layers import LayerMap
from voltpi.analysis.profiles import Profiles
from voltpi.analysis.statistics import plus_minus
from voltpi.analysis.voltage_response import VoltageResponse

__all__ = ["draw_capacitor", "draw_electrode_charge", "draw_layers", "draw_profiles", "draw_voltage_response"]

_MANY = (*COLORS, "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe–Ito


def _band(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], error: NDArray[np.float64], color: str) -> None:
    if np.isfinite(error).all():
        axes.fill_between(x, y - error, y + error, color=color, alpha=0.25, lw=0)


def _profiles(density: Axes, charge: Axes, potential: Axes, p: Profiles) -> None:
    """The three panels across the cell."""
    names = [electrode.name for electrode in p.setup.electrodes]
    for (name, values), color in zip(p.density.items(), _MANY * 9, strict=False):
        metal = name in names
        color = "#999999" if metal else color
        density.plot(p.z, values, color=color, lw=1.0, label=None if metal else name, zorder=1 if metal else 2)
        _band(density, p.z, values, p.errors[f"density:{name}"], color)
    free = [values.max() for name, values in p.density.items() if name not in names]
    if free and max(free) > 0.0:
        density.set_ylim(0.0, 1.15 * max(free))
    density.set(ylabel="density (Å$^{-3}$)")
    if free:
        density.legend(ncols=4, fontsize=7.5, loc="upper center")
    if names:
        charge.plot(p.z, p.electrodes, color="#999999", lw=1.0, label="electrodes")
    charge.plot(p.z, p.ions, color=COLORS[0], lw=1.0, label="electrolyte" if names else "all")
    _band(charge, p.z, p.ions, p.errors["ions"], COLORS[0])
    charge.set(ylabel="charge density (e/Å$^3$)")
    charge.legend(ncols=2, fontsize=7.5, loc="upper center")
    potential.plot(p.edges, p.potential, color="black", lw=1.0)
    _band(potential, p.edges, p.potential, p.errors["potential"], "black")
    potential.set(ylabel="potential (V)", xlabel="height across the cell (Å)")
    for k, electrode in enumerate(p.setup.electrodes):
        if p.audit is not None and electrode.name in p.audit.names:
            place = p.audit.names.index(electrode.name)
            level = float(p.audit.recovered[:, place].mean())
            potential.axhline(level, color=_MANY[k], lw=0.8, ls="--", label=f"{electrode.name} {level:.3f} V")
    if p.audit is not None:
        potential.legend(ncols=3, fontsize=7.5)
    for axes in (density, charge, potential):
        axes.margins(x=0.0)


def _charge(axes: Axes, s: ChargeSummary) -> None:
    """Charge of every electrode against time with its mean."""
    time = s.series.time / 1000.0
    for k, (electrode, mean) in enumerate(zip(s.setup.electrodes, s.means, strict=True)):
        label = f"{electrode.name} {plus_minus(mean.value, mean.error, '.3f')} e"
        axes.plot(time, s.series.charges[:, k], color=_MANY[k], lw=0.7, label=label)
        axes.axhline(mean.value, color=_MANY[k], lw=0.8, ls="--")
    axes.set(xlabel="time (ps)", ylabel="electrode charge (e)")
    axes.margins(x=0.01)
    axes.legend(fontsize=7.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _layers(axes: Axes, m: LayerMap) -> None:
    """Charge per atom of every layer."""
    for k, electrode in enumerate(m.setup.electrodes):
        own = [i for i, layer in enumerate(m.layers) if layer.electrode == k]
        count = np.array([len(m.layers[i].atoms) for i in own])
        error = np.where(np.isfinite(m.error[own]), m.error[own], 0.0)
        place = [m.layers[i].place for i in own]
        axes.errorbar(
            place, m.total[own] / count, error / count, fmt="o-", ms=3, lw=0.8, color=_MANY[k], label=electrode.name
        )
    axes.axhline(0.0, color="black", lw=0.5)
    axes.set(xlabel="layer (0: at the electrolyte)", ylabel="charge per atom (e)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7.5)


def draw_profiles(profiles: Profiles, stem: Path) -> list[Path]:
    """Densities, charge density and potential across the cell, one above the other."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.0), layout="constrained")
        density, charge, potential = figure.subplots(3, 1, sharex=True)
        _profiles(density, charge, potential, profiles)
        if profiles.audit is not None:
            figure.suptitle(profiles.audit.title(), fontsize=9)
        return save_figure(figure, stem)


def draw_electrode_charge(summary: ChargeSummary, stem: Path, title: str = "") -> list[Path]:
    """Charge and potentials against time, and how often each charge occurs."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(2.6, 1.0), height_ratios=(2.0, 1.0))
        charge, counts, potential = (figure.add_subplot(grid[at]) for at in ((0, 0), (0, 1), (1, 0)))
        _charge(charge, summary)
        q = summary.difference
        if np.ptp(q) > 1e-9 * max(float(np.abs(q).max()), 1e-9):
            bins = min(max(int(np.sqrt(len(q))), 5), 60)
            heights, edges = np.histogram(q, bins, density=True)
            counts.stairs(heights, edges, fill=True, color=COLORS[0], alpha=0.6)
            x = np.linspace(edges[0], edges[-1], 200)
            width = float(q.std())
            normal = np.exp(-0.5 * ((x - q.mean()) / width) ** 2) / (width * np.sqrt(2.0 * np.pi))
            counts.plot(x, normal, color="black", lw=0.9, label="normal")
            counts.set_ylim(0.0, 1.25 * max(float(heights.max()), float(normal.max())))
            counts.legend(fontsize=7.5)
        counts.set(xlabel="charge Q (e)", ylabel="probability (1/e)")
        for k, electrode in enumerate(summary.setup.electrodes):
            potential.plot(
                summary.series.time / 1000.0,
                summary.series.potentials[:, k],
                color=_MANY[k],
                lw=0.8,
                label=electrode.name,
            )
        potential.set(xlabel="time (ps)", ylabel="potential (V)")
        potential.margins(x=0.01)
        figure.suptitle(title, fontsize=9)
        return save_figure(figure, stem)


def draw_voltage_response(response: VoltageResponse, stem: Path, title: str = "") -> list[Path]:
    """⟨Q⟩ against the voltage with the fitted line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.8, 3.1), layout="constrained")
        axes = figure.subplots()
        finite = np.where(np.isfinite(response.errors), response.errors, 0.0)
        axes.errorbar(response.voltages, response.charges, finite, fmt="o", ms=4, capsize=2, color=COLORS[0])
        x = np.array([response.voltages.min(), response.voltages.max()])
        numbers = response.numbers()
        both = plus_minus(numbers["capacitance_uF_per_cm2"], numbers["capacitance_error_uF_per_cm2"], ".2f")
        axes.plot(x, response.line.intercept + response.line.slope * x, color="black", lw=1.0, label=f"{both} µF/cm²")
        axes.set(xlabel="voltage (V)", ylabel="charge Q (e)")
        axes.legend(loc="upper left")
        figure.suptitle(title, fontsize=8)
        return save_figure(figure, stem)


def draw_layers(layers: LayerMap, stem: Path, title: str = "") -> list[Path]:
    """Mean charge of the atoms of every electrode's inner layer in the plane, and charge per atom by layer."""
    setup = layers.setup
    inner = [layer for layer in layers.layers if layer.place == 0]
    geometry = setup.sum_over(np.asarray(setup.start.cell))
    u = np.asarray(setup.start.cell)[(setup.axis + 1) % 3]
    u = u / np.linalg.norm(u)
    v = np.cross(geometry.normal, u)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(inner) + 3.0, 3.2), layout="constrained")
        panels = figure.subplots(1, len(inner) + 1)
        for axes, layer in zip(panels, inner, strict=False):
            r = setup.start.positions[layer.atoms]
            own = layers.mean[layer.atoms]
            most = max(float(np.abs(own).max()), 1e-12)
            size = float(np.clip(6000.0 / len(own), 4.0, 160.0))
            points = axes.scatter(r @ u, r @ v, c=own, s=size, cmap="RdBu_r", vmin=-most, vmax=most)
            figure.colorbar(points, ax=axes, label="mean charge (e)", shrink=0.8)
            axes.margins(0.1)
            axes.set(xlabel="along the plane (Å)", aspect="equal")
            axes.set_title(setup.electrodes[layer.electrode].name, fontsize=9)
        _layers(panels[-1], layers)
        figure.suptitle(title, fontsize=9)
        return save_figure(figure, stem)


def draw_capacitor(profiles: Profiles, charge: ChargeSummary, layers: LayerMap, stem: Path) -> list[Path]:
    """Densities, charge density, potential, charge against time and by layer on one page; the audit is the title."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 9.4), layout="constrained")
        grid = figure.add_gridspec(4, 2, width_ratios=(2.2, 1.0))
        density = figure.add_subplot(grid[0, :])
        others = [figure.add_subplot(grid[i, :], sharex=density) for i in (1, 2)]
        _profiles(density, others[0], others[1], profiles)
        _charge(figure.add_subplot(grid[3, 0]), charge)
        _layers(figure.add_subplot(grid[3, 1]), layers)
        figure.suptitle("" if profiles.audit is None else profiles.audit.title(), fontsize=9)
        return save_figure(figure, stem)
