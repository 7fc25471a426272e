"""Radial distribution functions and running coordination numbers.

    g_AB(r) = ⟨V n_AB(r, r + dr)⟩ / (N_AB · 4π/3 [(r + dr)³ − r³]),   n_A(r) = ⟨number of B within r of an A⟩

with n_AB the number of pairs in a shell and N_AB that of all distinct pairs, N_A N_B or N_A (N_A − 1)/2, so that an
ideal gas has g = 1; every frame has its own volume (M. P. Allen, D. J. Tildesley, Computer Simulation of Liquids,
2nd ed., 2017, sec. 2.6 and 8.2). The coordination number is counted, not integrated from g.

Pairs come from vesin's cell lists: any cell, that of each frame, in double precision, and distances beyond half the
cell see all images. mdtraj.compute_rdf wants a list of all pairs beforehand and single precision; measured on one core
(2026): 216 atoms to half the cell 3 ms a frame against 8 ms here, 3000 atoms to 10 Å 440 ms against 220 ms, and for
10 000 atoms its list has 5·10⁷ pairs (1.0 s here).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import vesin
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from voltpi.analysis.molecules import molecules_of
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import BlockedMean, plus_minus
from voltpi.analysis.trajectory import frames_of
from voltpi.potential.errors import InputError

__all__ = ["PairDistribution", "RadialDistributions", "radial_distributions"]

Array = NDArray[np.float64]

_FARTHEST = 10.0  # Å, where no range is given
_LEAST_PEAK = 1.05  # a first maximum of g lower than this is none


@dataclass(frozen=True)
class PairDistribution:
    """g(r) [b] and the running coordination number [b] of element ``a`` by ``b``, with standard errors."""

    a: str
    b: str
    g: Array
    g_error: Array
    coordination: Array
    coordination_error: Array

    @property
    def name(self) -> str:
        """Such as Na-Cl."""
        return f"{self.a}-{self.b}"


@dataclass(frozen=True)
class RadialDistributions:
    """g(r) of all pairs.

    r [b] Å: the outer edges of bins of width ``bin`` · density of atoms 1/Å³ · molecules: which pairs count
    """

    r: Array
    bin: float
    pairs: tuple[PairDistribution, ...]
    n_frames: int
    n_beads: int
    density: float
    molecules: str

    def shell(self, pair: PairDistribution) -> dict[str, Any]:
        """First maximum and following minimum of g, and the coordination number there; None without."""
        middle = self.r - 0.5 * self.bin
        g = np.convolve(np.pad(pair.g, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")  # noise of a bin or two
        rises = np.flatnonzero((g[1:-1] > g[:-2]) & (g[1:-1] >= g[2:]) & (g[1:-1] > _LEAST_PEAK)) + 1
        top = int(next((k for k in rises if g[k] >= 0.5 * g.max()), 0))
        if top == 0:
            return {"first_maximum_A": None, "first_minimum_A": None, "coordination": None, "coordination_error": None}
        below = np.flatnonzero(g[top:] < 1.0)
        # down to the lowest point before g rises above 1 again
        start = top + int(below[0]) if len(below) else top
        again = np.flatnonzero(g[start:] >= 1.0)
        stop = start + int(again[0]) if len(again) else len(g)
        low = start + int(np.argmin(g[start:stop])) if len(below) else None
        return {
            "first_maximum_A": float(middle[top]),
            "height": float(pair.g[top]),
            "height_error": float(pair.g_error[top]),
            "first_minimum_A": None if low is None else float(middle[low]),
            "coordination": None if low is None else float(pair.coordination[low]),
            "coordination_error": None if low is None else float(pair.coordination_error[low]),
        }

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "frames": self.n_frames,
            "beads": self.n_beads,
            "bin_A": self.bin,
            "range_A": float(self.r[-1]),
            "atoms_per_A3": self.density,
            "molecules": self.molecules,
            "pairs": {pair.name: self.shell(pair) for pair in self.pairs},
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        beads = f" of {self.n_beads} beads" if self.n_beads > 1 else ""
        lines = [f"{self.n_frames} frames{beads}, {self.molecules} pairs"]
        for pair in self.pairs:
            shell = self.shell(pair)
            if shell["first_maximum_A"] is None:
                lines.append(f"{pair.name:<6} no maximum within {self.r[-1]:.3g} Å")
                continue
            line = f"{pair.name:<6} maximum at {shell['first_maximum_A']:.2f} Å"
            if shell["first_minimum_A"] is not None:
                count = plus_minus(shell["coordination"], shell["coordination_error"], ".2f")
                line += f", {count} {pair.b} around {pair.a} up to the minimum at {shell['first_minimum_A']:.2f} Å"
            lines.append(line)
        return lines

    def table(self) -> tuple[list[str], Array]:
        """Header and rows of the CSV: the middle of each bin, g there, and the count up to the bin's outer edge."""
        header, columns = ["r_A", "r_outer_A"], [self.r - 0.5 * self.bin, self.r]
        for p in self.pairs:
            header += [f"g_{p.name}", f"g_error_{p.name}", f"n_{p.name}", f"n_error_{p.name}"]
            columns += [p.g, p.g_error, p.coordination, p.coordination_error]
        return header, np.column_stack(columns)


