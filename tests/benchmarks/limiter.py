"""Do charges and shells have a stable point, and what does the limiter change? Crystals, water, clusters, fields.

    python tests/benchmarks/limiter.py [--only NaCl …] [--seeds 3] [--rattles 0.05 0.08 0.25] [--lipon FILE]

Prints the tables of ``docs/limiter.md`` as markdown, for the published parameters. LiPON has no simple cell: it is left
out where no structure file is given. *softest*: the smallest eigenvalue of the Hessian in the shells with charges
relaxed, from solves (its inverse is the shells' block of the inverse Hessian on the constraint surface), at the point
that was found for the first seed. *starts*: largest difference of energy between a cold start and random shells.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from ase.spacegroup import crystal
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.spatial.transform import Rotation
from scipy.special import erf
from torch import Tensor

from voltpi.potential.electrostatics.functional import Functional
from voltpi.potential.electrostatics.pqeq import KCAL_PER_EV, PQEq, PQEqSolution, read_parameters
from voltpi.potential.electrostatics.solver import linear_solve
from voltpi.potential.electrostatics.taper import TaperedPQEq
from voltpi.potential.errors import NoStablePointError, NotConvergedError
from voltpi.potential.model import Potential
from voltpi.potential.systems import Systems

WIDE = 4.0
"""Å; with this limit the spring is harmonic for every shell met here (0.15 Å: 0.1 % stiffer) and never ends."""
LIMITERS = {
    "none": {"limiter": "none"},
    "0.25": {"limiter": "fene", "shell_limit": 0.25},
    "0.5": {"limiter": "fene", "shell_limit": 0.5},
}
MIXTURES = {
    "salt": (("Na", "K", "Cs", "Cl", "I"), 1.6),
    "oxide": (("Li", "Ba", "Ti", "O", "O"), 1.2),
    "organic": (("H", "C", "N", "O", "S"), 0.8),
    "the softest of the table": (("B", "Ga", "Cr", "U", "Cs", "Pb", "O", "F", "Na", "H"), 1.2),
}
"""Elements, and the shortest distance (Å)."""
IONS = {"Na": 1, "K": 1, "Cs": 1, "Cl": -1}
FAILED = (NoStablePointError, NotConvergedError)


def perovskite(a: str, b: str, x: str, edge: float, repeat: int) -> Atoms:
    """Cubic ABX₃, ``repeat`` cells of ``edge`` (Å) along each direction."""
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
    return crystal([a, b, x], sites, spacegroup=221, cellpar=[edge] * 3 + [90] * 3).repeat(repeat)


def water(n: int) -> Atoms:
    """n³ molecules at 1 g/cm³ on a grid, turned at random."""
    shape = np.array([[0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]])
    sites = np.stack(np.meshgrid(*[np.arange(n)] * 3), -1).reshape(-1, 3) * 3.105
    turns = Rotation.random(n**3, random_state=np.random.default_rng(0)).as_matrix()
    positions = np.concatenate([shape @ turn.T + site for turn, site in zip(turns, sites, strict=True)])
    return Atoms("OH2" * n**3, positions, cell=[3.105 * n] * 3, pbc=True)


def ionic(atoms: Atoms) -> Atoms:
    """The same crystal with ions that keep a charge of ±1 e (``conserve: fragments``)."""
    atoms.set_initial_charges([IONS[symbol] for symbol in atoms.symbols])
    return atoms


CRYSTALS: dict[str, Callable[[], Atoms]] = {
    "NaCl": lambda: bulk("NaCl", "rocksalt", 5.64, cubic=True).repeat(2),
    "KCl": lambda: bulk("KCl", "rocksalt", 6.29, cubic=True).repeat(2),
    "CsCl": lambda: bulk("CsCl", "cesiumchloride", 4.12, cubic=True).repeat(4),
    "BaTiO3": lambda: perovskite("Ba", "Ti", "O", 4.0, 4),
    "CsPbI3": lambda: perovskite("Cs", "Pb", "I", 6.29, 3),
}
STRUCTURES: dict[str, Callable[[], Atoms]] = {
    **CRYSTALS,
    "NaCl, larger": lambda: bulk("NaCl", "rocksalt", 5.64, cubic=True).repeat(3),
    "NaCl, ions ±1": lambda: ionic(CRYSTALS["NaCl"]()),
    "CsCl, ions ±1": lambda: ionic(CRYSTALS["CsCl"]()),
    "water": lambda: water(4),
}


def rattled(atoms: Atoms, width: float, seed: int) -> Atoms:
    """A copy with normally distributed displacements, ``width`` Å along each axis."""
    copy = atoms.copy()
    copy.rattle(width, seed=seed)
    return copy


def cluster(atoms: Atoms) -> Atoms:
    """The same atoms without a cell."""
    copy = atoms.copy()
    copy.set_pbc(False)
    copy.set_cell(None)
    return copy


@dataclass
class Point:
    """A prepared structure, the model, and what it found."""

    model: PQEq
    systems: Systems
    solution: PQEqSolution

    @property
    def longest(self) -> float:
        """Largest shell displacement, Å."""
        return float(self.solution.shells.norm(dim=-1).max())

    def softest(self) -> float:
        """Smallest eigenvalue of the shells' Hessian with charges relaxed, eV/Å².

        Inverse Lanczos, with the solver's own products. NaN where a solve meets negative curvature.
        """
        functional = Functional(self.model, self.systems)
        point = functional.at(torch.cat([self.solution.charges[:, None], self.solution.shells], dim=1))
        point.linearize()
        n = len(self.solution.charges)

        def inverse(vector: np.ndarray) -> np.ndarray:
            right = torch.zeros(n, 4, dtype=torch.float64)
            right[:, 1:] = torch.from_numpy(np.ascontiguousarray(vector)).reshape(n, 3)
            answer = linear_solve(point, functional, right, tolerance=1e-6)
            if not bool(answer.converged.all()) or bool(answer.negative_curvature.any()):
                raise NotConvergedError("the Hessian is not positive definite")
            return answer.x[:, 1:].reshape(-1).numpy()

        operator = LinearOperator((3 * n, 3 * n), matvec=inverse, dtype=float)
        start = np.random.default_rng(0).normal(size=3 * n)
        try:
            return 1 / float(eigsh(operator, k=1, which="LA", tol=1e-4, v0=start, return_eigenvectors=False)[0])
        except NotConvergedError:
            return float("nan")

    def spread(self, starts: int) -> float:
        """Largest difference of energy to what random shells (up to half the limit, at most 0.25 Å) lead to, eV."""
        generator = torch.Generator().manual_seed(0)
        shape, largest = self.solution.shells.shape, min(0.5 * self.model.shell_bound, 0.25)
        differences = [0.0]
        for _ in range(starts):
            way = torch.randn(shape, generator=generator, dtype=torch.float64)
            length = largest * torch.rand(shape[0], 1, generator=generator, dtype=torch.float64)
            guess = (torch.zeros_like(self.solution.charges), way / way.norm(dim=1, keepdim=True) * length)
            differences.append(abs(float(self.model.solve(self.systems, start=guess).energy - self.solution.energy)))
        return max(differences)


def solve(atoms: Atoms, field: Sequence[float] = (0.0, 0.0, 0.0), **keywords: object) -> Point | None:
    """PQEq's answer for a structure, or None where there is no stable point; ``keywords`` go to PQEq."""
    charges = atoms.get_initial_charges()
    model = PQEq(conserve="fragments" if charges.any() else "total", **keywords)
    potential = Potential(charges=model)
    initial = torch.tensor(charges, dtype=torch.float64) if charges.any() else None
    try:
        systems = potential.prepare(Systems.from_atoms(atoms, field=field), initial_charges=initial)
        return Point(model, systems, model.solve(systems))
    except FAILED:
        return None


