"""Figures of structure and transport."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from voltpi.analysis.conductivity import Conductivity
from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.analysis.rdf import RadialDistributions
from voltpi.analysis.transport import Diffusion

__all__ = ["draw_conductivity", "draw_msd", "draw_rdf"]


def draw_rdf(rdf: RadialDistributions, stem: Path) -> list[Path]:
    """g(r) of every pair with its error, and the running coordination number."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        middle = rdf.r - 0.5 * rdf.bin
        for k, pair in enumerate(rdf.pairs):
            style = {"color": COLORS[k % len(COLORS)], "ls": ("-", "--", ":", "-.")[k // len(COLORS) % 4]}
            left.plot(middle, pair.g, lw=1.2, label=pair.name, **style)
            left.fill_between(
                middle, pair.g - pair.g_error, pair.g + pair.g_error, color=style["color"], alpha=0.2, lw=0
            )
            right.plot(rdf.r, pair.coordination, lw=1.2, **style)
        left.axhline(1.0, color="black", lw=0.6)
        left.set(xlabel="r (Å)", ylabel="g(r)", xlim=(0.0, rdf.r[-1]), ylim=(0.0, None))
        # the first shells matter: what comes after rises with r³
        counts = [shell["coordination"] for shell in map(rdf.shell, rdf.pairs) if shell["coordination"] is not None]
        top = 3.0 * max(counts) if counts else float(np.max([pair.coordination[-1] for pair in rdf.pairs]))
        right.set(xlabel="r (Å)", ylabel="coordination number", xlim=(0.0, rdf.r[-1]), ylim=(0.0, top or 1.0))
        left.legend(fontsize=7.5)
        return save_figure(figure, stem)


def draw_msd(diffusion: Sequence[Diffusion], stem: Path) -> list[Path]:
    """MSD of every kind of particles against time, with the fitted lines."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for k, d in enumerate(diffusion):
            color = COLORS[k % len(COLORS)]
            time, msd = d.lags / 1000.0, d.msd.sum(axis=1)
            half = len(time) // 2 + 1  # beyond it hardly any origin is left
            left.plot(time[:half], msd[:half], color=color, lw=1.0, label=d.name)
            right.loglog(time[1:half], np.maximum(msd[1:half], 1e-12), color=color, lw=1.0)
            if d.fitted is None:
                continue
            x = np.array(d.fitted) / 1000.0
            window = (time >= x[0]) & (time <= x[1])
            slope = 60.0 * d.d * 1e3  # Å²/ps
            level = float((msd[window] - slope * time[window]).mean())
            left.plot(x, level + slope * x, color="black", lw=0.8, ls="--")
            left.plot([], [], " ", label=f"D = {d.d * 1e5:.3g} ± {d.error * 1e5:.2g} · 10⁻⁵ cm²/s")
        left.set(xlabel="time (ps)", ylabel="MSD (Å²)", xlim=(0.0, None), ylim=(0.0, None))
        right.set(xlabel="time (ps)", ylabel="MSD (Å²)")
        left.legend(fontsize=7.5)
        return save_figure(figure, stem)


def draw_conductivity(c: Conductivity, stem: Path) -> list[Path]:
    """⟨|ΔM|²⟩ with its lines, and the running Green–Kubo integral with all estimates."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for k, h in enumerate(c.collective):
            color = COLORS[k % len(COLORS)]
            style = ("-", "--", ":", "-.")[k % 4]  # they may well lie on each other
            left.plot(h.lags / 1000.0, h.squares.sum(axis=1), color=color, ls=style, label=f"M of {h.moment.key}")
        left.axvspan(*(x / 1000.0 for x in c.collective[0].fitted), color="black", alpha=0.07, lw=0)
        left.set(xlabel="time (ps)", ylabel="⟨|ΔM|²⟩ (e²Å²)", xlim=(0.0, None), ylim=(0.0, None))
        left.legend(fontsize=7.5)
        lags, running = c.integral
        right.plot(lags / 1000.0, running / 100.0, color="black", lw=0.8, label="running Green–Kubo integral")
        width = 0.16 * float(lags[-1]) / 1000.0
        for k, e in enumerate(c.estimates):
            right.errorbar(
                lags[-1] / 1000.0 + (k + 1) * width,
                e.sigma / 100.0,
                None if not np.isfinite(e.error) else e.error / 100.0,
                fmt="osD^vPX"[k % 7],
                ms=4,
                capsize=2,
                lw=0.8,
                color=COLORS[k % len(COLORS)],
                label=e.method + (f" ({c.collective[k].moment.key})" if k < len(c.collective) else ""),
            )
        right.set(xlabel="time (ps)", ylabel="conductivity (S/cm)", xlim=(0.0, None))
        right.set_ylim(min(0.0, *(e.sigma / 100.0 for e in c.estimates)), None)
        right.legend(fontsize=6.5)
        return save_figure(figure, stem)