def radial_distributions(
    run: Run,
    *,
    pairs: str | None = None,
    skip: float = 0.0,
    bin_width: float = 0.05,
    farthest: float | None = None,
    molecules: Literal["all", "intra", "inter"] = "all",
) -> RadialDistributions:
    """g(r) of a run; beads of a ring polymer are averaged, errors come from blocks of frames.

    ``pairs``: such as ``O-O,O-H`` (in this order: n counts the second around the first), else all; ``farthest`` (Å):
    else half the cell's smallest width, 10 Å at most; ``molecules``: ``intra`` (pairs of one molecule of the first
    frame) or ``inter`` (of two) alone. Raises InputError for a cell that is not periodic in three directions, an
    element that is not there, or a bin or range that is none.
    """
    frames = frames_of(run, skip)
    step, beads = next(frames)
    first = beads[0]
    if not first.pbc.all():
        raise InputError(f"{run.positions[0]}: g(r) needs a cell that is periodic in three directions")
    if farthest is None:
        inverse = np.linalg.inv(np.asarray(first.cell))
        farthest = min(_FARTHEST, 0.5 / float(np.linalg.norm(inverse, axis=0).max()))
    if not 0.0 < bin_width < farthest:
        raise InputError(f"bin is {bin_width:g} Å and range {farthest:g} Å: give a bin above zero and below the range")
    n_bins = int(np.floor(farthest / bin_width + 1e-9))
    edges: Array = bin_width * np.arange(n_bins + 1, dtype=float)
    shells = 4.0 / 3.0 * np.pi * np.diff(edges**3)
    wanted = _wanted(first, pairs)
    counts = {z: int((first.numbers == z).sum()) for z in {z for pair in wanted for z in pair}}
    labels = None if molecules == "all" else molecules_of(first)
    neighbors = vesin.NeighborList(cutoff=float(edges[-1]), full_list=False)
    g_means: dict[tuple[int, int], BlockedMean] = defaultdict(BlockedMean)
    n_means: dict[tuple[int, int], BlockedMean] = defaultdict(BlockedMean)
    density, n_frames, volume = 0.0, 0, 0.0
    while True:
        hists = []
        for atoms in beads:
            volume = abs(float(atoms.get_volume()))
            found = _histograms(atoms, neighbors, edges, wanted, labels, molecules)
            hists.append({pair: np.stack([found[pair], found[pair] * volume]) for pair in wanted})
            density += len(atoms) / volume / len(beads)
        n_frames += 1
        for a, b in wanted:
            count, weighted = np.mean([hist[a, b] for hist in hists], axis=0)
            distinct = counts[a] * counts[b] if a != b else 0.5 * counts[a] * (counts[a] - 1)
            g_means[a, b].add(weighted / (max(distinct, 1.0) * shells))
            n_means[a, b].add(np.cumsum(count) * (2.0 if a == b else 1.0) / counts[a])
        following = next(frames, None)
        if following is None:
            break
        step, beads = following
        if len(beads[0]) != len(first):
            raise InputError(f"{run.positions[0]}: step {step} has {len(beads[0])} atoms, the first {len(first)}")
    done = tuple(
        PairDistribution(
            chemical_symbols[a],
            chemical_symbols[b],
            g_means[a, b].mean,
            g_means[a, b].error,
            n_means[a, b].mean,
            n_means[a, b].error,
        )
        for a, b in wanted
    )
    what = {"all": "all", "intra": "intramolecular", "inter": "intermolecular"}[molecules]
    return RadialDistributions(edges[1:], bin_width, done, n_frames, len(run.positions), density / n_frames, what)


def _wanted(atoms: Atoms, pairs: str | None) -> list[tuple[int, int]]:
    present = list(dict.fromkeys(atoms.numbers[atoms.numbers > 0].tolist()))  # without the particle of a potentiostat
    if pairs is None:
        return [(a, b) for k, a in enumerate(present) for b in present[k:]]
    known = {chemical_symbols[z]: z for z in present}
    wanted = []
    for word in pairs.split(","):
        names = [name.strip() for name in word.split("-")]
        if len(names) != 2 or not all(names):
            raise InputError(f"pairs is {pairs!r}: give pairs of elements, such as O-O,O-H")
        lost = [name for name in names if name not in known]
        if lost:
            raise InputError(f"pairs: there is no {lost[0]} in this run, which has {', '.join(known)}")
        wanted.append((known[names[0]], known[names[1]]))
    return list(dict.fromkeys(wanted))


def _histograms(
    atoms: Atoms,
    neighbors: vesin.NeighborList,
    edges: Array,
    wanted: list[tuple[int, int]],
    labels: NDArray[np.int64] | None,
    molecules: str,
) -> dict[tuple[int, int], Array]:
    """Number of pairs [b] in every shell, each pair once."""
    i, j, d = neighbors.compute(
        points=atoms.positions, box=np.asarray(atoms.cell), periodic=True, quantities="ijd", copy=True
    )
    place = np.searchsorted(edges, d, side="right") - 1
    kept = (place < len(edges) - 1) & (place >= 0)
    if labels is not None:
        kept &= (labels[i] == labels[j]) == (molecules == "intra")
    lower, upper = np.minimum(atoms.numbers[i], atoms.numbers[j]), np.maximum(atoms.numbers[i], atoms.numbers[j])
    return {
        (a, b): np.bincount(place[kept & (lower == min(a, b)) & (upper == max(a, b))], minlength=len(edges) - 1).astype(
            float
        )
        for a, b in wanted
    }