def mixture(elements: Sequence[str], shortest: float, seed: int, periodic: bool) -> Atoms:
    """30 atoms at random in a box of 9 Å, no two nearer than ``shortest`` (Å)."""
    rng = np.random.default_rng(seed)
    edge, positions = 9.0, np.empty((0, 3))
    while len(positions) < 30:
        trial = rng.uniform(0, edge, 3)
        ways = positions - trial
        if periodic:
            ways -= edge * np.round(ways / edge)
        if (np.linalg.norm(ways, axis=1) > shortest).all():
            positions = np.vstack([positions, trial])
    return Atoms(list(rng.choice(elements, 30)), positions, cell=[edge] * 3 if periodic else None, pbc=periodic)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def row(*cells: object) -> None:
    """One line of a markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(*cells: str) -> None:
    """First line of a markdown table and the rule under it."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def slashed(values: Sequence[float | None], form: str) -> str:
    """'a / b / c', with a dash where there is nothing."""
    return " / ".join("–" if value is None or np.isnan(value) else format(value, form) for value in values)


def compare(label: str, frames: list[Atoms], starts: int, reference: str) -> None:
    """One line: all limiters on all ``frames``; energies and forces against those of ``reference``."""
    limiters = {**LIMITERS, "wide": {"limiter": "fene", "shell_limit": WIDE}}
    points = {name: [solve(frame, **limiters[name]) for frame in frames] for name in {*LIMITERS, reference}}
    found = {name: [p for p in points[name] if p is not None] for name in points}
    first = [points[name][0] for name in LIMITERS]
    n = len(frames[0])
    shifts = []
    for name in ("0.25", "0.5"):
        pairs = [(p, r) for p, r in zip(points[name], points[reference], strict=True) if p and r]
        if not pairs:
            shifts += [None, None]
            continue
        energy = [float(p.solution.energy - r.solution.energy) / n for p, r in pairs]
        force = [rms(p.solution.forces - r.solution.forces) / rms(r.solution.forces) for p, r in pairs]
        shifts += [1000 * float(np.mean(energy)), 100 * float(np.mean(force))]
    longest = [max((p.longest for p in found[name]), default=None) for name in LIMITERS]
    row(
        label,
        n,
        " / ".join(f"{len(found[name])} of {len(frames)}" for name in LIMITERS),
        slashed(longest, ".3f"),
        slashed([None if p is None else p.softest() for p in first], ".3f"),
        slashed([None if p is None else 1e6 * p.spread(starts) / n for p in first], ".3f"),
        slashed(
            [np.mean([int(p.solution.iterations) for p in found[m]]) if found[m] else None for m in LIMITERS], ".0f"
        ),
        slashed(shifts[::2], ".3f"),
        slashed(shifts[1::2], ".2f"),
    )


