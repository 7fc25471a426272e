"""Figures of a training: learning curves and parity plots, as PNG and SVG."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from ase.units import GPa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from voltpi.analysis.figures import COLORS, STYLE, save_figure
from voltpi.potential.training.evaluation import Evaluated

__all__ = ["draw_learning", "draw_parity"]

_QUANTITIES = (
    ("force_rmse", "force RMSE (eV/Å)"),
    ("energy_rmse", "energy RMSE (meV/atom)"),
    ("stress_rmse", "stress RMSE (GPa)"),
)
_MOST_POINTS = 20000


def draw_learning(log: Path, stem: Path) -> list[Path]:
    """Errors in training and validation (of the averaged weights) against the epoch, from ``log.csv``."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    shown = [(key, label) for key, label in _QUANTITIES if any(c.endswith(key) for c in columns)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * (len(shown) + 1), 2.8), layout="constrained")
        *panels, last = figure.subplots(1, len(shown) + 1)
        for axes, (key, title) in zip(panels, shown, strict=True):
            names = ["train", *(c.removesuffix(f"_{key}") for c in columns if c.endswith(key) and "train_" not in c)]
            for k, name in enumerate(names):
                label = "training" if k == 0 else "validation" + (f", {name}" if len(names) > 2 else "")
                _curve(axes, rows, f"{name}_{key}", COLORS[k % len(COLORS)], label)
            axes.set(xlabel="epoch", ylabel=title, yscale="log")
            axes.legend(fontsize=7.5)
        _curve(last, rows, "learning_rate", "black", "")
        last.set(xlabel="epoch", ylabel="learning rate", yscale="log")
        return save_figure(figure, stem)


def _curve(axes: Axes, rows: Sequence[Mapping[str, str]], column: str, color: str, label: str) -> None:
    points = [(int(r["epoch"]), float(r[column])) for r in rows if r.get(column)]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, lw=1.0, label=label, marker="." if len(points) < 3 else "")


def draw_parity(train: Sequence[Evaluated], validation: Sequence[Evaluated], stem: Path) -> list[Path]:
    """Predicted against labelled energies per atom, force and stress components, as the network sees them.

    (That is what is left when long range and reference energies are taken from the labels.)
    """
    sides = [("training", train, COLORS[0]), ("validation", validation, COLORS[1])]
    panels = [("energy (eV/atom)", _energies), ("force (eV/Å)", _forces), ("stress (GPa)", _stresses)]
    if not any(a.stress is not None for _, answers, _ in sides for a in answers):
        panels.pop()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(panels), 3.1), layout="constrained")
        for axes, (label, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            low, high = np.inf, -np.inf
            for name, answers, color in sides:
                if not len(points := values(answers)):
                    continue
                error = float(np.sqrt(np.mean(np.square(points[:, 1] - points[:, 0]))))
                low, high = min(low, points.min()), max(high, points.max())
                step = -(-len(points) // _MOST_POINTS)
                text = f"{name}, RMSE {error:.3g}"
                axes.plot(*points[::step].T, ".", ms=2, color=color, label=text, rasterized=True)
            axes.plot([low, high], [low, high], color="black", lw=0.7)
            axes.set(xlabel=f"labelled {label}", ylabel=f"predicted {label}")
            axes.legend(fontsize=7.5, markerscale=3)
        return save_figure(figure, stem)


def _energies(answers: Sequence[Evaluated]) -> np.ndarray:
    return np.array([[a.sample.energy, a.energy] for a in answers]) / np.array(
        [[a.sample.systems.n_atoms] for a in answers]
    ).reshape(-1, 1)


def _forces(answers: Sequence[Evaluated]) -> np.ndarray:
    pairs = [np.stack([a.sample.forces.numpy().reshape(-1), a.forces.reshape(-1)], 1) for a in answers]
    return np.concatenate(pairs) if pairs else np.zeros((0, 2))


def _stresses(answers: Sequence[Evaluated]) -> np.ndarray:
    pairs = [
        np.stack([a.sample.stress.numpy().reshape(-1), a.stress.reshape(-1)], 1) / GPa
        for a in answers
        if a.stress is not None and a.sample.stress is not None
    ]
    return np.concatenate(pairs) if pairs else np.zeros((0, 2))
