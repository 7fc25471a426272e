"""Charge of an electrode layer by layer and atom by atom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voltpi.analysis.capacitor import Setup
from voltpi.analysis.ipi_files import iter_extras
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import BlockedMean, plus_minus
from voltpi.potential.errors import InputError

__all__ = ["Layer", "LayerMap", "layer_map", "layers_of"]

Array = NDArray[np.float64]

_GAP = 0.5  # Å between the heights of two layers


@dataclass(frozen=True)
class Layer:
    """``atoms`` [k] of ``electrode`` (its place in the setup) at about one ``height`` (Å); 0 is the inner layer."""

    electrode: int
    place: int
    height: float
    atoms: NDArray[np.int64]


def layers_of(setup: Setup) -> list[Layer]:
    """Layers of all electrodes in the start structure, from the one that faces the electrolyte outwards.

    Layers are apart where the sorted heights of an electrode's atoms leave a gap of half an Ångström. The electrolyte
    faces the side that is nearer to the other outer electrode (a single electrode: to the mean of all other atoms).
    """
    geometry = setup.sum_over(np.asarray(setup.start.cell))
    z = setup.heights(setup.start.positions, geometry)
    order, free = setup.in_order(), setup.labels < 0
    out = []
    for k, electrode in enumerate(setup.electrodes):
        heights = z[electrode.atoms]
        others = z[free] if free.any() else z
        if len(order) > 1 and k in (order[0], order[-1]):
            others = z[setup.electrodes[order[-1] if k == order[0] else order[0]].atoms]
        upwards = float(others.mean()) > float(heights.mean())
        ranked = np.argsort(-heights if upwards else heights, kind="stable")
        cuts = np.flatnonzero(np.abs(np.diff(heights[ranked])) > _GAP) + 1
        for place, members in enumerate(np.split(ranked, cuts)):
            atoms = np.sort(electrode.atoms[members])
            out.append(Layer(k, place, float(z[atoms].mean()), atoms))
    return out


@dataclass(frozen=True)
class LayerMap:
    """Means over a run.

    layers [l] · total [l] e, charge of every layer, with standard errors · mean, rms [n] e, of every atom's charge and
    of its fluctuations (0 for atoms of no electrode) · frames
    """

    setup: Setup
    layers: list[Layer]
    total: Array
    error: Array
    mean: Array
    rms: Array
    frames: int

    def table(self) -> tuple[list[str], Array]:
        """Header and one row for every electrode atom."""
        r = self.setup.start.positions
        rows = [
            [layer.electrode, layer.place, atom, *r[atom], self.mean[atom], self.rms[atom]]
            for layer in self.layers
            for atom in layer.atoms.tolist()
        ]
        return ["electrode", "layer", "atom", "x_A", "y_A", "z_A", "charge_e", "charge_rms_e"], np.array(rows)

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "frames": self.frames,
            "electrodes": [electrode.name for electrode in self.setup.electrodes],
            "layers": [
                {
                    "electrode": self.setup.electrodes[layer.electrode].name,
                    "layer": layer.place,
                    "height_A": layer.height,
                    "atoms": len(layer.atoms),
                    "charge_e": float(total),
                    "charge_error_e": float(error),
                    "charge_per_atom_e": float(total) / len(layer.atoms),
                    "spread_of_atoms_e": float(self.mean[layer.atoms].std()),
                    "rms_fluctuation_per_atom_e": float(np.sqrt(np.square(self.rms[layer.atoms]).mean())),
                }
                for layer, total, error in zip(self.layers, self.total, self.error, strict=True)
            ],
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        return [
            f"{self.setup.electrodes[layer.electrode].name} layer {layer.place} at {layer.height:7.2f} Å  "
            f"{plus_minus(float(total), float(error), '.5f')} e, {len(layer.atoms)} atoms"
            for layer, total, error in zip(self.layers, self.total, self.error, strict=True)
        ]


def layer_map(run: Run, setup: Setup, *, skip: float = 0.0) -> LayerMap:
    """Charges of electrode atoms of a run without its first ``skip`` fs; the means of layers are averaged over beads.

    Raises InputError without electrodes, or when the run wrote no charges.
    """
    if not setup.electrodes:
        raise InputError(f"{run.folder}: its settings have no electrodes; use profiles for a run without")
    files = run.extras.get("charges", ())
    if not files:
        raise InputError(f"{run.folder}: no charges; add <trajectory extra_type='charges'> extras </trajectory>")
    layers, n = layers_of(setup), len(setup.start)
    totals, first, second = BlockedMean(), np.zeros(n), np.zeros(n)
    metal = setup.labels >= 0
    late = run.after(skip)
    for beads in zip(*(iter_extras(path) for path in files), strict=False):
        step = beads[0][0]
        if any(q.ndim != 1 or len(q) < n for _, q in beads):
            raise InputError(f"{files[0]}: {beads[0][1].size} charges but the start structure has {n} atoms")
        if not late(step):
            continue
        q = np.array([values[:n] for _, values in beads])
        totals.add([q[:, layer.atoms].sum(axis=1).mean() for layer in layers])
        first += q.mean(axis=0)
        second += np.square(q).mean(axis=0)
    if totals.n == 0:
        raise InputError(f"{run.folder}: no charges after the first {skip:g} fs; skip less")
    mean = np.where(metal, first / totals.n, 0.0)
    rms = np.where(metal, np.sqrt(np.clip(second / totals.n - mean**2, 0.0, None)), 0.0)
    return LayerMap(setup, layers, totals.mean, totals.error, mean, rms, totals.n)