COLUMNS = (
    "atoms",
    "stable point",
    "longest shell, Å",
    "softest, eV/Å²",
    "starts, µeV/atom",
    "products",
    "ΔE, meV/atom",
    "ΔF, %",
)


def print_solids(structures: dict[str, Atoms], rattles: Sequence[float], seeds: int, starts: int) -> None:
    """Periodic structures; shifts of energy and forces against no limiter."""
    print("\nPeriodic, exact sum; `none` / `fene` 0.25 Å / `fene` 0.5 Å, shifts: 0.25 / 0.5 Å against `none`.")
    head("structure, rattle in Å", *COLUMNS)
    for name, atoms in structures.items():
        for width in rattles:
            frames = [rattled(atoms, width, seed) for seed in range(1, seeds + 1)]
            compare(f"{name}, {width:g}", frames, starts, "none")


def print_clusters(structures: dict[str, Atoms], seeds: int, starts: int) -> None:
    """The same atoms as a cluster with bare surfaces; shifts against the wide limit."""
    print(f"\nClusters cut from the crystals, open; shifts against `fene` {WIDE:g} Å (almost a harmonic spring).")
    head("cluster, rattled 0.05 Å", *COLUMNS)
    for name in CRYSTALS:
        if name in structures:
            frames = [cluster(rattled(structures[name], 0.05, seed)) for seed in range(1, seeds + 1)]
            compare(name, frames, starts, "wide")
    head("cluster", f"longest shell with `fene` {WIDE:g} Å", "softest, eV/Å²", "starts, µeV/atom")
    for name in CRYSTALS:
        if name in structures:
            point = solve(cluster(rattled(structures[name], 0.05, 1)), limiter="fene", shell_limit=WIDE)
            assert point is not None
            spread = 1e6 * point.spread(starts) / point.systems.n_atoms
            row(name, f"{point.longest:.3f}", f"{point.softest():.3f}", f"{spread:.3f}")


