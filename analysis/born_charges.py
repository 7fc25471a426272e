"""Born effective charges along a run: by element, by atom, across the cell, and their sum.

Z*_iab = ∂M_a/∂r_ib = ∂F_ib/∂ε_a, in e, as the driver sends them (``output.born_charges: true``). Split into

    isotropic Tr Z*/3 · eigenvalues of the symmetric part ½(Z* + Z*ᵀ) · antisymmetric part, as the rms of its elements.

Acoustic sum rule: Σ_i Z*_iab = Q δ_ab with the net charge Q (R. Pick, M. H. Cohen, R. M. Martin, Phys. Rev. B 1, 910
(1970)). What an atom carries, q, and what follows the atoms' motion, Z* − q 1, are apart where charges were written.
In VoltPI's models Z* holds the charges that a molecule or atom carries, and the answer of the shells (and of charges
that flow, with ``response: all``): there are no electrons beyond these.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from voltpi.analysis.ipi_files import ByStep, iter_extras, read_trajectory
from voltpi.analysis.runs import Run
from voltpi.analysis.statistics import BlockedMean
from voltpi.potential.errors import InputError

__all__ = ["BornCharges", "Element", "born_charges"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Element:
    """Atoms of one element over all frames and beads; Z* in e.

    isotropic, error: mean of Tr Z*/3 · spread: its standard deviation over atoms and time · between: of the atoms'
    means · tensor, tensor_error [3, 3] · eigenvalues, eigenvalue_spread [3], ascending · antisymmetric: rms ·
    counts [bins]: of Tr Z*/3, on ``edges``, and of every eigenvalue [3, bins] · charge: mean q, or None
    """

    symbol: str
    atoms: int
    isotropic: float
    error: float
    spread: float
    between: float
    tensor: Array
    tensor_error: Array
    eigenvalues: Array
    eigenvalue_spread: Array
    antisymmetric: float
    counts: Array
    eigenvalue_counts: Array
    charge: float | None

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "atoms": self.atoms,
            "isotropic_e": self.isotropic,
            "isotropic_error_e": self.error,
            "isotropic_spread_e": self.spread,
            "spread_between_atoms_e": self.between,
            "tensor_e": self.tensor.tolist(),
            "tensor_error_e": self.tensor_error.tolist(),
            "eigenvalues_e": self.eigenvalues.tolist(),
            "eigenvalue_spread_e": self.eigenvalue_spread.tolist(),
            "antisymmetric_rms_e": self.antisymmetric,
            "charge_e": self.charge,
        }


@dataclass(frozen=True)
class BornCharges:
    """A map of Z*.

    first: the structure · mean [n, 3, 3], isotropic_spread [n] e, of every atom · edges: of the histograms, e ·
    acoustic: largest |Σ_i Z*_iab − Q δ_ab| of any frame, e · net: Q, e, mean of Tr Σ_i Z*_i/3 · axis: 0, 1, 2, the cell
    vector of the profile · height [k] Å · profile: symbol -> [k, 3] atoms a frame, Tr Z*/3, and Z* along the axis (e)
    """

    run: Run
    first: Atoms
    frames: int
    elements: tuple[Element, ...]
    mean: Array
    isotropic_spread: Array
    edges: Array
    acoustic: float
    net: float
    axis: int
    height: Array
    profile: dict[str, Array]

    def table(self) -> tuple[list[str], Array]:
        """Header and one row for every atom: place in the first frame, Tr Z*/3 with its spread, all components."""
        n = len(self.first)
        header = ["atom", "atomic_number", "x_A", "y_A", "z_A", "isotropic_e", "isotropic_spread_e"]
        header += [f"Z_{a}{b}_e" for a in "xyz" for b in "xyz"]
        isotropic = np.trace(self.mean, axis1=1, axis2=2) / 3.0
        columns = [np.arange(n), self.first.numbers, self.first.positions, isotropic, self.isotropic_spread]
        return header, np.column_stack([*columns, self.mean.reshape(n, 9)])

    def profile_table(self) -> tuple[list[str], Array]:
        """Header and rows along the axis; nan where there are no atoms."""
        header, columns = ["height_A"], [self.height[:, None]]
        for symbol, values in self.profile.items():
            header += [f"atoms_{symbol}", f"isotropic_{symbol}_e", f"Z_{'abc'[self.axis]}_{symbol}_e"]
            columns.append(values)
        return header, np.hstack(columns)

    def structure(self) -> Atoms:
        """The first frame with the arrays ``born_isotropic`` [n] and ``born_charges`` [n, 9] (dipole, displacement)."""
        atoms = self.first.copy()
        atoms.info = {}
        atoms.set_array("born_isotropic", np.trace(self.mean, axis1=1, axis2=2) / 3.0)
        atoms.set_array("born_charges", self.mean.reshape(-1, 9))
        return atoms

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        return {
            "run": str(self.run.folder),
            "frames": self.frames,
            "beads": len(self.run.extras["BEC"]),
            "net_charge_e": self.net,
            "acoustic_sum_violation_e": self.acoustic,
            "axis": "abc"[self.axis],
            "elements": {element.symbol: element.numbers() for element in self.elements},
        }

    def report(self) -> list[str]:
        """Lines for a person."""
        lines = [f"Born charges of {len(self.first)} atoms in {self.frames} frames"]
        for x in self.elements:
            values = ", ".join(f"{v:.3f}" for v in x.eigenvalues)
            carried = "" if x.charge is None else f"; charge {x.charge:+.3f}, so dynamic {x.isotropic - x.charge:+.3f}"
            mean = f"{x.isotropic:+.4f}" + (f" ± {x.error:.4f}" if np.isfinite(x.error) else "")
            lines.append(
                f"{x.symbol:2s} {mean} e (spread {x.spread:.3f}), eigenvalues {values}, "
                f"antisymmetric {x.antisymmetric:.3f}{carried}"
            )
        lines.append(
            f"acoustic sum rule: Σ Z* = {self.net:+.2e} e on the diagonal, off by {self.acoustic:.1e} e at most"
        )
        return lines


def born_charges(run: Run, *, skip: float = 0.0, axis: int = 2, bin_width: float = 0.5, bins: int = 120) -> BornCharges:
    """Born charges of a run from its ``BEC`` extras, and positions at the same steps.

    Two passes over the files; one frame at a time is kept. Raises InputError where Born charges or positions lack, or
    have no step in common.
    """
    files = run.extras.get("BEC", ())
    if not files:
        raise InputError(
            f"{run.folder}: no Born charges; set output.born_charges: true and add "
            "<trajectory extra_type='BEC'> extras </trajectory>"
        )
    if not run.positions:
        raise InputError(f"{run.folder}: no trajectory of positions; add <trajectory> positions </trajectory>")
    if not bin_width > 0.0:
        raise InputError(f"bin is {bin_width:g}: give the width of bins in Å, more than zero")
    late = run.after(skip)
    first = next(read_trajectory(run.positions[0])).atoms
    n, frames, low, high = len(first), 0, np.inf, -np.inf
    for path in files:
        for step, record in iter_extras(path):
            if late(step):
                values = np.linalg.eigvalsh(_symmetric(_tensors(record, n, path)))
                low, high, frames = min(low, float(values.min())), max(high, float(values.max())), frames + 1
    if frames == 0:
        raise InputError(f"{run.folder}: skip is {skip:g} fs and no Born charges are left: skip less")
    edges = np.linspace(low - 1e-3, high + 1e-3, bins + 1)
    sums = _Sums(first, edges, axis, bin_width)
    for k, path in enumerate(files):
        places = _places(run.positions[k if len(run.positions) == len(files) else 0])
        for step, record in iter_extras(path):
            if late(step):
                sums.add(_tensors(record, n, path), places.at(step))
    return sums.result(run, frames // len(files), _mean_charges(run, n))


def _tensors(record: Array, n: int, path: Path) -> Array:
    """[n, dipole, displacement] of a record [3 atom + displacement, dipole]."""
    if record.shape != (3 * n, 3):
        raise InputError(f"{path}: Born charges of the shape {record.shape}, but {n} atoms need {(3 * n, 3)}")
    return record.reshape(n, 3, 3).transpose(0, 2, 1)


def _symmetric(z: Array) -> Array:
    return np.asarray(0.5 * (z + z.transpose(0, 2, 1)))


def _mean_charges(run: Run, n: int) -> Array | None:
    """Mean charge [n] of every atom over the run, where charges were written."""
    total, count = np.zeros(n), 0
    for path in run.extras.get("charges", ()):
        for _, q in iter_extras(path):
            if q.shape == (n,):
                total, count = total + q, count + 1
    return total / count if count else None


def _places(path: Path) -> ByStep[Atoms]:
    """Structures of a trajectory of positions by step."""
    return ByStep(lambda: ((frame.step, frame.atoms) for frame in read_trajectory(path) if frame.step is not None))


class _Sums:
    """Everything that is summed over frames."""

    def __init__(self, first: Atoms, edges: Array, axis: int, width: float) -> None:
        self.first, self.edges, self.axis = first, edges, axis
        self.of = {str(s): np.flatnonzero(first.symbols == s) for s in dict.fromkeys(first.get_chemical_symbols())}
        self.by_element = {s: BlockedMean() for s in self.of}
        self.by_atom, self.squares = BlockedMean(), np.zeros(len(first))
        m = len(edges) - 1
        self.counts = {s: np.zeros((4, m)) for s in self.of}
        self.eigen = {s: (np.zeros(3), np.zeros(3)) for s in self.of}
        self.antisymmetric = dict.fromkeys(self.of, 0.0)
        self.acoustic, self.net = 0.0, 0.0
        cell = np.asarray(first.cell)
        self.normal = np.cross(cell[axis - 2], cell[axis - 1])
        self.normal /= np.linalg.norm(self.normal)
        self.period = abs(float(cell[axis] @ self.normal))
        self.bins = max(round(self.period / width), 1)
        self.profile = {s: np.zeros((self.bins, 3)) for s in self.of}
        self.placed = 0

    def add(self, z: Array, atoms: Atoms | None) -> None:
        """Counts one frame: Z* [n, 3, 3] (e) and, for the profile, where the atoms are."""
        total = z.sum(axis=0)
        net = float(np.trace(total)) / 3.0
        self.net += net
        self.acoustic = max(self.acoustic, float(np.abs(total - net * np.eye(3)).max()))
        isotropic = np.trace(z, axis1=1, axis2=2) / 3.0
        self.by_atom.add(z)
        self.squares += isotropic**2
        values = np.linalg.eigvalsh(_symmetric(z))
        odd = 0.5 * (z - z.transpose(0, 2, 1))
        for s, own in self.of.items():
            self.by_element[s].add(z[own].mean(axis=0))
            for k, part in enumerate((isotropic[own], *values[own].T)):
                self.counts[s][k] += np.histogram(part, self.edges)[0]
            self.eigen[s][0][:] += values[own].sum(axis=0)
            self.eigen[s][1][:] += (values[own] ** 2).sum(axis=0)
            self.antisymmetric[s] += float((odd[own] ** 2).sum())
        if atoms is None:
            return
        self.placed += 1
        scaled = np.linalg.solve(np.asarray(atoms.cell).T, atoms.positions.T).T[:, self.axis]
        place = np.minimum((np.mod(scaled, 1.0) * self.bins).astype(int), self.bins - 1)
        along = np.einsum("a,iab,b->i", self.normal, z, self.normal)
        for s, own in self.of.items():
            for k, weight in enumerate((np.ones(len(own)), isotropic[own], along[own])):
                self.profile[s][:, k] += np.bincount(place[own], weight, minlength=self.bins)

    def result(self, run: Run, frames: int, charges: Array | None) -> BornCharges:
        """Means and spreads of all frames so far."""
        count = self.by_atom.n
        mean = self.by_atom.mean
        isotropic = np.trace(mean, axis1=1, axis2=2) / 3.0
        variance = np.maximum(self.squares / count - isotropic**2, 0.0)
        elements, profile = [], {}
        for s, own in self.of.items():
            blocks, samples = self.by_element[s], count * len(own)
            first, second = (part / samples for part in self.eigen[s])
            centre = float(np.trace(blocks.mean)) / 3.0
            elements.append(
                Element(
                    symbol=s,
                    atoms=len(own),
                    isotropic=centre,
                    error=float(np.linalg.norm(np.diag(blocks.error))) / 3.0,
                    spread=float(np.sqrt(max((self.squares[own] / count).mean() - centre**2, 0.0))),
                    between=float(isotropic[own].std()),
                    tensor=blocks.mean,
                    tensor_error=blocks.error,
                    eigenvalues=first,
                    eigenvalue_spread=np.sqrt(np.maximum(second - first**2, 0.0)),
                    antisymmetric=float(np.sqrt(self.antisymmetric[s] / samples / 6.0)),
                    counts=self.counts[s][0],
                    eigenvalue_counts=self.counts[s][1:],
                    charge=None if charges is None else float(charges[own].mean()),
                )
            )
            atoms = self.profile[s][:, :1]
            values = np.divide(self.profile[s][:, 1:], atoms, out=np.full((self.bins, 2), np.nan), where=atoms > 0)
            profile[s] = np.hstack([atoms / max(self.placed, 1), values])
        elements.sort(key=lambda x: chemical_symbols.index(x.symbol))
        return BornCharges(
            run=run,
            first=self.first,
            frames=frames,
            elements=tuple(elements),
            mean=mean,
            isotropic_spread=np.sqrt(variance),
            edges=self.edges,
            acoustic=self.acoustic,
            net=self.net / count,
            axis=self.axis,
            height=(np.arange(self.bins) + 0.5) * self.period / self.bins,
            profile=profile,
        )
