"""Figures of molecular dipoles and Born charges."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from voltpi.analysis.born_charges import BornCharges
from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.analysis.molecular_dipoles import MolecularDipoles

__all__ = ["draw_born_charges", "draw_molecular_dipoles"]


def draw_molecular_dipoles(found: MolecularDipoles, stem: Path) -> list[Path]:
    """Distribution of |μ|; of cos θ with the field, and the mean |μ| there; G_K(r)."""
    kinds = found.kinds[:3]
    correlated = [kind for kind in kinds if len(kind.radii)]
    panels = 1 + (found.direction is not None) + bool(correlated)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.0 * panels, 2.7), layout="constrained")
        axes = list(np.atleast_1d(figure.subplots(1, panels)))
        first = axes.pop(0)
        for kind, color in zip(kinds, COLORS, strict=False):
            x, y = found.histogram(kind)
            first.stairs(
                y, np.append(x - 0.5 * (x[1] - x[0]), x[-1] + 0.5 * (x[1] - x[0])), color=color, label=kind.formula
            )
        first.set(xlabel="dipole (D)", ylabel="density (1/D)")
        first.legend(fontsize=7.5)
        if found.direction is not None:
            second = axes.pop(0)
            other = second.twinx()
            for kind, color in zip(kinds, COLORS, strict=False):
                x, density, size = found.by_angle(kind)
                second.stairs(density, np.linspace(-1.0, 1.0, len(x) + 1), color=color)
                other.plot(x, size, ".", color=color, ms=4)
            second.axhline(0.5, color="grey", lw=0.8, ls=":")
            second.set(xlabel="cos θ with the field", ylabel="density (lines)", xlim=(-1.0, 1.0))
            other.set_ylabel("mean dipole there (D, dots)")
            other.spines["right"].set_visible(True)
        if correlated:
            third = axes.pop(0)
            for kind, color in zip(kinds, COLORS, strict=False):
                third.plot(kind.radii, kind.kirkwood, color=color)
            third.axhline(1.0, color="grey", lw=0.8, ls=":")
            third.set(xlabel="r (Å)", ylabel="G$_K$(r)")
        return save_figure(figure, stem)


def draw_born_charges(found: BornCharges, stem: Path) -> list[Path]:
    """Distributions of Tr Z*/3 (filled) and of the eigenvalues (lines); the profile across the cell."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        width = found.edges[1] - found.edges[0]
        for k, element in enumerate(found.elements):
            color = COLORS[k % len(COLORS)]
            total = element.counts.sum() * width
            left.stairs(element.counts / total, found.edges, fill=True, color=color, alpha=0.35)
            for counts in element.eigenvalue_counts:
                left.stairs(counts / total, found.edges, color=color, lw=0.8)
            values = found.profile[element.symbol]
            right.plot(found.height, values[:, 1], ".-", ms=3, lw=0.8, color=color, label=element.symbol)
            right.plot(found.height, values[:, 2], ":", lw=1.0, color=color)
        left.set(xlabel="Z* (e): Tr Z*/3 filled, eigenvalues lines", ylabel="density (1/e)")
        right.set(xlabel=f"height along {'abc'[found.axis]} (Å)", ylabel="Z* (e): Tr Z*/3, along the axis dotted")
        right.legend(fontsize=7.5)
        return save_figure(figure, stem)