def print_fields(structures: dict[str, Atoms]) -> None:
    """A uniform field: the dipole that the shells answer with, against the linear response."""
    print(
        "\nIn a uniform field along x (0.05 Å rattle); induced dipole over that of the linear response, `none` first."
    )
    head("structure", "ε∞ (linear)", "field, V/Å", "longest shell, Å", "induced / linear", "products")
    for name, atoms in structures.items():
        frame = rattled(atoms, 0.05, 1)
        rest = {m: solve(frame, **keywords) for m, keywords in LIMITERS.items()}
        free = rest["none"]
        assert free is not None
        linear = free.model.solve(free.systems, polarizability=True).polarizability
        assert linear is not None
        alpha = linear[0, 0, 0] / free.model.coulomb_constant  # e Å/(V/Å)
        for strength in (0.01, 0.1, 0.3):
            points = {m: solve(frame, (strength, 0.0, 0.0), **keywords) for m, keywords in LIMITERS.items()}
            ratios = []
            for m, point in points.items():
                start = rest[m]
                if point is None or start is None:
                    ratios.append(None)
                    continue
                # the carried charges are the same in both: only shells differ
                moved = (start.solution.shells - point.solution.shells)[:, 0].sum()
                ratios.append(float(moved / (alpha * strength)))
            row(
                name,
                f"{1 + 4 * np.pi * float(linear[0, 0, 0]) / abs(np.linalg.det(frame.cell)):.2f}",
                strength,
                slashed([None if p is None else p.longest for p in points.values()], ".3f"),
                slashed(ratios, ".2f"),
                slashed([None if p is None else int(p.solution.iterations) for p in points.values()], ".0f"),
            )


def print_rest(structures: dict[str, Atoms]) -> None:
    """How far the softest element is from losing its spring, and what the formula of the page says."""
    print("\nPerfect crystals, no limiter: K of the softest element, K less the pull of its own core, softest mode.")
    head("crystal", "element", "K, eV/Å²", "K − k_e Z (Z + q) 4 a^{3/2}/(3 √π)", "softest, eV/Å²")
    for name in CRYSTALS:
        if name not in structures:
            continue
        point = solve(structures[name], limiter="none")
        assert point is not None
        table = point.model.tensors(point.systems)
        i = int(table["K"].argmin())
        z, a = table["Z"][i], table["alpha"][i] / 2
        pull = point.model.coulomb_constant * z * (z + point.solution.charges[i]) * 4 * a**1.5 / (3 * np.pi**0.5)
        left = float(table["K"][i] - pull)
        row(name, point.systems.symbols[i], f"{table['K'][i]:.3f}", f"{left:.3f}", f"{point.softest():.3f}")


def print_softened() -> None:
    """Where an instability begins: rock salt whose sodium has a softer spring than the published one."""
    print("\nNaCl (0.05 Å) with a softer Na; `none` / `fene` 0.25 Å / `fene` 0.5 Å.")
    head("K of Na over the published one", "K, eV/Å²", "stable point", "longest shell, Å", "softest, eV/Å²", "products")
    published = read_parameters()
    frame = rattled(CRYSTALS["NaCl"](), 0.05, 1)
    for factor in (1.0, 0.3, 0.2, 0.15, 0.1):
        sodium = published["Na"]._replace(K=factor * published["Na"].K)
        points = [solve(frame, parameters={**published, "Na": sodium}, **keywords) for keywords in LIMITERS.values()]
        row(
            factor,
            f"{sodium.K / KCAL_PER_EV:.3f}",
            " / ".join("no" if point is None else "yes" for point in points),
            slashed([None if p is None else p.longest for p in points], ".3f"),
            slashed([None if p is None else p.softest() for p in points], ".3f"),
            slashed([None if p is None else int(p.solution.iterations) for p in points], ".0f"),
        )


