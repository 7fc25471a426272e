"""The cheapest splitting of a Coulomb sum between mesh and pairs that gives a requested accuracy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from voltpi.potential.electrostatics.mesh import mesh_shape
from voltpi.potential.electrostatics.pairs import SWITCH_WIDTH
from voltpi.potential.electrostatics.window import Resolution, resolutions

__all__ = ["COST_PAIR", "COST_RIGID_PAIR", "Box", "Splitting", "box_edges", "choose_splitting", "split_pairs"]

# measured on one CPU core, ns per application: an atom and a window point, a mesh point (times log2), a pair
_COST_WINDOW, _COST_MESH, COST_PAIR, COST_RIGID_PAIR = 2.0, 0.75, 50.0, 25.0


class Splitting(NamedTuple):
    """β (1/Å; infinite: all on the mesh), real-space cutoff (Å), the window and its spacing (Å)."""

    beta: float
    cutoff: float
    window: Resolution
    spacing: float


class Box(NamedTuple):
    """Edges (Å, rows) of the periodic directions and the extent of the atoms along the open ones, without tails."""

    cell: Tensor
    boundary: str
    extent: tuple[float, float, float]


def split_pairs(inverse: Tensor, beta: float) -> Tensor:
    """[c, c] bool: pairs of widths (1/α, Å²) that are sharper together than the splitting."""
    return (
        inverse[:, None] + inverse < 1 / beta**2
        if math.isfinite(beta)
        else torch.zeros(len(inverse), len(inverse), dtype=torch.bool)
    )


def choose_splitting(
    box: Box,
    inverse: Tensor,
    counts: Tensor,
    accuracy: float,
    *,
    mesh_only: bool = False,
    cost_pair: float = COST_PAIR,
) -> Splitting:
    """The cheapest of all splittings that give the requested relative force error.

    Parameters
    ----------
    inverse, counts : [c], 1/α (Å²) of the widths present, and atoms of each
    mesh_only : no pairs in real space
    cost_pair : ns per pair

    β is taken from a coarse grid, so that it stays what it is for small strains and for replicas. Where a cell crosses
    from one β to the next the energy changes by the error of the sum.
    """
    decay = math.sqrt(-math.log(0.2 * accuracy))
    best, splitting = math.inf, None
    atoms = float(counts.sum())
    lengths = [float(v) for v in box.cell.norm(dim=1)]
    density = atoms / float(torch.linalg.det(box.cell).abs())
    together = inverse[:, None] + inverse
    for beta in [math.inf] if mesh_only else [math.inf, *(2 ** (j / 4) for j in range(-14, 9))]:
        split = split_pairs(inverse, beta)
        if math.isfinite(beta) and not bool(split.any()):
            continue
        sharpest = 1 / math.sqrt(float(together.min())) if math.isinf(beta) else beta
        widest = 1 / math.sqrt(float(together[~split].max())) if not bool(split.all()) else beta
        merged = split.all(1)
        channels = int((~merged).sum()) + int(merged.any())
        cutoff = decay / beta / (1 - 0.5 * SWITCH_WIDTH) if math.isfinite(beta) else 0.0
        pairs = 0.5 * float((split * counts[:, None] * counts).sum()) / atoms * density * 4.19 * cutoff**3
        for window in resolutions(accuracy):
            spacing = window.spacing / sharpest
            shape = mesh_shape(box_edges(box, lengths, decay / min(widest, beta)), spacing)
            points = math.prod(shape) * channels
            cost = _COST_WINDOW * atoms * window.support**3 + _COST_MESH * points * math.log2(math.prod(shape))
            cost += cost_pair * pairs
            if cost < best:
                best, splitting = cost, Splitting(beta, cutoff, window, spacing)
    assert splitting is not None
    return splitting


def box_edges(box: Box, lengths: list[float], tail: float) -> list[float]:
    """Edges of the mesh box (Å): along open directions, atoms and tails and the room that no image reaches."""
    if box.boundary == "periodic":
        return lengths
    if box.boundary == "slab":
        return [lengths[0], lengths[1], 2 * (box.extent[2] + tail)]
    across = math.sqrt(sum(e * e for e in box.extent)) + tail
    return [e + tail + across for e in box.extent]
