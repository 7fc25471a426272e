"""Dipoles of molecules along a run: their size, their direction in a field, and how they turn together.

    μ_m = Σ_{i in m} [q_i (r_i − R_m) − Z_i Δ_i]

with charges q, shells Δ (from their atoms; a charge −Z at the shell and q + Z at the core) and the molecule made whole.
The origin R_m matters where Σ q_i is not zero: the centre of mass unless asked otherwise. Molecules are those of the
first frame. Monatomic ions have the dipole of their shell; kinds without any (ions without shells) are left out.

Kirkwood's factor of N molecules with tin-foil boundaries (M. Neumann, Mol. Phys. 50, 841 (1983)):

    G_K = (⟨|Σ μ|²⟩ − |⟨Σ μ⟩|²) / (N ⟨μ²⟩),      G_K(r) = 1 + ⟨Σ_{j: r_ij < r} μ_i·μ_j⟩ / ⟨μ²⟩,

the second by centres of mass within r (D. C. Rapaport, The Art of Molecular Dynamics Simulation (2004), ch. 8); in a
field it holds the alignment with the field as well. Axes at constant displacement have other boundaries, which hold Σ μ
back: there μ counts along the others alone, in the products and in ⟨μ²⟩.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray
from scipy import constants

from voltpi.analysis.charges_of import charges_of_beads
from voltpi.analysis.ipi_files import convert, extras_by_step
from voltpi.analysis.molecules import Tree, assembled, bond_tree, molecules_of
from voltpi.analysis.runs import Run
from voltpi.analysis.spectra_series import free_axes
from voltpi.analysis.statistics import Mean, autocorrelation_time, mean_with_error, plus_minus
from voltpi.analysis.trajectory import frames_of
from voltpi.potential.errors import InputError

__all__ = ["DEBYE", "ORIGINS", "Kind", "MolecularDipoles", "molecular_dipoles"]

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

DEBYE = constants.c * 1e21 * constants.e * constants.angstrom
"""D in 1 e·Å."""
ORIGINS = ("mass", "geometry")
_BINS = 60
_FARTHEST = 12.0  # Å, of G_K(r)
_SHELL = 0.25  # Å, its bins
_NO_DIPOLE = 1e-6  # e·Å


@dataclass(frozen=True)
class Kind:
    """Molecules of one ``formula``; dipoles [f, m, 3] in e·Å of f frames (of all beads) and m molecules.

    charge : mean, e · radii, kirkwood [k]: Å and G_K(r), empty for a single molecule · axes: [3], those that G_K is of
    """

    formula: str
    atoms: int
    charge: float
    dipoles: Array
    radii: Array
    kirkwood: Array
    axes: NDArray[np.bool_]

    @property
    def correlated(self) -> bool:
        """Whether there is a G_K."""
        return self.dipoles.shape[1] > 1 and bool(self.axes.any())

    @property
    def sizes(self) -> Array:
        """|μ| [f, m] in D."""
        return np.linalg.norm(self.dipoles, axis=2) * DEBYE

    def size(self) -> Mean:
        """⟨|μ|⟩ in D."""
        return mean_with_error(self.sizes.mean(axis=1))

    def vector(self) -> list[Mean]:
        """⟨μ⟩ by component in D."""
        return [mean_with_error(self.dipoles[:, :, k].mean(axis=1) * DEBYE) for k in range(3)]

    def cosines(self, direction: Array) -> Array:
        """cos θ [f, m] between μ and a unit vector; 0 for a dipole of zero."""
        size = np.linalg.norm(self.dipoles, axis=2)
        return np.divide(self.dipoles @ direction, size, out=np.zeros_like(size), where=size > 1e-12)

    def factor(self) -> Mean:
        """G_K of the whole cell; correlated at least as long as Σ μ is, which turns slowest."""
        own = self.dipoles[:, :, self.axes]
        total = own.sum(axis=1)
        fluctuation = ((total - total.mean(axis=0)) ** 2).sum(axis=1)
        mean = mean_with_error(fluctuation / (own.shape[1] * float((own**2).sum(axis=2).mean())))
        tau = max(mean.tau, *(autocorrelation_time(total[:, k]) for k in range(own.shape[2])))
        return Mean(mean.value, mean.error * float(np.sqrt(tau / mean.tau)), tau, mean.n)


@dataclass(frozen=True)
class MolecularDipoles:
    """All kinds of molecules of a run, the most frequent first.

    direction : [3] of field (or displacement), None without · with_shells: whether the shells' share is in ·
    source : of the charges · missing: rms difference of Σ μ and the driver's dipole (e·Å, modulo e times lattice
    vectors), None where that was not written or molecules are charged · left_out: formulae of what has no dipole ·
    cautions: what to know of G_K
    """

    run: Run
    kinds: tuple[Kind, ...]
    frames: int
    direction: Array | None
    origin: str
    with_shells: bool
    source: str
    missing: float | None
    left_out: tuple[str, ...]
    cautions: tuple[str, ...]

    def histogram(self, kind: Kind) -> tuple[Array, Array]:
        """Centres (D) and density (1/D) of |μ|."""
        low, high = 0.95 * float(kind.sizes.min()), 1.05 * float(kind.sizes.max())
        density, edges = np.histogram(kind.sizes, bins=_BINS, range=(low, max(high, low + 1e-6)), density=True)
        return 0.5 * (edges[1:] + edges[:-1]), density

    def by_angle(self, kind: Kind) -> tuple[Array, Array, Array]:
        """Centres of cos θ, their density, and ⟨|μ|⟩ (D) there (nan where there is none)."""
        assert self.direction is not None
        cosines = kind.cosines(self.direction).ravel()
        count, edges = np.histogram(cosines, bins=20, range=(-1.0, 1.0))
        total, _ = np.histogram(cosines, bins=edges, weights=kind.sizes.ravel())
        mean = np.divide(total, count, out=np.full(20, np.nan), where=count > 0)
        return 0.5 * (edges[1:] + edges[:-1]), count / count.sum() / (edges[1] - edges[0]), mean

    def table(self) -> tuple[list[str], Array]:
        """Header and rows: the distribution of |μ| of every kind, one after another (kind counted from 0)."""
        rows = []
        for k, kind in enumerate(self.kinds):
            centres, density = self.histogram(kind)
            rows.append(np.column_stack([np.full(len(centres), k), centres, density]))
        return ["kind", "dipole_D", "density_per_D"], np.concatenate(rows)

    def angles(self) -> tuple[list[str], Array]:
        """The same of cos θ, with the mean size there."""
        rows = [np.column_stack([np.full(20, k), *self.by_angle(kind)]) for k, kind in enumerate(self.kinds)]
        return ["kind", "cos_theta", "density", "mean_dipole_D"], np.concatenate(rows)

    def correlations(self) -> tuple[list[str], Array]:
        """G_K(r) of every kind that has two molecules or more."""
        rows = [np.column_stack([np.full(len(x.radii), k), x.radii, x.kirkwood]) for k, x in enumerate(self.kinds)]
        return ["kind", "r_A", "kirkwood_factor"], np.concatenate(rows)

    def numbers(self) -> dict[str, Any]:
        """JSON-able, every key with its unit."""
        kinds = []
        for kind in self.kinds:
            size, vector = kind.size(), kind.vector()
            entry: dict[str, Any] = {
                "formula": kind.formula,
                "molecules": kind.dipoles.shape[1],
                "charge_e": kind.charge,
                "dipole_D": size.value,
                "dipole_error_D": size.error,
                "dipole_spread_D": float(kind.sizes.std()),
                "mean_vector_D": [m.value for m in vector],
                "mean_vector_error_D": [m.error for m in vector],
            }
            if kind.correlated:
                factor = kind.factor()
                entry |= {"kirkwood_factor": factor.value, "kirkwood_factor_error": factor.error}
            if self.direction is not None:
                cosine, order, along = self._alignment(kind)
                entry |= {
                    "mean_cos_theta": cosine.value,
                    "mean_cos_theta_error": cosine.error,
                    "mean_P2_cos_theta": order.value,
                    "mean_P2_cos_theta_error": order.error,
                    "dipole_along_field_D": along.value,
                    "dipole_along_field_error_D": along.error,
                }
            kinds.append(entry)
        return {
            "run": str(self.run.folder),
            "frames": self.frames,
            "beads": len(self.run.positions),
            "charges_from": self.source,
            "with_shells": self.with_shells,
            "origin": self.origin,
            "direction": None if self.direction is None else self.direction.tolist(),
            "sum_less_driver_dipole_eA": self.missing,
            "kinds": kinds,
            "without_dipole": list(self.left_out),
            "cautions": list(self.cautions),
        }

    def _alignment(self, kind: Kind) -> tuple[Mean, Mean, Mean]:
        assert self.direction is not None
        cosines = kind.cosines(self.direction)
        along = (kind.dipoles @ self.direction).mean(axis=1) * DEBYE
        second = (1.5 * cosines**2 - 0.5).mean(axis=1)
        return mean_with_error(cosines.mean(axis=1)), mean_with_error(second), mean_with_error(along)

    def report(self) -> list[str]:
        """Lines for a person."""
        shells = "with" if self.with_shells else "without"
        lines = [f"dipoles of molecules from {self.source}, {shells} shells, {self.frames} frames"]
        for kind in self.kinds:
            size, count = kind.size(), kind.dipoles.shape[1]
            charged = (
                "" if abs(kind.charge) < 1e-3 else f", charge {kind.charge:+.3f} e, about the centre of {self.origin}"
            )
            lines.append(
                f"{count} {kind.formula}: {plus_minus(size.value, size.error, '.3f')} D{size.caution}, "
                f"spread {kind.sizes.std():.3f} D{charged}"
            )
            if self.direction is not None:
                cosine, order, along = self._alignment(kind)
                lines.append(
                    f"  along the field: {plus_minus(along.value, along.error, '.3f')} D, ⟨cos θ⟩ "
                    f"{plus_minus(cosine.value, cosine.error, '.3f')}, ⟨P2⟩ "
                    f"{plus_minus(order.value, order.error, '.3f')}{cosine.caution}"
                )
            if kind.correlated:
                factor = kind.factor()
                lines.append(f"  Kirkwood factor {plus_minus(factor.value, factor.error, '.2f')}{factor.caution}")
        if self.left_out:
            lines.append(f"left out, as they have no dipole: {', '.join(self.left_out)}")
        lines += [f"caution: {caution}" for caution in self.cautions]
        if self.missing is not None and self.missing > 1e-3:
            lines.append(
                f"note: Σ μ differs from the dipole that the field acts on by {self.missing:.3g} e·Å (rms): it has "
                "the charges as they are, the other those that the settings let the field see"
            )
        return lines


def molecular_dipoles(
    run: Run,
    *,
    skip: float = 0.0,
    charges: str | Path | None = None,
    shell_charge: Array | float = 1.0,
    origin: str = "mass",
) -> MolecularDipoles:
    """Dipoles of the molecules of a run, from positions, charges and (where they were written) shells.

    ``charges``: a file, for runs of another program. ``shell_charge`` [n] or one number (e): Z. Raises InputError where
    positions and charges lack or have no step in common, or nothing has a dipole.
    """
    if origin not in ORIGINS:
        raise InputError(f"origin is {origin}: give one of {', '.join(ORIGINS)}")
    shells = run.extras.get("shells", ()) if charges is None else ()
    if shells and len(shells) != len(run.positions):
        raise InputError(
            f"{run.folder}: shells of {len(shells)} beads but positions of {len(run.positions)}; "
            "print both for the same beads"
        )
    known = charges_of_beads(run, charges)
    records = [extras_by_step(path) for path in shells]
    sent = [extras_by_step(path) for path in run.extras.get("dipole", ())] if len(run.positions) == 1 else []
    axes, cautions = np.zeros(3, dtype=bool), tuple[str, ...]()
    try:
        axes, cautions = free_axes(run.applied, str(run.folder), "Kirkwood's factor")
    except InputError as error:  # sizes and angles are known all the same
        cautions = (f"left out: {error}",)
    whole: _Molecules | None = None
    frames, missing = [], []
    for step, beads in frames_of(run, skip):
        for k, atoms in enumerate(beads):
            whole = whole or _Molecules(atoms, origin, axes)
            q = known[k].at(step, len(atoms))
            delta = records[k].at(step) if records else None
            if q is None or (records and delta is None):
                continue
            frames.append(whole.frame(atoms, q, delta, shell_charge))
            total = sent[0].at(step) if sent else None
            if total is not None and abs(whole.charges).max() < 1e-6:
                missing.append(_less(frames[-1].sum(axis=0), total, atoms))
    if whole is None or not frames:
        raise InputError(f"{run.folder}: charges and positions have no step in common; print both with one stride")
    control = np.nan_to_num(run.applied.control)
    strength = float(np.linalg.norm(control))
    everything = whole.kinds(np.array(frames))
    kinds = tuple(kind for kind in everything if np.abs(kind.dipoles).max() > _NO_DIPOLE)
    if not kinds:
        raise InputError(
            f"{run.folder}: nothing has a dipole ({', '.join(kind.formula for kind in everything)}); this is for "
            "molecules, or for ions with shells that the run wrote"
        )
    return MolecularDipoles(
        run=run,
        kinds=kinds,
        frames=len(frames) // len(run.positions),
        direction=control / strength if strength > 0.0 else None,
        origin=origin,
        with_shells=bool(shells),
        source=known[0].source,
        missing=float(np.sqrt(np.mean(np.square(missing)))) if missing else None,
        left_out=tuple(
            f"{kind.dipoles.shape[1]} {kind.formula}" for kind in everything if not any(kind is k for k in kinds)
        ),
        cautions=cautions,
    )


def _less(total: Array, sent: Array, atoms: Atoms) -> float:
    """|Σ μ − M| modulo e times lattice vectors."""
    away = total - convert(sent, "length", "atomic_unit", "angstrom")
    cell = np.asarray(atoms.cell)
    return float(np.linalg.norm(away - np.rint(away @ np.linalg.inv(cell)) * np.asarray(atoms.pbc) @ cell))


class _Molecules:
    """The molecules of the first frame, and sums over pairs of them."""

    def __init__(self, atoms: Atoms, origin: str, axes: NDArray[np.bool_]) -> None:
        self.axes = axes
        self.labels: Ints = molecules_of(atoms)
        self.count = int(self.labels.max()) + 1
        self.tree: Tree = bond_tree(atoms)
        weights = atoms.get_masses() if origin == "mass" else np.ones(len(atoms))
        self.weights: Array = weights / np.bincount(self.labels, weights)[self.labels]
        masses = atoms.get_masses()
        self.mass_weights: Array = masses / np.bincount(self.labels, masses)[self.labels]
        formulas = [str(atoms[self.labels == m].symbols.get_chemical_formula("hill")) for m in range(self.count)]
        self.members = {f: np.flatnonzero(np.array(formulas) == f) for f in dict.fromkeys(formulas)}
        self.charges: Array = np.zeros(self.count)
        self._charge_sum: Array = np.zeros(self.count)
        self._frames = 0
        self._pairs: dict[str, Array] = {f: np.zeros(_shells(atoms)) for f in self.members}

    def sums(self, values: Array) -> Array:
        """Over the atoms [n, …] of every molecule [m, …]."""
        out = np.zeros((self.count, *values.shape[1:]))
        np.add.at(out, self.labels, values)
        return out

    def frame(self, atoms: Atoms, q: Array, shells: Array | None, z: Array | float) -> Array:
        """μ [m, 3] in e·Å."""
        r = assembled(atoms, self.tree)
        origin = self.sums(self.weights[:, None] * r)
        moments = q[:, None] * (r - origin[self.labels])
        if shells is not None:
            if shells.shape != (len(atoms), 3):
                raise InputError(f"shells of shape {shells.shape} but {len(atoms)} atoms; print those of this run")
            moments = moments - np.reshape(z, (-1, 1)) * convert(shells, "length", "atomic_unit", "angstrom")
        self.charges = self.sums(q)
        self._charge_sum += self.charges
        self._frames += 1
        dipoles = self.sums(moments)
        self._correlate(atoms, self.sums(self.mass_weights[:, None] * r), dipoles[:, self.axes])
        return dipoles

    def _correlate(self, atoms: Atoms, centres: Array, dipoles: Array) -> None:
        for formula, members in self.members.items():
            bins = self._pairs[formula]
            if len(members) < 2 or len(bins) == 0:
                continue
            points = Atoms(positions=centres[members], cell=atoms.cell, pbc=atoms.pbc)
            i, j, d = neighbor_list("ijd", points, _SHELL * len(bins))
            product = np.einsum("pk,pk->p", dipoles[members][i], dipoles[members][j])
            place = np.minimum((d / _SHELL).astype(int), len(bins) - 1)
            np.add.at(bins, place, product / len(members))

    def kinds(self, dipoles: Array) -> tuple[Kind, ...]:
        """Molecules of each formula, from dipoles [f, molecules, 3] (e·Å)."""
        out = []
        for formula, members in self.members.items():
            own = dipoles[:, members]
            square = float((own[:, :, self.axes] ** 2).sum(axis=2).mean())
            pairs = self._pairs[formula] / self._frames
            many = len(members) > 1 and len(pairs) > 0 and square > 0.0
            out.append(
                Kind(
                    formula,
                    int((self.labels == members[0]).sum()),
                    float(self._charge_sum[members].mean() / self._frames),
                    own,
                    np.asarray(_SHELL * (np.arange(len(pairs)) + 1.0)) if many else np.zeros(0),
                    np.asarray(1.0 + np.cumsum(pairs) / square) if many else np.zeros(0),
                    self.axes,
                )
            )
        return tuple(sorted(out, key=lambda kind: -kind.dipoles.shape[1]))


def _shells(atoms: Atoms) -> int:
    """Number of bins of G_K(r): up to half of the smallest height of the cell."""
    cell = np.asarray(atoms.cell)
    heights = 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    return int(min(_FARTHEST, 0.5 * float(heights.min())) / _SHELL)