def print_mixtures(count: int) -> None:
    """Atoms at random, far closer together than in any melt: the search for an instability."""
    print(f"\nRandom mixtures, {count} of 30 atoms for each line; `none` / `fene` 0.25 Å / `fene` 0.5 Å.")
    head("elements", "shortest distance, Å", "boundary", "stable point", "longest shell, Å", "softest, eV/Å²")
    for name, (elements, shortest) in MIXTURES.items():
        for periodic in (True, False):
            frames = [mixture(elements, shortest, seed, periodic) for seed in range(count)]
            found = [[p for p in (solve(f, **kw) for f in frames) if p is not None] for kw in LIMITERS.values()]
            row(
                name,
                shortest,
                "periodic" if periodic else "open",
                " / ".join(f"{len(points)} of {count}" for points in found),
                slashed([max((p.longest for p in points), default=None) for points in found], ".3f"),
                slashed([min((p.softest() for p in points), default=None) for points in found], ".3f"),
            )


def print_kernel() -> None:
    """Fourier transform of the tapered kernel over that of 1/r: where it is negative, shells are driven out."""
    print("\nT(r) erf(√a r)/r: the smallest value of its Fourier transform times k²/4π (1/r: 1 everywhere).")
    head("element", "smallest at a cutoff of 6 Å", "12.5 Å", "18 Å")
    model = PQEq()
    waves = np.linspace(0.005, 3, 600)
    for element in ("Na", "K", "Cs", "Ba", "Ti", "Li", "O", "H"):
        a = float(model.tensors(Systems.from_atoms(Atoms(element)))["alpha"][0]) / 2
        cells = []
        for cutoff in (6.0, 12.5, 18.0):
            r = np.linspace(0, cutoff, 4001)
            x = r / cutoff
            shape = (1 - x) ** 4 * (1 + 4 * x + 10 * x**2 + 20 * x**3) * erf(np.sqrt(a) * r)
            cells.append(min(k * np.trapezoid(shape * np.sin(k * r), r) for k in waves))
        row(element, *[f"{value:.3f}" for value in cells])


def print_clamp(structures: dict[str, Atoms]) -> None:
    """The published scheme: tapered sum, clamped shells, a fixed number of iterations."""
    print("\nThe published scheme (taper 12.5 Å, clamp 0.25 Å), 0.05 Å rattle; 2 / 50 / 200 iterations.")
    head("structure", "shells on the clamp", "of atoms", "residual, V", "E, eV/atom", "E of the exact sum, `none`")
    for name, atoms in structures.items():
        if len(atoms) > 400 or atoms.get_initial_charges().any():
            continue
        frame = rattled(atoms, 0.05, 1)
        answers = [TaperedPQEq(iterations=n).solve(Systems.from_atoms(frame)) for n in (2, 50, 200)]
        exact = solve(frame, limiter="none")
        row(
            name,
            " / ".join(str(int((a.shells.norm(dim=-1) > 0.25 - 1e-9).sum())) for a in answers),
            len(frame),
            slashed([float(a.residual) for a in answers], ".1e"),
            slashed([float(a.energy) / len(frame) for a in answers], ".4f"),
            slashed([None if exact is None else float(exact.solution.energy) / len(frame)], ".4f"),
        )


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*STRUCTURES, "LiPON"], help="some of the structures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=3, help="random starts of the shells")
    parser.add_argument("--rattles", type=float, nargs="+", default=[0.05, 0.08, 0.25], help="Å")
    parser.add_argument("--lipon", type=Path, help="a structure file of LiPON")
    parser.add_argument("--mixtures", type=int, default=5, help="random mixtures for each line of their table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.only or [*STRUCTURES, "LiPON"]
    structures = {name: build() for name, build in STRUCTURES.items() if name in wanted}
    if "LiPON" in wanted:
        if options.lipon is None or not options.lipon.is_file():
            print("LiPON is left out: give its structure file with --lipon.")
        else:
            lipon = read(options.lipon)
            structures["LiPON"] = Atoms(lipon.numbers, lipon.positions, cell=lipon.cell, pbc=True)
    print_rest(structures)
    print_solids(structures, options.rattles, options.seeds, options.starts)
    print_clusters(structures, options.seeds, options.starts)
    print_fields(structures)
    print_softened()
    if options.mixtures:
        print_mixtures(options.mixtures)
    print_kernel()
    print_clamp(structures)


if __name__ == "__main__":
    main()
